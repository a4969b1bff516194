"""Captions that differ from the right one in a single thing: what a model notices, kind by kind."""
