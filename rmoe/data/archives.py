"""Reads the images of a classification set from archives, so that nobody has to unpack 14 million files.

A split is an archive, or a folder with an archive for each class. Archives are indexed once. Then an image is read from
its place in the archive, which is opened anew for each image: processes share no position in it, and tens of thousands
of archives need no more open files than one. (timm's readers of tars keep them open, leave an index beside the data,
and take an archive that was cut short for a whole one.)
"""

from __future__ import annotations

import lzma
import os
import posixpath
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rmoe.data.files import IMAGE_SUFFIXES, class_folders, is_image, list_folder, reason
from rmoe.data.images import UnreadableImage, read_image
from rmoe.errors import UserError

ARCHIVES = (".zip", ".tar")
_OTHER_ARCHIVES = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_READABLE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_MOST_BYTES = 2**28  # of an unpacked image file
_LOCAL_HEADER = struct.Struct("<8xH16xHH")  # of a member of a zip: compression, lengths of name and extras
LAYOUTS = "ROOT/SPLIT/CLASS/*.jpg, ROOT/SPLIT.zip with CLASS/*.jpg inside, or ROOT/SPLIT/CLASS.zip or .tar"


class Members(NamedTuple):
    """Tells where the images of an archive lie.

    Attributes:
        classes: names of the classes, sorted.
        label: each image's position in `classes`, int32 [n].
        offset: the byte where each image begins in the archive, in a zip with its header, int64 [n].
        size: each image's length in the archive in bytes, int64 [n].
    """

    classes: list[str]
    label: np.ndarray
    offset: np.ndarray
    size: np.ndarray


def find_split(root: str | Path, split: str) -> Path:
    """Returns the folder ROOT/SPLIT, or else the archive ROOT/SPLIT.zip or .tar; if neither exists, the folder."""
    folder = Path(root, split)
    archives = (Path(root, f"{split}{suffix}") for suffix in ARCHIVES)
    return folder if os.path.isdir(folder) else next((path for path in archives if os.path.isfile(path)), folder)


def archives_of(place: Path) -> list[Path]:
    """Returns the archives of a split: the split itself, one for each class, or none if it has class folders.

    Args:
        place: what `find_split` returned.

    Raises:
        UserError: the folder cannot be read, has class folders beside archives, or archives of another format.
    """
    if not os.path.isdir(place):
        return [place] if place.suffix in ARCHIVES else []
    folders, files = list_folder(place)
    if other := [name for name in files if name.lower().endswith(_OTHER_ARCHIVES)]:
        raise UserError(
            f"{place / other[0]} cannot be read image by image; make it a .zip, or a .tar without compression"
        )
    archives = [place / name for name in files if name.lower().endswith(ARCHIVES) and not name.startswith(".")]
    if archives and folders:
        raise UserError(f"{place} has the archive {archives[0].name} and the folder {folders[0]}; keep one kind")
    return archives


def class_names(place: Path) -> list[str]:
    """Returns the sorted names of the classes of what `find_split` returned; their positions are the class indices.

    Raises:
        UserError: see `archives_of` and `index`.
    """
    archives = archives_of(place)
    if archives == [place]:
        return index(place, place.stem).classes
    return sorted({path.stem for path in archives}) or class_folders(place)


def index(path: Path, split: str | None = None) -> Members:
    """Finds the images in an archive.

    Args:
        path: a zip or an uncompressed tar.
        split: the name of the split if the archive holds a whole one: its members are then CLASS/IMAGE, or all of them
            SPLIT/CLASS/IMAGE. With None the archive holds the images of the class that it is named after.

    Raises:
        UserError: the file was cut short or is no archive; it holds no image, an image in no class, or an archive.
    """
    try:
        with archive_errors(path):
            found = [(_parts(name), offset, size) for name, offset, size in _members(path) if _is_image(path, name)]
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); see that it exists and that you may read it"
        ) from error
    if not found:
        raise UserError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}); fetch it again or remove it")
    if split is None:
        classes = [path.stem]
        label: np.ndarray = np.zeros(len(found), np.int32)
    else:
        if all(len(parts) > 2 and parts[0] == split for parts, _, _ in found):
            found = [(parts[1:], offset, size) for parts, offset, size in found]
        if astray := [parts for parts, _, _ in found if len(parts) < 2]:
            raise UserError(f"{path} holds the image '{astray[0][0]}' in no class folder; its members are CLASS/IMAGE")
        found.sort()
        classes = sorted({parts[0] for parts, _, _ in found})
        numbers = {name: number for number, name in enumerate(classes)}
        label = np.array([numbers[parts[0]] for parts, _, _ in found], np.int32)
    places = np.array([(offset, size) for _, offset, size in found], np.int64)
    return Members(classes, label, places[:, 0], places[:, 1])


def index_all(place: Path, archives: Sequence[Path]) -> list[Members | UserError]:
    """Returns for each of some archives of `place` its `index`, or the error that says what is wrong with it."""

    def one(path: Path) -> Members | UserError:
        try:
            return index(path, path.stem if path == place else None)
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, archives))


class Packed:
    """Reads the images of a split that lie in archives, in the order of the archives and of their members.

    Args:
        archives: paths of the archives.
        members: for each archive, what `index` returned.
        classes: names in the order of the class indices; they include all classes of `members`.

    Attributes:
        labels: class index of each image, int32 [n].
    """

    def __init__(self, archives: Sequence[Path], members: Sequence[Members], classes: Sequence[str]) -> None:
        self._archives = [str(path) for path in archives]
        numbers = {name: number for number, name in enumerate(classes)}
        global_labels = [np.array([numbers[name] for name in one.classes], np.int32)[one.label] for one in members]
        # Arrays: counting references to millions of Python objects would copy their memory in each loader worker.
        self.labels = np.concatenate(global_labels)
        self._offset, self._size = (
            np.concatenate([getattr(one, key) for one in members]) for key in ("offset", "size")
        )
        self._archive = np.repeat(np.arange(len(members), dtype=np.int32), [len(one.label) for one in members])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, number: int) -> bytes:
        """Returns the bytes of an image file.

        Raises:
            OSError: the file cannot be read or unpacked.
        """
        path, size = self._archives[self._archive[number]], int(self._size[number])
        with open(path, "rb") as file:
            file.seek(int(self._offset[number]))
            if not path.lower().endswith(".zip"):
                return file.read(size)
            try:
                method, *lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                file.seek(sum(lengths), os.SEEK_CUR)
                content = file.read(size)
                return content if method == zipfile.ZIP_STORED else _inflate(content)
            except (struct.error, zlib.error) as error:
                raise OSError(str(error)) from error

    def image(self, number: int) -> Image.Image:
        """Returns a decoded image.

        Raises:
            UserError: it cannot be read, or is no image of 8 bits a channel; the message names archive and member.
        """
        try:
            content = self.read(number)
        except OSError as error:
            found = f"{self.name(number)} is no readable image ({error})"
            raise UnreadableImage(f"{found}; fetch the archive again") from error
        try:
            return read_image("", content)
        except UserError:
            return read_image(self.name(number), content)  # this fails again, with a name in its message

    def name(self, number: int) -> str:
        """Returns the names of an image and its archive for a message; this reads the archive again."""
        path, offset = Path(self._archives[self._archive[number]]), self._offset[number]
        with suppress(OSError, UserError), archive_errors(path):
            found = (f"{name} in {path}" for name, start, _ in _members(path) if start == offset)
            return next(found, f"an image in {path}, which has changed since,")
        return f"an image in {path}, which can no longer be read,"


_MOST_LINKS = 40  # of links to links, as on Linux

_DAMAGES = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, ValueError, OverflowError, MemoryError, IndexError, KeyError),
    RuntimeError,  # the archive is encrypted, of a format or version unknown to Python, or nested too deeply
)


@contextmanager
def archive_errors(archive: Path) -> Iterator[None]:
    """Turns every error that damaged bytes cause in the readers into a UserError that names the archive."""
    try:
        yield
    except UserError:
        raise
    except _DAMAGES as error:
        found = f"{archive} cannot be read to its end ({reason(error)})"
        raise UserError(f"{found}; it was cut short or is something else: fetch it again") from error


def require_end(content: tarfile.TarFile) -> None:
    """Refuses a tar without an end mark after its members have been read, since Python takes it for a whole one."""
    content.fileobj.seek(content.offset)
    if content.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end mark")


def looks_whole(archive: Path) -> bool:
    """Returns whether an archive ends as it should; nothing but its end is read."""
    if archive.suffix.lower() == ".zip":
        return zipfile.is_zipfile(archive)
    with archive.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - tarfile.BLOCKSIZE))
        return file.read() == bytes(tarfile.BLOCKSIZE)


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yields name, offset and length of each file in an archive."""
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as content:
            length = path.stat().st_size
            for member in content.infolist():
                if not 0 <= member.header_offset <= length - member.compress_size or member.compress_size < 0:
                    raise UserError(f"{path} has '{member.filename}' outside of itself; it is damaged: fetch it again")
                if member.flag_bits & 1 or member.compress_type not in _READABLE:
                    raise UserError(f"{path} has '{member.filename}' encrypted or not deflated; make a plain zip of it")
                yield member.filename, member.header_offset, member.compress_size
    else:
        with tarfile.open(path, "r:") as content:
            for one in content:
                if one.size < 0:
                    raise tarfile.ReadError(f"'{one.name}' has the size {one.size}")
                if one.isfile():
                    yield one.name, one.offset_data, one.size
            require_end(content)
            yield from _linked(path, content.getmembers())


def _linked(path: Path, members: Sequence[tarfile.TarInfo]) -> Iterator[tuple[str, int, int]]:
    """Yields name, offset and length of the images in a tar that are links to files in it, hard or symbolic."""
    links = {one.name: one for one in members if (one.islnk() or one.issym()) and is_image(_parts(one.name)[-1])}
    places = {"/".join(_parts(one.name)): one for one in members if links and not one.isdir()}
    for name, one in links.items():
        found: tarfile.TarInfo | None = one
        for _ in range(_MOST_LINKS):
            if found is None or found.isfile():
                break
            base = "" if found.islnk() else posixpath.dirname(found.name)
            found = places.get("/".join(_parts(posixpath.normpath(posixpath.join(base, found.linkname)))))
        if found is None or not found.isfile():
            raise UserError(
                f"{path} has '{name}' as a link to '{one.linkname}', which it does not hold; pack the files themselves "
                "(tar --dereference --hard-dereference)"
            )
        yield name, found.offset_data, found.size


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in ("", ".")]


def _is_image(path: Path, name: str) -> bool:
    """Returns whether a member is an image; an archive within the archive is an error, other files are left out."""
    base = name.rpartition("/")[2]
    if base.lower().endswith(ARCHIVES + _OTHER_ARCHIVES):
        raise UserError(
            f"{path} holds the archive '{name}'; unpack {path.name} alone: a folder with an archive for each class is "
            "read as it is"
        )
    return is_image(base)


def _inflate(content: bytes) -> bytes:
    inflating = zlib.decompressobj(-zlib.MAX_WBITS)
    unpacked = inflating.decompress(content, _MOST_BYTES)
    if not inflating.eof:
        raise zlib.error(f"it was cut short, or is longer than {_MOST_BYTES} bytes")
    return unpacked
