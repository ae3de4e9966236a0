"""YAML as runs are written in it: numbers as people read them, keys as texts, no key twice, errors on one line.

YAML 1.1 reads some plain scalars as numbers that nobody means: 0100 as 64, 1:30 as 90. They are texts here, so a key
that takes a number refuses them.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from cosmos_scale.errors import UserError
from cosmos_scale.files import text_lines

_TAG = "tag:yaml.org,2002:"

MOST_VALUES = 100_000  # in one text, each alias counted as often as it stands for its value
MOST_LEVELS = 50  # of mappings and lists inside each other

_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$")
_DECIMAL = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
    r"|\.(?:nan|NaN|NAN)$"
)
_REPLACED = {f"{_TAG}{kind}" for kind in ("int", "float", "timestamp")}  # dates stay texts

# Kinds of pydantic's error where a key wants one value: a text, a number, a name.
_ONE_VALUE = ("string_type", "int_type", "float_type", "bool_type", "literal_error")

# The beginning of what YAML 1.1 reads as a number, as a pattern for the hint of an error.
_LIKE_A_NUMBER = re.compile(r"[-+]?(?:0[0-9_]+|[0-9][0-9_]*(?::[0-9_.]+)+)$")


def parse_yaml(text: str, where: str) -> Any:
    """Return what a YAML text holds; where: what the error names. Raises UserError where it is not valid."""
    try:
        node = yaml.compose(text, _Loader)
        if node is None:
            return None
        _check_size(node, where)
        return _with_text_keys(_construct(node), where)
    except RecursionError:
        raise _too_deep(where) from None
    except _TooManyValues:
        raise _too_many(where) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        hint = _syntax_hint(text, error)
        raise UserError(f"{where}:{line} is not valid YAML: {error.problem or error.context}{hint}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of more digits than Python reads
        raise UserError(f"{where}: is not valid YAML: {' '.join(str(error).split())}") from None


def write_yaml(tree: dict[str, Any]) -> str:
    """Return a tree as YAML that `parse_yaml`, and any other reader of YAML, reads back to an equal one."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=120)


def shown_value(value: Any) -> str:
    """Return a value as an error shows it, on one line; a long one is cut."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def reading_hint(value: Any, wanted: str) -> str:
    """Return what to write instead of a value that YAML reads as another type than its key wants; else nothing.

    A section without keys below it is null for YAML.

    wanted: the kind of pydantic's error, such as `string_type` or `int_type`.
    """
    numbers = (bool, int, float) if wanted == "string_type" else (bool,) if wanted == "literal_error" else ()
    if isinstance(value, numbers):
        return "; rule: a text that looks like a number, or like yes and no, stands in quotes"
    if wanted in ("int_type", "float_type") and isinstance(value, str) and _LIKE_A_NUMBER.match(value):
        return "; rule: a number has neither leading zeros nor colons, which YAML would read in base 8 or 60"
    if value is None and wanted in _ONE_VALUE:
        return "; rule: this key must have a value, in quotes if it begins with # (a comment for YAML) or &"
    if value is None and wanted in ("model_type", "model_attributes_type", "tuple_type"):
        return f"; rule: leave the key out, or give it {'entries' if wanted == 'tuple_type' else 'keys'}"
    return ""


def _syntax_hint(text: str, error: yaml.MarkedYAMLError) -> str:
    """Return how a value is written that YAML takes for its own signs, as far as the place of an error tells."""
    problem, mark = error.problem or "", error.problem_mark
    if problem.startswith("expected ',' or "):
        return (
            "; rule: [ ] and { } are closed, commas stand between their entries, and a value with braces, brackets or "
            "${NAME} stands in quotes there"
        )
    lines = text_lines(text)
    if mark is None or mark.line >= len(lines):
        if error.context_mark is not None and "quoted scalar" in (error.context or ""):
            return f"; rule: the quote that opens on line {error.context_mark.line + 1} is closed"
        return ""
    line = lines[mark.line]
    before = line[: mark.column]
    word = re.split(r"[\s,\[\]{}]", line[: mark.column + 1])[-1]
    if "'\\t'" in problem:
        return "; rule: blanks stand before a key or a value, not tabs"
    if word[:1] in tuple("*&!%@`") or (word[:1] in ("-", "?") and problem.endswith("are not allowed here")):
        return f"; rule: a value that begins with {word[0]} stands in quotes"
    if problem.startswith("expected a comment or a line break"):
        return "; rule: a value that begins with | or > stands in quotes"
    if problem.startswith("expected <block end>") and "<scalar>" in problem and re.search(r"[\]}]", before):
        return "; rule: a value that begins with [ or { stands in quotes"
    # The line may continue the value above it: a key that stands too deep, or below a line without a colon.
    first_colon = problem.startswith("mapping values") and not re.search(r":\s", before)
    if first_colon or (problem.startswith("expected <block end>") and "<block mapping start>" in problem):
        return "; rule: keys that belong together begin in one column, each with a colon and a blank behind it"
    if problem.startswith("mapping values"):
        return "; rule: a value that holds a colon and a blank stands in quotes"
    if "escape" in problem:
        return "; rule: a value with backslashes stands in single quotes"
    return ""


def _too_deep(where: str) -> UserError:
    return UserError(
        f"{where}: a value holds itself, or lies too deep; rule: no anchor inside its own value, and at most "
        f"{MOST_LEVELS} levels"
    )


def _check_size(root: yaml.Node, where: str) -> None:
    """Raise UserError where the values under a node are too many or lie too deep; each node is looked at once.

    An alias costs a few bytes, and its value may hold aliases too. So a short text can mean more values than any
    memory has, unless they are counted before they are made.
    """
    sizes: dict[int, int] = {}  # by the node's id: the values under the node, with itself

    def measure(node: yaml.Node, level: int) -> int:
        if level > MOST_LEVELS:  # so does a node that holds itself
            raise _too_deep(where)
        if id(node) not in sizes:
            sizes[id(node)] = 1 + sum(measure(child, level + 1) for child in _children(node))
        return sizes[id(node)]

    if measure(root, 0) > MOST_VALUES:
        raise _too_many(where)


def _too_many(where: str) -> UserError:
    return UserError(f"{where}: holds more than {MOST_VALUES:,} values, its aliases counted; rule: at most so many")


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


def _construct(node: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_document(node)
    finally:
        loader.dispose()


class _TooManyValues(Exception):
    """A text holds more than MOST_VALUES values."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, and a text of too many values, of which it reads no more."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._nodes += 1
        if self._nodes > MOST_VALUES:
            raise _TooManyValues
        composed: yaml.Node | None = super().compose_node(parent, index)
        return composed

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # is refused as a key
            if key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around what this project or YAML 1.1 would read as something else than text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}int", _WHOLE, list("-+0123456789"))
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(f"{_TAG}float", _DECIMAL, list("-+.0123456789"))


def _with_text_keys(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                hint = "; rule: decimals stand behind a point, 0.2" if item is None and type(key) is int else ""
                raise UserError(f"{where}: key {key!r} must be text{hint}")
        return {key: _with_text_keys(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_text_keys(item, where) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise UserError(f"{where}: {shown_value(value)} must be text, a number, true or false, a list or a mapping")
