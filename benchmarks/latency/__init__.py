"""What generation takes, merged and unmerged."""
