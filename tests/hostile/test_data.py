"""Hostile and wrong data: each is told in one line that names what was found, by the check and before training."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rmoe.cli import main
from rmoe.data.archives import Packed, class_names, find_split, index
from rmoe.data.arguments import check_arguments, require_count
from rmoe.data.check import check_image_folder, check_segmentation, require
from rmoe.data.classes import class_list
from rmoe.data.coco import check_annotations, check_coco, check_images, read_annotations
from rmoe.data.emoji_scenes.params import SceneParams
from rmoe.data.emoji_scenes.scenes import render
from rmoe.data.images import read_image, read_label_map
from rmoe.data.preflight import preflight
from rmoe.data.prepare import prepare
from rmoe.errors import UserError


def refused(run: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        run()
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1500


# --- annotation files -------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
RUNS = {"size": [6, 8], "counts": [10, 5, 33]}


def content() -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 6, "width": 8}],
        "categories": [{"id": 7, "name": "dog"}],
        "annotations": [
            {
                "id": 3,
                "image_id": 1,
                "category_id": 7,
                "bbox": [1, 1, 4, 3],
                "area": 12.0,
                "iscrowd": 0,
                "segmentation": [[1, 1, 5, 1, 5, 4.5]],
            }
        ],
    }


def polygon(*numbers: Any) -> dict[str, Any]:
    return {"segmentation": [list(numbers)]}


def runs(**changed: Any) -> dict[str, Any]:
    return {"segmentation": {**RUNS, **changed}}


ANNOTATIONS: list[tuple[dict[str, Any], str]] = [
    (polygon(1, 1, 5, 1, 5, NAN), "annotation 3 has segmentation .*nan.*at least 6 finite numbers"),
    (polygon(1, 1, 5, 1, 5, INF), "segmentation .*inf"),
    (polygon(1, 1, 5, 1, 5, -INF), "segmentation .*-inf"),
    (polygon(1, 1, 5, 1, 5, 1e300), "the polygon .*1e.300.* in an image of 8 x 6 pixels"),
    (polygon(1, 1, 5, 1, 5, 10**400), "segmentation .*1000"),
    (polygon(1, 1, 5, 1, 5, 1e9), "the polygon .*1000000000.0"),
    (polygon(-1e6, 1, 5, 1, 5, 4), "the polygon .*-1000000.0"),
    (polygon(1, 1, 5, 1, 5, 4, 4), "segmentation .*an even count"),
    (polygon(1, 1, 5, 1), r"segmentation \[\[1, 1, 5, 1\]\]"),
    (polygon(), r"segmentation \[\[\]\]"),
    (polygon(1, 1, 5, 1, 5, "4"), "segmentation .*'4'"),
    (polygon(1, 1, 5, 1, 5, None), "segmentation .*None"),
    (polygon(1, 1, 5, 1, 5, True), "segmentation .*True"),
    (polygon([1, 1], [5, 1], [5, 4]), r"segmentation \[\[\[1, 1\]"),
    ({"segmentation": [1, 1, 5, 1, 5, 4]}, r"segmentation \[1, 1, 5"),
    ({"segmentation": "1 1 5 1 5 4"}, "segmentation '1 1 5 1 5 4'"),
    ({"segmentation": 7}, "segmentation 7"),
    ({"segmentation": {"size": [6, 8]}}, "segmentation {'size'"),
    (runs(counts=[10, 5, "33"]), "segmentation .*counts"),
    (runs(counts=[10, -5, 43]), "segmentation .*-5"),
    (runs(counts=[10, 5, 33.0]), "segmentation .*33.0"),
    (runs(counts=[10, 5, 10**400]), "segmentation .*counts"),
    (runs(counts=[10, 5, 2**40]), "whose runs do not add up"),
    (runs(counts=None), "segmentation .*None"),
    (runs(counts=7), "segmentation .*'counts': 7"),
    (runs(counts=""), "whose runs do not add up"),
    (runs(counts="oooooooooooooooooooooooo"), "whose runs do not add up"),
    (runs(counts="\x00\x7f"), "whose runs do not add up"),
    (runs(counts="é1"), "whose runs do not add up"),
    (runs(counts="1O1"), "whose runs do not add up"),
    (runs(size=[6]), r"segmentation .*\[6\]"),
    (runs(size="6x8"), "segmentation .*'6x8'"),
    (runs(size=[6.0, 8.0]), "segmentation .*6.0"),
    (runs(size=[2**40, 8]), "a mask of size .*in an image of 8 x 6"),
    ({"bbox": [1, 1, 4, NAN]}, "the box .*nan"),
    ({"bbox": [1, 1, 4, INF]}, "the box .*inf"),
    ({"bbox": [1, 1, 10**400, 2]}, "the box .*1000"),
    ({"bbox": [1, 1, True, 2]}, "the box .*True"),
    ({"bbox": {"x": 1}}, "the box {'x': 1}"),
    ({"area": NAN}, "has area nan"),
    ({"area": "12"}, "has area '12'"),
    ({"id": 1.5}, "annotation number 0 has id 1.5"),
    ({"id": True}, "annotation number 0 has id True"),
    ({"id": [1]}, r"annotation number 0 has id \[1\]"),
    ({"id": 10**400}, "has id 1000"),
    ({"image_id": {}}, "has image_id {}"),
    ({"category_id": "7"}, "has category_id '7'"),
    ({"category_id": 7.0}, "has category_id 7.0"),
    ({"iscrowd": "no"}, "has iscrowd 'no'"),
    ({"iscrowd": 2}, "has iscrowd 2"),
]
IMAGES: list[tuple[dict[str, Any], str]] = [
    ({"file_name": "/etc/passwd.jpg"}, "file_name '/etc/passwd.jpg'.*within the folder"),
    ({"file_name": "../1.jpg"}, "file_name '../1.jpg'"),
    ({"file_name": "a/../../1.jpg"}, "file_name 'a/../../1.jpg'"),
    ({"file_name": "1\0.jpg"}, r"file_name '1\\x00.jpg'"),
    ({"file_name": ""}, "file_name ''"),
    ({"file_name": "x" * 300}, "file_name 'xxx"),
    ({"file_name": "\ud800.jpg"}, r"file_name '\\ud800.jpg'"),
    ({"file_name": 12}, "file_name 12"),
    ({"file_name": ["1.jpg"]}, r"file_name \['1.jpg'\]"),
    ({"height": 0}, "height 0"),
    ({"height": -6}, "height -6"),
    ({"height": 6.0}, "height 6.0"),
    ({"height": True}, "height True"),
    ({"width": NAN}, "width nan"),
    ({"width": 10**400}, "width 1000"),
    ({"width": 10**9, "height": 10**9}, "image 1 has 1000000000 x 1000000000 pixels"),
    ({"id": None}, "image number 0 has id None"),
    ({"id": 1.0}, "image number 0 has id 1.0"),
]
CATEGORIES: list[tuple[dict[str, Any], str]] = [
    ({"name": 7}, "category 7 has name 7"),
    ({"name": ["dog"]}, r"category 7 has name \['dog'\]"),
    ({"name": "\ud800"}, r"category 7 has name '\\ud800'"),
    ({"id": "7"}, "category 7 has id '7'|category '7' has id '7'"),
    ({"id": False}, "category number 0 has id False"),
]
FIELDS = [
    *(("annotations", *one) for one in ANNOTATIONS),
    *(("images", *one) for one in IMAGES),
    *(("categories", *one) for one in CATEGORIES),
]


@pytest.mark.parametrize(("key", "changed", "message"), FIELDS, ids=range(len(FIELDS)))
def test_fields_of_annotation_files(key: str, changed: dict[str, Any], message: str) -> None:
    wrong = content()
    wrong[key][0] |= changed
    refused(lambda: require(check_annotations(wrong, "a.json").problems), f"^a.json: .*{message}")


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
@pytest.mark.parametrize("item", [None, 7, "x", [], [[]]])
def test_items_that_are_no_objects(key: str, item: Any) -> None:
    wrong = {**content(), key: [item]}
    refused(lambda: require(check_annotations(wrong, "a.json").problems), "number 0 is ")


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_empty_lists(key: str) -> None:
    wrong = {**content(), key: []}
    refused(lambda: require(check_annotations(wrong, "a.json").problems), f"the list '{key}' is empty")


def test_what_is_allowed() -> None:
    """Sound content, without masks and crowds too; run lengths as numbers and compressed."""
    for changed in ({}, {"segmentation": None}, {"segmentation": []}, runs(), runs(counts=":5Q1"), {"iscrowd": True}):
        sound = content()
        sound["annotations"][0] |= changed
        assert check_annotations(sound, "a.json").problems == []
    del sound["annotations"][0]["iscrowd"], sound["annotations"][0]["segmentation"]
    assert check_annotations(sound, "a.json").problems == []


FILES: dict[str, tuple[bytes, str]] = {
    "NaN": (b'{"images": [NaN]}', "a.json holds NaN; numbers in it are finite"),
    "-Infinity": (b'{"images": [-Infinity]}', "a.json holds -Infinity"),
    "twice": (b'{"images": [], "images": [1]}', "a.json has the key 'images' twice"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000, "nested too deeply"),
    "digits": (b'{"images": [' + b"9" * 5000 + b"]}", "no whole JSON"),
    "latin 1": ('{"images": ["é"]}'.encode("latin-1"), "no whole JSON"),
    "utf-16 cut": ('{"images": ["é"]}'.encode("utf-16")[:-3], "no whole JSON"),
    "empty": (b"", "no whole JSON"),
    "null": (b"null", "has no list 'images'"),
    "a number": (b"7", "has no list 'images'"),
    "zeros": (bytes(100), "no whole JSON"),
}


@pytest.mark.parametrize("kind", FILES)
def test_annotation_files(kind: str, tmp_path: Path) -> None:
    text, message = FILES[kind]
    (tmp_path / "a.json").write_bytes(text)
    refused(lambda: read_annotations(tmp_path / "a.json"), message)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "a.json").rename(tmp_path / "annotations" / "instances_train.json")
    refused(lambda: require(check_coco(tmp_path).problems), "instances_train.json")


def test_other_encodings_of_json_are_read(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "a.json").write_bytes(json.dumps(content()).encode(encoding))
        assert read_annotations(tmp_path / "a.json") == content()


def test_files_of_images(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").mkdir()
    refused(
        lambda: require(check_images(content(), tmp_path, full=True).problems), "1 of 1 images are not in .*: 1.jpg"
    )
    refused(
        lambda: require(check_images(content(), tmp_path / ("x" * 300), full=True).problems),
        "folder .*xxx.* does not exist",
    )
    refused(lambda: read_annotations(tmp_path), "cannot be read .*directory")


# --- images -----------------------------------------------------------------------------------------------------------


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def encoded(mode: str, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 200, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).convert("L" if mode in ("F", "I", "I;16") else mode).convert(mode).save(
        file, form, **options
    )
    return file.getvalue()


def changed(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


JPEG = encoded("RGB", "JPEG")
PNG = encoded("RGB")
UNREADABLE: dict[str, bytes] = {
    "nothing": b"",
    "text": b"<html>404</html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="6"></svg>',
    "jpeg, half": JPEG[: len(JPEG) // 2],
    "jpeg, header alone": JPEG[:30],
    "jpeg, no tables": JPEG[:2] + JPEG[-200:],
    "jpeg, size 0": changed(JPEG, JPEG.index(b"\xff\xc0") + 5, b"\0\0\0\0"),
    "png, half": PNG[: len(PNG) // 2],
    "png, checksum": changed(PNG, 29, b"\0\0\0\0"),
    "png, zlib": changed(PNG, 60, b"\xff" * 40),
    "png, no data": png(8, 6, 8, 0, b""),
    "png, odd depth": png(8, 6, 3, 0, b"\0" * 54),
    "png, palette of nothing": changed(png(8, 6, 8, 3, b"\0" * 54), 25, b"\x07"),
    "png, text bomb": png(8, 6, 8, 0, b"\0" * 54, *[(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**21)))] * 40),
    "bomb": png(2**31 - 1, 2**31 - 1, 8, 0, b"\0"),
    "large, a warning in Pillow": png(10_000, 10_000, 8, 0, b"\0"),
    "gif, cut": encoded("P", "GIF")[:100],
    "bmp, cut": encoded("RGB", "BMP")[:80],
    "bmp, header of length 3": changed(encoded("RGB", "BMP"), 14, b"\3\0\0\0"),
    "tiff, cut": encoded("RGB", "TIFF")[:60],
    "tiff, tags": changed(encoded("RGB", "TIFF"), 8, b"\xff" * 100),
    "webp, cut": encoded("RGB", "WEBP")[:60],
    "ppm, words": b"P6 eight six 255 ",
    "ppm, cut": b"P6 8 6 255 abc",
    "zip": b"PK\x05\x06" + bytes(18),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_files_that_are_no_images(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(UNREADABLE[kind])
    refused(lambda: read_image(str(path)), f"^{path} is no readable image .*; restore or remove")
    refused(lambda: read_image("x in y.zip", UNREADABLE[kind]), "^x in y.zip is no readable image")
    refused(lambda: read_label_map(str(path)), f"^{path} is no readable label map")


def test_places_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("folder", "dangling", "loop", "zero", "pipe", "x" * 300, "missing", "null\0"):
        refused(lambda name=name: read_image(str(tmp_path / f"{name}.jpg")), "is no readable image")


@pytest.mark.parametrize(("mode", "form"), [("I;16", "PNG"), ("F", "TIFF"), ("I", "TIFF"), ("I;16", "TIFF")])
def test_depths_that_would_be_cut_off(mode: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(encoded(mode, form))
    refused(lambda: read_image(str(path)), f"image {path} has mode {mode[0]}.* 8 bits")
    refused(lambda: read_label_map(str(path)), f"label map {path} has mode {mode[0]}.*; it must be 8-bit")


@pytest.mark.parametrize("mode", ["1", "RGB", "RGBA", "LA", "CMYK"])
def test_label_maps_of_other_modes(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    path.write_bytes(encoded(mode, "TIFF" if mode == "CMYK" else "PNG"))
    refused(lambda: read_label_map(str(path)), f"has mode {mode}; it must be 8-bit with one channel")
    assert read_image(str(path)).size == (80, 60)


@pytest.mark.parametrize(("depth", "row"), [(2, b"\0\x1b"), (4, b"\0\x12\x34")])
def test_grey_values_of_fewer_bits_would_be_scaled(depth: int, row: bytes, tmp_path: Path) -> None:
    refused(lambda: read_label_map("m.png", png(4, 1, depth, 0, row)), f"m.png has mode L;{depth}")
    colours = png(4, 1, depth, 3, row, (b"PLTE", bytes(range(48))))
    assert read_label_map("m.png", colours).tolist() == [[0, 1, 2, 3] if depth == 2 else [1, 2, 3, 4]]


# --- archives ---------------------------------------------------------------------------------------------------------


def zipped(*members: str, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name in members or ("ant/1.jpg", "bee/1.jpg"):
            archive.writestr(name, JPEG)
    return file.getvalue()


def central(content: bytes, at: int, new: bytes, local: int | None = None) -> bytes:
    """A zip with another field in its list of members, and in the first member's own header."""
    content = changed(content, content.index(b"PK\x01\x02") + at, new)
    return content if local is None else changed(content, local, new)


def tarred(**changes: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=changes.pop("format", tarfile.PAX_FORMAT)) as archive:
        for name in ("ant/1.jpg", "bee/1.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(JPEG)
            for key, value in changes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(JPEG))
    return file.getvalue()


def header(at: int, new: bytes, number: int = 1) -> bytes:
    """A tar with another field in the header of a member, its checksum mended."""
    start = number * (512 + -(-len(JPEG) // 512) * 512)
    content = changed(tarred(), start + at, new)
    block = changed(content[start : start + 512], 148, b" " * 8)
    return changed(content, start + 148, b"%06o\0 " % sum(block))


ARCHIVES: dict[str, tuple[str, bytes]] = {
    "zip, nothing": ("zip", b""),
    "zip, empty": ("zip", zipped()[-22:-12] + bytes(12)),
    "zip, bzip2": ("zip", zipped(method=zipfile.ZIP_BZIP2)),
    "zip, lzma": ("zip", zipped(method=zipfile.ZIP_LZMA)),
    "zip, deflate64": ("zip", central(zipped(), 10, b"\x09\0", 8)),
    "zip, method 99": ("zip", central(zipped(), 10, b"\x63\0", 8)),
    "zip, encrypted": ("zip", central(zipped(), 8, b"\1\0", 6)),
    "zip, version 99": ("zip", central(zipped(), 6, b"\x63\0", 4)),
    "zip, member outside": ("zip", central(zipped(), 42, b"\xff\xff\xff\x7f")),
    "zip, absurd size": ("zip", central(zipped(), 20, b"\xff\xff\xff\x7f")),
    "zip, list outside": ("zip", changed(zipped(), len(zipped()) - 6, b"\xff\xff\xff\x7f")),
    "zip, list of wrong length": ("zip", changed(zipped(), len(zipped()) - 10, b"\xff\xff\0\0")),
    "zip, names": ("zip", central(zipped(), 28, b"\xff\xff")),
    "tar, nothing": ("tar", b""),
    "tar, text": ("tar", b"hello" * 300),
    "tar, checksum": ("tar", changed(tarred(), 148, b"999999")),
    "tar, no number": ("tar", header(124, b"zzzzzzzzzzz\0", 0)),
    "tar, a later one without number": ("tar", header(124, b"zzzzzzzzzzz\0")),
    "tar, negative size": ("tar", header(124, b"\xff" * 10 + b"\xf0\0", 0)),
    "tar, a later negative size": ("tar", header(124, b"\xff" * 10 + b"\xf0\0")),
    "tar, absurd size": ("tar", header(124, b"\x80" + b"\x7f" * 11)),
    "tar, pax size": ("tar", tarred(pax_headers={"size": "99999999999999999999"})),
    "tar, sparse": ("tar", tarred(pax_headers={"GNU.sparse.map": "a,b", "GNU.sparse.size": "q"})),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives(kind: str, tmp_path: Path) -> None:
    suffix, damaged = ARCHIVES[kind]
    path = tmp_path / f"train.{suffix}"
    path.write_bytes(damaged)
    refused(lambda: class_names(find_split(tmp_path, "train")), str(path))
    assert [problem.kind for problem in check_image_folder(path, full=True).problems] == ["archive"]
    official = tmp_path / "official"
    official.mkdir()
    for name in ("train2017.zip", "val2017.zip", "annotations_trainval2017.zip"):
        (official / name).write_bytes(damaged)
    refused(lambda: prepare("coco", official, tmp_path / "out"), str(official))
    assert not (tmp_path / "out").exists()


def test_a_member_that_unpacks_to_more_than_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ant.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.jpg", JPEG + bytes(2**20))
    packed = Packed([path], [index(path)], ["ant"])
    assert packed.image(0).size == (80, 60)
    monkeypatch.setattr("rmoe.data.archives._MOST_BYTES", 2**19)
    refused(lambda: packed.image(0), "1.jpg in .*ant.zip is no readable image .*longer than 524288 bytes")


def test_an_archive_that_changed_after_it_was_indexed(tmp_path: Path) -> None:
    path = tmp_path / "ant.zip"
    path.write_bytes(zipped("1.jpg"))
    packed = Packed([path], [index(path)], ["ant"])
    for other in (b"", zipped("a/longer/name.jpg", "1.jpg")[200:]):
        path.write_bytes(other)
        refused(lambda: packed.image(0), "ant.zip")


MATLAB = {
    "no table": b"",
    "text": b"hello",
    "v7.3": b"MATLAB 7.3 MAT-file" + bytes(105) + b"\0\2IM" + b"\x89HDF\r\n\x1a\n",
    "zeros": bytes(300),
}


@pytest.mark.parametrize("kind", [*MATLAB, "other names", "numbers alone"])
def test_a_devkit_without_its_table(kind: str, tmp_path: Path) -> None:
    from scipy.io import savemat

    table = io.BytesIO(MATLAB.get(kind, b""))
    if kind == "other names":
        savemat(table, {"classes": np.arange(3)})
    elif kind == "numbers alone":
        savemat(table, {"synsets": np.arange(3)})
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        (tmp_path / name).write_bytes(tarred())
    files = {"meta.mat": table.getvalue(), "ILSVRC2012_validation_ground_truth.txt": b"1\n2\n"}
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"devkit/data/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    refused(lambda: prepare("imagenet", tmp_path, tmp_path / "out"), "devkit_t12.tar.gz has no table of synsets")


def test_a_devkit_that_is_none(tmp_path: Path) -> None:
    for name in ("img_train.tar", "img_val.tar", "devkit_t12.tar.gz"):
        (tmp_path / f"ILSVRC2012_{name}").write_bytes(b"hello" * 300)
    refused(lambda: prepare("imagenet", tmp_path, tmp_path / "out"), "devkit_t12.tar.gz cannot be read")


# --- class lists ------------------------------------------------------------------------------------------------------

LISTS: dict[str, tuple[str, bytes | None, str]] = {
    "empty": ("c.txt", b"", "holds no list of names"),
    "blank": ("c.txt", b"\n  \n", "holds no list of names"),
    "empty JSON": ("c.json", b"", "cannot be read"),
    "empty list": ("c.json", b"[]", "holds no list of names"),
    "numbers": ("c.json", b"[1, 2]", "has the name 1; a name is text"),
    "null": ("c.json", b"null", "holds no list of names"),
    "one text": ("c.json", b'"dog"', "holds no list of names"),
    "an object": ("c.json", b'{"dog": 1}', "cannot be read .*classes"),
    "an object of classes": ("c.json", b'{"classes": {"dog": 1}}', "holds no list of names"),
    "an empty name": ("c.json", b'["dog", ""]', "has the name ''"),
    "a blank name": ("c.json", b'["dog", " "]', "has the name ' '"),
    "twice": ("c.txt", b"dog\ncat\ndog\n", "has the name 'dog' twice"),
    "surrogates": ("c.json", b'["\\ud800"]', "has the name"),
    "null byte": ("c.txt", b"dog\0\ncat", "has the name"),
    "utf-16": ("c.txt", "dog\ncat".encode("utf-16"), "cannot be read"),
    "latin-1": ("c.txt", "chêne".encode("latin-1"), "cannot be read"),
    "deep": ("c.json", b"[" * 100_000, "cannot be read .it is nested too deeply"),
    "categories": ("c.json", b'{"categories": [{"id": 1, "name": "a"}, {"id": "2", "name": "b"}]}', "cannot be read"),
    "palette of 1": ("c.json", b'{"classes": ["a", "b"], "palette": [[1, 2, 3]]}', "has 1 colours for 2 names"),
    "palette of text": ("c.json", b'{"classes": ["a", "b"], "palette": "red"}', "has 0 colours for 2 names"),
    "palette of other": ("c.json", b'{"classes": ["a", "b"], "palette": [[1, 2, 3], [1, 2, 999]]}', "has 1 colours"),
    "missing": ("c.txt", None, "cannot be read .*No such file"),
}


@pytest.mark.parametrize("kind", LISTS)
def test_class_lists(kind: str, tmp_path: Path) -> None:
    name, text, message = LISTS[kind]
    if text is not None:
        (tmp_path / name).write_bytes(text)
    refused(lambda: class_list(str(tmp_path / name), 2), f"the class list {tmp_path / name} {message}")


@pytest.mark.parametrize(
    "classes", [None, 7, [], {}, [1, 2], ["a", None], ["a", "a"], ["a", ""], True, b"ab", ["a", "b\n"]]
)
def test_class_lists_in_a_config(classes: Any) -> None:
    refused(lambda: class_list(classes, 2), "the class list (holds no|has the) (list of )?name")


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes("dog\ncat\n".encode("utf-8-sig"))
    assert class_list(tmp_path / "c.txt", 2).names == ("dog", "cat")


# --- arguments --------------------------------------------------------------------------------------------------------

COUNTS = [0, -1, "3", 2.5, True, None, [3], NAN]


@pytest.mark.parametrize("count", COUNTS)
def test_numbers_of_classes(count: Any, tmp_path: Path) -> None:
    refused(
        lambda: require_count("num_classes", count, most=255), "num_classes is .*; it is a whole number from 1 to 255"
    )
    refused(lambda: class_list(["a", "b"], count if count is not None else 0), "num_classes")
    dataset = {"type": "rmoe.ImageFolder", "root": str(tmp_path), "split": "train", "num_classes": count}
    refused(lambda: preflight({"train_dataloader": {"dataset": dataset}}), "num_classes is ")


ARGUMENTS: list[tuple[str, Any]] = [
    *(("root", value) for value in (None, 7, [], "a\0b")),
    *(("split", value) for value in (None, "", 7, ["train"])),
    *(("data_root", value) for value in (7, ["data"], {}, "a\0b", True)),
    *(("data_prefix", value) for value in ("images", ["images"], {"img_path": 7}, {"img_path": ["a"]})),
    *(("ann_file", value) for value in (7, {}, ["a.json"])),
    *(("img_suffix", value) for value in (7, "", [".jpg", ".png"])),
    *(("seg_map_suffix", value) for value in (7, {})),
    *(("classes", value) for value in (None, 7, {"a": 1})),
]


@pytest.mark.parametrize(("name", "value"), ARGUMENTS)
def test_arguments_of_data_sets(name: str, value: Any) -> None:
    refused(lambda: check_arguments({name: value}), f"a data set's {name} is .*; it is ")
    dataset = {"type": "rmoe.ADE20K", name: value}
    refused(lambda: preflight({"val_dataloader": {"dataset": dataset}}), f"a data set's {name} is ")


@pytest.mark.parametrize("loader", [None, 7, [], "x", {"dataset": 7}, {"dataset": {"datasets": 7}}, {"dataset": [1]}])
def test_loaders_of_other_types_are_left_to_others(loader: Any) -> None:
    preflight({"train_dataloader": loader, "val_dataloader": loader})


SCENES: list[tuple[str, Any]] = [
    *(("seed", value) for value in ("0", 1.5, True, None, -1, 2**40)),
    *(("scene_size", value) for value in (0, 31, NAN, INF, [64])),
    *(("scenes_train", value) for value in (0, -5, 10**400)),
    *(("long_tail", value) for value in ("1", NAN, INF, -0.5, None, True)),
    *(("styles", value) for value in ("plain", (), ("plain", "plain"), ("purple",), (1,), None, (["plain"],))),
]


@pytest.mark.parametrize(("name", "value"), SCENES)
def test_parameters_of_scenes(name: str, value: Any) -> None:
    refused(lambda: SceneParams(**{name: value}), "^styles? |" + f"^{name} is ")


@pytest.mark.parametrize("jobs", [0, -1, 1.5, "2", None])
def test_jobs(jobs: Any, tmp_path: Path) -> None:
    refused(lambda: render(tmp_path / "out", SceneParams(), jobs=jobs), "jobs is ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300, "loop"])
def test_places_where_no_scenes_can_be_written(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "loop").symlink_to("loop")
    refused(lambda: render(tmp_path / place, SceneParams()), "cannot write|is no data set")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    "manifest", ["[]", "7", '{"format": 1}', "[" * 100_000, '{"format":1,"parameters":[],"files":1}']
)
def test_manifests_of_scenes(manifest: str, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(manifest)
    refused(lambda: render(tmp_path, SceneParams()), "is no data set of this command")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["ade20k", "coco", "imagenet"])
@pytest.mark.parametrize("place", ["file", "file/below", "empty", "nowhere", "x" * 300, "loop"])
def test_paths_that_hold_no_data_set(layout: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    assert main(["data", "check", layout, str(tmp_path / place)]) == 2
    assert str(tmp_path / place) in capsys.readouterr().out


@pytest.mark.parametrize("number", ["0", "-1", "256"])
def test_number_of_classes_of_the_command(number: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "check", "ade20k", str(tmp_path), "--num-classes", number]) == 2
    assert f"num_classes is {number}; it is a whole number from 1 to 255" in capsys.readouterr().err


def unreadable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def deny(path: Any) -> Any:
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", deny)


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("images/a", "maps/a", "train/ant", "train/bee"):
        (tmp_path / folder).mkdir(parents=True)
    unreadable(tmp_path / "images" / "a", monkeypatch)
    refused(lambda: check_segmentation(tmp_path / "images", tmp_path / "maps", 3), "images/a cannot be read .*denied")
    (tmp_path / "annotations").mkdir()
    unreadable(tmp_path / "annotations", monkeypatch)
    refused(lambda: check_coco(tmp_path), "annotations cannot be read .*denied")
    unreadable(tmp_path / "train" / "ant", monkeypatch)
    refused(lambda: require(check_image_folder(tmp_path / "train").problems), "train/ant cannot be read .*denied")
