"""What a step of training takes."""
