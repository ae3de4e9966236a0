"""Commands on a run that goes on: its newest checkpoint is deleted while it is read, or once it was read."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import cosmos_scale
from cosmos_scale.checkpoint.files import GoneCheckpoint
from cosmos_scale.checkpoint.initial import open_initial
from cosmos_scale.checkpoint.interchange.reading import of_newest
from cosmos_scale.checkpoint.resume import find_start
from cosmos_scale.checkpoint.state import MOST_TRIES, FragmentReader, Manifest, checkpoint_name, newest, read_manifest
from cosmos_scale.cli import main as cli
from cosmos_scale.cli.eval_command import of_one_checkpoint
from cosmos_scale.config import RetrievalConfig
from cosmos_scale.engine.contact import Contact
from cosmos_scale.engine.ranks import Ranks
from cosmos_scale.evaluation.evaluator import Encoder, no_report
from cosmos_scale.report import run_pictures
from cosmos_scale.report.records import RunRecords, SavedCheckpoint
from cosmos_scale.run.start import main_ranks_weights
from cosmos_scale.testing.ranks import run_ranks
from tests.checkpoint.edit import content_of, rewrite
from tests.evaluation.labelled import ANIMALS, tiny_run, write_folders
from tests.inference.conftest import write_checkpoint


def go_on(run: Path, step: int, *, keep: bool = False) -> None:
    """Save the checkpoint of the next step, and delete that of this one, or keep it."""
    old, new = (run / "checkpoints" / checkpoint_name(number) for number in (step, step + 1))
    shutil.copytree(old, new)
    content = content_of(new)
    content["state"]["step"] = step + 1
    rewrite(new, content)
    if not keep:
        shutil.rmtree(old)


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


def taken(rank: int, world_size: int, run: Path) -> tuple[str, str]:
    """What each rank takes where rank 1 alone comes too late for the checkpoint of step 3."""
    assert dist.group.WORLD is not None
    ranks = Ranks(rank, world_size, torch.device("cpu"), dist.group.WORLD, Contact(rank, {}))

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


def started_from(rank: int, world_size: int, run: Path) -> str:
    """The checkpoint that a new run starts from where its source goes on once rank 0 has looked."""
    assert dist.group.WORLD is not None
    ranks = Ranks(rank, world_size, torch.device("cpu"), dist.group.WORLD, Contact(rank, {}))
    config = tiny_run().model_copy(update={"init_from": run})
    if rank == 1:
        dist.barrier()
        go_on(run, 3, keep=True)
    initial = open_initial(config)
    if rank == 0:
        dist.barrier()
    weights = main_ranks_weights(config, initial, ranks)
    assert weights is not None
    return f"{initial.path.name} {weights.path.name}"


def test_all_ranks_start_from_the_checkpoint_that_rank_0_has_found(run: Path) -> None:
    old, new = checkpoint_name(3), checkpoint_name(4)
    assert run_ranks(started_from, 2, run) == [f"{old} {old}", f"{new} {old}"]


def test_nothing_is_said_where_nothing_went(run: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cosmos_scale.load(run, device="cpu").checkpoint.name == checkpoint_name(3)
