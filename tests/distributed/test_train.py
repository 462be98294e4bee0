"""Whole runs of launch/train.py on a toy: placement, stopping and resuming, evaluation, and what a run leaves.

Starting a process takes seconds, a toy run does not: `several_runs.py` does many in one group of processes.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Finished, run_processes
from safetensors.torch import load_file
from torch import Tensor
from toy import TOP_1, write_config, write_json

from rmoe.engine.checkpoint.export import read_metadata
from rmoe.engine.ports import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]
TRAIN = ROOT / "launch" / "train.py"
GLOBAL_BATCH = 8
# Without noise, for comparisons between numbers of processes; the clipping is active in every step.
CALM = {"model.drop_path": 0.0, "optim_wrapper.clip_grad.max_norm": 0.05}
# Without losses of the gates, which are of all tokens of a part: parts with other numbers of tokens make another mean.
SHARED = TOP_1 | {"losses": {"importance": 0.0}, "gate_std": 0.5, "shared_a": True, "balance_rate": 0.01}
AVERAGED = {"type": "rmoe.EMAHook", "momentum": 0.3}
# With all that is random, drop path, gate noise, augmentation, and an average of the weights.
WILD = {"model.moe": TOP_1 | {"noise": 1.0, "ep_size": 2}, "model.drop_path": 0.3, "custom_hooks": [AVERAGED]}
DRAWN = {
    "model.moe": TOP_1 | {"residual": "full"},
    "custom_hooks": [{"type": "rmoe.AverageExpertsHook", "rate": 0.25}],
}
NO_DATA = {"_delete_": True, "type": "rmoe.ImageFolder", "root": "nowhere", "split": "train", "num_classes": 2}
PLAIN_STOP, SAVING_STOP = {"at": 5}, {"at": 4, "while_saving": True}


@dataclass
class Runs:
    """The work dirs of all runs, and how each ended."""

    folder: Path
    killed: list[Finished]
    killed_while_saving: list[Finished]
    outcomes: dict[str, list[str]]

    def weights(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / name / "model.safetensors")

    def cost(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name / "cost.json").read_text())

    def scalars(self, name: str, key: str) -> list[float]:
        """What was logged under `key`, over all starts of the run."""
        files = sorted((self.folder / name).glob("*/vis_data/scalars.json"))
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return [row[key] for row in rows if key in row]


def spread(options: dict[str, Any]) -> dict[str, Any]:
    """The same with its experts over two processes."""
    return options | {"model.moe": options["model.moe"] | {"ep_size": 2}}


def command(folder: Path, name: str, options: dict[str, Any], stage: int, *words: str, **content: Any) -> list[str]:
    """The arguments of launch/train.py for a run of that name; its config is named like it."""
    config = write_config(folder / f"{name.replace(' ', '_')}_{len(list(folder.iterdir()))}.py", options)
    written = write_json(config.with_suffix(".json"), stage, **content)
    return [str(config), "--deepspeed_config", str(written), "--work-dir", str(folder / name), *words]


def run_all(folder: Path, processes: int, commands: dict[str, list[str]]) -> dict[str, list[str]]:
    """Runs them in one group; by name, how each ended on each rank."""
    listed = folder / f"runs_{processes}.json"
    listed.write_text(json.dumps(list(commands.values())))
    run_processes(folder, [ROOT / "tests" / "several_runs.py", listed], processes, timeout=280)
    ended = [json.loads(Path(f"{listed}.{rank}").read_text()) for rank in range(processes)]
    return {name: list(each) for name, each in zip(commands, zip(*ended, strict=True), strict=True)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All runs that the tests below look at: two killed ones, then one group of two processes and one alone."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name: str, options: dict[str, Any], stage: int, *words: str, **content: Any) -> list[str]:
        return command(folder, name, options, stage, *words, **content)

    def stopped(options: dict[str, Any], stop: dict[str, Any]) -> dict[str, Any]:
        return options | {"custom_hooks": [AVERAGED, {"type": "toy.KillHook", **stop}]}

    alone_wild = {**WILD, "model.moe": WILD["model.moe"] | {"ep_size": 1}}
    killed = run_processes(folder, [TRAIN, *make("resumed alone", stopped(alone_wild, PLAIN_STOP), 0)], 0, check=False)
    three = {"default_hooks.checkpoint.max_keep_ckpts": 3}
    words = [TRAIN, *make("resumed pair", stopped(WILD | three, SAVING_STOP), 2)]
    while_saving = run_processes(folder, words, 2, check=False, grace=0.5)
    shutil.copytree(folder / "resumed pair", folder / "other layout")
    cut = shutil.copytree(folder / "resumed alone", folder / "cut short") / "iter_4" / "part_00000.safetensors"
    cut.write_bytes(cut.read_bytes()[:-200])
    for path in (folder / "resumed alone").glob("iter_*"):
        path.rename(f"{path}.pth")  # as they were called once
    flipped = shutil.copytree(folder / "resumed pair", folder / "flipped") / "iter_3" / "part_00001.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + bytes([flipped.read_bytes()[-1] ^ 1]))

    half = CALM | {"train_dataloader.batch_size": GLOBAL_BATCH // 2}
    whole = CALM | {"train_dataloader.batch_size": GLOBAL_BATCH}
    poisoned = {"train_dataloader.sampler.shuffle": False, "train_dataloader.dataset.poison": 9}
    constant = {"param_scheduler": []}
    infinite = {"custom_hooks": [{"type": "fault_injection.InfiniteGradientHook", "at": 2}]}
    some = {"optim_wrapper.paramwise_cfg.train_only": ["residual", "gate"]}
    until_4, half_precision = (
        {"train_cfg.max_iters": 4},
        json.loads((ROOT / "ds_configs" / "zero2_fp16.json").read_text()),
    )
    frozen = {"optim_wrapper.optimizer.lr": 0.0, "optim_wrapper.optimizer.weight_decay": 0.0}
    unseen = {"val_cfg": None, "val_dataloader": None, "val_evaluator": None}
    unseen |= {"default_hooks.checkpoint.save_best": None, "default_hooks.checkpoint.interval": 4}
    shared = CALM | constant | unseen | {"model.moe": SHARED, "train_cfg.max_iters": 12}
    shared |= {"train_dataloader.batch_size": GLOBAL_BATCH // 4}
    pair = {
        **{f"pair dense {stage}": make(f"pair dense {stage}", half, stage) for stage in (0, 2)},
        **{f"pair ep1 {stage}": make(f"pair ep1 {stage}", half | {"model.moe": TOP_1}, stage) for stage in (2, 3)},
        **{f"pair ep2 {s}": make(f"pair ep2 {s}", half | {"model.moe": TOP_1 | {"ep_size": 2}}, s) for s in (0, 1, 2)},
        **{f"pair drawn {s}": make(f"pair drawn {s}", half | spread(DRAWN), s) for s in (0, 2)},
        "whole pair": make("whole pair", WILD, 2),
        "resumed pair": make("resumed pair", WILD, 2, "--resume"),
        "flipped": make("flipped", WILD, 2, "--resume"),
        "shared": make("shared", shared, 2, gradient_accumulation_steps=2),
        "shared begun": make("shared again", shared | {"train_cfg.max_iters": 8}, 2, gradient_accumulation_steps=2),
        "shared again": make("shared again", shared, 2, "--resume", gradient_accumulation_steps=2),
        "some pair": make("some pair", half | some | {"model.moe": TOP_1 | {"ep_size": 2}}, 2),
        "no data": make("no data", {"train_dataloader.dataset": NO_DATA}, 2),
        "poisoned pair": make("poisoned pair", CALM | poisoned | {"train_dataloader.batch_size": 2}, 2),
    }
    outcomes = run_all(folder, 2, pair)
    moe = whole | {"model.moe": TOP_1}
    calibrated = alone_wild | {"calibrate": {"batches": 2}}
    best, last = next((folder / "pair ep2 2").glob("best_*")), folder / "pair ep2 2" / "iter_6"
    every_step = {"default_hooks.checkpoint.interval": 1, "default_hooks.checkpoint.max_keep_ckpts": -1}
    averaged = folder / "whole pair" / "iter_6"
    alone = {
        **{f"alone dense {stage}": make(f"alone dense {stage}", whole, stage) for stage in (0, 1, 2, 3)},
        **{f"alone moe {stage}": make(f"alone moe {stage}", moe, stage) for stage in (0, 2)},
        **{f"alone drawn {stage}": make(f"alone drawn {stage}", whole | DRAWN, stage) for stage in (0, 1)},
        **{f"some {stage}": make(f"some {stage}", moe | some, stage) for stage in (0, 3)},
        "some begun": make("some again", moe | some | until_4, 2),
        "some again": make("some again", moe | some, 2, "--resume"),
        "some others": make("some again", moe, 2, "--resume"),
        "some half": make("some half", moe | some, 2, torch_autocast={"enabled": True, "dtype": "bfloat16"}),
        "accumulated": make(
            "accumulated",
            half | constant | unseen | {"train_cfg.max_iters": 12},
            1,
            gradient_accumulation_steps=2,
        ),
        "constant": make("constant", whole | constant, 1),
        "shared alone": make("shared alone", whole | constant | {"model.moe": SHARED}, 0),
        "scaled": make(
            "scaled",
            whole
            | constant
            | {"auto_scale_lr": {"enable": True, "base_batch_size": 16}, "optim_wrapper.optimizer.lr": 0.02},
            1,
        ),
        "mid-accumulation": make("mid-accumulation", half, 1, gradient_accumulation_steps=4),
        "whole alone": make("whole alone", alone_wild | {"train_dataloader.num_workers": 1}, 0),
        "resumed alone": make("resumed alone", alone_wild, 0, "--resume"),
        "cut short": make("cut short", alone_wild, 0, "--resume"),
        "every step": make("every step", alone_wild | every_step, 1),
        "no average": make("resumed alone", alone_wild | {"custom_hooks": []}, 0, "--resume"),
        "from average": make("from average", moe | frozen | {"load_from": str(averaged)}, 0),
        "other layout": make("other layout", alone_wild, 2, "--resume"),
        "from checkpoint": make("from checkpoint", moe | frozen | {"load_from": str(last)}, 2),
        "from best": make("from best", moe | frozen | {"load_from": str(best)}, 0),
        "bad loop": make("bad loop", {"train_cfg.max_iter": 3}, 0),
        "bad data": make("bad data", {"train_dataloader.dataset.lenght": 3}, 0),
        "bad model": make("bad model", {"model.type": "ToyModle"}, 0),
        "other schedule": make("resumed alone", alone_wild | {"param_scheduler.0.power": 2.0}, 0, "--resume"),
        "other rate": make("resumed alone", alone_wild | {"optim_wrapper.optimizer.lr": 0.02}, 0, "--resume"),
        "other decay": make("resumed alone", alone_wild | {"optim_wrapper.optimizer.weight_decay": 0.1}, 0, "--resume"),
        **{f"infinite {stage}": make(f"infinite {stage}", moe | infinite, stage) for stage in (0, 2)},
        "calibrated": make("calibrated", calibrated, 2),
        "calibrated begun": make("calibrated again", calibrated | until_4, 2),
        "calibrated again": make("calibrated again", calibrated, 2, "--resume"),
        "bfloat16": make("bfloat16", moe, 2, torch_autocast={"enabled": True, "dtype": "bfloat16"}),
        # Last of all: DeepSpeed knows of one number format in a process.
        "float16 lost": make("float16 lost", moe | infinite | {"train_cfg.max_iters": 20}, 2, **half_precision),
        "float16": make("float16", alone_wild, 2, **half_precision),
        "float16 begun": make("float16 again", alone_wild | until_4, 2, **half_precision),
        "float16 again": make("float16 again", alone_wild, 2, "--resume", **half_precision),
    }  # fmt: skip
    outcomes |= run_all(folder, 1, alone)
    return Runs(folder, killed, while_saving, outcomes)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=atol, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def saved_weights(path: Path, kind: str = "weight/") -> dict[str, Tensor]:
    """Of a training checkpoint."""
    files = [load_file(part) for part in path.glob("part_*.safetensors")]
    return {key.removeprefix(kind): x for file in files for key, x in file.items() if key.startswith(kind)}


@pytest.mark.parametrize(
    ("reference", "others"),
    [
        ("alone dense 0", ["alone dense 1", "alone dense 2", "alone dense 3", "pair dense 0", "pair dense 2"]),
        ("alone moe 0", ["alone moe 2", "pair ep1 2", "pair ep1 3", "pair ep2 0", "pair ep2 1", "pair ep2 2"]),
        ("alone drawn 0", ["alone drawn 1", "pair drawn 0", "pair drawn 2"]),
    ],
)
def test_placement_changes_nothing(runs: Runs, reference: str, others: list[str]) -> None:
    """Loss, gradient norm before an active clipping, and weights: any stage, any number of processes, any ep_size."""
    losses, norms = runs.scalars(reference, "loss"), runs.scalars(reference, "grad_norm")
    assert len(losses) == 6
    assert all(norm > CALM["optim_wrapper.clip_grad.max_norm"] for norm in norms)
    for other in others:
        assert runs.scalars(other, "loss") == pytest.approx(losses, abs=1e-5), other
        assert runs.scalars(other, "grad_norm") == pytest.approx(norms, abs=1e-5), other
        assert_equal(runs.weights(other), runs.weights(reference), atol=1e-5)


def test_the_gates_losses_are_in_the_loss(runs: Runs) -> None:
    parts = zip(*(runs.scalars("pair ep2 2", key) for key in ("loss", "loss_cls", "loss_moe_aux")), strict=True)
    assert all(loss == pytest.approx(task + aux) and aux > 0 for loss, task, aux in parts)
    assert not runs.scalars("pair dense 2", "loss_moe_aux")


def test_accumulation_is_a_larger_batch(runs: Runs) -> None:
    assert_equal(runs.weights("accumulated"), runs.weights("constant"), atol=1e-5)
    assert "not a multiple of gradient_accumulation_steps 4" in runs.outcomes["mid-accumulation"][0]


def test_a_shared_a_and_a_balanced_choice(runs: Runs) -> None:
    """Two processes that accumulate, ZeRO 2, resumed: as one process with the whole batch; biases move once a step."""
    assert runs.outcomes["shared again"] == ["done", "done"]
    together, alone = runs.weights("shared"), runs.weights("shared alone")
    assert_equal(runs.weights("shared again"), together)
    assert_equal(together, alone, atol=1e-4)
    biases = [x for key, x in alone.items() if key.endswith("gate.choice_bias")]
    assert len(biases) == 2
    for bias in biases:
        moves = bias / SHARED["balance_rate"]
        assert moves.any()
        assert moves.abs().max() <= 6.1
        torch.testing.assert_close(moves, moves.round(), atol=1e-4, rtol=0)
    assert len([key for key in alone if key.endswith("experts.a1_ERC")]) == 2  # one for all experts of a layer


def test_the_learning_rate_follows_the_batch_size(runs: Runs) -> None:
    """mmengine's auto_scale_lr, which its own DeepSpeed strategy leaves out: 0.02 for 16 samples is 0.01 for 8."""
    assert_equal(runs.weights("scaled"), runs.weights("constant"))


def test_killed_and_resumed_is_never_stopped(runs: Runs) -> None:
    """Without a launcher, at the end of a step that was not saved; augmented by a loader worker in one of the two."""
    assert [one.returncode for one in runs.killed] == [-9]
    assert runs.outcomes["resumed alone"] == ["done"]
    assert_same_end(runs, "resumed alone", "whole alone")


def test_killed_while_saving_and_resumed_is_never_stopped(runs: Runs) -> None:
    """Two processes, experts spread over them, ZeRO 2: the half-written checkpoint is ignored, and said to be."""
    assert runs.killed_while_saving[0].returncode == -9
    assert runs.outcomes["resumed pair"] == ["done", "done"]
    logs = "".join(path.read_text() for path in (runs.folder / "resumed pair").glob("*/*.log"))
    assert "iter_4.partial is half written (it has no complete.json); it is ignored" in logs
    assert "resuming from" in logs
    assert "iter_3" in logs.partition("resuming from")[2].splitlines()[0]
    assert_same_end(runs, "resumed pair", "whole pair")


def test_calibrated_gates(runs: Runs) -> None:
    """The first step sees the same images, computes the same function and draws the same noise; --resume goes on."""
    plain, calibrated = (runs.scalars(name, "loss_cls") for name in ("whole alone", "calibrated"))
    assert calibrated[0] == pytest.approx(plain[0], abs=1e-6)
    assert calibrated[-1] != plain[-1]
    assert runs.outcomes["calibrated again"] == ["done"]
    assert_same_end(runs, "calibrated again", "calibrated")
    logs = [path.read_text() for path in sorted((runs.folder / "calibrated again").glob("*/*.log"))]
    assert [log.count("gates set from clusters") for log in logs] == [1, 0]


def assert_same_end(runs: Runs, resumed: str, whole: str) -> None:
    """The average, which is exported, and the weights."""
    assert_equal(runs.weights(resumed), runs.weights(whole))
    for kind in ("weight/", "average/"):
        assert_equal(*(saved_weights(runs.folder / name / "iter_6", kind) for name in (resumed, whole)))


def test_the_average_is_exported(runs: Runs) -> None:
    """Of the weights after each step, of which there are checkpoints; the best checkpoint has it too."""
    folder = runs.folder / "every step"
    average = saved_weights(folder / "iter_1")
    for step in range(2, 7):
        weights = saved_weights(folder / f"iter_{step}")
        average = {key: 0.7 * x + 0.3 * weights[key] for key, x in average.items()}
        assert_equal(saved_weights(folder / f"iter_{step}", "average/"), average)
        best = list(folder.glob(f"best_*_iter_{step}.pth"))
        if best:
            assert_equal(torch.load(best[0], weights_only=True)["state_dict"], average)
    assert_equal(runs.weights("every step"), average)
    assert not torch.allclose(average["head.weight"], weights["head.weight"])


def test_with_and_without_an_average(runs: Runs) -> None:
    """Of the experts of two processes, to start from; and a run that had one does not go on without."""
    assert_equal(runs.weights("from average"), runs.weights("whole pair"), atol=0)
    assert "has an average of the weights: keep rmoe.EMAHook" in runs.outcomes["no average"][0]


def test_no_run_starts_without_its_data(runs: Runs) -> None:
    """Both processes say the same, and nothing has been built: there is no log."""
    said = runs.outcomes["no data"]
    assert said == ["UserError: folder nowhere/train does not exist; correct the path, or put the data set there"] * 2
    assert [path.name for path in (runs.folder / "no data").iterdir()] == ["heartbeats"]


def test_the_seed_is_not_all_that_makes_runs_equal(runs: Runs) -> None:
    """The comparison above would see another augmentation or drop path."""
    calm, wild = runs.weights("alone moe 0"), runs.weights("whole alone")
    assert not all(torch.equal(calm[key], wild[key]) for key in calm if "gate" in key)


def test_another_layout_is_refused(runs: Runs) -> None:
    said = runs.outcomes["other layout"][0]
    assert "processes 2, ep_size 2" in said
    assert "processes 1, ep_size 1" in said
    assert "load_from" in said


@pytest.mark.parametrize(
    ("name", "harm", "before", "whole"),
    [
        ("cut short", "iter_4 is damaged (part_00000.safetensors has", 3, "whole alone"),
        ("flipped", "iter_3 is damaged (part_00001.safetensors is not what was written", 2, "whole pair"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    runs: Runs, name: str, harm: str, before: int, whole: str
) -> None:
    """By its length before anything starts; by one flipped byte in what the second of two processes checks."""
    assert set(runs.outcomes[name]) == {"done"}
    logs = "".join(path.read_text() for path in (runs.folder / name).glob("*/*.log"))
    assert harm in logs
    assert f"iter_{before}, epoch 0, iteration {before}" in logs
    assert_equal(runs.weights(name), runs.weights(whole))


@pytest.mark.parametrize("name", ["from checkpoint", "from best"])
def test_weights_load_at_any_layout(runs: Runs, name: str) -> None:
    """Two processes' experts in one; the best checkpoint is of step 3 or 6, the other of step 6."""
    assert runs.outcomes[name] == ["done"]
    if name == "from checkpoint":
        assert_equal(runs.weights(name), runs.weights("pair ep2 2"), atol=0)
    else:
        best = next((runs.folder / "pair ep2 2").glob("best_*"))
        assert_equal(runs.weights(name), torch.load(best, weights_only=True)["state_dict"], atol=0)


def test_frozen_weights_stay_and_are_saved(runs: Runs) -> None:
    a, b = runs.weights("alone dense 0"), runs.weights("whole alone")
    assert torch.equal(a["backbone.0.weight"], b["backbone.0.weight"])  # the same seed, other runs
    core = [key for key in b if ".core." in key]
    first = saved_weights(runs.folder / "whole alone" / "iter_4")
    assert core
    assert all(torch.equal(first[key], b[key]) for key in core)
    trained = [key for key in first if "gate" in key]
    assert trained
    assert not any(torch.equal(first[key], b[key]) for key in trained)


def test_only_the_named_parts_train_wherever_they_live(runs: Runs) -> None:
    """Losses and weights are those of one process without ZeRO; after a resume too, and in lower precision."""
    reference, seed = runs.weights("some 0"), runs.weights("alone moe 0")
    for name in ("some 3", "some pair", "some again"):
        assert runs.scalars(name, "loss") == pytest.approx(runs.scalars("some 0", "loss"), abs=1e-5), name
        assert_equal(runs.weights(name), reference, atol=1e-5)
    first = saved_weights(runs.folder / "some again" / "iter_4")
    for name in ("some 0", "some 3", "some pair", "some again", "some half"):
        weights = runs.weights(name)
        moved = {key for key in weights if not torch.equal(weights[key], first[key])}
        assert moved
        assert all("gate" in key or "deepspeed_moe" in key for key in moved), name
    assert not torch.equal(seed["head.weight"], reference["head.weight"])
    refused = runs.outcomes["some others"][0]
    assert "of other groups of parameters: optim_wrapper.paramwise_cfg.train_only was ['residual', 'gate']" in refused
    cost = runs.cost("some pair")
    assert cost["params_by_part"] == runs.cost("some 3")["params_by_part"] == runs.cost("some again")["params_by_part"]
    assert sum(one["trained"] for one in cost["params_by_part"].values()) == cost["params_trainable"]
    assert {name for name, one in cost["params_by_part"].items() if one["trained"]} == {"residual", "gate"}
    (log,) = (runs.folder / "some pair").glob("*/*.log")
    assert re.search(rf"parameters by part:\n(.*\n)+ +all +{cost['params_trainable']:,} ", log.read_text())


def test_only_the_last_checkpoints_are_kept(runs: Runs) -> None:
    for name in ("whole pair", "resumed pair", "resumed alone"):
        kept = sorted(path.name for path in (runs.folder / name).glob("iter_*"))
        assert kept == ["iter_4.pth" if name == "resumed alone" else "iter_4", "iter_6"], name
        assert len(list((runs.folder / name).glob("best_accuracy_iter_*.pth"))) == 1


def test_each_image_counts_once(runs: Runs) -> None:
    """7 samples of different sizes in batches of 2, on one process and on two."""
    for name in ("alone moe 2", "pair ep1 2", "pair ep2 2"):
        assert runs.scalars(name, "count") == [7.0, 7.0], name
        assert runs.scalars(name, "accuracy") == runs.scalars("alone moe 0", "accuracy"), name


def test_a_loss_that_is_not_a_number_stops_all(runs: Runs) -> None:
    """Sample 9 is of the second process, in step 3; both stop there, and the checkpoint of step 2 is good."""
    for said in runs.outcomes["poisoned pair"]:
        assert said.startswith("Diverged: the loss is not finite at step 3")
        assert "iter_2" in said
    folder = runs.folder / "poisoned pair"
    assert [path.name for path in folder.glob("iter_*")] == ["iter_2"]
    assert all(value.isfinite().all() for value in saved_weights(folder / "iter_2").values())
    assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("bad loop", "max_iter'"), ("bad data", "lenght'"), ("bad model", "ToyModle is not in the")],
)
def test_names_that_mmengine_does_not_know(runs: Runs, name: str, message: str) -> None:
    assert runs.outcomes[name][0].startswith("UserError")
    assert message in runs.outcomes[name][0]


def test_bfloat16_is_close(runs: Runs) -> None:
    precise, coarse = runs.scalars("alone moe 2", "loss"), runs.scalars("bfloat16", "loss")
    assert coarse == pytest.approx(precise, abs=0.02)
    assert coarse != precise
    assert all(value.dtype == torch.float32 for value in runs.weights("bfloat16").values())
    assert runs.cost("bfloat16")["precision"] == "bfloat16"


def test_float16_goes_on_exactly(runs: Runs) -> None:
    """The scale of the loss and the steps since it moved, too."""
    assert runs.outcomes["float16 again"] == ["done"]
    assert_same_end(runs, "float16 again", "float16")
    for name, folder, steps in (("float16", "iter_4", 4), ("float16 again", "iter_6", 6)):
        about = json.loads((runs.folder / name / folder / "run.json").read_text())
        assert about["engine"]["loss_scale"]["scale"] == 65536.0
        assert about["engine"]["loss_scale"]["_growth_tracker"] == steps
    assert runs.scalars("float16", "grad_norm") == pytest.approx(runs.scalars("whole alone", "grad_norm"), rel=0.05)
    assert runs.cost("float16")["precision"] == "float16"


@pytest.mark.parametrize("stage", [0, 2])
def test_a_gradient_that_is_not_a_number_stops_the_run(runs: Runs, stage: int) -> None:
    """At ZeRO 2 the step would be left out, and the next one, to the end; under float16 it is, 16 times."""
    lost = runs.outcomes["float16 lost"][0]
    assert lost.startswith("Diverged: the gradient is not finite at step 19")  # from the third on
    said = runs.outcomes[f"infinite {stage}"][0]
    assert said.startswith("Diverged: the gradient is not finite at step 3")
    assert "iter_2" in said
    assert not (runs.folder / f"infinite {stage}" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other schedule", "of another schedule: param_scheduler.0.power was 0.9; this run has 2.0"),
        ("other rate", "of other settings of the optimizer: optim_wrapper.optimizer.lr was 0.01; this run has 0.02"),
        (
            "other decay",
            "of other settings of the optimizer: optim_wrapper.optimizer.weight_decay was 0.05; this run has 0.1",
        ),
    ],
)
def test_a_resumed_run_does_not_ignore_another_setting(runs: Runs, name: str, message: str) -> None:
    assert runs.outcomes[name][0].startswith("UserError")
    assert message in runs.outcomes[name][0]


def test_the_cost(runs: Runs) -> None:
    cost = runs.cost("pair ep2 2")
    assert cost["steps"] == 6
    assert cost["images"] == 6 * GLOBAL_BATCH
    assert cost["devices"] == 2
    assert cost["device_seconds"] == pytest.approx(2 * cost["train_seconds"])
    assert 0 < cost["train_seconds"] < 60
    assert cost["peak_memory_bytes"] > 10**7
    assert (cost["stage"], cost["zero_stage"], cost["precision"], cost["ep_size"]) == ("residual", 2, "float32", 2)
    alone = runs.cost("alone moe 0")
    for key in ("params_total", "params_active", "params_trainable"):
        assert cost[key] == alone[key]
    assert cost["params_trainable"] < cost["params_total"]
    assert cost["params_active"] < cost["params_total"]
    assert cost["flops_per_step"] == pytest.approx(alone["flops_per_step"], rel=0.2)
    assert cost["flops_step"] == 1
    # The dense network's products: embedding and two blocks forward, and two gradients of all but the embedding.
    assert runs.cost("pair dense 2")["flops_per_step"] == runs.cost("alone dense 0")["flops_per_step"]


def test_the_cost_goes_on_after_a_resume(runs: Runs) -> None:
    cost, whole = runs.cost("resumed alone"), runs.cost("whole alone")
    assert (cost["steps"], cost["images"]) == (whole["steps"], whole["images"]) == (6, 24)
    assert cost["flops_per_step"] == whole["flops_per_step"]
    assert cost["flops_step"] == 1


def test_what_a_run_leaves(runs: Runs) -> None:
    folder = runs.folder / "pair ep2 2"
    about = json.loads((folder / "model.json").read_text())
    assert about["model"]["moe"]["ep_size"] == 2
    said = read_metadata(folder)
    assert said["model"] == about["model"]
    assert (said["stage"], said["classes"]) == ("residual", ["small", "large"])
    assert (folder / "model.safetensors").stat().st_mode == (folder / "model.json").stat().st_mode
    assert not (folder / "backbone.safetensors").exists()
    assert any("deepspeed_experts.3." in key for key in runs.weights("pair ep2 2"))
    assert next(folder.glob("*/vis_data/events.out.tfevents.*")).stat().st_size > 0
    assert next(folder.glob("*/*.log")).read_text().count("Iter(train)") == 6
    assert not list(folder.glob("*.partial"))
    assert not list(folder.glob("zero_to_fp32.py"))
    assert len(list(folder.glob("*.py"))) == 1


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Finished, Path]]:
    """Starts `deepspeed --num_accelerators 2 launch/train.py …` as a user does."""

    def run(name: str, options: dict[str, Any], stage: int) -> tuple[Finished, Path]:
        folder = tmp_path_factory.mktemp(name)
        words = [Path(sys.executable).parent / "deepspeed", "--num_accelerators", "2"]
        words += ["--master_port", str(free_port()), TRAIN, *command(folder, "work", options, stage)]
        return run_processes(folder, words, 0, check=False)[0], folder / "work"

    return run


def test_the_launcher_trains(launcher: Callable[..., tuple[Finished, Path]]) -> None:
    ended, folder = launcher("trains", {"model.moe": TOP_1 | {"ep_size": 2}}, 2)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert json.loads((folder / "cost.json").read_text())["devices"] == 2


def test_the_launcher_shows_one_line_and_leaves_with_2(launcher: Callable[..., tuple[Finished, Path]]) -> None:
    ended, folder = launcher("refuses", {"model.moe": TOP_1 | {"ep_size": 2}}, 3)
    assert ended.returncode == 2
    lines = [line for line in ended.stderr.splitlines() if "rmoe: error:" in line]
    assert len(lines) == 1
    assert "stage is 3" in lines[0]
    assert "Traceback" not in ended.stdout + ended.stderr
    assert not folder.exists()


def test_divergence_leaves_with_1(tmp_path: Path) -> None:
    words = command(tmp_path, "work", {"train_dataloader.dataset.poison": 0, "train_cfg.max_iters": 3}, 0)
    ended = run_processes(tmp_path, [TRAIN, *words], 0, check=False)[0]
    assert ended.returncode == 1
    assert "rmoe: error: the loss is not finite" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list((tmp_path / "work").glob("iter_*"))
