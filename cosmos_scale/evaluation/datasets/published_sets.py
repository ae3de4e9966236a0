"""The sets of the published evaluation, found by torchvision's classes; pictures are read by our own decoder.

torchvision keeps the files of most sets in attributes of its own. Tests compare each set with torchvision's pictures.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cosmos_scale.config import ClassificationConfig
from cosmos_scale.config.section import redact_urls
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.pictures import ArrayPictures, FilePictures, LabelledPictures, PlacedFile
from cosmos_scale.files import read_regular, reason_of, text_lines, whole_path

# The published evaluation splits Caltech101 by a seed; the second part counts.
CALTECH_PICTURES, CALTECH_FIRST, CALTECH_SEED = 8677, 3000, 3072
_NEEDS_SCIPY = "needs scipy to read its labels; rule: pip install scipy"


class PublishedSet(NamedTuple):
    """How a set is found below a folder, and which files must be there."""

    find: Callable[[Path, ClassificationConfig], LabelledPictures]
    tree: str


def open_published(config: ClassificationConfig) -> LabelledPictures:
    """Find the pictures of a set by its name; raises UserError, with the files that must be there, where they are not.

    Nothing is downloaded and nothing written.
    """
    root, published = Path(config.data), PUBLISHED[config.dataset]
    rule = f"rule: {config.dataset} is {published.tree}"
    if not root.is_dir():
        raise UserError(f"{redact_urls(whole_path(config.data))}: no such folder; {rule}")
    try:
        return published.find(root, config)
    except UserError:
        raise
    except (RuntimeError, ImportError, OSError, ValueError, KeyError, IndexError, EOFError) as error:
        text = " ".join(str(error).split()).replace(" You can use download=True to download it", "")
        if "scipy" in text.lower():
            raise UserError(f"{root}: {config.dataset} {_NEEDS_SCIPY}") from error
        raise UserError(
            f"{root}: not the files of {config.dataset} ({text.rstrip('.') or type(error).__name__}); {rule}"
        ) from error


def _files(root: Path, paths: Sequence[str | Path], labels: Sequence[int], classes: Sequence[str]) -> FilePictures:
    placed = [PlacedFile(str(path), os.path.relpath(path, root)) for path in paths]
    return FilePictures(placed, [int(label) for label in labels], classes)


def _listed(name: str, images: str = "_image_files", **options: str | int) -> Callable[..., LabelledPictures]:
    """Return how a set is opened whose class in torchvision lists files and labels; images: the attribute of files."""

    def open_listed(root: Path, config: ClassificationConfig) -> LabelledPictures:
        from torchvision import datasets  # here: the import takes a second

        found = getattr(datasets, name)(str(root), split="test", **options)
        classes = getattr(found, "classes", None) or [str(label) for label in range(max(found._labels) + 1)]
        return _files(root, getattr(found, images), found._labels, classes)

    return open_listed


def _cifar(name: str) -> Callable[[Path, ClassificationConfig], LabelledPictures]:
    def open_cifar(root: Path, config: ClassificationConfig) -> LabelledPictures:
        from torchvision import datasets

        found = getattr(datasets, name)(str(root), train=False)
        return ArrayPictures(found.data, found.targets, found.classes)

    return open_cifar


def _sun397(root: Path, config: ClassificationConfig) -> LabelledPictures:
    from torchvision.datasets import SUN397

    found = SUN397(str(root))
    # torchvision takes the files in the order of the file system, which differs between hosts.
    pairs = sorted(zip(map(str, found._image_files), found._labels, strict=True))
    if config.split is not None:
        pairs = _of_split(Path(config.split), root / "SUN397", dict(pairs))
    return _files(root, [path for path, _ in pairs], [label for _, label in pairs], found.classes)


def _of_split(split: Path, folder: Path, labels: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return the pictures that a split file names, in its order; its paths begin at the set's folder."""
    try:
        lines = [line.strip() for line in text_lines(read_regular(split).decode())]
    except (OSError, UnicodeDecodeError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "it is no UTF-8"
        raise UserError(f"{split}: cannot be read: {reason}; rule: a path of a picture a line") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        if line:
            path = str(folder / line.lstrip("/"))
            if path not in labels:
                raise UserError(f"{split}: line {number}: {line}: no such picture below {folder}")
            pairs.append((path, labels[path]))
    if not pairs:
        raise UserError(f"{split}: names no picture; rule: a path a line, such as /a/abbey/sun_abc.jpg")
    return pairs


def _stanford_car(root: Path, config: ClassificationConfig) -> LabelledPictures:
    from torchvision.datasets import StanfordCars

    found = StanfordCars(str(root), split="test")
    paths, labels = zip(*found._samples, strict=True)
    return _files(root, paths, labels, found.classes)


def _caltech101(root: Path, config: ClassificationConfig) -> LabelledPictures:
    folder = root / "caltech101" / "101_ObjectCategories"
    if not (folder / "BACKGROUND_Google").is_dir():  # torchvision would make folders, or fail without a reason
        raise FileNotFoundError(f"{folder / 'BACKGROUND_Google'}: no such folder")
    from torchvision.datasets import Caltech101

    found = Caltech101(str(root))
    if len(found) != CALTECH_PICTURES:
        raise UserError(
            f"{folder}: {len(found):,} pictures; rule: {CALTECH_PICTURES:,}, of which a seed draws the published "
            "part; with --dataset folders any number counts"
        )
    second = torch.randperm(len(found), generator=torch.Generator().manual_seed(CALTECH_SEED))[CALTECH_FIRST:]
    places = second.tolist()
    paths = [folder / found.categories[found.y[place]] / f"image_{found.index[place]:04d}.jpg" for place in places]
    return _files(root, paths, [found.y[place] for place in places], found.categories)


PUBLISHED: Mapping[str, PublishedSet] = {
    "food101": PublishedSet(_listed("Food101"), "food-101/meta/test.json and food-101/images/CLASS/ID.jpg"),
    "cifar10": PublishedSet(_cifar("CIFAR10"), "cifar-10-batches-py/ with data_batch_1..5, test_batch, batches.meta"),
    "cifar100": PublishedSet(_cifar("CIFAR100"), "cifar-100-python/ with train, test, meta"),
    "sun397": PublishedSet(_sun397, "SUN397/ClassName.txt and SUN397/a/abbey/sun_ID.jpg and so on"),
    "stanford_car": PublishedSet(
        _stanford_car,
        "stanford_cars/devkit/cars_meta.mat, stanford_cars/cars_test_annos_withlabels.mat and "
        "stanford_cars/cars_test/ID.jpg",
    ),
    "aircraft": PublishedSet(
        _listed("FGVCAircraft", annotation_level="variant"),
        "fgvc-aircraft-2013b/data/ with variants.txt, images_variant_test.txt and images/ID.jpg",
    ),
    "dtd": PublishedSet(_listed("DTD", partition=1), "dtd/dtd/labels/test1.txt and dtd/dtd/images/CLASS/ID.jpg"),
    "pets": PublishedSet(
        _listed("OxfordIIITPet", "_images"), "oxford-iiit-pet/annotations/test.txt and oxford-iiit-pet/images/ID.jpg"
    ),
    "caltech101": PublishedSet(
        _caltech101, "caltech101/101_ObjectCategories/CLASS/image_0001.jpg and so on, BACKGROUND_Google among them"
    ),
    "flowers": PublishedSet(
        _listed("Flowers102"), "flowers-102/ with imagelabels.mat, setid.mat and jpg/image_00001.jpg"
    ),
}
