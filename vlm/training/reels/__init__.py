"""Learning from reels of the digit world: which claims about many short scenes in a row are true."""
