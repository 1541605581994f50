"""The transformers model that was given: whether it is what its config builds, and what becomes of its weights."""
