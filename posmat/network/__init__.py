"""Whole models under inexact multipliers: layers, conversion in one call, images, training."""
