"""Writes a graph for other programs: ONNX, and torch.export's archive; each is compared with torch before it stays."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rmoe.deploy.graph import INPUT, Graph, more_images
from rmoe.engine.building import described
from rmoe.errors import UserError

OPSETS = (18, 23)  # the first that torch writes, and the last
_BATCH = "batch"  # the name of the dimension
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_BATCHES = (1, 3)  # that the graphs are compared at; the example has two images
# Of the outputs, relative to the largest: the mean difference. Single tokens at the border of two experts may go to the
# other one, by rounding alone.
_MOST = 1e-4

Run = Callable[[torch.Tensor], Sequence[torch.Tensor]]


def check_packages() -> None:
    """Checks that the packages that ONNX needs are installed.

    Raises:
        UserError: one is not.
    """
    lacking = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"ONNX needs {', '.join(lacking)}, which are not installed; pip install 'rmoe[deploy]'")


def check_opset(opset: Any) -> int:
    """Returns an ONNX opset that can be written.

    Raises:
        UserError: it is none of those.
    """
    first, last = OPSETS
    if type(opset) is not int or not first <= opset <= last:
        raise UserError(f"the opset is {opset!r}; torch writes {first} to {last}, and {first} is read by most programs")
    return opset


def traced(graph: Graph) -> torch.export.ExportedProgram:
    """Returns the program of a graph, for any number of images.

    Raises:
        UserError: torch.export cannot follow the model.
    """
    batch = torch.export.Dim(_BATCH, min=1)
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(graph.module, (graph.example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # torch raises errors of many types
        raise UserError(
            f"torch.export cannot follow the model ({described(error)}); give --part backbone for the backbone alone"
        ) from error


def write_pt2(program: torch.export.ExportedProgram, graph: Graph, path: Path) -> float:
    """Writes torch.export's archive, which `torch.export.load(path).module()` runs; `Graph.about` is in it.

    Returns:
        The largest difference to torch of the outputs.

    Raises:
        UserError: the program computes something else, or the file cannot be written.
    """

    def write(partial: Path) -> Run:
        torch.export.save(program, partial, extra_files=graph.about)
        run = torch.export.load(partial).module()
        return lambda images: _listed(run(images))

    return _kept(graph, path, write)


def write_onnx(program: torch.export.ExportedProgram, graph: Graph, path: Path, opset: int = OPSETS[0]) -> float:
    """Writes an ONNX model whose input is `images` [batch, 3, H, W]; its metadata are what `Graph.about` says. Weights
    of more than 2 GB lie beside it, in a file of the same name with .data at its end.

    Returns:
        The largest difference to torch of what onnxruntime computes.

    Raises:
        UserError: packages are missing, the opset is out of range, ONNX has no form of the model, onnxruntime computes
            something else, or the file cannot be written.
    """
    check_packages()
    check_opset(opset)
    import onnxruntime

    try:
        with torch.no_grad(), _quiet():
            names: dict[str, Any] = {"input_names": [INPUT], "output_names": [*graph.outputs]}
            made: Any = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False, **names)
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            f"ONNX has no form of the model ({described(error)}); write --pt2, or another --part"
        ) from error
    if (found := made.model.opset_imports[""]) != opset:
        raise UserError(f"the model could not be brought from opset {found} to {opset}; give --opset {found}")
    made.model.metadata_props.update(graph.about)
    for value in (*made.model.graph.inputs, *made.model.graph.outputs):
        value.shape[0] = _BATCH  # torch.export's own name is a number

    def write(partial: Path) -> Run:
        made.save(partial)
        session = onnxruntime.InferenceSession(partial, providers=["CPUExecutionProvider"])
        return lambda images: [torch.from_numpy(x) for x in session.run(None, {INPUT: images.numpy()})]

    return _kept(graph, path, write)


def _kept(graph: Graph, path: Path, write: Callable[[Path], Run]) -> float:
    """Writes into a folder beside `path`, compares what was written with the graph, and puts it in its place."""
    try:
        with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as folder:
            partial = Path(folder, path.name)
            with _quiet():
                difference = _difference(graph, write(partial))
            mode = 0o666 & ~_umask()
            for file in Path(folder).iterdir():
                file.chmod(mode)
                os.replace(file, path.with_name(file.name))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({described(error)}); give another place") from error
    return difference


def _difference(graph: Graph, run: Run) -> float:
    """Returns the largest difference between the outputs of a graph and of what was made of it.

    Raises:
        UserError: they differ by more than rounding.
    """
    largest = 0.0
    for count in _BATCHES:
        images = more_images(graph, count)
        with torch.no_grad():
            expected = _listed(graph.module(images))
        for name, a, b in zip(graph.outputs, expected, run(images), strict=True):
            same_shape = a.shape == b.shape
            apart = (a - b).abs() if same_shape else torch.full((), torch.nan)
            mean, scale = apart.mean().item(), a.abs().max().item()
            if not mean <= _MOST * max(scale, 1e-30):  # NaN is not
                raise UserError(
                    f"what was written computes other {name} than torch: they differ by {mean:.2g} in the mean, at "
                    f"values up to {scale:.2g}; nothing was kept: please report it"
                )
            largest = max(largest, apart.max().item())
    return largest


def _listed(found: Any) -> Sequence[torch.Tensor]:
    return found if isinstance(found, tuple | list) else [found]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what exporters say on the way: whether it worked is checked."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    before = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)
