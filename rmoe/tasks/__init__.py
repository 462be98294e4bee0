"""Adds to timm, mmseg and mmdet what the training tasks need: models, data sets and metrics for mmengine's runner."""
