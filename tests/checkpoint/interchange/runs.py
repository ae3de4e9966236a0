"""A run's folder with one checkpoint of a tiny model and its metrics, written without training."""

import json
from pathlib import Path

from cosmos_scale.checkpoint.files import write_tensors
from cosmos_scale.checkpoint.state import KINDS, RunState, checkpoint_name, write_manifest
from cosmos_scale.config import ModelConfig, RunConfig
from tests.checkpoint.interchange.made import SIZES, state_of

STEP, EACH = 9, 4  # steps done, and of an epoch
STUDENT, TEACHER = 1, 2  # seeds


def save_run(folder: Path, model: ModelConfig = SIZES) -> Path:
    """Write a run of STEP steps, whose student and teacher are drawn from the seeds; return the checkpoint's folder."""
    checkpoint = folder / "checkpoints" / checkpoint_name(STEP)
    checkpoint.mkdir(parents=True)
    tensors, pieces = {}, []
    student, teacher = state_of(STUDENT, model), state_of(TEACHER, model)
    for name, weight in student.items():
        for kind in KINDS:
            tensors[f"{name}|{kind}"] = (teacher[name] if kind == "ema" else weight).detach().reshape(-1)
        pieces.append((name, list(weight.shape) or [1], 0, weight.numel()))
    record = write_tensors(checkpoint / "fragments-00000.safetensors", tensors)
    config = RunConfig.model_validate(
        {
            "name": "tiny",
            "model": model.model_dump(),
            "data": {"sources": [{"name": "photos", "shards": "https://me:secret@host/photos"}]},
            "eval": [{"kind": "retrieval", "shards": "held_out", "captions": "caption"}],
        }
    )
    state = RunState(STEP, 8 * STEP, STEP, 1, {}, "digest", config.model_dump(mode="json"), steps_per_epoch=EACH)
    write_manifest(checkpoint, state, [(record, pieces)])
    records = [
        {"kind": "eval", "evaluator": "retrieval", "step": STEP - 1, "student/image_to_text_R@1": 0.1111},
        {"kind": "train", "step": STEP, "loss": 1.0},
        {"kind": "eval", "evaluator": "retrieval", "step": STEP, "student/image_to_text_R@1": 0.25}
        | {"teacher/image_to_text_R@1": 0.375, "student/images": 512, "teacher/images": 512},
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return checkpoint
