"""Reads, checks and unpacks data sets on disk, and renders the embedded one (`emoji_scenes`)."""
