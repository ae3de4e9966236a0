"""The frame: every kind has its class, what is wrong with its data shows when it is made, and ranks fail together."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from cosmos_scale.config import EvaluatorConfig, RunConfig
from cosmos_scale.config.evaluation import AnyEvaluatorConfig
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.evaluator import Encoder, Evaluator, Gather, Numbers, Setting, measure, one_process
from cosmos_scale.evaluation.kinds import KINDS, make_evaluator
from cosmos_scale.evaluation.retrieval import Retrieval
from cosmos_scale.evaluation.together import EvaluationFailed, measure_together
from cosmos_scale.model import vision
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.testing.shard_files import write_shards
from tests.evaluation.thread_ranks import in_threads

CPU = torch.device("cpu")


def config(folder: Path, captions: str = "raw_caption", max_pixels: int = 10**6) -> RunConfig:
    vision_tower = {"width": 64, "layers": 1, "image_size": 16, "patch_size": 8}
    text = {"width": 64, "layers": 1, "heads": 1, "context_length": 16}
    return RunConfig.model_validate(
        {
            "model": {"vision": vision_tower, "text": text, "embed_dim": 64, "pooler_heads": 1},
            "data": {"max_pixels": max_pixels, "remote": {"retries": 0}},
            "eval": [{"kind": "retrieval", "shards": str(folder), "captions": captions}],
        }
    )


def encoder_of(run: RunConfig, rank: int = 0, world_size: int = 1) -> Encoder:
    model = CosmosModel(run.model)
    model.init_weights(torch.Generator().manual_seed(0))
    return Encoder(model, Setting.of_run(run, rank, world_size, CPU))


def test_every_kind_of_the_config_has_a_class() -> None:
    kinds = get_args(AnyEvaluatorConfig) or (AnyEvaluatorConfig,)
    assert set(KINDS) == set(kinds)


def test_a_batch_is_encoded_in_passes_that_fit_a_cpus_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(config(tmp_path))
    tower = encoder.model.visual
    images = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    passes: list[int] = []
    with torch.no_grad():
        whole = encoder.images(images)
        monkeypatch.setattr(vision, "_PASS_BYTES", 3 * 5 * 4 * 64 * 4)  # three crops of 5 tokens, 4 x 64 numbers each
        tower.register_forward_pre_hook(lambda _, arguments: passes.append(len(arguments[0][0])))
        torch.testing.assert_close(encoder.images(images), whole, atol=1e-6, rtol=0)
        assert encoder.images(images[:0]).shape == (0, 64)
    assert passes == [3, 3, 1, 0]
    assert tower.crops_a_pass(images[:4]) == 2  # and not three and a single one
    assert tower.crops_a_pass(images.expand(7, 3, 16, 16).repeat(1, 1, 8, 8)) == 1
    assert tower.crops_a_pass(images.to("meta")) == 7


@pytest.mark.parametrize("rank", [0, 3])  # three samples: rank 3 of 4 has some to do, rank 0 none
def test_a_wrong_key_is_found_at_the_start_on_every_rank(tmp_path: Path, rank: int) -> None:
    run = config(write_shards(tmp_path, [3]), captions="raw_captoin")
    with pytest.raises(
        UserError, match=r"no captions under 'raw_captoin'; its keys are raw_caption; no other of 3 samples"
    ):
        make_evaluator(run.eval[0], Setting.of_run(run, rank, 4, CPU))


def test_pictures_past_the_runs_max_pixels_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(write_shards(tmp_path, [3]), max_pixels=100)
    encoder = encoder_of(run)
    evaluator = make_evaluator(run.eval[0], encoder.setting)
    with pytest.raises(UserError, match=f"^{tmp_path}: retrieval needs at least one image with a text$"):
        measure(evaluator, encoder)
    with pytest.raises(EvaluationFailed, match=f"^{tmp_path}: retrieval needs at least one image with a text$"):
        measure_together(evaluator, encoder, lambda tensor: tensor, None)
    assert capsys.readouterr().err.count("more than max_pixels 100") == 3  # once, though read twice


def test_a_lost_shard_fails_one_measurement_and_the_next_one_sees_the_shard_again(tmp_path: Path) -> None:
    run = config(write_shards(tmp_path, [3]))
    encoder = encoder_of(run)
    evaluator = make_evaluator(run.eval[0], encoder.setting)
    before = measure(evaluator, encoder)
    (tmp_path / "00000.tar").rename(tmp_path / "away")
    with pytest.raises(UserError, match="shard of source retrieval cannot be opened any more: No such file"):
        measure(evaluator, encoder)
    (tmp_path / "away").rename(tmp_path / "00000.tar")
    assert measure(evaluator, encoder) == before


class Rehearsed(Evaluator):
    """Gathers its rank three times in a row, with something that a test does before each gather and after the last."""

    def __init__(self, setting: Setting, act: Callable[[int, int], None]) -> None:
        super().__init__(EvaluatorConfig(kind="rehearsed", name="rehearsed"), setting)
        self.act = act

    def measure(self, encoder: Encoder, gather: Gather, folder: Path | None) -> Iterator[tuple[str, float]]:
        for place in range(3):
            self.act(self.setting.rank, place)
            yield f"sum{place}", gather(torch.tensor([self.setting.rank])).sum().item()
        self.act(self.setting.rank, 3)
        if folder is not None:
            folder.mkdir(parents=True)
            (folder / "note.txt").write_text("seen")


Outcome = Numbers | Exception


def together(
    run: RunConfig,
    world_size: int,
    act: Callable[[int, int], None],
    *,
    measures: Callable[..., Numbers] = measure_together,
) -> list[list[Outcome]]:
    """Two measurements of each rank, in threads; a gather in which a rank is missing ends the test, not a hang."""

    def run_rank(rank: int, gather: Gather) -> list[Outcome]:
        encoder = encoder_of(run, rank, world_size)
        evaluator = Rehearsed(encoder.setting, act)
        outcomes: list[Outcome] = []
        for _ in range(2):
            try:
                outcomes.append(measures(evaluator, encoder, gather, None))
            except Exception as error:
                outcomes.append(error)
        return outcomes

    return in_threads(world_size, run_rank)


class Once:
    """Raises the first time that a rank comes to a place."""

    def __init__(self, where: set[tuple[int, int]], error: type[Exception] = UserError) -> None:
        self.where, self.error = set(where), error

    def __call__(self, rank: int, place: int) -> None:
        if (rank, place) in self.where:
            self.where.discard((rank, place))
            raise self.error(f"broke at {place}, token https://me:secret@host/x")


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("failing", [{0}, {2}, {1, 2}])
def test_what_fails_on_some_ranks_fails_on_all_and_the_next_time_all_measure(
    tmp_path: Path, place: int, failing: set[int]
) -> None:
    outcomes = together(config(tmp_path), 3, Once({(rank, place) for rank in failing}))
    for first, second in outcomes:
        assert isinstance(first, EvaluationFailed)
        assert str(first) == f"broke at {place}, token https://***@host/x (rank {min(failing)})"
        assert second == {"sum0": 3, "sum1": 3, "sum2": 3}


def test_ranks_that_fail_at_different_places_agree_on_the_first(tmp_path: Path) -> None:
    for first, second in together(config(tmp_path), 3, Once({(0, 2), (1, 1)})):
        assert str(first) == "broke at 1, token https://***@host/x (rank 1)"
        # Rank 0 had stopped before it came to its own failure, which is still to come.
        assert str(second) == "broke at 2, token https://***@host/x (rank 0)"


def test_an_error_of_the_program_is_named_with_its_traceback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ((first, second),) = together(config(tmp_path), 1, Once({(0, 1)}, ZeroDivisionError))
    assert str(first) == "ZeroDivisionError: broke at 1, token https://***@host/x"
    assert isinstance(second, dict)
    assert "Traceback" in caplog.text


def test_ranks_that_do_not_gather_the_same_fail_instead_of_waiting(tmp_path: Path) -> None:
    class Uneven(Rehearsed):
        def measure(self, encoder: Encoder, gather: Gather, folder: Path | None) -> Iterator[tuple[str, float]]:
            if self.setting.rank:
                gather(torch.zeros(2))
            yield "one", 1.0

    class OtherShapes(Rehearsed):
        def measure(self, encoder: Encoder, gather: Gather, folder: Path | None) -> Iterator[tuple[str, float]]:
            yield "one", gather(torch.zeros(1 + self.setting.rank)).sum().item()

    for kind in (Uneven, OtherShapes):

        def measures(evaluator: Rehearsed, *others: object, kind: type[Rehearsed] = kind) -> Numbers:
            return measure_together(kind(evaluator.setting, evaluator.act), *others)  # type: ignore[arg-type]

        for outcome in together(config(tmp_path), 2, Once(set()), measures=measures):
            assert [str(error) for error in outcome] == [
                "the ranks do not gather the same, which is an error of this program"
            ] * 2


def test_a_broken_gather_is_no_failed_evaluation(tmp_path: Path) -> None:
    def gather(tensor: Tensor) -> Tensor:
        raise RuntimeError("Connection reset by peer")

    encoder = encoder_of(config(tmp_path))
    with pytest.raises(RuntimeError, match="Connection reset"):
        measure_together(Rehearsed(encoder.setting, Once(set())), encoder, gather, None)


def test_an_evaluator_leaves_files_and_has_a_table(tmp_path: Path) -> None:
    encoder = encoder_of(config(tmp_path))
    evaluator = Rehearsed(encoder.setting, Once(set()))
    numbers = measure(evaluator, encoder, folder=tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "note.txt").read_text() == "seen"
    table = evaluator.table({"student": numbers, "teacher": numbers}, "a title")
    assert [column.header for column in table.columns] == ["", "student", "teacher"]
    assert list(table.columns[0].cells) == ["sum0", "sum1", "sum2"]


class Odd(Evaluator):
    """Yields one value of any kind."""

    def __init__(self, setting: Setting, value: Any) -> None:
        super().__init__(EvaluatorConfig(kind="odd", name="odd"), setting)
        self.value = value

    def measure(self, encoder: Encoder, gather: Gather, folder: Path | None) -> Iterator[tuple[str, float]]:
        yield "value", self.value


def test_numbers_are_plain_numbers_and_other_values_fail_the_evaluation(tmp_path: Path) -> None:
    encoder = encoder_of(config(tmp_path))
    numbers = measure(Odd(encoder.setting, torch.tensor(0.5)), encoder)
    assert [(value, type(value)) for value in numbers.values()] == [(0.5, float)]
    with pytest.raises(EvaluationFailed, match="TypeError"):
        measure_together(Odd(encoder.setting, None), encoder, one_process, None)


def test_retrieval_shows_percents_and_chance(tmp_path: Path) -> None:
    run = config(write_shards(tmp_path, [4]))
    encoder = encoder_of(run)
    evaluator = make_evaluator(run.eval[0], encoder.setting)
    assert isinstance(evaluator, Retrieval)
    numbers = measure(evaluator, encoder)
    table = evaluator.table({"student": numbers}, "a title")
    assert table.caption == "4 pictures, 16 captions; chance R@1: 25.00 %"
    assert list(table.columns[1].cells) == ["image to text", "text to image"]
    recalls = [numbers["image_to_text_R@10"], numbers["text_to_image_R@10"]]
    assert list(table.columns[4].cells) == [f"{100 * recall:.2f} %" for recall in recalls]


def test_ranks_with_different_galleries_all_fail_and_name_the_rank(tmp_path: Path) -> None:
    """A run that resumes without its gallery opens it here, after the comparison at its start."""
    for host, counts in (("a", [3]), ("b", [3]), ("c", [4])):
        write_shards(tmp_path / host, counts)

    def measures_on(*hosts: str) -> Callable[..., Numbers]:
        def measures(evaluator: Rehearsed, *others: Any) -> Numbers:
            section = config(tmp_path / hosts[evaluator.setting.rank]).eval[0]
            return measure_together(make_evaluator(section, evaluator.setting), *others)

        return measures

    run = config(tmp_path / "a")
    copies = together(run, 3, Once(set()), measures=measures_on("a", "b", "a"))
    assert copies == [[copies[0][0]] * 2] * 3
    assert isinstance(copies[0][0], dict)
    for outcome in together(run, 3, Once(set()), measures=measures_on("a", "b", "c")):
        for failure in outcome:
            assert isinstance(failure, EvaluationFailed)
            assert re.fullmatch(
                r"eval\.retrieval: ranks see different data \(rank 0: digest \w{15}, rank 2: digest \w{15}\); "
                r"rule: every host has the same gallery, so copy its shards along with their index \(rank 0\)",
                str(failure),
            )
