"""Numbers: the records and what people typed, read strictly, and statistics on them."""
