"""Registers the project's names with mmengine, so that `type='rmoe.NAME'` works in any config of any default scope.

mmengine imports this module when it meets the scope `rmoe`, and the `locations` when it builds something. What needs
mmseg or mmdet is registered when its module is imported: `custom_imports = dict(imports=['rmoe.tasks.segmentation'])`.
"""

from __future__ import annotations

from mmengine import registry
from mmengine.registry import Registry

_CLASSIFICATION = "rmoe.tasks.classification"

_MODELS = ["rmoe.backbones.pyramid", "rmoe.backbones.level_convs", "rmoe.tasks.multi_task", _CLASSIFICATION]
MODELS = Registry("model", parent=registry.MODELS, scope="rmoe", locations=_MODELS)
_DATASETS = [_CLASSIFICATION, "rmoe.engine.task_data"]
DATASETS = Registry("dataset", parent=registry.DATASETS, scope="rmoe", locations=_DATASETS)
METRICS = Registry("metric", parent=registry.METRICS, scope="rmoe", locations=[_CLASSIFICATION])
_HOOKS = ["rmoe.engine.hooks", "rmoe.engine.gate_hooks", "rmoe.engine.predictions"]
HOOKS = Registry("hook", parent=registry.HOOKS, scope="rmoe", locations=_HOOKS)
TRANSFORMS = Registry("transform", parent=registry.TRANSFORMS, scope="rmoe", locations=["rmoe.tasks.images"])
