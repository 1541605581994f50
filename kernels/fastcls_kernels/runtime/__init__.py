"""Parts that all operations share: backend, checks, tiles, batch invariance."""
