"""What a student is taught: several teachers as one target, and the default method's own estimate of every node."""
