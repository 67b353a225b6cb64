"""Callables -> rows -> tables -> files. From the first to the last file, `timing` being the idea:

summary, predictions, timing, memory, roofline, sizes, files, run, seed.
"""
