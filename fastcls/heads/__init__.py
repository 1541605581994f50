"""Heads that people write themselves, and several heads on one encoder."""
