"""Speed, memory and exactness, measured beside peers; one folder a question."""
