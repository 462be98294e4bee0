"""A run that is stopped and resumed on 4, 2, 1 and 2 processes, with another ep_size and ZeRO stage each time, is the
run that was never stopped: what is saved again right after a resume is what was loaded, and training goes on the same.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT, run_processes
from safetensors.torch import load_file
from torch import Tensor
from toy import TOP_1, write_config, write_json

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]
GLOBAL_BATCH, STEPS = 8, 2
PROCESSES = (4, 2, 1, 2)
FULL = {"num_experts": 4, "residual": "full", "noise": 0.0, "losses": {"importance": 0.01}, "train_core": True}
SEGMENTS = {"num_experts": 4, "top_k": "all", "train_core": False, "residual": "segments", "rank": 1, "noise": 0.0}
SPARSE = {"num_experts": 4, "residual": "sparse", "density": 0.2, "noise": 0.0}
SGD = {"type": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
AVERAGED = {"type": "rmoe.EMAHook", "momentum": 0.3}
ADAMW = {"type": "AdamW", "lr": 0.01, "weight_decay": 0.05}


class Chain(NamedTuple):
    """One run on the way over `PROCESSES`."""

    moe: dict[str, Any] | None
    optimizer: dict[str, Any]
    ep_sizes: tuple[int, int, int, int]
    stages: tuple[int, int, int, int]
    averaged: bool = False


CHAINS = {
    "low rank": Chain(TOP_1, ADAMW, (4, 2, 1, 2), (2, 1, 0, 2), averaged=True),
    "full": Chain(FULL, ADAMW, (2, 1, 1, 2), (1, 3, 2, 0)),
    "from stage 0": Chain(FULL, SGD, (4, 2, 1, 1), (0, 2, 1, 1)),
    "segments": Chain(SEGMENTS, ADAMW, (2, 1, 1, 2), (1, 3, 2, 0)),
    "sparse": Chain(SPARSE, ADAMW, (4, 2, 1, 1), (2, 1, 0, 2), averaged=True),
    "dense": Chain(None, ADAMW, (1, 1, 1, 1), (3, 0, 2, 3)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All chains, a leg of each in one group of processes; beside them runs that are never stopped or are refused."""
    folder = tmp_path_factory.mktemp("elastic")
    for leg, processes in enumerate(PROCESSES):
        commands = [
            command(folder, name, leg, processes, chain.ep_sizes[leg], chain.stages[leg])
            for name, chain in CHAINS.items()
        ]
        if leg == 1:
            full = [{"type": "toy.FullDiskHook", "at": 3, "rank": 1}]
            commands.append(command(folder, "full disk", 1, 2, 2, 1, custom_hooks=full))
        if leg == 2:
            commands += [command(folder, f"{name} whole", 3, 1, 1, 0) for name in CHAINS]
            batch = {"train_dataloader.batch_size": 2}
            commands += [
                command(folder, "low rank", 3, 1, 1, 0, **batch),
                command(folder, "low rank", 3, 1, 1, 0, **{"randomness.seed": 4}),
                command(folder, "full", 3, 1, 1, 0, **{"optim_wrapper.optimizer": SGD | {"_delete_": True}}),
                command(folder, "full", 3, 1, 1, 0, **{"optim_wrapper.paramwise_cfg": {"exempt": False}}),
            ]
        listed = folder / f"leg_{leg}.json"
        listed.write_text(json.dumps(commands))
        # In the first leg each process is the first of a node of its own.
        env = {} if leg else {"LOCAL_RANK": "0"}
        run_processes(folder, [ROOT / "tests" / "several_runs.py", listed], processes, timeout=280, env=env)
    return folder


def command(folder: Path, name: str, leg: int, processes: int, ep_size: int, stage: int, **more: Any) -> list[str]:
    """The arguments of launch/train.py for the `leg`-th two steps of the chain `name`."""
    chain = CHAINS[name.removesuffix(" whole")] if name != "full disk" else CHAINS["low rank"]
    options = {
        "model.moe": chain.moe and chain.moe | {"ep_size": ep_size},
        "model.drop_path": 0.0,
        "optim_wrapper.optimizer": chain.optimizer | {"_delete_": True},
        "train_dataloader.batch_size": GLOBAL_BATCH // processes,
        "train_cfg.max_iters": STEPS * (leg + 1),
        "param_scheduler.0.end": STEPS * len(PROCESSES),
        "default_hooks.checkpoint.max_keep_ckpts": -1,
        "custom_hooks": [{"type": "toy.ResaveHook"}, *([AVERAGED] if chain.averaged else [])],
        **more,
    }
    config = write_config(folder / f"run_{len(list(folder.glob('*.py')))}.py", options)
    written = write_json(config.with_suffix(".json"), stage)
    return [str(config), "--deepspeed_config", str(written), "--work-dir", str(folder / name), "--resume"]


def ended(folder: Path, leg: int) -> list[list[str]]:
    """How the runs of a leg ended, by process."""
    return [json.loads((folder / f"leg_{leg}.json.{rank}").read_text()) for rank in range(PROCESSES[leg])]


def saved(path: Path) -> dict[str, Tensor]:
    files = [load_file(part) for part in path.glob("part_*.safetensors")]
    together = {key: x for file in files for key, x in file.items()}
    assert len(together) == sum(map(len, files)), "a tensor is in two files"
    return together


def losses(work_dir: Path) -> list[float]:
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("name", CHAINS)
def test_what_is_resumed_is_what_was_saved(folder: Path, name: str) -> None:
    """To the bit: weights and every state of the optimizer, under the same names, whoever wrote them."""
    for leg in range(1, len(PROCESSES)):
        assert {one[list(CHAINS).index(name)] for one in ended(folder, leg)} == {"done"}
        before, after = (saved(folder / name / f"{kind}_{STEPS * leg}") for kind in ("iter", "again"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        kinds = {key.partition("/")[0] for key in before}
        adam = {"weight", "exp_avg", "exp_avg_sq", "step"}
        states = adam if CHAINS[name].optimizer is ADAMW else {"weight", "momentum_buffer"}
        assert kinds == states | ({"average"} if CHAINS[name].averaged else set())
        if CHAINS[name].moe:
            assert any("deepspeed_experts.3." in key for key in before)


def test_nodes_write_side_by_side(folder: Path) -> None:
    """Each of four writes about as much of a dense model as the others; on one node its first process writes all."""
    sizes = [
        [sum(x.nbytes for x in load_file(part).values()) for part in (folder / "dense" / f"iter_{step}").glob("part_*")]
        for step in (STEPS, 2 * STEPS)
    ]
    assert [len(each) for each in sizes] == [4, 1]
    assert max(sizes[0]) < 0.4 * sizes[1][0]


@pytest.mark.parametrize("name", CHAINS)
def test_it_goes_on_as_if_never_stopped(folder: Path, name: str) -> None:
    whole = losses(folder / f"{name} whole")
    assert len(whole) == STEPS * len(PROCESSES)
    assert losses(folder / name) == pytest.approx(whole, abs=1e-5)
    last = f"iter_{STEPS * len(PROCESSES)}"
    stretched, never = (saved(folder / run / last) for run in (name, f"{name} whole"))
    assert stretched.keys() == never.keys()
    for key in stretched:
        torch.testing.assert_close(
            stretched[key], never[key], atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    settings = [json.loads((folder / run / last / "run.json").read_text()) for run in (name, f"{name} whole")]
    rates = [
        {name: group["settings"]["lr"] for group in one["engine"]["groups"] for name in group["parameters"]}
        for one in settings
    ]
    assert rates[0] == pytest.approx(rates[1])


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (-4, "micro_batch 8.*this run has processes 1, .*micro_batch 2.*train_dataloader.batch_size 8"),
        (-3, "seed 3.*seed 4.*load_from"),
        (-2, "is of optimizer AdamW, the config.s is SGD"),
        (-1, "optim_wrapper.paramwise_cfg.exempt was True; this run has False"),
    ],
)
def test_another_run_is_refused(folder: Path, place: int, message: str) -> None:
    said = ended(folder, 2)[0][place]
    assert said.startswith("UserError")
    assert re.search(message, said)


def test_a_full_disk_ends_the_run_and_spares_what_there_is(folder: Path) -> None:
    """The second of two processes cannot write its experts of step 4: both stop, and step 2's checkpoint is whole."""
    for one in ended(folder, 1):
        assert "iter_4 cannot be written" in one[-1]
        assert "File too large" in one[-1]
        assert "(process 1)" in one[-1]
    names = {path.name for path in (folder / "full disk").glob("*iter_*")}
    assert "iter_2" in names
    assert not any("iter_4" in name for name in names)
    assert (folder / "full disk" / "iter_2" / "complete.json").exists()
