"""What every benchmark shares: its options, the form of a figure, the table and the JSON file.

A benchmark is a file here with a `main`. It runs as `python benchmarks/NAME.py [--json FILE]` and as
`python -m benchmarks.NAME`, prints a table, and writes a list of {name, value, unit, note} where it is given a file.
`make bench` runs them all and leaves bench_out/NAME.json.
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from cosmos_scale.cli.arguments import result_file
from cosmos_scale.words import counted

LOG_WIDTH = 120  # of tables that go to a file or a pipe


class Figure(NamedTuple):
    """One result. name: unique among all benchmarks, and lasting. note: what was measured, and how."""

    name: str
    value: float
    unit: str
    note: str


def argument_parser(name: str, description: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser that knows --json and shows examples (options only) of the benchmark `name`."""
    command = f"python benchmarks/{name}.py"
    parser = argparse.ArgumentParser(
        prog=command,
        description=description,
        epilog="\n".join(["examples:", *(f"  {command} {options}".rstrip() for options in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=result_file, metavar="FILE", help="also write the figures to a file")
    return parser


def report(title: str, figures: Sequence[Figure], json_file: Path | None) -> None:
    """Print the figures as a table; write them to `json_file` with the machine added to each note."""
    table = Table("figure", "value", "unit", "note", title=title, caption=machine(), title_justify="left")
    table.columns[0].no_wrap = True
    table.columns[1].justify = "right"
    for figure in figures:
        table.add_row(figure.name, f"{figure.value:,.4g}", figure.unit, figure.note)
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        rows = [figure._replace(note=f"{figure.note}; {machine()}")._asdict() for figure in figures]
        json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def machine() -> str:
    """Describe what this process computes on: processor, cores and threads it may use, GPU, torch."""
    cores = len(os.sched_getaffinity(0))
    threads = counted(torch.get_num_threads(), "thread")
    parts = [f"{cores} CPU cores ({_processor()})", f"torch {torch.__version__}, {threads}"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def _processor() -> str:
    """Return the processor's name: Linux has it in a file; `platform` knows the architecture only."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
