"""Moments of videos found by queries: a model's or somebody's predictions, and what finds them blindly."""
