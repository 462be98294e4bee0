"""Benchmarks of the layer, the training step, whole pipelines and scaling; each prints a table and writes JSON."""
