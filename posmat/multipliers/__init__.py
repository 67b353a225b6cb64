"""Inexact multiplication, bit for bit."""
