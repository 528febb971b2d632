"""Approximate search of vectors, its recall measured."""
