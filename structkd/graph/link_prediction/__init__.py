"""Links in place of classes: the task, its teacher and student, their comparison."""
