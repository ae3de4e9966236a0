"""What the published caption files look like: which columns join them with images, and which hold captions."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from cosmos_scale.data.samples.caption_keys import DREAMLIP_KEYS, WHOLE_KEYS, holds_caption, is_missing
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.data.samples.sentences import Split, splitter

Join = Literal["url", "key", "uid"]
Document = dict[str, str | list[str]]


class Dataset(NamedTuple):
    """One published form of captions; column names are compared in lower case with "_" for spaces.

    joins: for each way of joining, the columns that may hold the join value, in order of preference.
    captions: columns of captions, and the keys that they become in a sample's json.
    whole: the keys among them that stay one string.
    split_in_training: whether captions stay strings with --split none, because training splits them.
    """

    name: str
    joins: Mapping[Join, tuple[str, ...]]
    captions: Mapping[str, str]
    whole: frozenset[str]
    split_in_training: bool


# The column "Image Path" of the released files holds URLs. Early files held paths there, which may name img2dataset's
# keys.
DREAMLIP = Dataset(
    "dreamlip",
    {"url": ("image_path", "image_url", "url"), "key": ("key", "image_path")},
    {name.lower(): name for name in DREAMLIP_KEYS},
    whole=frozenset(),
    split_in_training=False,
)
# The column `key` holds keys of PixelProse's own download: they mean your images only if you took PixelProse's shards.
PIXELPROSE = Dataset(
    "pixelprose",
    {"url": ("url",), "key": ("key",), "uid": ("uid",)},
    {"original_caption": "original_caption", "vlm_caption": "caption"},
    whole=WHOLE_KEYS,
    split_in_training=True,
)


def join_value(join: Join, text: str) -> str:
    """Return the form of a join value in which two values that mean the same image are equal.

    Raises: DamagedSample where a path names no key of img2dataset.
    """
    if join != "key":
        return text.strip()
    folder, _, name = text.strip().rpartition("/")
    key = name.split(".")[0]
    # img2dataset's keys begin with the number of their shard, which is the folder's name.
    if folder and not key.startswith(folder.rpartition("/")[2]):
        raise DamagedSample(
            f"not a key: {text.strip()} does not begin with its folder's name, as img2dataset's keys do"
        )
    return (key.lstrip("0") or "0") if key.isdecimal() else key  # tables lose leading zeros


def make_document(dataset: Dataset, cells: Mapping[str, object], split: Split) -> Document:
    """Make a sample's captions from one row's cells by plain column name; the document is empty without captions.

    Raises: DamagedSample where a cell is neither text nor a list of texts.
    """
    pieces = splitter(split)
    document: Document = {}
    for column, key in dataset.captions.items():
        value = cells.get(column)
        if is_missing(value):
            continue
        if isinstance(value, list) and all(isinstance(sentence, str) for sentence in value):
            sentences = [sentence for sentence in value if sentence.strip()]
            if sentences:
                document[key] = sentences
        elif not isinstance(value, str):
            raise DamagedSample(f"wrong type: {column} is neither a text nor a list of texts")
        elif key in dataset.whole or (split == "none" and dataset.split_in_training):
            if holds_caption(key, value):
                document[key] = value.strip()
        elif sentences := pieces(value):
            document[key] = sentences
    return document
