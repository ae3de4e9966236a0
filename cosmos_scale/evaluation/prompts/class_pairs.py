"""Whether a file's class names are those of the classes that the data has: by the names that the data itself gives."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.prompts.texts import Names
from cosmos_scale.model.tokenizer import clean
from cosmos_scale.words import counted

_SHOWN = 3  # pairs
_LEAST_LETTERS = 3  # of a word that says something
# Names that lists of ImageNet's 1,000 classes have twice, by origin: there is nothing that a user could mend.
_IMAGENET_CLASSES = 1000
_IMAGENET_TWICE = frozenset({"cardigan", "crane", "maillot", "missile", "sunglasses"})


class DataNames(NamedTuple):
    """What data calls its classes. names: by label, one or more names; a label may be missing.

    origin: where the names stand, such as "folder". rule: which order lines must have.
    """

    origin: str
    names: Mapping[int, tuple[str, ...]]
    rule: str


class ClassPairs(NamedTuple):
    """The first classes as data and lines call them, and what is doubtful about the lines; "" where nothing is.

    alike: which classes have the same names, as `alike_names` says it.
    """

    shown: str
    doubt: str
    alike: str = ""

    def warn(self) -> None:
        """Say on stderr what is doubtful."""
        for doubt in filter(None, (self.doubt, self.alike)):
            print(f"doubtful names: {doubt}", file=sys.stderr)


def pair_names(path: Path, lines: Names, data: DataNames) -> ClassPairs:
    """Compare the lines of a file with what the data calls its classes, in lower case and with blanks for _ and -.

    Raises UserError where several classes have the lines of other classes; a single one is doubtful. Lines may also be
    right and have other words (ids, synonyms, another language): then the pairs are shown.
    """
    plain_lines = [{plain_name(name) for name in of_class} for of_class in lines]
    plain_data = {label: {plain_name(name) for name in names} for label, names in data.names.items()}
    right = {label for label, names in plain_data.items() if names & plain_lines[label]}
    # A name that stands in another class's line is no fault where that class has the name too: there are homonyms.
    misplaced = [
        label
        for label, names in plain_data.items()
        if label not in right
        and (at := [place for place, line in enumerate(plain_lines) if names & line])
        and not right.intersection(at)
    ]
    if len(misplaced) > 1:
        raise UserError(f"{path}: {_difference(misplaced[0], lines, data)}; {data.rule}")
    # Ids say nothing of their classes, so that nothing is doubtful.
    named = [label for label, names in plain_data.items() if any(map(_is_words, names))]
    unlike = [label for label in named if not _share_word(plain_data[label], plain_lines[label])]
    doubt = ""
    if misplaced or 2 * len(unlike) > len(named):
        doubtful = misplaced or unlike
        doubt = (
            f"{path}: {_difference(doubtful[0], lines, data)}, and {counted(len(doubtful), 'line')} of {len(lines):,} "
            f"may be of other classes; {data.rule}"
        )
    pairs = [f"{names[0]} is {lines[label][0]!r}" for label, names in sorted(data.names.items())]
    shown = shown_pairs(pairs) if len(right) < len(plain_data) else ""
    return ClassPairs(shown, doubt)


def alike_names(where: str, names: Names, called: Sequence[str | int], rule: str) -> str:
    """Say which classes have the same names for the tokenizer, so that a model gives all of them to one; "" for none.

    where: such as "names.txt: lines". called: what stands there for each class, such as its line's number.
    """
    labels_of: dict[frozenset[str], list[int]] = {}
    for label, of_class in enumerate(names):
        labels_of.setdefault(frozenset(map(clean, of_class)), []).append(label)
    known = _IMAGENET_TWICE if len(names) == _IMAGENET_CLASSES else frozenset()
    alike = [labels for texts, labels in labels_of.items() if len(labels) > 1 and not texts <= known]
    if not alike:
        return ""
    said = [f"{' and '.join(str(called[label]) for label in labels)} are {names[labels[0]][0]!r}" for labels in alike]
    never = sum(len(labels) - 1 for labels in alike)
    lost = f"{counted(never, 'class', 'classes')} of {len(names):,} cannot be told from another"
    return f"{where} {shown_pairs(said)}, so that {lost}; {rule}"


def number_doubt(path: Path, lines: Names, folders: Sequence[str], rule: str) -> str:
    """Say where folders that differ by numbers alone, sorted as texts, have another order than their numbers; else "".

    A list of names is mostly made in the order of the numbers, as ImageNetV2's and CIFAR-100's are: 2 before 10.
    """
    if len({re.sub(r"[0-9]+", "0", folder) for folder in folders}) > 1:
        return ""
    by_number = sorted(folders, key=lambda folder: [int(number) for number in re.findall(r"[0-9]+", folder)])
    if (label := next((label for label, name in enumerate(by_number) if name != folders[label]), None)) is None:
        return ""
    return (
        f"{path}: line {label + 1} is {lines[label][0]!r}, for folder {folders[label]}, but by its number that is the "
        f"line of folder {by_number[label]}; {rule}, 10 before 2, or of their numbers where all have as many digits"
    )


def shown_pairs(pairs: list[str]) -> str:
    """Return the first pairs of a class and its name on one line."""
    return ", ".join(pairs[:_SHOWN]) + (", ..." if len(pairs) > _SHOWN else "")


def plain_name(name: str) -> str:
    """Return a name in the form in which names are compared."""
    return " ".join(re.sub(r"[_\s-]+", " ", name.lower()).split())


def _difference(label: int, lines: Names, data: DataNames) -> str:
    number = label + 1
    return f"line {number} is {lines[label][0]!r}, but {data.origin} {number} is {data.names[label][0]!r}"


def _is_words(name: str) -> bool:
    return not any(sign.isdigit() for sign in name) and any(len(word) >= _LEAST_LETTERS for word in name.split())


def _share_word(names: set[str], others: set[str]) -> bool:
    """Tell whether names share a word; bird and birds are one."""
    ours, theirs = (
        {word for name in given for word in name.split() if len(word) >= _LEAST_LETTERS} for given in (names, others)
    )
    return bool(names & others) or any(
        word.startswith(other) or other.startswith(word) for word in ours for other in theirs
    )
