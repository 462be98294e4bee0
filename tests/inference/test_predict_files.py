"""Names, folders and words of `rmoe predict`, with models of random weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import classifier, segmentor

import rmoe
from rmoe.errors import UserError
from rmoe.inference import files
from rmoe.inference.evaluate import Evaluation, show
from rmoe.inference.files import find_images, predict
from rmoe.inference.folders import new_folder
from rmoe.inference.predictor import Predictor


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return rmoe.load(classifier(tmp_path_factory.mktemp("runs") / "run", "vit"), device="cpu")


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (200, 100, 0)).save(path)
    return path


def test_results_are_no_inputs_of_the_next_call(run: Predictor, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.jpg")
    out = Path("predictions")
    for words in (["."], ["."], ["**/*"]):
        assert predict(run, words, out) == (1, 0)
    assert sorted(path.name for path in out.rglob("*.png")) == ["a.png"]


def test_earlier_results_stay_until_there_are_new_ones(run: Predictor, tmp_path: Path, monkeypatch: Any) -> None:
    first, second, out = picture(tmp_path / "a.jpg"), picture(tmp_path / "b.jpg"), tmp_path / "out"
    predict(run, [str(first)], out)

    def fail(*arguments: Any) -> Any:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "_draw", fail)
        with pytest.raises(UserError, match=r"out cannot be written \(no space left on device\); make room"):
            predict(run, [str(second)], out)
    assert (out / "pictures/a.png").exists()
    predict(run, [str(second)], out)
    assert [path.name for path in out.rglob("*.png")] == ["b.png"]


def test_a_folder_in_which_a_killed_call_wrote_nothing_is_taken(run: Predictor, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.json.partial").write_text("{")
    assert predict(run, [str(picture(tmp_path / "a.jpg"))], tmp_path / "out") == (1, 0)
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_names_that_are_long_or_those_of_folders(run: Predictor, tmp_path: Path) -> None:
    long = picture(tmp_path / f"{'x' * 246}.jpg")
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "a.png" / "b.jpg")
    assert predict(run, [str(tmp_path)], tmp_path / "out") == (3, 0)
    made = [path for path in (tmp_path / "out" / "pictures").rglob("*.png") if path.is_file()]
    assert len(made) == 3
    assert find_images([str(long)]) == [str(long)]


def test_results_in_the_folder_that_is_searched(tmp_path: Path) -> None:
    (tmp_path / "photos" / "out").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "out" / "earlier.png")
    folder = str(tmp_path / "photos")
    assert find_images([folder], tmp_path / "photos" / "out") == [f"{folder}/a.png"]
    with pytest.raises(UserError, match="photos lies in --out .*photos, where results are written; give another --out"):
        find_images([folder], tmp_path / "photos")


@pytest.mark.parametrize("named", [5, "notes.txt", "pictures", "../a.png", "pictures/../../a.png"])
def test_files_that_are_not_ours_are_not_removed(run: Predictor, tmp_path: Path, named: Any) -> None:
    image, out = picture(tmp_path / "a.png"), tmp_path / "out"
    (out / "pictures").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    (out / "predictions.json").write_text(json.dumps({"rmoe": "1", "files": [named]}))
    with pytest.raises(UserError, match="no predictions of ours"):
        predict(run, [str(image)], out)
    assert (out / "notes.txt").exists()
    assert image.exists()


def test_many_names_take_no_square_of_the_time() -> None:
    assert len(set(files._names([f"/x/{number % 10}/{number}.jpg" for number in range(20_000)]))) == 20_000


def test_classes_without_names_have_numbers(tmp_path: Path) -> None:
    folder = segmentor(tmp_path / "run", "swin", None)
    metadata = rmoe.load(folder, device="cpu")
    state, about = metadata.model.state_dict(), {**metadata.metadata}
    del about["classes"]
    from rmoe.inference.load import predictor

    nameless = predictor(about, state, folder, "cpu")
    assert nameless.classes == ("class 0", "class 1", "class 2")
    assert len(nameless.palette) == 3
    assert predict(nameless, [str(picture(tmp_path / "a.jpg"))], tmp_path / "out") == (1, 0)
    many = predictor({**about, "model": _with_classes(about["model"], 300)}, _grown(state, 300), folder, "cpu")
    (answer,) = many.predict(np.zeros((8, 8, 3), np.uint8))
    assert answer.labels.dtype == np.uint16  # type: ignore[union-attr]


def _with_classes(model: dict[str, Any], count: int) -> dict[str, Any]:
    return {**model, "decode_head": {**model["decode_head"], "num_classes": count}}


def _grown(state: dict[str, Any], count: int) -> dict[str, Any]:
    return {k: torch.zeros(count, *x.shape[1:]) if "conv_seg" in k else x for k, x in state.items()}


def test_deep_images_are_refused_however_they_are_given(run: Predictor) -> None:
    for image in (Image.fromarray(np.zeros((4, 4), np.uint16)), Image.new("F", (4, 4)), Image.new("I", (4, 4))):
        with pytest.raises(UserError, match="of more than 8 bits a channel"):
            run.predict(image)


def test_a_folder_of_a_users_own_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    with pytest.raises(UserError, match=r"out.partial is in the way.*move it away"), new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out.partial" / "mine").exists()
    with new_folder(tmp_path / "other") as folder:
        (folder / "x").touch()
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["x"]


def test_names_do_not_steer_the_terminal(capsys: Any) -> None:
    classes = {name: {"IoU": 1.0} for name in ("[void]", "[/x]", "a\x1b[2Jb", "c\nd")}
    show(Evaluation(os.fsdecode(b"\xff.pth"), "val", None, 1, (), False, {"[/mIoU]": 1.0}, classes))
    said = capsys.readouterr().out
    assert all(word in said for word in ("[void]", "[/x]", "a?[2Jb", "c?d", "[/mIoU]: 1", "?.pth"))
    assert "\x1b" not in said
