"""Unpacks the official archives of ADE20K, COCO and ImageNet to the folders that the configs read.

Everything is unpacked beside its destination and renamed when it is complete. An interrupted run of the same archives
goes on where it stopped: files that are complete are not written again.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

from rmoe.data.archives import archive_errors, require_end
from rmoe.data.check import FETCH_ADE20K
from rmoe.data.files import reason
from rmoe.data.partial import begin, finish
from rmoe.data.progress import tracked
from rmoe.errors import UserError

_ADE20K = "ADEChallengeData2016"
_COCO = ("train2017", "val2017", "annotations")
_COCO_ZIPS = ("train2017.zip", "val2017.zip", "annotations_trainval2017.zip")
_IMAGENET_TRAIN, _IMAGENET_VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_SYNSET = re.compile(r"n\d{8}")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_SOURCES = {
    "ade20k": f"{_ADE20K}.zip",
    "coco": ", ".join(_COCO_ZIPS),
    "imagenet": f"{_IMAGENET_TRAIN}, {_IMAGENET_VAL} and {_DEVKIT}",
}
_UNPACKED = {"ade20k": (f"{_ADE20K}.zip",), "coco": _COCO_ZIPS, "imagenet": (_IMAGENET_TRAIN, _IMAGENET_VAL)}


def prepare(kind: str, source: Path, out: Path, synsets: Path | None = None) -> None:
    """Unpacks the official archives of a data set to the folder `out`, completely or not at all.

    Args:
        kind: "ade20k" (to images/ and annotations/), "coco" (train2017/, val2017/, annotations/) or "imagenet"
            (train/SYNSET/, val/SYNSET/).
        source: a folder with the archives as they were downloaded.
        out: a folder that does not exist or is empty.
        synsets: a file with the synset of each of ImageNet's validation images: the devkit's archive, which is looked
            for in `source` by default, or a text with a synset a line, in the images' order or after the image's name.

    Raises:
        UserError: an archive is missing, was cut short, holds something else, or has a name that leads out of `out`;
            `out` is not empty, or a user's own folder is where it is unpacked; the disk is full.
    """
    out = Path(os.path.abspath(out))
    if os.path.lexists(out) and (not os.path.isdir(out) or any(out.iterdir())):
        raise UserError(f"{out} holds something already; name a folder that does not exist or is empty")
    if not os.path.isdir(source):
        raise UserError(f"there is no folder {source}; name the one with {_SOURCES[kind]}")
    partial = out.with_name(f".{out.name}.partial")
    try:
        sizes = _sizes(kind, source)
        begin(partial, {"unpacked": kind, "archives": sizes}, lambda left: _goes_on(left, kind, sizes))
        _UNPACK[kind](source, partial, synsets)
        finish(partial, out)
    except OSError as error:
        todo = f"mend that and run the same command again: it goes on from {partial}"
        raise UserError(f"cannot unpack to {out}: {reason(error)}; {todo}") from error


def _unpack_ade20k(source: Path, out: Path, synsets: Path | None) -> None:
    if (full := sorted(source.glob("ADE20K_20*.zip"))) and not (source / f"{_ADE20K}.zip").exists():
        found = f"{full[0]} is the full ADE20K, whose labels are not those of the 150 classes"
        raise UserError(f"{found}; {FETCH_ADE20K}")
    _unpack_zip(_archive(source, f"{_ADE20K}.zip"), out, folders=(_ADE20K,), advice=FETCH_ADE20K, strip=1)


def _unpack_coco(source: Path, out: Path, synsets: Path | None) -> None:
    for archive in [_archive(source, name) for name in _COCO_ZIPS]:
        _unpack_zip(archive, out, folders=_COCO, advice="fetch the 2017 archives from cocodataset.org", strip=0)


def _unpack_imagenet(source: Path, out: Path, synsets: Path | None) -> None:
    train, val = (_archive(source, name) for name in (_IMAGENET_TRAIN, _IMAGENET_VAL))
    of_image = _read_synsets(
        synsets or _archive(source, _DEVKIT, "or name a file with the synset of each image by --synsets")
    )
    with archive_errors(train):
        for name, content in _tar_files(train):
            synset = _checked_synset(name.removesuffix(".tar"), train)
            for image, stream in _tar_files(train, content):
                _write(stream, out / "train" / synset / image)
    with archive_errors(val):
        for name, stream in _tar_files(val):
            _write(stream, out / "val" / of_image(name) / name)


_UNPACK = {"ade20k": _unpack_ade20k, "coco": _unpack_coco, "imagenet": _unpack_imagenet}


def _sizes(kind: str, source: Path) -> dict[str, int]:
    """Returns the bytes of each archive that is unpacked, of those that are there."""
    return {name: (source / name).stat().st_size for name in _UNPACKED[kind] if (source / name).is_file()}


def _goes_on(left: Any, kind: str, sizes: Mapping[str, int]) -> bool:
    """Says whether a folder is of the same archives; one that was cut short when they were unpacked has grown since."""
    try:
        return left["unpacked"] == kind and all(sizes.get(name, 0) >= size for name, size in left["archives"].items())
    except (TypeError, KeyError, AttributeError):
        return False


def _archive(source: Path, name: str, advice: str = "fetch it, or correct the path") -> Path:
    if not (source / name).is_file():
        raise UserError(f"there is no {source / name}; {advice}")
    return source / name


def _unpack_zip(archive: Path, out: Path, folders: Sequence[str], advice: str, strip: int) -> None:
    """Unpacks a zip whose files lie in `folders`; the first `strip` parts of their names are left out."""
    with archive_errors(archive), zipfile.ZipFile(archive) as content:
        if not content.infolist():
            raise UserError(f"{archive} holds nothing; {advice}")
        for member in tracked(content.infolist(), archive.name):
            parts = _safe(member.filename, archive).parts
            if parts[0] not in folders:
                raise UserError(f"{archive} holds '{member.filename}', not only {' and '.join(folders)}; {advice}")
            if not member.is_dir():
                with content.open(member) as stream:
                    _write(stream, out.joinpath(*parts[strip:]), member.file_size)


def _tar_files(archive: Path, content: IO[bytes] | None = None) -> Iterator[tuple[str, IO[bytes]]]:
    """Yields name and content of each file in a tar, or if `content` is given, in that tar inside `archive`.

    Raises:
        UserError: it holds anything but files in its topmost folder.
        tarfile.TarError: it is no tar or was cut short.
    """
    with tarfile.open(archive, "r:", fileobj=content) as members:
        for member in tracked(members, archive.name) if content is None else members:
            if not member.isfile() or len(_safe(member.name, archive).parts) != 1:
                raise UserError(
                    f"{archive} holds '{member.name}', which is no file of the official archive; fetch it again"
                )
            stream = members.extractfile(member)
            assert stream is not None
            yield member.name, stream
        require_end(members)


def _safe(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise UserError(f"{archive} holds '{name}', which leads out of the folder; it is not the official archive")
    return path


def _write(stream: IO[bytes], path: Path, size: int | None = None) -> None:
    """Writes a file beside `path` and renames it, unless `path` exists with this size."""
    if path.is_file() and path.stat().st_size == (_length(stream) if size is None else size):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        shutil.copyfileobj(stream, file)
    partial.replace(path)


def _length(stream: IO[bytes]) -> int:
    length = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    return length


def _read_synsets(path: Path) -> Callable[[str], str]:
    """Returns a function from the name of a validation image to its synset."""
    if path.name.endswith((".tar.gz", ".tgz")):
        synsets = _devkit_synsets(path)
    else:
        try:
            lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path} cannot be read ({reason(error)}); give the devkit or a text file of synsets"
            ) from None
        lines.sort(key=lambda words: words[0] if len(words) > 1 else "")  # the image's name, if lines have one
        synsets = [words[-1] for words in lines]

    def of_image(name: str) -> str:
        match = _VAL_IMAGE.fullmatch(name)
        if not match or not 1 <= int(match[1]) <= len(synsets):
            raise UserError(f"{path} has {len(synsets)} synsets, none for the image {name}; give those of all images")
        return _checked_synset(synsets[int(match[1]) - 1], path)

    return of_image


def _checked_synset(name: str, path: Path) -> str:
    if not _SYNSET.fullmatch(name):
        raise UserError(f"{path} has '{name}' for a synset; they look like n01440764: fetch the file again")
    return name


def _devkit_synsets(path: Path) -> list[str]:
    """Reads the synset of each validation image from the devkit, which has a class table in MATLAB's format."""
    from scipy.io import loadmat

    with archive_errors(path), tarfile.open(path) as content:
        files = {PurePosixPath(member.name).name: member for member in content if member.isfile()}
        wanted = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
        if lacking := [name for name in wanted if name not in files]:
            raise UserError(f"{path} has no {lacking[0]}; give {_DEVKIT}, or a text file of synsets")
        table, truth = (content.extractfile(files[name]).read() for name in wanted)  # type: ignore[union-attr]
    try:
        classes = loadmat(io.BytesIO(table), squeeze_me=True)["synsets"]
        names = {int(one["ILSVRC2012_ID"]): str(one["WNID"]) for one in classes}
        return [names[int(number)] for number in truth.split()]
    except Exception as error:  # scipy raises errors of many types at damaged bytes
        found = f"{path} has no table of synsets that fits its list of images ({type(error).__name__}: {reason(error)})"
        raise UserError(f"{found}; give {_DEVKIT}, or a text file of synsets") from error
