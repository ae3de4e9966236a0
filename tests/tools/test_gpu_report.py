"""The GPU report without a GPU: every stage rehearsed, what it finds wrong, what it leaves when a stage fails."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tools.gpu_page import REHEARSAL, read_rows, write_page, wrong_rows
from tools.gpu_report import STAGES as STAGE_LIMITS
from tools.gpu_report import _run, limit_of

STAGES = ("machine", "attention", "golden", "step32", "run", "kernels", "products", "graph", "compile64")


def report(out: Path, *arguments: str, timeout: float) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(REPOSITORY / "tools" / "gpu_report.py"), "--out", str(out), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=out.parent,
    )


def is_running(pid: str) -> bool:
    """Tell whether a process is there, and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_rehearsal_runs_every_stage_and_finds_nothing_wrong(tmp_path: Path) -> None:
    """Stages of other numbers of samples are the same code."""
    out = tmp_path / "out"
    finished = report(out, "--device", "cpu", "--tiny", "--only", *STAGES, "--seconds", "400", timeout=450)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = read_rows(out / "report.jsonl")
    ends = {row["stage"]: row["status"] for row in rows if row.get("what") == "end of the stage"}
    assert ends == dict.fromkeys(STAGES, 0)
    checked = {row["case"] for row in rows if "case" in row and row.get("ok")}
    assert len(checked) == 5
    assert {row.get("group") for row in rows if row["stage"] == "golden"} >= {
        "features",
        "gradients",
        "trajectory",
        "gradients in bf16",
    }
    loops = [row["loop"] for row in rows if "loop" in row]
    assert loops == ["batches on the device", "batches copied", "as a run does"] * 2
    errors = {row["kernel"] for row in rows if "at_most" in row and row["ok"]}
    assert errors == {"contrastive loss", "contrastive loss by torch", "optimizer's update", "normalised patches"}
    assert not (out / "runs").exists(), "what a run leaves does not travel with the report"
    (records,) = (row for row in rows if row.get("what") == "records of both runs")
    assert len(records["losses"]) == 12
    parts = [row["parts_ms"] for row in rows if row.get("what") == "parts"]
    assert [list(of) for of in parts] == [["student", "teacher", "loss", "backward", "update"]] * 2
    assert (out / "report.png").stat().st_size > 10_000
    assert "Nothing wrong was found." in (out / "report.md").read_text()


def test_the_report_and_training_need_no_library_that_draws_or_tracks(tmp_path: Path) -> None:
    """A machine for an hour, without a network, has few packages."""
    program = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jinja2", "matplotlib", "tensorboard", "wandb", "pytest", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import cosmos_scale.train
import tools.gpu_report
"""
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY
    )
    assert finished.returncode == 0, finished.stderr


def test_a_stage_that_cannot_run_costs_itself_only(tmp_path: Path) -> None:
    finished = report(tmp_path / "out", "--device", "cuda", "--only", "graph,machine", timeout=100)
    assert finished.returncode == 1
    rows = read_rows(tmp_path / "out" / "report.jsonl")
    ends = [(row["stage"], row["status"]) for row in rows if row.get("what") == "end of the stage"]
    assert ends == [("graph", 1), ("machine", 1)]
    assert sum("failed" in row for row in rows) == 2
    assert "4 wrong" in finished.stdout


def test_a_stage_past_its_limit_ends_with_all_that_it_started(tmp_path: Path) -> None:
    """The stage starts a process of its own that would go on."""
    pids = tmp_path / "pids"
    code = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(60)
"""
    with pytest.raises(subprocess.TimeoutExpired):
        _run([sys.executable, "-c", code], 5.0)
    deadline = time.monotonic() + 20.0
    while any(map(is_running, pids.read_text().split())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stage_may_take_longer_on_a_cpu() -> None:
    """torch.compile needs a C++ compiler's time there. On a GPU all stages that come first fit into the report's."""
    assert limit_of("compile64", "cuda") == STAGE_LIMITS["compile64"].limit == 150
    assert limit_of("compile64", "cpu") == 450


def test_no_stage_begins_without_time(tmp_path: Path) -> None:
    finished = report(tmp_path / "out", "--device", "cpu", "--only", "machine", "--seconds", "1", timeout=60)
    assert finished.returncode == 0
    (row,) = read_rows(tmp_path / "out" / "report.jsonl")
    assert row["skipped"] == "no time is left"


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    finished = report(tmp_path / "out", "--only", "machine,everything", timeout=60)
    assert finished.returncode == 2
    assert "everything" in finished.stderr


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    finished = report(tmp_path / "out", "--only", "machine", timeout=60)
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr
    assert str(tmp_path / "out") in finished.stderr


def test_the_page_says_what_is_wrong_and_survives_a_torn_line(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"stage": "machine", "seconds": 1.0, "device": "a card", "torch": "2.11"},
        {
            "stage": "attention",
            "seconds": 2.0,
            "case": "text",
            "backend": "xformers",
            "ok": False,
            "gradient_error": 0.5,
        },
        {"stage": "golden", "seconds": 3.0, "group": "losses", "ok": True},
    ]
    file = tmp_path / "report.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "run", "sec')
    assert read_rows(file) == rows
    assert wrong_rows(rows) == ["attention: case text, backend xformers, ok False, gradient_error 0.5"]
    (page,) = write_page(rows, tmp_path)  # without measured parts there is nothing to draw
    text = page.read_text()
    for part in ("a card, torch 2.11", "Wrong:", "## golden", "gradient_error 0.5"):
        assert part in text
    assert REHEARSAL not in text
    write_page([rows[0] | {"rehearsal": True}], tmp_path)
    assert REHEARSAL in page.read_text()


def test_the_page_shows_kernels_by_time_a_line_each_and_keeps_output_on_its_line(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"stage": "step64", "seconds": 1.0, "launches": 2, "by_time": [["gemm", 214, 30.12345], ["add_norm", 55, 2.0]]},
        {"stage": "run", "seconds": 2.0, "end": "step 6:\n ━━━╇━━┩ │ retrieval │\n"},
        {"stage": "products", "seconds": 3.0, "of_peak": {"forward": 0.71234, "FP8": 1.2}},
    ]
    (page,) = write_page(rows, tmp_path)
    lines = page.read_text().splitlines()
    assert lines[lines.index("## step64") + 2 :] == [
        "- 1.0 s: launches 2, by_time:",
        "  - gemm, 214, 30.12",
        "  - add_norm, 55, 2",
        "",
        "## run",
        "",
        "- 2.0 s: end step 6: retrieval",
        "",
        "## products",
        "",
        "- 3.0 s: of_peak forward 0.7123; FP8 1.2",
    ]
