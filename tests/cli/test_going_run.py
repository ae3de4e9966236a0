"""Commands on a run that goes on: its newest checkpoint is deleted while it is read, or once it was read."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import cosmos_scale
from cosmos_scale.checkpoint.files import GoneCheckpoint
from cosmos_scale.checkpoint.initial import open_initial
from cosmos_scale.checkpoint.interchange.reading import of_newest
from cosmos_scale.checkpoint.resume import Start, find_start
from cosmos_scale.checkpoint.room import delete_checkpoint
from cosmos_scale.checkpoint.state import (
    MOST_TRIES,
    FragmentReader,
    Manifest,
    checkpoint_name,
    load_weights,
    newest,
    read_manifest,
    step_of,
)
from cosmos_scale.cli import main as cli
from cosmos_scale.cli.eval_command import of_one_checkpoint
from cosmos_scale.config import RetrievalConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.engine.contact import Contact
from cosmos_scale.engine.ranks import Ranks, start_ranks
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.evaluator import Encoder, no_report
from cosmos_scale.report import run_pictures
from cosmos_scale.report.records import RunRecords, SavedCheckpoint
from cosmos_scale.run.start import build_pair, open_run, with_agreed_weights
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.runs import train_to_end, write_run
from tests.checkpoint.edit import content_of, rewrite
from tests.evaluation.labelled import ANIMALS, tiny_run, write_folders
from tests.inference.conftest import write_checkpoint


def go_on(run: Path, step: int, *, keep: bool = False) -> None:
    """Save the checkpoint of the next step, and delete that of this one, or keep it; each at once, as a run does."""
    old, new = (run / "checkpoints" / checkpoint_name(number) for number in (step, step + 1))
    under_way = new.with_name(f"{new.name}.tmp")
    shutil.copytree(old, under_way)
    content = content_of(under_way)
    content["state"]["step"] = step + 1
    rewrite(under_way, content)
    under_way.rename(new)
    if not keep:
        delete_checkpoint(old)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run at step 3."""
    write_checkpoint(tmp_path / "run", tiny_run())
    return tmp_path / "run"


@pytest.fixture
def going(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, which goes on to step 4 as soon as tensors of step 3 are to be read."""

    def enter(self: FragmentReader) -> FragmentReader:
        if self.folder.name == checkpoint_name(3):
            go_on(run, 3)
        return self

    monkeypatch.setattr(FragmentReader, "__enter__", enter)
    return run


SAID = "step-00000004 is taken: its run has deleted the one before it meanwhile"


def test_load_takes_the_next_one(going: Path) -> None:
    with pytest.warns(UserWarning, match=SAID):
        assert cosmos_scale.load(going, device="cpu").checkpoint.name == checkpoint_name(4)


def test_a_checkpoint_that_is_named_is_not_replaced(going: Path) -> None:
    with pytest.raises(GoneCheckpoint, match="step-00000003: deleted since it was found"):
        cosmos_scale.load(going / "checkpoints" / checkpoint_name(3), device="cpu")


def test_convert_takes_the_next_one(going: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", "--checkpoint", str(going), "--to", "openclip", "--json", str(tmp_path / "out")]
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["checkpoint"] == str(going / "checkpoints" / checkpoint_name(4))
    assert captured.err.endswith(f"{SAID}\n")
    assert captured.err.count("\n") == 1


def test_both_models_are_of_one_checkpoint_that_may_go_while_the_first_is_measured(
    going: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, encode = write_folders(tmp_path / "pictures", [1] * len(ANIMALS)), Encoder.images

    def images(self: Encoder, images: torch.Tensor) -> torch.Tensor:
        found = newest(going / "checkpoints")
        if found is not None and found.name == checkpoint_name(4):
            go_on(going, 4)
        return encode(self, images)

    monkeypatch.setattr(Encoder, "images", images)
    command = ["eval", "classification", "--checkpoint", str(going), "--data", str(pictures), "--device", "cpu"]
    assert cli.main([*command, "--weights", "both", "--json"]) == 0
    captured = capsys.readouterr()
    printed = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["weights"] for line in printed] == ["student", "teacher"]
    assert {line["checkpoint"] for line in printed} == {str(going / "checkpoints" / checkpoint_name(4))}
    assert captured.err.count(SAID) == 1


def test_the_report_takes_the_next_one(going: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pairs_of(section: object, encoder: Encoder, report: object) -> None:
        shown.append(encoder.weights)

    shown: list[str | None] = []
    monkeypatch.setattr(run_pictures, "retrieve", pairs_of)
    monkeypatch.setattr(run_pictures, "attention_of", pairs_of)
    config = tiny_run().model_copy(update={"eval": (RetrievalConfig(kind="retrieval", shards="held_out"),)})
    saved = SavedCheckpoint(going / "checkpoints" / checkpoint_name(3), 3, 0.0, 1, 0, {}, None)
    records, notes = RunRecords(going, "run", saved=[saved], config=config), list[str]()
    run_pictures.pictures_of([records], "cpu", no_report, notes, made=True)
    assert len(shown) == 2
    assert notes == ["run: retrieval and attention are of a later checkpoint than step-00000003."]


def test_the_tries_end(run: Path) -> None:
    tried: list[str] = []

    def read(checkpoint: Path) -> None:
        go_on(run, 3 + len(tried))
        tried.append(checkpoint.name)
        raise GoneCheckpoint(checkpoint)

    said: list[str] = []
    with pytest.raises(GoneCheckpoint):
        of_newest(run, read, said.append)
    assert tried == [checkpoint_name(3 + number) for number in range(MOST_TRIES)]
    assert len(said) == MOST_TRIES - 1


def test_the_next_one_that_comes_while_the_list_is_gone_through_is_found(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = Path.exists

    def meanwhile(path: Path) -> bool:
        if path.parent.name == checkpoint_name(3) and exists(path):
            go_on(run, 3)
        return exists(path)

    monkeypatch.setattr(Path, "exists", meanwhile)
    found = newest(run / "checkpoints")
    assert found is not None
    assert found.name == checkpoint_name(4)


def of_rank(rank: int, world_size: int) -> Ranks:
    assert dist.group.WORLD is not None
    return Ranks(rank, world_size, torch.device("cpu"), dist.group.WORLD, Contact(rank, {}))


def taken(rank: int, world_size: int, run: Path) -> tuple[str, str]:
    """What each rank takes where rank 1 alone comes too late for the checkpoint of step 3."""
    ranks = of_rank(rank, world_size)

    def read(checkpoint: Path) -> str:
        if rank == 1 and checkpoint.name == checkpoint_name(3):
            go_on(run, 3)
            raise GoneCheckpoint(checkpoint)
        return f"{checkpoint.name} of rank {rank}"

    checkpoint, value = of_one_checkpoint(run, read, ranks)
    return checkpoint.name, value


def test_all_ranks_take_the_next_one_where_one_rank_came_too_late(run: Path) -> None:
    new = checkpoint_name(4)
    assert run_ranks(taken, 2, run) == [(new, f"{new} of rank {rank}") for rank in range(2)]


def went_before_it_was_read(run: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Let the run go on to step 4 as soon as a module is to read the manifest of step 3."""

    def read(folder: Path) -> Manifest:
        if folder.name == checkpoint_name(3):
            go_on(run, 3)
        return read_manifest(folder)

    monkeypatch.setattr(f"cosmos_scale.checkpoint.{module}.read_manifest", read)


def test_a_new_run_starts_from_the_next_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    went_before_it_was_read(run, monkeypatch, "initial")
    config = tiny_run().model_copy(update={"init_from": run})
    assert open_initial(config).path == run / "checkpoints" / checkpoint_name(4)


def test_a_resumed_run_goes_on_from_the_next_one(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    went_before_it_was_read(run, monkeypatch, "resume")
    config = tiny_run().model_copy(update={"resume": str(run)})
    start = find_start(config, tmp_path / "other" / "checkpoints", None)
    assert start.checkpoint == run / "checkpoints" / checkpoint_name(4)


def started_from(rank: int, world_size: int, run: Path, keep: bool) -> str:
    """The checkpoint that a new run starts from where its source goes on once rank 0 has looked."""
    ranks = of_rank(rank, world_size)
    config = tiny_run().model_copy(update={"init_from": run})
    if rank == 1:
        dist.barrier()
        go_on(run, 3, keep=keep)
    initial = open_initial(config)
    if rank == 0:
        dist.barrier()
    weights = with_agreed_weights(config, initial, ranks, lambda weights: weights)
    return f"{initial.path.name} {weights.path.name}"


@pytest.mark.parametrize("keep", [True, False])
def test_all_ranks_start_from_the_checkpoint_that_rank_0_has_found(run: Path, keep: bool) -> None:
    """Or from the next one, where that is gone before the others have looked into it."""
    old, new = checkpoint_name(3), checkpoint_name(4)
    chosen = old if keep else new
    assert run_ranks(started_from, 2, run, keep) == [f"{old} {chosen}", f"{new} {chosen}"]


def resumed_from(rank: int, world_size: int, run: Path, keep: bool) -> str:
    """The checkpoint that a run goes on from where the run that `resume` names goes on once rank 0 has looked."""
    root = run.parent / "source" / "tiny"

    def found(*given: Any) -> Start:
        if rank == 1:
            dist.barrier()
            go_on(root, 2, keep=keep)
        start = find_start(*given)
        if rank == 0:
            dist.barrier()
        return start

    ranks = start_ranks("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cosmos_scale.run.opening.find_start", found)
        opened = open_run(load_config(run, [f"resume={root}"]), ranks)
    with opened.held:
        assert opened.found_start.state is not None
        assert opened.found_start.checkpoint == root / "checkpoints" / checkpoint_name(opened.found_start.state.step)
        return opened.found_start.checkpoint.name


@pytest.mark.parametrize("keep", [True, False])
def test_all_ranks_resume_from_the_checkpoint_that_rank_0_has_found(
    tmp_path: Path, scenes: SceneShards, keep: bool
) -> None:
    """Or from the next one, where that is gone before the others have looked into it."""
    run = write_run(tmp_path, scenes)
    train_to_end(run, f"output={tmp_path / 'source'}", "train.max_steps=2").require(0)
    assert run_ranks(resumed_from, 2, run, keep) == [checkpoint_name(2 if keep else 3)] * 2


def built_from(rank: int, world_size: int, run: Path, cases: list[tuple[str, bool, bool]]) -> list[tuple[str, bool]]:
    """Build a run from another one that goes on as the last rank reads its tensors.

    cases: the key, whether it names a checkpoint, and whether the run goes on each time.
    Returns what the run starts from, or the refusal, and whether it has the weights of the checkpoint that is left.
    """
    enter, ranks, found = FragmentReader.__enter__, start_ranks("cpu"), []
    root = run.parent / "source" / "tiny"
    for key, is_named, each_time in cases:
        dist.barrier()
        source = newest(root / "checkpoints")
        assert source is not None

        def entered(self: FragmentReader, source: Path = source, each_time: bool = each_time) -> FragmentReader:
            if rank == world_size - 1 and (each_time or self.folder == source) and self.folder.exists():
                go_on(root, step_of(self.folder))
            return enter(self)

        config = load_config(run, [f"{key}={source if is_named else root}"])
        opened = open_run(config, ranks)
        with opened.held, pytest.MonkeyPatch.context() as patch:
            patch.setattr(FragmentReader, "__enter__", entered)
            try:
                pair, start, origin, _ = build_pair(config, opened, ranks)
            except UserError as refusal:
                found.append((str(refusal), False))
                continue
        weights = load_weights(source.with_name(checkpoint_name(step_of(source) + 1)), "student")
        same = [
            torch.equal(fragment.weight, weights[fragment.name].flatten()[fragment.start :][: len(fragment.weight)])
            for fragment in pair.student.fragments
        ]
        found.append((origin or str(start.checkpoint), len(same) > 10 and all(same)))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_ranks_take_the_next_one_where_tensors_are_gone(tmp_path: Path, scenes: SceneShards, ranks: int) -> None:
    run = write_run(tmp_path, scenes, zero={"stage": 1})
    train_to_end(run, f"output={tmp_path / 'source'}", "train.max_steps=2").require(0)
    cases = [(key, is_named, False) for key in ("init_from", "resume") for is_named in (False, True)]
    steps = range(2, 7 + MOST_TRIES)
    names = [str(tmp_path / "source" / "tiny" / "checkpoints" / checkpoint_name(step)) for step in steps]
    for found in run_ranks(built_from, ranks, run, [*cases, ("resume", False, True)]):
        taken, refused, went_on, not_resumed, at_no_end = found
        assert taken[0].startswith(f"{names[1]}: checkpoint of step 3 (")
        assert refused[0].startswith(f"init_from: checkpoint {names[1]}: deleted since it was found")
        assert went_on[0] == names[3]
        assert not_resumed[0].startswith(f"checkpoint {names[3]}: deleted since it was found")
        assert at_no_end[0].startswith(f"checkpoint {names[3 + MOST_TRIES]}: deleted since it was found")
        assert [same for _, same in found] == [True, False, True, False, False]


def test_nothing_is_said_where_nothing_went(run: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cosmos_scale.load(run, device="cpu").checkpoint.name == checkpoint_name(3)
