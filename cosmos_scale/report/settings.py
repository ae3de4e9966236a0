"""The config's part of the report: every key of a run, and what differs from its base and between runs."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.config.shipped import is_shipped_run, shipped_file
from cosmos_scale.config.yaml_text import write_yaml
from cosmos_scale.report.records import RunRecords

ABSENT = "\N{EN DASH}"


class Differences(NamedTuple):
    """Keys with several values. columns: whose values these are. rows: a key and its value in each column."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


def yaml_of(run: RunRecords) -> str:
    """Return a run's whole config, empty where it is not there."""
    return write_yaml(run.tree) if run.tree else ""


def from_base(run: RunRecords) -> Differences | None:
    """Return what a run sets otherwise than the shipped run of its name, or else than the defaults."""
    if not run.tree:
        return None
    name = run.tree.get("name")
    if isinstance(name, str) and is_shipped_run(name):
        base, config = f"shipped {name}", load_config(shipped_file(name))
    else:
        base, config = "defaults", RunConfig()
    return _differences(f"{run.label}: other than the {base}", [base, run.label], [_plain(config), _keys_of(run)])


def between_runs(runs: Sequence[RunRecords]) -> Differences | None:
    """Return what differs between some runs; None for one run."""
    known = [run for run in runs if run.tree]
    if len(known) < 2:
        return None
    return _differences("Between the runs", [run.label for run in known], [_keys_of(run) for run in known])


def _keys_of(run: RunRecords) -> dict[str, Any]:
    """Return a run's keys, with the defaults of those that an older version did not have."""
    return run.tree if run.config is None else _plain(run.config)


def _plain(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _differences(title: str, columns: list[str], trees: Sequence[dict[str, Any]]) -> Differences:
    flat = [dict(_flattened(tree, "")) for tree in trees]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = [(key, [one.get(key, ABSENT) for one in flat]) for key in keys]
    return Differences(title, columns, [(key, values) for key, values in rows if len(set(values)) > 1])


def _flattened(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield dotted keys with their values as text; lists of mappings are looked into."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flattened(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for place, item in enumerate(value):
            yield from _flattened(item, f"{key}.{place}")
    else:
        yield key, "null" if value is None else str(value)
