"""Collections, their texts as tokens, and what a teacher is asked about: pairs and lists of candidates."""
