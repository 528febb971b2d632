"""Published methods, one file a family; `table` lists all."""
