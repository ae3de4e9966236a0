"""Pictures and captions as COCO, Flickr30k and users' lists name them.

Each function returns, for every picture, its file and its captions. Raises UserError, with the file that is expected,
where one is missing or has another form. A single picture that is missing is left to the reading of it.
"""

import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cosmos_scale.data.prepare.cells import read_cell
from cosmos_scale.data.prepare.csv_records import read_header, read_records, refuse_columns_twice
from cosmos_scale.data.samples.caption_keys import (
    KNOWN_NAMES,
    OTHER_NAMES,
    is_missing,
    may_be_caption,
    plain_column,
)
from cosmos_scale.data.samples.document import parse_json
from cosmos_scale.data.samples.file_kind import refuse_no_text
from cosmos_scale.data.tools.captions_file import IMAGE_COLUMNS
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.pictures import PlacedFile
from cosmos_scale.files import load_json, name_on_disk, read_regular, reason_of, whole_path
from cosmos_scale.words import counted

LIST_THEM = "rule: all captions of a picture are a list under one key"
Captioned = tuple[PlacedFile, list[str]]

COCO = "coco_val2017 is annotations/captions_val2017.json and images/val2017/000000000139.jpg and so on"
KARPATHY = (
    "coco_karpathy_test is annotations/coco_karpathy_test.json (a list of image and caption) or annotations/"
    "dataset_coco.json (Karpathy's own), and images/val2014/COCO_val2014_000000391895.jpg and so on"
)
FLICKR30K = (
    'flickr30k_{split}.json, a list of {{"image": "flickr30k-images/ID.jpg", "caption": [5 texts]}}, '
    "images beginning at the folder above it"
)
PAIRS = (
    'a .jsonl file of {"image": "a.jpg", "caption": "a text" or ["a text", ...]}, or a .csv or .tsv file with the '
    "columns image and caption; pictures lie beside the file"
)


def open_coco(root: Path) -> list[Captioned]:
    """COCO's whole val2017: captions in the file's order, pictures in the order of their first captions.

    Pictures without a caption are left out. Source: the published evaluation, which does not take Karpathy's split.
    """
    path = _existing(root, ["annotations/captions_val2017.json"], COCO)
    document = _read_json(path, COCO)
    try:
        names = {image["id"]: str(image["file_name"]) for image in document["images"]}
        captions: dict[str, list[str]] = {}
        for annotation in document["annotations"]:
            captions.setdefault(names[annotation["image_id"]], []).append(_string(annotation["caption"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: has no images and annotations of COCO's form ({_shown(error)}); rule: {COCO}"
        ) from error
    folder = _folder_of(path, [root / "images/val2017", root / "val2017"], list(captions), COCO)
    return [_placed(folder, name, texts) for name, texts in captions.items()]


def open_karpathy(root: Path) -> list[Captioned]:
    """The 5,000 pictures of COCO's val2014 that Karpathy chose for tests: what most papers report."""
    names = ("coco_karpathy_test.json", "dataset_coco.json")
    path = _existing(root, [f"{folder}{name}" for name in names for folder in ("annotations/", "")], KARPATHY)
    document = _read_json(path, KARPATHY)
    try:
        if isinstance(document, dict):
            captions = {
                f"{image['filepath']}/{image['filename']}": [_string(one["raw"]) for one in image["sentences"]]
                for image in document["images"]
                if image["split"] == "test"
            }
        else:
            captions = _lists(document)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: has another form ({_shown(error)}); rule: {KARPATHY}") from error
    folder = _folder_of(path, [root / "images", root], list(captions), KARPATHY)
    return [_placed(folder, name, texts) for name, texts in captions.items()]


def open_flickr30k(root: Path, split: str) -> list[Captioned]:
    """Flickr30k's val or test pictures; the published evaluation takes val.

    Names of pictures begin at the parent of `root`, or, where they do not lie there, at `root`. Where `root` is a link,
    its parent is the folder that holds the link, or else that of the folder it leads to.
    """
    rule = FLICKR30K.format(split=split)
    path = _existing(root, [f"flickr30k_{split}.json"], rule)
    document = _read_json(path, rule)
    try:
        captions = _lists(document)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: has another form ({_shown(error)}); rule: {rule}") from error
    here, there = Path(os.path.abspath(root)), root.resolve()
    folder = _folder_of(path, [here.parent, there.parent, here], list(captions), rule)
    return [_placed(folder, name, texts) for name, texts in captions.items()]


def open_pairs(path: Path, captions_key: str | None, tell: Callable[[str], None] | None = None) -> list[Captioned]:
    """Pictures and captions of a .jsonl, .csv or .tsv file; rows of one picture are put together, in order.

    One picture is one file, whichever links and spellings (./a.jpg, b/../a.jpg) lead to it: its first name counts.
    captions_key: the key or column of the captions; None: the one that is called as captions are called. tell: is told
    of texts that seem to be further captions, which that one leaves out.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
        ".jsonl": _json_rows,
        ".csv": lambda path: _csv_rows(path, ",", captions_key),
        ".tsv": lambda path: _csv_rows(path, "\t", captions_key),
    }
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: its name ends with none of {', '.join(readers)}; rule: {PAIRS}")
    rows: list[tuple[str, list[str]]] = []
    unread: Counter[str] = Counter()
    for number, cells in readers[path.suffix.lower()](path):
        where = f"{path}: line {number}"
        row = {key: read_cell(plain_column(key), value) for key, value in cells.items()}
        named = [(plain_column(key), value) for key, value in row.items() if value and not is_missing(value)]
        image = next((value for column in IMAGE_COLUMNS for name, value in named if name == column), None)
        if not isinstance(image, str):
            raise UserError(
                f"{where}: has no picture under {', '.join(IMAGE_COLUMNS)}, but {_keys(row)}; rule: {PAIRS}"
            )
        key = captions_key or _caption_key(row, where)
        if captions_key is None:
            unread.update(name for name in row if name != key and may_be_caption(plain_column(name), row[name]))
        if key not in row:
            raise UserError(f"{where}: has no captions under {key!r}, but {_keys(row)}; rule: {PAIRS}")
        found = row[key] if isinstance(row[key], list) else [row[key]]
        if not all(isinstance(text, str) or is_missing(text) for text in found):
            raise UserError(f"{where}: {key} is neither a text nor a list of texts; rule: {PAIRS}")
        rows.append((image, [text for text in found if isinstance(text, str) and text.strip()]))
    if not rows:
        raise UserError(f"{path}: names no picture; rule: {PAIRS}")
    if tell is not None:
        for key, times in unread.items():
            tell(
                f"{path}: {counted(times, 'row')} {'has' if times == 1 else 'have'} text under {key}, which is not "
                f"read; {LIST_THEM}, or lie in rows of their own; --captions KEY names another key"
            )
    names = list(dict.fromkeys(name for name, _ in rows))
    folder = _folder_of(path, [path.absolute().parent, path.resolve().parent], names, PAIRS)
    files = {name: _file_of(folder, name) for name in names}
    pictures: dict[str, Captioned] = {}
    for name, texts in rows:
        pictures.setdefault(files[name], _placed(folder, name, []))[1].extend(texts)
    return list(pictures.values())


def _file_of(folder: Path, name: str) -> str:
    """Return the path of the file that a picture's name leads to; that of a name no file can have is as good as any."""
    path = folder / name_on_disk(name)
    try:
        return os.path.realpath(path)
    except ValueError:  # a NUL, or half of a surrogate pair
        return str(path)


def _caption_key(row: dict[str, Any], where: str) -> str:
    found = [key for key in row if plain_column(key) in KNOWN_NAMES or plain_column(key) in OTHER_NAMES]
    if len(found) != 1:
        said = f"captions under several keys: {', '.join(found)}" if found else f"no captions, but {_keys(row)}"
        raise UserError(f"{where}: has {said}; rule: name the key with --captions KEY; {PAIRS}")
    return found[0]


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_read_text(path, PAIRS).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.encode())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number}: is no JSON: {error}; rule: {PAIRS}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number}: is no JSON object; rule: {PAIRS}")
        yield number, row


def _csv_rows(path: Path, delimiter: str, captions_key: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    records = read_records(io.StringIO(_read_text(path, PAIRS), newline=""), delimiter, spaced=True)
    header = read_header(path, records)
    captions = (*KNOWN_NAMES, *OTHER_NAMES) if captions_key is None else (plain_column(captions_key),)
    refuse_columns_twice(path, header, {*IMAGE_COLUMNS, *captions})
    for record in records:
        if record.fault is not None:
            raise UserError(f"{path}: line {record.line}: {record.fault}; rule: {PAIRS}")
        if any(cell.strip() for cell in record.cells):  # spreadsheets write rows of empty cells behind the last one
            yield record.line, dict(zip(header, record.cells, strict=True))


def _lists(document: Any) -> dict[str, list[str]]:
    """Return the captions of pictures in ALBEF's and BLIP's form; raises ValueError where a caption is no list."""
    if not isinstance(document, list):
        raise ValueError("it is no list")
    captions = {}
    for item in document:
        if not isinstance(item["caption"], list):
            raise ValueError(f"caption of {item['image']} is no list of texts")
        captions[_string(item["image"])] = [_string(text) for text in item["caption"]]
    return captions


def _existing(root: Path, names: Sequence[str], rule: str) -> Path:
    """Return the first of some files that is there."""
    if not root.is_dir():
        raise UserError(f"{whole_path(root)}: no such folder; rule: {rule}")
    found = next((root / name for name in names if (root / name).is_file()), None)
    if found is None:
        raise UserError(f"{root}: no {' or '.join(names)} in it; rule: {rule}")
    return found


def _folder_of(listed: Path, folders: Sequence[Path], names: Sequence[str], rule: str) -> Path:
    """Return the first of some folders in which a picture of one of the names lies; listed: the file of the names."""
    if not names:
        raise UserError(f"{listed}: names no picture; rule: {rule}")
    for name in names:
        for folder in folders:
            if (folder / name_on_disk(name)).is_file():
                return folder
    where = " or ".join(dict.fromkeys(str(folder.absolute()) for folder in folders))
    raise UserError(
        f"{listed}: none of its {counted(len(names), 'picture')}, such as {names[0]}, is in {where}; rule: {rule}"
    )


def _placed(folder: Path, name: str, texts: list[str]) -> Captioned:
    return PlacedFile(str(folder / name_on_disk(name)), name), texts


def _read_text(path: Path, rule: str) -> str:
    try:
        refuse_no_text(path)
        return read_regular(path).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason_of(error)}; rule: {rule}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no UTF-8; rule: {rule}") from error


def _read_json(path: Path, rule: str) -> Any:
    try:
        return load_json(_read_text(path, rule))
    except ValueError as error:
        raise UserError(f"{path}: is no JSON: {' '.join(str(error).split())}; rule: {rule}") from error


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]} is no text")
    return value


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(row) or "no keys"


def _shown(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
