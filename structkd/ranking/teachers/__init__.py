"""Teachers by name, teachers learned from judgements, and the filling of a score cache."""
