"""What all benchmarks share; serve.py and memory.py also run without furina."""
