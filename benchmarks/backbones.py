"""Which backbones of timm become mixtures: a small model of each of its modules, built, upcycled, trained, saved.

    python -m benchmarks.backbones

Of every module of timm whose models hold a feed-forward network, a small model that does: it must compute what
the dense one did; train for a step, the residuals of every layer with it; be saved and loaded; and go through
`rmoe.TimmPyramid` at two image sizes that are not its own. What is refused is refused in one line, which is in the
table. Weights are random, nothing is downloaded; where a model takes arguments that make it narrow and short, it gets
them (`CUTS`). Stopped, it goes on where it was; --only chooses modules by a regular expression, and tries those again.
docs/backbones.md has the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import resource
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import Row
from rmoe.backbones.build import timm_model
from rmoe.backbones.networks import find_networks
from rmoe.backbones.pyramid import TimmPyramid
from rmoe.backbones.upcycle import upcycle
from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.forms import form_of
from rmoe.moe.records import collect
from rmoe.moe.state import global_state_dict, load_global_state_dict, moe_layers

MOE: dict[str, Any] = {"num_experts": 4, "top_k": 1, "rank": 2, "train_core": False, "blocks": "all", "gate_std": 1.0}
SIZES = ((96, 160), (101, 150))  # (height, width) of the images that pyramids get
MEMORY = 4 << 30  # bytes
_LARGEST = 120_000_000  # parameters: with gradients, optimizer and copies, what fits the memory
# Arguments that make a model small, the first that it takes: a sweep takes minutes then, and the blocks are the same.
CUTS: tuple[dict[str, Any], ...] = (
    {"embed_dim": 48, "depth": 3, "num_heads": 3},
    {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2)},
    {"dims": (16, 16, 32, 32), "depths": (1, 1, 2, 1)},
    {"depth": 3},
    {"depths": (1, 1, 2, 1)},
    {"embed_dim": 24, "num_heads": 1, "stages": (1, 1, 2, 1)},
)
# What the names of small models have, the smallest first, and how many are tried.
_SMALL: tuple[str, ...] = (
    "test",
    "zepto",
    "atto",
    "femto",
    "pico",
    "nano",
    "xxs|xxtiny",
    "xtiny|_xs",
    "tiny|_t[0-9_]|_t$|_ti_|_mini",
)
_SMALL += ("_b0|_m0|_s0|_l0|_0[0-9]|_5m|_128", "small|_s[0-9_]|_s$|_b1|_m1", "_12_|_256|_9[0-9]", "base|_b[0-9_]|_b$")
_TRIED = 3
# Models besides, for their forms.
ALSO = {
    "convnext, V2": "convnextv2_atto",
    "eva, gated with a norm": "eva02_base_patch16_clip_224",
    "eva, DINOv3": "vit_small_plus_patch16_dinov3",
    "metaformer, PoolFormer": "poolformer_s12",
    "mlp_mixer, Mixer": "mixer_s32_224",
}
PAGE = common.ROOT / "docs" / "backbones.md"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backbones", description=__doc__)
    parser.add_argument("--only", type=re.compile, help="modules of timm whose name matches, again")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    path = given.out / "backbones.json"
    rows = {row["module"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    arguments = common.Arguments("backbones", False, 1, given.out)
    for module in [*timm.list_modules(), *ALSO]:
        if given.only.search(module) if given.only else module not in rows:
            rows[module] = of_module(module)
            found = [rows[name] for name in sorted(rows)]
            common.publish(arguments, {"moe": MOE, "sizes": SIZES}, found, [rows[module]])
    if given.out == common.RESULTS:
        PAGE.write_text(PAGE.read_text().partition("\n## Each module")[0] + "\n" + render(json.loads(path.read_text())))


def of_module(module: str) -> Row:
    """Returns what became of a small model of a module of timm that has a feed-forward network."""
    name = ALSO.get(module) or smallest(module)
    if name is None:
        return {"module": module, "model": "none"}
    return {"module": module} | of_model(name, cut(name))


def smallest(module: str) -> str | None:
    """Returns the first model of a module that has a feed-forward network, of a few that are small by their names."""
    names = sorted(timm.list_models(module=module), key=lambda name: (_rank(name), len(name), name))
    for name in names[:_TRIED]:
        try:
            with torch.device("meta"):
                net = timm.create_model(name)
            find_networks(net)
        except Exception:  # no network, or a model that the meta device is too little for: then another one speaks
            continue
        return name
    return None


def cut(name: str) -> dict[str, Any]:
    """Returns the arguments of `CUTS` that make a model small and that it takes; none where it takes none of them."""
    for kwargs in CUTS:
        try:
            with torch.device("meta"):
                net = timm.create_model(name, **kwargs)
                find_networks(net)
        except Exception:  # timm raises errors of many types
            continue
        return kwargs
    return {}


def _rank(name: str) -> int:
    return min((place for place, word in enumerate(_SMALL) if re.search(word, name)), default=len(_SMALL))


def of_model(name: str, kwargs: dict[str, Any] | None = None) -> Row:
    """Returns what becomes of one model: True, or the line that refuses it, or an error that is none of ours."""
    kwargs, start = kwargs or {}, time.perf_counter()
    net: Any = timm_model(name, kwargs | {"num_classes": 8}).eval()
    networks = find_networks(net)
    row: Row = {
        "model": name,
        "kwargs": kwargs,
        "parameters": sum(x.numel() for x in net.parameters()),
        "networks": len(networks),
        "forms": sorted({str(form_of(one)) for one in networks.values()}),
    }
    if row["parameters"] > _LARGEST:
        return row | {"mixture": f"too large for {MEMORY >> 30} GB", "pyramid": None}
    size = timm.layers.to_2tuple(kwargs.get("img_size") or net.pretrained_cfg["input_size"][1:])
    row["mixture"] = tried(as_mixture, name, kwargs, net, size)
    del net, networks
    gc.collect()
    row["pyramid"] = tried(as_pyramid, name, kwargs) if row["mixture"] is True else None
    gc.collect()
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def tried(run: Callable[..., bool], *arguments: Any) -> bool | str:
    """Returns what `run` does, or its error in one line; one that is not a user's begins with its type."""
    try:
        return run(*arguments)
    except UserError as error:
        return str(error)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def as_mixture(name: str, kwargs: dict[str, Any], net: nn.Module, size: Sequence[int]) -> bool:
    """Checks a mixture: it equals the dense model, trains and comes back from what is saved.

    Raises:
        UserError: it is refused. AssertionError: it does something else.
    """
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for x in net.parameters():  # weights that start at zero, as a head's, would hide what stands before them
            x.add_(0.05 * torch.randn_like(x))
        before = net(images)
    upcycle(net, ResidualMoEConfig.from_dict(MOE))
    with torch.no_grad():
        close(net(images), before, "the mixture and the dense model")
    step(net.train(), images)
    with torch.no_grad():
        trained = net.eval()(images)
    assert not torch.equal(trained, before), "a step changed nothing"
    state = global_state_dict(net)
    again = upcycle(timm_model(name, kwargs | {"num_classes": 8}).eval(), ResidualMoEConfig.from_dict(MOE)).model
    load_global_state_dict(again, state)
    with torch.no_grad():
        close(again(images), trained, "the model that was loaded and the one that was saved")
    return True


def step(net: nn.Module, images: Tensor) -> None:
    """Trains a step: every residual has a finite gradient, and every B that of its experts' tokens.

    Raises:
        AssertionError: it does not.
    """
    optimizer = torch.optim.SGD([x for x in net.parameters() if x.requires_grad], lr=1.0)
    with collect() as records:
        y = net(images)
        loss = (y.float() * torch.linspace(-1, 1, y.shape[-1])).mean() + records.loss()
    loss.backward()
    for layer, module in moe_layers(net).items():
        largest = 0.0
        for key, x in module.deepspeed_moe.named_parameters():
            assert x.grad is not None, f"'{layer}.{key}' has no gradient"
            assert x.grad.isfinite().all(), f"'{layer}.{key}' has a gradient that is not finite"
            largest = max(largest, float(x.grad.abs().max()))
        assert largest > 0, f"the residuals of '{layer}' have a gradient of zero"
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()


def as_pyramid(name: str, kwargs: dict[str, Any]) -> bool:
    """Checks a mixture as a feature pyramid at two sizes of images.

    Raises:
        UserError: it is refused. AssertionError: a map has another shape.
    """
    probe: Any = timm_model(name, kwargs)
    known = len(getattr(probe, "feature_info", ()) or ())
    del probe
    indices = range(known) if known <= 5 else [known * part // 4 - 1 for part in (1, 2, 3, 4)]
    net = TimmPyramid(name, kwargs, [*indices], moe=MOE, allow_random_core=True).eval()
    for height, width in SIZES:
        with torch.no_grad():
            maps = net(torch.randn(1, 3, height, width))
        for stride, level in zip(net.strides, maps, strict=True):
            shape = (-(-height // stride), -(-width // stride))
            assert level.shape[2:] == shape, f"a map of {tuple(level.shape[2:])} for {shape}"
            assert level.isfinite().all(), "a map that is not finite"
    return True


def close(one: Tensor, other: Tensor, what: str) -> None:
    """Raises AssertionError where two results differ by more than rounding."""
    off = float((one - other).abs().max() / other.abs().max().clamp(min=1e-6))
    assert off < 1e-5, f"{what} differ by {off:.1e}"


def failed(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows whose error is none of ours: a type's name, a colon, and what it says."""
    return [row for row in rows for key in ("mixture", "pyramid") if re.match(r"\w+Error: ", str(row.get(key)))]


def table(rows: Sequence[Row]) -> list[Row]:
    """Returns what the page shows."""
    return [
        {
            "timm's module": row["module"],
            "model": row["model"] + ", cut" * bool(row["kwargs"]),
            "networks": row["networks"],
            "each is": ", ".join(f"`{form}`" for form in row["forms"]),
            "mixture": _shortly(row["mixture"]),
            "pyramid, any size": _shortly(row["pyramid"]),
        }
        for row in rows
        if row["model"] != "none"
    ]


def _shortly(said: Any) -> Any:
    """Returns what a row says without what to do about it; of one size of images, that alone."""
    if not isinstance(said, str):
        return said
    size = re.search(r"takes only (\d+ x \d+)", said)
    return f"{size[1]} alone" if size else said.partition(";")[0]


def render(found: dict[str, Any]) -> str:
    """Returns Markdown of the table and of the modules without a feed-forward network."""
    none = ", ".join(row["module"] for row in found["rows"] if row["model"] == "none")
    untried = ", ".join(sorted({*timm.list_modules()} - {row["module"] for row in found["rows"]}))
    return (
        f"## Each module of timm\n\n{common.circumstances(found)}\n\n{common.markdown(table(found['rows']))}\n"
        f"Modules whose small models have no feed-forward network that is known here: {none or 'none'}.\n\n"
        f"Not tried yet: {untried or 'none'}.\n"
    )


if __name__ == "__main__":
    main()
