"""`structkd graph`."""
