"""Training: one flat loop over interchangeable data sources and engines, resumable to the bit."""
