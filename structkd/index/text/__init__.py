"""Search of texts by their words."""
