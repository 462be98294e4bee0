"""The model card of a run, README.md in Hugging Face's form: what it is, how to load it, and what its records say of
data, schedule, metric and cost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rmoe.backbones.hub import SCHEME
from rmoe.config import ResidualMoEConfig
from rmoe.engine.building import user_errors
from rmoe.engine.checkpoint.export import MODEL, timm_nodes
from rmoe.engine.model_config import moe_dicts
from rmoe.engine.trained import PARTS, count_parts
from rmoe.errors import UserError
from rmoe.inference.predictor import Predictor
from rmoe.inference.runs import Run

_PIPELINES = {
    "segmentation": "image-segmentation",
    "detection": "object-detection",
    "classification": "image-classification",
}
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_STEP = re.compile(r"(?:best_.*_)?(?:iter|epoch)_(\d+)(?:\.pth)?")


def card(
    run: Predictor,
    name: str,
    license: str | None,
    *,
    timm: str | None = None,
    adapter_of: str | None = None,
) -> str:
    """Returns the text of the card.

    Args:
        run: the model; where its weights lie in a work dir, the records of the training are read there.
        name: of the model, the repository's or the folder's.
        license: its identifier on the hub, such as apache-2.0; None is told as unknown.
        timm: the model's name, where the card is of a folder that timm reads.
        adapter_of: the core's name, where it is of an adapter.

    Raises:
        UserError: the licence is no identifier.
    """
    from huggingface_hub import EvalResult, ModelCardData

    if license is not None and (not isinstance(license, str) or not _LICENSE.fullmatch(license)):
        raise UserError(
            f"license is {license!r:.100}; it is an identifier in small letters, such as apache-2.0 or other"
        )
    records, pipeline = _records(run), _PIPELINES.get(run.task or "")
    with user_errors(f"{run.source.parent}: what the run has left for its model card"):
        metrics = _metrics(records, run.source) if records else {}
        data = _data(records) if records else {}
        schedule, cost = _schedule(records), _cost(records)
    results = [
        EvalResult(
            task_type=pipeline or "image-feature-extraction",
            dataset_type=str(data["data set"]),
            dataset_name=str(data["data set"]),
            metric_type=key.lower().replace(" ", "-"),
            metric_name=key,
            metric_value=round(value, 2),
        )
        for key, value in metrics.items()
    ]
    base = adapter_of.removeprefix(SCHEME).partition("@")[0] if adapter_of and adapter_of.startswith(SCHEME) else None
    head = ModelCardData(
        license=license or "unknown",
        library_name="timm" if timm else "rmoe",
        pipeline_tag=pipeline,
        tags=["rmoe", *(["mixture-of-experts"] if _moe(run) else [])],
        base_model=base,
        model_name=name if results else None,
        eval_results=results or None,
    )
    parts = [f"---\n{head.to_yaml()}\n---", f"# {name}", _what(run, adapter_of), _load(run, timm, adapter_of)]
    tables = [("Data", data), ("Schedule", schedule), ("Metric", _percent(metrics)), ("Cost", cost)]
    parts += [f"## {title}\n\n{_table(('', ''), rows.items())}" for title, rows in tables if rows]
    parts.append(f"## Parameters\n\n{_parameters(run, records)}")
    return "\n\n".join(parts) + "\n"


def _what(run: Predictor, adapter_of: str | None) -> str:
    config = run.metadata["model"]
    network = next((node["model"] for _, node in timm_nodes(config)), str(config.get("type")))
    text = f"{'A dense' if not _moe(run) else 'A'} {run.task or 'vision'} model"
    if moe := _moe(run):
        mixture = ResidualMoEConfig.from_dict(moe)
        experts = f"{mixture.num_experts} experts ({mixture.residual}, {mixture.used})"
        text += f" whose feed-forward networks are mixtures of {experts}"
    text += f" on timm's {network}, trained by rmoe {run.metadata['rmoe']}"
    if stage := run.metadata.get("stage"):
        text += f" (stage {stage})"
    if run.classes:
        shown = ", ".join(run.classes[:20]) + (", …" if len(run.classes) > 20 else "")
        text += f". It knows {len(run.classes)} classes: {shown}"
    if adapter_of:
        text += f". This is an adapter: it holds what training changed, and needs its core, {adapter_of}"
    return text + "."


def _load(run: Predictor, timm: str | None, adapter_of: str | None) -> str:
    if timm:
        code = 'import timm\n\nmodel = timm.create_model("hf-hub:ORG/NAME", pretrained=True)  # or "local-dir:FOLDER"'
        if timm.startswith("cvt"):
            code = code.replace("import timm\n", "import rmoe.backbones.cvt  # which registers it\nimport timm\n")
    elif adapter_of:
        code = f'import rmoe\n\nmodel = rmoe.Core("{adapter_of}").attach("adapter.safetensors")\n'
        code += 'print(model.predict("photo.jpg"))'
    else:
        code = 'import rmoe\n\nmodel = rmoe.from_pretrained("ORG/NAME")  # or the folder\n'
        code += 'print(model.predict("photo.jpg"))'
    return f"## How to load it\n\n```python\n{code}\n```"


def _records(run: Predictor) -> Run | None:
    """Returns what the run has left beside its weights; None where there is nothing but those."""
    source = run.source
    folder = source if source.is_dir() else source.parent
    if source.is_dir() and not (folder / "cost.json").is_file():
        folder = source.parent  # a checkpoint of the run
    try:
        return Run(folder, task=run.metadata.get("of_task"), trusted=False)
    except UserError:
        return None


def _metrics(run: Run, source: Path) -> dict[str, float]:
    """Returns the metrics in percent: at the step of a checkpoint, which its name tells, or the last ones of a run."""
    step = int(found[1]) if (found := _STEP.fullmatch(source.name)) else None
    if step is None and source.name != MODEL and source != run.folder:
        return {}  # of a step that its name does not tell
    values = {}
    for one in run.task.measures:
        points = dict(run.scalars.get(one.logged, ()))
        if points and (step is None or step in points):
            values[one.metric] = one.scale * points[max(points) if step is None else step]
    return values


def _data(run: Run) -> dict[str, Any]:
    dataset = dict(run.config.train_dataloader.dataset)
    while isinstance(dataset.get("dataset"), Mapping):
        dataset = dict(dataset["dataset"])
    root = dataset.get("data_root") or dataset.get("root")
    found = {"data set": str(dataset.get("type")).rpartition(".")[2], "task": run.task.name, "stage": run.stage}
    return found | ({"folder": Path(root).name} if root else {}) | {"seed": run.seed}


def _schedule(run: Run | None) -> dict[str, Any]:
    if run is None:
        return {}
    config = run.config
    optimizer, layout = config.optim_wrapper.optimizer, (config.get("strategy") or {}).get("layout") or {}
    found: dict[str, Any] = {}
    for key in ("max_iters", "max_epochs"):
        if config.train_cfg.get(key):
            found["steps" if key == "max_iters" else "epochs"] = config.train_cfg[key]
    if {"processes", "micro_batch", "accumulation"} <= set(layout):
        found["images for each step"] = layout["processes"] * layout["micro_batch"] * layout["accumulation"]
    numbers = (f"{key} {optimizer[key]}" for key in ("lr", "weight_decay") if key in optimizer)
    found["optimizer"] = ", ".join([str(optimizer.type), *numbers])
    schedulers = config.get("param_scheduler") or []
    listed = schedulers if isinstance(schedulers, list | tuple) else [schedulers]
    if listed:
        found["schedule"] = ", ".join(str(one.type) for one in listed)
    if only := (config.optim_wrapper.get("paramwise_cfg") or {}).get("train_only"):
        found["train only"] = ", ".join(only)
    return found


def _cost(run: Run | None) -> dict[str, Any]:
    try:
        cost = run.cost() if run else {}
    except UserError:
        return {}
    found = {
        "device": f"{cost['devices']} x {cost['device']}" if {"device", "devices"} <= cost.keys() else None,
        "training": f"{cost['train_seconds']:,.0f} s" if "train_seconds" in cost else None,
        "FLOPs of a step": f"{cost['flops_per_step']:.3g}" if "flops_per_step" in cost else None,
        "precision": cost.get("precision"),
        "ZeRO stage": cost.get("zero_stage"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _parameters(run: Predictor, records: Run | None) -> str:
    """Returns a table of the parameters by part; trained ones are told where the run has noted them."""
    try:
        noted = (records.cost() if records else {}).get("params_by_part") or {}
    except UserError:
        noted = {}
    rows: list[tuple[Any, ...]] = [(name, sum(count), PARTS[name]) for name, count in count_parts(run.model).items()]
    rows.append(("all", sum(count for _, count, _ in rows), ""))
    if not noted:
        return _table(("part", "parameters", ""), [(name, f"{count:,}", what) for name, count, what in rows])
    trained = {name: one["trained"] for name, one in noted.items()}
    trained["all"] = sum(trained.values())
    told = [(name, f"{count:,}", f"{trained.get(name, 0):,}", what) for name, count, what in rows]
    return _table(("part", "parameters", "trained", ""), told)


def _moe(run: Predictor) -> Mapping[str, Any] | None:
    return next(moe_dicts(run.metadata["model"]), None)


def _percent(metrics: Mapping[str, float]) -> dict[str, str]:
    return {key: f"{value:.2f} %" for key, value in metrics.items()}


def _table(head: tuple[str, ...], rows: Any) -> str:
    def lines() -> Iterator[str]:
        for row in (head, ("---",) * len(head), *rows):
            yield "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in row) + " |"

    return "\n".join(lines())
