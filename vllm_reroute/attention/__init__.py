"""Paged attention over a stage's own subset of tokens."""
