"""The embedded data set: scenes of emoji, rendered alike on every machine."""
