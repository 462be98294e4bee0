"""What a training step will cost, before anything is trained: FLOPs, memory and traffic of one process.

The model of a config is built and run, forward and backward, on tensors that have shapes and no values. What runs is
the code that trains, so the FLOPs and the live bytes are those of its own operators; what only values decide is
assumed even: every expert has equally many tokens, and no label is void. A detector, whose work hangs on what it finds,
is run for real on the CPU, on made-up images and objects; that takes its time, and shows the beginning of a training,
when few proposals are right and its mask head has less to do than later. ZeRO's shares, those of expert parallelism and
the traffic follow from sizes.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.structures import BaseDataElement, PixelData
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rmoe.backbones.build import allow_random_cores
from rmoe.engine.cost import Parameters, count_parameters, counted_flops
from rmoe.engine.prepare import moe_dicts
from rmoe.errors import UserError
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.records import collect
from rmoe.moe.state import moe_layers
from rmoe.registry import MODELS
from rmoe.tasks.classification import TimmClassifier

Precision = Literal["float32", "bfloat16", "float16"]
_WEIGHT_BYTES, _ADAM_STATES = 4, 2  # weights stay float32 under autocast; AdamW keeps two float32 of each
_BUCKET_BYTES = 4 * 50_000_000  # of reduce_bucket_size elements, as ds_configs/ have it; DeepSpeed's default is 5e8


@dataclass(frozen=True)
class Setting:
    """How a config is run.

    Attributes:
        processes: one for each GPU.
        ep_size: processes over which experts are spread; None: as the config says.
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
class Memory:
    """Bytes of one process.

    Attributes:
        weights: parameters and buffers.
        average: their moving average, where the config has an `rmoe.EMAHook`.
        gradients: of parameters, in this process's share from stage 2 on.
        optimizer: AdamW's states and, from ZeRO stage 1 on, DeepSpeed's second copy of the weights they belong to.
        buckets: DeepSpeed's buffer to reduce gradients from, as large as ds_configs/ say. It is reserved as a whole on
            a GPU; on a CPU only what is used becomes resident.
        activations: most bytes of other tensors that are alive at once in forward and backward.
        step: most bytes of gradients and activations together: the former come while the latter go. Where gradients
            accumulate over several batches, it is the sum of both instead.
    """

    weights: int
    average: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    step: int

    @property
    def total(self) -> int:
        """Most bytes at once."""
        return self.weights + self.average + self.optimizer + self.buckets + self.step


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends in a step, by ring algorithms.

    Attributes:
        all_to_all: tokens to their experts and back, and so their gradients.
        gather_experts: experts to the tokens, and their gradients back.
        reduce_gradients: all-reduce over the processes that share a parameter.
        gather_weights: updated weights, from ZeRO stage 1 on.
    """

    all_to_all: int
    gather_experts: int
    reduce_gradients: int
    gather_weights: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Estimate:
    """Cost of one training step.

    Attributes:
        setting: what it is for, with the config's values filled in.
        flops: of one process, forward and backward; matrix products and convolutions.
        parameters: over all processes.
        memory: of one process.
        traffic: of one process.
    """

    setting: Setting
    flops: int
    parameters: Parameters
    memory: Memory
    traffic: Traffic

    def __str__(self) -> str:
        s, m, t = self.setting, self.memory, self.traffic
        height, width = s.image_size or (0, 0)
        rows = [
            ("images", f"{s.micro_batch} of {height} × {width} on each of {s.processes} processes, {s.precision}"),
            ("experts", f"spread over {s.ep_size} processes; ZeRO stage {s.zero}"),
            ("parameters", "{:,} total, {:,} active, {:,} trainable".format(*asdict(self.parameters).values())),
            ("FLOPs", f"{self.flops:.4g} in each process and step"),
            *((f"memory: {name}", _megabytes(value)) for name, value in asdict(m).items()),
            ("memory: total", _megabytes(m.total)),
            *((f"sent: {name.replace('_', ' ')}", _megabytes(value)) for name, value in asdict(t).items()),
            ("sent: total", _megabytes(t.total)),
        ]
        return "\n".join(f"{name:<24} {value:>16}" if "MB" in value else f"{name:<24} {value}" for name, value in rows)


@dataclass(frozen=True)
class Work:
    """What a process does in a step, were it alone with all experts. Sizes in bytes.

    Attributes:
        setting: with the config's values filled in.
        flops: as `Estimate.flops`.
        activations: as `Memory.activations`.
        together: gradients and activations when most of both is alive.
        parameters: as `Estimate.parameters`.
        averaged: whether a moving average of the weights is kept.
        shared: parameters and buffers beside the experts.
        shared_trained: of these, those that are not frozen.
        experts: of all layers.
        experts_trained: of these, those that are not frozen.
        sent_tokens: what a process gets of the layers whose tokens travel, if the experts are spread.
        sent_experts: all experts of the layers whose experts travel instead.
    """

    setting: Setting
    flops: int
    activations: int
    together: tuple[int, int]
    parameters: Parameters
    averaged: bool
    shared: int
    shared_trained: int
    experts: int
    experts_trained: int
    sent_tokens: int
    sent_experts: int


def estimate(cfg: Config, setting: Setting) -> Estimate:
    """The cost of one training step of a config.

    Args:
        cfg: of a classifier, a segmentor of mmseg or a detector of mmdet; dense cores and data sets need not be there.
        setting: how it is run.

    Raises:
        UserError: ep_size does not fit, a size that neither the config nor the setting gives, or a model of another
            kind.
    """
    with torch.random.fork_rng([]):
        return share_out(run_once(cfg, setting))


def run_once(cfg: Config, setting: Setting) -> Work:
    """The part of `estimate` that builds and runs the model."""
    if cfg.get("default_scope"):
        init_default_scope(cfg.default_scope)
    model = _build(cfg.model, "meta")
    if detects := _detects(model):
        torch.manual_seed(0)  # its work hangs on weights and images: the same estimate every time
        model = _build(cfg.model, "cpu")
    layers = list(moe_layers(model).values())
    setting = _filled_in(cfg, setting, layers)
    with nullcontext() if detects else _without_values():
        if not detects:
            model.to_empty(device="cpu")
        images = _images(model, setting)
        tokens = _tokens_of(layers)
        traced = trace(model, lambda: _loss(model, images), setting.precision)
    experts = {parameter for layer in layers for parameter in layer.deepspeed_moe.parameters()}
    others = [parameter for parameter in model.parameters() if parameter not in experts]
    return Work(
        setting=setting,
        flops=traced.flops,
        activations=traced.activations,
        together=traced.together,
        parameters=count_parameters(model),
        averaged=any(hook["type"] == "rmoe.EMAHook" for hook in cfg.get("custom_hooks") or ()),
        shared=_bytes(others) + _bytes(model.buffers()),
        shared_trained=_bytes(x for x in others if x.requires_grad),
        experts=_bytes(experts),
        experts_trained=_bytes(x for x in experts if x.requires_grad),
        sent_tokens=sum(_rows(layer, tokens[layer], setting) for layer in layers if layer.config.sends_tokens),
        sent_experts=sum(_bytes(layer.residuals()) for layer in layers if not layer.config.sends_tokens),
    )


def share_out(work: Work) -> Estimate:
    """The part of `estimate` that spreads the work over processes."""
    setting, ep_size = work.setting, work.setting.ep_size or 1
    replicas = setting.processes // ep_size  # of each expert
    experts, experts_trained = work.experts // ep_size, work.experts_trained // ep_size
    trained, part = work.shared_trained + experts_trained, work.shared_trained // setting.processes
    part += experts_trained // replicas
    once = round(_others(setting.processes) * work.shared_trained + _others(replicas) * experts_trained)
    arrived = work.sent_tokens + work.sent_experts if ep_size > 1 else 0
    gradients, (then, beside) = part if setting.zero == 2 else trained, work.together
    kept = gradients / max(1, work.shared_trained + work.experts_trained)
    memory = Memory(
        weights=work.shared + experts,
        average=work.averaged * (work.shared + experts),
        gradients=gradients,
        optimizer=(_ADAM_STATES + 1) * part if setting.zero else _ADAM_STATES * trained,
        buckets=_BUCKET_BYTES if setting.zero else 0,
        activations=work.activations + arrived,
        step=max(work.activations, round(kept * then) + beside) + arrived,
    )
    traffic = Traffic(
        all_to_all=round(4 * _others(ep_size) * work.sent_tokens),
        gather_experts=round(2 * _others(ep_size) * work.sent_experts),
        reduce_gradients=2 * once,
        gather_weights=once if setting.zero else 0,
    )
    return Estimate(setting, work.flops, work.parameters, memory, traffic)


def training_loss(model: Any, images: Mapping[str, Any]) -> Tensor:
    """What training minimises: the model's losses and its gates'.

    Args:
        model: of mmengine's protocol, or a DeepSpeed engine around it.
        images: as the model's preprocessor gives them.
    """
    with collect() as records:
        losses = model(**images, mode="loss")
    return model.parse_losses(records.join(losses))[0]


class Trace(NamedTuple):
    """What was counted while a step ran: FLOPs; the peak of live bytes beside parameters and their gradients; and the
    bytes of gradients and of the rest at the peak of both together."""

    flops: int
    activations: int
    together: tuple[int, int]


def trace(model: nn.Module, loss: Callable[[], Tensor], precision: Precision = "float32") -> Trace:
    """Runs `loss` forward and backward and counts; on tensors with values or, within FakeTensorMode, without."""
    flops: list[int] = []
    live = _LiveBytes(model)
    with counted_flops(flops), live:
        with torch.autocast("cpu", getattr(torch, precision), enabled=precision != "float32"):
            value = loss()
        value.backward()
    del value
    return Trace(flops[0], *live.peaks(parameter.grad for parameter in model.parameters()))


class _LiveBytes(TorchDispatchMode):
    """Keeps book of tensors that are made and freed, those of `model` aside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._events: list[tuple[int, int]] = []  # (number of the storage, bytes; negative where it is freed)
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for x in (*model.parameters(), *model.buffers()):
            self._numbers[x.untyped_storage()] = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._see(x.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        if storage not in self._numbers:
            number, size = len(self._events), storage.nbytes()
            self._numbers[storage] = number
            self._events.append((number, size))
            weakref.finalize(storage, self._events.append, (number, -size))

    def peaks(self, gradients: Iterable[Tensor | None]) -> tuple[int, tuple[int, int]]:
        """Most bytes of others than `gradients` at once; bytes of gradients and of others at their common peak."""
        theirs = {self._numbers.get(x.untyped_storage()) for x in gradients if x is not None}
        now, highest, together = [0, 0], 0, (0, 0)  # gradients, others
        for number, size in self._events:
            now[number not in theirs] += size
            highest = max(highest, now[1])
            together = max(together, (now[0], now[1]), key=sum)
        return highest, together


@contextmanager
def _without_values() -> Iterator[None]:
    """Inside, tensors have no values; what only values can tell is even: masks keep all, experts are equally full."""
    even = _Even()
    # FakeTensor's own would ask for values before any mode sees it.
    tolist = mock.patch.object(FakeTensor, "tolist", lambda x: even.shares(len(x)))
    with FakeTensorMode(allow_non_fake_inputs=True), even, tolist:
        yield


class _Even(TorchDispatchMode):
    _counted = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bincount.default:
            self._counted = args[0].numel()
            return args[0].new_empty((kwargs or {}).get("minlength", args[-1]))
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _all_kept(args[1]))
        return func(*args, **(kwargs or {}))

    def shares(self, parts: int) -> list[int]:
        """The last `bincount`, with its elements spread evenly over `parts` places."""
        return [self._counted // parts + (part < self._counted % parts) for part in range(parts)]


def _all_kept(index: Sequence[Tensor | None]) -> list[Tensor | None]:
    """An index in which every mask is replaced by as many positions as it has elements."""
    found: list[Tensor | None] = []
    for part in index:
        if part is not None and part.dtype == torch.bool:
            found += [part.new_empty(part.numel(), dtype=torch.int64) for _ in range(part.ndim)]
        else:
            found.append(part)
    return found


def _build(config: Mapping[str, Any], device: str) -> nn.Module:
    """The model on the `device`, all experts in it."""
    with torch.device(device):
        model = revert_sync_batchnorm(MODELS.build(_alone(config)))
    model.train()  # which returns nothing in some of OpenMMLab's
    if not (isinstance(model, TimmClassifier) or hasattr(model, "decode_head") or _detects(model)):
        raise UserError(
            f"a {type(model).__name__} cannot be estimated; give a config of rmoe.TimmClassifier, of a segmentor of "
            "mmseg or of a detector of mmdet"
        )
    return model


def _detects(model: nn.Module) -> bool:
    return hasattr(model, "bbox_head") or hasattr(model, "roi_head")


def _alone(config: Any) -> Any:
    """A model's config that reads no checkpoint and needs no other process."""
    alone = copy.deepcopy(config)
    for node in _mappings(alone):
        if "core" in node:
            node["core"] = None
        if node.get("pretrained"):
            node["pretrained"] = False if node["pretrained"] is True else None
    allow_random_cores(alone)
    for moe in moe_dicts(alone):
        moe["ep_size"] = 1  # type: ignore[index]
    return alone


def _mappings(node: Any) -> Iterator[Any]:
    """Every mapping in a config, itself included."""
    if isinstance(node, Mapping):
        yield node
    if isinstance(node, (Mapping, list, tuple)):
        for value in node.values() if isinstance(node, Mapping) else node:
            yield from _mappings(value)


def _filled_in(cfg: Config, setting: Setting, layers: Sequence[ResidualMoE]) -> Setting:
    ep_size = setting.ep_size or max((moe.get("ep_size", 1) for moe in moe_dicts(cfg.model)), default=1)
    for layer in layers:
        if setting.processes % ep_size or layer.num_experts % ep_size:
            raise UserError(
                f"ep_size {ep_size} does not divide the {setting.processes} processes and {layer.num_experts} experts; "
                "change --ep-size or --gpus"
            )
    micro_batch = setting.micro_batch or cfg.get("train_dataloader", {}).get("batch_size")
    size = setting.image_size or _image_size(cfg)
    for name, value in (("--micro-batch", micro_batch), ("--image-size", size)):
        if not value:
            raise UserError(f"the config does not say it, so give {name}")
    return replace(setting, ep_size=ep_size, micro_batch=micro_batch, image_size=size)


def _image_size(cfg: Config) -> tuple[int, int] | None:
    """Of the training images: what a segmentor's preprocessor pads to, what a classifier's transform gives, or what a
    detector is evaluated on, lying; its training has many sizes, few of them larger.
    """
    size = (cfg.model.get("data_preprocessor") or {}).get("size")
    if size is None:
        size = cfg.get("train_dataloader", {}).get("dataset", {}).get("transform", {}).get("input_size")
    if size is None:
        steps = (cfg.get("val_dataloader") or {}).get("dataset", {}).get("pipeline", [])
        size = next((sorted(step["scale"]) for step in steps if step["type"] == "Resize"), None)
    if isinstance(size, int):
        size = (size, size)
    return None if size is None else (size[0], size[1])


def _images(model: nn.Module, setting: Setting) -> dict[str, Any]:
    """A training batch for `model`, as its preprocessor would hand it on."""
    assert setting.micro_batch is not None
    assert setting.image_size is not None
    if _detects(model):
        from rmoe.tasks.detection import made_up_objects

        pixels = torch.randint(256, (setting.micro_batch, 3, *setting.image_size), dtype=torch.uint8)
        samples = [made_up_objects(*setting.image_size) for _ in pixels]
        return model.data_preprocessor({"inputs": list(pixels), "data_samples": samples}, True)  # type: ignore[operator]
    inputs = torch.empty(setting.micro_batch, 3, *setting.image_size)
    if isinstance(model, TimmClassifier):
        return {"inputs": inputs, "labels": torch.empty(setting.micro_batch, dtype=torch.int64)}
    sample = BaseDataElement(metainfo={"img_shape": setting.image_size, "ori_shape": setting.image_size})
    sample.gt_sem_seg = PixelData(data=torch.empty(1, *setting.image_size, dtype=torch.int64))
    return {"inputs": inputs, "data_samples": [sample] * setting.micro_batch}


def _tokens_of(layers: Sequence[ResidualMoE]) -> dict[ResidualMoE, int]:
    """By layer, the tokens of its next call; filled in when it runs."""
    tokens: dict[ResidualMoE, int] = {}

    def note(layer: Any, inputs: tuple[Tensor]) -> None:
        tokens[layer] = inputs[0].shape[:-1].numel()

    for layer in layers:
        layer.register_forward_pre_hook(note)
    return tokens


def _loss(model: nn.Module, images: dict[str, Any]) -> Tensor:
    try:
        return training_loss(model, images)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(f"what the model computes depends on values ({error}), so it cannot be estimated") from error


def _rows(layer: ResidualMoE, tokens: int, setting: Setting) -> int:
    """Bytes of the rows that a process gets for its experts."""
    return tokens * layer.config.top_k * layer.gate.weight.shape[1] * getattr(torch, setting.precision).itemsize


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def _others(processes: int) -> float:
    """Share of a tensor that belongs to other processes than this one."""
    return (processes - 1) / processes


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
