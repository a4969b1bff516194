"""Studies: several recipes, each trained from several seeds and measured on the same clips, side by side."""
