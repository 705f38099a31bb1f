"""What a run will do, need and take: counted and timed before it starts."""
