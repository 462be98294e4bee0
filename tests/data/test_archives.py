"""Tests classification sets that stay packed: what is found in them, and what is said of broken ones."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rmoe.data.archives import Packed, archives_of, class_names, find_split, index, index_all
from rmoe.data.check import check_image_folder, check_imagenet
from rmoe.data.preflight import preflight
from rmoe.errors import UserError


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, shade, shade)).save(file, "JPEG", quality=95)
    return file.getvalue()


IMAGES = {"ant/1.jpg": picture(10), "ant/2.JPEG": picture(20), "bee/1.jpg": picture(30)}


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, members: dict[str, bytes], mode: Any = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def below(folder: str, members: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}{name}": content for name, content in members.items()}


def of_class(name: str) -> dict[str, bytes]:
    return {path.partition("/")[2]: content for path, content in IMAGES.items() if path.startswith(name)}


def read(root: Path) -> list[tuple[str, bytes]]:
    place = find_split(root, "train")
    archives = archives_of(place)
    members = [one for one in index_all(place, archives) if not isinstance(one, UserError)]
    packed, classes = Packed(archives, members, ["aaa", *class_names(place)]), ["aaa", *class_names(place)]
    return sorted((classes[packed.labels[i]], packed.read(i)) for i in range(len(packed)))


EXTRAS = {"README.txt": b"x", "__MACOSX/ant/._1.jpg": b"x", "ant/.hidden.jpg": b"x"}
PACKED = {
    "zip": lambda root: write_zip(root / "train.zip", IMAGES | EXTRAS),
    "stored zip": lambda root: write_zip(root / "train.zip", IMAGES, zipfile.ZIP_STORED),
    "zip with a top folder": lambda root: write_zip(root / "train.zip", {"train/": b""} | below("train/", IMAGES)),
    "tar": lambda root: write_tar(root / "train.tar", below("./", IMAGES)),
    "tar of each class": lambda root: [write_tar(root / "train" / f"{x}.tar", of_class(x)) for x in ("bee", "ant")],
    "zip of each class": lambda root: [
        write_zip(root / "train" / f"{x}.zip", below(f"{x}/", of_class(x))) for x in ("ant", "bee")
    ],
}


@pytest.mark.parametrize("kind", PACKED)
def test_all_layouts_hold_the_same(kind: str, tmp_path: Path) -> None:
    PACKED[kind](tmp_path)
    assert class_names(find_split(tmp_path, "train")) == ["ant", "bee"]
    assert read(tmp_path) == sorted((name.partition("/")[0], content) for name, content in IMAGES.items())
    report = check_image_folder(find_split(tmp_path, "train"), full=True)
    assert report.problems == []
    assert (report.counts["classes"], report.counts["images"]) == (2, 3)
    preflight({"train_dataloader": {"dataset": {"type": "rmoe.ImageFolder", "root": tmp_path, "split": "train"}}})


def test_a_folder_comes_before_an_archive(tmp_path: Path) -> None:
    write_zip(tmp_path / "train.zip", IMAGES)
    (tmp_path / "train").mkdir()
    assert find_split(tmp_path, "train") == tmp_path / "train"


NESTED = below("n1/", {"ant.tar": b""})
BROKEN = {
    "empty": (lambda root: write_zip(root / "train.zip", {"a.txt": b""}), "train.zip holds no image"),
    "nested": (lambda root: write_tar(root / "train.tar", IMAGES | NESTED), "train.tar holds the archive 'n1/ant.tar'"),
    "astray": (lambda root: write_zip(root / "train.zip", IMAGES | {"3.jpg": b""}), "the image '3.jpg' in no class"),
    "no archive": (lambda root: (root / "train.zip").write_bytes(picture(1)), "train.zip cannot be read to its end"),
    "compressed": (
        lambda root: write_tar(root / "train" / "ant.tar.gz", {}, "w:gz"),
        "ant.tar.gz cannot be read image",
    ),
    "packed oddly": (lambda root: write_zip(root / "train.zip", IMAGES, zipfile.ZIP_LZMA), "not deflated"),
    "two kinds": (lambda root: (write_zip(root / "train/ant.zip", IMAGES), (root / "train/bee").mkdir()), "one kind"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_ones_are_named(kind: str, tmp_path: Path) -> None:
    make, message = BROKEN[kind]
    make(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        class_names(find_split(tmp_path, "train"))
    assert "\n" not in str(raised.value)
    problem = check_imagenet(tmp_path).problems[0]
    assert (problem.kind, problem.message) == ("archive", str(raised.value))


def cut_zip(path: Path) -> list[bytes]:
    """Cuts in the end record, in the list of members and in the first image."""
    whole = write_zip(path, IMAGES).read_bytes()
    return [whole[:end] for end in (-1, -100, 200)]


def cut_tar(path: Path) -> list[bytes]:
    """Cuts after the last image, in it, after the first image, in it, and before everything."""
    whole, ends = write_tar(path, IMAGES).read_bytes(), [0]
    for content in IMAGES.values():
        ends.append(ends[-1] + 512 + -(-len(content) // 512) * 512)
    return [whole[:end] for end in (ends[3], ends[3] - 600, ends[1], 700, 0)]


@pytest.mark.parametrize(("name", "cut"), [("train.zip", cut_zip), ("train.tar", cut_tar)])
def test_one_that_was_cut_short(name: str, cut: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    for content in cut(path):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path} cannot be read to its end .*fetch it again"):
            index(path, "train")
        with pytest.raises(UserError, match=f"{path} was cut short"):
            preflight({"train_dataloader": {"dataset": {"type": "ImageFolder", "root": tmp_path, "split": "train"}}})


def test_members_that_are_no_images(tmp_path: Path) -> None:
    """Names archive and member of an image that was cut short before packing and of one that cannot be unpacked."""
    write_tar(tmp_path / "train" / "ant.tar", {"1.jpg": IMAGES["ant/1.jpg"][:200], "2.jpg": IMAGES["ant/2.JPEG"]})
    path = write_zip(tmp_path / "train" / "bee.zip", {"1.jpg": picture(1)})
    start = path.read_bytes().index(b"1.jpg") + 5
    path.write_bytes(path.read_bytes()[:start] + b"\xff" * 20 + path.read_bytes()[start + 20 :])
    problems = check_image_folder(tmp_path / "train", full=True).problems
    assert [problem.path for problem in problems] == [f"1.jpg in {tmp_path}/train/{x}" for x in ("ant.tar", "bee.zip")]
    assert {problem.kind for problem in problems} == {"unreadable"}
    assert check_image_folder(tmp_path / "train").problems == []


def add_link(path: Path, name: str, target: str, kind: bytes) -> None:
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        archive.addfile(info)


def test_links_in_a_tar_are_the_files_that_they_lead_to(tmp_path: Path) -> None:
    """As in a folder of the same files; tar itself writes a hard link for a file that it has packed before."""
    path = write_tar(tmp_path / "train.tar", below("./train/", IMAGES))
    add_link(path, "./train/bee/2.jpg", "./train/ant/1.jpg", tarfile.LNKTYPE)
    add_link(path, "./train/bee/3.jpg", "../ant/2.JPEG", tarfile.SYMTYPE)
    add_link(path, "./train/bee/4.jpg", "3.jpg", tarfile.SYMTYPE)
    add_link(path, "./train/bee/notes.txt", "gone.txt", tarfile.SYMTYPE)  # no image
    linked = [("bee", IMAGES["ant/1.jpg"]), *[("bee", IMAGES["ant/2.JPEG"])] * 2]
    assert read(tmp_path) == sorted([*((name[:3], content) for name, content in IMAGES.items()), *linked])


@pytest.mark.parametrize("target", ["gone.jpg", "../../../bee/1.jpg", "5.jpg", "../ant"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, target: str) -> None:
    path = write_tar(tmp_path / "train.tar", below("train/", IMAGES))
    add_link(path, "train/bee/5.jpg", target, tarfile.SYMTYPE)
    with pytest.raises(UserError, match=r"train.tar has 'train/bee/5.jpg' as a link to .*, which it does not hold"):
        index(path, "train")


def test_an_archive_that_has_gone_since_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x.jpg", b"no image")
    packed = Packed([tmp_path / "a.zip"], [index(tmp_path / "a.zip")], ["a"])
    (tmp_path / "a.zip").unlink()
    with pytest.raises(UserError, match=r"an image in .*a.zip, which can no longer be read, is no readable image"):
        packed.image(0)


def test_one_broken_archive_does_not_hide_the_others(tmp_path: Path) -> None:
    PACKED["tar of each class"](tmp_path)
    PACKED["zip"](tmp_path / "more")
    (tmp_path / "more" / "train.zip").rename(tmp_path / "val.zip")
    assert check_imagenet(tmp_path).problems == []
    cut = tmp_path / "train" / "ant.tar"
    cut.write_bytes(cut.read_bytes()[:900])
    report = check_imagenet(tmp_path)
    assert [problem.path for problem in report.problems] == [str(cut), str(tmp_path / "train")]
    assert (report.counts["train images"], report.counts["val images"]) == (1, 3)
