"""Scores of live models through lm-eval, with every question's outputs kept."""
