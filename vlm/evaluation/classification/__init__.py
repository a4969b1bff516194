"""Testing of classifiers: several views of each video, averaged; one card."""
