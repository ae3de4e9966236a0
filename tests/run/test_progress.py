"""What is read of the steps: a bad loss stops the run or is skipped, and records say what the steps did."""

import json
import math
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file

from cosmos_scale.config.load import load_config
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.data.shards.index import open_sources
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.engine import ranks as collectives
from cosmos_scale.engine.ranks import Ranks, start_ranks
from cosmos_scale.exit_status import REFUSED
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.run.folder import CONFIG_FILE, prepare_folder
from cosmos_scale.run.metrics import console_line
from cosmos_scale.run.progress import Progress
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.runs import (
    checkpoint_tensors,
    last_checkpoint,
    records,
    start,
    train_to_end,
    wait_for_step,
    write_run,
)
from cosmos_scale.testing.tiny import build_tiny, tiny_batch, tiny_config
from tests.checkpoint.edit import content_of, replace_tensors


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, scenes: SceneShards) -> Path:
    """A run of two ranks whose checkpoint of step 2 has a copy, `poisoned`, with a student that overflows."""
    path = write_run(tmp_path_factory.mktemp("good"), scenes, zero={"stage": 1}, train={"max_steps": 2})
    train_to_end(path, ranks=2).require(0)
    filter_size = 3 * 8 * 8
    poison(last_checkpoint(path), path.parent / "poisoned", "visual.conv1.weight", range(filter_size))
    return path


def poison(checkpoint: Path, copy: Path, name: str, elements: range) -> None:
    """Copy a checkpoint and set some elements of one student weight to the largest float32."""
    shutil.copytree(checkpoint, copy)
    poisoned = 0
    for file, begin, count in content_of(copy)["parameters"][name]["pieces"]:
        inside = [element - begin for element in elements if begin <= element < begin + count]
        if inside:
            weight = load_file(copy / file)[f"{name}|weight"].clone()
            weight[inside] = torch.finfo(torch.float32).max
            replace_tensors(copy, file, {f"{name}|weight": weight})
            poisoned += len(inside)
    assert poisoned == len(elements)


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_loss_stops_and_says_where_and_what_is_left(run: Path, ranks: int) -> None:
    name = f"stopped{ranks}"
    start = [f"name={name}", f"init_from={run.parent}/poisoned", "checkpoint.at_start=true", "checkpoint.every=1"]
    finished = train_to_end(run, *start, "train.max_steps=8", ranks=ranks).require(2)
    assert len(finished.errors.splitlines()) == 1
    named = ", ".join(map(str, range(ranks)))
    assert f"step 1: the loss is not finite (clip nan, distill nan; features are not finite on rank {named})" in (
        finished.errors
    )
    # A checkpoint was due after each step: none may be written after the bad one.
    good = run.parent / name / "checkpoints" / "step-00000000"
    assert f"last good checkpoint: {good};" in finished.errors
    assert [folder.name for folder in good.parent.iterdir()] == [good.name]
    assert records(run, name) == []


def test_bad_loss_names_the_rank_that_it_comes_from(run: Path) -> None:
    """A word that only rank 1 reads in the first step has an embedding that overflows."""
    config = load_config(run)
    tokenizer, index = Tokenizer(config.model.text.context_length), open_sources(config.data.sources)
    words = [
        set(next(TrainLoader(config, index, tokenizer, rank, 2).batches(0)).captions.flatten().tolist())
        for rank in (0, 1)
    ]
    word, width = min(words[1] - words[0]), config.model.text.width
    row = range(word * width, (word + 1) * width)
    poison(last_checkpoint(run), run.parent / "word", "token_embedding.weight", row)
    finished = train_to_end(run, "name=word", f"init_from={run.parent}/word", ranks=2).require(2)
    assert "step 1: the loss is not finite" in finished.errors
    assert "features are not finite on rank 1)" in finished.errors


def test_bad_loss_before_any_checkpoint_says_so(run: Path) -> None:
    finished = train_to_end(run, "name=none", f"init_from={run.parent}/poisoned").require(2)
    assert "last good checkpoint: none" in finished.errors


def test_skipped_steps_change_nothing_and_are_counted(run: Path) -> None:
    start = ["name=skipping", f"init_from={run.parent}/poisoned", "checkpoint.at_start=true", "non_finite=skip"]
    finished = train_to_end(run, *start, "train.max_steps=3", ranks=2).require(0)
    for step in (1, 2, 3):
        assert f"step {step}: the loss is not finite" in finished.output
    folder = last_checkpoint(run, "skipping")
    assert folder.name == "step-00000003"
    before, after = checkpoint_tensors(folder.parent / "step-00000000"), checkpoint_tensors(folder)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    state = json.loads((folder / "manifest.json").read_text())["state"]
    assert (state["step"], state["updates"]) == (3, 0)
    _, *lines = (run.parent / "skipping" / "metrics.jsonl").read_text().splitlines()  # the first one says that it began
    for step, line in enumerate(lines, start=1):
        record = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert (record["step"], record["loss"], record["skipped_steps"]) == (step, None, step)
    again = train_to_end(run, *start, "train.max_steps=4").require(0)
    assert "step 4: the loss is not finite" in again.output
    assert "its update was skipped, 4 so far" in again.output  # of both launches


@pytest.mark.skipif(not get_accelerator().is_fp16_supported(), reason="DeepSpeed takes no fp16 on this CPU")
def test_updates_that_the_loss_scaler_drops_are_no_skipped_steps_after_a_resume_either(
    tmp_path: Path, scenes: SceneShards
) -> None:
    run = write_run(tmp_path, scenes, precision="fp16", checkpoint={"every": 4, "keep_last": 2})
    train_to_end(run).require(0)
    whole = [(record["step"], record["grad_norm"], record["skipped_steps"]) for record in records(run)]
    assert whole[0][1:] == (None, 0)  # the first scales are too large
    shutil.rmtree(last_checkpoint(run))
    assert "step-00000004" in train_to_end(run).require(0).output
    assert [(record["step"], record["grad_norm"], record["skipped_steps"]) for record in records(run)] == whole


def test_weights_that_never_recover_end_a_run_that_skips(run: Path) -> None:
    """Rather than at its last step and with the status of a good end."""
    start = ["name=never", f"init_from={run.parent}/poisoned", "non_finite=skip"]
    rest = ["train.schedule_steps=200", "train.max_steps=200", "checkpoint.every=20", "checkpoint.keep_last=2"]
    ended = train_to_end(run, *start, *rest).require(REFUSED)
    assert "step 100: the loss is not finite" in ended.errors
    assert "no step of 100 in a row was; checkpoints: step-00000060, step-00000080; rule: " in ended.errors


def test_records_hold_what_the_steps_did(run: Path) -> None:
    first, second = records(run)
    for record in (first, second):
        assert record["samples"] == 8 * record["step"]
        assert record["loss"] == pytest.approx(record["clip"] + record["distill"], rel=1e-6)  # float32 sum of two
        assert record["samples_per_second"] == pytest.approx(8 / record["step_seconds_max"])
        assert record["samples_per_second_per_rank"] == pytest.approx(record["samples_per_second"] / 2)
        assert 0 < record["tflops_per_rank"] < record["executed_tflops_per_rank"]
        assert 0.01 < record["peak_memory_gib"] < 100
        assert record.keys().isdisjoint({"mfu", "hfu"})  # a CPU's peak is not known
        assert 0 < record["useful_seconds"] < record["wall_seconds"]
        assert record["goodput"] == pytest.approx(record["useful_seconds"] / record["wall_seconds"])
        assert 0 < record["step_seconds_min"] <= record["step_seconds_max"]
        assert 0 <= record["data_wait_min"] <= record["data_wait_max"] < record["step_seconds_max"]
        assert record["data_wait_rank"] in (0, 1)
        assert record["grad_norm"] > 0
        assert (record["substituted"], record["skipped_steps"]) == (0, 0)
    useful = first["useful_seconds"], second["useful_seconds"] - first["useful_seconds"]
    for record, seconds in zip((first, second), useful, strict=True):  # by the first rank's clock
        assert record["step_seconds_min"] - 1e-6 <= seconds <= record["step_seconds_max"] + 1e-6
    assert first["eta_seconds"] > second["eta_seconds"] == 0
    # Both start at 1 / 0.07, and the first step reads them before its update.
    assert first["scale"] == first["distill_scale"] == pytest.approx(1 / 0.07, rel=1e-6)
    assert second["scale"] != first["scale"]
    assert (first["lr"], second["lr"]) == (5e-4, 1e-3)
    # No model can tell the pairs of a first batch: about ln 8 for the mean of all clip pairs.
    assert first["clip"] == pytest.approx(math.log(8), rel=0.5)


def follow_two_ranks(rank: int, world_size: int, folder: Path) -> int:
    """Follow four real steps with given waits, a record every second one; return the exchanges among ranks."""
    ranks, config = start_ranks("cpu"), tiny_config(zero={"stage": 0}, log={"every": 2, "progress": False})
    tiny, exchanges = build_tiny(config, ranks), 0
    from_all = collectives.from_all

    def counted(value: Any, ranks: Ranks) -> list[Any]:
        nonlocal exchanges
        exchanges += 1
        return from_all(value, ranks)

    waits = ((0.1, 0.3, 1.0, 1.0), (0.5, 0.1, 0.0, 0.0))[rank]
    if ranks.is_main:
        prepare_folder(config, folder)
    steps = {"first_step": 0, "last_step": 4, "steps_per_epoch": 2, "skipped": 0}
    progress = Progress(config, ranks, folder, **steps, finish_saving=lambda: None)
    with pytest.MonkeyPatch.context() as patch, progress:
        patch.setattr("cosmos_scale.run.progress.from_all", counted)
        for step, wait in enumerate(waits, start=1):
            output, share = tiny.step(step), tiny_batch(step).split(world_size)[rank]
            progress.after_step(step, output, share, lr=0.0, momentum=0.0, wait_seconds=wait)
            if step == 1 and ranks.is_main:
                (folder / CONFIG_FILE).unlink()
        progress.read_pending()
    return exchanges


def test_data_waits_are_the_least_and_the_most_of_all_ranks(tmp_path: Path) -> None:
    assert run_ranks(follow_two_ranks, 2, tmp_path) == [2, 2]  # one a record, none for other steps
    first, second = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # Means over the steps of a record.
    assert (first["data_wait_min"], first["data_wait_max"]) == pytest.approx((0.2, 0.3))
    assert (second["data_wait_min"], second["data_wait_max"]) == (0.0, 1.0)
    assert (first["data_wait_rank"], second["data_wait_rank"]) == (1, 0)
    assert console_line(first).endswith("wait 0.30 s (rank 1)")
    alone = {**second, "data_wait_min": 1.0}
    assert console_line(alone).endswith("wait 1.00 s")
    assert load_config(tmp_path / CONFIG_FILE).log.every == 2  # it was deleted after step 1


def test_ranks_that_were_stopped_in_different_steps_count_that_time_once(run: Path) -> None:
    with start(run, "name=held", "train.schedule_steps=10000", "train.max_steps=10000", ranks=2) as process:
        wait_for_step(process, run, 3, "held")
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for rank in (0, 1):
                process.signal(rank, number, whole_group=True)
            time.sleep(6.0 if number == signal.SIGSTOP else 0.0)
        wait_for_step(process, run, records(run, "held")[-1]["step"] + 5, "held")
    assert max(record["goodput"] for record in records(run, "held")) < 1


def test_steps_between_records_count_into_the_next(run: Path) -> None:
    finished = train_to_end(run, "name=rare", "log.every=3", "train.max_steps=5").require(0)
    assert [record["step"] for record in records(run, "rare")] == [3, 5]  # the last one always
    lines = finished.output.splitlines()
    places = [number for number, line in enumerate(lines) if line.startswith("step ")]
    assert len(places) == 2
    for part in ("eta", "loss", "clip", "distill", "scale", "lr", "grad"):
        assert part in lines[places[0]]
    for part in ("samples/s", "a rank", "GFLOP/s", "MFU n/a", "GiB", "wait"):
        assert part in lines[places[0] + 1]
    said = r"goodput \d[\d.]*%: 0m\d\ds of useful steps in \dm\d\ds since the run's first start"
    assert re.fullmatch(said, lines[-1])
