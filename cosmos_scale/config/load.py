"""Reading a run's YAML into a RunConfig, and writing it back.

A file may name other files under `extends`: a path or a list of paths, relative to the file, or cosmos:FOLDER/NAME
for a config of the package. Their keys come first, and the keys of the file itself replace them. Mappings merge key by
key; every other value is replaced. Dotted overrides come last: `train.epochs=4`, `data.sources.0.shards=/data/cc3m`.
The home folder and variables of the environment are put into paths. Every error is one line that names the file, the
dotted key, the value and the rule.
"""

import copy
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cosmos_scale.config import RunConfig
from cosmos_scale.config.evaluation import in_new_form, settings_of, written_key
from cosmos_scale.config.keys import nearest_key, with_positions_named
from cosmos_scale.config.overrides import override_value
from cosmos_scale.config.paths import LOCAL_KEYS, expand_local_path, expand_path, path_texts
from cosmos_scale.config.section import RuleBroken
from cosmos_scale.config.shipped import PREFIX, is_shipped_name, is_shipped_run, shipped_file
from cosmos_scale.config.yaml_text import MOST_LEVELS, parse_yaml, reading_hint, shown_value, write_yaml
from cosmos_scale.errors import UserError
from cosmos_scale.files import read_regular, reason_of
from cosmos_scale.words import with_article

COMMAND_LINE = "command line"
MOST_FILES = 100  # that one config may extend: each counts as often as it is named

# A text with bytes that Python could not decode, or with half of a surrogate pair.
_NOT_UTF8 = re.compile("[\ud800-\udfff]")

# Which file (or the command line) set a dotted key.
Origins = dict[str, str]


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML with everything it extends, apply `dotted.key=value` overrides, and validate it.

    Raises UserError: a missing or malformed file, an unknown key, a wrong type or value, a broken rule between keys.
    """
    tree, origins = _read_with_bases(Path(path), (), count())
    return _resolve(tree, origins, overrides, str(path))


def make_config(tree: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Validate the keys of a tree, with `dotted.key=value` overrides, as `load_config` validates the keys of a file."""
    return _resolve(copy.deepcopy(tree), {}, overrides, COMMAND_LINE)


def _resolve(tree: dict[str, Any], origins: Origins, overrides: Sequence[str], default: str) -> RunConfig:
    try:
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals or "" in key.split("."):
                raise UserError(f"{COMMAND_LINE}: {override!r} is not an override; the form is dotted.key=value")
            if key.count(".") >= MOST_LEVELS:
                raise UserError(f"{COMMAND_LINE}: {shown_value(key)}: no such key; rule: at most {MOST_LEVELS} levels")
            if any("\ud800" <= character <= "\udfff" for character in override):  # bytes that Python could not decode
                raise UserError(
                    f"{COMMAND_LINE}: {override!r} holds bytes that are no UTF-8; rule: keys and values are UTF-8"
                )
            for set_key, value in settings_of(tree, origins, key, override_value(key, text, f"{COMMAND_LINE}: {key}")):
                _set(tree, set_key, value)
                _record(origins, set_key, COMMAND_LINE)
        keys = in_new_form(tree)
        for key, holder, name, text in path_texts(keys):
            written = written_key(key, tree.get("eval"))
            where = f"{_origin_of(written, [], origins, default)}: {written}"
            local = with_positions_named(key) in LOCAL_KEYS
            holder[name] = _expanded(expand_local_path if local else expand_path, text, where)
        _check_texts(keys, default)
        # Strict, so that numbers and booleans keep the types that YAML gave them: `epochs: true` is not 1. From JSON,
        # since there strict validation still makes tuples of lists and paths of strings.
        return RunConfig.model_validate_json(json.dumps(keys), strict=True)
    except ValidationError as error:
        _refuse(error.errors(), origins, default, tree.get("eval"))
    except RuleBroken as broken:
        details = ErrorDetails(type="value_error", loc=("eval",), msg="", input=None, ctx={"error": broken})
        _refuse([details], origins, default, tree.get("eval"))


def _check_texts(value: Any, where: str) -> None:
    """Raise UserError where a text in a value can stand in no path of any system; where: what the error names."""
    if isinstance(value, (dict, list)):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_texts(part, where)
    if not isinstance(value, str):
        return
    shown = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    if _NOT_UTF8.search(value):
        raise UserError(f"{where}: {shown} holds bytes that are no UTF-8; rule: all texts of a run are UTF-8")
    if "\0" in value:
        raise UserError(f"{where}: {shown} holds the character NUL; rule: no text of a run does")


def _expanded(expand: Callable[[str], str], text: str, where: str) -> str:
    try:
        return expand(text)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def dump_config(config: RunConfig) -> str:
    """Return the whole config as YAML that `load_config` reads back to an equal one."""
    return write_yaml(config.model_dump(mode="json"))


def _read_with_bases(path: Path, seen: tuple[Path, ...], read: Iterator[int]) -> tuple[dict[str, Any], Origins]:
    """Read a config. seen: the files that extend it. read: counts the files; each may name others many times."""
    if next(read) > MOST_FILES:
        raise UserError(f"{seen[0]}: extends: more than {MOST_FILES} files; rule: name fewer, or each fewer times")
    resolved = Path(os.path.realpath(path))
    if resolved in seen:
        raise UserError(f"{path}: extends: a file extends itself by way of {' -> '.join(map(str, seen))}")
    named_by = f"{seen[-1]}: extends: " if seen else ""
    if path.is_dir():
        raise UserError(f"{named_by}{path.absolute()}: is a folder; a config is a YAML file")
    if not os.path.lexists(path):
        shipped = f"; the shipped run of this name is {PREFIX}{path.stem}" if seen and is_shipped_run(path.stem) else ""
        raise UserError(f"{named_by}{path.absolute()}: no such config file{shipped}")
    try:
        data = read_regular(path)
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{named_by}{path}: is UTF-16; rule: a config is UTF-8, save it as UTF-8")
        text = data.decode()
    except OSError as error:
        raise UserError(f"{named_by}{path}: cannot be read: {reason_of(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{named_by}{path}: cannot be read: {' '.join(str(error).split())}") from error
    own = parse_yaml(text, str(path))
    if own is None:
        own = {}
    if not isinstance(own, dict):
        raise UserError(f"{path}: holds {with_article(type(own).__name__)}; a config is a mapping of keys")
    bases = own.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: extends: {shown_value(bases)} must be a path or a list of paths")
    _check_texts(bases, f"{path}: extends")
    tree: dict[str, Any] = {}
    origins: Origins = {}
    for base in bases:
        beside = resolved if path.is_symlink() else path  # a file means the same bases by whichever link it is read
        _add(tree, origins, *_read_with_bases(_base_file(base, beside), (*seen, resolved), read))
    _add(tree, origins, own, dict.fromkeys(_dotted_keys(own), os.path.normpath(path)))
    return tree, origins


def _base_file(base: str, path: Path) -> Path:
    """Return the file that a config at `path` names under `extends`."""
    if not is_shipped_name(base):
        return path.parent / _expanded(expand_local_path, base, f"{path}: extends")
    try:
        return shipped_file(base)
    except UserError as error:
        raise UserError(f"{path}: extends: {error}") from None


def _add(tree: dict[str, Any], origins: Origins, newer: dict[str, Any], newer_origins: Origins) -> None:
    """Merge a file's keys, and who set them, over those of the files before it."""
    if isinstance(tree.get("eval"), list) and isinstance(newer.get("eval"), dict):  # the old form over the new one
        for key, value in settings_of(tree, origins, "eval", newer.pop("eval")):
            _set(tree, key, value)
            _record(origins, key, _origin_of("eval", [], newer_origins, COMMAND_LINE))
        newer_origins = {key: origin for key, origin in newer_origins.items() if not _overlap(key, "eval")}
    _merge(tree, newer)
    for key, origin in newer_origins.items():
        _record(origins, key, origin)


def _merge(into: dict[str, Any], tree: dict[str, Any]) -> None:
    for key, value in tree.items():
        old = into.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            _merge(old, value)
        else:
            into[key] = value


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node: Any = tree
    for depth, name in enumerate(parents):
        if isinstance(node, list):
            node = node[_list_index(node, name, dotted)]
        else:
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
        if not isinstance(node, (dict, list)):
            inner = ".".join(parents[: depth + 1])
            raise UserError(f"{COMMAND_LINE}: {dotted}: {inner} is {shown_value(node)} and has no keys below it")
    if isinstance(node, list):
        node[_list_index(node, last, dotted)] = value
    elif isinstance(value, dict) and isinstance(node.get(last), dict):
        _merge(node[last], value)
    else:
        node[last] = value


def _list_index(items: list[Any], name: str, dotted: str) -> int:
    if not name.isdecimal() or int(name) >= len(items):
        raise UserError(f"{COMMAND_LINE}: {dotted}: {name!r} must be a position in a list of {len(items)}")
    return int(name)


def _dotted_keys(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return [prefix]
    return [key for name, value in tree.items() for key in _dotted_keys(value, f"{prefix}.{name}" if prefix else name)]


def _record(origins: Origins, key: str, origin: str) -> None:
    # A replaced key has no keys of its old value below it any more.
    for older in [older for older in origins if older.startswith(f"{key}.")]:
        del origins[older]
    origins.pop(key, None)  # so that the key that was set last stands last
    origins[key] = origin


def _refuse(errors: list[ErrorDetails], origins: Origins, default: str, evaluators: object) -> NoReturn:
    """Raise UserError of the first error that counts; evaluators: `eval` in the form in which the user wrote it."""
    # An unknown key comes first: it is often a misspelt key, and the correct key is then reported as missing.
    details = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    location = [str(part) for part in details["loc"]]
    kind = location.pop(2) if location[:1] == ["eval"] and len(location) > 2 else ""  # which pydantic puts there
    broken = details.get("ctx", {}).get("error")
    if isinstance(broken, RuleBroken):
        keys = [".".join([*location, name]) for name in (broken.key, *broken.others)]
        key, *others = (written_key(one, evaluators) for one in keys)
        text = f"{key}: {shown_value(broken.value)} {broken.rule}"
    else:
        if details["type"] in ("union_tag_invalid", "union_tag_not_found"):
            location.append("kind")
        found = ".".join(location)
        key, others = written_key(found, evaluators), []
        what = _describe(details, written_key(nearest_key(found, kind), evaluators))
        text = f"{key}: {what}" if key else what
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    raise UserError(f"{_origin_of(key, others, origins, default)}: {text}{more}") from None


def _describe(details: ErrorDetails, nearest: str) -> str:
    if details["type"] == "extra_forbidden":
        if details["loc"] and "." in str(details["loc"][-1]):  # dotted keys are of the command line
            return "no such key; rule: in a file a key stands below its section, indented, on a line of its own"
        return f"no such key; did you mean {nearest}?"
    if details["type"] in ("missing", "union_tag_not_found"):
        keys = details["input"] if isinstance(details["input"], dict) else {}
        hint = "; rule: a blank stands behind each colon" if any(":" in key for key in keys) else ""
        return f"this key is required and missing{hint}"
    if details["type"] == "union_tag_invalid":
        found, known = details["ctx"]["tag"], details["ctx"]["expected_tags"]
        return f"{shown_value(found)} should be one of {known}"
    if details["type"] == "model_attributes_type":
        return f"{shown_value(details['input'])} should be an object"
    value, rule = details["input"], details["msg"].replace("Input should", "should")
    return f"{shown_value(value)} {rule}{reading_hint(value, details['type'])}"


def _origin_of(key: str, others: Sequence[str], origins: Origins, default: str) -> str:
    """Return which file, or the command line, set a key or another key of its rule; else who set the section around it.

    Of several keys the one that was set last counts, since it most likely broke the rule.
    """
    setters = [origin for set_key, origin in origins.items() if any(_overlap(set_key, one) for one in (key, *others))]
    if setters:
        return setters[-1]
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        around = ".".join(parts[:length])
        if found := [origin for set_key, origin in origins.items() if _overlap(set_key, around)]:
            return found[-1]
    return default


def _overlap(one: str, other: str) -> bool:
    """Tell whether two dotted keys are the same, or one lies below the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
