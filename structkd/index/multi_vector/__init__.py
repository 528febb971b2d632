"""Documents of many vectors each, searched by late interaction."""
