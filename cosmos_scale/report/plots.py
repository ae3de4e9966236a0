"""Which pictures of curves a report has, and what each shows."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cosmos_scale.report.records import Record, RunRecords, number_of
from cosmos_scale.report.series import Curve, curve_of, skipped_steps
from cosmos_scale.run.logged import evaluator_of

MOST_POINTS = 300  # of a curve: about one for each pixel of a picture's width
POINTS_OF_ALL = 900  # of one curve of all runs together: many runs stay a small page
CENT = 100.0
MODELS = ("student", "teacher")
RETRIEVAL = {"image_to_text_R@1": "image to text", "text_to_image_R@1": "text to image"}
# The numbers of an evaluation that are drawn, and what stands above them.
HEADLINES = {**{key: f"R@1, {way}" for key, way in RETRIEVAL.items()}, "top1": "top-1", "mIoU": "mIoU"}


class RunCurves(NamedTuple):
    """What one run adds to a picture. band: the lower and upper edge of a filled span. resumed, skipped: steps."""

    curves: Sequence[Curve]
    band: tuple[Curve, Curve] | None = None
    resumed: Sequence[int] = ()
    skipped: Sequence[int] = ()

    @property
    def drawn(self) -> bool:
        """Whether there is anything to see."""
        return any(curve.points for curve in (*self.curves, *(self.band or ())))


class Plot(NamedTuple):
    """A picture. name: in the page. unit: of the values, "" for none. from_zero: the axis begins at 0 at the latest."""

    name: str
    title: str
    unit: str
    runs: Sequence[RunCurves]
    logarithmic: bool = False
    from_zero: bool = False
    note: str = ""


class _Wanted(NamedTuple):
    """A picture of training records, by their keys. spread: keys of the least and greatest value over the ranks."""

    name: str
    title: str
    keys: dict[str, str]
    unit: str = ""
    scale: float = 1.0
    spread: tuple[str, str] | None = None
    logarithmic: bool = False
    from_zero: bool = False
    note: str = ""


_CURVES = (
    _Wanted("loss", "Loss", {"loss": "loss"}),
    _Wanted("clip", "CLIP loss", {"clip": "CLIP loss"}),
    _Wanted("distill", "Distillation loss", {"distill": "distillation loss"}),
    _Wanted("grad-norm", "Gradient norm", {"grad_norm": "gradient norm"}, logarithmic=True),
    _Wanted("scales", "Logit scales", {"scale": "CLIP", "distill_scale": "distillation"}),
    _Wanted("lr", "Learning rate", {"lr": "learning rate"}, from_zero=True),
    _Wanted("momentum", "Momentum of the teacher", {"momentum": "momentum"}),
)
_SPEED = (
    _Wanted("samples-per-second", "Samples a second", {"samples_per_second": "samples/s"}, from_zero=True),
    _Wanted(
        "samples-per-second-per-rank",
        "Samples a second and rank",
        {"samples_per_second_per_rank": "samples/s"},
        from_zero=True,
    ),
    _Wanted(
        "tflops",
        "TFLOP/s of a rank",
        {"tflops_per_rank": "needed", "executed_tflops_per_rank": "executed"},
        from_zero=True,
    ),
    _Wanted("mfu", "Use of the chip's peak", {"mfu": "MFU", "hfu": "HFU"}, unit="%", scale=CENT, from_zero=True),
    _Wanted("goodput", "Goodput since the first start", {"goodput": "goodput"}, unit="%", scale=CENT, from_zero=True),
    _Wanted(
        "step-seconds",
        "Time of a step",
        {"step_seconds_max": "slowest rank"},
        unit="s",
        spread=("step_seconds_min", "step_seconds_max"),
        from_zero=True,
    ),
    _Wanted(
        "data-wait",
        "Wait for data in a step",
        {"data_wait_max": "longest wait"},
        unit="s",
        spread=("data_wait_min", "data_wait_max"),
        from_zero=True,
        note="The span is from the rank that waited least to the rank that waited longest.",
    ),
)
_MEMORY = (_Wanted("peak-memory", "Peak memory of a rank", {"peak_memory_gib": "peak"}, unit="GiB", from_zero=True),)


def curve_plots(runs: Sequence[RunRecords]) -> list[Plot]:
    """The losses, scales and schedules of some runs, with their resumes and skipped steps; then their evaluations."""
    return [*_plots(runs, _CURVES, marked=True), *_evaluation_plots(runs)]


def speed_plots(runs: Sequence[RunRecords]) -> list[Plot]:
    """Speed, and what each step waits for."""
    return _plots(runs, _SPEED)


def memory_plots(runs: Sequence[RunRecords]) -> list[Plot]:
    """Peak memory over the steps."""
    return _plots(runs, _MEMORY)


def _plots(runs: Sequence[RunRecords], wanted: Sequence[_Wanted], *, marked: bool = False) -> list[Plot]:
    most = max(20, min(MOST_POINTS, POINTS_OF_ALL // len(runs)))
    found = []
    for one in wanted:
        curves = [_of_run(run, one, most, marked=marked) for run in runs]
        if any(run.drawn for run in curves):
            found.append(Plot(one.name, one.title, one.unit, curves, one.logarithmic, one.from_zero, one.note))
    return found


def _of_run(run: RunRecords, wanted: _Wanted, most: int, *, marked: bool) -> RunCurves:
    def curve(key: str, label: str, dashed: bool = False) -> Curve:
        return curve_of(run, run.train, key, label, most, scale=wanted.scale, dashed=dashed)

    curves = [curve(key, label, place > 0) for place, (key, label) in enumerate(wanted.keys.items())]
    band = None
    if wanted.spread is not None:
        # Both edges at the same records: thinned alike only where every record is kept.
        step = -(-len(run.train) // most) or 1
        low, high = (curve_of(run, run.train[::step], key, key, most, scale=wanted.scale) for key in wanted.spread)
        band = (low, high) if len(low.points) == len(high.points) else None
    if not marked:
        return RunCurves([one for one in curves if one.points], band)
    resumed = [int(record["step"]) for record in run.starts if record["step"] > 0]
    return RunCurves([one for one in curves if one.points], band, resumed, skipped_steps(run))


def evaluator_names(runs: Sequence[RunRecords]) -> list[str]:
    """Return the names of the evaluators that have records in some runs."""
    return list(dict.fromkeys(evaluator_of(record) for run in runs for record in run.evaluations))


def numbers_of_models(record: Record) -> dict[str, dict[str, float]]:
    """Return the numbers of an evaluation's record by model and name, whatever stands before the model."""
    found: dict[str, dict[str, float]] = {}
    for key in record:
        parts = key.rsplit("/", 2)
        number = number_of(record, key)
        if len(parts) > 1 and parts[-2] in MODELS and number is not None:
            found.setdefault(parts[-2], {})[parts[-1]] = number
    return found


def _evaluation_plots(runs: Sequence[RunRecords]) -> Iterator[Plot]:
    for name in evaluator_names(runs):
        for key, title in HEADLINES.items():
            curves = [RunCurves(list(_of_evaluator(run, name, key))) for run in runs]
            if any(run.drawn for run in curves):
                safe = "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in f"{name}-{key}")
                yield Plot(f"eval-{safe}", f"{name}: {title}", "%", curves, from_zero=True)


def _of_evaluator(run: RunRecords, name: str, key: str) -> Iterator[Curve]:
    records = [record for record in run.evaluations if evaluator_of(record) == name]
    for model in MODELS:
        values = [
            {"step": record["step"], "time": record.get("time"), key: numbers_of_models(record).get(model, {}).get(key)}
            for record in records
        ]
        found = curve_of(run, values, key, model, MOST_POINTS, scale=CENT, dashed=model == MODELS[1])
        if found.points:
            yield found._replace(key=f"{model}-{found.key}")
