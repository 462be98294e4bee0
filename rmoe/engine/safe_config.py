"""`--safe-config`: a config from others is read as plain data, and may name only what a registry holds.

Three fences. The file is parsed strictly, into maps, lists and scalars. Every name in it is looked up in the registries
before anything is built. While the run is built, this process looks up no import string and reads no pickle at all
(`lock_down`), whatever key a name or a path stood under.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

import mmengine.registry
import numpy as np
import yaml
from mmengine.config import Config
from mmengine.fileio.handlers import file_handlers
from mmengine.registry import Registry
from mmengine.registry import registry as lookup
from mmengine.utils import get_object_from_string
from yaml.resolver import Resolver

from rmoe.errors import UserError

# What `rmoe.engine.prepare` adds to a config, and a run's dumped config therefore has.
OURS = {
    *(f"rmoe.engine.hooks.{name}Hook" for name in ("RunningStats", "LocalExperts", "Cost", "Export")),
    *(
        "rmoe.engine.progress.ProgressHook",
        "rmoe.engine.randomness.StepSeedHook",
        "rmoe.engine.strategy.Strategy",
        "rmoe.engine.faults.spare_worker",
    ),
}
_OF_TRAINING = ("rmoe.engine.hooks", "rmoe.engine.optim", "rmoe.engine.randomness", "rmoe.engine.task_data")
_FORMATS = (".json", ".yaml", ".yml")
_SCOPES = ("mmengine", "mmcv", "mmseg", "mmdet", "rmoe")
_MODULE = re.compile(r"(mmengine|mmcv|mmseg|mmdet|rmoe\.(tasks|backbones))(\.\w+)*")
_TYPES, _SCOPE_KEYS = ("type", "constructor", "ema_type"), ("default_scope", "_scope_", "scope")
_CONFIG_KEYS = ("teacher_config",)  # by which OpenMMLab's classes read another config
_START_KEYS = ("mp_start_method", "multiprocessing_context")
_PICKLE = re.compile(r"(?i)(.*\.)?(pkl|pickle)")
_LARGEST, _DEEPEST = 2**22, 64  # bytes of a file, levels in it
_numpy_load = np.load
_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}


def read(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON or YAML file, checked: building from it runs nothing that it brings along.

    Raises:
        UserError: a program, or data that names what no registry holds; what is no plain data; what is too large.
    """
    if path.suffix not in _FORMATS:
        raise UserError(
            f"--safe-config: {path} is a program that would run with your rights; dump it as JSON or YAML where you "
            "trust it: python -c \"from mmengine import Config; Config.fromfile('x.py').dump('x.json')\""
        )
    content = _parsed(path)
    if not isinstance(content, dict) or "_base_" in content:
        raise UserError(f"--safe-config: {path} must hold all keys itself, without _base_; dump the whole config")
    for module in _OF_TRAINING:  # what they register may be named
        importlib.import_module(module)
    check(content, f"--safe-config: {path}", _modules(content))
    return with_pairs(content)


def check(content: Any, where: str, modules: Iterable[Any], packages: Sequence[str] = _SCOPES[2:4]) -> None:
    """Checks that building from `content` runs nothing that it brings along, and imports the `modules` that it names.

    Args:
        content: plain data.
        where: the name of its origin, which messages begin with.
        modules: names of modules that register what `content` names.
        packages: those of OpenMMLab's that may be imported to look a name up.

    Raises:
        UserError: it names what is neither ours nor OpenMMLab's and has not been imported, or reads a pickle.
    """
    for module in modules:
        if not is_ours(module):
            _refuse(where, module, "which is neither ours nor OpenMMLab's to import")
    for key, value in _items(content, where):
        if key in _SCOPE_KEYS and value is not None and value not in _SCOPES:
            _refuse(where, value, f"which is no scope: {', '.join(_SCOPES)}")
        if key in _START_KEYS and value not in (None, "fork"):
            _refuse(where, value, f"and {key} must be 'fork': other workers would not be locked down")
        if key in _CONFIG_KEYS and value is not None:
            _refuse(where, value, f"a config ({key}), which would be run to be read")
        if key == "sys_path":
            _refuse(where, value, "a folder to import from (sys_path)")
        if isinstance(value, str) and _PICKLE.fullmatch(value):
            _refuse(where, value, "a pickle, and reading a pickle runs it")
    for module in modules:
        importlib.import_module(module)
    for key, value in _items(content, where):
        if key in _TYPES and value is not None:
            _check_name(where, value, packages)


def lock_down() -> None:
    """Makes this process refuse import strings, foreign scopes, other configs, pickles and YAML tags until it ends."""
    lookup.get_object_from_string = _object_of_ours
    lookup.import_module = _import_of_ours
    for name in ("pickle", "pkl"):
        file_handlers[name].load_from_fileobj = _refuse_pickle
    for name in ("yaml", "yml"):
        file_handlers[name].load_from_fileobj = partial(yaml.load, Loader=yaml.CSafeLoader)
    for name in ("fromfile", "_file2dict"):
        setattr(Config, name, staticmethod(_refuse_config))
    np.load = _load_array  # type: ignore[assignment]


def is_ours(module: Any) -> bool:
    """Returns whether `module` is the name of a module of ours or OpenMMLab's that data may have imported."""
    return isinstance(module, str) and bool(_MODULE.fullmatch(module))


def with_pairs(node: Any, transforms: bool = False) -> Any:
    """Turns pairs of numbers among the arguments of transforms into tuples, which those insist on and data has not."""
    if isinstance(node, dict):
        return {key: with_pairs(value, transforms or key == "pipeline") for key, value in node.items()}
    if isinstance(node, list):
        pair = transforms and len(node) == 2 and all(isinstance(item, int | float) for item in node)
        return (tuple if pair else list)(with_pairs(item, transforms) for item in node)
    return node


def _refuse_pickle(file: Any, **options: Any) -> NoReturn:
    raise UserError(
        f"--safe-config: {getattr(file, 'name', 'a file')} is read as a pickle, which would run it; use JSON"
    )


def _refuse_config(filename: Any = "", *others: Any, **options: Any) -> NoReturn:
    raise UserError(f"--safe-config: {filename} is read as a config, which would run it; put all into one config")


def _load_array(file: Any, mmap_mode: Any = None, allow_pickle: bool = False, **options: Any) -> Any:
    return _numpy_load(file, mmap_mode, allow_pickle=False, **options)


def _object_of_ours(name: str) -> Any:
    return get_object_from_string(name) if name in OURS else None


def _import_of_ours(name: str) -> Any:
    if name.split(".")[0] not in _SCOPES:
        raise ImportError(f"--safe-config: {name} is not imported")
    return importlib.import_module(name)


def _refuse(where: str, value: object, why: str) -> NoReturn:
    raise UserError(f"{where} names {str(value)[:200]!r}, {why}; mend the file, or leave it alone")


def _modules(content: Mapping[str, Any]) -> list[Any]:
    given = content.get("custom_imports") or {}
    imports = given.get("imports") if isinstance(given, dict) else given
    return imports if isinstance(imports, list) else [imports] if imports else []


def _items(content: Any, where: str) -> Iterator[tuple[Any, Any]]:
    """Yields every value with the key that it stands under, items of a list with that of the list.

    Raises:
        UserError: more levels than anybody needs.
    """
    todo: list[tuple[Any, Any, int]] = [("", content, 0)]
    while todo:
        key, node, level = todo.pop()
        yield key, node
        if level > _DEEPEST:
            raise UserError(f"{where} has more than {_DEEPEST} levels at key {key!r}; no config needs as many")
        if isinstance(node, dict):
            todo += [(name, value, level + 1) for name, value in node.items()]
        elif isinstance(node, list):
            todo += [(key, value, level + 1) for value in node]


def _check_name(where: str, value: Any, packages: Sequence[str]) -> None:
    if not isinstance(value, str):
        if not isinstance(value, dict | list):  # a section that is called so is looked into on its own
            _refuse(where, value, "which is no name")
        return
    if value in OURS:
        return
    found = _registered(value, packages)
    if not found and value not in _operations():
        _refuse(where, value, "which no registry of ours or OpenMMLab's holds")
    if any(_evaluates(one) for one in found):
        _refuse(where, value, "which evaluates strings as programs")


def _registered(name: str, packages: Sequence[str]) -> list[Any]:
    """Returns what the registries hold under `name`, which may begin with a scope. Nothing is imported by its name."""
    scope, dot, bare = name.partition(".")
    nodes = _nodes()
    if dot and scope in _SCOPES:
        nodes, name = [node for node in nodes if node.scope == scope], bare
    if (dot and scope in packages) or not any(name in node.module_dict for node in nodes):
        _import_registries(tuple(packages))
        nodes = [node for node in _nodes() if not dot or node.scope == scope]
    return [node.module_dict[name] for node in nodes if name in node.module_dict]


def _nodes() -> list[Registry]:
    todo = [one for one in vars(mmengine.registry).values() if isinstance(one, Registry)]
    nodes: list[Registry] = []
    while todo:
        nodes.append(todo.pop())
        todo += nodes[-1].children.values()
    return [node for node in nodes if node.scope in _SCOPES]


@cache
def _operations() -> Sequence[str]:
    """Returns the names of mmcv's operations; none where it is not installed, which a classifier does without."""
    try:
        return importlib.import_module("mmcv.ops").__all__
    except ImportError:
        return ()


@cache
def _import_registries(packages: tuple[str, ...]) -> None:
    """Imports what the packages register, which they put off until somebody asks."""
    for package in packages:
        importlib.import_module(f"{package}.registry")
    for node in _nodes():
        if (node.scope, node.name) != ("rmoe", "hook"):  # those need DeepSpeed; `read` has imported them
            node.import_from_location()


def _evaluates(found: Any) -> bool:
    """Returns whether the module of a class, or of one that it inherits from, calls eval or exec."""
    classes = found.__mro__ if inspect.isclass(found) else (found,)
    modules = {getattr(one, "__module__", "") for one in classes}
    return any(_calls_eval(module) for module in modules if module.split(".")[0] in _SCOPES)


@cache
def _calls_eval(module: str) -> bool:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(isinstance(function, ast.Name) and function.id in ("eval", "exec") for function in calls)


def _parsed(path: Path) -> Any:
    if path.stat().st_size > _LARGEST:
        raise UserError(f"--safe-config: {path} has more than {_LARGEST} bytes; no config needs as many")
    text = path.read_text()
    try:
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_unique)
        return _Yaml(text).document()
    except RecursionError as error:
        raise UserError(f"--safe-config: {path} has more than {_DEEPEST} levels; no config needs as many") from error
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as {path.suffix[1:].upper()}: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise UserError(f"--safe-config: the key {next(k for k in keys if keys.count(k) > 1)!r} stands there twice")
    return content


class _Yaml:
    """A parser of plain YAML: one document of maps, lists and scalars, without tags, anchors and aliases."""

    def __init__(self, text: str) -> None:
        self._events = yaml.parse(text, Loader=yaml.CSafeLoader)
        self._resolver = Resolver()

    def document(self) -> Any:
        """Returns the content of the first document.

        Raises:
            UserError: it is not plain.
            YAMLError: it is not YAML.
        """
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                content = self._node(next(self._events), 0)
                next(self._events)
                if not isinstance(next(self._events), yaml.StreamEndEvent):
                    raise UserError("--safe-config: the file holds several documents; one is read")
                return content
        return None

    def _node(self, event: Any, level: int) -> Any:
        if level > _DEEPEST:
            raise RecursionError
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise UserError(f"--safe-config: {line} has the anchor or alias '{event.anchor}'; write the value out")
        if event.tag:
            raise UserError(f"--safe-config: {line} has the tag '{event.tag}'; a config has none: dump it as JSON")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, line)
        if isinstance(event, yaml.SequenceStartEvent):
            return [self._node(one, level + 1) for one in self._until(yaml.SequenceEndEvent)]
        pairs = []
        for key in self._until(yaml.MappingEndEvent):
            name = self._node(key, level + 1)
            if not isinstance(name, str):
                raise UserError(f"--safe-config: {line} has the key {name!r}, which is no string; quote it")
            pairs.append((name, self._node(next(self._events), level + 1)))
        return _unique(pairs)

    def _until(self, end: type) -> Iterator[Any]:
        for event in self._events:
            if isinstance(event, end):
                return
            yield event

    def _scalar(self, event: Any, line: str) -> Any:
        tag = self._resolver.resolve(yaml.ScalarNode, event.value, event.implicit)
        if tag not in _SCALARS:
            kind = tag.rpartition(":")[2]
            raise UserError(f"--safe-config: {line} has {event.value!r}, which YAML takes for a {kind}; quote it")
        if tag.endswith(":str"):
            return event.value
        number = yaml.safe_load(event.value)
        if isinstance(number, float) and math.isnan(number):
            raise UserError(f"--safe-config: {line} has {event.value!r}, which is not a number")
        return number
