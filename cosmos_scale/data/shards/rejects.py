"""rejected.jsonl, the file that names what an index leaves out."""

import json
import sys
from pathlib import Path

from cosmos_scale.errors import UserError
from cosmos_scale.files import replace_file


def merge_rejected(path: Path, names: set[str], faults: list[dict[str, str | None]]) -> None:
    """Rewrite rejected.jsonl; lines of other shards stay, and lines of the pictures that a build refused."""
    kept, unreadable = [], 0
    try:
        old_lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    for line in old_lines:
        try:
            fault = json.loads(line)
            if fault.get("shard") not in names:
                kept.append(json.dumps(fault))
        except (ValueError, AttributeError, TypeError):
            unreadable += 1
    if unreadable:
        print(f"{path}: {unreadable} unreadable lines are dropped", file=sys.stderr)
    lines = kept + [json.dumps(fault) for fault in faults]
    if lines or path.exists():
        replace_file(path, "".join(line + "\n" for line in lines).encode())
