"""Adapters: of a finished run what its training has changed, apart from the core that many runs share.

What counts as changed is decided by the bits: every tensor of the run that is not the core's, bit for bit, is in the
adapter. So it has heads that no core has, running statistics that nothing trains, gates that were calibrated, and
weights that came from elsewhere; and core and adapter together are the run exactly. Which parameters had gradients is
no part of a finished run, and would say neither.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmoe.backbones.checkpoint_formats import translate
from rmoe.backbones.hub import SCHEME
from rmoe.backbones.load_core import checked_path, read_checkpoint
from rmoe.config import ResidualMoEConfig
from rmoe.engine.checkpoint.export import ADAPTER, core_of, core_sha256, timm_nodes, write_model, write_tensors
from rmoe.engine.checkpoint.weights import read_weights
from rmoe.engine.model_config import moe_dicts, without_paths
from rmoe.errors import UserError
from rmoe.inference.card import card
from rmoe.inference.folders import new_folder
from rmoe.inference.load import checked_device, predictor, read_description, read_run
from rmoe.inference.predictor import Predictor
from rmoe.moe.stacked import EXPERT_KEY

_CASTS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _CASTS.items()}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIVE = "give an adapter.safetensors that rmoe export --trained-only has written, or its folder"


class Adapter(NamedTuple):
    """Tells what an adapter holds.

    Attributes:
        path: the file.
        tensors, of: how many tensors it has, and how many the run has.
        bytes, of_bytes: their sizes.
        core: SHA-256 of the core's weights, see `Core`.
    """

    path: Path
    tensors: int
    of: int
    bytes: int
    of_bytes: int
    core: str

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.bytes / 1e6:.2f} MB in {self.tensors} of {self.of} tensors, "
            f"{self.bytes / self.of_bytes:.1%} of the run; for the core with SHA-256 {self.core}"
        )


class Core:
    """Holds the weights of a core, which adapters are attached to: each is a run again, and none loads the core anew.

        core = rmoe.Core("swin_tiny.pth")
        streets, rooms = core.attach("streets/adapter.safetensors"), core.attach("rooms/adapter.safetensors")

    The models share the core's memory: they predict side by side, and are not to be trained.

    Args:
        path: what `core=` of a config takes: a file of any known format, a folder, hf-hub:ORG/NAME.
        device: such as "cpu" or "cuda:1"; a GPU if there is one.

    Attributes:
        source: where it came from.
        weights: by timm's names, on the device.
        sha256: of names, types, shapes and bytes of all weights, whatever file they are kept in.

    Raises:
        UserError: there is no such core, or it is damaged; the device is not there.
    """

    def __init__(self, path: str | Path, *, device: str | torch.device | None = None) -> None:
        self.source, self.device = checked_path(path, "the core"), checked_device(device)
        state = translate(read_checkpoint(self.source)).state
        self.sha256 = _digest(state)
        self.weights = {key: x.clone().to(self.device) for key, x in state.items()}

    def attach(self, adapter: str | Path, *, dtype: Any = None) -> Predictor:
        """Returns the run that an adapter was made of.

        Args:
            adapter: the file, or its folder.
            dtype: see `rmoe.load`.

        Raises:
            UserError: it belongs to another core, is damaged, or is no adapter; also what `rmoe.load` raises.
        """
        path, metadata, own = _read(adapter)
        taken = self._taken(path, metadata["adapter"])
        found = predictor(metadata, own | taken, path, self.device, dtype)
        places = found.model.state_dict(keep_vars=True)
        for key, shared in taken.items():
            if key in places and EXPERT_KEY not in key and places[key].dtype == shared.dtype:
                places[key].data = shared
        return found

    def state_of(self, adapter: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns the description of the run that an adapter was made of, and all its weights; see `attach`."""
        path, metadata, own = _read(adapter)
        return metadata, own | self._taken(path, metadata["adapter"])

    def _taken(self, path: Path, about: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the weights of the run that are the core's, once it is clear that this is the adapter's core."""
        if about["sha256"] != self.sha256:
            called = f", which was {about['name']} then" if about.get("name") else ""
            raise UserError(
                f"{path} belongs to the core with SHA-256 {about['sha256']}{called}; {self.source} has {self.sha256}: "
                "give the adapter's own core"
            )
        if lacking := sorted(set(about["taken"].values()) - self.weights.keys()):
            raise UserError(
                f"{path} is damaged: it takes {lacking[0]!r:.100} of the core, which has none; copy it again"
            )
        cast = about.get("cast", {})
        return {
            key: self.weights[name].to(_CASTS.get(cast.get(key), self.weights[name].dtype))
            for key, name in about["taken"].items()
        }


def export_adapter(
    run: str | Path,
    out: str | Path,
    *,
    task: str | None = None,
    core: str | Path | None = None,
    license: str | None = None,
) -> Adapter:
    """Writes `adapter.safetensors` into a new folder: what a finished run has and its core has not.

    Args:
        run: see `rmoe.load`.
        out: the folder, which must be empty or not there.
        task: see `rmoe.load`.
        core: the run's core; by default the one that its config names.
        license: for the model card, by its identifier on the hub.

    Returns:
        How large it is, and of what.

    Raises:
        UserError: the run is not finished; its core is not there, or is another one; or `out` cannot be written.
    """
    where, metadata, state = read_run(run, task)
    core = core or core_of(metadata["model"])
    if core is None:
        raise UserError(f"{where} does not say what core it was made from; give it by --core (core= in Python)")
    base = Core(core, device="cpu")
    taken = {
        key: name
        for key, name in _pairs(state, base.weights, metadata["model"]).items()
        if _same(state[key], base.weights[name])
    }
    _check_core(where, metadata, state, taken, base)
    own = {key: x for key, x in state.items() if key not in taken}
    name = str(core) if str(core).startswith(SCHEME) else Path(core).name
    whole = predictor(metadata, state, where, "cpu")
    with new_folder(out) as folder:
        (folder / "README.md").write_text(card(whole, Path(out).name, license, adapter_of=name))
        cast = {key: _NAMES[state[key].dtype] for key in taken if state[key].dtype != base.weights[taken[key]].dtype}
        about = {"sha256": base.sha256, "name": name, "taken": taken, "cast": cast}
        write_tensors(folder / ADAPTER, own, {"format": "pt", **without_paths(metadata), "adapter": about})
    sizes = [sum(x.nbytes for x in tensors.values()) for tensors in (own, state)]
    return Adapter(Path(out) / ADAPTER, len(own), len(state), *(sizes[0], sizes[1]), base.sha256)


def attach(core: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Writes core and adapter as one model into a new folder, which `rmoe.load` reads as it reads a run.

    Returns:
        The folder.

    Raises:
        UserError: the adapter belongs to another core, either is damaged, or `out` is not empty.
    """
    metadata, state = Core(core, device="cpu").state_of(adapter)
    known = ("stage", "classes", "palette", "inputs", "core_sha256")
    with new_folder(out) as folder:
        write_model(folder, state, metadata["model"], **{key: metadata[key] for key in known if key in metadata})
    return Path(out)


def _read(adapter: str | Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Returns an adapter's file, its metadata and its tensors."""
    path = checked_path(adapter, "the adapter")
    path = path / ADAPTER if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"there is no {path}; {_GIVE}")
    metadata = read_description(path)
    if "adapter" not in metadata:
        raise UserError(f"{path} is no adapter but a whole model, which rmoe.load reads; {_GIVE}")
    try:
        about = metadata["adapter"]
        words = [about["sha256"], *about["taken"].values(), *about.get("cast", {}).values()]
        if not all(isinstance(word, str) for word in words) or not _SHA256.fullmatch(about["sha256"]):
            raise ValueError
    except Exception as error:  # damaged in any way
        raise UserError(f"{path} does not say which core it belongs to: it is damaged; copy it again") from error
    return path, metadata, read_weights(path)


def _digest(state: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of the weights by name, whatever their order and the file that they came from."""
    digest = hashlib.sha256()
    for key in sorted(state):
        x = state[key]
        digest.update(f"{key}\0{x.dtype}\0{tuple(x.shape)}\0".encode())
        digest.update(_bytes(x).numpy().data)
    return digest.hexdigest()


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def _same(x: Tensor, core: Tensor) -> bool:
    """Returns whether `x` is the core's tensor bit for bit, which a model may keep in another type of weights."""
    fits = x.dtype == core.dtype or {x.dtype, core.dtype} <= _NAMES.keys()
    return fits and x.shape == core.shape and torch.equal(_bytes(x), _bytes(core.to(x.dtype)))


def _pairs(state: Mapping[str, Tensor], core: Mapping[str, Tensor], config: Any) -> dict[str, str]:
    """Returns which weight of a core each weight of a model may have come from, by their names.

    A dense network of the core is `mlp.fc1` where a mixture's is `mlp.core.fc1`. Either's backbone may stand under any
    prefix; of the core's the one that makes most names match is taken.
    """
    found: dict[str, str] = {}
    for prefix in [prefix for prefix, _ in timm_nodes(config)] or [""]:
        names: dict[str, str] = {}
        for key in (key for key in state if key.startswith(prefix)):
            names.setdefault(key.removeprefix(prefix).replace(".core.", "."), key)
        names |= {key.removeprefix(prefix): key for key in state if key.startswith(prefix)}
        prefixes: Counter[str] = Counter()
        for key in core:
            parts = key.split(".")
            tails = (".".join(parts[start:]) for start in range(len(parts)))
            prefixes.update(key[: -len(tail)] for tail in tails if tail in names)
        if prefixes:
            its = prefixes.most_common(1)[0][0]
            bare = {key.removeprefix(its): key for key in core if key.startswith(its)}
            found |= {names[tail]: key for tail, key in bare.items() if tail in names}
    return found


def _check_core(
    where: Path, metadata: Mapping[str, Any], state: Mapping[str, Tensor], taken: Mapping[str, str], core: Core
) -> None:
    """Refuses a core that the run was not made from: its frozen cores must be in it, bit for bit."""
    trained = any(ResidualMoEConfig.from_dict(moe).trains_core for moe in moe_dicts(metadata["model"]))
    cores = [key for key in state if ".core.fc" in key]
    absent = [key for key in cores if key not in taken]
    lacking = [] if trained else absent  # of a core that trains, unless train_only froze it
    known, here = metadata.get("core_sha256"), None
    # Another file may hold the same weights, as cores show that were left alone; other runs have nothing to show it by.
    if known and (lacking or (taken and (absent or not cores))):  # reads the whole file
        here = core_sha256({"core": str(core.source)})
    if lacking or (here and known != here):
        differ = (
            f": {len(lacking)} of {len(cores)} weights of its frozen cores differ, such as {lacking[0]}"
            if lacking
            else ""
        )
        hashes = f"its core's file had the SHA-256 {known}, this one has {here}" if known else "its own is not known"
        raise UserError(
            f"{where} was not made from {core.source}{differ}; {hashes}: give the run's own core by --core (core= in "
            "Python)"
        )
    if not taken:
        raise UserError(
            f"{where} has no weight in common with {core.source}, so that an adapter would be the whole model; export "
            "the run itself (without --trained-only), or train less of it (moe.train_core=False, train_only)"
        )
