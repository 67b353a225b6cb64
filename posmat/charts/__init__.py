"""Charts: rows -> pictures, one module for each kind. Pure functions of their frames; no torch."""
