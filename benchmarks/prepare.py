"""What the preparation of published captions costs: the join table, beside one in SQLite, and writing the shards.

The captions file is made here in DreamLIP's form, with rows of about the real size. Photos of about 0.24 megapixels lie
in shards as img2dataset writes them. Seconds are CPU seconds of one process.
"""

import csv
import json
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/prepare.py`

from webdataset.writer import TarWriter

from benchmarks.report import Figure, argument_parser, report
from cosmos_scale.cli.arguments import positive
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.data.prepare.datasets import DREAMLIP, join_value
from cosmos_scale.data.prepare.prepare import prepare_dataset
from cosmos_scale.data.prepare.rows import scan_captions
from cosmos_scale.data.prepare.table import JoinTable, build_table, join_hash
from cosmos_scale.data.samples.caption_keys import DREAMLIP_KEYS
from cosmos_scale.data.samples.sentences import split_published, split_sentences
from cosmos_scale.testing.photos import caption_documents, jpeg_photos

ROWS = 100_000
PHOTOS, SHARDS, PER_SHARD = 256, 4, 512
KEYS = DREAMLIP_KEYS


def write_captions(path: Path, rows: int) -> None:
    """Write so many rows in DreamLIP's form, each with a URL of its own."""
    texts = [[". ".join(document[key]) + "." for key in KEYS] for document in caption_documents(500)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Image Path", *KEYS])
        writer.writerows([url(row), *texts[row % len(texts)]] for row in range(rows))


def write_images(folder: Path, rows: int) -> int:
    """Write shards of photos whose URLs lie all over the captions file; returns their bytes."""
    photos = jpeg_photos(PHOTOS)
    total = 0
    for shard in range(SHARDS):
        with TarWriter(str(folder / f"{shard:05d}.tar"), encoder=False, mtime=0) as archive:
            for place in range(PER_SHARD):
                number = shard * PER_SHARD + place
                photo = photos[number % len(photos)]
                text = json.dumps({"url": url(number * (rows // (SHARDS * PER_SHARD)))}).encode()
                archive.write({"__key__": f"{shard * 10_000 + place:09d}", "jpg": photo, "json": text})
                total += len(photo)
    return total


def url(row: int) -> str:
    """Return the URL of a row, in no order of the alphabet."""
    return f"https://images.example.org/{row * 2654435761 % 2**32:08x}/{row}.jpg"


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds that work takes in this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def sqlite_table(path: Path, captions: Path) -> None:
    """Build the same table as an SQLite table with the hash as its key."""
    _, rows = scan_captions(captions, path, DREAMLIP, "url", lambda _: None)
    with sqlite3.connect(path) as base:
        base.execute("pragma journal_mode = off")
        base.execute("create table t (hash integer primary key, offset integer, size integer, row integer)")
        values = ((join_hash(join_value("url", row.value)) >> 1, row.offset, row.size, row.number) for row in rows)
        base.executemany("insert or ignore into t values (?, ?, ?, ?)", values)


def main() -> int:
    parser = argument_parser("prepare", "What preparing published captions costs.", ["", "--rows 1000000"])
    parser.add_argument("--rows", type=positive, default=ROWS, metavar="N", help=f"of captions; default: {ROWS:,}")
    arguments = parser.parse_args()
    rows: int = max(arguments.rows, SHARDS * PER_SHARD)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        captions, images = folder / "captions.csv", folder / "images"
        images.mkdir()
        write_captions(captions, rows)
        photo_bytes = write_images(images, rows)
        table = folder / "table"
        build = seconds(lambda: build_table(table, [captions], DREAMLIP, "url", progress=False))
        table_bytes = sum(path.stat().st_size for path in table.glob("*.bin"))
        sqlite = seconds(lambda: sqlite_table(folder / "table.sqlite", captions))
        sqlite_bytes = (folder / "table.sqlite").stat().st_size
        wanted = [url(row) for row in range(0, rows, rows // 2000)]
        look_up = seconds(lambda: JoinTable(table).find(wanted))
        pairs = SHARDS * PER_SHARD
        write = seconds(
            lambda: prepare_dataset(
                DREAMLIP,
                [captions],
                [images],
                folder / "out",
                join="url",
                split="sentences",
                workers=1,
                progress=False,
            )
        )
        csv_bytes = captions.stat().st_size
    texts = [". ".join(document[key]) + "." for document in caption_documents(500) for key in KEYS]
    characters = sum(map(len, texts))
    of_rows = f"{rows:,} rows of {csv_bytes / rows:,.0f} bytes"
    report(
        "Preparing published captions, one process",
        [
            Figure("prepare_table", rows / build, "rows/s", f"captions file to join table, {of_rows}"),
            Figure("prepare_table_bytes", table_bytes / rows, "bytes/row", "join table on disk"),
            Figure("prepare_sqlite", rows / sqlite, "rows/s", "the same as an SQLite table"),
            Figure("prepare_sqlite_bytes", sqlite_bytes / rows, "bytes/row", "the same as an SQLite table"),
            Figure("prepare_look_up", len(wanted) / look_up, "rows/s", "look-ups in the join table"),
            Figure(
                "prepare_pairs",
                pairs / (write - build),
                "images/s",
                f"match, check by decoding, split, write, index; {photo_bytes / pairs / 1e3:,.0f} kB an image",
            ),
            Figure(
                "prepare_split",
                characters / seconds(lambda: [split_sentences(text) for text in texts]) / 1e6,
                "MB/s",
                "captions into sentences",
            ),
            Figure(
                "prepare_split_published",
                characters / seconds(lambda: [split_published(text) for text in texts]) / 1e6,
                "MB/s",
                "captions cut at every full stop",
            ),
        ],
        arguments.json,
    )
    return 0


if __name__ == "__main__":
    leave_after(main)
