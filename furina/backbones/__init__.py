"""Pretrained models, tokenizers and their shapes by name."""
