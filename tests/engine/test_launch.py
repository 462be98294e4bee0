"""Everything that a user can get wrong is refused before anything is built or written."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from mmengine.config import Config
from toy import write_config, write_json

from rmoe.engine import launch, processes
from rmoe.engine.checkpoint.files import RUN, Layout, write_marker
from rmoe.engine.ds_json import read_json
from rmoe.engine.prepare import check_unused
from rmoe.errors import UserError

MOE = {"num_experts": 4, "ep_size": 2}


def prepared(tmp_path: Path, options: dict[str, Any] | None = None, processes: int = 2, **content: Any) -> Any:
    """The config after `prepare`, from files."""
    stage, resume = content.pop("stage", 2), content.pop("resume", False)
    cfg = launch.read_config(write_config(tmp_path / "toy_run.py"), options or {})
    read = read_json(write_json(tmp_path / "ds.json", stage, **content))
    launch.prepare(cfg, read, processes, tmp_path / "work", resume)
    return cfg


def test_the_json_rules_the_batch_size(tmp_path: Path) -> None:
    cfg = prepared(tmp_path, train_micro_batch_size_per_gpu=3, gradient_accumulation_steps=2)
    assert cfg.train_dataloader.batch_size == 3
    assert cfg.strategy.config.train_batch_size == 12
    assert cfg.strategy.config.gradient_clipping == 0.5  # the config's clip_grad


@pytest.mark.parametrize(
    ("options", "content", "said"),
    [
        ({}, {"gradient_clipping": 1.0}, "optim_wrapper.clip_grad.max_norm is 0.5 in the config.* makes it 1.0"),
        ({"optim_wrapper.accumulative_counts": 4}, {"train_batch_size": 16}, "accumulative_counts is 4 .* makes it 2"),
        ({}, {"train_micro_batch_size_per_gpu": 3}, "train_dataloader.batch_size is 4 in the config.* makes it 3"),
        ({"optim_wrapper.accumulative_counts": 4}, {"gradient_accumulation_steps": "auto"}, ""),
        ({}, {"gradient_accumulation_steps": 4, "gradient_clipping": 0.5}, ""),
    ],
)
def test_a_json_that_says_otherwise_is_told(
    options: dict[str, Any], content: dict[str, Any], said: str, tmp_path: Path
) -> None:
    cfg = launch.read_config(write_config(tmp_path / "toy_run.py"), options)
    notes = launch.prepare(cfg, read_json(write_json(tmp_path / "ds.json", 2, **content)), 2, tmp_path / "work", False)
    told = [note for note in notes if "DeepSpeed JSON" in note]
    assert len(told) == bool(said)
    assert re.search(said, " ".join(told))


def test_the_layout(tmp_path: Path) -> None:
    cfg = prepared(tmp_path, {"model.moe": MOE})
    assert Layout(**cfg.strategy.layout) == Layout(2, 2, 4, 4, 1, 3)


def test_what_a_config_need_not_say(tmp_path: Path) -> None:
    cfg = prepared(tmp_path, {"optim_wrapper.constructor": "DefaultOptimWrapperConstructor"})
    assert cfg.optim_wrapper.paramwise_cfg.exempt is False
    assert cfg.train_dataloader.sampler.type == "rmoe.InfiniteSampler"
    assert cfg.train_dataloader.dataset.dataset.type == "ToyTokens"
    assert [backend.type for backend in cfg.visualizer.vis_backends] == ["LocalVisBackend", "TensorboardVisBackend"]
    assert cfg.work_dir == str(tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_dumped_config_runs_again(tmp_path: Path) -> None:
    once = prepared(tmp_path, {"load_from": "x.pth", "train_dataloader.sampler.type": "DefaultSampler"})
    once.dump(tmp_path / "dumped.py")
    twice = launch.read_config(tmp_path / "dumped.py", {})
    launch.prepare(twice, read_json(tmp_path / "ds.json"), 2, None, False)
    assert twice.to_dict() == once.to_dict()


def test_hooks_of_an_earlier_versions_dump_are_not_doubled(tmp_path: Path) -> None:
    once = prepared(tmp_path, {"custom_hooks": [{"type": "rmoe.engine.hooks.ProgressHook"}]})
    assert [hook["type"] for hook in once.custom_hooks] == [hook["type"] for hook in prepared(tmp_path).custom_hooks]


def test_a_dumped_config_of_a_resumed_run_starts(tmp_path: Path) -> None:
    half_a_checkpoint(tmp_path / "work", 4, Layout(2, 1, 0, 4, 1, 3))
    prepared(tmp_path, resume=True).dump(tmp_path / "dumped.py")
    cfg = launch.read_config(tmp_path / "dumped.py", {})
    launch.prepare(cfg, read_json(tmp_path / "ds.json"), 2, tmp_path / "other", False)
    assert cfg.resume is False


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, False),
        ({"default_hooks.checkpoint": None}, True),
        ({"default_hooks.checkpoint.save_optimizer": False}, True),
        ({"default_hooks.checkpoint": None, "custom_hooks": [{"type": "CheckpointHook"}]}, False),
    ],
)
def test_a_run_that_nothing_can_be_resumed_from_is_told(options: dict[str, Any], told: bool, tmp_path: Path) -> None:
    cfg = launch.read_config(write_config(tmp_path / "toy_run.py"), options)
    notes = launch.prepare(cfg, {}, 1, tmp_path / "work", False)
    assert any("a run that is stopped cannot be resumed" in note for note in notes) == told


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [
        ({"model.moe": MOE}, {"stage": 3}, "stage is 3.*ep_size is 2.*use stage 2"),
        ({"model.moe": MOE}, {"processes": 3}, r"ep_size 2 does not divide the 3 processes; use one of \[1\]"),
        ({"model.moe": MOE | {"ep_size": 3}}, {}, "ep_size 3 does not divide the 4 experts"),
        ({"model.moe.num_expert": 4}, {}, "no key 'num_expert'; did you mean 'num_experts'"),
        ({"model.moe.losses.zz": 4}, {}, "no key 'zz'; did you mean 'z'"),
        ({"train_cfgg.max_iters": 4}, {}, "no 'train_cfgg'; did you mean 'train_cfg'"),
        ({"optim_wrapper.clip_grad.norm_type": 1}, {}, "clip_grad"),
        ({"optim_wrapper.clip_grad": {"_delete_": True, "norm_type": 2}}, {}, "without max_norm; give one"),
        ({"optim_wrapper.clip_grad": {"_delete_": True}}, {}, "without max_norm; give one"),
        ({"optim_wrapper.clip_gradd.max_norm": 1}, {}, "no key 'clip_gradd'; did you mean 'clip_grad'"),
        ({"resume": True}, {}, "resume=True; leave it out, and give --resume"),
        ({"resume": "work_dirs/other/iter_5"}, {}, "resume='work_dirs/other/iter_5'; leave it out, and give --resume"),
        ({"optim_wrapper.constructor": "LayerDecay"}, {}, "'LayerDecay'; use 'rmoe.ParamGroups'"),
        (
            {"custom_hooks": [{"type": "EMAHook", "momentum": 0.1}]},
            {},
            r"write dict\(type='rmoe.EMAHook', momentum=0.1\)",
        ),
        ({"custom_hooks": [{"type": "rmoe.EMAHook"}]}, {"stage": 3}, "use stage 2"),
        ({"param_scheduler.5.power": 1}, {}, "do not fit"),
        ({}, {"train_batch_size": 7}, "train_batch_size 7"),
    ],
)
def test_mistakes(options: dict[str, Any], content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, options, **content)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("moe", [None, MOE | {"ep_size": 1}])
def test_stage_3_is_for_what_is_not_spread(tmp_path: Path, moe: dict[str, Any] | None) -> None:
    assert prepared(tmp_path, {"model.moe": moe}, stage=3).strategy.config.zero_optimization.stage == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = dict(", "cannot be read as a config"),
        ("param_schedulers = []", "has 'param_schedulers', which .* did you mean 'param_scheduler'"),
        ("custom_hook = []", "did you mean 'custom_hooks'"),
        ("randomnes = dict(seed=1)", "did you mean 'randomness'"),
        ("calibrat = dict()", "did you mean 'calibrate'"),
        ("_base_ = 'absent.py'", "there is no config"),
        ("custom_imports = dict(imports=['rmoe.nothing'])", "cannot be read as a config"),
    ],
)
def test_config_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(UserError, match=message):
        launch.read_config(tmp_path / "x.py", {})
    with pytest.raises(UserError, match="there is no config"):
        launch.read_config(tmp_path / "y.py", {})


def test_a_config_has_variables_of_its_own(tmp_path: Path) -> None:
    own = "data, epoch, scales, norm_cfg, train_pipeline, train_dataset, optimizer = 1, 2, (3,), {}, [], {}, {}"
    (tmp_path / "x.py").write_text(f"{own}\nrandomness = dict(seed=1)\nrandomnes = dict(seed=2)")
    assert launch.read_config(tmp_path / "x.py", {"calibrate.batches": 2}).calibrate.batches == 2


def half_a_checkpoint(work_dir: Path, iteration: int, layout: Layout) -> None:
    (work_dir / f"iter_{iteration}").mkdir(parents=True)
    write_marker(work_dir / f"iter_{iteration}", iteration, layout, {})


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    half_a_checkpoint(tmp_path / "work", 4, Layout(2, 1, 0, 4, 1, 3))
    with pytest.raises(UserError, match="iter_4 is there already; give --resume"):
        prepared(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "cost.json"])
def test_a_finished_run_without_checkpoints_is_not_overwritten(name: str, tmp_path: Path) -> None:
    cfg = prepared(tmp_path)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / name).touch()
    with pytest.raises(UserError, match=f"{name} is of a finished run; give another --work-dir"):
        prepared(tmp_path)
    with pytest.raises(UserError, match=f"another run has left .*{name} meanwhile; start again with --resume"):
        check_unused(cfg, False)
    check_unused(cfg, True)
    half_a_checkpoint(tmp_path / "work", 4, Layout(2, 1, 0, 4, 1, 3))
    with pytest.raises(UserError, match="another run has left .*iter_4 meanwhile; start again, or give another"):
        check_unused(cfg, True)


def test_resume_takes_the_newest_and_its_own_layout(tmp_path: Path) -> None:
    layout = Layout(processes=2, ep_size=1, num_experts=0, micro_batch=4, accumulation=1, seed=3)
    for iteration in (4, 10, 6):
        half_a_checkpoint(tmp_path / "work", iteration, layout)
    assert prepared(tmp_path, {"load_from": "x.pth"}, resume=True).resume.endswith("iter_10")
    with pytest.raises(UserError, match="made with processes 2, .*this run has processes 4, .*load_from"):
        prepared(tmp_path, processes=4, resume=True)
    with pytest.raises(UserError, match="num_experts 0.*num_experts 4"):
        prepared(tmp_path, {"model.moe": MOE | {"ep_size": 1}}, resume=True)


def test_resume_with_nothing_there_starts(tmp_path: Path) -> None:
    cfg = prepared(tmp_path, {"load_from": "x.pth"}, resume=True)
    assert cfg.resume is False
    assert cfg.strategy.load_from == "x.pth"


def test_what_was_left_out_is_told(tmp_path: Path) -> None:
    (tmp_path / "work" / "iter_9").mkdir(parents=True)
    (tmp_path / "work" / "iter_9" / RUN).touch()
    cfg = launch.read_config(write_config(tmp_path / "toy_run.py"), {})
    cfg.train_dataloader.sampler = {"type": "SomeSampler"}
    notes = "\n".join(launch.prepare(cfg, {}, 1, tmp_path / "work", True))
    assert "iter_9 is half written" in notes
    assert "starting anew" in notes
    assert "SomeSampler" in notes


def test_another_batch_than_the_recipes_is_told(tmp_path: Path) -> None:
    def notes(processes: int, card: dict[str, int]) -> str:
        cfg = launch.read_config(write_config(tmp_path / "toy_run.py"), {"train_dataloader.batch_size": 2})
        cfg.card = card
        return "\n".join(launch.prepare(cfg, {}, processes, tmp_path / "work", False))

    assert "a step takes 4 images, and 16 in the recipe" in notes(2, {"batch": 16})
    assert "a step takes" not in notes(8, {"batch": 16}) + notes(2, {})


def test_an_error_in_a_loader_worker_is_one_line() -> None:
    worker = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
    assert launch.innermost(worker + "rmoe.errors.UserError: image a.jpg has no label map") == (
        "image a.jpg has no label map"
    )
    assert launch.innermost("plain") == "plain"


def test_a_process_without_launcher_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    processes.set_place()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert int(os.environ["MASTER_PORT"]) > 0


def test_one_process_of_each_machine_looks_for_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cfg = launch.read_config(write_config(tmp_path / "toy_run.py"), {})
    monkeypatch.setenv("LOCAL_RANK", "0")
    launch.check_data(cfg)
    cfg.train_dataloader.dataset = {"type": "rmoe.ImageFolder", "root": str(tmp_path), "split": "val"}
    with pytest.raises(UserError, match=f"folder {tmp_path}/train does not exist"):
        launch.check_data(cfg)
    monkeypatch.setenv("LOCAL_RANK", "1")
    launch.check_data(cfg)
    monkeypatch.setattr(launch, "all_gather_object", lambda said: [said, "folder x does not exist", ""])
    with pytest.raises(UserError, match="folder x does not exist"):
        launch.check_data(cfg)


def test_other_processes_let_the_first_one_speak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slept: list[float] = []
    monkeypatch.setattr(launch.time, "sleep", slept.append)
    words = [str(tmp_path / "absent.py"), "--deepspeed_config", str(write_json(tmp_path / "x.json"))]
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "7"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert launch.main(words) == 2
    assert slept
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="there is no config"):
        launch.main(words)
    assert len(slept) == 1


def test_the_launcher_may_pass_local_rank(tmp_path: Path) -> None:
    words = ["--local_rank=1", "c.py", "--deepspeed_config", "x.json", "--cfg-options", "a.b=[1,2]"]
    arguments = launch.parser().parse_args(words)
    assert arguments.config == Path("c.py")
    assert arguments.cfg_options == {"a.b": [1, 2]}


def slurm_step(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """The environment that srun gives a rank, and none of a launcher's."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")  # so that all of them are put back
        monkeypatch.delenv(name)
    step = {"JOB_ID": "12", "STEP_ID": "0", "PROCID": "5", "LOCALID": "1", "NODEID": "2", "STEP_NUM_TASKS": "7"}
    step |= {"STEP_NUM_NODES": "3", "STEP_NODELIST": "gpu[08-09,11]-a,login", "STEP_TASKS_PER_NODE": "2(x2),3"}
    for name, value in (step | variables).items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_srun_starts_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_step(monkeypatch)
    processes.set_slurm()
    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
    assert list(found.values()) == ["5", "7", "1", "3", "gpu08-a"]
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 32000


def test_on_one_node_they_meet_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_step(monkeypatch, STEP_NUM_NODES="1", NODEID="0")
    monkeypatch.setenv("MASTER_PORT", "77")
    processes.set_slurm()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.1", "77")


def test_another_launcher_wins_over_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_step(monkeypatch)
    monkeypatch.setenv("RANK", "0")
    processes.set_slurm()
    assert "WORLD_SIZE" not in os.environ


def test_the_shell_of_an_allocation_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch script and salloc's shell have SLURM_NTASKS, even SLURM_PROCID, but no step."""
    slurm_step(monkeypatch, NTASKS="7")
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    processes.set_slurm()
    assert "RANK" not in os.environ


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[1-2]", "n1"), ("r[3-4]n[01,07],x", "r3n01"), ("a-b[7]", "a-b7")],
)
def test_the_first_host(nodes: str, first: str) -> None:
    assert processes.first_host(nodes) == first


def test_a_safe_config_is_data(tmp_path: Path) -> None:
    text = '{"model": {"type": "mmseg.EncoderDecoder"}, "custom_imports": {"imports": ["rmoe.tasks.classification"]}}'
    (tmp_path / "x.json").write_text(text)
    assert launch.read_config(tmp_path / "x.json", {"model.a": 1}, safe=True).model.a == 1
    program = write_config(tmp_path / "toy_run.py")
    with pytest.raises(UserError, match="toy_run.py is a program.*dump it as JSON"):
        launch.read_config(program, {}, safe=True)


@pytest.mark.parametrize("name", ["demo/core", "demo/residual", "demo/detection_residual"])
def test_a_shipped_config_is_safe_once_it_is_data(name: str, tmp_path: Path) -> None:
    whole = Config.fromfile(ROOT / "rmoe" / "configs" / f"{name}.py")
    whole.dump(tmp_path / "x.json")
    read = launch.read_config(tmp_path / "x.json", {}, safe=True)
    assert read.model.type == whole.model.type
    for one in (read, whole):  # transforms insist on tuples, which JSON has not
        one.transforms = one.train_dataloader.dataset.get("pipeline")
    assert read.transforms == whole.transforms


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_base_: x.py", "without _base_"),
        ("custom_imports: {imports: evil}", "names 'evil'"),
        ("default_scope: evil", "names 'evil'"),
        ("custom_imports: {imports: [os.path]}", "names 'os.path'"),
        ("model: {type: subprocess.Popen}", "names 'subprocess.Popen'"),
        ("a: [{b: {type: rmoe.engine.cost.subprocess.Popen}}]", "which no registry"),
        ("a: !!python/object/apply:os.system [ls]", "has the tag.*os.system"),
        ("a: {type: rmoe.engine.hooks.write_json}", "names 'rmoe.engine.hooks.write_json'"),
        ("default_scope: a.b", "names 'a.b'"),
    ],
)
def test_a_safe_config_runs_nothing(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        launch.read_config(tmp_path / "x.yaml", {}, safe=True)


@pytest.mark.parametrize("seconds", ["0", "-1", "soon"])
def test_a_timeout_is_a_time(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launch.parser().parse_args(["c.py", "--deepspeed_config", "x.json", "--timeout", seconds])
    assert "--timeout" in capsys.readouterr().err
