"""The arithmetic that layers share: products, directions, dropout, one forward's state."""
