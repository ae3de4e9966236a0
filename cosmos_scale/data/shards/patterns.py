"""Which shards a user means: a folder, one path, or a glob or brace pattern such as `cc3m/{00000..00331}.tar`.

A path that exists is that path, even if brackets or braces stand in its name, and so is a folder at its beginning.

A URL may have the same forms: folders and wildcards where fsspec can list files (s3://bucket/cc3m), braces everywhere.
A web server has no list of its files, so its shards are named in full. `pipe:COMMAND` means one shard for each command
that its braces make. The command's output is the shard, which is named after the last .tar in the command.
"""

import glob
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from braceexpand import braceexpand

from cosmos_scale.data.samples.file_kind import no_shard
from cosmos_scale.data.shards.store import PIPE, is_remote, is_web, join_url, list_filesystem, redact
from cosmos_scale.errors import UserError
from cosmos_scale.files import reason_of, whole_path

COMPRESSED_ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")

MOST_SHARDS = 10_000_000  # that the ranges of a pattern may mean
_RANGE = re.compile(r"\{(-?[0-9]+)\.\.(-?[0-9]+)(?:\.\.(-?[0-9]+))?\}")
_TAR_WORD = re.compile(r"[^\s'\"|<>;&]*\.tar\b[^\s'\"|<>;&]*")


class ShardPattern(ABC):
    """The shards that a pattern means; `shown` is the pattern for messages, without secrets."""

    shown: str
    folder: str | None  # where the index lies unless the user names a place: beside the shards, a path or URL

    @abstractmethod
    def known_names(self) -> tuple[list[str], list[str]]:
        """List the shards that are known without asking a server: (sorted names, missing paths that are named in full).

        Names are relative to the deepest folder before any wildcard or brace.
        Raises: UserError where a folder holds compressed tars, a file is no tar, or the pattern is not one.
        """

    @abstractmethod
    def list_names(self) -> list[str]:
        """List all shards, sorted; raises UserError, too, where a shard named in full is known to be missing."""

    @abstractmethod
    def means(self) -> Callable[[str], bool]:
        """Return a test of whether the pattern means a shard's name; the test does not look for the shard."""

    @abstractmethod
    def address(self, name: str) -> str:
        """Return the path, URL or command by which a shard is read."""

    @abstractmethod
    def show(self, name: str) -> str:
        """Return a shard's path or URL for messages, without secrets."""


def passed_over(pattern: str, names: Container[str]) -> list[str]:
    """List the tars that a folder's user may have meant, too: with an ending in capitals, and those one folder deeper.

    names: the shards of the folder. Nothing for patterns that are no folder of this machine.
    """
    if not os.path.isdir(pattern):
        return []
    found: list[str] = []
    with suppress(OSError), os.scandir(pattern) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if _is_tar(entry.name) and entry.name not in names and not entry.is_dir():
                found.append(entry.name)
            elif entry.is_dir():
                with suppress(OSError):  # a folder that may not be listed is not the user's
                    found += [f"{entry.name}/{name}" for name in sorted(os.listdir(entry.path)) if _is_tar(name)]
    return found


def _is_tar(name: str) -> bool:
    return name.lower().endswith((".tar", *COMPRESSED_ENDINGS)) and not name.startswith(".")


def parse_pattern(pattern: str) -> ShardPattern:
    """Return a pattern's kind of shards; raises UserError where the pattern is not valid."""
    if pattern.startswith(PIPE):
        return _Commands(*_named_commands(pattern))
    if is_remote(pattern):
        return _url_pattern(pattern)
    return _Paths(pattern, pattern, str(_root(pattern)))


@dataclass(frozen=True)
class _Paths(ShardPattern):
    """Files of this machine."""

    pattern: str
    shown: str
    folder: str

    def known_names(self) -> tuple[list[str], list[str]]:
        root = Path(self.folder)
        if os.path.isdir(self.pattern):  # pathlib would take an empty path for the current folder
            files = sorted(os.listdir(self.pattern))
            compressed = [name for name in files if name.lower().endswith(COMPRESSED_ENDINGS)]
            if compressed:
                raise UserError(
                    f"{root / compressed[0]}: is compressed; samples are read by offset, so unpack it to .tar"
                )
            # Without hidden files, as `*.tar`: macOS lays a ._0.tar beside each 0.tar on foreign disks.
            return [name for name in files if name.endswith(".tar") and not name.startswith(".")], []
        names: set[str] = set()
        missing = []
        for path in self._paths():
            if os.path.exists(path) and not os.path.isdir(path):  # of a FIFO too, to be refused by its kind
                names.add(os.path.relpath(path, root))
            elif _has_wildcard(str(Path(path).relative_to(_root(path)))):
                names.update(glob.glob(_plain_root(path, self.folder), root_dir=root))
            else:
                missing.append(os.path.relpath(path, root))
        for name in sorted(names):
            if not _is_tar(name):
                _refuse_no_shard(root / name)
        return sorted(names), missing

    def list_names(self) -> list[str]:
        self._require_folders()
        names, missing = self.known_names()
        if missing and not names and self._paths() == [self.pattern]:
            raise UserError(f"{whole_path(self.pattern)}: no such shard or folder of shards")
        if missing:
            first = self.show(missing[0])
            do = "does" if len(missing) == 1 else "do"
            raise UserError(
                f"{self.pattern}: {len(missing)} of its shards {do} not exist, the first is {whole_path(first)}"
            )
        return names

    def _require_folders(self) -> None:
        """Raise UserError where a folder cannot be listed that wildcards mean: `glob` would leave out its shards."""
        for path in [] if os.path.isdir(self.pattern) else self._paths():
            below = Path(_plain_root(path, self.folder)).parts
            for depth in range(1, len(below)):
                for name in glob.glob(os.path.join(*below[:depth]), root_dir=self.folder):
                    _require_folder(os.path.join(self.folder, name))

    def means(self) -> Callable[[str], bool]:
        if Path(self.pattern).is_dir():
            return lambda name: "/" not in name
        return _name_test([_plain_root(path, self.folder) for path in self._paths()])

    def address(self, name: str) -> str:
        return str(Path(self.folder) / name)

    def _paths(self) -> list[str]:
        """The pattern's paths, their braces expanded; what stands in the pattern as it lies on the disk is kept."""
        if os.path.lexists(self.pattern):
            return [self.pattern]
        if not self.pattern or not Path(self.folder).parts:
            return _expand(self.pattern)
        below = Path(self.pattern).relative_to(self.folder)
        return [os.path.join(self.folder, path) for path in _expand(str(below))]

    def show(self, name: str) -> str:
        return self.address(name)


@dataclass(frozen=True)
class _Urls(ShardPattern):
    """Files below a URL; `below` is the pattern of their names, and the folder's query ends the URL of each."""

    shown: str
    folder: str
    below: str

    def known_names(self) -> tuple[list[str], list[str]]:
        return sorted({name for name in _expand(self.below) if not _has_wildcard(name)}), []

    def list_names(self) -> list[str]:
        names = set(self.known_names()[0])
        for pattern in _expand(self.below):
            if _has_wildcard(pattern):
                names.update(list_filesystem(self.folder, pattern))
        _refuse_parents(self.shown, names)
        return sorted(names)

    def means(self) -> Callable[[str], bool]:
        return _name_test(_expand(self.below))

    def address(self, name: str) -> str:
        return join_url(self.folder, name)

    def show(self, name: str) -> str:
        return redact(self.address(name))


@dataclass(frozen=True)
class _Commands(ShardPattern):
    """Outputs of commands, by the shards' names. Nothing lies beside them, so their index needs a place of its own."""

    shown: str
    commands: dict[str, str]
    folder: None = None

    def known_names(self) -> tuple[list[str], list[str]]:
        return sorted(self.commands), []

    def list_names(self) -> list[str]:
        return sorted(self.commands)

    def means(self) -> Callable[[str], bool]:
        return self.commands.__contains__

    def address(self, name: str) -> str:
        return self.commands[name]

    def show(self, name: str) -> str:
        return _show_command(self.commands[name])


def _url_pattern(pattern: str) -> _Urls:
    base, mark, query = pattern.partition("?") if is_web(pattern) else (pattern, "", "")
    scheme, _, path = base.partition("://")
    *folders, last = path.rstrip("/").split("/")
    plain = folders[:1]  # the server's name, which may have brackets
    for part in folders[1:]:
        if _has_wildcard(part) or "{" in part:
            break
        plain.append(part)
    below = "/".join([*folders[len(plain) :], last])
    shown = redact(pattern)
    if not (last.endswith(".tar") or "{" in last or _has_wildcard(last)):  # a folder
        plain, below = [*folders, last], "*.tar"
    if is_web(pattern) and any(map(_has_wildcard, _expand(below))):
        raise UserError(
            f"{shown}: a web server has no list of its files; name the shards, as in URL/{{00000..00331}}.tar"
        )
    if "{" in "".join(plain[:1]):
        raise UserError(f"{shown}: braces may stand in the path, not in the server's name")
    return _Urls(shown, f"{scheme}://{'/'.join(plain)}{mark}{query}", below)


def _named_commands(pattern: str) -> tuple[str, dict[str, str]]:
    """Expand a command's braces, and name each command after its .tar: (pattern for messages, commands by name)."""
    commands = _expand(pattern)
    paths: list[list[str]] = []
    for command in commands:
        words = _TAR_WORD.findall(command[len(PIPE) :])
        if not words:
            raise UserError(f"{PIPE} the command must name a .tar file, by which shards are told apart")
        paths.append(redact(words[-1]).partition("?")[0].split("/"))
    shared = 0  # folders at their beginning
    while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    names = ["/".join(path[shared:]) for path in paths]
    _refuse_parents(_show_command(pattern), names)
    if len(set(names)) < len(names):
        raise UserError(f"{_show_command(pattern)}: {len(names)} commands, but {len(set(names))} names of .tar files")
    return _show_command(pattern), dict(zip(names, commands, strict=True))


def _refuse_parents(shown: str, names: Iterable[str]) -> None:
    """Refuse shard names with .. in them: index files are named after shards, and must not leave the index's folder."""
    if any(".." in name.split("/") for name in names):
        raise UserError(f"{shown}: a shard's path must not lead through ..")


def _show_command(command: str) -> str:
    words = _TAR_WORD.findall(command[len(PIPE) :])
    return f"{PIPE} ... {redact(words[-1])}"


def _refuse_no_shard(path: Path) -> None:
    """Raise UserError where a file is no tar; one that cannot be read is left to the reader of shards."""
    with suppress(OSError):
        if said := no_shard(path):
            raise UserError(f"{whole_path(path)}: {said}")


def _require_folder(path: str) -> None:
    """Raise UserError where a path is neither a folder that can be listed nor a plain file."""
    try:
        os.scandir(path).close()
    except NotADirectoryError:
        return
    except OSError as error:
        leads_nowhere = os.path.islink(path) and not os.path.exists(path)
        reason = "it is a link that leads nowhere" if leads_nowhere else reason_of(error)
        rule = "mend it, or name the folders that are meant, as in {a,b}/*.tar"
        raise UserError(f"{whole_path(path)}: cannot be listed: {reason}; {rule}") from error


def _root(pattern: str) -> Path:
    """The deepest folder before any wildcard or brace; a folder that exists is none, whatever signs its name has."""
    path = Path(pattern)
    if path.is_dir():
        return path
    plain = Path()
    for part in path.parts[:-1]:
        if (_has_wildcard(part) or "{" in part) and not (plain / part).is_dir():
            break
        plain /= part
    return plain


def _plain_root(path: str, start: str) -> str:
    """A path as wildcards are read, from the folder `start`: what exists of the path is escaped, and means itself."""
    root = Path(path) if os.path.isfile(path) else _root(path)
    below = os.path.relpath(path, root)
    return os.path.normpath(os.path.join(glob.escape(os.path.relpath(root, start)), below))


def _name_test(patterns: list[str]) -> Callable[[str], bool]:
    named = set(patterns)  # those with brackets too: a shard's own name may have some
    wild = [PurePosixPath(pattern) for pattern in patterns if _has_wildcard(pattern)]

    def means(name: str) -> bool:
        # `match` compares from the right, so that only with equal depths the whole name is compared.
        parts = PurePosixPath(name)
        return name in named or any(len(parts.parts) == len(w.parts) and parts.match(str(w)) for w in wild)

    return means


def _expand(pattern: str) -> list[str]:
    ranges = [[int(number or 1) for number in found] for found in _RANGE.findall(pattern)]
    # Before they are expanded: a range that is too long would take all memory.
    if math.prod(abs(last - first) // max(1, abs(step)) + 1 for first, last, step in ranges) > MOST_SHARDS:
        raise UserError(f"{redact(pattern)}: its braces mean more than {MOST_SHARDS:,} shards; rule: at most so many")
    try:
        paths = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{redact(pattern)}: not a valid pattern: {error}") from error
    if "" in paths:
        raise UserError(f"'{pattern}': means an empty path; name a folder of shards or a pattern of .tar files")
    return paths


def _has_wildcard(path: str) -> bool:
    return any(sign in path for sign in "*?[")
