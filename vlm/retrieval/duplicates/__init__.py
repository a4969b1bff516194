"""The same footage twice: pictures as hashes, and stretches of two videos that show the same."""
