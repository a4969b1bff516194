"""Cards from score matrices that somebody else computed, and corrections of any scores for hubs."""
