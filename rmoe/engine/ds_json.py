"""The JSON file of DeepSpeed's own keys: read, checked, and its "auto" replaced by what the config says."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from rmoe.engine.building import described
from rmoe.engine.check_values import is_number
from rmoe.errors import UserError, nearest

AUTO = "auto"
MICRO, ACCUMULATION, CLIPPING = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"
_GLOBAL = "train_batch_size"
_AUTOCAST = "torch_autocast"
# Of torch_autocast, with torch's names for them; DeepSpeed takes none as torch's default, which is float16 on a GPU.
_DTYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "fp16": "float16"}
# Sections of what DeepSpeed would do to the model or its data, and what stands in for each here.
_ELSEWHERE = {
    "data_efficiency": "images come from the config's train_dataloader, and no layer drops tokens",
    "expert_parallel": "moe.ep_size of the config spreads the experts",
    "hybrid_engine": "it is for language models that generate text",
    "tensor_parallel": "a layer is not split: spread the experts by moe.ep_size, or all weights by ZeRO stage 3",
    "weight_quantization": "rmoe test and rmoe predict compute a trained model in int8 by --precision",
}
_LARGEST, _DEEPEST = 2**20, 16  # bytes of a file, levels in it


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a DeepSpeed JSON file.

    Raises:
        UserError: no such file, no JSON object, a key at any level that DeepSpeed does not read, a value of another
            type, or a section that this project does not leave to it.
    """
    content = _parsed(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; it must hold a JSON object, see ds_configs/")
    known = top_level_keys()
    for key in content:
        if key not in known:
            raise UserError(f"{path}: DeepSpeed has no key '{key}'{nearest(key, known)}")
    for key in ("optimizer", "scheduler"):
        if key in content:
            raise UserError(f"{path} has the key '{key}'; say it in the config: optim_wrapper, param_scheduler")
    for key, value in content.items():
        _check_section(path, key, value)
    for key in ("fp16", "bf16", "bfloat16"):
        if content.get(key, {}).get("enabled"):
            dtype = "float16" if key == "fp16" else "bfloat16"
            raise UserError(
                f"{path} enables '{key}', which casts weights but neither inputs nor buffers, and fails in a Swin; use "
                f'"torch_autocast": {{"enabled": true, "dtype": "{dtype}"}}'
            )
    for key, instead in _ELSEWHERE.items():
        if content.get(key) and content[key].get("enabled") is not False:
            raise UserError(f"{path} has the section '{key}', which is not for this project; {instead}: leave it out")
    _check_numbers(path, content)
    return content


def _parsed(path: Path) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise UserError(f"{path} has {constant}, which is no number of JSON; give a finite one")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path} has the key '{twice[0]}' twice in one object; remove one")
        return dict(pairs)

    try:
        if path.is_file() and path.stat().st_size > _LARGEST:
            raise UserError(
                f"{path} has more than {_LARGEST} bytes; DeepSpeed's keys take a few lines, see ds_configs/"
            )
        content = json.loads(path.read_text("utf-8"), parse_constant=refuse, object_pairs_hook=unique)
    except OSError as error:
        raise UserError(f"there is no DeepSpeed JSON file {path} ({error.strerror}); see ds_configs/") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON in UTF-8: {described(error)}; see ds_configs/ for examples") from error
    for where, level, value in _values(content):
        if level > _DEEPEST:
            raise UserError(f"{path} has more than {_DEEPEST} levels, at '{where}'; see ds_configs/ for examples")
        if isinstance(value, int | float) and not abs(value) < 2**63:
            raise UserError(f"{path}: {where} is a number that is too large; give one below 2^63")
    return content


def _values(content: Any) -> Iterator[tuple[str, int, Any]]:
    """Yields (dotted key, level, value) of everything in it."""
    todo = [("", 0, content)]
    while todo:
        where, level, node = todo.pop()
        yield where, level, node
        items: Iterable[Any] = (
            node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        )
        todo += [(f"{where}.{key}".lstrip("."), level + 1, value) for key, value in items]


def _check_section(path: Path, key: str, value: Any) -> None:
    """Checks what stands under a top-level key by asking DeepSpeed itself, for this key alone."""
    default = _asked_for()[key]
    if key != CLIPPING and value != AUTO:
        _check_type(path, key, value, default)
    section = _section(key)
    if key == _AUTOCAST and isinstance(value, dict) and value.get("enabled") == AUTO:
        value = {**value, "enabled": True}
    if section is not None and not isinstance(value, dict):
        raise UserError(f"{path}: {key} is {value!r}; it takes an object, such as {{}}")
    for name, inner in value.items() if section else ():
        _check_key(path, f"{key}.{name}", inner, section or {})
    if value != AUTO:
        _ask_deepspeed({key: value}, f"{path}: DeepSpeed refuses {key}")


def _check_key(path: Path, key: str, value: Any, section: Mapping[str, Any]) -> None:
    """Checks a key of a section against what DeepSpeed asks for there, and against the type of its default."""
    name = key.partition(".")[2]
    if name not in section:
        raise UserError(f"{path}: DeepSpeed has no key '{key}'{nearest(name, section)}")
    _check_type(path, key, value, section[name])


def _check_type(path: Path, key: str, value: Any, default: Any) -> None:
    words, fits = "", True
    if isinstance(default, bool):
        words, fits = "true or false", isinstance(value, bool)
    elif isinstance(default, int | float):
        words, fits = "a number", is_number(value)
    elif isinstance(default, str):
        words, fits = "a string", isinstance(value, str)
    if not fits:
        raise UserError(f"{path}: {key} is {value!r}; it takes {words}")


def _check_numbers(path: Path, content: Mapping[str, Any]) -> None:
    clipping = content.get(CLIPPING, AUTO)
    if clipping != AUTO and not (is_number(clipping) and clipping >= 0):
        raise UserError(
            f'{path}: {CLIPPING} is {clipping!r}; it is the largest norm of the gradient, 0 for none, or "auto"'
        )
    every = content.get("steps_per_print")  # whose default DeepSpeed does not say
    if every is not None and not (is_number(every) and isinstance(every, int) and every > 0):
        raise UserError(f"{path}: steps_per_print is {every!r}; it takes a whole number of 1 or more")
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3) or not isinstance(stage, int):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}; it is one of 0, 1, 2, 3")
    dtype = content.get(_AUTOCAST, {}).get("dtype", "bfloat16")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UserError(f"{path}: torch_autocast.dtype is {dtype!r}; it is one of {', '.join(_DTYPES)}")


def _ask_deepspeed(content: dict[str, Any], what: str) -> None:
    """Lets DeepSpeed read `content`; what it refuses becomes a user's error that begins with `what`."""
    try:
        DeepSpeedConfig.__new__(DeepSpeedConfig)._initialize_params(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{what}: {where} = {first.get('input')!r}: {first['msg']}") from error
    except Exception as error:  # asserts, mostly, of what does not go together
        raise UserError(f"{what}: {described(error)}; see its documentation of that section") from error


def top_level_keys() -> set[str]:
    """Returns the top-level keys that the installed DeepSpeed reads."""
    return set(_asked_for())


@cache
def _asked_for() -> dict[str, Any]:
    """Returns what DeepSpeed asks for in an empty file, with its defaults."""
    asked = _Asked()
    DeepSpeedConfig.__new__(DeepSpeedConfig)._initialize_params(asked)
    return asked.asked_for


@cache
def _section(key: str) -> dict[str, Any] | None:
    """Returns what DeepSpeed asks for in the section `key`, with its defaults; {} where a model of its own checks the
    keys, None where the key is no section.
    """
    asked = _Asked()
    try:
        DeepSpeedConfig.__new__(DeepSpeedConfig)._initialize_params({key: asked})
        DeepSpeedConfig.__new__(DeepSpeedConfig)._initialize_params({key: {"no such key": 1}})
    except ValidationError:
        return {}
    except (AttributeError, TypeError, ValueError):
        return None
    return asked.asked_for or (_asked_for()[key] if isinstance(_asked_for()[key], dict) else None)


class _Asked(dict[str, Any]):
    """An empty dict that remembers which keys it was asked for, and with which defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_for: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        self.asked_for[key] = default
        return default

    def __contains__(self, key: object) -> bool:
        self.asked_for.setdefault(str(key), None)
        return False

    def keys(self) -> Any:
        return self


def resolve(
    content: Mapping[str, Any],
    *,
    batch_size: int,
    accumulation: int,
    max_norm: float,
    processes: int,
    autocasts: bool = False,
) -> dict[str, Any]:
    """Returns the file's content with a value for every "auto": batch sizes, accumulation, clipping and precision are
    explicit. Where autocast is on, its dtype is "bfloat16", as by default, or "float16".

    Args:
        content: what `read_json` returned.
        batch_size: of the config's train_dataloader, samples of one process.
        accumulation: of the config, iterations for one step.
        max_norm: of the config's clipping; 0 does not clip.
        processes: number of processes.
        autocasts: what "auto" means for `torch_autocast.enabled`, see `rmoe.engine.precision.autocasts`.

    Raises:
        UserError: batch sizes that do not fit together, or a section that DeepSpeed refuses.
    """
    clipping = content.get(CLIPPING, AUTO)
    resolved = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, **content}
    resolved |= batch_sizes(content, batch_size=batch_size, accumulation=accumulation, processes=processes)
    resolved |= {CLIPPING: float(max_norm if clipping == AUTO else clipping)}
    autocast = content.get(_AUTOCAST, {})
    if autocast.get("enabled") == AUTO and not autocasts:
        del resolved[_AUTOCAST]
    elif autocast.get("enabled"):
        dtype = _DTYPES[autocast.get("dtype", "bfloat16")]
        resolved[_AUTOCAST] = {**autocast, "enabled": True, "dtype": dtype}
    _ask_deepspeed(resolved, "DeepSpeed refuses")
    return resolved


def batch_sizes(content: Mapping[str, Any], *, batch_size: int, accumulation: int, processes: int) -> dict[str, int]:
    """Returns the images of a process and iteration, the iterations of a step and the images of a step, by key of the
    JSON. What the JSON leaves open follows from the rest of it, else from the config.

    Args:
        content, batch_size, accumulation, processes: see `resolve`.

    Raises:
        UserError: one of them is not a positive number, or they do not fit together.
    """
    given = {key: content.get(key, AUTO) for key in (MICRO, ACCUMULATION, _GLOBAL)}
    for key, value in given.items():
        if value != AUTO and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f'{key} is {value!r} in the DeepSpeed JSON; it is a positive number or "auto"')
    micro, steps, total = given.values()
    if total == AUTO:
        micro = batch_size if micro == AUTO else micro
        steps = accumulation if steps == AUTO else steps
        total = micro * steps * processes
    elif steps == AUTO:
        micro = batch_size if micro == AUTO else micro
        steps = total // (micro * processes)
    elif micro == AUTO:
        micro = total // (steps * processes)
    if total != micro * steps * processes or not total:
        raise UserError(
            f"{_GLOBAL} {given[_GLOBAL]} is not {MICRO} {micro} × {ACCUMULATION} {steps} × {processes} processes; "
            'change one of them, or leave it "auto"'
        )
    return {MICRO: micro, ACCUMULATION: steps, _GLOBAL: total}


def overruled(config: Mapping[str, Any], stated: Mapping[str, tuple[str, Any]]) -> list[str]:
    """Returns a line for everything that the JSON decides otherwise than the training's config states.

    Args:
        config: what `resolve` returned.
        stated: by key of the JSON, the config's key for the same and its value there; None where it states none.
    """
    return [
        f"{where} is {value} in the config, and the DeepSpeed JSON makes it {config[key]}, which is taken; to have the "
        f'config\'s, write "auto" there for {key if key == CLIPPING else f"{key} and {_GLOBAL}"}'
        for key, (where, value) in stated.items()
        if value is not None and value != config[key]
    ]


def zero_stage(content: Mapping[str, Any]) -> int:
    """Returns the ZeRO stage that a DeepSpeed JSON asks for."""
    return int(content.get("zero_optimization", {}).get("stage", 0))
