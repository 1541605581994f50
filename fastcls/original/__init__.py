"""The given transformers model: is it what its config builds, and how are its weights followed?"""
