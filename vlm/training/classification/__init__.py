"""Training of video classifiers: labels instead of captions, in the same loop."""
