"""Measurements of whole clusters: split against unsplit, the hand-off, an hour of mixed load."""
