"""Makes a dense run of a mixture's: exactly where one network computes the same, else, if asked for, on average."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmoe.engine.checkpoint.export import write_model
from rmoe.engine.checkpoint.files import write_json
from rmoe.engine.checkpoint.weights import fill
from rmoe.engine.model_config import mappings
from rmoe.errors import UserError
from rmoe.inference.evaluate import dumped_configs, evaluate, run_config, work_dir
from rmoe.inference.folders import new_folder
from rmoe.inference.load import build_model, load
from rmoe.inference.predictor import Picture, Predictor
from rmoe.moe.experts import Network
from rmoe.moe.merged import average_network, exact_network, mean_values
from rmoe.moe.records import collect
from rmoe.moe.state import global_state_dict, moe_layers

STAGE, MERGED = "merged", "merged.json"


@dataclass(frozen=True)
class Merged:
    """Says what was made of a run; merged.json holds the same.

    Attributes:
        source: the file whose weights were merged.
        exact: whether the dense model computes what the mixture did; if not, it is an approximation.
        gate_values: of an approximation, by layer what each expert was weighed by.
        metrics: of the dense model on the run's validation set; None where that is not at hand.
        metrics_of_mixture: likewise, of the run.
        not_measured: why there are no metrics.
    """

    source: str
    exact: bool
    gate_values: dict[str, list[float]] | None
    metrics: dict[str, float] | None = None
    metrics_of_mixture: dict[str, float] | None = None
    not_measured: str | None = None


def merge(
    path: str | Path,
    out: str | Path,
    *,
    task: str | None = None,
    average: bool = False,
    images: Sequence[Picture] = (),
) -> Merged:
    """Writes a dense run into `out`: `model.safetensors`, `backbone.safetensors` for timm, the config, `merged.json`.

    Args:
        path: of the mixture's run, see `rmoe.load`.
        task: see `rmoe.load`.
        out: folder to make, which must be empty or not there.
        average: take θ0 + Σ v_e Δ_e, an approximation, where no one network computes the same; v_e = 1/E, or …
        images: … the mean gate values that the run's gates give on these images.

    Raises:
        UserError: what `rmoe.load` raises; the run is dense, or no one network computes what its layers do and
            `average` is not given; experts have trained biases that the dense network lacks; `out` is not empty, or
            cannot be written.
    """
    with new_folder(out) as folder:
        run = load(path, task=task, device="cpu")
        networks, values = _networks(run, average, images)
        _write(run, networks, folder)
        found = Merged(str(run.source), not average, values, not_measured="interrupted while it was evaluated")
        write_json(folder / MERGED, asdict(found))
    found = _measured(found, work_dir(run.source), path, task, Path(out))
    write_json(Path(out) / MERGED, asdict(found))
    return found


def _networks(
    run: Predictor, average: bool, images: Sequence[Picture]
) -> tuple[dict[str, Network], dict[str, list[float]] | None]:
    """Returns the dense network of each layer, and, of an average, what each expert was weighed by."""
    layers = moe_layers(run.model)
    if not layers:
        raise UserError(f"{run.source} is dense; there is nothing to merge")
    if images and not average:
        raise UserError("images measure what an average weighs experts by; give --average as well, or no --images")
    if not average:
        return {name: _told(name, exact_network, layer) for name, layer in layers.items()}, None
    measured = mean_gate_values(run, images) if images else {}
    networks = {name: _told(name, average_network, layer, measured.get(name)) for name, layer in layers.items()}
    values = {
        name: [1 / layer.num_experts] * layer.num_experts if name not in measured else measured[name].tolist()
        for name, layer in layers.items()
    }
    return networks, values


@torch.no_grad()
def mean_gate_values(run: Predictor, images: Sequence[Picture]) -> dict[str, Tensor]:
    """Returns by layer the mean over the tokens of images of the value with which each expert enters, [E], on the CPU.

    Raises:
        UserError: an image cannot be read, or the run has no inputs.
    """
    if run.inputs is None:
        raise UserError(f"{run.source} does not say how images become its inputs; leave --images out")
    layers = moe_layers(run.model)
    sums = {name: torch.zeros(layer.num_experts, dtype=torch.float64) for name, layer in layers.items()}
    tokens = dict.fromkeys(layers, 0)
    for image in images:
        with collect() as records:
            run.run(run.inputs.collate([run.item(image)]))
        for name, layer in layers.items():
            routing = records.routing[layer]
            number = routing.expert_TK.shape[0]
            sums[name] += number * mean_values(routing.expert_TK, routing.gate_TK.double(), layer.num_experts)
            tokens[name] += number
    return {name: sums[name] / tokens[name] for name in layers}


def _told(name: str, function: Any, *arguments: Any) -> Network:
    try:
        return function(*arguments)
    except UserError as error:
        hint = "" if function is average_network else "; --average makes an approximation"
        raise UserError(f"{name}: {error}{hint}") from error


def dense_model(run: Predictor, networks: Mapping[str, Network]) -> nn.Module:
    """Returns a run's model with dense networks, by the names of its mixtures, in their places.

    Raises:
        UserError: a dense network has no place for a bias that was trained.
    """
    state, layers = global_state_dict(run.model), moe_layers(run.model)
    for name, network in networks.items():
        form, core = layers[name].form, f"{name}.core."
        between = {key.removeprefix(core): x for key, x in state.items() if key.startswith(core)}
        between = {key: x for key, x in between.items() if key.partition(".")[0] in form.between}
        state = {key: x for key, x in state.items() if not key.startswith(f"{name}.")}
        state |= {f"{name}.{key}": x for key, x in {**between, **form.state(network)}.items()}
    model = build_model({**run.metadata, "model": _dense(run.metadata["model"])}, run.source)
    # Experts have biases where their core has none: zeros, unless they were trained.
    homeless = {key for key in state if key.endswith(".bias")} - model.state_dict().keys()
    if trained := sorted(key for key in homeless if state[key].any()):
        raise UserError(
            f"the experts of {run.source} have trained biases, and the dense network has none in their place, such as "
            f"{trained[0]}: leave the run a mixture, which rmoe deploy writes too"
        )
    fill(model, {key: x for key, x in state.items() if key not in homeless}, run.source)
    return model.eval()


def _write(run: Predictor, networks: Mapping[str, Network], out: Path) -> None:
    """Writes the dense model with what the run says of it, and the run's config where it has one."""
    config, model = _dense(run.metadata["model"]), dense_model(run, networks)
    known = {key: run.metadata.get(key) for key in ("classes", "palette", "inputs", "core_sha256")}
    write_model(out, global_state_dict(model), config, stage=STAGE, **known)
    folder = work_dir(run.source)
    if len(configs := dumped_configs(folder)) == 1:
        whole = run_config(folder, task=run.metadata.get("of_task"))
        whole.merge_from_dict({"model": {**_dense(whole.model.to_dict()), "_delete_": True}, "stage": STAGE})
        whole.dump(out / configs[0].name)


def _dense(config: Any) -> Any:
    """Returns a model's config without mixtures."""
    changed = copy.deepcopy(config)
    for node in mappings(changed):
        if node.get("moe") is not None:
            node["moe"] = None
    return changed


def _measured(found: Merged, folder: Path, path: str | Path, task: str | None, out: Path) -> Merged:
    """Adds the metrics of both models where the run's validation set is at hand."""
    try:
        run_config(folder, task=task)
        after, before = evaluate(out), evaluate(path, task=task)
    except UserError as error:
        return replace(found, not_measured=str(error))
    return replace(found, metrics=after.metrics, metrics_of_mixture=before.metrics, not_measured=None)
