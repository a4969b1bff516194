"""From files to committed segments; files are decoded in other processes, which they cannot leave."""
