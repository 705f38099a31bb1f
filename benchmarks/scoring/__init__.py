"""Scoring and written answers beside those of lm-eval."""
