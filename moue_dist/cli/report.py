"""`moue report RUN...`: the report of one run, or the scaling efficiency of several."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moue_dist.config import ConfigError

if TYPE_CHECKING:
    from moue_dist.report.scaling import Row

ABOUT = """\
Write a report as one HTML file that needs nothing else: no network, no JavaScript.

With one run folder: its report (loss, expert use per layer and over the pool, balance, step time), by default
report.html inside that folder. A run that is still going, or was killed, can be reported too.

With several: a table and plots of scaling efficiency. The run on the fewest ranks is the baseline; efficiency is
tokens/s of a rank over the baseline's (weak scaling: keep the sequences of a rank the same). A rank is one GPU, or one
process on a CPU. The table is also printed and written as CSV beside the page. Rates are medians without the first
tenth of the steps, at least two.
"""
EXAMPLES = """\
examples:
  moue report runs/tiny                                     -> runs/tiny/report.html
  moue report runs/tiny --timeline time.svg                 -> what each pipeline stage did in a recorded step
  moue report runs/gpu8 runs/gpu16 runs/gpu32               -> scaling.html, scaling.csv
  moue report runs/gpu* --output reports/scaling.html       -> reports/scaling.html, reports/scaling.csv
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moue report", description=ABOUT, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="the folder of a training run")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help="where to write the page (default: RUN/report.html for one run, scaling.html for several)",
    )
    parser.add_argument(
        "--timeline",
        type=Path,
        metavar="FILE",
        help="of one run: also draw the pipeline over time into a .png or .svg file (train with train.record_slots)",
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the subcommand; gives the exit code: 0, or 2 with one line on standard error for bad input."""
    try:
        options = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has already spoken: 0 after --help, 2 after a wrong argument
        return int(stop.code or 0)
    try:
        return _report(options.runs, options.output, options.timeline)
    except ConfigError as error:
        print(f"moue report: {error}", file=sys.stderr)
        return 2


def _report(folders: Sequence[Path], output: Path | None, timeline: Path | None) -> int:
    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output {output} must end in .html")
    if len(folders) == 1:
        from moue_dist.report.gantt import write_picture_of_time
        from moue_dist.report.run_report import write_run_report

        print(write_run_report(folders[0], output))
        if timeline is not None:
            print(write_picture_of_time(folders[0], timeline))
        return 0
    if timeline is not None:
        raise ConfigError(f"--timeline {timeline} is for one run; name one, not {len(folders)}")
    doubles = {folder for folder in folders if sum(folder.resolve() == other.resolve() for other in folders) > 1}
    if doubles:
        raise ConfigError(f"{min(doubles)} is named twice; name each run once")
    from moue_dist.report.scaling import write_scaling_report

    output = output or Path("scaling.html")
    rows, warnings = write_scaling_report(folders, output)
    _print_table(rows, warnings)
    print(output)
    print(output.with_suffix(".csv"))
    return 0


def _print_table(rows: Sequence[Row], warnings: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from moue_dist.report.scaling import WORDS, header, word_of

    table = Table(title="Scaling efficiency", title_justify="left", title_style="bold")
    for i, name in enumerate(header(word_of(rows))):
        table.add_column(name, justify="left" if i < WORDS else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row.cells()))
    # A file or a pipe has no width of its own: give the table the room that it needs.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)
    for warning in warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
