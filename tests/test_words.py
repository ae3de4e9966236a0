"""Numbers in sentences: "1 shard", "2 shards", in every message of the sources."""

import ast
import re
from collections.abc import Iterator

import pytest

from cosmos_scale.words import counted
from tests.conftest import REPOSITORY

NOUNS = (
    *("samples", "shards", "ranks", "rows", "pictures", "captions", "files", "steps", "checkpoints", "hosts"),
    *("keys", "members", "batches", "workers", "classes", "lines", "records", "launches", "epochs", "times", "errors"),
    *("GPUs", "loaders", "tensors", "folders", "seconds", "minutes", "texts", "events", "sources", "nodes", "tries"),
    "threads",
)
# A verb that fits the plural alone, up to four words behind a noun with its number.
VERB = re.compile(r"( [a-zA-Z]+){0,4} (are|were|have|hold|need|exceed|differ|lack)\b")
NEXT = re.compile(rf" ({'|'.join(NOUNS)})\b(?!/)")
# Numbers that are never 1, by the source of the expression.
NEVER_ONE = {
    *("self.initial.tensors", "tensors"),  # of a model
    *("reached", "required", "config.train.schedule_steps", "config.train.global_batch", "samples"),  # of the demo
    *("len(found)", "gap / 60", "shapes[name][0] / shape[1]"),  # another number than is right, or longer than a minute
    *("launches", "large.samples", "count", "self.ranks", "ranks", "len(shown)"),  # above 1
}


def uncounted(source: str) -> Iterator[str]:
    """Places where a plural stands behind a number that may be 1: f"{number} samples" in place of counted()."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        for before, value, text in zip([None, *node.values], node.values, node.values[1:], strict=False):
            if not isinstance(value, ast.FormattedValue) or not isinstance(text, ast.Constant):
                continue
            lead = before.value if isinstance(before, ast.Constant) else ""
            spoken, told = ast.unparse(value.value), str(text.value)
            if NEXT.match(told) and not (
                re.search(r"\b(of|of the|of its|at least) $", str(lead))  # "1 of 8 ranks"
                or re.fullmatch(r"[A-Z_.]+", spoken)  # a limit that is a constant
                or spoken.startswith(("counted(", "'", '"', "_rounded(", "_number("))
                or spoken in NEVER_ONE
            ):
                yield f"{node.lineno}: {{{spoken}}}{told}"


def plural_verbs(source: str) -> Iterator[str]:
    """Places where a verb of the plural stands behind counted(), whose number may be 1."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            for value, text in zip(node.values, node.values[1:], strict=False):
                counts = isinstance(value, ast.FormattedValue) and ast.unparse(value.value).startswith("counted(")
                if counts and isinstance(text, ast.Constant) and VERB.match(str(text.value)):
                    yield f"{node.lineno}: {ast.unparse(node)}"


def test_a_number_that_may_be_1_has_no_verb_of_the_plural() -> None:
    planted = "f\"{counted(n, 'rank')} need {m}; {counted(n, 'rank')} on CPUs are; {counted(n, 'rank needs')} a\""
    assert len(list(plural_verbs(planted))) == 2
    for path in sorted((REPOSITORY / "cosmos_scale").rglob("*.py")):
        assert not list(plural_verbs(path.read_text(encoding="utf-8"))), path


@pytest.mark.parametrize("planted", ['f"{n} samples"', 'f"x {len(a):,} shards are"'])
def test_a_planted_plural_is_found(planted: str) -> None:
    assert len(list(uncounted(planted))) == 1
    assert not list(uncounted("f\"{n} of {total} samples, {counted(n, 'rank')} {MOST} files\""))


def test_numbers_have_their_noun_in_the_right_number() -> None:
    found = {}
    for path in sorted((REPOSITORY / "cosmos_scale").rglob("*.py")):
        if places := list(uncounted(path.read_text(encoding="utf-8"))):
            found[path.relative_to(REPOSITORY).as_posix()] = places
    assert found == {}


def test_counted() -> None:
    said = (counted(0, "shard"), counted(1, "shard"), counted(2000, "shard"), counted(2, "batch", "batches"))
    assert said == ("0 shards", "1 shard", "2,000 shards", "2 batches")
