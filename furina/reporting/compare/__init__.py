"""Comparisons: of rows with a reference row, and of our differences with the paper's."""
