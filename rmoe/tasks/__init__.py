"""What the training tasks need beyond timm, mmseg and mmdet: models, data sets and metrics for mmengine's runner."""
