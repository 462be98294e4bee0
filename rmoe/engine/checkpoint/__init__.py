"""Checkpoints: files that are complete or invisible, tensors that fit any layout, the state of a run as plain data."""
