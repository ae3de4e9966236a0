"""What the demo makes of a run's records; the whole demo runs as `make demo-quick`."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cosmos_scale import demo
from cosmos_scale.config import RetrievalConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.config.shipped import shipped_file
from cosmos_scale.files import make_own_folder
from tests.conftest import REPOSITORY


def summary(student: tuple[float, float]) -> dict[str, object]:
    def recalls(image_to_text: float, text_to_image: float) -> dict[str, float]:
        return {"image_to_text_R@1": image_to_text, "text_to_image_R@1": text_to_image}

    return {
        "gallery": 512,
        "chance_R@1": 1 / 512,
        "before": {"student": recalls(0.002, 0.004), "teacher": recalls(0.002, 0.004)},
        "after": {"student": recalls(*student), "teacher": recalls(0.06, 0.07)},
    }


def metrics(folder: Path) -> Path:
    records = [
        {"kind": "train", "step": 4, "clip": 3.0, "distill": 2.0, "step_seconds_max": 2.0},
        {"kind": "eval", "step": 4, **{f"{m}/{key}": 0.01 for m in demo.MODELS for key in demo.DIRECTIONS}},
        {"kind": "train", "step": 8, "clip": 2.0, "distill": 1.0, "step_seconds_max": 1.0},
        {"kind": "train", "step": 9, "clip": 1.5, "distill": 0.5, "step_seconds_max": 0.5},
    ]
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_training_time_weighs_each_record_by_its_steps(tmp_path: Path) -> None:
    training = demo.read_metrics(metrics(tmp_path))
    assert training.seconds == 4 * 2.0 + 4 * 1.0 + 1 * 0.5
    assert [record["step"] for record in training.evaluations] == [4]


@pytest.mark.parametrize("mine", ["runs/demo_quick/metrics.jsonl", "data/train/train-00000.tar", "summary.json"])
def test_the_files_of_others_stay(mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that `cosmos-scale train demo_quick` left, and shards and figures of the user."""
    (tmp_path / mine).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / mine).write_text("mine")
    assert demo.main(["--out", str(tmp_path), "--quick"]) == 2
    assert f"--out: {tmp_path} holds other files" in capsys.readouterr().err
    assert (tmp_path / mine).read_text() == "mine"


def test_curves_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    demo.draw_curves(demo.read_metrics(metrics(tmp_path)), summary((0.1, 0.2)), path)
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.int64)
    assert pixels.shape[1] > 1000
    # Matplotlib's green and red of the recalls, its blue of a loss: each line covers hundreds of pixels.
    for colour in ((44, 160, 44), (214, 39, 40), (31, 119, 180)):
        assert (np.abs(pixels - colour).max(-1) < 10).sum() > 300


@pytest.mark.parametrize(("student", "learned"), [((0.05, 0.04), True), ((0.05, 0.038), False), ((0.01, 0.5), False)])
def test_both_directions_must_reach_twenty_times_chance(student: tuple[float, float], learned: bool) -> None:
    output = io.StringIO()
    assert demo.learned(summary(student), demo.REQUIRED, Console(file=output)) is learned
    assert ("did not learn enough" in output.getvalue()) is not learned


@pytest.mark.parametrize("name", ["demo", "demo_quick"])
def test_configs_keep_captions_true(name: str) -> None:
    """Captions name colours and sides: nothing may turn them around."""
    config = load_config(shipped_file(name))
    views = config.data.views
    assert (views.flip, views.grey, views.solarise, views.jitter.hue) == (0.0, 0.0, 0.0, 0.0)
    (gallery,) = config.eval
    assert isinstance(gallery, RetrievalConfig)
    assert gallery.max_samples == 512
    assert config.checkpoint.at_start
    assert config.zero.stage == 1


def test_launches_find_this_environment_and_need_no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.defpath)  # as where no environment is activated
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", os.environ.get("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions"))
    output = io.StringIO()
    demo.prepare_launch("CPU", Console(file=output, width=200))
    assert os.environ["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert "compiled once per environment" in output.getvalue()
    assert list(Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/deepspeed_shm_comm.so"))


RANK = """
import signal, sys, time
try:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    open(sys.argv[1], "w").write("started")
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)
    open(sys.argv[1], "w").write("ended")
"""
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', *sys.argv[1:]]).returncode)"


def test_an_interrupt_waits_for_the_ranks_to_end(tmp_path: Path) -> None:
    state = tmp_path / "state"

    def interrupt_once_started() -> None:
        while not (state.exists() and state.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        Thread(target=interrupt_once_started, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            demo.run_in_session([sys.executable, "-c", LAUNCHER, RANK, str(state)], dict(os.environ))
    finally:
        signal.signal(signal.SIGINT, before)
    assert state.read_text() == "ended"


def test_an_interrupted_demo_says_so_in_one_line(tmp_path: Path) -> None:
    # A shell may start tests with interrupts ignored, which processes inherit.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from cosmos_scale import demo; sys.exit(demo.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-u", "-c", code, "--quick", "--out", str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, cwd=REPOSITORY, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert any("Painting" in line for line in process.stdout)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the group
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "demo: interrupted\n")
    make_own_folder(tmp_path, demo.MARK)  # as the next demo does, which takes the folder
