"""What img2dataset left: shards of images, as tars or as folders of files, and what it wrote down about each image.

A shard NAME is NAME.tar, or a folder NAME/ whose name is a number. NAME.parquet beside the shard lists every URL that
was tried. Tars of the same form without such a list are read too: their .json members say the same.
Folders inside a shard are read with it. A link inside a tar is the file of the same tar that it leads to.
"""

import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.data.prepare import parquet
from cosmos_scale.data.prepare.datasets import Join, join_value
from cosmos_scale.data.samples.document import parse_json
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.data.shards.patterns import COMPRESSED_ENDINGS
from cosmos_scale.data.shards.reader import IMAGE_EXTENSIONS
from cosmos_scale.data.shards.scan import torn_end
from cosmos_scale.errors import UserError
from cosmos_scale.files import read_regular, reason_of, regular_only, whole_path

SUCCESS = "success"
NO_JSON = "there is no .json with it"


class ImageShard(NamedTuple):
    """One shard of images. path: a .tar or a folder. listing: the parquet beside it, if any."""

    name: str
    path: Path
    listing: Path | None


class Listed(NamedTuple):
    """What is known of an image before it is read.

    value: its join value; None where it is not known. error: why there is no image, or why its value is not known.
    """

    key: str
    value: str | None
    status: str
    error: str | None


class Image(NamedTuple):
    """One image as it was downloaded, or why it cannot be read.

    value: the join value that its own .json says; None where no .json does.
    """

    key: str
    extension: str
    data: bytes
    fault: str | None
    value: str | None = None


class _Member(NamedTuple):
    """A file of a shard. entry: where its bytes are. fault: why there are none, if so."""

    key: str
    extension: str
    entry: tarfile.TarInfo | Path
    fault: str | None = None


def list_images(paths: list[Path]) -> list[ImageShard]:
    """List the shards of images that paths mean, by name. A path is a folder of shards or a single tar.

    Raises: UserError where a path is missing or holds no shard, or two shards have one name.
    """
    shards: dict[str, ImageShard] = {}
    for path in paths:
        for shard in _shards_of(path):
            other = shards.setdefault(shard.name, shard)
            if other is not shard:
                raise UserError(f"{shard.path} and {other.path} have one name: prepare their folders one by one")
    return [shards[name] for name in sorted(shards)]


def _shards_of(path: Path) -> list[ImageShard]:
    if path.name.lower().endswith(COMPRESSED_ENDINGS):
        raise UserError(f"{path}: is compressed; unpack it to .tar")
    if path.is_file() and path.suffix == ".tar":
        return [_shard(path)]
    if not path.is_dir():
        raise UserError(f"{whole_path(path)}: no such folder or .tar of images")
    inside = sorted(item for item in path.iterdir() if not item.name.startswith("."))
    found = [_shard(item) for item in inside if item.suffix == ".tar" or (item.is_dir() and item.name.isdecimal())]
    if found:
        return found
    if any(item.suffix in (".parquet", ".tfrecord") for item in inside):
        raise UserError(
            f"{path}: holds no .tar and no folder of images; run img2dataset with --output_format webdataset"
        )
    if any(item.suffix.removeprefix(".") in IMAGE_EXTENSIONS for item in inside):
        raise UserError(f"{path}: holds images itself: name the folder above it, with the folders 00000, 00001, ...")
    raise UserError(f"{path}: not img2dataset's output: it has neither 00000.tar nor a folder 00000 of images")


def unread_pictures(path: Path) -> list[str]:
    """Name what holds pictures in a folder of shards and is not read: other folders, and `.` for the folder itself."""
    if not path.is_dir():
        return []
    shards = {shard.path.name for shard in list_images([path])}
    unread = []
    for folder in (path, *sorted(item for item in path.iterdir() if item.is_dir() and item.name not in shards)):
        with suppress(OSError):  # of a folder that is not ours to read
            names = os.listdir(folder)
            if any(Path(name).suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS for name in names):
                unread.append(str(folder.relative_to(path)))
    return unread


def _shard(path: Path) -> ImageShard:
    name = path.name.removesuffix(".tar")
    listing = path.parent / f"{name}.parquet"
    return ImageShard(name, path, listing if listing.is_file() else None)


def read_listing(shard: ImageShard, join: Join) -> list[Listed]:
    """Return what is known of every image of a shard, of images that could not be downloaded too.

    The parquet says it if it has the join value; else each image's .json does.
    Raises: UserError where a file cannot be read.
    """
    if shard.listing is not None:
        names = parquet.column_names(shard.listing)
        if {"key", "status", join} <= set(names):
            columns = ["key", "status", join, *({"error_message"} & set(names))]
            return [
                Listed(str(key), _joined(join, value), str(status), error[0] if error else None)
                for batch in parquet.read_columns(shard.listing, columns)
                for key, status, value, *error in zip(*batch, strict=True)
            ]
    listed = []
    apart: set[str] = set()
    with _open(shard) as archive:
        for key, members in _groups(shard, archive):
            if _has_image(members):
                value, error = _value_of(archive, key, members, join)
                listed.append(Listed(key, value, SUCCESS, error))
            elif any(member.extension == "json" for member in members):
                apart.add(key)
    lies_apart = "its .json lies apart from it; the files of a key must follow each other in a tar"
    return [
        image._replace(error=lies_apart) if image.error == NO_JSON and image.key in apart else image for image in listed
    ]


def _groups(shard: ImageShard, archive: tarfile.TarFile | None) -> Iterator[tuple[str, list[_Member]]]:
    """Yield the files that follow each other with one key; where an extension comes again, another image begins."""
    for key, group in groupby(_members(shard, archive), key=lambda member: member.key):
        members: list[_Member] = []
        for member in group:
            if any(before.extension == member.extension for before in members):
                yield key, members
                members = []
            members.append(member)
        yield key, members


def _has_image(members: list[_Member]) -> bool:
    return any(member.extension in IMAGE_EXTENSIONS for member in members)


def _value_of(
    archive: tarfile.TarFile | None, key: str, members: list[_Member], join: Join
) -> tuple[str | None, str | None]:
    """Return the join value that the .json among an image's files says, or why it is not known."""
    described = next((member for member in members if member.extension == "json"), None)
    document, error = None, NO_JSON
    if described is not None:
        error = f"its .json says no {join}"
        try:
            document = parse_json(_read(archive, described))
        except DamagedSample as damage:
            error = str(damage)
        except (ValueError, RecursionError):
            error = "its .json cannot be read"
    value = document.get(join) if isinstance(document, dict) else None
    known = _joined(join, key if value is None and join == "key" else value)
    return known, error if known is None else None


def _joined(join: Join, value: object) -> str | None:
    try:
        return None if value is None else join_value(join, str(value)) or None
    except DamagedSample:
        return None


def read_images(shard: ImageShard, join: Join) -> Iterator[Image]:
    """Yield the images of a shard in order, as they were downloaded; at last a fault without key if it breaks off.

    Of images with one key the first stays, if its .json tells it from the others; else none stays.
    """
    with _open(shard) as archive:
        groups = [(key, members) for key, members in _groups(shard, archive) if _has_image(members)]
        times = Counter(key for key, _ in groups)
        seen: set[str] = set()
        for key, members in groups:
            value, _ = _value_of(archive, key, members, join)
            for member in members:
                if member.extension not in IMAGE_EXTENSIONS:
                    continue
                fault = None
                if key in seen:
                    fault = "duplicate key: it comes again in its shard"
                elif times[key] > 1 and value is None:
                    fault = f"duplicate key: it comes again in its shard, and no .json says which {join} each has"
                seen.add(key)
                data = b""
                try:
                    data = data if fault else _read(archive, member)
                except DamagedSample as damage:
                    fault = str(damage)
                yield Image(key, member.extension, data, fault, value)
        if shard.path.is_file() and (fault := _break_off(archive)):
            yield Image("", "", b"", fault)


@contextmanager
def _open(shard: ImageShard) -> Iterator[tarfile.TarFile | None]:
    """Open a shard's tar; yields None for a folder, and for a tar whose first header cannot be read."""
    if shard.path.is_dir():
        yield None
        return
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(shard.path, "rb", opener=regular_only))
            archive = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
        except tarfile.TarError:
            archive = None
        except OSError as error:
            raise UserError(f"{shard.path}: cannot be read: {error.strerror or error}") from error
        yield archive


def _members(shard: ImageShard, archive: tarfile.TarFile | None) -> Iterator[_Member]:
    if archive is None and shard.path.is_file():
        return
    for name, entry, fault in _files_of(shard.path) if archive is None else _files_in(archive):
        key, _, extension = name.partition(".")
        if key:
            yield _Member(key, extension.lower(), entry, fault and f"not a file: its .{extension.lower()} is {fault}")


def _files_of(folder: Path) -> Iterator[tuple[str, Path, str | None]]:
    """Yield name and path of each file below a folder, and what a file is that has no bytes."""
    for path in folder_files(folder):
        fault = None
        if not path.is_file():
            fault = f"a link to {os.readlink(path)}, which is no file" if path.is_symlink() else "a device or pipe"
        yield path.name, path, fault


def folder_files(folder: Path) -> list[Path]:
    """List all that is no folder below a folder, by folder and name; raises UserError where a folder cannot be read."""
    found: list[Path] = []
    seen: set[str] = set()  # a link may lead to a folder above it

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {reason_of(error)}") from error

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if os.path.realpath(Path(place, name)) not in seen)
        found += [Path(place, name) for name in sorted(names)]
    return found


def _files_in(archive: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo, str | None]]:
    """Yield the name of each member of a tar but folders, the member with its bytes, and why there is none, if so."""
    entries: list[tarfile.TarInfo] = []
    try:
        for entry in archive:
            entries.append(entry)
    except (tarfile.TarError, ValueError):
        pass  # _break_off says so
    leads_to = _targets(entries)
    for entry in entries:
        end: tarfile.TarInfo | None = entry
        passed: set[int] = set()
        while end is not None and end.offset in leads_to and end.offset not in passed:
            passed.add(end.offset)
            end = leads_to[end.offset]
        if entry.isdir() or (entry.islnk() and end is not None and end.name == entry.name):
            continue  # tar names a file twice by a link to itself
        fault = None if end is not None and end.isfile() else "a device or pipe"
        if fault and passed:
            fault = f"a link to {entry.linkname}, which is no file of its tar"
        yield entry.name.rpartition("/")[2], end or entry, fault


def _targets(entries: list[tarfile.TarInfo]) -> dict[int, tarfile.TarInfo | None]:
    """Return where each link of a tar leads to, by the link's offset; None where that is not in the tar.

    A hard link is the member that had the name before it, a symbolic link the one that has the name at last.
    """
    named: dict[str, tarfile.TarInfo] = {}
    leads_to: dict[int, tarfile.TarInfo | None] = {}
    for entry in entries:
        if entry.islnk():
            leads_to[entry.offset] = named.get(posixpath.normpath(entry.linkname))
        named[posixpath.normpath(entry.name)] = entry
    for entry in entries:
        if entry.issym():
            place = posixpath.join(posixpath.dirname(entry.name), entry.linkname)
            leads_to[entry.offset] = named.get(posixpath.normpath(place))
    return leads_to


def _read(archive: tarfile.TarFile | None, member: _Member) -> bytes:
    """Return a member's bytes; raises DamagedSample where there are none."""
    if member.fault is not None:
        raise DamagedSample(member.fault)
    if isinstance(member.entry, Path):
        try:
            return read_regular(member.entry)
        except OSError as error:
            raise DamagedSample(f"cannot be read: its .{member.extension}: {reason_of(error)}") from error
    assert archive is not None
    try:
        file = archive.extractfile(member.entry)
        data = b"" if file is None else file.read()
    except (tarfile.TarError, OSError):
        data = b""
    if len(data) < member.entry.size:
        kind = "image" if member.extension in IMAGE_EXTENSIONS else member.extension
        raise DamagedSample(f"damaged {kind}: its shard breaks off inside it")
    return data


def _break_off(archive: tarfile.TarFile | None) -> str | None:
    """What is wrong where an archive's members end."""
    if archive is None:
        return "torn shard: not a tar file"
    end = torn_end(archive)
    if end is None:
        return None
    if end.is_short:
        return f"torn shard: it ends at byte {end.byte} without an end mark"
    if end.is_behind:
        return f"torn shard: more data from byte {end.byte} on, behind the end of the archive"
    if end.zeros:
        return f"torn shard: {end.zeros:,} bytes of zeros from byte {end.byte} on"
    return f"torn shard: no header at byte {end.byte}"
