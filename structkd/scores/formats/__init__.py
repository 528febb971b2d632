"""Files of other tools, read and written in blocks; `registry` lists all."""
