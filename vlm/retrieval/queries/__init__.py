"""What a search is given: texts, pictures, videos, moments and sums of them, each turned into a vector."""
