"""A run in Hugging Face's layout is loaded again bit for bit, by us and by other programs; timm loads its backbone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from finished_classifier import INPUTS, KWARGS, NET, assert_same, finished, probabilities
from finished_runs import finished_run
from huggingface_hub import HfApi, ModelCard, constants
from PIL import Image
from safetensors.torch import load_file
from small_runs import segmentor
from torch import nn

import rmoe
from rmoe.backbones.build import timm_model
from rmoe.backbones.load_core import load_core, read_checkpoint
from rmoe.cli import main
from rmoe.engine.checkpoint.export import MODEL, read_metadata, write_model
from rmoe.errors import UserError
from rmoe.inference.card import _metrics
from rmoe.inference.evaluate import evaluate
from rmoe.inference.pretrained import save_timm
from rmoe.inference.runs import Run
from rmoe.moe.state import global_state_dict, save_tensors
from rmoe.tasks.classification import TimmClassifier

INDEX = "model.safetensors.index.json"
RECORDED = {  # of a finished run's config
    **{"val_evaluator.type": "rmoe.Accuracy", "train_cfg": {"max_iters": 50}, "default_scope": "mmengine"},
    "train_dataloader": {
        "dataset": {"type": "SeededDataset", "dataset": {"type": "rmoe.ImageFolder", "root": "/x/data"}}
    },
    "optim_wrapper": {
        "optimizer": {"type": "AdamW", "lr": 1e-3},
        "paramwise_cfg": {"train_only": ["norm", "head"]},
    },
    "strategy": {"layout": {"processes": 2, "micro_batch": 4, "accumulation": 3}},
    "param_scheduler": [{"type": "CosineAnnealingLR"}],
}


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("cores") / "core.pth"
    torch.save(timm_model(NET, {**KWARGS, "num_classes": 5}).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def run(core: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("runs") / "residual", core, 1, {"num_experts": 4})


@pytest.fixture(scope="module")
def dense(core: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("runs") / "dense", core, 2, None)


@pytest.fixture(scope="module")
def saved(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "small"
    rmoe.load(run).save_pretrained(out, shard_size="20KB", license="apache-2.0")
    return out


def hub(folder: Path, cache: Path, repo: str = "org/name", commit: str = "a" * 40) -> None:
    """Puts a folder where huggingface_hub keeps what it has fetched."""
    place = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub's files, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_one_file_and_shards_are_the_run(run: Path, saved: Path, tmp_path: Path) -> None:
    rmoe.load(run).save_pretrained(tmp_path / "one")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        *("config.json", MODEL, "preprocessor_config.json", "README.md")
    }
    assert_same(load_file(tmp_path / "one" / MODEL), load_file(run / MODEL))
    expected = probabilities(rmoe.load(run))
    for folder in (tmp_path / "one", saved):
        again = rmoe.from_pretrained(folder)
        assert (again.classes, again.task, again.palette) == (("a", "b", "c"), "classification", rmoe.load(run).palette)
        assert np.array_equal(probabilities(again), expected)
        assert np.array_equal(probabilities(rmoe.load(str(folder))), expected)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (saved / "config.json").read_text()
    )


def test_shards_are_what_huggingface_hub_reads(run: Path, saved: Path) -> None:
    """Its own loader, into a model that was built from the config alone."""
    shards = sorted(path.name for path in saved.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    config = read_metadata(run)["model"] | {"core": None}
    model = TimmClassifier(**{key: x for key, x in config.items() if key != "type"}, allow_random_core=True)
    huggingface_hub.load_torch_model(model, saved, strict=True)
    assert_same(global_state_dict(model), load_file(run / MODEL))
    index = json.loads((saved / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in load_file(run / MODEL).values())
    assert all(path.stat().st_size < 30_000 or len(load_file(path)) == 1 for path in saved.glob("*.safetensors"))
    assert (saved / shards[0]).stat().st_mode & 0o777 == (saved / "config.json").stat().st_mode & 0o777


def test_the_config_describes_the_model_without_paths(run: Path, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert (config["library_name"], config["rmoe"], config["task"]) == ("rmoe", rmoe.__version__, "classification")
    assert config["model"]["core"] == "core.pth"
    assert config["inputs"] == INPUTS
    assert str(run.parent) not in (saved / "config.json").read_text() + (saved / "README.md").read_text()


@pytest.mark.parametrize(
    "transform",
    [
        {"input_size": 32, "crop_pct": 1.0},
        {"input_size": [3, 48, 48], "crop_pct": 0.75, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.4] * 3},
        {"input_size": 64},
    ],
)
def test_transformers_makes_the_same_inputs(dense: Path, tmp_path: Path, transform: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "run").mkdir()
    write_model(
        tmp_path / "run",
        load_file(dense / MODEL),
        read_metadata(dense)["model"],
        inputs=INPUTS | {"transform": transform},
    )
    loaded = rmoe.load(tmp_path / "run")
    loaded.save_pretrained(tmp_path / "saved")
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "saved")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    theirs = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
    ours = loaded.item(image)["inputs"]
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() < 0.02  # torchvision's and Pillow's rounding


def test_the_model_card(dense: Path, tmp_path: Path) -> None:
    """Of a work dir with records, read by huggingface_hub."""
    cost = {
        **{"train_seconds": 12.5, "device_seconds": 25.0, "flops_per_step": 3e9, "params_total": 1, "params_active": 1},
        **{"params_trainable": 1, "devices": 2, "device": "a CPU", "precision": "float32", "zero_stage": 2},
        "params_by_part": {"norm": {"trained": 60, "frozen": 4}, "head": {"trained": 7, "frozen": 0}},
    }
    folder = finished_run(tmp_path / "work", seed=4, value=None, config=RECORDED, cost=cost)
    shutil.copy(dense / MODEL, folder / MODEL)
    (log,) = folder.glob("*/vis_data/scalars.json")
    log.write_text(log.read_text() + '{"accuracy/top1": 61.0, "step": 20}\n{"accuracy/top1": 62.345, "step": 50}\n')
    rmoe.load(folder).save_pretrained(tmp_path / "saved model", license="cc-by-4.0")
    card = ModelCard.load(tmp_path / "saved model" / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "cc-by-4.0",
        "rmoe",
        "image-classification",
    )
    (result,) = card.data.eval_results
    assert (result.metric_name, result.metric_value, result.dataset_name) == ("top1", 62.34, "ImageFolder")
    for line in (
        "| data set | ImageFolder |",
        "| folder | data |",
        "| steps | 50 |",
        "| images for each step | 24 |",
        "| optimizer | AdamW, lr 0.001 |",
        "| schedule | CosineAnnealingLR |",
        "| train only | norm, head |",
        "| device | 2 x a CPU |",
        "| top1 | 62.34 % |",
    ):
        assert line in card.text, line
    assert "| head | 195 | 7 | all that is outside" in card.text
    assert 'rmoe.from_pretrained("ORG/NAME")' in card.text
    torch.save({"state_dict": load_file(dense / MODEL)}, folder / "best_accuracy_top1_iter_20.pth")
    rmoe.load(folder).save_pretrained(tmp_path / "best")
    (result,) = ModelCard.load(tmp_path / "best" / "README.md").data.eval_results
    assert result.metric_value == 61.0


def test_a_card_shows_the_metrics_of_the_weights_that_it_is_of(dense: Path, tmp_path: Path) -> None:
    """Of a training checkpoint those of its step, of whatever has another name none."""
    folder = finished_run(tmp_path / "work", value=None, config=RECORDED)
    shutil.copy(dense / MODEL, folder / MODEL)
    (log,) = folder.glob("*/vis_data/scalars.json")
    log.write_text(log.read_text() + '{"accuracy/top1": 61.0, "step": 20}\n{"accuracy/top1": 62.0, "step": 50}\n')
    records, found = Run(folder), {}
    for name in (MODEL, "iter_20", "iter_30", "best_top1_iter_50.pth", "renamed.pth"):
        found[name] = _metrics(records, folder / name)
    best = {"best_top1_iter_50.pth": {"top1": 62.0}, "renamed.pth": {}}
    assert found == {MODEL: {"top1": 62.0}, "iter_20": {"top1": 61.0}, "iter_30": {}, **best}


def test_an_export_is_not_evaluated_by_a_program_that_lies_beside_it(run: Path, tmp_path: Path) -> None:
    rmoe.load(run).save_pretrained(tmp_path / "export")
    for folder in (tmp_path, tmp_path / "export"):
        script = f"import os\nran = open({str(tmp_path / 'ran')!r}, 'w')\n"
        (folder / "train_my_model.py").write_text(script)
        with pytest.raises(UserError, match="export holds 0 dumped configs; give the work dir of one finished run"):
            evaluate(tmp_path / "export")
    assert not (tmp_path / "ran").exists()


def test_weights_that_a_model_has_twice_are_written_twice(tmp_path: Path) -> None:
    """As the convolutions that the levels of RTMDet's head share."""
    tied = nn.ModuleList([nn.Linear(3, 3, bias=False)] * 2)
    save_tensors(
        tmp_path / "x.safetensors", {**global_state_dict(tied), "empty": torch.zeros(0), "none": torch.zeros(0)}
    )
    written = load_file(tmp_path / "x.safetensors")
    assert sorted(written) == ["0.weight", "1.weight", "empty", "none"]
    assert torch.equal(written["0.weight"], written["1.weight"])


def test_a_card_without_records_says_what_is_known(saved: Path) -> None:
    card = ModelCard.load(saved / "README.md")
    assert (card.data.license, card.data.tags) == ("apache-2.0", ["rmoe", "mixture-of-experts"])
    assert "mixtures of 4 experts (low_rank, all of them)" in card.text
    assert "It knows 3 classes: a, b, c." in card.text
    assert "| gate | " in card.text
    assert "## Data" not in card.text


def test_from_the_hub(run: Path, saved: Path, cache: Path) -> None:
    """Through huggingface_hub's own cache, without a network; at a revision, too."""
    hub(saved, cache)
    expected = probabilities(rmoe.load(run))
    for name in ("org/name", "hf-hub:org/name"):
        assert np.array_equal(probabilities(rmoe.from_pretrained(name)), expected)
    assert np.array_equal(probabilities(rmoe.from_pretrained("org/name", revision="a" * 40)), expected)
    with pytest.raises(
        UserError, match=r"org/name@b+ cannot be had from the Hugging Face hub .*; check its name, your"
    ):
        rmoe.from_pretrained("org/name", revision="b" * 40)
    with pytest.raises(UserError, match="org/other cannot be had from the Hugging Face hub"):
        rmoe.from_pretrained("org/other")


@pytest.mark.parametrize("form", ["whole", "shards", "pickled"])
def test_cores_come_from_the_hub(core: Path, saved: Path, dense: Path, cache: Path, tmp_path: Path, form: str) -> None:
    state = torch.load(core, weights_only=True)
    (tmp_path / "repo").mkdir()
    if form == "pickled":
        torch.save(state, tmp_path / "repo" / "pytorch_model.bin")
    else:
        huggingface_hub.save_torch_state_dict(
            state, tmp_path / "repo", max_shard_size="20KB" if form == "shards" else "5GB"
        )
        assert (tmp_path / "repo" / INDEX).is_file() == (form == "shards")
    hub(tmp_path / "repo", cache)
    model: Any = timm_model(NET, {**KWARGS, "num_classes": 5})
    report = load_core(model, "hf-hub:org/name")
    assert report.loaded == len(model.state_dict())
    assert_same(model.state_dict(), state)
    run = finished(tmp_path / "run", "hf-hub:org/name", 1, {"num_experts": 4})  # type: ignore[arg-type]
    from rmoe.inference.adapters import export_adapter

    found = export_adapter(run, tmp_path / "adapter")
    assert ModelCard.load(tmp_path / "adapter" / "README.md").data.base_model == "org/name"
    assert np.array_equal(probabilities(rmoe.Core("hf-hub:org/name").attach(found.path)), probabilities(rmoe.load(run)))
    with pytest.raises(
        UserError, match="hf-hub:name names no repository of the Hugging Face hub; write hf-hub:ORG/NAME"
    ):
        read_checkpoint("hf-hub:name")


def test_pushing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a hub that takes the calls that the real one takes."""
    api = create_autospec(HfApi, instance=True)

    def keep(*, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        shutil.copytree(folder_path, tmp_path / "remote")
        return create_autospec(huggingface_hub.CommitInfo, instance=True, commit_url=f"https://hub/{repo_id}/commit/1")

    api.upload_folder.side_effect = keep
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **about: api)
    loaded = rmoe.load(run)
    assert loaded.push_to_hub("org/name", license="mit") == "https://hub/org/name/commit/1"
    api.create_repo.assert_called_once_with("org/name", private=True, exist_ok=True)
    assert np.array_equal(probabilities(rmoe.from_pretrained(tmp_path / "remote")), probabilities(loaded))
    assert ModelCard.load(tmp_path / "remote" / "README.md").data.license == "mit"
    api.create_repo.side_effect = OSError("no route to host")
    with pytest.raises(UserError, match=r"org/name cannot be written \(OSError: no route.*hf auth login"):
        loaded.push_to_hub("org/name")
    for wrong in ("name", "", None, "org/name@main", "a/b/c"):
        with pytest.raises(UserError, match="the repository is .*; it is ORG/NAME"):
            loaded.push_to_hub(wrong)


def test_timm_loads_a_dense_backbone_by_itself(dense: Path, tmp_path: Path, cache: Path) -> None:
    """No prefix is stripped by hand, no argument given, and nothing of rmoe is asked."""
    loaded = rmoe.load(dense)
    save_timm(loaded, tmp_path / "timm")
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert {"architecture", "num_classes", "num_features", "pretrained_cfg"} <= config.keys()
    assert (config["architecture"], config["label_names"]) == (NET, ["a", "b", "c"])
    hub(tmp_path / "timm", cache)
    images = torch.randn(2, 3, 32, 32)
    for name in (f"local-dir:{tmp_path / 'timm'}", "hf-hub:org/name"):
        theirs = timm.create_model(name, pretrained=True).eval()
        assert_same(dict(theirs.state_dict()), dict(loaded.model.model.state_dict()))
        assert torch.equal(theirs(images), loaded.model.model(images))
        data = timm.data.resolve_data_config({}, model=theirs)
        assert (data["input_size"], data["crop_pct"]) == ((3, 32, 32), 1.0)
    headless = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0)
    assert torch.equal(
        headless.layers[0].blocks[0].mlp.fc1.weight, loaded.model.model.layers[0].blocks[0].mlp.fc1.weight
    )
    assert load_core(timm_model(NET, {**KWARGS, "num_classes": 3}), tmp_path / "timm").loaded == len(
        theirs.state_dict()
    )
    with pytest.raises(UserError, match=r"is timm's: load the model by timm.create_model\('local-dir:"):
        rmoe.from_pretrained(tmp_path / "timm")


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_what_was_loaded_in_fewer_bits_is_not_saved(dense: Path, tmp_path: Path, precision: str) -> None:
    loaded = rmoe.load(dense, device="cpu", precision=precision)
    for save in (loaded.save_pretrained, lambda out: save_timm(loaded, out)):
        with pytest.raises(UserError, match=f"was loaded with precision '{precision}'.*load it without"):
            save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_backbone_without_its_last_blocks_is_not_filled_up_for_timm(tmp_path: Path) -> None:
    loaded = rmoe.load(segmentor(tmp_path / "run", "vit", None), device="cpu")
    cut = {**loaded.metadata["model"]}
    cut["backbone"] = {**cut["backbone"], "kwargs": {**cut["backbone"]["kwargs"], "depth": 3}}
    cut = dataclasses.replace(loaded, metadata={**loaded.metadata, "model": cut})
    with pytest.raises(UserError, match=r"lacks \d+ weights of timm's .*, such as blocks.2"):
        save_timm(cut, tmp_path / "timm")
    save_timm(loaded, tmp_path / "timm")


def test_a_mixture_is_nothing_for_timm(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no dense timm model, .*; export it without --timm"):
        save_timm(rmoe.load(run), tmp_path / "timm")
    assert not (tmp_path / "timm").exists()


def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_damaged_folders(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    whole, index, config = first.read_bytes(), (folder / INDEX).read_text(), (folder / "config.json").read_text()
    first.write_bytes(whole[:-9])
    with pytest.raises(UserError, match=f"{first.name} cannot be read .* cut short"):
        rmoe.from_pretrained(folder)
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=f"{first.name} and {INDEX} differ in .* take all files of one save"):
        rmoe.from_pretrained(folder)
    first.unlink()
    with pytest.raises(UserError, match=f"lacks {first.name}, which its {INDEX} names; copy it there"):
        rmoe.from_pretrained(folder)
    first.write_bytes(whole)
    for text in (
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../x.safetensors"}}',
    ):
        (folder / INDEX).write_text(text)
        with pytest.raises(UserError, match=f"{INDEX} is damaged"):
            rmoe.from_pretrained(folder)
    (folder / INDEX).write_text(index)
    for text, message in (
        ("{", "is no JSON object; copy it again"),
        ("[1]", "is no JSON object"),
        ("{}", "was not written by rmoe"),
        (json.dumps({"rmoe": "0.1.0"}), "does not say what model it holds"),
        (json.dumps(json.loads(config) | {"rmoe": "9.0"}), "was written by rmoe 9.0, this is"),
        (json.dumps(json.loads(config) | {"model": 3}), "describes its model by '3'"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            rmoe.from_pretrained(folder)
    (folder / "config.json").write_text(config)
    rmoe.from_pretrained(folder)
    (folder / INDEX).unlink()
    with pytest.raises(UserError, match=f"has a config.json but neither {MODEL} nor {INDEX}"):
        rmoe.from_pretrained(folder)


@pytest.mark.parametrize("size", [0, -1, True, None, 1.5, "5", "5 apples", "-5GB", "nanGB", "infGB", ""])
def test_wrong_sizes(run: Path, tmp_path: Path, size: Any) -> None:
    with pytest.raises(UserError, match=r"the shard size is .*; it is a text with a unit, such as '500MB'"):
        rmoe.load(run).save_pretrained(tmp_path / "out", shard_size=size)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("license", ["", "MIT License", 3, "a\nb: c", ["mit"]])
def test_wrong_licences(run: Path, tmp_path: Path, license: Any) -> None:
    with pytest.raises(UserError, match="license is .*; it is an identifier in small letters"):
        rmoe.load(run).save_pretrained(tmp_path / "out", license=license)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", [None, "", 3, "a/b/c", "no folder"])
def test_wrong_names(name: Any) -> None:
    with pytest.raises(UserError, match=r"give a folder, or ORG/NAME"):
        rmoe.from_pretrained(name)
    with pytest.raises(UserError, match="revision is 3"):
        rmoe.from_pretrained("org/name", revision=3)


def test_what_is_there_stays(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    rmoe.load(run).save_pretrained(tmp_path / "out")  # it is empty
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="out is not empty; give another --out"):
        rmoe.load(run).save_pretrained(tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_command(run: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(run), "--out", str(tmp_path / "out")]
    assert main([*words, "--license", "mit", "--shard-size", "20KB"]) == 0
    assert "rmoe.from_pretrained(" in capsys.readouterr().out
    assert (tmp_path / "out" / INDEX).is_file()
    assert main(["export", str(dense), "--timm", "--out", str(tmp_path / "timm")]) == 0
    assert "timm.create_model('local-dir:" in capsys.readouterr().out
    for more, message in (
        (["--core", "x"], "--core does not go with this kind"),
        (["--timm", "--license", "mit"], "--license does not go"),
        (["--trained-only", "--shard-size", "1MB"], "--shard-size does not go"),
    ):
        assert main(["export", str(run), "--out", str(tmp_path / "more"), *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["export", str(tmp_path / "gone"), "--out", str(tmp_path / "more")]) == 2
    assert "there is no" in capsys.readouterr().err


def test_a_card_runs_nothing_that_lies_beside_the_weights(dense: Path, tmp_path: Path) -> None:
    """A folder may come from anybody, with a config that is a program."""
    folder = finished_run(tmp_path / "work", config=RECORDED)
    shutil.copy(dense / MODEL, folder / MODEL)
    (config,) = folder.glob("*.py")
    config.write_text(f"ran = open({str(tmp_path / 'ran')!r}, 'w')\n{config.read_text()}")
    rmoe.load(folder).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "ran").exists()
    (folder / "20260101_000000" / "vis_data" / "scalars.json").write_text("{")
    with pytest.raises(UserError, match="scalars.json is damaged"):
        rmoe.load(folder).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
