"""Before training: clean captions, find copies of videos, find what two data sets share."""
