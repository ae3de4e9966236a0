"""The page: what is known of some runs, put together into one file of HTML."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cosmos_scale import __version__
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.evaluator import Report, no_report
from cosmos_scale.files import replace_file
from cosmos_scale.report.code import note_on_code
from cosmos_scale.report.data_part import substitutes_of, waits_by_rank
from cosmos_scale.report.evaluation_part import evaluator_tables, of_all_sets
from cosmos_scale.report.figures import AXES, Drawn, draw_plot
from cosmos_scale.report.final_numbers import final_numbers
from cosmos_scale.report.head import head_of, moment
from cosmos_scale.report.plan_part import add_plans
from cosmos_scale.report.plots import Plot, curve_plots, memory_plots, speed_plots
from cosmos_scale.report.profile_part import profiles_of
from cosmos_scale.report.records import RunRecords, read_runs
from cosmos_scale.report.run_pictures import SIZES, AllPictures, Device, pictures_of
from cosmos_scale.report.settings import between_runs, from_base, yaml_of
from cosmos_scale.report.timeline import events_of, shortened

MOST_RUNS = 8  # the page has so many colours
MOST_BYTES = 3e6
SIGN = b"- cosmos-scale</title>"  # in the head of every page


def write_report(
    folders: Sequence[Path], out: Path, *, pictures: bool = True, device: Device = "auto", report: Report = no_report
) -> list[str]:
    """Write the report of some runs; returns sentences on what the page lacks.

    pictures: whether to draw what needs the data and the checkpoints, which takes seconds a run. report: told of long
    work. Raises UserError where a folder is no run, or the page cannot be written.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    if len(unique) > MOST_RUNS:
        raise UserError(f"{len(unique)} runs; rule: at most {MOST_RUNS} on one page")
    runs = read_runs(unique)
    notes = [f"{run.label}: {note}" for run in runs for note in (*run.notes, note_on_code(run)) if note]
    all_pictures = pictures_of(runs, device, report, notes, made=pictures)
    profiled = profiles_of(runs, notes)
    add_plans(profiled, runs, notes)
    parts = {"profiled": profiled, "all_sets": [table for run in runs for table in of_all_sets(run, notes)]}
    replace_file(out, _small_page(runs, parts, all_pictures, notes))
    return notes


def _small_page(runs: Sequence[RunRecords], parts: Mapping[str, Any], pictures: AllPictures, notes: list[str]) -> bytes:
    """Return the page with as many pictures as keep it small; notes say where these are not all."""
    facts = {**_facts(runs), **parts, "notes": notes}
    page = b""
    for most in SIZES:
        shown = pictures.at_most(most)
        page = _rendered({**facts, "data": shown.data, "found": shown.found, "any_found": shown.any_found})
        if len(page) <= MOST_BYTES:
            break
        if most is SIZES[0]:
            notes.append(f"Fewer pictures of each run are shown, so that the page stays under {MOST_BYTES / 1e6:g} MB.")
    return page


def _facts(runs: Sequence[RunRecords]) -> dict[str, Any]:
    """Return what the template shows of the runs without their pictures, by its names."""
    batches = [run.global_batch for run in runs]

    def drawn(plots: Sequence[Plot]) -> list[Drawn]:
        return [draw_plot(plot, batches) for plot in plots]

    curves, speed, memory = drawn(curve_plots(runs)), drawn(speed_plots(runs)), drawn(memory_plots(runs))
    waits = [
        drawn_waits
        for place, run in enumerate(runs)
        if (drawn_waits := waits_by_rank(run, place, f"{run.label}: " if len(runs) > 1 else ""))
    ]
    tables = [(run.label, evaluator_tables(run)) for run in runs]
    events = [shortened(events_of(run)) for run in runs]
    differences = [one for one in (between_runs(runs), *map(from_base, runs)) if one is not None]
    plots = {one.name: one.data for one in (*curves, *speed, *memory) if one.data}
    return {
        "title": ", ".join(run.label for run in runs),
        "version": __version__,
        "runs": runs,
        "heads": [head_of(run) for run in runs],
        "axes": [axis for axis in AXES if any(axis in one.svgs for one in (*curves, *speed))],
        "curves": curves,
        "final": [one for one in [final_numbers(runs)] if one],
        "speed": [*speed, *waits],
        "memory": memory,
        "substitutes": [(run.label, said) for run in runs if (said := substitutes_of(run))],
        "tables": tables,
        "has_tables": any(found for _, found in tables),
        "differences": differences,
        "yamls": [(run.label, text) for run in runs if (text := yaml_of(run))],
        "events": events,
        "page": {"plots": plots, "batches": batches, "runs": [run.label for run in runs]},
    }


def _rendered(facts: Mapping[str, Any]) -> bytes:
    environment = Environment(
        loader=PackageLoader("cosmos_scale.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["moment"] = moment
    return environment.get_template("report.html").render(facts).encode(errors="replace")
