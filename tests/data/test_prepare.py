"""Unpacks tiny archives of the official structure, which are made here."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from rmoe.cli import main
from rmoe.data.partial import MARKER
from rmoe.data.prepare import prepare
from rmoe.errors import UserError

SYNSETS = ("n01440764", "n01443537")


def image(mode: str = "RGB", form: str = "JPEG", value: int = 1) -> bytes:
    out = io.BytesIO()
    Image.new(mode, (8, 6), value if mode == "L" else (value,) * 3).save(out, form)
    return out.getvalue()


def write_zip(path: Path, files: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tar_bytes(files: dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def ade20k(tmp_path) -> Path:
    top = "ADEChallengeData2016"
    files: dict[str, bytes | str] = {
        f"{top}/": "",
        f"{top}/objectInfo150.txt": "Idx\tRatio\tName\n1\t1\tsky\n2\t1\tdog\n",
    }
    for split, short in (("training", "train"), ("validation", "val")):
        for number in (1, 2):
            stem = f"{split}/ADE_{short}_{number:08d}"
            files[f"{top}/images/{stem}.jpg"] = image()
            files[f"{top}/annotations/{stem}.png"] = image("L", "PNG", number)
    (tmp_path / "ade").mkdir()
    write_zip(tmp_path / "ade" / f"{top}.zip", files)
    return tmp_path / "ade"


@pytest.fixture
def coco(tmp_path) -> Path:
    source = tmp_path / "coco"
    source.mkdir()
    content = {
        "images": [{"id": 1, "file_name": "000000000001.jpg", "height": 6, "width": 8}],
        "categories": [{"id": 18, "name": "dog"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 18, "bbox": [1, 1, 3, 3], "area": 9, "iscrowd": 0}],
    }
    for split in ("train2017", "val2017"):
        write_zip(source / f"{split}.zip", {f"{split}/": "", f"{split}/000000000001.jpg": image()})
    names = [
        f"annotations/{kind}_{split}.json" for kind in ("captions", "instances") for split in ("train2017", "val2017")
    ]
    write_zip(source / "annotations_trainval2017.zip", {name: json.dumps(content) for name in names})
    return source


@pytest.fixture
def imagenet(tmp_path) -> Path:
    source = tmp_path / "imagenet"
    source.mkdir()
    classes = {f"{s}.tar": tar_bytes({f"{s}_{number}.JPEG": image() for number in (3, 10)}) for s in SYNSETS}
    (source / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(classes))
    val = {f"ILSVRC2012_val_{number:08d}.JPEG": image() for number in (1, 2, 3)}
    (source / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(val))
    ids = np.array([(7, SYNSETS[0]), (2, SYNSETS[1])], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    table = io.BytesIO()
    savemat(table, {"synsets": ids})
    folder = "ILSVRC2012_devkit_t12/data"
    devkit = {f"{folder}/meta.mat": table.getvalue(), f"{folder}/ILSVRC2012_validation_ground_truth.txt": b"2\n7\n2\n"}
    (source / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_bytes(devkit, "w:gz"))
    return source


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def refused(message: str, kind: str, source: Path, out: Path, synsets: Path | None = None) -> None:
    with pytest.raises(UserError, match=message):
        prepare(kind, source, out, synsets)
    assert not out.exists() or not any(out.iterdir())


def test_ade20k(ade20k, tmp_path, capsys):
    out = tmp_path / "data" / "ade"
    assert main(["data", "prepare", "ade20k", str(ade20k), str(out)]) == 0
    assert files(out)[:2] == [
        "annotations/training/ADE_train_00000001.png",
        "annotations/training/ADE_train_00000002.png",
    ]
    assert len(files(out)) == 9
    printed = capsys.readouterr().out
    assert "training images: 2\n" in printed
    assert printed.endswith(f"{out}: no problems found\n")
    assert [path.name for path in out.parent.iterdir()] == ["ade"]


def test_coco(coco, tmp_path, capsys):
    out = tmp_path / "data"
    out.mkdir()  # empty: allowed
    assert main(["data", "prepare", "coco", str(coco), str(out)]) == 0
    assert files(out) == [
        "annotations/captions_train2017.json",
        "annotations/captions_val2017.json",
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
        "train2017/000000000001.jpg",
        "val2017/000000000001.jpg",
    ]


def test_imagenet(imagenet, tmp_path, capsys):
    out = tmp_path / "data"
    assert main(["data", "prepare", "imagenet", str(imagenet), str(out)]) == 0
    assert files(out) == [
        *(f"train/{synset}/{synset}_{number}.JPEG" for synset in SYNSETS for number in (10, 3)),
        f"val/{SYNSETS[0]}/ILSVRC2012_val_00000002.JPEG",
        f"val/{SYNSETS[1]}/ILSVRC2012_val_00000001.JPEG",
        f"val/{SYNSETS[1]}/ILSVRC2012_val_00000003.JPEG",
    ]
    assert "val images: 3" in capsys.readouterr().out


@pytest.mark.parametrize("named", [False, True])
def test_imagenet_with_a_list_of_synsets(imagenet, tmp_path, named):
    (imagenet / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    refused("there is no .*devkit_t12.tar.gz; or name a file .* --synsets", "imagenet", imagenet, tmp_path / "data")
    lines = [f"ILSVRC2012_val_{number:08d}.JPEG " * named + SYNSETS[number % 2] for number in (1, 2, 3)]
    (tmp_path / "val.txt").write_text("\n".join(reversed(lines) if named else lines))
    prepare("imagenet", imagenet, tmp_path / "data", tmp_path / "val.txt")
    assert (tmp_path / "data" / "val" / SYNSETS[0] / "ILSVRC2012_val_00000002.JPEG").is_file()
    assert (tmp_path / "data" / "val" / SYNSETS[1] / "ILSVRC2012_val_00000003.JPEG").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01440764\n", "val.txt has 1 synsets, none for the image ILSVRC2012_val_00000002.JPEG"),
        ("../../x\n" * 3, r"val.txt has '../../x' for a synset; they look like n01440764"),
    ],
)
def test_synsets_that_do_not_fit(imagenet, tmp_path, text, message):
    (tmp_path / "val.txt").write_text(text)
    refused(message, "imagenet", imagenet, tmp_path / "data", tmp_path / "val.txt")


def test_a_run_that_was_interrupted_goes_on(coco, tmp_path):
    out, zipped = tmp_path / "data", coco / "val2017.zip"
    whole = zipped.read_bytes()
    zipped.write_bytes(whole[:-30])
    refused(f"{zipped} cannot be read to its end .*; it was cut short", "coco", coco, out)
    done = tmp_path / ".data.partial" / "train2017" / "000000000001.jpg"
    written = done.stat().st_mtime_ns
    zipped.write_bytes(whole)
    prepare("coco", coco, out)
    assert (out / "train2017" / "000000000001.jpg").stat().st_mtime_ns == written
    assert not (tmp_path / ".data.partial").exists()


def test_a_folder_that_no_run_has_left_is_left_alone(coco, tmp_path):
    mine = tmp_path / ".data.partial"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    refused(f"{mine} is in the way.*move it away", "coco", coco, tmp_path / "data")
    assert files(mine) == ["thesis.tex"]


def test_what_was_left_of_other_archives_is_made_anew(coco, tmp_path):
    partial = tmp_path / ".data.partial"
    partial.mkdir()
    (partial / MARKER).write_text(json.dumps({"unpacked": "coco", "archives": {"val2017.zip": 10**9}}))
    (partial / "val2017").mkdir()
    (partial / "val2017" / "stale.jpg").touch()
    prepare("coco", coco, tmp_path / "data")
    assert not [name for name in files(tmp_path / "data") if "stale" in name or MARKER in name]


def test_nothing_is_overwritten(coco, tmp_path):
    out = tmp_path / "data"
    out.mkdir()
    (out / "precious").write_text("")
    with pytest.raises(UserError, match=f"{out} holds something already"):
        prepare("coco", coco, out)
    assert files(out) == ["precious"]


@pytest.mark.parametrize(
    "name", ["../outside.jpg", "/tmp/outside.jpg", "train2017/../../outside.jpg", "train2017\\..\\x"]
)
def test_names_that_lead_out_of_the_folder(coco, tmp_path, name):
    write_zip(coco / "train2017.zip", {name: b""})
    refused("which leads out of the folder; it is not the official archive", "coco", coco, tmp_path / "data")
    assert not list(tmp_path.rglob("outside.jpg"))


@pytest.mark.parametrize("link", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_a_tar_holds_files_alone(imagenet, tmp_path, link):
    with tarfile.open(imagenet / "ILSVRC2012_img_val.tar", "w") as archive:
        member = tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")
        member.type, member.linkname = link, "/etc/passwd"
        archive.addfile(member)
    refused("which is no file of the official archive", "imagenet", imagenet, tmp_path / "data")


@pytest.mark.parametrize("kept", [0.5, 0.8, 0.99])
@pytest.mark.parametrize("name", ["train", "val"])
def test_a_tar_cut_short(imagenet, tmp_path, name, kept):
    path = imagenet / f"ILSVRC2012_img_{name}.tar"
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content[: int(len(content) * kept)])
    refused(f"{path} cannot be read to its end", "imagenet", imagenet, tmp_path / "data")


def test_a_tar_without_its_end(imagenet, tmp_path):
    path = imagenet / "ILSVRC2012_img_val.tar"
    path.write_bytes(path.read_bytes()[:2048])  # two images of three, whole
    refused(f"{path} cannot be read to its end", "imagenet", imagenet, tmp_path / "data")


def test_a_damaged_zip(ade20k, tmp_path):
    path = ade20k / "ADEChallengeData2016.zip"
    content = bytearray(path.read_bytes())
    content[content.index(b"\xff\xd8") + 40] ^= 1
    path.write_bytes(content)
    refused(f"{path} cannot be read to its end .*CRC", "ade20k", ade20k, tmp_path / "data")


def test_the_wrong_archive_of_ade20k(ade20k, tmp_path):
    path = ade20k / "ADEChallengeData2016.zip"
    path.unlink()
    refused(f"there is no {path}", "ade20k", ade20k, tmp_path / "data")
    full = {"ADE20K_2021_17_01/images/ADE/training/a/ADE_train_1_seg.png": b""}
    write_zip(ade20k / "ADE20K_2021_17_01.zip", full)
    refused("is the full ADE20K, .*; fetch SceneParse150", "ade20k", ade20k, tmp_path / "data")
    write_zip(path, full)
    refused(
        "holds 'ADE20K_2021_17_01/.*not only ADEChallengeData2016; fetch SceneParse150",
        "ade20k",
        ade20k,
        tmp_path / "data",
    )


def test_what_came_out_is_checked(ade20k, tmp_path, capsys):
    with zipfile.ZipFile(ade20k / "ADEChallengeData2016.zip", "a") as archive:
        archive.writestr("ADEChallengeData2016/annotations/training/ADE_train_00000009.png", image("L", "PNG"))
    assert main(["data", "prepare", "ade20k", str(ade20k), str(tmp_path / "data")]) == 2
    assert "1 of 3 label maps" in capsys.readouterr().out


def test_a_missing_folder(tmp_path):
    refused(
        "there is no folder .*nowhere; name the one with train2017.zip", "coco", tmp_path / "nowhere", tmp_path / "data"
    )
