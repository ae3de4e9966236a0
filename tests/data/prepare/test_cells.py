"""What a cell of a captions file says: texts, lists as programs write them, nothing."""

from typing import Any

import pytest

from cosmos_scale.data.prepare.cells import read_cell


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("['a dog', 'a cat']", ["a dog", "a cat"]),
        ("['a dog' 'a cat']", ["a dog", "a cat"]),
        ('["a dog", "a cat"]', ["a dog", "a cat"]),
        ("('a dog', 'a cat')", ["a dog", "a cat"]),
        ("('a dog',)", ["a dog"]),
        ("()", []),
        ("(a dog)", "(a dog)"),
        ("('a dog')", "('a dog')"),
        ("(1, 2)", "(1, 2)"),
        ("(a dog, a cat", "(a dog, a cat"),
        ("(1990) a car (red)", "(1990) a car (red)"),
        ("nan", None),
        ("", ""),
        (7, 7),
    ],
)
def test_lists_are_told_from_texts(cell: Any, said: Any) -> None:
    assert read_cell("caption", cell) == said
