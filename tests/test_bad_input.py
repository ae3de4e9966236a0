"""What users get wrong: one clear line and status 2, on one rank and on two, or a counted skip; never a traceback."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.testing.runs import TINY, Finished, last_checkpoint, launch, records, start, train_to_end, write_run

Edit = Callable[[str, bytes], bytes]
WRONG_SHAPE = json.dumps({"raw_caption": [1, 2], "url": "https://example.org/1.jpg"}).encode()
NO_CAPTIONS = json.dumps({"url": "https://example.org/1.jpg"}).encode()


def repack(scenes: SceneShards, folder: Path, edit: Edit, *, samples_per_shard: int = 10) -> Path:
    """The training pairs in more shards, members edited, and indexed."""
    folder.mkdir()
    with tarfile.open(next(scenes.train.glob("*.tar"))) as whole:
        members = [
            (info.name, edit(info.name, file.read())) for info in whole if (file := whole.extractfile(info)) is not None
        ]
    wanted = [(name, data) for name, data in members if name.endswith((".jpg", ".json")) and "scene" not in name]
    size = 2 * samples_per_shard
    for number, first in enumerate(range(0, len(wanted), size)):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as shard:
            for name, data in wanted[first : first + size]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    index_shards(str(folder), None, workers=1, progress=False)
    return folder


def keep(_: str, data: bytes) -> bytes:
    return data


def corrupt(jpeg: bytes) -> bytes:
    """Overwrite the middle of a picture's data; its ends, all that indexing looks at, stay."""
    middle = len(jpeg) // 2
    return jpeg[:middle] + b"\xff\xd8" * 20 + jpeg[middle + 40 :]


def assert_one_line(finished: Finished, *parts: str) -> None:
    finished.require(2)
    assert "Traceback" not in finished.output + finished.errors
    lines = finished.errors.splitlines()
    assert len(lines) == 1, finished.errors
    for part in ("cosmos-scale train: ", *parts):
        assert part in lines[0]


def refused(run: Path, overrides: list[str], *parts: str, ranks: tuple[int, ...] = (1, 2)) -> None:
    for count in ranks:
        assert_one_line(train_to_end(run, *overrides, ranks=count), *parts)


def test_data_that_is_not_there(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes)
    refused(run, ["data.sources=[]"], "data.sources is empty")
    refused(run, [f"data.sources.0.shards={tmp_path}/none"], "data source scenes", "no .tar shards", f"{tmp_path}/none")
    unindexed = tmp_path / "unindexed"
    unindexed.mkdir()
    for shard in scenes.train.glob("*.tar"):
        (unindexed / shard.name).write_bytes(shard.read_bytes())
    refused(run, [f"data.sources.0.shards={unindexed}"], "data source scenes", "no index", "cosmos-scale data index")
    refused(run, ["train.global_batch=128"], "128", "80")


def test_batch_that_the_ranks_do_not_divide(tmp_path: Path, scenes: SceneShards) -> None:
    refused(write_run(tmp_path, scenes), ["train.global_batch=9"], "train.global_batch", "9", "2 ranks", ranks=(2,))


def test_config_that_cannot_be_meant(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes)
    refused(run, ["optimizer.leraning_rate=1"], "optimizer.leraning_rate")
    refused(run, ["train.global_bacth=8"], "train.global_bacth", "train.global_batch")
    refused(tmp_path / "missing.yaml", [], "missing.yaml", "no such config file")


def test_output_that_cannot_be_written(tmp_path: Path, scenes: SceneShards) -> None:
    (tmp_path / "file").write_text("")
    refused(write_run(tmp_path, scenes), [f"output={tmp_path}/file"], "output", f"{tmp_path}/file")


def test_precision_that_the_device_lacks(tmp_path: Path, scenes: SceneShards) -> None:
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this CPU computes in fp16")
    refused(write_run(tmp_path, scenes), ["precision=fp16"], "precision", "fp16", "bf16")


def test_attention_that_cannot_run_here(tmp_path: Path, scenes: SceneShards) -> None:
    parts = ("model.attention: 'flash_attn_2'", "CUDA device", "auto")
    refused(write_run(tmp_path, scenes), ["device=cpu", "model.attention=flash_attn_2"], *parts, ranks=(1,))


def test_checkpoints_that_are_none(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes)
    refused(run, [f"resume={tmp_path}/none"], f"{tmp_path}/none", "none there")
    refused(run, [f"init_from={tmp_path}/none"], f"{tmp_path}/none", "none there", ranks=(2,))
    train_to_end(run, "name=other", "model.vision.width=32", "train.max_steps=1").require(0)
    refused(run, [f"init_from={tmp_path}/other"], "init_from", "does not fit the model", "size mismatch", ranks=(2,))
    checkpoint = tmp_path / "other" / "checkpoints" / "step-00000001"
    fragments = checkpoint / "fragments-00000.safetensors"
    fragments.write_bytes(fragments.read_bytes()[:-100])
    refused(run, ["name=other", "model.vision.width=32"], str(fragments), "must be whole", ranks=(2,))
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text()[:1000])
    refused(run, ["name=other", "model.vision.width=32"], str(checkpoint), "manifest.json", ranks=(1,))


def test_captions_that_are_none(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes)
    shards = repack(scenes, tmp_path / "shards", lambda name, data: NO_CAPTIONS if name.endswith("json") else data)
    refused(run, [f"data.sources.0.shards={shards}"], "no caption in any sample looked at", "textcrop", "url")


def test_damaged_samples_are_counted_and_too_many_stop(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes)
    reasons = {"000003": "raw_caption[0] is a number", "000050": "does not decode"}

    def damage(name: str, data: bytes) -> bytes:
        if name == "000003.json":
            return WRONG_SHAPE
        return corrupt(data) if name == "000050.jpg" else data

    shards = repack(scenes, tmp_path / "shards", damage)
    one_epoch = [f"data.sources.0.shards={shards}", "train.max_steps=10", "train.schedule_steps=10"]
    for ranks in (1, 2):
        name = f"ranks{ranks}"
        train_to_end(run, f"name={name}", *one_epoch, ranks=ranks).require(0)
        damaged = [json.loads(line) for line in (tmp_path / name / "damaged.jsonl").read_text().splitlines()]
        # A substitute may be the other damaged sample, which is then named once more.
        assert {entry["key"] for entry in damaged} == reasons.keys()
        assert all(reasons[entry["key"]] in entry["reason"] for entry in damaged)
        assert sum(record["substituted"] for record in records(run, name)) == 2
    refused(run, [*one_epoch, "name=strict", "data.max_damaged=0"], "data.max_damaged", "strict/damaged.jsonl")


def test_replaced_samples_between_a_record_and_a_checkpoint_are_counted(tmp_path: Path, scenes: SceneShards) -> None:
    """Recorded after step 5, saved after step 6, and resumed there at another number of ranks."""
    sections: dict[str, Any] = {"log": {"every": 5}, "checkpoint": {"every": 6, "keep_last": 3}}
    run = write_run(tmp_path, scenes, **sections)  # of 8 steps
    shards = repack(scenes, tmp_path / "shards", lambda name, data: corrupt(data) if "7.jpg" in name else data)
    command = [f"data.sources.0.shards={shards}", "data.max_damaged=1"]
    train_to_end(run, *command, ranks=2).require(0)
    whole = [(record["step"], record["substituted"]) for record in records(run)]
    assert whole[0][1] > 0
    assert whole[1][1] > 0
    shutil.rmtree(last_checkpoint(run))
    assert "step-00000006" in train_to_end(run, *command).require(0).output
    assert [(record["step"], record["substituted"]) for record in records(run)] == whole


def test_shard_truncated_after_indexing(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes)
    shards = repack(scenes, tmp_path / "shards", keep)
    with (shards / "00003.tar").open("r+b") as file:
        file.truncate(20_000)
    # Only one of two ranks meets it first; the other must end with the same line.
    refused(run, [f"data.sources.0.shards={shards}", "data.workers=1"], str(shards / "00003.tar"), "20000 bytes")


def test_shard_that_vanished(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes)
    shards = repack(scenes, tmp_path / "shards", keep)
    (shards / "00005.tar").unlink()
    refused(run, [f"data.sources.0.shards={shards}"], str(shards / "00005.tar"), "cannot be opened")


def test_dying_loader_process_is_named(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes, train={"schedule_steps": 1000})
    with start(run, "data.workers=1", ranks=2) as process:
        process.wait_until(lambda: len(records(run)) > 1, "a step")
        pid = process.processes[1].pid
        children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=True).stdout.split()
        subprocess.run(["kill", "-KILL", *children], check=True)
        ended = process.wait()
        assert_one_line(ended, "rank 1", "loader process died")
        assert ended.errors.count("rank 1") == 1


def test_under_the_launcher(tmp_path: Path, scenes: SceneShards) -> None:
    """The launcher adds its own lines, but the status is ours, and so is the one line that says why."""
    run = write_run(tmp_path, scenes)
    with launch(run, "train.global_batch=9", ranks=2) as process:
        finished = process.wait().require(2)
    printed = finished.output + finished.errors
    assert "Traceback" not in printed
    ours = [line for line in printed.splitlines() if line.startswith("cosmos-scale train: ")]
    assert len(ours) == 1
    assert "train.global_batch" in ours[0]


def test_missing_file_needs_no_second_look(tmp_path: Path) -> None:
    """The module itself, as users start it, ends with the line and the status that `main` returns."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**TINY, "seeed": 1}))
    command = [sys.executable, "-m", "cosmos_scale.train", "run.yaml"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert_one_line(Finished([ended.returncode], ended.stdout, ended.stderr), "run.yaml", "seeed", "seed")
