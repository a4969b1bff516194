"""Training objectives: plain functions from tensors to a scalar, without modules or global state."""
