"""Tasks, protocols and batches: the items of the benchmarks, and how they are asked."""
