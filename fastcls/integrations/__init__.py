"""Other libraries that call fast models, or are called by them."""
