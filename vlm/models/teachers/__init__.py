"""Encoders trained by others: frame towers for search, and what alignment learns from."""
