"""Learning from frozen teachers: masked token alignment, and self-distillation."""
