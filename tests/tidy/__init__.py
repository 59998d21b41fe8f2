"""Checks on the house itself: sizes, names, references, dead code, and the map of rooms."""
