"""Renders the embedded data set: scenes of emoji, the same on every machine."""
