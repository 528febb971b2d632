"""`structkd ranking`."""
