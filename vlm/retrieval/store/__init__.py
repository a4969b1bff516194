"""An index published as Lance tables on a shared disk or object store, searched without the index."""
