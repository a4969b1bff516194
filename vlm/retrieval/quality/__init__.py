"""How well an index finds what its owner knows to be in it."""
