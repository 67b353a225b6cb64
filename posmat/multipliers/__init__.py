"""Inexact multiplication, bit for bit. From the first to the last file, `product` being the idea:

fibonacci, factors (of an error), gemms (a table as GEMMs), table (a multiplier), product, lookup.
"""
