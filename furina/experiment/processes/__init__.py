"""The processes of a run that several devices train: start them, wait, and tell why they end."""
