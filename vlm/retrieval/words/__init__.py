"""What is written about videos: names, folders, tags, and the texts beside them; and how to search it."""
