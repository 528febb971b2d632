"""A graph as a task: readers, datasets, splits, the views that training may see, sampling."""
