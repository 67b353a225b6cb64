"""Callables -> rows -> tables -> files."""
