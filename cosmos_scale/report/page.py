"""The page: what is known of some runs, put together into one file of HTML."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from cosmos_scale import __version__
from cosmos_scale.config import RetrievalConfig
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.evaluator import Report, no_report
from cosmos_scale.evaluation.loading import load_encoder
from cosmos_scale.files import replace_file
from cosmos_scale.report.code import note_on_code
from cosmos_scale.report.data_part import caption_lengths_of, seen_samples, substitutes_of, waits_by_rank
from cosmos_scale.report.evaluation_part import attention_of, evaluator_tables, of_all_sets, pictures_left
from cosmos_scale.report.figures import AXES, Drawn, draw_plot
from cosmos_scale.report.final_numbers import final_numbers
from cosmos_scale.report.head import head_of, moment
from cosmos_scale.report.plan_part import add_plans
from cosmos_scale.report.plots import Plot, curve_plots, memory_plots, speed_plots
from cosmos_scale.report.profile_part import profiles_of
from cosmos_scale.report.records import RunRecords, read_runs
from cosmos_scale.report.retrieval_part import retrieve
from cosmos_scale.report.settings import between_runs, from_base, yaml_of
from cosmos_scale.report.timeline import events_of, shortened

MOST_RUNS = 8  # the page has so many colours
Device = Literal["auto", "cpu", "cuda"]
Made = TypeVar("Made")


def write_report(
    folders: Sequence[Path], out: Path, *, pictures: bool = True, device: Device = "auto", report: Report = no_report
) -> list[str]:
    """Write the report of some runs; returns sentences on what the page lacks.

    pictures: whether to draw what needs the data and a checkpoint of the first run, which takes seconds. report: told
    of long work. Raises UserError where a folder is no run, or the page cannot be written.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    if len(unique) > MOST_RUNS:
        raise UserError(f"{len(unique)} runs; rule: at most {MOST_RUNS} on one page")
    runs = read_runs(unique)
    notes = [f"{run.label}: {note}" for run in runs for note in (*run.notes, note_on_code(run)) if note]
    parts: dict[str, Any] = {"samples": [], "lengths": None, "retrieved": None, "maps": []}
    if pictures:
        parts |= _pictures(runs[0], device, report, notes)
    profiled = profiles_of(runs, notes)
    add_plans(profiled, runs, notes)
    parts["profiled"] = profiled
    parts["all_sets"] = [table for run in runs for table in of_all_sets(run, notes)]
    replace_file(out, _page(runs, parts, notes).encode(errors="replace"))
    return notes


def _pictures(run: RunRecords, device: Device, report: Report, notes: list[str]) -> dict[str, Any]:
    """Make all that needs the data or a checkpoint; notes say what could not be made."""
    config = run.config
    if config is None:
        return {}

    def made(what: str, make: Callable[[], Made]) -> Made | None:
        try:
            return make()
        except UserError as error:
            notes.append(f"{run.label}: {what} left out: {error}.")
        except Exception as error:  # of any type, of what a run of other code has left: the report opens without it
            notes.append(f"{run.label}: {what} left out: {type(error).__name__}: {error}.")
        return None

    found: dict[str, Any] = {}
    if config.data.sources:
        report("data", 0, 2)
        found["samples"] = made("samples", lambda: seen_samples(config)) or []
        report("data", 1, 2)
        found["lengths"] = made("lengths of captions", lambda: caption_lengths_of(config))
        report("data", 2, 2)
    section = next((one for one in config.eval if isinstance(one, RetrievalConfig)), None)
    if section is not None and run.saved:
        newest = run.saved[-1].folder
        encoder = made("retrieval and attention", lambda: load_encoder(newest, "student", device))
        if encoder is not None:
            found["retrieved"] = made("retrieval", lambda: retrieve(section, encoder, report))
            found["maps"] = made("attention maps", lambda: attention_of(section, encoder, report)) or []
    return found


def _page(runs: Sequence[RunRecords], parts: dict[str, Any], notes: Sequence[str]) -> str:
    batches = [run.global_batch for run in runs]

    def drawn(plots: Sequence[Plot]) -> list[Drawn]:
        return [draw_plot(plot, batches) for plot in plots]

    first, alone = runs[0], len(runs) == 1
    curves, speed, memory = drawn(curve_plots(runs)), drawn(speed_plots(runs)), drawn(memory_plots(runs))
    waits = waits_by_rank(first) if alone else None
    tables = [(run.label, evaluator_tables(run)) for run in runs]
    events = [shortened(events_of(run)) for run in runs]
    differences = [one for one in (between_runs(runs), *map(from_base, runs)) if one is not None]
    environment = Environment(
        loader=PackageLoader("cosmos_scale.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["moment"] = moment
    plots = {one.name: one.data for one in (*curves, *speed, *memory) if one.data}
    return environment.get_template("report.html").render(
        title=", ".join(run.label for run in runs),
        version=__version__,
        runs=runs,
        heads=[head_of(run) for run in runs],
        notes=notes,
        axes=[axis for axis in AXES if any(axis in one.svgs for one in (*curves, *speed))],
        curves=curves,
        final=[one for one in [final_numbers(runs)] if one],
        speed=[*speed, *([waits] if waits else [])],
        memory=memory,
        substitutes=[(run.label, said) for run in runs if (said := substitutes_of(run))],
        tables=tables,
        has_tables=any(found for _, found in tables),
        left=[] if not alone else pictures_left(first),
        differences=differences,
        yamls=[(run.label, text) for run in runs if (text := yaml_of(run))],
        events=events,
        page={"plots": plots, "batches": batches, "runs": [run.label for run in runs]},
        **parts,
    )
