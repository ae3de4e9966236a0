"""The whole preparation of a published dataset, stage by stage."""

import os
from functools import partial
from pathlib import Path

from cosmos_scale.data.jobs import map_jobs, progress_bar
from cosmos_scale.data.prepare.datasets import Dataset, Join
from cosmos_scale.data.prepare.images import list_images
from cosmos_scale.data.prepare.manifest import Prepared, read_prepare_manifest, write_prepare_manifest, write_rejected
from cosmos_scale.data.prepare.matching import match_images
from cosmos_scale.data.prepare.rows import caption_files, check_header
from cosmos_scale.data.prepare.table import build_table
from cosmos_scale.data.prepare.work import Task
from cosmos_scale.data.prepare.writing import write_prepared_shard
from cosmos_scale.data.samples.sentences import Split
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.data.shards.index_report import REJECTED, refuse_foreign_rejected
from cosmos_scale.data.shards.summary import SUMMARY, refuse_foreign_summary
from cosmos_scale.data.work import check_options, open_work
from cosmos_scale.errors import UserError
from cosmos_scale.files import delete_folder, make_folder


def prepare_dataset(
    dataset: Dataset,
    captions: list[Path],
    images: list[Path],
    out: Path,
    *,
    join: Join,
    split: Split,
    workers: int | None = None,
    progress: bool = True,
) -> Prepared:
    """Join caption files with img2dataset's output, and write indexed shards, `rejected.jsonl` and `manifest.json`.

    captions: .csv or .parquet files, or folders of them. images: folders of img2dataset's shards, or single tars.
    Each shard of images becomes one shard of samples; images are kept byte for byte. A preparation that was stopped
    goes on where it was. The bytes of its output are those of an unbroken one, and do not depend on `workers`.
    Raises: UserError where an input is missing or unusable, nothing can be joined, or `out` is of another preparation.
    """
    if inside := next((path for path in images if path.is_dir() and out.exists() and path.samefile(out)), None):
        raise UserError(f"--out {inside}: is the folder of the images; name another folder for the shards")
    task = Task(dataset.name, caption_files(captions), list_images(images), out, join, split)
    options = task.options()
    if (done := read_prepare_manifest(task, options)) is not None:
        delete_folder(task.work)
        return done
    for path in task.captions:  # a file that is refused leaves no folder behind
        check_header(path, task.form, task.join)
    refuse_foreign_summary(out / SUMMARY)
    refuse_foreign_rejected(out / REJECTED)
    with open_work(task.as_work, options):
        make_folder(task.work / "plan")
        build_table(task.table, task.captions, task.form, task.join, progress=progress)
        match_images(task, workers=workers, progress=progress)
        samples = 0
        with progress_bar("writing shards", len(task.images), show=progress) as advance:
            for written in map_jobs(partial(write_prepared_shard, task.for_worker()), task.images, workers):
                samples += written.samples
                advance(1)
        for name in (SUMMARY, REJECTED):  # lines that a stopped run left would stay in the new files
            (out / name).unlink(missing_ok=True)
        if samples:
            index_shards(os.path.abspath(out), None, finishing=True, workers=workers, progress=progress)
        rejected = write_rejected(task)
        if not samples:
            raise UserError(f"{out}: no image could be used; see {out / REJECTED}")
        check_options(task.as_work, task.options(), options, "begun")  # files that changed while they were read
        write_prepare_manifest(task, options, rejected)
    delete_folder(task.work)
    prepared = read_prepare_manifest(task, options)
    assert prepared is not None
    return prepared
