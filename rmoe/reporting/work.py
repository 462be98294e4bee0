"""The work of one training step: a config's model, built and run once on tensors of its sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.structures import BaseDataElement, PixelData
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from rmoe.engine.cost import Parameters, count_parameters
from rmoe.engine.model_config import for_one_process, moe_dicts
from rmoe.engine.trained import freeze_others, own_experts
from rmoe.errors import UserError
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.state import moe_layers
from rmoe.registry import MODELS
from rmoe.reporting.tracing import Precision, trace, training_loss, without_values
from rmoe.tasks.classification import TimmClassifier

_SENT_AS_COMPUTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_STRIPES = 8  # classes in a made-up label map


@dataclass(frozen=True)
class Setting:
    """How a config is run.

    Attributes:
        processes: one for each GPU.
        ep_size: processes over which experts are spread; None: as the config says. It is 1 for a dense model.
        zero: ZeRO stage.
        micro_batch: images of one process in one step; None: as the config says.
        precision: what matrix products are computed in; weights are float32.
        image_size: (height, width); None: as the config says.
    """

    processes: int
    ep_size: int | None = None
    zero: Literal[0, 1, 2] = 2
    micro_batch: int | None = None
    precision: Precision = "float32"
    image_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Work:
    """What a process does in a step, were it alone with all experts. Sizes in bytes.

    Attributes:
        setting: with the config's values filled in.
        flops: as `Estimate.flops`.
        operators: what was run, as (FLOPs, bytes read and written) of an operator, and how often; see `tracing.Trace`.
        activations: as `Memory.activations`.
        together: gradients and activations when most of both is alive.
        parameters: as `Estimate.parameters`.
        averaged: whether a moving average of the weights is kept.
        shared: parameters and buffers beside the experts.
        shared_trained: of these, those that are not frozen.
        shared_reduced: gradients of those, as DeepSpeed sends them: under autocast in the lower precision where linear
            layers and convolutions have them.
        experts: of all layers.
        experts_trained: of these, those that are not frozen.
        layers: mixtures.
        sent_tokens: what a process gets of the layers whose tokens travel, if the experts are spread.
        sent_experts: all experts of the layers whose experts travel instead.
    """

    setting: Setting
    flops: int
    operators: Mapping[tuple[int, int], int]
    activations: int
    together: tuple[int, int]
    parameters: Parameters
    averaged: bool
    shared: int
    shared_trained: int
    shared_reduced: int
    experts: int
    experts_trained: int
    layers: int
    sent_tokens: int
    sent_experts: int


def run_once(cfg: Config, setting: Setting) -> Work:
    """Builds and runs the model: the first part of an estimate."""
    if cfg.get("default_scope"):
        init_default_scope(cfg.default_scope)
    model = _build(cfg.model, "meta")
    if valued := _needs_values(model):
        torch.manual_seed(0)  # its work hangs on weights and images: the same estimate every time
        model = _build(cfg.model, "cpu")
    paramwise = (cfg.get("optim_wrapper") or {}).get("paramwise_cfg") or {}
    freeze_others(model, paramwise.get("train_only"))
    layers = list(moe_layers(model).values())
    setting = _filled_in(cfg, setting, layers)
    with nullcontext() if valued else without_values():
        if not valued:
            model.to_empty(device="cpu")
        images = _images(model, setting)
        tokens = _tokens_of(layers)
        traced = trace(model, lambda: _loss(model, images), setting.precision)
    experts = {parameter for layer in layers for parameter in own_experts(layer)}
    others = [parameter for parameter in model.parameters() if parameter not in experts]
    return Work(
        setting=setting,
        flops=traced.flops,
        operators=traced.operators,
        activations=traced.activations,
        together=traced.together,
        parameters=count_parameters(model),
        averaged=any(hook["type"] == "rmoe.EMAHook" for hook in cfg.get("custom_hooks") or ()),
        shared=_bytes(others) + _bytes(model.buffers()),
        shared_trained=_bytes(x for x in others if x.requires_grad),
        shared_reduced=_reduced(model, others, setting),
        experts=_bytes(experts),
        experts_trained=_bytes(x for x in experts if x.requires_grad),
        layers=len(layers),
        sent_tokens=sum(_rows(layer, tokens[layer], setting) for layer in layers if layer.config.sends_tokens),
        sent_experts=sum(_bytes(layer.residuals()) for layer in layers if not layer.config.sends_tokens),
    )


def _build(config: Mapping[str, Any], device: str) -> nn.Module:
    """Returns the model on the `device`, all experts in it."""
    with torch.device(device):
        model = revert_sync_batchnorm(MODELS.build(for_one_process(config)))
    model.train()  # which returns nothing in some of OpenMMLab's
    if not (isinstance(model, TimmClassifier) or hasattr(model, "decode_head") or _detects(model)):
        raise UserError(
            f"a {type(model).__name__} cannot be estimated; give a config of rmoe.TimmClassifier, of a segmentor of "
            "mmseg or of a detector of mmdet"
        )
    return model


def _detects(model: nn.Module) -> bool:
    return any(hasattr(model, name) for name in ("bbox_head", "roi_head", "panoptic_head"))


def _needs_values(model: nn.Module) -> bool:
    """Returns whether a model looks at values in training: detectors do, and Mask2Former, to match answers to truth."""
    return _detects(model) or hasattr(getattr(model, "decode_head", None), "pixel_decoder")


def _filled_in(cfg: Config, setting: Setting, layers: Sequence[ResidualMoE]) -> Setting:
    ep_size = setting.ep_size or max((moe.get("ep_size", 1) for moe in moe_dicts(cfg.model)), default=1)
    ep_size = ep_size if layers else 1  # a dense model has nothing to spread
    for layer in layers:
        if setting.processes % ep_size or layer.num_experts % ep_size:
            raise UserError(
                f"ep_size {ep_size} does not divide the {setting.processes} processes and {layer.num_experts} experts; "
                "change --ep-size or --gpus"
            )
    micro_batch = setting.micro_batch or (cfg.get("train_dataloader") or {}).get("batch_size")
    size = setting.image_size or _image_size(cfg)
    for name, value in (("--micro-batch", micro_batch), ("--image-size", size)):
        if not value:
            raise UserError(f"the config does not say it, so give {name}")
    return replace(setting, ep_size=ep_size, micro_batch=micro_batch, image_size=size)


def _image_size(cfg: Config) -> tuple[int, int] | None:
    """Returns the size of the training images: what a segmentor's preprocessor pads to, what a classifier's transform
    gives, or what a detector is evaluated on, lying; its training has many sizes, few of them larger.
    """
    preprocessor = cfg.model.get("data_preprocessor") or {}
    sizes = [preprocessor.get("size"), *(one.get("size") for one in preprocessor.get("batch_augments") or ())]
    size = next((one for one in sizes if one is not None), None)
    if size is None:
        dataset = (cfg.get("train_dataloader") or {}).get("dataset") or {}
        size = (dataset.get("transform") or {}).get("input_size")
    if size is None:
        dataset = (cfg.get("val_dataloader") or {}).get("dataset") or {}
        scales = (step.get("scale") for step in dataset.get("pipeline") or () if step["type"] == "Resize")
        scale = next(scales, None)
        size = scale if scale is None or isinstance(scale, int) else sorted(scale)
    if isinstance(size, int):
        size = (size, size)
    return None if size is None else (size[0], size[1])


def _images(model: nn.Module, setting: Setting) -> dict[str, Any]:
    """Returns a training batch for `model`, as its preprocessor would hand it on."""
    assert setting.micro_batch is not None
    assert setting.image_size is not None
    if _detects(model):
        from rmoe.tasks.detection import made_up_objects

        pixels = torch.randint(256, (setting.micro_batch, 3, *setting.image_size), dtype=torch.uint8)
        samples = [made_up_objects(*setting.image_size) for _ in pixels]
        return model.data_preprocessor({"inputs": list(pixels), "data_samples": samples}, True)  # type: ignore[operator]
    inputs = torch.rand(setting.micro_batch, 3, *setting.image_size)
    if isinstance(model, TimmClassifier):
        return {"inputs": inputs, "labels": torch.empty(setting.micro_batch, dtype=torch.int64)}
    sample = BaseDataElement(metainfo={"img_shape": setting.image_size, "ori_shape": setting.image_size})
    rows, columns = setting.image_size
    classes: Any = model.num_classes
    stripes = torch.arange(columns) * min(_STRIPES, classes) // columns
    sample.gt_sem_seg = PixelData(data=stripes.expand(1, rows, columns))
    return {"inputs": inputs, "data_samples": [sample] * setting.micro_batch}


def _tokens_of(layers: Sequence[ResidualMoE]) -> dict[ResidualMoE, int]:
    """Returns by layer the tokens of its next call, which are filled in when it runs."""
    tokens: dict[ResidualMoE, int] = {}

    def note(layer: Any, inputs: tuple[Tensor]) -> None:
        tokens[layer] = layer.form.tokens(inputs[0]).shape[:-1].numel()

    for layer in layers:
        layer.register_forward_pre_hook(note)
    return tokens


def _loss(model: nn.Module, images: dict[str, Any]) -> Tensor:
    try:
        return training_loss(model, images)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(f"what the model computes depends on values ({error}), so it cannot be estimated") from error


def _rows(layer: ResidualMoE, tokens: int, setting: Setting) -> int:
    """Returns the bytes of the rows that a process gets for its experts."""
    return tokens * layer.config.experts_per_token * layer.gate.width * getattr(torch, setting.precision).itemsize


def _reduced(model: nn.Module, parameters: Iterable[nn.Parameter], setting: Setting) -> int:
    """Returns the bytes of the gradients of `parameters` as they are sent (deepspeed/runtime/torch_autocast.py)."""
    lower = {x for m in model.modules() if type(m) in _SENT_AS_COMPUTED for x in m.parameters(recurse=False)}
    size = getattr(torch, setting.precision).itemsize
    return sum(x.numel() * (size if x in lower else x.itemsize) for x in parameters if x.requires_grad)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)
