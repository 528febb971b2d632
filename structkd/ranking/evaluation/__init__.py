"""Measures, wins and losses, what serving costs, and which weights to keep."""
