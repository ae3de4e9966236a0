"""A run that begins anew in the folder of an earlier run whose checkpoints are gone keeps what that run left."""

import json
import shutil
from pathlib import Path

from cosmos_scale.config.load import load_config
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.run.folder import prepare_folder
from cosmos_scale.run.old_run import keep_old_run
from cosmos_scale.testing.runs import records, train_to_end, write_run


def left_by_a_run(folder: Path, *entries: dict[str, object]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"torn": 1')


def test_a_runs_records_outlive_its_checkpoints(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes)
    folder = tmp_path / "tiny"
    train_to_end(run, "train.max_steps=2").require(0)
    old = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "config.yaml")}
    shutil.rmtree(folder / "checkpoints")
    finished = train_to_end(run, "train.max_steps=1").require(0)
    said = f"{folder}: has an earlier run's records and no checkpoint: kept in {folder / 'old-run'}: "
    assert f"{said}config.yaml, metrics.jsonl\n" in finished.output
    assert "dropped" not in finished.output
    assert {name: (folder / "old-run" / name).read_bytes() for name in old} == old
    assert [record["step"] for record in records(run)] == [1]


def test_nothing_is_overwritten_and_a_link_stays_one(tmp_path: Path, scenes: SceneShards) -> None:
    config = load_config(write_run(tmp_path, scenes), ["checkpoint.every=4"])
    folder = tmp_path / "tiny"
    left_by_a_run(folder, {"kind": "train", "step": 4})
    for name in ("evaluation", "tensorboard", "checkpoints"):
        (folder / name).mkdir()
    (folder / "evaluation" / "picture.png").write_bytes(b"1")
    prepare_folder(config, folder)
    keep_old_run(config, folder, 8)
    assert {path.name for path in folder.iterdir()} == {"old-run", "checkpoints"}
    assert (folder / "old-run" / "evaluation" / "picture.png").read_bytes() == b"1"
    left_by_a_run(folder, {"kind": "train", "step": 4})
    (folder / "metrics.jsonl").rename(tmp_path / "records")
    (folder / "metrics.jsonl").symlink_to(tmp_path / "records")
    assert keep_old_run(config, folder, 8).endswith(f"kept in {folder / 'old-run-2'}: metrics.jsonl")
    assert (folder / "old-run-2" / "metrics.jsonl").read_bytes() == (tmp_path / "records").read_bytes()
    assert not (folder / "old-run-2" / "metrics.jsonl").is_symlink()
    assert (folder / "metrics.jsonl").is_symlink()


def test_a_start_that_ended_before_its_first_checkpoint_is_no_earlier_run(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes)
    config, folder = load_config(run, ["checkpoint.every=4"]), tmp_path / "tiny"
    left_by_a_run(folder, {"kind": "start", "step": 0}, {"kind": "train", "step": 3})
    prepare_folder(config, folder)
    assert keep_old_run(config, folder, 8) == ""
    assert not (folder / "old-run").exists()
    for others in (["optimizer.lr=0.5"], ["resume=never"], ["log.every=2"], ["checkpoint.every=3"]):
        changed = load_config(run, ["checkpoint.every=4", *others])
        assert "kept in" in keep_old_run(changed, folder, 8), others
        left_by_a_run(folder, {"kind": "train", "step": 3})
        prepare_folder(config, folder)
    for kind, step in (("stop", 1), ("start", 2)):
        left_by_a_run(folder, {"kind": kind, "step": step})
        assert "kept in" in keep_old_run(config, folder, 8), kind
        prepare_folder(config, folder)
    left_by_a_run(folder, {"kind": "start", "step": 0}, {"kind": "stop", "step": 0})  # whose run took no step
    assert keep_old_run(load_config(run, ["resume=never"]), folder, 8) == ""
