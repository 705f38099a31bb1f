"""The verbs on a model: adapt, read, merge, save, export, combine, remove."""
