"""Runs' folders with made-up records, for tests of the report."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cosmos_scale.config.load import dump_config, make_config

BEGAN, STEP_SECONDS, BATCH = 1_790_000_000.0, 2.0, 64


def train_record(step: int, **changes: Any) -> dict[str, Any]:
    """A training record of a step; every step takes STEP_SECONDS."""
    loss = 5.0 * math.exp(-step / 100) + 1.0
    return {
        "kind": "train",
        "time": BEGAN + step * STEP_SECONDS,
        "step": step,
        "samples": step * BATCH,
        "loss": loss,
        "clip": 0.6 * loss,
        "distill": 0.4 * loss,
        "scale": 14.0,
        "distill_scale": 14.5,
        "lr": 1e-3,
        "momentum": 0.99,
        "grad_norm": 2.0,
        "samples_per_second": BATCH / STEP_SECONDS,
        "step_seconds_min": STEP_SECONDS - 0.1,
        "step_seconds_max": STEP_SECONDS,
        "data_wait_min": 0.01,
        "data_wait_max": 0.05,
        "data_wait_rank": step % 3,
        "substituted": 0,
        "skipped_steps": 0,
    } | changes


def evaluation_record(step: int, recall: float, name: str = "retrieval") -> dict[str, Any]:
    """A record of a retrieval whose teacher is at half of the student's recall."""
    numbers = {
        f"{model}/{way}_R@1": recall * share
        for model, share in (("student", 1.0), ("teacher", 0.5))
        for way in ("image_to_text", "text_to_image")
    }
    time = BEGAN + step * STEP_SECONDS
    return {"kind": "eval", "time": time, "evaluator": name, "step": step, **numbers, "student/chance_R@1": 0.01}


def start_record(step: int, world_size: int) -> dict[str, Any]:
    """The record of a launch."""
    time = BEGAN + step * STEP_SECONDS
    return {"kind": "start", "time": time, "step": step, "world_size": world_size, "device": "cuda"}


def write_run(folder: Path, records: Iterable[dict[str, Any]], name: str = "some_run", **keys: Any) -> Path:
    """Write a run's folder with its records and its config; `keys` replace top-level sections."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    sections = {"train": {"global_batch": BATCH, "schedule_steps": 200}, "optimizer": {"warmup_steps": 10}}
    (folder / "config.yaml").write_text(dump_config(make_config({"name": name, **sections, **keys})))
    return folder
