"""An index on disk: what is in it, how it is written and read."""
