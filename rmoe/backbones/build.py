"""The order in which a backbone comes to be: timm model → dense core → residual experts."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import timm
from mmengine.logging import print_log
from safetensors.torch import save_file
from torch import Tensor, nn

from rmoe.backbones.checkpoint_formats import translate
from rmoe.backbones.load_core import CoreReport, a_path, level_keys, load_core, read_checkpoint
from rmoe.backbones.upcycle import upcycle
from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.state import holds_experts


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
        return timm.create_model(name, **kwargs)
    except Exception as error:  # whatever timm raises while it builds
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"timm cannot build {name} with kwargs {kwargs}: {said}") from error


def checked_kwargs(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the keyword arguments of a timm model as a dict; None are none.

    Raises:
        UserError: no mapping, or a key that is no string.
    """
    if not isinstance(kwargs, Mapping | None) or not all(isinstance(key, str) for key in kwargs or ()):
        raise UserError(f"kwargs are {kwargs!r}; they are a dict of timm's arguments by name, such as drop_path_rate")
    return dict(kwargs or {})


def brings_weights(kwargs: Mapping[str, Any]) -> bool:
    """Returns whether timm loads weights into a model that it builds with these arguments."""
    return bool(kwargs.get("pretrained") or kwargs.get("checkpoint_path"))


def allow_random_cores(config: Any) -> None:
    """Tells every backbone in a model's config without a core, in place, that its weights come after it is built."""
    if isinstance(config, MutableMapping):
        kind = config.get("type")
        name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
        if name.rpartition(".")[2] in ("TimmPyramid", "TimmClassifier") and config.get("core") is None:
            config["allow_random_core"] = True
    for value in config.values() if isinstance(config, Mapping) else config if isinstance(config, list | tuple) else ():
        allow_random_cores(value)


def add_weights(
    model: nn.Module,
    core: str | Path | None,
    moe: Mapping[str, Any] | None,
    level_norms: Mapping[int, nn.Module] | None = None,
    *,
    allow_random_core: bool = False,
) -> None:
    """Loads the core, if there is one, and adds residual experts, if `moe` is given; logs what became of every key.

    A dense core is loaded before the experts are made around it. The checkpoint of a mixture (a finished intermediate
    stage, say) is loaded after that, and brings residuals, or experts, and gates along.

    Args:
        model: a timm model; changed in place.
        core: see `load_core`.
        moe: keys of `ResidualMoEConfig`.
        level_norms: norms of output levels, outside `model`; see `load_core`.
        allow_random_core: `model` has its weights already, or gets them later, or need not have any.

    Raises:
        UserError: a mixture's checkpoint without `moe`; `moe` would freeze weights that are random; see `load_core`,
            `ResidualMoEConfig` and `upcycle`.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"the model is {model!r}; give a torch.nn.Module, such as timm.create_model returns")
    config = None if moe is None else ResidualMoEConfig.from_dict(moe)
    if core is None and config is not None and not allow_random_core:
        _check_trained(config)
    state = None if core is None else read_checkpoint(a_path(core, "core"))
    mixture = state is not None and holds_experts(state)
    if mixture and config is None:
        raise UserError(
            f"{core} is the checkpoint of a mixture of experts, and moe is None; give the moe of the run that wrote it "
            "(its model.json has it), or the dense core that it was made from"
        )
    if mixture:
        _add_experts(model, config)
    if core is not None:
        print_log(str(load_core(model, core, level_norms, state)), logger="current")
    if not mixture:
        _add_experts(model, config)


def _check_trained(config: ResidualMoEConfig) -> None:
    experts = config.residual == "experts"
    if config.train_residual if experts else config.train_core:
        return
    frozen = "moe.train_residual=False fixes the experts" if experts else "the core of residuals is frozen"
    train = "moe.train_residual" if experts else "moe.train_core"
    raise UserError(
        f"{frozen} and there is no core, so that random weights would stay; give core=, a dense checkpoint, "
        f"kwargs=dict(pretrained=True), {train}=True, or allow_random_core=True for a trial"
    )


def _add_experts(model: nn.Module, config: ResidualMoEConfig | None) -> None:
    if config is not None:
        print_log(str(upcycle(model, config).report), logger="current")


def import_core(source: str | Path, model: str, out: str | Path) -> CoreReport:
    """Writes an official dense checkpoint under timm's names, for `core=` or any other user of timm.

    Args:
        source: the checkpoint; see `load_core`.
        model: the timm model that it is of; position tables are resized to its window or image.
        out: the `.safetensors` file to write, which must not exist. It holds what was found: the backbone, the
            classifier of however many classes, and norms of output levels as "norm0.weight" etc.

    Returns:
        What became of every key.

    Raises:
        UserError: `out` exists or has no folder or another suffix, and what `timm_model` and `load_core` raise.
    """
    source, out = a_path(source, "source"), a_path(out, "out")
    if out.suffix != ".safetensors" or not out.parent.is_dir():
        raise UserError(
            f"{out} cannot be written; give a file name with the suffix .safetensors in a folder that exists"
        )
    if out.exists():
        raise UserError(f"{out} exists; remove it or give another name")
    raw = read_checkpoint(source)
    state = translate(raw).state
    net: Any = timm_model(model, {"num_classes": _num_classes(state)})
    norms = {
        int(match[1]): nn.LayerNorm(len(state[key]))
        for key in state
        if (match := re.search(r"^norm(\d+)\.weight$", key)) and state[key].ndim == 1 and len(state[key])
    }
    report = load_core(net, source, norms, raw)
    absent = {key for keys in report.left_out.values() for key in keys}
    written = {key: x.contiguous() for key, x in (net.state_dict() | level_keys(norms)).items() if key not in absent}
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        save_file(written, partial)
        partial.replace(out)
    except Exception as error:  # whatever safetensors and the system raise
        partial.unlink(missing_ok=True)
        raise UserError(f"{out} cannot be written ({error}); give another place") from error
    return report


def _num_classes(state: Mapping[str, Tensor]) -> int:
    return next((len(x) for key, x in state.items() if x.ndim and re.search(r"(^|\.)head\.(fc\.)?bias$", key)), 0)
