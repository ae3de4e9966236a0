"""The command `cosmos-scale report`: one page of HTML on one run, or on several beside each other."""

import argparse
from mimetypes import MimeTypes
from pathlib import Path

from cosmos_scale.cli.arguments import path, with_examples
from cosmos_scale.errors import UserError

EXAMPLES = """\
examples:
  cosmos-scale report runs/cc3m_vitb16
  cosmos-scale report runs/cc3m_vitb16 runs/cc3m_vitb16_lr --out compared.html
  cosmos-scale report runs/cc3m_vitb16 --no-pictures
"""


def add_report_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; the defaults of its parser are its name (`command`) and its function (`run`)."""
    parser = with_examples(commands.add_parser("report", help="one page on a run, or on several"), EXAMPLES)
    parser.description = (
        "Write one page of HTML that tells a run's story: curves, speed, memory, data, what its newest\n"
        "checkpoint finds and looks at, config and events. It opens in any browser, without a network.\n"
        "The run may still go on. Several runs are drawn over each other."
    )
    parser.add_argument("runs", type=path, nargs="+", metavar="RUN", help="folder of a run, such as runs/NAME")
    parser.add_argument("--out", type=path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    parser.add_argument(
        "--no-pictures",
        action="store_true",
        help="leave out what needs the data or a checkpoint: samples, retrieval, attention",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.set_defaults(command="report", run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from cosmos_scale.evaluation.bar import WorkBar
    from cosmos_scale.files import keep_foreign, make_output_folder
    from cosmos_scale.report.page import SIGN, write_report

    _refuse_other_forms(arguments.out)
    keep_foreign(arguments.out, SIGN, "report of this program")
    make_output_folder(arguments.out.parent)
    with WorkBar(show=True) as bar:
        notes = write_report(
            arguments.runs,
            arguments.out,
            pictures=not arguments.no_pictures,
            device=arguments.device,
            report=bar.report,
        )
    for note in notes:
        print(note)
    print(f"{arguments.out} ({arguments.out.stat().st_size / 1e6:.1f} MB)")
    return 0


def _refuse_other_forms(out: Path) -> None:
    """Raise UserError where the page's name says that it is something else, such as report.pdf."""
    # An instance knows no machine's own list, by which report.1 may be a page of a manual.
    form, compression = MimeTypes().guess_type(out.name)
    if form not in (None, "text/html") or compression is not None:
        raise UserError(f"--out: {out}: the page is HTML; rule: a name that ends in .html")
