"""Whole models under inexact multipliers: layers, their conversion in one call, images, training."""
