"""A folder of pictures and a file of captions to indexed webdataset shards."""

import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from webdataset.writer import TarWriter

from cosmos_scale.data.decode.picture import DEFAULT_MAX_PIXELS, decode_rgbx, picture_format
from cosmos_scale.data.jobs import map_jobs, progress_bar
from cosmos_scale.data.samples.origin import ORIGIN_KEY, make_origin
from cosmos_scale.data.samples.sample import DamagedSample, reason_class
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.shards.reader import IMAGE_EXTENSIONS
from cosmos_scale.data.shards.rejected import REJECTED
from cosmos_scale.data.tools.background import Colour, flatten, parse_background
from cosmos_scale.data.tools.captions_file import DEFAULT_COLUMNS, CaptionRow, Columns, count_lines, read_rows
from cosmos_scale.errors import UserError
from cosmos_scale.files import make_output_folder, whole_file, whole_path, writing
from cosmos_scale.words import counted

JPEG_QUALITY = 95  # of converted pictures, with full colour resolution: almost no loss


class BuildReport(NamedTuple):
    """What `build_shards` made; `rejected` counts rows by reason.

    transparent: pictures with transparent pixels. background: what `--background` says of them.
    """

    folder: Path
    shards: int
    samples: int
    rejected: Counter[str]
    transparent: int
    background: str

    def describe(self) -> str:
        """Return the report as lines for a terminal."""
        lines = [f"{counted(self.samples, 'sample')} in {counted(self.shards, 'indexed shard')} in {self.folder}"]
        if self.transparent:
            how = "hidden colours shown" if self.background == "keep" else f"put on {self.background}"
            lines.append(f"{counted(self.transparent, 'transparent picture')}: {how} (--background)")
        lines += [f"{counted(times, 'row')} rejected: {reason}" for reason, times in self.rejected.most_common()]
        if self.rejected:
            lines.append(f"each is named in {self.folder / REJECTED}")
        return "\n".join(lines)


class _Reject(NamedTuple):
    """A line of rejected.jsonl. captions: the file's name. key: the one that the row's sample would have."""

    captions: str
    row: int
    key: str
    image: str | None
    reason: str


class _Job(NamedTuple):
    shard: Path
    captions: str
    rows: list[CaptionRow]


class _Written(NamedTuple):
    rows: int
    samples: int
    rejected: list[_Reject]
    transparent: int


def build_shards(
    images: Path,
    captions: Path,
    out: Path,
    *,
    samples_per_shard: int,
    columns: Columns = DEFAULT_COLUMNS,
    background: str = "white",
    workers: int | None = None,
    progress: bool = True,
) -> BuildReport:
    """Pack pictures and their captions into shards, and index them.

    JPEGs are kept byte for byte; PNG and WebP become JPEG, transparent ones on `background` (white, black, #rrggbb;
    keep drops the alpha, so that hidden colours show). Each stretch of `samples_per_shard` rows becomes one shard.
    Rows whose picture is missing or damaged, and rows without caption, are left out and named in `rejected.jsonl`.
    The shards' bytes do not depend on `workers`; a sample's key is its row's number, and its json says
    under `origin` the captions file, the row and the picture.
    Raises: UserError where an input is missing or unusable, `out` holds shards already, or no row is left.
    """
    colour = parse_background(background)
    if not images.is_dir():
        raise UserError(f"{whole_path(images)}: no such folder of pictures")
    lines = count_lines(captions)
    make_output_folder(out)
    if any(out.glob("*.tar")):
        raise UserError(f"{out}: holds shards already; name an empty folder")
    rejected: Counter[str] = Counter()
    samples = transparent = 0
    results = map_jobs(partial(_write_shard, images, colour), _jobs(captions, columns, out, samples_per_shard), workers)
    with (out / REJECTED).open("w") as log, progress_bar("building shards", lines, show=progress) as advance:
        for written in results:
            samples += written.samples
            transparent += written.transparent
            for reject in written.rejected:
                rejected[reason_class(reject.reason)] += 1
                log.write(json.dumps(reject._asdict()) + "\n")
            advance(written.rows)
    if samples == 0:
        raise UserError(f"{captions}: none of its {counted(rejected.total(), 'row')} can be used; see {out / REJECTED}")
    index = index_shards(str(out), None, workers=workers, progress=progress)
    return BuildReport(out, index.shards, index.samples, rejected, transparent, background)


def _jobs(captions: Path, columns: Columns, out: Path, samples_per_shard: int) -> Iterator[_Job]:
    rows = read_rows(captions, columns)
    number = 0
    while stretch := list(islice(rows, samples_per_shard)):
        yield _Job(out / f"{number:06d}.tar", captions.name, stretch)
        number += 1


def _write_shard(images: Path, background: Colour | None, job: _Job) -> _Written:
    """Write one shard, whole or not at all; no shard where no row can be used."""
    with writing(job.shard), whole_file(job.shard) as part:
        # A fixed time: the same input gives the same bytes.
        with TarWriter(str(part), encoder=False, mtime=0) as shard:
            rejected, transparent = _write_rows(images, background, job, shard)
        samples = len(job.rows) - len(rejected)
        if not samples:
            part.unlink()
    return _Written(len(job.rows), samples, rejected, transparent)


def _write_rows(images: Path, background: Colour | None, job: _Job, shard: TarWriter) -> tuple[list[_Reject], int]:
    """Write a job's samples; return the rejected rows, and how many of the pictures written are transparent."""
    rejected = []
    transparent = 0
    for row in job.rows:
        key = f"{row.number:09d}"
        try:
            picture = _jpeg(images, background, row)
        except DamagedSample as damage:
            rejected.append(_Reject(job.captions, row.number, key, row.image, str(damage)))
            continue
        document = {**row.document, ORIGIN_KEY: make_origin(job.captions, row.number, row.image)}
        text = json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")
        shard.write({"__key__": key, "jpg": picture.data, "json": text})
        transparent += picture.transparent
    return rejected, transparent


class _Jpeg(NamedTuple):
    data: bytes
    transparent: bool


def _jpeg(images: Path, background: Colour | None, row: CaptionRow) -> _Jpeg:
    """Read a row's picture as JPEG. The picture is decoded as a check; raises DamagedSample."""
    if row.fault is not None:
        raise DamagedSample(row.fault)
    data = _find(images, str(row.image))
    pixels = decode_rgbx(data, DEFAULT_MAX_PIXELS)
    if picture_format(data[:12]) == "jpeg":
        return _Jpeg(data, transparent=False)
    flat = flatten(data, pixels, background, DEFAULT_MAX_PIXELS)
    buffer = io.BytesIO()
    Image.fromarray(flat.pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return _Jpeg(buffer.getvalue(), flat.transparent)


def _find(images: Path, name: str) -> bytes:
    """Read the picture that a row names by its path in the folder, with or without its extension.

    Links in the folder are followed. A path that leads out of the folder is refused, since a foreign file of captions
    must not pull in any picture of this machine.
    """
    extensions = (*IMAGE_EXTENSIONS, *map(str.upper, IMAGE_EXTENSIONS))
    root = os.path.abspath(images)
    for candidate in (name, *(f"{name}.{extension}" for extension in extensions)):
        path = Path(os.path.abspath(images / candidate))
        if not path.is_relative_to(root):
            raise DamagedSample(f"picture outside the folder: {images} does not hold it")
        try:
            if path.is_file():
                return path.read_bytes()
        except (OSError, ValueError) as error:
            raise DamagedSample(f"picture cannot be read: {error}") from error
    raise DamagedSample("picture not found")
