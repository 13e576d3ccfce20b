"""A module whose attributes a forward reads."""

GAIN = 1.0
