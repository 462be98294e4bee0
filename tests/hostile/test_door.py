"""Whatever is wrong in a config, a DeepSpeed JSON, the launcher's variables or a path is one line, before anything."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from toy import CONFIG, write_json

from rmoe.cli import main as rmoe
from rmoe.engine import changes, launch
from rmoe.engine.building import user_errors
from rmoe.engine.checkpoint.files import RUN
from rmoe.engine.ds_json import read_json, resolve
from rmoe.engine.prepare import prepare
from rmoe.engine.read_config import read_config
from rmoe.errors import UserError

INF, NAN = float("inf"), float("nan")


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
    *(("optim_wrapper.paramwise_cfg.train_only", value) for value in ([], "gate", ["gates"], [None], 1, {"gate": 1})),
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
    *(("calibrate", value) for value in ([], 3, "yes", True)),
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
    model = {"type": "ToyModel", "moe": None}
    assert prepared(tmp_path, {"zero_optimization": {"stage": 3}}, model=model).strategy.layout.num_experts == 0


@pytest.mark.parametrize(
    ("section", "moe", "message"),
    [
        ({}, None, "the model has none: set calibrate to None"),
        ({"batches": 0}, {}, "batches is 0"),
        ({"confidence": NAN}, {}, "calibrate.confidence is nan"),
        ({"batchs": 3}, {}, "did you mean 'batches'"),
        ({"confidence": 0.1}, {"num_experts": 8}, "0.1, and 8 experts weighed evenly have 0.125"),
        ({}, {"residual": "experts", "expert_init": "random"}, "begins as the dense network"),
    ],
)
def test_a_calibration_that_cannot_be(section: Any, moe: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, calibrate=section, model={"type": "ToyModel", "moe": moe})
    assert not (tmp_path / "work").exists()


def test_a_calibration_stays_in_the_config(tmp_path: Path) -> None:
    cfg = prepared(tmp_path, calibrate={"batches": 3}, model={"type": "ToyModel", "moe": {}})
    assert "calibrate = dict(batches=3)" in cfg.pretty_text
    prepared(tmp_path, calibrate=None)


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


CONFIGS: list[tuple[bytes, str]] = [
    (b"", "has no model"),
    (b"raise RuntimeError('not today')", "RuntimeError: not today"),
    (b"import sys; sys.exit(0)", "SystemExit"),
    (b"1 / 0", "ZeroDivisionError"),
    (b"assert False", "AssertionError"),
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


def test_a_config_that_inherits_from_itself(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("_base_ = 'y.py'")
    (tmp_path / "y.py").write_text("_base_ = 'x.py'")
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(400)  # the same sooner
    try:
        with pytest.raises(UserError, match="inherits from itself"):
            read_config(tmp_path / "x.py", {})
    finally:
        sys.setrecursionlimit(before)


def test_a_config_is_a_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.py", Path("x" * 300 + ".py"), tmp_path / "x.txt"):
        (tmp_path / "x.txt").touch()
        with pytest.raises(UserError, match="config"):
            read_config(path, {})


def resumed(folder: Path, **changed: Any) -> list[str]:
    """What is told of a checkpoint of the toy config, and a run in which `changed` is otherwise."""
    return resumed_from(prepared(folder).pretty_text, folder, **changed)


def resumed_from(text: str, folder: Path, **changed: Any) -> list[str]:
    """The same of a checkpoint whose config is `text`."""
    checkpoint = folder / "iter_2"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / RUN).write_text(json.dumps({"meta": {"cfg": text}}))
    return changes.compare(checkpoint, prepared(folder, **changed))


def test_what_a_resumed_run_may_not_change(tmp_path: Path) -> None:
    assert resumed(tmp_path) == []
    # as `prepare` sets it in a run that is resumed and has no core: upstream pretraining
    assert resumed(tmp_path, model=toy_dict()["model"] | {"allow_random_core": True}) == []
    wrapper = toy_dict()["optim_wrapper"]
    for name, value in (("lr", 0.1), ("weight_decay", 0.0), ("betas", [0.5, 0.9])):
        changed = wrapper | {"optimizer": wrapper["optimizer"] | {name: value}}
        with pytest.raises(UserError, match=rf"optimizer.{name} .*this run has .*load_from="):
            resumed(tmp_path, optim_wrapper=changed)
    with pytest.raises(UserError, match=r"of another model: model.moe.\w+ was not set"):
        resumed(tmp_path, model={"type": "ToyModel", "drop_path": 0.2, "moe": {}})


def test_a_checkpoint_of_a_mixture_whose_top_k_was_left_open(tmp_path: Path) -> None:
    """It was 1 then; what is written now says itself what it is."""
    mixture: dict[str, Any] = {"type": "ToyModel", "moe": {"num_experts": 4}}
    now = prepared(tmp_path, model=mixture)
    assert now.model.moe.top_k == "all"
    assert "top_k='all'," in now.pretty_text
    for said, used in ((now.pretty_text, "all"), (now.pretty_text.replace("top_k='all',", ""), 1)):
        checkpoint = tmp_path / "iter_2"
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / RUN).write_text(json.dumps({"meta": {"cfg": said}}))
        for top_k, meant in (("auto", "all"), ("all", "all"), (4, "all"), (1, 1)):
            this = prepared(tmp_path, model={"type": "ToyModel", "moe": {"num_experts": 4, "top_k": top_k}})
            if meant == used:
                assert not [line for line in changes.compare(checkpoint, this) if "top_k" in line]
            else:
                with pytest.raises(UserError, match=f"top_k was {used!r}; this run has {meant!r}"):
                    changes.compare(checkpoint, this)


@pytest.mark.parametrize("residual", ["low_rank", "full", None])
def test_a_default_rate_that_is_written_out_is_no_change(residual: str | None, tmp_path: Path) -> None:
    model: dict[str, Any] = {"type": "ToyModel"} | ({"moe": {"residual": residual}} if residual else {})
    wrapper = toy_dict()["optim_wrapper"]
    explicit = {"residual_lr_mult": 4.0 if residual == "low_rank" else 1.0, "gate_lr_mult": 1.0, "custom_keys": {}}
    for given in ({}, explicit):
        now = prepared(tmp_path, model=model, optim_wrapper=wrapper | {"paramwise_cfg": given})
        assert now.optim_wrapper.paramwise_cfg.residual_lr_mult == explicit["residual_lr_mult"]
        said = now.pretty_text
        assert resumed_from(said, tmp_path, model=model, optim_wrapper=wrapper | {"paramwise_cfg": explicit}) == []
        assert resumed_from(said, tmp_path, model=model) == []


def test_a_checkpoint_from_when_low_rank_had_no_rate_of_its_own(tmp_path: Path) -> None:
    """It goes on with that rate of then; one from when it had, but did not say so, as it is."""
    model: dict[str, Any] = {"type": "ToyModel", "moe": {"num_experts": 4, "top_k": 1}}
    once = {"model": model, "optim_wrapper": toy_dict()["optim_wrapper"] | {"paramwise_cfg": {"residual_lr_mult": 1.0}}}
    said = prepared(tmp_path, model=model).pretty_text
    between = re.sub(r"paramwise_cfg=dict\([^()]*\)", "paramwise_cfg=dict()", said)
    assert "paramwise_cfg=dict()" in between
    before = between.replace("expert_drop=0.0,", "")
    assert before != between
    assert resumed_from(before, tmp_path, **once) == []
    with pytest.raises(UserError, match=r"residual_lr_mult was 1.0; this run has 4.0. Resume with the former"):
        resumed_from(before, tmp_path, model=model)
    assert resumed_from(between, tmp_path, model=model) == []
    with pytest.raises(UserError, match=r"residual_lr_mult was 4.0; this run has 1.0. Resume with the former"):
        resumed_from(between, tmp_path, **once)


def test_another_schedule_of_a_resumed_run(tmp_path: Path) -> None:
    scheduler = [toy_dict()["param_scheduler"][0] | {"power": 2.0}]
    with pytest.raises(UserError, match=r"of another schedule: param_scheduler.0.power was 0.9; this run has 2.0"):
        resumed(tmp_path, param_scheduler=scheduler)


def test_what_a_resumed_run_may_change_is_told(tmp_path: Path) -> None:
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
    with pytest.raises(UserError, match="model: the key 'total' is missing"), user_errors("model"):
        raise KeyError("total")


def test_debug_shows_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rmoe(["--debug", "report", str(tmp_path / "absent"), "--out", str(tmp_path)]) == 2
    assert "Traceback" in capsys.readouterr().err
    words = [str(tmp_path / "absent.py"), "--deepspeed_config", str(write_json(tmp_path / "x.json")), "--debug"]
    with pytest.raises(UserError):
        launch.main(words)
    assert "Traceback" in capsys.readouterr().err
