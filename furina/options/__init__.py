"""What an option may be: its type, in words, and read without torch."""
