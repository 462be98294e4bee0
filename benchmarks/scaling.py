"""What a mixture costs in a training step of one and of two processes, against the dense network in as many.

    python -m benchmarks.scaling

A ViT-S of four blocks under DeepSpeed with ZeRO 2, over gloo; the last two blocks are mixtures of 8 experts, and each
of them has at least 3,000 tokens in each process, so that what is compared is not the fixed cost of a call. Every
process has as many images, whatever their number. All cases of one number of processes take turns, in 30 rounds. Every
collective of a step is counted, whoever asks for it, with the bytes that one process sends by ring algorithms. The last
row is an all-reduce alone: what these processes can send.

With as many cores as processes these numbers compare the cases of one number of processes; they say nothing about
scaling to more of them, and nothing about a GPU's network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import common, training
from benchmarks.common import JUDGED, Row
from rmoe.moe.state import moe_layers

PROCESSES, EXPERTS = (1, 2), 8
TOKENS = 3_000  # at least, in each mixture of each process
PACE, QUICK_PACE = {"seconds": 0.0, "rounds": (30, 30)}, {"seconds": 0.0, "rounds": (1, 1)}
SIZES, QUICK_SIZES = {"images": 16, "image_size": 224}, {"images": 2, "image_size": 64}
REDUCED = 4_000_000  # numbers of the all-reduce alone
Case = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = common.parse("scaling", __doc__, argv)
    pace, sizes = (QUICK_PACE, QUICK_SIZES) if arguments.quick else (PACE, SIZES)
    rows: list[Row] = []
    for processes in PROCESSES:
        found = common.in_child(
            "benchmarks.scaling:measure",
            allocator="tuned",
            threads=1,
            processes=processes,
            named=cases(processes),
            pace=pace,
            small=arguments.quick,
            **sizes,
        )
        rows += [{"processes": processes, "setting": JUDGED} | row for row in found]
    draw(arguments, rows)
    common.publish(arguments._replace(threads=1), {"pace": pace, **sizes}, rows, table(rows))


def cases(processes: int) -> list[Case]:
    """Returns what is compared among so many processes: the dense network, and mixtures by keys of their config."""
    found: list[Case] = [{"residual": "dense", "ep_size": 1, "exchange": "none"}]
    for residual, way in (("low_rank", "weights"), ("full", "tokens")):
        found += [{"residual": residual, "ep_size": 1, "exchange": "none"}]
        found += [{"residual": residual, "ep_size": processes, "exchange": way}] * (processes > 1)
    return found


def config(case: Case, image_size: int, small: bool) -> Config:
    """Returns the config of a case's classifier."""
    way = "auto" if case["exchange"] == "none" else case["exchange"]
    moe = case | {"exchange": way, "num_experts": EXPERTS, "top_k": 1, "train_core": False, "blocks": "last_two"}
    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 3} if small else {"depth": 4}
    model = {
        "type": "rmoe.TimmClassifier",
        "model": "vit_small_patch16_224",
        "kwargs": {"img_size": image_size, **sizes},
        "num_classes": 1000,
        "moe": None if case["residual"] == "dense" else moe,
        "allow_random_core": True,
    }
    return Config({"model": model, "default_scope": "mmengine"})


def measure(named: Sequence[Case], pace: dict[str, Any], images: int, image_size: int, small: bool) -> list[Row]:
    """Measures all cases in turns, in each process of a group."""
    common.join_group()
    models = [training.build(config(case, image_size, small)) for case in named]
    batch = training.batch("classification", images, image_size)
    steps = {str(number): _step(model, batch) for number, model in enumerate(models)}
    numbers = torch.ones(REDUCED)
    times = common.alternate(steps | {"reduction": lambda: dist.all_reduce(numbers)}, **pace)
    *timed, reduction = common.timing_rows(times, "0")
    rows = []
    for case, model, row in zip(named, models, timed, strict=True):
        with Collectives() as seen, _Tokens(model) as tokens:
            steps[row.pop("contender")]()
        row |= {"images_per_second": dist.get_world_size() * images / (row["ms"] / 1e3), "tokens": tokens.fewest()}
        rows.append(case | row | {"collectives": dict(seen.calls), "sent_bytes": dict(seen.sent)})
    with Collectives() as seen:
        dist.all_reduce(numbers)
    empty = {"residual": "none, all-reduce alone", "ep_size": 1, "exchange": "none", "tokens": None}
    alone = {"ms": reduction["ms"], "rounds": reduction["rounds"], "ratio": None, "ratio_low": None, "ratio_high": None}
    counted = {"collectives": dict(seen.calls), "sent_bytes": dict(seen.sent), "images_per_second": None}
    return [*rows, empty | alone | counted]


class Collectives(TorchDispatchMode):
    """Counts the collectives that this thread begins inside, whoever asks for them.

    Attributes:
        calls: by the collective's name.
        sent: likewise, bytes that this process sends to others, by ring algorithms.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.note(func.__name__.partition(".")[0].strip("_"), func, args)
        return func(*args, **(kwargs or {}))

    def note(self, name: str, func: Any, args: Sequence[Any]) -> None:
        """Counts a collective that begins."""
        self.calls[name] += 1
        self.sent[name] += round(_sent(name, func._schema.arguments, args))


def _sent(name: str, parameters: Sequence[Any], given: Sequence[Any]) -> float:
    arguments = {parameter.name: value for parameter, value in zip(parameters, given, strict=False)}
    group = dist.ProcessGroup.unbox(arguments["process_group"])
    others = 1 - 1 / group.size()
    if splits := arguments.get("input_split_sizes"):  # rows to each process, which may be of different numbers
        others = 1 - splits[group.rank()] / max(1, sum(splits))
    if name.startswith("alltoall"):
        return others * arguments["input"].nbytes
    largest = max(_nbytes(value) for value in arguments.values())  # the whole of what is gathered or scattered
    return others * largest * (2 if name.startswith("allreduce") else 1)


def _nbytes(value: Any) -> int:
    return sum(x.nbytes for x in tree_leaves(value) if isinstance(x, Tensor))


class _Tokens:
    """Notes how many tokens each mixture of a model gets."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: list[int] = []
        self._hooks = [layer.register_forward_pre_hook(self._note) for layer in moe_layers(model).values()]

    def _note(self, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        self._seen.append(inputs[0].shape[:-1].numel())

    def __enter__(self) -> _Tokens:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def fewest(self) -> int | None:
        """Returns the number of the mixture that had the fewest; None where there is no mixture."""
        return min(self._seen, default=None)


def _step(model: nn.Module, images: dict[str, Any]) -> Callable[[], None]:
    import deepspeed

    from rmoe.engine.ds_json import resolve
    from rmoe.engine.optim import param_groups
    from rmoe.reporting.tracing import training_loss

    stage = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000}, "steps_per_print": 10**9}
    content = resolve(
        stage, batch_size=len(images["labels"]), accumulation=1, max_norm=0.0, processes=dist.get_world_size()
    )
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-5, weight_decay=0.01))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=content)

    def step() -> None:
        engine.backward(training_loss(engine, images))
        engine.step()

    return step


def table(rows: Sequence[Row]) -> list[Row]:
    """Returns all cases: against the dense network, the quartiles of that ratio, and what was sent."""
    return [
        {
            "processes": row["processes"],
            "layer": row["residual"],
            "ep_size": row["ep_size"],
            "exchange": row["exchange"],
            "tokens": row["tokens"],
            "ms": row["ms"],
            "× dense": row["ratio"],
            "from": row["ratio_low"],
            "to": row["ratio_high"],
            "collectives": sum(row["collectives"].values()),
            "sent MB": sum(row["sent_bytes"].values()) / 1e6,
        }
        for row in rows
    ]


def draw(arguments: common.Arguments, rows: Sequence[Row]) -> None:
    """Draws the ratio to the dense network, between its quartiles, and what is sent, for each number of processes."""
    with common.picture(arguments, 2, "Training step against the dense network in as many processes") as (left, right):
        for offset, processes in enumerate(PROCESSES):
            mine = [row for row in rows if row["processes"] == processes and row["ratio"] is not None]
            names = [f"{row['residual']}\nep {row['ep_size']}" for row in mine]
            ratios = [row["ratio"] for row in mine]
            spread = [
                [row["ratio"] - row["ratio_low"] for row in mine],
                [row["ratio_high"] - row["ratio"] for row in mine],
            ]
            left.errorbar(names, ratios, spread, fmt="os"[offset], capsize=4, label=f"{processes} processes")
            if processes > 1:
                right.bar(names, [sum(row["sent_bytes"].values()) / 1e6 for row in mine])
        left.axhline(1.0, color="black", linewidth=0.5)
        left.set(ylabel="× dense")
        left.legend(fontsize="small")
        right.set(ylabel=f"MB sent by each of {PROCESSES[-1]} processes in a step")


if __name__ == "__main__":
    main()
