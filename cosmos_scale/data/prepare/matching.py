"""Which captions row each image takes, decided from the downloads' listings before an image is read.

One process decides, in the order of the shards: the first image with a join value takes the value's row, and any other
image with it is a duplicate. So the number of processes does not matter, and a wrong folder shows in seconds.
"""

from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cosmos_scale.data.jobs import map_jobs, progress_bar
from cosmos_scale.data.prepare.images import SUCCESS, ImageShard, read_listing
from cosmos_scale.data.prepare.table import MISSING, JoinTable, read_table_summary
from cosmos_scale.data.prepare.work import Task, reading_work
from cosmos_scale.data.samples.file_kind import HEAD
from cosmos_scale.data.samples.normal_forms import other_forms
from cosmos_scale.data.shards.reader import refuse_other_kinds
from cosmos_scale.errors import UserError
from cosmos_scale.files import regular_only, whole_file, writing
from cosmos_scale.words import counted

DUPLICATE = -2  # in a plan: the image's row belongs to an image before it
# What became of each row of the table. MISSPELT: an image has the row's value in another Unicode form.
UNSEEN, FAILED, TAKEN, MISSPELT = 0, 1, 2, 3


class _Found(NamedTuple):
    """What a shard lists. unknown: an image whose join value is not known, and why not.

    misspelt: rows whose join value is that of an image without row, but for the Unicode form.
    """

    positions: NDArray[np.int64]
    downloaded: NDArray[np.bool_]
    examples: list[str]
    unknown: str | None
    misspelt: NDArray[np.int64]


def match_images(task: Task, *, workers: int | None, progress: bool) -> None:
    """Write the plan of every shard, and what became of every row of the table; finished plans are kept.

    Raises: UserError where no image at all has captions.
    """
    if task.states.exists():
        return
    state = np.zeros(len(JoinTable(task.table)), dtype=np.uint8)
    examples: list[str] = []
    unknown: str | None = None
    images = matched = 0
    misspelt = [np.zeros(0, dtype=np.int64)]
    results = map_jobs(partial(_find, task.for_worker()), task.images, workers)
    with progress_bar("matching images (shards)", len(task.images), show=progress) as advance:
        for shard, found in zip(task.images, results, strict=True):
            positions = _settle(found, state)
            images += int(found.downloaded.sum())
            matched += int((found.downloaded & (found.positions != MISSING)).sum())
            unknown = unknown or found.unknown
            misspelt.append(found.misspelt)
            examples += found.examples[: 2 - len(examples)]
            with writing(path := task.plan(shard.name)), open(path, "wb", opener=regular_only) as file:
                np.save(file, positions)
            advance(1)
    rows = np.concatenate(misspelt)
    if matched == 0:
        alike = "; some differ by their Unicode form alone (NFC and NFD)" if len(rows) else ""
        raise UserError(_no_overlap(task, images, unknown, examples) + alike)
    state[rows[state[rows] == UNSEEN]] = MISSPELT
    with writing(task.states), whole_file(task.states) as part, open(part, "wb", opener=regular_only) as file:
        np.save(file, state)


def read_states(task: Task, rows: int) -> NDArray[np.uint8]:
    """Return what became of each row of the table: [rows]. Raises: UserError where the file cannot be read."""
    with reading_work(task.states), open(task.states, "rb", opener=regular_only) as file:
        states: NDArray[np.uint8] = np.load(file)
        if len(states) != rows:
            raise ValueError(f"it has {counted(len(states), 'row')}, the table {rows}")
    return states


def _find(task: Task, shard: ImageShard) -> _Found:
    listed = read_listing(shard, task.join)
    table = JoinTable(task.table)
    positions = table.find([image.value or "" for image in listed])
    values = [image.value for image in listed if image.value is not None]
    positions[[image.value is None for image in listed]] = MISSING
    downloaded = np.array([image.status == SUCCESS for image in listed], dtype=bool)
    unknown = next((image for image in listed if image.value is None), None)
    said = None if unknown is None else f"{shard.path.name}, {unknown.key}: {unknown.error or 'its parquet says none'}"
    rowless = (image.value for image, position in zip(listed, positions, strict=True) if position == MISSING)
    near = table.find([other for value in rowless if value is not None for other in other_forms(value)])
    return _Found(positions, downloaded, values[:2], said, near[near != MISSING])


def _settle(found: _Found, state: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Mark the rows that a shard's images take; returns the shard's plan."""
    positions: NDArray[np.int64] = found.positions.copy()
    candidates = np.flatnonzero(found.downloaded & (positions != MISSING))
    rows = positions[candidates]
    first = np.zeros(len(rows), dtype=bool)
    first[np.unique(rows, return_index=True)[1]] = True
    taken = first & (state[rows] != TAKEN)
    positions[candidates[~taken]] = DUPLICATE
    state[rows] = TAKEN
    failed = positions[~found.downloaded & (positions != MISSING)]
    state[failed] = np.maximum(state[failed], FAILED)
    return positions


def _no_overlap(task: Task, images: int, unknown: str | None, examples: list[str]) -> str:
    folder = task.images[0].path.parent
    if not images:
        for shard in task.images:
            with suppress(OSError), open(shard.path, "rb", opener=regular_only) as file:  # no folder
                refuse_other_kinds(shard.path, file.read(HEAD))
        return f"{folder}: no image was downloaded into its {counted(len(task.images), 'shard')}"
    if unknown and not examples:
        return (
            f"{folder}: its images do not say their {task.join}: a .parquet beside the shards or a .json with each "
            f"image must have it ({unknown})"
        )
    theirs = ", ".join(read_table_summary(task.table).examples)
    return (
        f"{folder}: {counted(images, 'image')}, but none has captions in {task.captions[0].name}: "
        f"{task.join}s there are such as {theirs}, here such as {', '.join(examples)}"
    )
