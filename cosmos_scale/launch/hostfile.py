"""Hosts of a launch: read from a hostfile in the form that DeepSpeed's launcher reads, `NAME slots=N` a line."""

import re
import socket
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.errors import UserError
from cosmos_scale.files import read_regular, text_lines

_LINE = re.compile(r"(?P<name>[^\s=#-][^\s=#]*)\s+slots\s*=\s*(?P<slots>[^\s#]+)\s*(#.*)?")
_RULE = "rule: a line is `NAME slots=N`, or empty, or a comment after #"
_MOST_BYTES = 10_000_000


class Host(NamedTuple):
    """A host and how many ranks it may run. name: as ssh takes it."""

    name: str
    slots: int

    @property
    def is_here(self) -> bool:
        """Whether this is the machine that the launcher runs on, which needs no ssh."""
        return self.name in ("localhost", "127.0.0.1", socket.gethostname())


def this_host(slots: int) -> Host:
    """Return the machine that the launcher runs on."""
    return Host(socket.gethostname() or "localhost", slots)


def read_hostfile(path: Path) -> list[Host]:
    """Return the hosts of a hostfile, in its order.

    Raises UserError, which names the line, where the file is missing, a line is odd, a host stands twice, or slots are
    no number of at least 1.
    """
    hosts: dict[str, Host] = {}
    lines_of: dict[str, int] = {}
    for number, line in enumerate(text_lines(_text(path)), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"--hostfile: {path}, line {number}: {line.strip()[:120]!r}"
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise UserError(f"{where} is no host with its slots; {_RULE}")
        name, slots = match["name"], match["slots"]
        if not (re.fullmatch(r"[0-9]{1,5}", slots) and int(slots) > 0):
            raise UserError(f"{where}: slots={slots}; rule: a whole number from 1 to 99999, or no line for the host")
        if name in hosts:
            raise UserError(f"{where}: {name} stands in line {lines_of[name]} too; rule: a host has one line")
        hosts[name] = Host(name, int(slots))
        lines_of[name] = number
    if not hosts:
        raise UserError(f"--hostfile: {path} names no host; {_RULE}")
    return list(hosts.values())


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            there = "is no file" if path.exists() else "does not exist"
            raise UserError(f"--hostfile: {path.absolute()} {there}; rule: a file with a line a host, `NAME slots=N`")
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"--hostfile: {path} has over {_MOST_BYTES:,} bytes; {_RULE}")
        return read_regular(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--hostfile: {path} is no text; {_RULE}") from error
    except OSError as error:
        raise UserError(f"--hostfile: {path} cannot be read: {error.strerror or error}") from error
