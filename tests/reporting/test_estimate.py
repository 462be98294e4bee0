from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks import training
from rmoe.cli import main
from rmoe.engine.cost import counted_flops
from rmoe.engine.optim import param_groups
from rmoe.engine.trained import parts
from rmoe.errors import UserError
from rmoe.registry import MODELS
from rmoe.reporting.estimate import Estimate, Setting, estimate, share_out
from rmoe.reporting.tracing import trace, training_loss
from rmoe.reporting.work import Work, _image_size, run_once

SIZE, IMAGES = 64, 2
SWIN = dict(embed_dim=16, depths=(1, 1, 2, 2), num_heads=(1, 2, 4, 8), window_size=4, drop_path_rate=0.1)
MOE = {
    "dense": None,
    "low_rank": dict(residual="low_rank"),
    "segments": dict(residual="segments", rank=4),
    "sparse": dict(residual="sparse", density=0.1),
    "full": dict(residual="full"),
    "experts": dict(residual="experts"),
    "two of four": dict(num_experts=4, top_k=2),
    "recomputed": dict(recompute=True),
}


def segmentor(moe: dict[str, Any] | None, **backbone: Any) -> Config:
    model = dict(
        type="EncoderDecoder",
        data_preprocessor=dict(type="SegDataPreProcessor", size=(SIZE, SIZE)),
        backbone=dict(type="rmoe.TimmPyramid", model="swin_tiny_patch4_window7_224", kwargs=SWIN, moe=moe, **backbone),
        decode_head=dict(
            type="UPerHead",
            in_channels=[16, 32, 64, 128],
            in_index=[0, 1, 2, 3],
            channels=16,
            num_classes=11,
            norm_cfg=dict(type="SyncBN"),
            align_corners=False,
        ),
        train_cfg=dict(),
        test_cfg=dict(mode="whole"),
    )
    return Config(dict(model=model, default_scope="mmseg", train_dataloader=dict(batch_size=IMAGES)))


def classifier(moe: dict[str, Any] | None, model: str = "swin_tiny_patch4_window7_224", **kwargs: Any) -> Config:
    kwargs = kwargs or dict(SWIN, img_size=SIZE)
    model_cfg = dict(type="rmoe.TimmClassifier", model=model, kwargs=kwargs, num_classes=7, moe=moe, core="nowhere")
    dataset = dict(transform=dict(input_size=SIZE))
    return Config(dict(model=model_cfg, train_dataloader=dict(batch_size=IMAGES, dataset=dataset)))


def with_values(cfg: Config) -> tuple[Any, dict[str, Any]]:
    """The model and a batch, for real."""
    from mmengine.structures import BaseDataElement, PixelData

    init_default_scope(cfg.get("default_scope", "mmengine"))
    cfg.model.core = None
    torch.manual_seed(0)
    if "decode_head" in cfg.model:
        cfg.model.pop("core")
        sample = BaseDataElement(metainfo={"img_shape": (SIZE, SIZE)})
        sample.gt_sem_seg = PixelData(data=torch.randint(11, (1, SIZE, SIZE)))
        labels: dict[str, Any] = {"data_samples": [sample] * IMAGES}
    else:
        labels = {"labels": torch.arange(IMAGES)}
    cfg.model.get("backbone", cfg.model).allow_random_core = True
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    return model, {"inputs": torch.randn(IMAGES, 3, SIZE, SIZE), **labels}


def vit(moe: dict[str, Any] | None) -> Config:
    """Two blocks, few operators: quick to trace."""
    moe = moe and dict(moe, blocks="last_two")
    return classifier(moe, "vit_tiny_patch16_224", img_size=SIZE, depth=2, embed_dim=48)


CONFIGS = {
    "segmentor, low_rank": segmentor(MOE["low_rank"]),
    "segmentor, checkpointing": segmentor(MOE["full"], with_cp=True),
    "Swin, low_rank": classifier(MOE["low_rank"]),
    **{f"ViT, {name}": vit(moe) for name, moe in MOE.items()},
}


SLOW = ("segmentor, low_rank", "segmentor, checkpointing", "Swin, low_rank")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CONFIGS])
def test_flops_and_activations_are_those_of_a_step_with_values(name: str) -> None:
    guess = estimate(CONFIGS[name], Setting(processes=1))
    model, images = with_values(Config(CONFIGS[name].to_dict()))
    flops: list[int] = []
    with counted_flops(flops):
        training_loss(model, images).backward()
    assert guess.flops == pytest.approx(flops[0], rel=0.1)
    model.zero_grad()
    live = trace(model, lambda: training_loss(model, images)).activations
    assert guess.memory.activations == pytest.approx(live, rel=0.1)


@pytest.mark.parametrize("name", ["Swin, low_rank", "ViT, dense", "ViT, full"])
def test_activations_hold_what_autograd_keeps(name: str) -> None:
    """Another oracle: the storages that autograd saved; the peak exceeds them by what is made on the way."""
    guess = estimate(CONFIGS[name], Setting(processes=1))
    model, images = with_values(Config(CONFIGS[name].to_dict()))
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers(), images["inputs"])}
    saved: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = training_loss(model, images)
    assert loss.isfinite()
    assert sum(saved.values()) <= guess.memory.activations <= 1.5 * sum(saved.values())


def test_flops_of_a_linear_layer_by_hand() -> None:
    found = trace(model := nn.Linear(4, 8), lambda: model(torch.ones(5, 4)).sum())
    assert found.flops == 2 * (2 * 5 * 4 * 8)  # forward and the weight's gradient; the input needs none


def test_operators_by_hand() -> None:
    model = nn.Linear(4, 8)
    # Forward 5 × 4 times 4 × 8, then a sum of 5 × 8 numbers; the weight's own bytes are not counted.
    found = trace(model, lambda: model(torch.ones(5, 4)).sum()).operators
    assert sum(flops * n for (flops, _), n in found.items()) == 2 * (2 * 5 * 4 * 8)
    assert found[2 * 5 * 4 * 8, 4 * (5 * 4 + 5 * 8)] == 1  # the product forward, with what it makes
    assert found[0, 4 * (5 * 8 + 1)] >= 1  # the sum
    assert all(n > 0 and moved >= 0 for (_, moved), n in found.items())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_casts_of_weights_and_views_move_nothing(precision: Any) -> None:
    model = nn.Linear(64, 64, bias=False)
    found = trace(model, lambda: model(torch.ones(1, 64)).view(8, 8).sum(), precision).operators
    moved = sum(size * n for (_, size), n in found.items())
    # Of the weight's 16 kB its gradient alone: made by a product and, under autocast, cast to float32.
    made = getattr(torch, precision).itemsize * 64 * 64
    cast = made + 4 * 64 * 64 if precision == "bfloat16" else 0
    assert made + cast <= moved < made + cast + 3_000


def test_live_bytes_by_hand() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(100))

        def loss(self) -> Tensor:
            freed = self.weight * 2  # 400 bytes, gone before the next
            del freed
            kept = self.weight.exp()  # 400 bytes, which its backward needs
            return kept.sum()  # 4 bytes, and another 4 for its gradient

    model = Twice()
    # In backward: `kept`, its expanded gradient (4 bytes) and their product, which becomes the weight's gradient.
    found = trace(model, model.loss)
    assert found.activations == pytest.approx(400, abs=16)
    assert found.together == (400, pytest.approx(400, abs=16))


@pytest.mark.parametrize("kind", ["dense", "full", "sparse", "segments"])
def test_weights_gradients_and_states_are_exact(kind: str) -> None:
    guess = estimate(vit(MOE[kind]), Setting(processes=1, zero=0)).memory
    model, images = with_values(vit(MOE[kind]))
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3))
    training_loss(model, images).backward()
    optimizer.step()
    assert guess.weights == sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert guess.gradients == sum(x.grad.nbytes for x in model.parameters() if x.grad is not None)
    states = [x for state in optimizer.state.values() for x in state.values()]
    assert guess.optimizer == sum(x.nbytes for x in states if x.ndim)  # the step counts aside
    assert guess.buckets == 0


def test_what_train_only_freezes_has_no_gradients_and_states() -> None:
    config = vit(MOE["full"])
    whole = estimate(config, Setting(processes=1, zero=0))
    config.optim_wrapper = {"paramwise_cfg": {"train_only": ["residual", "gate"]}}
    some = estimate(config, Setting(processes=1, zero=0))
    model, _ = with_values(config)
    part = parts(model)
    kept = sum(x.nbytes for name, x in model.named_parameters() if part[name] in ("residual", "gate"))
    assert (some.memory.gradients, some.memory.optimizer) == (kept, 2 * kept)
    assert some.parameters.trainable < whole.parameters.trainable
    assert some.flops < whole.flops
    config.optim_wrapper.paramwise_cfg.train_only = ["gates"]
    with pytest.raises(UserError, match="did you mean 'gate'"):
        estimate(config, Setting(processes=1))


KINDS = {"full": dict(residual="full", ep_size=2), "low_rank": dict(residual="low_rank", ep_size=2)}


@pytest.fixture(scope="module", params=KINDS)
def work(request: pytest.FixtureRequest) -> Work:
    return run_once(classifier(KINDS[request.param]), Setting(processes=4))


def spread(work: Work, **setting: Any) -> Estimate:
    return share_out(replace(work, setting=replace(work.setting, **setting)))


def test_the_config_says_what_is_not_given(work: Work) -> None:
    found = work.setting
    assert (found.ep_size, found.micro_batch, found.image_size) == (2, IMAGES, (SIZE, SIZE))


def test_zero_and_expert_parallelism_share_memory(work: Work) -> None:
    assert work.experts == work.experts_trained > 0
    others, experts = work.shared_trained, work.experts
    # One process has its share of the experts; the 4 / ep_size processes with the same experts share their states.
    assert spread(work, ep_size=4).memory.weights == work.shared + experts // 4
    assert spread(work, ep_size=4, zero=0).memory.gradients == others + experts // 4
    assert spread(work, ep_size=4, zero=1).memory.gradients == others + experts // 4
    for ep_size in (1, 2, 4):
        assert spread(work, ep_size=ep_size, zero=2).memory.gradients == others // 4 + experts // 4
        assert spread(work, ep_size=ep_size, zero=1).memory.optimizer == 3 * (others // 4 + experts // 4)
    assert spread(work, ep_size=2, zero=0).memory.optimizer == 2 * (others + experts // 2)


def test_a_moving_average_is_another_copy_of_the_weights() -> None:
    cfg = vit(None)
    assert estimate(cfg, Setting(processes=1)).memory.average == 0
    cfg.custom_hooks = [dict(type="rmoe.EMAHook", momentum=1e-4)]
    memory = estimate(cfg, Setting(processes=1)).memory
    assert memory.average == memory.weights > 0


def test_gradients_come_while_activations_go(work: Work) -> None:
    work = replace(work, activations=1000, together=(300, 800), sent_tokens=0, sent_experts=0)
    everything = work.shared_trained + work.experts_trained
    assert spread(work, ep_size=1, zero=0).memory.step == 300 + 800
    memory = spread(work, ep_size=1, zero=2).memory
    assert memory.step == max(1000, round(300 * memory.gradients / everything) + 800)
    assert spread(replace(work, together=(0, 1000)), zero=0).memory.step == 1000
    assert memory.total == memory.weights + memory.optimizer + memory.buckets + memory.step


def test_traffic_by_hand(work: Work) -> None:
    tokens_travel = work.sent_tokens > 0
    if tokens_travel:
        # Strides 16 and 32: 2 images of 4 × 4 tokens of width 64, and of 2 × 2 of width 128, 4 bytes each.
        assert (work.sent_tokens, work.sent_experts) == (2 * 4 * (16 * 64 + 4 * 128), 0)
    else:
        assert work.sent_experts == work.experts
    sent = spread(work, ep_size=4, zero=1)
    assert sent.traffic.all_to_all == 4 * work.sent_tokens * 3 // 4  # there and back, forward and backward
    assert sent.traffic.gather_experts == 2 * work.sent_experts * 3 // 4
    assert sent.traffic.reduce_gradients == 2 * work.shared_trained * 3 // 4  # no expert is in two processes
    assert sent.traffic.gather_weights == work.shared_trained * 3 // 4
    assert sent.memory.activations == work.activations + work.sent_tokens + work.sent_experts
    assert spread(work, processes=1, ep_size=1).traffic.total == 0
    assert spread(work, ep_size=1, zero=0).traffic.gather_weights == 0


def test_gradients_of_linear_layers_are_sent_as_they_are_computed() -> None:
    full, half = (run_once(vit(None), Setting(processes=2, precision=name)) for name in ("float32", "bfloat16"))
    assert full.shared_reduced == full.shared_trained == half.shared_trained
    norms = sum(4 * x.numel() for x in with_values(vit(None))[0].parameters() if x.ndim != 2 and x.ndim != 4)
    assert half.shared_trained / 2 < half.shared_reduced < half.shared_trained / 2 + norms + 10_000


def test_lower_precision_keeps_weights_and_shrinks_activations() -> None:
    one, other = (
        estimate(vit(None), Setting(processes=1, micro_batch=16, precision=name)).memory
        for name in ("float32", "bfloat16")
    )
    assert other.weights == one.weights
    assert 0.4 * one.activations < other.activations < one.activations


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(processes=3, ep_size=2), "ep_size 2 does not divide the 3 processes"),
        (dict(processes=16, ep_size=16), "does not divide the 16 processes and 8 experts"),
    ],
)
def test_what_does_not_fit_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        estimate(vit(MOE["low_rank"]), Setting(**setting))


def test_a_dense_model_has_no_experts_to_spread() -> None:
    assert estimate(vit(None), Setting(processes=8, ep_size=3)).setting.ep_size == 1


def test_a_size_that_nobody_gives_is_asked_for() -> None:
    cfg = classifier(None)
    cfg.train_dataloader.pop("dataset")
    with pytest.raises(UserError, match="give --image-size"):
        estimate(cfg, Setting(processes=1))


def test_a_config_without_data_is_asked_for_sizes() -> None:
    cfg = classifier(None)
    cfg.train_dataloader = None
    with pytest.raises(UserError, match="give --micro-batch"):
        estimate(cfg, Setting(processes=1))
    assert _image_size(cfg) is None
    cfg.val_dataloader = dict(dataset=dict(pipeline=[dict(type="Resize", scale_factor=2.0)]))
    assert _image_size(cfg) is None
    cfg.val_dataloader.dataset.pipeline[0].scale = 96
    assert _image_size(cfg) == (96, 96)


@pytest.mark.slow
def test_a_detector_is_run_with_values() -> None:
    cfg = training.config("detection", MOE["low_rank"], 96, small=True)
    guess = estimate(cfg, Setting(processes=1, micro_batch=1, image_size=(96, 96)))
    step = training.training_step(
        model := training.build(cfg), SGD(model.parameters()), training.batch("detection", 1, 96)
    )
    with counted_flops(flops := []):
        step()
    assert guess.flops == flops[0]
    assert guess.memory.activations > 10 * 3 * 96 * 96 * 4
    assert guess.traffic.total == 0
    assert guess.setting.ep_size == 1


def test_a_detectors_images_lie() -> None:
    cfg = Config.fromfile(training.TASKS["detection"])
    assert _image_size(cfg) == (800, 1333)


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="a ResNet cannot be estimated; give a config of"):
        estimate(Config(dict(model=dict(type="mmdet.ResNet", depth=18))), Setting(processes=1))


COMMAND = ["--gpus", "4", "--ep-size", "2", "--zero", "1"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, numbers = tmp_path / "config.py", tmp_path / "estimate.json"
    CONFIGS["ViT, low_rank"].dump(path)
    assert main(["estimate", str(path), *COMMAND, "--nodes", "2", "--link", "12.5", "--json", str(numbers)]) == 0
    shown, found = capsys.readouterr().out, json.loads(numbers.read_text())
    assert "memory: activations" in shown
    assert "sent: gather experts" in shown
    assert "12.5 GB/s between nodes" in shown
    assert "No hours" in shown
    assert found["setting"]["processes"] == 4
    assert found["setting"]["precision"] == "bfloat16"  # what training computes in on a GPU, where no JSON says another
    assert found["memory"]["weights"] > 0
    assert (found["cluster"]["nodes"], found["cluster"]["per_node"], found["cluster"]["link"]) == (2, 2, 12.5e9)
    assert found["seconds"]["compute"] > 0
    assert found["pipeline"] == []


def test_the_command_changes_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, numbers = tmp_path / "config.py", tmp_path / "estimate.json"
    CONFIGS["ViT, low_rank"].dump(path)
    weights = []
    for words in ([], ["--cfg-options", "model.moe.residual=full"]):
        assert main(["estimate", str(path), "--gpus", "1", "--json", str(numbers), *words]) == 0
        weights.append(json.loads(numbers.read_text())["memory"]["weights"])
    assert weights[1] > 1.5 * weights[0]
    assert main(["estimate", str(path), "--gpus", "1", "--cfg-options", "modle.moe=None"]) == 2
    assert "--cfg-options: the config has no 'modle'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus is 0"),
        (["--gpus", "4", "--nodes", "0"], "--nodes is 0"),
        (["--gpus", "4", "--nodes", "3"], "--nodes 3 does not divide --gpus 4"),
        (["--gpus", "4", "--nodes", "8"], "--nodes 8 does not divide --gpus 4"),
        (["--gpus", "4", "--gpu", "h10"], "did you mean 'h100'?"),
        (["--gpus", "4", "--link", "nan"], "--link is nan"),
        (["--gpus", "4", "--link", "-1"], "--link is -1"),
        (["--gpus", "4", "--share", "40"], "--share is 40"),
        (["--gpus", "4", "--overlap", "2"], "--overlap is 2"),
    ],
)
def test_hostile_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "nowhere.py", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("instances", [False, True])
def test_mask2former_is_estimated(instances: bool) -> None:
    """It matches answers with the truth, which takes values: made-up images have some."""
    cfg = Config(dict(model=small_runs.mask2former(instances), train_dataloader=dict(batch_size=IMAGES)))
    cfg.default_scope = "mmdet" if instances else "mmseg"
    guess = estimate(cfg, Setting(processes=1, image_size=(SIZE, SIZE)))
    assert guess.flops > 0


def test_an_images_size_is_that_of_fixed_padding() -> None:
    augments = [dict(type="BatchFixedSizePad", size=(96, 64))]
    assert _image_size(Config(dict(model=dict(data_preprocessor=dict(batch_augments=augments))))) == (96, 64)
