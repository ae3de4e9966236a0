"""Where a run starts: which checkpoint counts, and which keys may differ from the run that wrote it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from cosmos_scale.checkpoint.resume import Start, find_start, set_aside
from cosmos_scale.checkpoint.state import RunState, newest, read_run_config
from cosmos_scale.checkpoint.writer import CheckpointWriter
from cosmos_scale.config import CheckpointConfig, RunConfig, SourceConfig
from cosmos_scale.config.load import make_config
from cosmos_scale.errors import UserError
from cosmos_scale.testing.ranks import run_ranks
from tests.checkpoint.edit import content_of, rewrite

DATA = "digest of the index"
SOURCES = (SourceConfig(name="scenes", shards="data/train"),)
CONFIG = RunConfig.model_validate({"data": {"sources": [source.model_dump() for source in SOURCES]}})


def changed(**sections: Any) -> RunConfig:
    """CONFIG with some keys of its sections replaced."""
    tree = CONFIG.model_dump(mode="json")
    for section, value in sections.items():
        tree[section] = {**tree[section], **value} if isinstance(value, dict) else value
    return RunConfig.model_validate(tree)


def save(rank: int, world_size: int, root: Path, steps: list[int]) -> None:
    group = dist.group.WORLD
    assert group is not None
    with CheckpointWriter(root, [], group, CheckpointConfig(keep_last=9)) as writer:
        for step in steps:
            writer.save(RunState(step, 8 * step, step, world_size, {}, DATA, CONFIG.model_dump(mode="json")))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    run_ranks(save, 1, folder, [3, 6])
    return folder


def test_auto_takes_the_newest_and_a_folder_itself(root: Path, tmp_path: Path) -> None:
    start = find_start(CONFIG, root, DATA)
    assert start.checkpoint == root / "step-00000006"
    assert start.state is not None
    assert start.state.step == 6
    older = find_start(changed(resume=str(root / "step-00000003")), tmp_path / "new", DATA)
    assert older.checkpoint == root / "step-00000003"
    with pytest.raises(UserError, match=r"step-00000003, but .*step-00000006 is newer"):
        find_start(changed(resume=str(root / "step-00000003")), root, DATA)
    assert find_start(CONFIG, tmp_path / "new", DATA) == Start(None, None)


def test_another_runs_checkpoint_is_refused_beside_newer_ones(root: Path, tmp_path: Path) -> None:
    """Its steps would be saved below, and some of them over, those of the run whose folder this is."""
    other = tmp_path / "other"
    shutil.copytree(root / "step-00000003", other / "step-00000003")
    with pytest.raises(UserError, match=r"other/step-00000003, but .*step-00000006 is newer"):
        find_start(changed(resume=str(other)), root, DATA)
    shutil.copytree(root, tmp_path / "same")
    shutil.rmtree(tmp_path / "same" / "step-00000006")
    start = find_start(changed(resume=str(root)), tmp_path / "same", DATA)  # goes on above those that are there
    assert start.checkpoint == root / "step-00000006"


def test_one_that_is_gone_cannot_be_set_aside(tmp_path: Path) -> None:
    assert set_aside(tmp_path / "step-00000003") is None


def test_broken_ones_set_aside_count_no_more(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000006"
    for name in ("step-00000006.broken", "step-00000006.broken-2", "step-00000006.broken-3"):
        shutil.copytree(root / folder.name, folder)
        assert set_aside(folder) == folder.with_name(name)
        assert newest(folder.parent) is None
    assert len(list(folder.parent.iterdir())) == 3


def test_never_is_refused_beside_checkpoints(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"resume: 'never', but .*step-00000006 exists"):
        find_start(changed(resume="never"), root, DATA)
    assert find_start(changed(resume="never"), tmp_path / "new", DATA) == Start(None, None)


def test_named_folder_without_a_checkpoint_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: none there"):
        find_start(changed(resume=str(tmp_path / "nowhere")), root, DATA)


@pytest.mark.parametrize(
    "sections",
    [
        {"output": "elsewhere"},
        {"device": "cpu"},
        {"data": {"sources": [{"name": "scenes", "shards": "moved/train", "index": "moved/index"}]}},
        {"data": {"workers": 3, "prefetch": 1, "max_damaged": 0.5}},
        {"train": {"max_steps": 9, "max_minutes": 1.0}},
        {"train": {"micro_batches": 2, "recompute": 1}, "zero": {"stage": 3, "offload": True}},
        {"checkpoint": {"every": 1, "keep_last": 1, "keep_every": 2, "at_start": True}},
        {"eval": [{"kind": "retrieval", "every": 2, "shards": "data/gallery"}]},
        {"log": {"every": 1, "tensorboard": True, "wandb": {"mode": "offline"}, "progress": False}},
    ],
    ids=str,
)
def test_paths_workers_logging_and_limits_may_change(root: Path, sections: dict[str, Any]) -> None:
    assert find_start(changed(**sections), root, DATA).checkpoint == root / "step-00000006"


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"seed": 1}, ["seed"]),
        ({"name": "other"}, ["name"]),
        ({"precision": "fp32"}, ["precision"]),
        ({"optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}}, ["optimizer.lr", "optimizer.betas"]),
        ({"train": {"global_batch": 8, "schedule_steps": 9999}}, ["train.global_batch", "train.schedule_steps"]),
        ({"ema": {"momentum": 0.5}, "data": {"window": 7}}, ["ema.momentum", "data.window"]),
        ({"data": {"sources": [{"name": "others", "shards": "data/train"}]}}, ["data.sources.0.name"]),
        (
            {"data": {"sources": [{"name": "scenes", "shards": "data/train", "weight": 2.0}]}},
            ["data.sources.0.weight"],
        ),
    ],
    ids=str,
)
def test_other_keys_may_not_and_are_named(root: Path, sections: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        find_start(changed(**sections), root, DATA)
    text = str(refusal.value)
    between = text.removeprefix(f"resume from {root / 'step-00000006'}: ").split("; rule:")[0]
    assert sorted(difference.split(": ")[0] for difference in between.split("; ")) == sorted(named)


def test_a_refusal_names_both_values_and_the_way_out(root: Path, tmp_path: Path) -> None:
    """What the refusal says to type starts a new run."""
    there = root / "step-00000006"
    longer = changed(optimizer={"lr": 0.002}, train={"epochs": CONFIG.train.epochs + 1}, output=str(tmp_path))
    for resume, more in (("auto", ""), (str(root), " resume=auto")):
        (tmp_path / "run-2").mkdir(exist_ok=True)
        with pytest.raises(UserError) as refusal:
            find_start(longer.model_copy(update={"resume": resume}), root, DATA)
        text = str(refusal.value)
        assert f"optimizer.lr: 0.002, was {CONFIG.optimizer.lr}; rule: only paths" in text
        assert f"train.epochs: {CONFIG.train.epochs + 1}, was {CONFIG.train.epochs}; " in text
        assert "have followed the schedule of the former length" in text
        overrides = f"init_from={there} name=run-3{more}"
        assert text.endswith(f"start a new run from its weights with: {overrides}")
        parsed = make_config(longer.model_dump(mode="json") | {"resume": resume}, overrides.split())
        assert find_start(parsed, tmp_path / "run-3" / "checkpoints", DATA) == Start(None, None)
    with pytest.raises(UserError) as refusal:  # under a name of its own the run needs no other
        find_start(changed(seed=1, resume=str(root)), tmp_path / "new", DATA)
    assert str(refusal.value).endswith(f"with: init_from={there} resume=auto")


@pytest.mark.parametrize(
    ("model", "fits"), [({"vision": {"layers": 3}}, False), ({"vision": {"image_size": 64}}, True)]
)
def test_weights_that_would_not_fit_are_not_offered(
    root: Path, tmp_path: Path, model: dict[str, Any], fits: bool
) -> None:
    with pytest.raises(UserError) as refusal:
        find_start(changed(model=model, output=str(tmp_path)), root, DATA)
    offered = f"start a new run from its weights with: init_from={root / 'step-00000006'} name=run-2"
    refused = "start a new run (its weights do not fit another model) with: name=run-2"
    assert str(refusal.value).endswith(offered if fits else refused)


def test_weights_named_for_a_run_that_goes_on_are_said_not_to_be_read(root: Path, tmp_path: Path) -> None:
    """The same command again, and one without `init_from`, say nothing."""
    other = changed(init_from=str(tmp_path / "other"))
    assert "other is not read, since the run goes on" in find_start(other, root, DATA).describe_unread()
    assert find_start(CONFIG, root, DATA).describe_unread() == ""
    assert find_start(other, tmp_path / "new", DATA).describe_unread() == ""


def test_other_shards_are_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"shards of data\.sources are not those of its run.*now other"):
        find_start(CONFIG, root, "other")


def test_a_run_that_wrote_evaluation_in_its_old_form_goes_on(root: Path, tmp_path: Path) -> None:
    moved = tmp_path / "checkpoints"
    shutil.copytree(root / "step-00000006", moved / "step-00000006")
    content = content_of(moved / "step-00000006")
    retrieval = {"shards": "x", "index": None, "captions": "raw_caption", "max_samples": None, "batch": 64}
    content["state"]["config"]["eval"] = {"every": 5, "retrieval": retrieval}
    rewrite(moved / "step-00000006", content)
    assert find_start(CONFIG, moved, DATA).checkpoint == moved / "step-00000006"
    (evaluator,) = read_run_config(moved / "step-00000006").eval
    new = {"dataset": "shards", "data": None}
    assert evaluator.model_dump() == {"kind": "retrieval", "name": "retrieval", "every": 5, **retrieval, **new}


def test_configuration_of_another_version_is_refused(root: Path, tmp_path: Path) -> None:
    moved = tmp_path / "checkpoints"
    shutil.copytree(root / "step-00000006", moved / "step-00000006")
    content = content_of(moved / "step-00000006")
    train = content["state"]["config"]["train"]
    train["max_hours"] = train.pop("max_minutes")
    rewrite(moved / "step-00000006", content)
    with pytest.raises(UserError, match=r"not of this version: train\.max_hours"):
        find_start(CONFIG, moved, DATA)
