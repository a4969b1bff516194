"""Keeping an index: verified, repaired, compacted, merged with others, exported."""
