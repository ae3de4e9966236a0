"""What of the report needs the data or the newest checkpoint of a run, for each of its runs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeVar

from cosmos_scale.checkpoint.files import GoneCheckpoint
from cosmos_scale.checkpoint.interchange.reading import of_newest
from cosmos_scale.config import RetrievalConfig
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.evaluator import Encoder, Report
from cosmos_scale.evaluation.loading import load_encoder
from cosmos_scale.report.data_part import SeenSample, caption_lengths_of, seen_samples
from cosmos_scale.report.evaluation_part import AttentionMap, LeftPictures, attention_of, pictures_left
from cosmos_scale.report.figures import Drawn
from cosmos_scale.report.records import RunRecords
from cosmos_scale.report.retrieval_part import Retrieved, retrieve

Device = Literal["auto", "cpu", "cuda"]
Made = TypeVar("Made")


class MostShown(NamedTuple):
    """How many pictures of each kind a run has on the page at most."""

    samples: int
    queries: int
    worst: int
    maps: int
    left: int


SIZES = (
    MostShown(samples=4, queries=5, worst=8, maps=4, left=6),
    MostShown(samples=3, queries=4, worst=6, maps=3, left=4),
    MostShown(samples=2, queries=3, worst=4, maps=2, left=3),
    MostShown(samples=1, queries=2, worst=3, maps=1, left=2),
    MostShown(samples=1, queries=1, worst=1, maps=1, left=0),
    MostShown(samples=0, queries=0, worst=0, maps=0, left=0),
)
"""From all that is made to nothing: the page takes the first of them with which it is small enough."""


class SeenData(NamedTuple):
    """What the towers of some runs see, the same for all of them. runs: by their places."""

    runs: Sequence[int]
    samples: Sequence[SeenSample]
    lengths: Drawn | None


class RunPictures(NamedTuple):
    """What a run's newest checkpoint finds and looks at, and the pictures that its evaluators have left."""

    run: int
    retrieved: Retrieved | None
    maps: Sequence[AttentionMap]
    left: Sequence[LeftPictures]


class AllPictures(NamedTuple):
    """The pictures of all runs, in their order."""

    data: Sequence[SeenData]
    found: Sequence[RunPictures]

    def at_most(self, most: MostShown) -> "AllPictures":
        """Return the same with fewer pictures of each kind."""
        data = [seen._replace(samples=seen.samples[: most.samples]) for seen in self.data]
        return AllPictures(data, [_fewer(one, most) for one in self.found])

    @property
    def any_found(self) -> bool:
        """Whether there is anything of evaluation to show."""
        return any(one.retrieved or one.maps or one.left for one in self.found)


def _fewer(one: RunPictures, most: MostShown) -> RunPictures:
    retrieved = one.retrieved
    if retrieved is not None:
        retrieved = retrieved._replace(
            captions=retrieved.captions[: most.queries],
            pictures=retrieved.pictures[: most.queries],
            worst=retrieved.worst[: most.worst],
        )
        if not most.queries:
            retrieved = None
    left = [group._replace(pictures=group.pictures[: most.left]) for group in one.left] if most.left else []
    return one._replace(retrieved=retrieved, maps=one.maps[: most.maps], left=left)


def pictures_of(
    runs: Sequence[RunRecords], device: Device, report: Report, notes: list[str], *, made: bool
) -> AllPictures:
    """Make the pictures of all runs; notes say what could not be made.

    made: whether to make what needs the data or a checkpoint; else only what evaluators have left is there.
    """
    data: list[SeenData] = []
    found = []
    for place, run in enumerate(runs):
        retrieved: Retrieved | None = None
        maps: list[AttentionMap] = []
        if made:
            _add_data(data, run, place, report, notes)
            retrieved, maps = _evaluated(run, device, report, notes)
        found.append(RunPictures(place, retrieved, maps, pictures_left(run)))
    return AllPictures(data, found)


def _add_data(data: list[SeenData], run: RunRecords, place: int, report: Report, notes: list[str]) -> None:
    """Add what a run's towers see, or the run to those that see the same."""
    config = run.config
    if config is None or not config.data.sources:
        return
    report("data", 0, 2)
    samples = _made(run, "samples", lambda: seen_samples(config), notes) or []
    report("data", 1, 2)
    lengths = _made(run, "lengths of captions", lambda: caption_lengths_of(config, f"caption-lengths-{place}"), notes)
    report("data", 2, 2)
    for number, seen in enumerate(data):
        if seen.samples == samples and _words(seen.lengths) == _words(lengths):
            data[number] = seen._replace(runs=[*seen.runs, place])
            return
    if samples or lengths:
        data.append(SeenData([place], samples, lengths))


def _words(figure: Drawn | None) -> tuple[str, str] | None:
    """What a figure says: its picture has a name of its own."""
    return None if figure is None else (figure.said, figure.note)


def _evaluated(
    run: RunRecords, device: Device, report: Report, notes: list[str]
) -> tuple[Retrieved | None, list[AttentionMap]]:
    sections = run.config.eval if run.config else ()
    section = next((one for one in sections if isinstance(one, RetrievalConfig)), None)
    if section is None or not run.saved:
        return None, []
    newest = run.saved[-1].folder

    def load() -> Encoder:
        try:
            return load_encoder(newest, "student", device)
        except GoneCheckpoint:  # its run goes on
            read = partial(load_encoder, which="student", device=device)
            encoder = of_newest(newest.parent, read, lambda said: None)
            notes.append(f"{run.label}: retrieval and attention are of a later checkpoint than {newest.name}.")
            return encoder

    encoder = _made(run, "retrieval and attention", load, notes)
    if encoder is None:
        return None, []
    retrieved = _made(run, "retrieval", lambda: retrieve(section, encoder, report), notes)
    maps = _made(run, "attention maps", lambda: attention_of(section, encoder, report), notes) or []
    return retrieved, maps


def _made(run: RunRecords, what: str, make: Callable[[], Made], notes: list[str]) -> Made | None:
    try:
        return make()
    except UserError as error:
        notes.append(f"{run.label}: {what} left out: {error}.")
    except Exception as error:  # of any type, of what a run of other code has left: the report opens without it
        notes.append(f"{run.label}: {what} left out: {type(error).__name__}: {error}.")
    return None
