"""Figures, byte for byte the same from the same records."""
