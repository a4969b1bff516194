"""Public benchmarks: where their files come from, what they must hold, and how they become evaluations."""
