"""Networks: teachers and students, how they are trained, what a teacher says of every node."""
