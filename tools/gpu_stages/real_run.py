"""The training command itself on shards: loader, evaluation, checkpoint, and a resume that goes on."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cosmos_scale.config.shipped import shipped_file
from cosmos_scale.data.scenes.scene_shards import build_scenes
from tools.gpu_stages.recorder import Recorder

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = (6, 12)  # the first run stops after 6, the second resumes
SECONDS = 90.0  # of one run


def measure(recorder: Recorder) -> None:
    """Train the short demo to step 6, resume to step 12, and write exit statuses, losses and the loader's wait."""
    with tempfile.TemporaryDirectory() as folder:  # not in the report's folder, which travels
        _measure(recorder, Path(folder))


def _measure(recorder: Recorder, folder: Path) -> None:
    data = folder / "scenes"
    train, gallery = (64, 16) if recorder.tiny else (512, 64)
    build_scenes(data, train=train, gallery=gallery)
    command = [
        *(sys.executable, "-m", "cosmos_scale.train", str(shipped_file("demo_quick"))),
        *(f"data.sources.0.shards={data / 'train'}", f"eval.0.shards={data / 'gallery'}", "eval.0.every=6"),
        *(f"eval.0.max_samples={gallery}", f"output={folder / 'runs'}", f"device={recorder.device.type}"),
        *("resume=auto", "checkpoint.every=6", "log.every=1", "log.progress=false"),
        *(("precision=bf16",) if recorder.on_gpu else ()),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    for last in STEPS:
        began = time.perf_counter()
        finished = subprocess.run(
            [*command, f"train.max_steps={last}"],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            env=environment,
        )
        recorder.write(
            to_step=last,
            ok=finished.returncode == 0,
            status=finished.returncode,
            took_s=time.perf_counter() - began,
            end=(finished.stdout + finished.stderr)[-600 if finished.returncode == 0 else -3000 :],
        )
        if finished.returncode:
            return
    lines = (folder / "runs" / "demo_quick" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    recorder.write(
        what="records of both runs",
        ok=[record["step"] for record in records] == list(range(1, STEPS[-1] + 1)),
        losses=[round(record["loss"], 4) for record in records],
        samples_per_s=records[-1]["samples_per_second"],
        data_wait_s=records[-1]["data_wait_max"],
    )
