"""Builds a backbone in its order: the timm model, its dense core, then the residual experts around the core.

Nothing here needs mmengine; where it is loaded, the reports go to the log of its run.
"""

from __future__ import annotations

import difflib
import glob
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from rmoe.backbones import swin_moe
from rmoe.backbones.checkpoint_formats import SWIN_MOE, translate
from rmoe.backbones.load_core import CoreReport, checked_path, level_keys, load_core, read_checkpoint
from rmoe.backbones.networks import one_line
from rmoe.backbones.upcycle import upcycle
from rmoe.backbones.windows import fuse_attention
from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.state import experts_of, global_state_dict, holds_experts, save_tensors

_MOST_RANKS = 65536


def timm_model(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Returns `timm.create_model(name, **kwargs)`.

    Raises:
        UserError: timm has no model of that name (the nearest are named), or it refuses the keyword arguments.
    """
    if not isinstance(name, str):
        raise UserError(f"model is {name!r}; it is the name of a timm model, such as 'swin_tiny_patch4_window7_224'")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists the names"
        raise UserError(f"timm has no model '{name}'; {hint}")
    kwargs = checked_kwargs(kwargs)
    try:
        net = timm.create_model(name, **kwargs)
    except Exception as error:  # timm raises errors of many types while it builds
        raise UserError(
            f"timm cannot build {name} with kwargs {kwargs}: {one_line(error)}; change kwargs to what timm takes"
        ) from error
    fuse_attention(net)
    return net


def checked_kwargs(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the keyword arguments of a timm model as a dict, which is empty for None.

    Raises:
        UserError: `kwargs` is no mapping, or has a key that is no string.
    """
    if not isinstance(kwargs, Mapping | None) or not all(isinstance(key, str) for key in kwargs or ()):
        raise UserError(f"kwargs are {kwargs!r}; they are a dict of timm's arguments by name, such as drop_path_rate")
    return dict(kwargs or {})


def brings_weights(kwargs: Mapping[str, Any]) -> bool:
    """Returns whether timm loads weights into a model that it builds with these arguments."""
    return bool(kwargs.get("pretrained") or kwargs.get("checkpoint_path"))


def add_weights(
    model: nn.Module,
    core: str | Path | None,
    moe: Mapping[str, Any] | None,
    level_norms: Mapping[int, nn.Module] | None = None,
    *,
    allow_random_core: bool = False,
) -> None:
    """Loads the core if one is given, adds residual experts if `moe` is given, and logs what became of every key.

    A dense core is loaded before the experts are made around it. The checkpoint of a mixture, such as a finished
    intermediate stage, is loaded after the experts are made, since it holds weights for them and their gates too.

    Args:
        model: a timm model; changed in place.
        core: see `load_core`.
        moe: keys of `ResidualMoEConfig`.
        level_norms: the norms of output levels, which are not part of `model`; see `load_core`.
        allow_random_core: accept residuals around random weights: `model` has its weights already, gets them later, or
            is to be trained from scratch.

    Raises:
        UserError: the checkpoint is a mixture's and `moe` is None, or there is no core for the residuals of `moe`;
            also what `load_core`, `ResidualMoEConfig` and `upcycle` raise.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"the model is {model!r}; give a torch.nn.Module, such as timm.create_model returns")
    config = None if moe is None else ResidualMoEConfig.from_dict(moe)
    if core is None and config is not None and not allow_random_core:
        _check_random(config)
    state = None if core is None else read_checkpoint(checked_path(core, "core"))
    mixture = state is not None and holds_experts(translate(state).state)
    if mixture and config is None:
        raise UserError(
            f"{core} is the checkpoint of a mixture of experts, and moe is None; give the moe of the run that wrote it "
            "(it stands in its model.json), or the dense core that it was made from"
        )
    if mixture:
        _add_experts(model, config)
    if core is not None:
        _run_log().info(str(load_core(model, core, level_norms, state)))
    if not mixture:
        _add_experts(model, config)


def _check_random(config: ResidualMoEConfig) -> None:
    """Refuses residuals around random weights, trained or not, and experts of random weights that stay."""
    if not config.kind.has_core and config.train_residual:
        return
    found = "residuals go around a core" if config.kind.has_core else "moe.train_residual=False fixes the experts"
    raise UserError(
        f"{found} and there is none, only random weights; give a dense checkpoint by core=, or "
        "kwargs=dict(pretrained=True), or allow_random_core=True for a trial or to train from scratch"
    )


def _add_experts(model: nn.Module, config: ResidualMoEConfig | None) -> None:
    if config is not None:
        _run_log().info(str(upcycle(model, config).report))


def _run_log() -> logging.Logger:
    """Returns mmengine's current logger, which writes to the work dir, or without mmengine Python's logger "rmoe"."""
    mmengine = sys.modules.get("mmengine.logging")
    return mmengine.MMLogger.get_current_instance() if mmengine else logging.getLogger("rmoe")


def import_core(source: str | Path, model: str, out: str | Path) -> CoreReport:
    """Writes an official checkpoint under timm's names, for `core=` or any other user of timm.

    Swin-MoE's becomes, from the files of any number of processes, one mixture whose experts have global ids.

    Args:
        source: the checkpoint; see `load_core`.
        model: the timm model whose weights it holds; position tables are resized to its window or image.
        out: the `.safetensors` file to write, which must not exist. It gets everything that was found: the backbone, a
            classifier of any number of classes, and the norms of output levels as "norm0.weight" etc.

    Returns:
        The report on what became of every key.

    Raises:
        UserError: `out` exists, lies in no folder or has another suffix; also what `timm_model` and `load_core` raise.
    """
    source, out = checked_path(source, "source"), checked_path(out, "out")
    if out.suffix != ".safetensors" or not out.parent.is_dir():
        raise UserError(
            f"{out} cannot be written; give a file name with the suffix .safetensors in a folder that exists"
        )
    if out.exists():
        raise UserError(f"{out} exists; remove it or give another name")
    raw = read_checkpoint(source)
    state = translate(raw).state
    net: Any = timm_model(model, {"num_classes": _num_classes(state)})
    if holds_experts(state):
        net = upcycle(net, _mixture_of(state)).model
    norms = {
        int(match[1]): nn.LayerNorm(len(state[key]))
        for key in state
        if (match := re.search(r"^norm(\d+)\.weight$", key)) and state[key].ndim == 1 and len(state[key])
    }
    report = load_core(net, source, norms, raw)
    absent = {key for keys in report.left_out.values() for key in keys}
    written = {key: x for key, x in (global_state_dict(net) | level_keys(norms)).items() if key not in absent}
    _write(out, lambda begun: save_tensors(begun, written))
    return report


def _write(out: Path, write: Callable[[Path], None]) -> None:
    begun = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        write(begun)
        begun.replace(out)
    except Exception as error:  # torch, safetensors and the system raise errors of many types
        begun.unlink(missing_ok=True)
        raise UserError(f"{out} cannot be written ({error}); give another place") from error


def _mixture_of(state: Mapping[str, Tensor]) -> ResidualMoEConfig:
    """Returns the mixture of a checkpoint whose experts are networks of their own: how many, and in which blocks."""
    blocks, many = experts_of(state)
    return ResidualMoEConfig(num_experts=many, residual="experts", combine="softmax", blocks=blocks)


def split_experts(source: str | Path, out: str | Path, ranks: int) -> list[str]:
    """Writes a Swin mixture as Swin-MoE's files of `ranks` processes: OUT.rank0, OUT.rank1, … and OUT.master.

    Args:
        source: Swin-MoE's checkpoint of any number of processes, whose weights stay as they are; or one of ours with
            residual="experts". See `load_core`.
        out: `NAME.pth`, of which there must be no such files.
        ranks: how many processes; the number of experts is a multiple of it, or it is one of theirs.

    Returns:
        What a user must know.

    Raises:
        UserError: there are such files, they cannot be written, or what `read_checkpoint` and `swin_moe` raise.
    """
    source, out = checked_path(source, "source"), checked_path(out, "out")
    if not 1 <= ranks <= _MOST_RANKS:
        raise UserError(f"--ranks is {ranks}; it is 1 to {_MOST_RANKS}")
    if out.suffix != ".pth" or not out.parent.is_dir():
        raise UserError(f"{out} cannot be written; give NAME.pth in a folder that exists")
    if there := sorted(out.parent.glob(f"{glob.escape(out.name)}*")):
        raise UserError(f"{there[0]} exists; remove it or give another name")
    state = read_checkpoint(source)
    notes = list[str]()
    if translate(state).source != SWIN_MOE:
        blocks, _ = experts_of(state)
        prefix = re.match(r"(.*?)(?:layers\.|$)", blocks[0])[1] if blocks else ""  # type: ignore[index]
        if left := [key for key in state if not key.startswith(prefix)]:
            notes.append(f"{len(left)} weights outside the backbone are left out, such as '{left[0]}'")
        own = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
        state, more = swin_moe.to_theirs(own)
        notes += more
    parts, shared = swin_moe.split(state, ranks)
    for rank, part in enumerate(parts):
        _write(out.with_name(f"{out.name}.rank{rank}"), partial(torch.save, {"model": part}))
    _write(out.with_name(f"{out.name}.master"), partial(torch.save, {"model": shared}))
    return notes


def _num_classes(state: Mapping[str, Tensor]) -> int:
    return next((len(x) for key, x in state.items() if x.ndim and re.search(r"(^|\.)head\.(fc\.)?bias$", key)), 0)
