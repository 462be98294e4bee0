"""Loads a core: the weights of a checkpoint file go to a timm model, and no key is lost silently.

The names of other code bases are translated to timm's first (`rmoe.backbones.checkpoint_formats`). A file may hold more
than the backbone, such as a segmentation head, and the backbone may stand under any prefix: the prefix that makes most
keys match is taken. Each key that still has no partner, in the file or in the model, must be covered by one of the
rules below and is reported with the reason of that rule. Otherwise the checkpoint is another model's and is refused.
"""

from __future__ import annotations

import math
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table_simple
from torch import Tensor, nn

from rmoe.backbones.checkpoint_formats import NOT_BACKBONE, check_one, translate
from rmoe.backbones.hub import INDEX, located, read_shards, weights_in
from rmoe.backbones.swin_moe import merge, rank_files
from rmoe.errors import UserError
from rmoe.moe.experts import WEIGHTS, described, is_weight
from rmoe.moe.gate import absent_of_gates
from rmoe.moe.state import experts_of, global_state_dict, holds_experts, load_global_state_dict

# (pattern, reason). LEFT_OUT: keys that the file may hold and the model lack. ABSENT: keys that the file may lack.
CLASSIFIER = ((r"^(head|head_dist|fc|classifier)\.", "classifier"),)
LEFT_OUT = (
    *CLASSIFIER,
    (r"(relative_position_index|relative_coords_table|attn_mask)$", "computed by the model"),
    (r"^norm\d+\.", "norm of an output level"),
)
ABSENT = (
    *CLASSIFIER,
    (r"^(norm|fc_norm)\.", "norm before the classifier, not in the file"),
    (r"^norm\d+\.", "norm of an output level, not in the file"),
)
Rules = tuple[tuple[str, str], ...]
_ADVICE = "give the checkpoint of this architecture"
_MIXTURE = "give the checkpoint of a run with this architecture and this moe (its model.json says which it had)"
_CONTAINERS = ("model", "state_dict")
_LISTED = 3  # keys that a message names
_COPY = 0.9  # share of the backbone under a prefix, above which it is a whole copy: heads need not be there
_LONGEST = 1000  # characters of a key


@dataclass
class CoreReport:
    """Tells what became of every key.

    Attributes:
        path: the checkpoint.
        source: the code base whose names it has.
        loaded: number of weights that were loaded.
        converted: which of these changed their values, by what was done.
        resized: which of these are position tables that were interpolated.
        left_out: keys that were not loaded, by reason.
        note: what a user must know besides.
    """

    path: Path
    source: str = "timm"
    loaded: int = 0
    converted: dict[str, list[str]] = field(default_factory=dict)
    resized: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    note: str = ""

    def leave(self, key: str, reason: str) -> None:
        """Notes that `key` was not loaded."""
        self.left_out.setdefault(reason, []).append(key)

    def __str__(self) -> str:
        lines = [f"core {self.path} ({self.source}): {self.loaded} weights loaded"]
        lines += [f"  {len(keys)} converted ({done}): {', '.join(keys)}" for done, keys in self.converted.items()]
        if self.resized:
            lines.append(f"  {len(self.resized)} position tables resized: {', '.join(self.resized)}")
        lines += [f"  {len(keys)} left out ({reason}): {', '.join(keys)}" for reason, keys in self.left_out.items()]
        return "\n".join([*lines, f"  {self.note}"] if self.note else lines)


def load_core(
    model: nn.Module,
    path: str | Path,
    level_norms: Mapping[int, nn.Module] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> CoreReport:
    """Loads the weights of `path` into the timm `model`, in place, all of them or none.

    Args:
        model: a dense model as `timm.create_model` makes it; for a mixture's checkpoint, the upcycled model. Where its
            experts are spread over processes, all processes call this, and each takes its own experts.
        path: a `.pth` file (a state dict, bare or under "model" or "state_dict"), a `.safetensors` file, a folder with
            a model.safetensors or its shards, such as the work dir of a finished run, NAME.pth for Swin-MoE's
            NAME.pth.rank0 etc., or hf-hub:ORG/NAME. Its names are timm's or those of a format in
            `rmoe.backbones.checkpoint_formats`.
        level_norms: a norm for each output level, not part of `model`, which is loaded where the file has it.
        state: what `read_checkpoint` returned for `path`, if it has been read already.

    Returns:
        The report on what became of every key.

    Raises:
        UserError: there is no such file, it was cut short, or it holds more than tensors; its weights are no dense
            floating-point tensors, or are not finite in the model's dtype; it holds the backbone twice, lacks a weight
            of the model, has one in another shape, or has one that the model has no place for; the model is on the meta
            device, without values.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"the model is {model!r}; give a torch.nn.Module, such as timm.create_model returns")
    path, level_norms = checked_path(path), level_norms or {}
    if on_meta := [key for key, x in model.state_dict().items() if x.is_meta]:
        raise UserError(
            f"the model has no memory for {_some(on_meta)} (meta device); give it memory by to_empty(device=…) first"
        )
    foreign = translate(read_checkpoint(path) if state is None else state)
    report = CoreReport(
        path, foreign.source, converted=foreign.converted, left_out=dict(foreign.left_out), note=foreign.note
    )
    own = global_state_dict(model)
    wanted = own | level_keys(level_norms)
    found = _without_prefix(foreign.state, wanted, report)
    advice = _MIXTURE if holds_experts(found) or holds_experts(own) else _ADVICE
    theirs, ours = experts_of(found)[1], experts_of(own)[1]
    if theirs != ours and theirs and ours:
        raise UserError(
            f"{path} holds {theirs} experts in a layer, and the model's moe has num_experts={ours}; {advice}"
        )
    if surplus := _unexplained(LEFT_OUT, [key for key in found if key not in wanted], report):
        raise UserError(f"{path} holds {_counted(surplus)} that the model has no place for; {advice}")
    gates = absent_of_gates(found, own)
    for key in gates:
        report.leave(key, "bias of a gate, not in the file: zeros")
    if lacking := _unexplained(ABSENT, [key for key in wanted if key not in found and key not in gates], report):
        raise UserError(f"{path} lacks {_counted(lacking)} of the model; {advice}")
    fitted = {}
    for key in (key for key in wanted if key in found):
        value = found[key]
        if value.shape != wanted[key].shape and _reason(CLASSIFIER, key):
            report.leave(key, "classifier of other classes")
        else:
            fitted[key] = _cast(key, _fit(model, key, value, wanted[key].shape, report, advice), wanted[key], path)
    load_global_state_dict(model, {key: fitted.get(key, x) for key, x in (own | gates).items()})
    with torch.no_grad():
        for key, value in level_keys(level_norms).items():
            value.copy_(fitted.get(key, value))
    report.loaded = len(fitted)
    return report


def level_keys(level_norms: Mapping[int, nn.Module]) -> dict[str, Tensor]:
    """Returns the weights of output levels' norms by the names that mmseg's and mmdet's backbones give them."""
    return {
        f"norm{level}.{key}": value for level, norm in level_norms.items() for key, value in norm.state_dict().items()
    }


def checked_path(value: Any, name: str = "the checkpoint") -> Path:
    """Returns `value` as a path.

    Raises:
        UserError: `value` is neither a string nor a path, or is a path that the system refuses.
    """
    if not isinstance(value, str | Path) or not str(value):
        raise UserError(f"{name} is {value!r}; give the path of a checkpoint file or of a finished run's folder")
    try:
        Path(value).exists()
    except OSError as error:
        raise UserError(f"{name} cannot be looked for: {error}; give another path") from error
    return Path(value)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a checkpoint file or work dir by name, to the CPU; nothing in the file is executed.

    Raises:
        UserError: the file is missing, was cut short, or holds something else; see `load_core`.
    """
    path = located(checked_path(path))
    if files := rank_files(path):
        ranks, master = files
        shared = None if master is None else read_file(master)
        return merge(path, [read_file(file) for file in ranks.values()], shared)
    return read_file(weights_in(path) if path.is_dir() else path)


def read_file(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of one file; see `read_checkpoint`."""
    if not path.is_file():
        raise UserError(
            f"there is no checkpoint {path}; give a .pth or .safetensors file or the folder of a finished run"
        )
    try:
        state: Any = _read(path)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        # torch raises this for a file that is no checkpoint as well as for one that holds other objects.
        raise UserError(
            f"{path} is not a checkpoint, or holds Python objects besides tensors, which are not loaded; "
            "save its state dict alone"
        ) from error
    except Exception as error:  # torch, pickle, zipfile and safetensors raise errors of many types at damaged bytes
        raise UserError(
            f"{path} cannot be read ({_first_line(error)}); it was cut short or is no checkpoint: copy or save it again"
        ) from error
    for container in _CONTAINERS:
        if isinstance(state, Mapping) and isinstance(state.get(container), Mapping):
            state = state[container]
    no_state = f"{path} holds no state dict of tensors, bare or under {' or '.join(map(repr, _CONTAINERS))}"
    if not isinstance(state, Mapping):
        raise UserError(f"{no_state}: it is a {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or len(key) > _LONGEST:
            raise UserError(
                f"{no_state}: under {str(key)[:_LONGEST]!r} ({type(key).__name__}) is a {type(value).__name__}"
            )
        if value.is_meta or value.is_nested or not (is_weight(value) or _is_count(value)):
            raise UserError(f"'{key}' in {path} is {described(value)}; {WEIGHTS}: convert it")
    bad = [key for key, value in state.items() if is_weight(value) and not value.isfinite().all()]
    if bad:
        raise UserError(f"{path} holds values that are not finite in {_some(bad)}; use an earlier checkpoint")
    return dict(state)


def _read(path: Path) -> Any:
    if path.name == INDEX:
        return read_shards(path)
    safe = path.suffix == ".safetensors"
    return load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)


def _without_prefix(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], report: CoreReport) -> dict[str, Tensor]:
    """Returns what stands in the file under the prefix that makes most keys match the model's, and reports the rest.

    Raises:
        UserError: two prefixes do so.
    """
    prefixes: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        tails = (".".join(parts[start:]) for start in range(len(parts)))
        prefixes.update(key[: -len(tail)] for tail in tails if tail in wanted)
    prefix, most = prefixes.most_common(1)[0] if prefixes else ("", 0)
    if most > _COPY * len(wanted):  # fewer tell of another model, which is refused for what it lacks
        check_one([one for one, count in prefixes.items() if count == most])
    for key in state:
        if not key.startswith(prefix):
            report.leave(key, NOT_BACKBONE)
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _is_count(x: Tensor) -> bool:
    """Returns whether `x` is a dense tensor of whole numbers, as counts and indices are, or of truth values."""
    whole = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)
    return x.layout == torch.strided and x.dtype in whole


def _cast(key: str, value: Tensor, wanted: Tensor, path: Path) -> Tensor:
    """Returns `value` in the dtype of `wanted`; a weight must stay a weight, and a count a count."""
    if is_weight(value) != is_weight(wanted) or (value.dtype == torch.bool) != (wanted.dtype == torch.bool):
        raise UserError(
            f"'{key}' is {described(value)} in {path} and {described(wanted)} in the model; {WEIGHTS}: convert it"
        )
    cast = value.to(wanted.dtype)
    if cast.dtype != value.dtype and is_weight(cast) and not cast.isfinite().all():
        raise UserError(f"'{key}' in {path} holds values beyond the model's {described(wanted)}; use a wider dtype")
    return cast


def _fit(model: nn.Module, key: str, value: Tensor, shape: torch.Size, report: CoreReport, advice: str) -> Tensor:
    """Returns `value` in the model's shape: position tables are interpolated, anything else must have it already."""
    if value.shape == shape:
        return value
    owner, _, name = key.rpartition(".")
    if name == "relative_position_bias_table" and value.ndim == 2 and value.shape[1] == shape[1]:
        window: Any = getattr(model.get_submodule(owner), "window_size", None)
        if window and _is_square(len(value) - shape[0] + math.prod(2 * side - 1 for side in window)):
            report.resized.append(key)
            return resize_rel_pos_bias_table_simple(value.float(), new_window_size=window, new_bias_shape=tuple(shape))
    if key == "pos_embed" and value.ndim == 3 and (len(value), value.shape[2]) == (shape[0], shape[2]):
        vit: Any = model
        grid = getattr(getattr(vit, "patch_embed", None), "grid_size", None)
        prefix_tokens = 0 if getattr(vit, "no_embed_class", False) else getattr(vit, "num_prefix_tokens", 0)
        if grid and _is_square(value.shape[1] - prefix_tokens):
            report.resized.append(key)
            return resample_abs_pos_embed(value, new_size=list(grid), num_prefix_tokens=prefix_tokens)
    raise UserError(
        f"{key} has the shape {tuple(value.shape)} in {report.path} and {tuple(shape)} in the model; {advice}"
    )


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _reason(rules: Rules, key: str) -> str | None:
    return next((reason for pattern, reason in rules if re.search(pattern, key)), None)


def _unexplained(rules: Rules, keys: list[str], report: CoreReport) -> list[str]:
    """Reports the keys that a rule covers and returns the others."""
    for key in keys:
        if reason := _reason(rules, key):
            report.leave(key, reason)
    return [key for key in keys if not _reason(rules, key)]


def _counted(keys: list[str]) -> str:
    return f"{len(keys)} {'weight' if len(keys) == 1 else 'weights'} ({_some(keys)})"


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:_LISTED]) + (f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else "")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
