"""Small downloads as img2dataset leaves them, and caption files as they are published, of real JPEGs."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from webdataset.writer import TarWriter

from cosmos_scale.testing.shard_files import picture

DREAMLIP_HEADER = ["Image Path", "raw_caption"] + [
    f"{length}{model}_captions" for model in ("IB", "SV", "LLA") for length in ("short", "long")
]
# What img2dataset lists of every URL that it tried.
LISTING = {
    "url": pyarrow.string(),
    "key": pyarrow.string(),
    "status": pyarrow.string(),
    "error_message": pyarrow.string(),
    "width": pyarrow.int32(),
    "height": pyarrow.int32(),
    "sha256": pyarrow.string(),
}


class Download(NamedTuple):
    """One image of a download. data: None where it failed. listed, stored: whether parquet and shard have it."""

    key: str
    url: str
    data: bytes | None
    listed: bool = True
    stored: bool = True
    more: tuple[tuple[str, str], ...] = ()


def url(number: int) -> str:
    return f"https://images.example.org/{number:04d}.jpg?a=1,2"


def download(number: int, *, key: int | None = None) -> Download:
    return Download(f"{number if key is None else key:09d}", url(number), picture(number))


def metadata(item: Download) -> dict[str, Any]:
    failed = item.data is None
    return {
        "url": item.url,
        "key": item.key,
        "status": "failed_to_download" if failed else "success",
        "error_message": "HTTP Error 404: Not Found" if failed else None,
        "width": None if failed else 24,
        "height": None if failed else 20,
        "sha256": None,
        **dict(item.more),
    }


def write_tar(folder: Path, name: str, items: Sequence[Download], *, listing: bool = True) -> Path:
    """A shard of --output_format webdataset."""
    folder.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(folder / f"{name}.tar"), encoder=False, mtime=0) as shard:
        for item in items:
            if item.data is not None and item.stored:
                text = json.dumps(metadata(item), indent=4).encode()
                shard.write({"__key__": item.key, "jpg": item.data, "txt": b"of the web page", "json": text})
    if listing:
        write_listing(folder, name, items)
    return folder / f"{name}.tar"


def write_folder(folder: Path, name: str, items: Sequence[Download], *, listing: bool = True) -> Path:
    """A shard of --output_format files."""
    (folder / name).mkdir(parents=True)
    for item in items:
        if item.data is not None and item.stored:
            (folder / name / f"{item.key}.jpg").write_bytes(item.data)
            (folder / name / f"{item.key}.json").write_text(json.dumps(metadata(item)))
    if listing:
        write_listing(folder, name, items)
    return folder / name


def write_listing(folder: Path, name: str, items: Iterable[Download]) -> None:
    rows = [metadata(item) for item in items if item.listed]
    columns = LISTING | {key: pyarrow.string() for row in rows for key in row if key not in LISTING}
    table = pyarrow.table(
        {column: pyarrow.array([row.get(column) for row in rows], kind) for column, kind in columns.items()}
    )
    pyarrow.parquet.write_table(table, folder / f"{name}.parquet")
    (folder / f"{name}_stats.json").write_text(json.dumps({"count": len(rows)}))


def dreamlip_row(number: int, name: str | None = None) -> list[str]:
    """One row with seven captions; the long ones have several sentences, with commas, quotes and a decimal number."""
    cells = [name or url(number), f"raw caption {number}"]
    for model in ("IB", "SV", "LLA"):
        cells += [
            f"A short {model} caption of picture {number}.",
            f'The image shows "{model}, {number}". It weighs 3.5 kg.\nIt stands in the U.S. and shines.',
        ]
    return cells


def write_dreamlip(path: Path, rows: Iterable[Sequence[str]], header: Sequence[str] = DREAMLIP_HEADER) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def pixelprose_row(number: int) -> dict[str, Any]:
    return {
        "uid": f"{number:032x}",
        "url": url(number),
        "key": f"{number + 700:08d}",
        "status": "success",
        "original_caption": f"St. Paul's, picture {number}",
        "vlm_model": "gemini-pro-vision",
        "vlm_caption": f"This image displays: a cat of 3.5 kg.\nIt is number {number} in the U.S. registry. ",
        "toxicity": 0.001,
        "aesthetic_score": 5.1,
    }


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path
