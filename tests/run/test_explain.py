"""Every shipped config through the dry run, and the published runs' numbers in it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.data.training.order import steps_per_epoch
from cosmos_scale.errors import UserError
from cosmos_scale.run.explain import count_parameters, explain
from tests.conftest import REPOSITORY

RUNS = sorted((REPOSITORY / "configs" / "run").glob("*.yaml"))

# The published runs: samples per epoch, steps per epoch, global batch, ranks, momentum, sources.
PUBLISHED = {
    "cc3m": (2_823_019, 2_768, 1024, 16, 0.999, ["cc3m"]),
    "cc12m": (10_010_225, 2_448, 4096, 128, 0.99, ["cc12m"]),
    "yfcc15m": (14_065_827, 3_440, 4096, 128, 0.99, ["yfcc15m"]),
    "merged30m": (26_899_071, 6_576, 4096, 128, 0.99, ["cc3m", "cc12m", "yfcc15m"]),
    "pixelprose": (15_037_386, 3_680, 4096, 128, 0.99, ["pixelprose"]),
}


def dry_run(capsys: pytest.CaptureFixture[str], path: Path, world_size: int, *overrides: str) -> dict[str, str]:
    explain(load_config(path, overrides), world_size)
    printed = capsys.readouterr().out
    words = [line[26:].split() for line in printed.splitlines() if len(line) > 80]
    assert all(len(found) == 1 for found in words), "a path longer than the column"
    lines = re.sub(r"\n {20,}", " ", printed).splitlines()  # a long row goes on in the next line
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines if re.search(r"\S\s{2,}\S", line))


def test_all_published_runs_are_shipped() -> None:
    expected = {f"{dataset}_{model}" for dataset in PUBLISHED for model in ("vitb16", "vitb32")}
    assert expected <= {path.stem for path in RUNS}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_config_passes_the_dry_run(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # where no shards lie: plans need none
    rows = dry_run(capsys, path, 2)
    assert rows["global batch"].endswith(f"= 2 ranks x {load_config(path).samples_per_rank(2):,}")
    assert load_config(path).name == path.stem


@pytest.mark.parametrize("model", ["vitb16", "vitb32"])
@pytest.mark.parametrize("dataset", PUBLISHED)
def test_published_runs_have_the_published_numbers(
    dataset: str, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    samples, steps, batch, ranks, momentum, sources = PUBLISHED[dataset]
    path = REPOSITORY / "configs" / "run" / f"{dataset}_{model}.yaml"
    config = load_config(path)
    assert [source.name for source in config.data.sources] == sources
    assert (config.train.epochs, config.train.global_batch, config.ema.momentum) == (32, batch, momentum)
    assert config.samples_per_rank(ranks) == {1024: 64, 4096: 32}[batch]
    assert config.data.captions.sampling == ("textcrop_pixelprose" if dataset == "pixelprose" else "textcrop")
    rows = dry_run(capsys, path, ranks)
    assert rows["samples per epoch"].startswith(f"{samples:,} (data.samples; ")
    assert rows["steps per epoch"] == f"{steps:,}"
    assert rows["steps of the schedules"] == f"{32 * steps:,}"
    # Warm-up's last step has the full rate; the momentum is fixed.
    assert re.split(r"\s+", rows["1,999"]) == ["5.0000e-04", f"{momentum:.6f}"]


def test_published_steps_come_from_whole_epochs_and_16_workers() -> None:
    for samples, steps, batch, *_ in PUBLISHED.values():
        train = {"global_batch": batch, "epoch_steps_multiple": 16}
        config = RunConfig.model_validate({"data": {"last_batch": "pad"}, "train": train})
        assert steps_per_epoch(samples, config) == steps


def test_parameters_of_the_published_model() -> None:
    counts = count_parameters(load_config(REPOSITORY / "configs" / "run" / "cc3m_vitb16.yaml"))
    tensors, elements = (sum(pair) for pair in zip(*counts.values(), strict=True))
    assert (tensors, elements) == (323, 152_382_466)
    assert counts[True][0] == 108


def test_overrides_show_in_the_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    path = REPOSITORY / "configs" / "run" / "cc3m_vitb32.yaml"
    rows = dry_run(capsys, path, 4, "train.max_steps=100", "ema.schedule=cosine", "name=other", "model.attention=sdpa")
    assert rows["attention"] == "sdpa"
    assert rows["last step"] == "100 (train.max_steps)"
    asked = int(rows["steps of the schedules"].replace(",", "")) + 1
    longer = dry_run(capsys, path, 4, f"train.max_steps={asked}", "model.attention=sdpa")["last step"]
    assert f"; train.max_steps: {asked}; rule: it ends a run early, and this one's" in longer
    assert rows["writes to"] == "runs/other"
    assert re.split(r"\s+", rows[f"{16 * 2768:,}"])[1] == "0.999500"  # half way: half of the distance to 1


def test_checkpoints_kept_for_good_show(capsys: pytest.CaptureFixture[str]) -> None:
    path = REPOSITORY / "configs" / "run" / "cc3m_vitb32.yaml"
    rows = dry_run(capsys, path, 4, "checkpoint.every=500", "checkpoint.keep_last=2", "checkpoint.keep_every=5000")
    assert (
        rows["checkpoints"]
        == "every 500 steps and at the end; the last 2 are kept, and all at multiples of 5,000 steps"
    )


def test_weights_lengthen_the_epoch_and_show(capsys: pytest.CaptureFixture[str], scenes: SceneShards) -> None:
    sources = [f"data.sources.0.shards={scenes.train}", "data.sources.0.weight=2.5"]  # of 80 pairs
    others = ["train.global_batch=16", "train.epoch_steps_multiple=1", "train.schedule_steps=5000"]
    path = REPOSITORY / "configs" / "run" / "cc3m_vitb32.yaml"
    rows = dry_run(capsys, path, 2, *sources, *others)
    assert rows["samples per epoch"] == "200 (index)"
    assert rows["steps per epoch"] == "13"
    assert rows["source cc3m"] == f"{scenes.train}, weight 2.5"
    for refused in ("0", "-1", ".inf", "many"):
        with pytest.raises(UserError, match=r"data\.sources\.0\.weight"):
            load_config(path, [f"data.sources.0.weight={refused}"])


def test_micro_batches_recomputing_and_memory_show(capsys: pytest.CaptureFixture[str]) -> None:
    path = REPOSITORY / "configs" / "run" / "cc3m_vitb16.yaml"
    rows = dry_run(capsys, path, 16, "zero.stage=1", "precision=bf16")
    assert rows["micro-batches"] == "1 of 64 samples a rank"
    assert rows["recomputed blocks"].startswith("none")
    # 152,382,466 parameters: weights and teacher 2 bytes each, and a sixteenth of 2 + 4 + 8 + 4.
    shards = 152_382_466 * 18 / 16
    # Beside that the two ends of tensors that shards cut in each group; the largest tensor is the embedding's.
    least, most = (2 * 2 * 152_382_466 + shards + cut for cut in (0, 2 * 2 * 49_408 * 512))
    size = re.match(r"([\d.]+) MiB by formula \(weights 290\.6 MiB, ", rows["memory per rank"])
    assert size is not None, rows["memory per rank"]
    assert least / 2**20 <= float(size[1]) + 0.05
    assert float(size[1]) <= most / 2**20
    offload = ["zero.stage=3", "zero.offload=true", "train.micro_batches=4", "train.recompute=2"]
    rows = dry_run(capsys, path, 16, *offload)
    assert rows["micro-batches"] == "4 of 16 samples a rank"
    assert rows["recomputed blocks"] == "one in 2, the first among them"
    assert re.match(r"[\d.]+ MiB and [\d.]+ MiB on the host by formula", rows["memory per rank"])
    for micro_batches in (3, 128):
        with pytest.raises(
            UserError, match=rf"train\.micro_batches: {micro_batches} must divide the samples of a rank, 64"
        ) as error:
            dry_run(capsys, path, 16, f"train.micro_batches={micro_batches}")
        assert "\n" not in str(error.value)


def test_a_world_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.global_batch: 1024 must be a multiple of the 3 ranks"):
        explain(load_config(REPOSITORY / "configs" / "run" / "cc3m_vitb16.yaml"), 3)


def test_without_shards_and_data_samples_the_missing_shards_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {sources: [{name: mine, shards: nowhere}]}\n")
    with pytest.raises(UserError, match="mine"):
        explain(load_config(path), 1)


def test_a_reader_that_leaves_early_gets_no_traceback(repository: Path) -> None:
    command = f"{sys.executable} -m cosmos_scale.train --dry-run configs/run/cc3m_vitb16.yaml | head -c 1"
    finished = subprocess.run(["sh", "-c", command], cwd=repository, capture_output=True, text=True, timeout=120)
    assert len(finished.stdout) == 1
    assert finished.stderr == ""
