"""Bi- and cross-encoders that teach each other without labels."""
