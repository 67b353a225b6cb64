"""Inexact multiplication, bit for bit. From the first to the last file, `product` being the idea:

fibonacci, factors (of an error), gemms (a table as GEMMs), formats (files of tables), cmodel (a
model in C), table (a multiplier), shipped (those with a name), product, lookup, compare.
"""
