"""The command line: thin wrappers that parse, call and print; no arithmetic and no file format here."""
