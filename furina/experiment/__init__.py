"""One experiment from its typed config: fine-tune, score, merge, time, record."""
