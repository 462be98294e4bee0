"""Whatever is wrong in a config, a DeepSpeed JSON, the launcher's variables or a path is one line, before anything."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import socket
from pathlib import Path
from typing import Any

import mmengine.registry.registry as lookup
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.fileio.handlers import file_handlers
from mmengine.model import initialize
from mmengine.registry import DATASETS, MODELS
from mmengine.runner.checkpoint import load_checkpoint
from torch import nn
from toy import CONFIG, write_config, write_json

from rmoe.cli import main as rmoe
from rmoe.engine import changes, launch, processes, safe_config
from rmoe.engine.building import user_errors
from rmoe.engine.checkpoint.files import RUN
from rmoe.engine.ds_json import read_json, resolve
from rmoe.engine.lock import check_folder
from rmoe.engine.prepare import prepare
from rmoe.engine.read_config import read_config
from rmoe.errors import UserError

INF, NAN = float("inf"), float("nan")


class Touch:
    """A pickle that leaves a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process under --safe-config, until the test ends."""
    for owner, name in ((lookup, "get_object_from_string"), (lookup, "import_module"), (np, "load")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    for name in ("pickle", "pkl", "yaml", "yml"):
        handler = file_handlers[name]
        monkeypatch.setattr(handler, "load_from_fileobj", handler.load_from_fileobj)
    safe_config.lock_down()


VALUES: list[tuple[str, Any]] = [
    *(("train_dataloader.batch_size", value) for value in (0, -1, "4", True, 1.5, None, [4], 10**12)),
    *(("train_dataloader.num_workers", value) for value in (-1, "2", 0.5, True, None)),
    *(("train_dataloader.persistent_workers", value) for value in (True, "yes", 1)),
    *(("train_dataloader.prefetch_factor", value) for value in (0, -2, 2, "x")),
    ("val_dataloader.batch_size", 0),
    ("val_dataloader.num_workers", "many"),
    *(("optim_wrapper.accumulative_counts", value) for value in (0, -1, 1.5, "2", True)),
    *(("optim_wrapper.clip_grad.max_norm", value) for value in (-1, NAN, INF, "x", True, None)),
    ("optim_wrapper.clip_grad", 1.0),
    *(("optim_wrapper.optimizer.lr", value) for value in (-1e-3, NAN, INF, "1e-3", None, True)),
    *(("optim_wrapper.optimizer.weight_decay", value) for value in (-0.1, NAN, "0.1")),
    *(("optim_wrapper.optimizer.betas", value) for value in (0.9, [0.9], [0.9, 1.0], [0.9, 0.99, 0.999], ["a", "b"])),
    ("optim_wrapper.optimizer.eps", -1e-8),
    ("optim_wrapper.optimizer.momentum", NAN),
    ("optim_wrapper.optimizer.type", "AdamWW"),
    ("optim_wrapper.optimizer.type", None),
    ("optim_wrapper.optimizer", "AdamW"),
    ("optim_wrapper.optimizer", None),
    ("optim_wrapper.paramwise_cfg.residual_lr_mult", -1),
    ("optim_wrapper.paramwise_cfg.custom_keys", {"norm": {"lr_mult": NAN}}),
    ("optim_wrapper.paramwise_cfg.custom_keys", {"norm": 0.1}),
    *(("train_cfg.max_iters", value) for value in (0, -5, "x", 1.5, None, True)),
    *(("train_cfg.val_interval", value) for value in (0, -1, "x", 0.5)),
    ("train_cfg.val_begin", -1),
    ("train_cfg.max_epochs", 3),
    ("train_cfg.type", "EpochBasedTrainLoop"),
    *(("default_hooks.checkpoint.interval", value) for value in (0, -2, "x", 1.5, True)),
    *(("default_hooks.checkpoint.max_keep_ckpts", value) for value in (0, -3, "x")),
    *(("default_hooks.logger.interval", value) for value in (0, "x", 2.5)),
    ("default_hooks.logger", "LoggerHook"),
    ("default_hooks", []),
    ("custom_hooks", {"type": "ToyHook"}),
    ("custom_hooks", ["ToyHook"]),
    ("custom_hooks", 3),
    *(("randomness.seed", value) for value in (-1, 1.5, "3", 2**40, True)),
    ("randomness", 3),
    *(("model", value) for value in ([], "ToyModel", 3, {}, None)),
    *(("model.moe", value) for value in ([], "low_rank", 8, True)),
    *(("val_evaluator", value) for value in ("ToyMetric", 3, ["ToyMetric"])),
    *(("train_dataloader", value) for value in ([], "x", 3, None)),
    ("train_dataloader.dataset", "ToyTokens"),
    ("train_dataloader.dataset", {"length": 3}),
    ("train_dataloader", {"batch_size": 2}),
    ("train_dataloader.sampler", {"shuffle": True}),
    ("visualizer", {"type": "Visualizer", "vis_backends": ["LocalVisBackend"]}),
    ("train_dataloader.sampler", "InfiniteSampler"),
    ("train_cfg", 6),
    ("optim_wrapper", "AdamW"),
    ("param_scheduler", "PolyLR"),
    ("param_scheduler", [{"begin": 0}]),
    ("param_scheduler", {"type": "PolyLR", "power": NAN}),
    ("param_scheduler", {"type": "PolyLR", "end": 0}),
    ("param_scheduler", {"type": "PolyLR", "begin": "x"}),
    ("load_from", 3),
    ("load_from", ""),
    ("load_from", ["a.pth"]),
    ("work_dir", ""),
    ("work_dir", 3),
]


def prepared(folder: Path, content: dict[str, Any] | None = None, **sections: Any) -> Any:
    """The toy config after `prepare`, `sections` in the place of its own."""
    cfg = Config.fromstring(CONFIG, ".py")
    for name, value in sections.items():
        cfg[name] = value
    prepare(cfg, content or {}, 1, folder / "work", False)
    return cfg


def toy_dict() -> dict[str, Any]:
    return Config.fromstring(CONFIG, ".py").to_dict()


@pytest.mark.parametrize(("key", "value"), VALUES, ids=lambda x: str(x)[:40])
def test_a_value_that_cannot_be(key: str, value: Any, tmp_path: Path) -> None:
    first, *others = key.split(".")
    node = whole = toy_dict()
    for name in key.split(".")[:-1]:
        node = node.setdefault(name, {})
    node[key.rpartition(".")[2]] = value
    with pytest.raises(UserError, match=first) as caught:
        prepared(tmp_path, **{first: whole[first]})
    assert all(part in str(caught.value) for part in others[:1])
    assert not (tmp_path / "work").exists()


def test_a_loop_has_one_length(tmp_path: Path) -> None:
    for loop in ({"type": "IterBasedTrainLoop"}, {"max_iters": 3}, {"by_epoch": True, "max_iters": 3}):
        with pytest.raises(UserError, match="train_cfg has"):
            prepared(tmp_path, train_cfg=loop)


def test_an_empty_moe_is_a_mixture(tmp_path: Path) -> None:
    model = {"type": "ToyModel", "moe": {}}
    assert prepared(tmp_path, model=model).strategy.layout.num_experts == 8
    with pytest.raises(UserError, match="stage is 3"):
        prepared(tmp_path, {"zero_optimization": {"stage": 3}}, model=model)
    model = {"type": "ToyModel", "moe": None}
    assert prepared(tmp_path, {"zero_optimization": {"stage": 3}}, model=model).strategy.layout.num_experts == 0


JSONS: list[tuple[str, str]] = [
    ('{"torch_autocast": {"enabledd": true}}', "no key 'torch_autocast.enabledd'; did you mean 'enabled'"),
    ('{"torch_autocast": {"enabled": "yes"}}', "enabled is 'yes'"),
    ('{"torch_autocast": {"enabled": true, "dtype": "int8"}}', "dtype is 'int8'"),
    ('{"torch_autocast": {"enabled": true, "dtype": "half"}}', "torch_autocast"),
    ('{"torch_autocast": {"enabled": true, "dtype": 16}}', "torch_autocast"),
    ('{"torch_autocast": []}', "torch_autocast is"),
    ('{"torch_autocast": null}', "torch_autocast is None"),
    ('{"torch_autocast": "bf16"}', "torch_autocast is 'bf16'"),
    ('{"gradient_clipping": NaN}', "NaN"),
    ('{"gradient_clipping": Infinity}', "Infinity"),
    ('{"gradient_clipping": 1e999}', "gradient_clipping"),
    ('{"gradient_clipping": -3}', "gradient_clipping is -3"),
    ('{"gradient_clipping": true}', "gradient_clipping is True"),
    ('{"gradient_clipping": "x"}', "gradient_clipping is 'x'"),
    ('{"gradient_clipping": null}', "gradient_clipping is None"),
    ('{"zero_optimization": {"stage": "2"}}', "stage is '2'"),
    ('{"zero_optimization": {"stage": true}}', "stage is True"),
    ('{"zero_optimization": {"stage": 4}}', "stage"),
    ('{"zero_optimization": {"stage": -1}}', "stage"),
    ('{"zero_optimization": {"stage": 1.5}}', "stage"),
    ('{"zero_optimization": {"stag": 2}}', "stag"),
    ('{"zero_optimization": {"reduce_bucket_size": "big"}}', "reduce_bucket_size"),
    ('{"zero_optimization": {"reduce_bucket_size": 1e400}}', "too large"),
    ('{"zero_optimization": [2]}', "zero_optimization is"),
    ('{"zero_optimization": true}', "zero_optimization is True"),
    ('{"fp16": []}', "fp16 is"),
    ('{"bf16": {"enable": true}}', "bf16"),
    ('{"data_types": {"grad_accum_type": "fp32"}}', "did you mean 'grad_accum_dtype'"),
    ('{"data_types": "fp32"}', "data_types is 'fp32'"),
    ('{"communication_data_type": "fp64"}', "fp64"),
    ('{"communication_data_type": {}}', "communication_data_type"),
    ('{"activation_checkpointing": {"profil": true}}', "did you mean 'profile'"),
    ('{"activation_checkpointing": {"profile": 1}}', "profile is 1"),
    ('{"aio": {"queue_depth": "deep"}}', "queue_depth is 'deep'"),
    ('{"checkpoint": {"tag_validation": "sometimes"}}', "checkpoint"),
    ('{"checkpoint": []}', "checkpoint is"),
    ('{"flops_profiler": {"enabld": true}}', "did you mean 'enabled'"),
    ('{"wall_clock_breakdown": "x"}', "wall_clock_breakdown is 'x'"),
    ('{"dump_state": 1}', "dump_state is 1"),
    ('{"prescale_gradients": null}', "prescale_gradients is None"),
    ('{"gradient_allreduce_op": "max"}', "gradient_allreduce_op"),
    ('{"train_batch_size": 4, "train_batch_size": 8}', "'train_batch_size' twice"),
    ('{"zero_optimization": {"stage": 1, "stage": 2}}', "'stage' twice"),
    ('{"steps_per_print": 1' + "0" * 400 + "}", "too large"),
    ('{"steps_per_print": 1' + "0" * 5000 + "}", "not JSON"),
    ('{"aio": ' + "[" * 50 + "]" * 50 + "}", "levels"),
    ("[" * 100_000 + "]" * 100_000, "not JSON"),
    ("{'stage': 2}", "not JSON"),
    ("null", "JSON object"),
    ("", "not JSON"),
    (" " * (2**20 + 1), "bytes"),
]


@pytest.mark.parametrize(("text", "message"), JSONS, ids=lambda x: x[:50])
def test_a_json_that_cannot_be(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_json(tmp_path / "x.json")
    assert "x.json" in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
def test_a_json_is_utf_8(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes('{"dump_state": true}'.encode(encoding))
    with pytest.raises(UserError, match="UTF-8"):
        read_json(tmp_path / "x.json")


def test_a_json_is_a_file_of_text(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "a" / "b.json", Path("x" * 300)):
        with pytest.raises(UserError, match="no DeepSpeed JSON"):
            read_json(path)
    (tmp_path / "x.json").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="not JSON"):
        read_json(tmp_path / "x.json")


def test_sections_that_do_not_go_together() -> None:
    both = {"fp16": {"enabled": True}, "bf16": {"enabled": True}}
    with pytest.raises(UserError, match="DeepSpeed refuses.*bfloat16 and fp16"):
        resolve(both, batch_size=1, accumulation=1, max_norm=0.0, processes=1)


SAFE_YAML: list[tuple[str, str]] = [
    ("model: {type: mmengine.call_command, cmd: [touch, x]}", "names 'mmengine.call_command'"),
    ("model: {type: mmengine.load, file: x.json}", "names 'mmengine.load'"),
    ("model: {type: mmengine.model.BaseModel}", "no registry"),
    ("model: {type: torch.nn.Linear}", "no registry"),
    ("model: {type: os.system}", "no registry"),
    ("model: {type: rmoe.engine.cost.counted_flops}", "no registry"),
    ("model: {type: rmoe.engine.hooks.CostHook.__init__}", "no registry"),
    ("model: {type: builtins.eval}", "no registry"),
    ("model: {type: eval}", "no registry"),
    ("model: {type: __import__('os').system('x')}", "no registry"),
    ("model: {type: 3}", "names '3'"),
    ("model: {type: [a]}", "no registry|names"),
    ("model: {type: true}", "names 'True'"),
    ("custom_hooks: [{type: RFSearchHook}]", "evaluates strings"),
    ("model: {a: {type: mmdet.CameraMotionCompensation}}", "evaluates strings"),
    ("custom_hooks: [{type: EMAHook, ema_type: os.system}]", "names 'os.system'"),
    ("a: !!pairs [{type: subprocess.Popen}]", "tag"),
    ("a: !!omap [{type: subprocess.Popen}]", "tag"),
    ("a: !!set {type}", "tag"),
    ("a: !!binary aGVsbG8=", "tag"),
    ("a: !!python/tuple [1, 2]", "tag.*dump it as JSON"),
    ("a: !!python/name:os.system", "tag"),
    ("a: !local {b: 1}", "tag"),
    ("a: 2024-01-01", "timestamp"),
    ("a: &x [1]\nb: *x", "anchor or alias"),
    ("a: &a [*a]", "anchor or alias"),
    ("a: &a {b: 1}\nc: {<<: *a}", "anchor or alias"),
    ("<<: {a: 1}", "merge"),
    ("a: &a [l]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]", "anchor or alias"),
    ("a: 1\na: 2", "'a' stands there twice"),
    ("1: a", "no string"),
    ("null: a", "no string"),
    ("[a]: b", "no string"),
    ("a: .nan", "not a number"),
    ("a: 1\n---\nb: 2", "several documents"),
    ("- a", "must hold all keys"),
    ("", "must hold all keys"),
    ("{", "cannot be read"),
    ("a: " + "[" * 100 + "]" * 100, "levels"),
    ("a: " + "{b: " * 100 + "1" + "}" * 100, "levels"),
    ("a: " + "x" * 2**22, "bytes"),
    ("_base_: x.py", "without _base_"),
    ("custom_imports: {imports: os}", "names 'os'"),
    ("custom_imports: {imports: [3]}", "names '3'"),
    ("custom_imports: evil", "names 'evil'"),
    ("custom_imports: {imports: rmoe.engine.launch}", "neither ours nor OpenMMLab's"),
    ("default_scope: evil", "no scope"),
    ("a: {_scope_: evil}", "no scope"),
    ("a: {ann_file: x.pkl}", "a pickle"),
    ("a: {file: /tmp/X.PICKLE}", "a pickle"),
    ("a: {file_format: pkl}", "a pickle"),
    ("a: {decode_backend: pickle}", "a pickle"),
    ("env_cfg: {mp_cfg: {mp_start_method: spawn}}", "must be 'fork'"),
    ("train_dataloader: {multiprocessing_context: spawn}", "must be 'fork'"),
    ("a: {backend_args: {backend: memcached, sys_path: /tmp}}", "sys_path"),
]


@pytest.mark.parametrize(("text", "message"), SAFE_YAML, ids=lambda x: x[:50])
def test_a_safe_config_is_plain_and_known(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / "x.yaml", {}, safe=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": {"type": "mmengine.call_command", "cmd": ["touch", "x"]}}', "mmengine.call_command"),
        ('{"a": [[{"type": "subprocess.Popen"}]]}', "subprocess.Popen"),
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "levels"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "levels"),
        ("[]", "must hold all keys"),
        ("{", "cannot be read as JSON"),
    ],
    ids=lambda x: x[:40],
)
def test_a_safe_json(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / "x.json", {}, safe=True)


def test_numbers_of_a_safe_json_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"lr": 1e-05}')
    assert read_config(tmp_path / "x.json", {}, safe=True).lr == 1e-5


def test_under_safe_no_import_string_is_looked_up(locked: None, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="registry"):
        MODELS.build({"type": "mmengine.utils.call_command", "cmd": ["touch", str(tmp_path / "x")]})
    with pytest.raises(KeyError):
        DATASETS.build({"type": "evil.Thing"})
    with pytest.raises(KeyError):
        MODELS.build({"type": "torch.nn.Linear", "in_features": 1, "out_features": 1})


def test_under_safe_no_pickle_is_read(locked: None, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    for name in ("pkl", "pickle", None):
        with pytest.raises(UserError, match="read as a pickle"):
            load(tmp_path / "x.pkl", file_format=name)
    with (tmp_path / "x.npy").open("wb") as file:
        np.save(file, np.array([Touch(tmp_path / "ran")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "x.npy", allow_pickle=True)
    (tmp_path / "x.yaml").write_text(f"!!python/object/apply:pathlib.Path.touch [{tmp_path / 'ran'}]")
    with pytest.raises(Exception, match="could not determine a constructor"):
        load(tmp_path / "x.yaml")
    assert not (tmp_path / "ran").exists()


def test_foreign_weights_are_only_weights(tmp_path: Path) -> None:
    path, ran = tmp_path / "evil.pth", tmp_path / "ran"
    torch.save({"state_dict": {"weight": Touch(ran)}}, path)
    with pytest.raises(UserError, match=r"evil\.pth.*Python objects.*state dict"):
        load_checkpoint(nn.Linear(1, 1), str(path))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=False)
    initialise = {"type": "Pretrained", "checkpoint": str(path)}
    with pytest.raises(UserError, match=r"evil\.pth"), user_errors("model"):
        initialize(nn.Linear(1, 1), initialise)
    assert not ran.exists()


CONFIGS: list[tuple[bytes, str]] = [
    (b"", "has no model"),
    (b"raise RuntimeError('not today')", "RuntimeError: not today"),
    (b"import sys; sys.exit(0)", "SystemExit"),
    (b"1 / 0", "ZeroDivisionError"),
    (b"assert False", "AssertionError"),
    (b"_base_ = 'x.py'", "inherits from itself"),
    (b"_base_ = 3", "cannot be read"),
    (b"_base_ = ['absent.py']", "there is no config"),
    (bytes(range(256)), "null byte"),
    (b"a = 1\0", "null byte"),
    (b"\xff\xfe = 3", "cannot be read"),
    (b"model = dict(", "cannot be read"),
    (b"custom_imports = 3", "cannot be read"),
    (b"custom_imports = dict(imports=['no.such'])", "cannot be read"),
]


@pytest.mark.parametrize(("content", "message"), CONFIGS, ids=lambda x: str(x)[:40])
def test_a_config_that_cannot_be(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(read_config(tmp_path / "x.py", {}), {}, 1, tmp_path / "work", False)


def test_a_config_is_a_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.py", Path("x" * 300 + ".py"), tmp_path / "x.txt"):
        (tmp_path / "x.txt").touch()
        with pytest.raises(UserError, match="config"):
            read_config(path, {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cfg-options", "randomness.seed"], "'randomness.seed' is not KEY=VALUE"),
        (["--cfg-options", "=3"], "is not KEY=VALUE"),
        *((["--timeout", text], f"--timeout: {text} is no time") for text in ("inf", "nan", "0", "-1", "1e9")),
        (["--timeout", "x"], "--timeout: invalid"),
        (["--work-dir", ""], "--work-dir.*empty"),
        (["--no-such"], "unrecognized"),
    ],
    ids=str,
)
def test_words_of_the_command_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        launch.parser().parse_args(["c.py", "--deepspeed_config", "x.json", *words])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "key", ["model.", "model..moe", "param_scheduler.0.", "param_scheduler.9.power", "train_cfg.a.b.", ""]
)
def test_keys_of_options(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--cfg-options"):
        read_config(write_config(tmp_path / "x.py"), {key: 1})


PLACE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize("name", PLACE)
def test_a_place_is_whole(name: str, place: pytest.MonkeyPatch) -> None:
    processes.check_place()
    place.delenv(name)
    with pytest.raises(UserError, match=f"but not {name}"):
        processes.set_place()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("RANK", value) for value in ("two", "-1", "1", "1.0")),
        *(("WORLD_SIZE", value) for value in ("two", "0", "-2")),
        *(("LOCAL_RANK", value) for value in ("-1", "x")),
        *(("MASTER_PORT", value) for value in ("x", "0", "70000", "-1")),
        *(("MASTER_ADDR", value) for value in ("no.such.host.invalid", "a" * 300, "x..y")),
        ("LOCAL_WORLD_SIZE", "x"),
    ],
)
def test_a_place_is_one_that_can_be(name: str, value: str, place: pytest.MonkeyPatch) -> None:
    place.setenv(name, value)
    with pytest.raises(UserError, match=name):
        processes.set_place()


def test_a_port_that_another_program_has(place: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        place.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(UserError, match="MASTER_PORT.*another program has it"):
            processes.join(10)


@pytest.mark.parametrize(
    ("name", "value"),
    [("PROCID", None), ("PROCID", "x"), ("NODEID", "9"), ("STEP_TASKS_PER_NODE", None), ("JOB_ID", "")],
)
def test_a_step_of_srun_is_whole(name: str, value: str | None, place: pytest.MonkeyPatch) -> None:
    for each in PLACE:
        place.delenv(each)
    step = {"JOB_ID": "12", "STEP_ID": "0", "PROCID": "1", "LOCALID": "1", "NODEID": "0", "STEP_NUM_TASKS": "2"}
    step |= {"STEP_NUM_NODES": "1", "STEP_NODELIST": "n1", "STEP_TASKS_PER_NODE": "2", name: value}
    for each, given in step.items():
        if given is not None:
            place.setenv(f"SLURM_{each}", given)
        else:
            place.delenv(f"SLURM_{each}", raising=False)
    with pytest.raises(UserError, match=f"SLURM_{name}"):
        processes.set_slurm()


def test_folders_for_results(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for folder in (
        tmp_path / "file",
        tmp_path / "file" / "x",
        tmp_path / "dangling",
        tmp_path / ("x" * 300),
        Path("a\0b"),
    ):
        with pytest.raises(UserError, match="cannot be written.*give another --work-dir"):
            check_folder(folder)
    check_folder(tmp_path / "new" / "one")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not os.geteuid(), reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="read-only"):
        check_folder(tmp_path / "work")


@pytest.mark.parametrize(
    "words",
    [
        ["estimate", "c.py", "--gpus", "0"],
        ["estimate", "c.py", "--gpus", "-1"],
        ["estimate", "c.py", "--gpus", "1000000000"],
        ["estimate", "c.py", "--gpus", "1", "--micro-batch", "0"],
        ["estimate", "c.py", "--gpus", "1", "--ep-size", "-2"],
        ["estimate", "c.py", "--gpus", "1", "--image-size", "0", "32"],
        ["estimate", "c.py", "--gpus", "1", "--image-size", "-32", "32"],
        ["estimate", "c.py", "--gpus", "1", "--image-size", "32", "100000000"],
        ["analyze", "absent", "--images", "0", "--out", "out"],
        ["analyze", "absent", "--images", "-1", "--out", "out"],
        ["report", "absent", "--out", "out"],
    ],
    ids=" ".join,
)
def test_sizes_on_the_command_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert rmoe(words) == 2
    assert capsys.readouterr().err.startswith("rmoe: error: ")


@pytest.mark.parametrize("words", [["data", "check", "coco", "x"], ["estimate", "c.py", "--gpus", "1"], ["configs"]])
def test_a_file_to_write_is_looked_at_first(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "absent" / "x.json", tmp_path):
        with pytest.raises(SystemExit) as ended:
            rmoe([*words, "--json", str(path)])
        assert ended.value.code == 2
        assert "--json" in capsys.readouterr().err


def resumed(folder: Path, **changed: Any) -> list[str]:
    """What is told of a checkpoint of the toy config, and a run in which `changed` is otherwise."""
    before = prepared(folder)
    checkpoint = folder / "iter_2"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / RUN).write_text(json.dumps({"meta": {"cfg": before.pretty_text}}))
    return changes.compare(checkpoint, prepared(folder, **changed))


def test_what_a_resumed_run_may_not_change(tmp_path: Path) -> None:
    assert resumed(tmp_path) == []
    wrapper = toy_dict()["optim_wrapper"]
    for name, value in (("lr", 0.1), ("weight_decay", 0.0), ("betas", [0.5, 0.9])):
        changed = wrapper | {"optimizer": wrapper["optimizer"] | {name: value}}
        with pytest.raises(UserError, match=rf"optimizer.{name} .*this run has .*load_from="):
            resumed(tmp_path, optim_wrapper=changed)
    with pytest.raises(UserError, match="model.moe.blocks not set"):
        resumed(tmp_path, model={"type": "ToyModel", "drop_path": 0.2, "moe": {}})


def test_what_a_resumed_run_may_change_is_told(tmp_path: Path) -> None:
    scheduler = [toy_dict()["param_scheduler"][0] | {"power": 2.0}]
    assert "power was 0.9, is 2.0; the checkpoint's schedule goes on" in resumed(tmp_path, param_scheduler=scheduler)[0]
    loop = toy_dict()["train_cfg"] | {"max_iters": 8}
    assert "max_iters was 6, is 8" in resumed(tmp_path, train_cfg=loop)[0]


def test_a_checkpoint_s_config_is_not_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "iter_2"
    checkpoint.mkdir()
    for text in (f"open({str(tmp_path / 'ran')!r}, 'w')", "model = __import__('os').getcwd()", "model = (", "\0", 3):
        (checkpoint / RUN).write_text(json.dumps({"meta": {"cfg": text}}))
        with contextlib.suppress(UserError):
            changes.compare(checkpoint, prepared(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_what_others_raise_while_building_names_the_key() -> None:
    for error in (
        AssertionError("even"),
        ValueError("odd\nline"),
        RuntimeError("shape"),
        KeyError("x"),
        OSError(28, "full"),
    ):
        with pytest.raises(UserError, match="model: .*--debug") as caught, user_errors("model"):
            raise error
        assert "\n" not in str(caught.value)


def test_debug_shows_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rmoe(["--debug", "report", str(tmp_path / "absent"), "--out", str(tmp_path)]) == 2
    assert "Traceback" in capsys.readouterr().err
    words = [str(tmp_path / "absent.py"), "--deepspeed_config", str(write_json(tmp_path / "x.json")), "--debug"]
    with pytest.raises(UserError):
        launch.main(words)
    assert "Traceback" in capsys.readouterr().err
