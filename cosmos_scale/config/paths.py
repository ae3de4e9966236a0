"""The home folder and environment variables in paths: in the config's path keys, and in the commands' options."""

import os
import re
from collections.abc import Iterator
from typing import Any

from cosmos_scale.config.keys import with_positions_named
from cosmos_scale.config.section import redact_urls
from cosmos_scale.errors import UserError

# The keys that name files or folders of this machine.
LOCAL_KEYS = frozenset(
    {
        "output",
        "resume",
        "init_from",
        "data.remote.cache",
        "eval.N.data",
        "eval.N.classes",
        "eval.N.templates",
        "eval.N.images",
        "eval.N.masks",
        "eval.N.split",
    }
)

# All keys that name files or folders, and so may begin with ~ and hold $VARIABLES; the others may be URLs and commands.
PATH_KEYS = LOCAL_KEYS | {"data.sources.N.shards", "data.sources.N.index", "eval.N.shards", "eval.N.index"}

_ELSEWHERE = re.compile(r"([\w+.:-]+://)|pipe:")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")

# Signs that neither a terminal nor an editor shows at the ends of a path, but for the blank, which quotes may ask for:
# white space, and the marks of width and direction that come along when a text is copied from a page or a dialogue.
_UNSEEN = "[^\\S ]|[\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
_UNSEEN_END = re.compile(rf"\A(?:{_UNSEEN})|(?:{_UNSEEN})\Z")


def refuse_unseen_end(text: str) -> None:
    """Raise UserError where a URL, or a path that does not exist, begins or ends with a sign that does not show.

    The carriage return that a script with Windows line ends gives its last argument would make a second folder beside
    the one that is meant, whose name looks the same.
    """
    if (found := _UNSEEN_END.search(text)) and not os.path.exists(text):
        where = "before" if found.start() == 0 else "behind"
        shown = redact_urls(_UNSEEN_END.sub("", text))
        raise UserError(
            f"{shown}: {found[0]!a} stands {where} the path, which does not show; rule: take "
            "it out (where a script has Windows line ends: sed -i 's/\\r$//' SCRIPT)"
        )


def expand_path(text: str) -> str:
    """Return a path with the home folder for a first ~, and the values of its $VARIABLES and ${VARIABLES}.

    URLs and commands (pipe:COMMAND) stay as they are, and so do variables in the path of a file that exists. Raises
    UserError where a variable is not set, ~USER has no home folder, or a sign at an end does not show.
    """
    if text.startswith("pipe:"):
        return text
    refuse_unseen_end(text)
    if "://" in text:
        return text
    path = os.path.expanduser(text)
    if path.startswith("~") and not os.path.exists(path):
        raise UserError(f"{text}: {path.split('/')[0]} has no home folder; rule: ./~ is a file of this name")
    if "$" not in path or os.path.exists(path):
        return path
    for match in _VARIABLE.finditer(path):
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise UserError(f"{text}: ${name} is not set; rule: set the variable, or write the path out")
    return _VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], path)


def expand_local_path(text: str) -> str:
    """Return a path as `expand_path` does; raises UserError also where it is a URL or a command, and not a path."""
    path = expand_path(text)
    if found := _ELSEWHERE.match(path):  # the rest is not shown: it may hold secrets
        what = f"a URL ({found[1]}...)" if found[1] else "a command (pipe:...)"
        raise UserError(f"{what} is given; rule: a path of this machine")
    return path


def path_texts(tree: Any, key: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Yield each path in a tree of keys: its dotted key, the mapping that holds it, its name there, and its text."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        inner = f"{key}.{name}" if key else str(name)
        if isinstance(value, str) and with_positions_named(inner) in PATH_KEYS:
            yield inner, tree, name, value
        yield from path_texts(value, inner)
