"""One shard of images and its captions to one shard of samples."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from webdataset.writer import TarWriter

from cosmos_scale.data.decode.picture import DEFAULT_MAX_PIXELS, decode_rgbx
from cosmos_scale.data.prepare.datasets import Document, join_value, make_document
from cosmos_scale.data.prepare.images import SUCCESS, Image, ImageShard, Listed, read_images, read_listing
from cosmos_scale.data.prepare.matching import DUPLICATE, TAKEN, read_states
from cosmos_scale.data.prepare.pairing import Pairing, absent
from cosmos_scale.data.prepare.rows import RowReader
from cosmos_scale.data.prepare.table import MISSING, JoinTable, read_table_summary
from cosmos_scale.data.prepare.work import Task, reading_work
from cosmos_scale.data.samples.caption_keys import plain_column
from cosmos_scale.data.samples.document import encode_document
from cosmos_scale.data.samples.normal_forms import OTHER_FORM, other_forms
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.data.shards.checksums import DigestSink
from cosmos_scale.errors import UserError
from cosmos_scale.files import load_json, read_regular, regular_only, replace_file, whole_file, writing


class Written(NamedTuple):
    """How one shard came out; `rejected` holds one object per image, as in rejected.jsonl."""

    shard: str
    samples: int
    size: int
    sha256: str
    rejected: list[dict[str, Any]]


def write_prepared_shard(task: Task, shard: ImageShard) -> Written:
    """Write one shard, whole or not at all, and then its report; a shard that has a report is kept.

    Raises: UserError where a file cannot be read or written.
    """
    if (standing := read_report(task, shard.name)) is not None:
        return standing
    target = task.out / f"{shard.name}.tar"
    rejected: list[dict[str, Any]] = []
    samples = 0
    task.as_work.claim(shard.name)
    with writing(target), whole_file(target) as part:
        with open(part, "wb", opener=regular_only) as file:
            sink = DigestSink(file)
            # A fixed time: the same input gives the same bytes.
            with TarWriter(sink, encoder=False, mtime=0) as archive:
                for sample in _samples(task, shard, rejected):
                    archive.write(sample)
                    samples += 1
        if not samples:
            part.unlink()
    written = Written(shard.name, samples, sink.size if samples else 0, sink.digest.hexdigest(), rejected)
    replace_file(task.report(shard.name), json.dumps(written).encode())
    return written


def read_report(task: Task, shard: str) -> Written | None:
    """Return how a shard was written, if it was written and still has its size."""
    path = task.report(shard)
    if not path.exists():
        return None
    try:
        written = Written(*load_json(read_regular(path)))
    except (ValueError, TypeError):  # the power failed before the disk had the report
        return None
    target = task.out / f"{shard}.tar"
    stands = target.exists() and target.stat().st_size == written.size
    return written if stands or not written.samples else None


def _samples(task: Task, shard: ImageShard, rejected: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard in its images' order; other images and rows are added to `rejected`."""
    listed = read_listing(shard, task.join)
    with reading_work(task.plan(shard.name)), open(task.plan(shard.name), "rb", opener=regular_only) as file:
        plan: NDArray[np.int64] = np.load(file)
    if len(plan) != len(listed):
        raise UserError(f"{shard.path}: changed while it was prepared; name another folder with --out")
    pairing = Pairing(listed, plan.tolist(), task.join)

    def reject(key: str | None, reason: str, value: str | None = None, row: dict[str, Any] | None = None) -> None:
        known: dict[str, Any] = {} if value is None else {task.join: value}
        # Not "shard": indexing the output again would take the line for a line of the index, and drop it.
        rejected.append({"images": shard.path.name, "key": key, **known, **(row or {}), "reason": reason})

    with _Captions(task) as captions:
        for image in read_images(shard, task.join):
            if not image.key:
                reject(None, str(image.fault))
                continue
            entries, fault = pairing.take(image)
            fault = image.fault or fault
            if fault is None:
                (known, position), *_ = entries
                try:
                    text = encode_document({**captions.read(known, position), task.join: known.value})
                    _check(image)
                except DamagedSample as damage:
                    fault = str(damage)
                else:
                    yield {"__key__": image.key, image.extension: image.data, "json": text}
                    continue
            if not entries:
                reject(image.key, fault)
            for known, position in entries:
                reject(image.key, fault, known.value, captions.place(position))
        for known, position in pairing.left():
            row = {} if captions.is_taken(position) and known.status != SUCCESS else captions.place(position)
            reject(known.key, absent(known), known.value, row)


def _check(image: Image) -> None:
    """Raise DamagedSample where training could not decode an image."""
    try:
        decode_rgbx(image.data, DEFAULT_MAX_PIXELS)
    except DamagedSample as damage:
        raise DamagedSample(f"damaged image: {damage}") from damage


class _Captions:
    """Reads the captions of images by position in the table; a context manager."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._table = JoinTable(task.table)
        self._states = read_states(task, len(self._table))
        self._reader = RowReader(read_table_summary(task.table).files)

    def __enter__(self) -> "_Captions":
        self._reader.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.__exit__(*error)

    def place(self, position: int) -> dict[str, Any]:
        """Name the row, for rejected.jsonl."""
        if position < 0:
            return {}
        place = self._table.places[position]
        return {"captions": self._task.captions[place["file"]].name, "row": int(place["row"])}

    def is_taken(self, position: int) -> bool:
        """Whether an image that was downloaded takes the row, in this shard or another."""
        return position >= 0 and bool(self._states[position] == TAKEN)

    def read(self, image: Listed, position: int) -> Document:
        """Return an image's captions; raises DamagedSample where it has none."""
        task = self._task
        if image.value is None:
            said = image.error or f"the parquet beside its shard says no {task.join}"
            raise DamagedSample(f"image without captions: its {task.join} is not known: {said}")
        if position == DUPLICATE:
            raise DamagedSample(f"duplicate image: an image before it has the same {task.join}")
        if position == MISSING:
            near = self._table.find(list(other_forms(image.value)))
            rule = f", but {OTHER_FORM} is in a row" if len(near) and near.max() != MISSING else ""
            raise DamagedSample(f"image without captions: no row has its {task.join}{rule}")
        place = self._table.places[position]
        joins = {plain_column(name) for name in task.form.joins[task.join]}
        cells = self._reader.read(int(place["file"]), int(place["offset"]), int(place["size"]), joins)
        # The table holds hashes: here the values themselves are compared.
        values = (cells[plain_column(name)] for name in task.form.joins[task.join] if plain_column(name) in cells)
        if join_value(task.join, str(next(values))) != image.value:
            raise DamagedSample(f"image without captions: no row has its {task.join}")
        document = make_document(task.form, cells, task.split)
        if not document:
            raise DamagedSample("no caption: every captions cell of its row is empty")
        return document
