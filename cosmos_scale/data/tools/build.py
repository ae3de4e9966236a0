"""A folder of pictures and a file of captions to indexed webdataset shards."""

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from webdataset.writer import TarWriter

from cosmos_scale.config import BACKGROUND
from cosmos_scale.data.jobs import map_jobs, progress_bar
from cosmos_scale.data.samples.document import encode_document
from cosmos_scale.data.samples.origin import ORIGIN_KEY, make_origin
from cosmos_scale.data.samples.sample import DamagedSample, reason_class
from cosmos_scale.data.shards.checksums import (
    DigestSink,
    ShardSum,
    file_sha256,
    refuse_foreign_manifest,
    write_shard_sums,
)
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.shards.index_report import REJECTED, refuse_foreign_rejected
from cosmos_scale.data.shards.summary import SUMMARY, refuse_foreign_summary
from cosmos_scale.data.tools.build_report import BuildReport
from cosmos_scale.data.tools.captions_file import (
    DEFAULT_COLUMNS,
    CaptionRow,
    Columns,
    count_lines,
    read_rows,
    with_unique_keys,
)
from cosmos_scale.data.tools.finished_build import (
    captions_digest,
    finished_build,
    made_of,
    pictures_digest,
    refuse_other_build,
)
from cosmos_scale.data.tools.joined_rows import joined_rows, picture_digest
from cosmos_scale.data.tools.packed_picture import Orientation, PackedPicture, PictureRules, pack_picture
from cosmos_scale.data.tools.picture_path import picture_path
from cosmos_scale.data.work import BUILD, MANIFEST, Work, close_work, open_work
from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, read_regular, regular_only, replace_file, whole_file, whole_path, writing

MANIFEST_FORMAT = "cosmos-scale built shards 1"


class _Reject(NamedTuple):
    """A line of rejected.jsonl. captions: the file's name. key: the one that the row's sample would have."""

    captions: str
    row: int
    key: str
    image: str | None
    reason: str


class _Job(NamedTuple):
    """One shard to write. captions: the file's name."""

    work: Work
    shard: str
    captions: str
    rows: list[CaptionRow]

    @property
    def path(self) -> Path:
        """The shard's file."""
        return self.work.out / f"{self.shard}.tar"


class _Written(NamedTuple):
    """The report on a shard. size: bytes; 0 where no row can be used, so that there is no shard. sha256: of the shard.

    named: for each row of a sample, the digest of its picture's path. pictures: digest of the sizes and times of the
    pictures that the rows name.
    """

    rows: int
    samples: int
    rejected: list[_Reject]
    transparent: int
    turned: int
    named: list[int]
    size: int
    pictures: str
    animated: int = 0  # noted last: reports of older versions have none of what follows
    sha256: str = ""
    converted: int = 0


def build_shards(
    images: Path,
    captions: Path,
    out: Path,
    *,
    samples_per_shard: int,
    columns: Columns = DEFAULT_COLUMNS,
    background: str = "white",
    orientation: Orientation = "upright",
    join_rows: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> BuildReport:
    """Pack pictures and their captions into shards, and index them.

    JPEGs are kept byte for byte; PNG and WebP become JPEG, transparent ones on `background` (white, black, #rrggbb;
    keep drops the alpha, so that hidden colours show). Pictures whose EXIF tag says so are turned, unless `orientation`
    is keep. Each stretch of `samples_per_shard` rows becomes one shard; with `join_rows` the rows of one picture are
    one row, with a list of captions. Rows whose picture is missing or damaged, and rows without caption, are left out
    and named in `rejected.jsonl`. The shards' bytes do not depend on `workers`; a sample's key is its row's number,
    or what the row has in the column `columns.key`, and its json says under `origin` the captions file, the row and the
    picture. `manifest.json`, written last, has each shard's size and SHA-256. A build that was stopped goes on where it
    was, to the bytes of an unbroken one; one that was finished is left as it is.
    Raises: UserError where an input is missing or unusable, `out` holds other shards or those of a build with other
    options or inputs, or no row is left.
    """
    _check_inputs(images, captions, background)
    lines = count_lines(captions)
    next(read_rows(captions, columns), None)  # a file that is refused leaves no folder behind
    work = Work(BUILD, out)
    rules = PictureRules(background, orientation)
    options = {
        **{"samples-per-shard": samples_per_shard, "background": background, "orientation": orientation},
        **{"join-rows": join_rows, "image-column": columns.image, "caption-column": columns.caption},
        **{
            "key": columns.key,
            "images": os.path.abspath(images),
            "captions": captions.name,
            "captions_digest": captions_digest(captions),
        },
    }
    refuse_foreign_summary(out / SUMMARY)
    refuse_foreign_manifest(out / MANIFEST, MANIFEST_FORMAT)
    refuse_foreign_rejected(out / REJECTED)
    rejected: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    samples = transparent = turned = animated = converted = 0
    named = array("Q")
    sums: list[ShardSum] = []

    def jobs_of(copy: Path) -> Iterator[_Job]:
        rows = read_rows(captions, columns)
        if join_rows:
            rows = joined_rows(rows, partial(_found_picture, images), copy / "rows.jsonl")
        return _jobs(with_unique_keys(rows), captions.name, work, samples_per_shard, unread)

    if not work.folder.exists() and (finished := finished_build(out)) is not None:
        with TemporaryDirectory() as copy:
            pictures = [pictures_digest(images, job.rows) for job in jobs_of(Path(copy))]
        refuse_other_build(finished, work, options, pictures)
        counts = len(finished.shards), sum(shard.samples for shard in finished.shards)
        return BuildReport(out, *counts, rejected, 0, 0, rules, 0, join_rows, Counter(), 0, 0, before=True)
    pictures = []
    with open_work(work, options):
        jobs = jobs_of(work.folder)
        results = map_jobs(partial(_write_shard, images, rules), jobs, workers)
        for name in (SUMMARY, MANIFEST):  # of a build that was stopped in its last step
            (out / name).unlink(missing_ok=True)
        with ExitStack() as stack:
            stack.enter_context(writing(out / REJECTED))
            part = stack.enter_context(whole_file(out / REJECTED))
            log = stack.enter_context(open(part, "w", opener=regular_only))
            advance = stack.enter_context(progress_bar("building shards", lines, show=progress))
            for number, written in enumerate(results):
                if written.samples:
                    sums.append(ShardSum(f"{_name(number)}.tar", written.samples, written.size, written.sha256))
                pictures.append(written.pictures)
                samples += written.samples
                transparent += written.transparent
                turned += written.turned
                animated += written.animated
                converted += written.converted
                named.extend(written.named)
                for reject in written.rejected:
                    rejected[reason_class(reject.reason)] += 1
                    log.write(json.dumps(reject._asdict()) + "\n")
                advance(written.rows)
        if captions_digest(captions) != options["captions_digest"]:
            raise UserError(f"{captions}: has changed while it was read; delete {out} and build anew")
        if samples:
            index = index_shards(os.path.abspath(out), None, finishing=True, workers=workers, progress=progress)
            rejected.update(index.rejected)
            totals = {"samples": samples, "bytes": sum(one.bytes for one in sums)}
            content = {"format": MANIFEST_FORMAT, **totals, **made_of(options, pictures)}
            write_shard_sums(out / MANIFEST, content, sums)
    close_work(work)
    if not samples:
        raise _nothing_left(captions, rejected, out / REJECTED)
    repeated = len(named) - len(np.unique(np.asarray(named)))
    return BuildReport(
        folder=out,
        shards=index.shards,
        samples=index.samples,
        rejected=rejected,
        transparent=transparent,
        turned=turned,
        rules=rules,
        repeated=repeated,
        joined=join_rows,
        unread=unread,
        animated=animated,
        converted=converted,
    )


def _check_inputs(images: Path, captions: Path, background: str) -> None:
    if not BACKGROUND.fullmatch(background):
        raise UserError(f"--background {background}: must be white, black, #rrggbb or keep")
    if not images.is_dir():
        raise UserError(f"{whole_path(images)}: no such folder of pictures")
    if captions.is_fifo() or captions.is_char_device():
        raise UserError(f"{captions}: is a pipe or a device, but is read several times; give a file")


def _nothing_left(captions: Path, rejected: Counter[str], log: Path) -> UserError:
    """Say why no row can be used: the reason of most rows."""
    text = f"{captions}: no row of {rejected.total():,} can be used; see {log}"
    if rejected:
        reason, times = rejected.most_common(1)[0]
        text += f" ({'all' if times == rejected.total() else f'{times:,} of them'}: {reason})"
    return UserError(text)


def _jobs(
    rows: Iterator[CaptionRow], captions: str, work: Work, samples_per_shard: int, unread: Counter[str]
) -> Iterator[_Job]:
    """Divide the rows of a file into shards, and count in `unread` the columns whose text is not read."""
    number = 0
    while stretch := list(islice(rows, samples_per_shard)):
        unread.update(name for row in stretch for name in row.unread)
        yield _Job(work, _name(number), captions, stretch)
        number += 1


def _name(shard: int) -> str:
    return f"{shard:06d}"


def _write_shard(images: Path, rules: PictureRules, job: _Job) -> _Written:
    """Write one shard, whole or not at all, and then its report; no shard where no row can be used.

    A shard that has a report is kept. Raises: UserError where its pictures have changed since.
    """
    pictures = pictures_digest(images, job.rows)
    if (standing := _read_report(job)) is not None:
        if standing.pictures != pictures:
            raise UserError(
                f"{images}: pictures of {job.path} have changed since it was built; go on with the same pictures, "
                f"or delete {job.work.out} and build anew"
            )
        return standing
    job.work.claim(job.shard)
    with writing(job.path), whole_file(job.path) as part:
        # Opened here: webdataset takes a name with a colon for a URL.
        # A fixed time: the same input gives the same bytes.
        with open(part, "wb", opener=regular_only) as file:
            sink = DigestSink(file)
            with TarWriter(sink, encoder=False, mtime=0) as shard:
                written = _write_rows(images, rules, job, shard)
        if not written.samples:
            part.unlink()
    size = sink.size if written.samples else 0
    written = written._replace(size=size, pictures=pictures, sha256=sink.digest.hexdigest())
    replace_file(job.work.report(job.shard), json.dumps(written).encode())
    return written


def _read_report(job: _Job) -> _Written | None:
    """Return how a shard was written, if it was written and still has its size."""
    path = job.work.report(job.shard)
    if not path.exists():
        return None
    try:
        rows, samples, rejected, *others = load_json(read_regular(path))
        written = _Written(rows, samples, [_Reject(*reject) for reject in rejected], *others)
    except (ValueError, TypeError):  # the power failed before the disk had the report
        return None
    stands = job.path.exists() and job.path.stat().st_size == written.size
    if stands and samples and not written.sha256:
        written = written._replace(sha256=file_sha256(job.path))
    return written if stands or not samples else None


def _write_rows(images: Path, rules: PictureRules, job: _Job, shard: TarWriter) -> _Written:
    """Write a job's samples; return the report without what concerns the whole shard."""
    rejected = []
    named = []
    samples = transparent = turned = animated = converted = 0
    for row in job.rows:
        key = row.key or f"{row.number:09d}"
        document = {**row.document, ORIGIN_KEY: make_origin(job.captions, row.number, row.image, row.joined)}
        try:
            picture = _packed(images, rules, row)
            text = encode_document(document)
            digest = picture_digest(picture_path(images, str(row.image)))
        except DamagedSample as damage:
            for number in (row.number, *row.joined):
                rejected.append(_Reject(job.captions, number, key, row.image, str(damage)))
            continue
        shard.write({"__key__": key, "jpg": picture.data, "json": text})
        samples += 1
        transparent += picture.transparent
        turned += picture.turned
        animated += picture.animated
        converted += picture.converted
        named += [digest] * (1 + len(row.joined))
    rows = sum(1 + len(row.joined) for row in job.rows)
    written = _Written(rows, samples, rejected, transparent, turned, named, size=0, pictures="")
    return written._replace(animated=animated, converted=converted)


def _packed(images: Path, rules: PictureRules, row: CaptionRow) -> PackedPicture:
    """Read a row's picture as JPEG. The picture is decoded as a check; raises DamagedSample."""
    if row.fault is not None:
        raise DamagedSample(row.fault)
    return pack_picture(_find(images, str(row.image)), rules)


def _found_picture(images: Path, row: CaptionRow) -> Path | None:
    """Return the picture of a row without fault; None where there is none."""
    if row.fault is not None:
        return None
    try:
        return picture_path(images, str(row.image))
    except DamagedSample:
        return None


def _find(images: Path, name: str) -> bytes:
    """Read the picture that a row names; raises DamagedSample."""
    path = picture_path(images, name)
    try:
        return read_regular(path)
    except OSError as error:
        raise DamagedSample(f"picture cannot be read: {error}") from error
