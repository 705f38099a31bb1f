"""What merging changes."""
