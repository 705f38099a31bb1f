"""What an option may be: its type, in words, and checked without torch."""
