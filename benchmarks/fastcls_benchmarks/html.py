"""One HTML file with everything: no network, no scripts."""

from __future__ import annotations

import base64
import io

import jinja2

from . import tables
from .plots import plots
from .results import Report
from .workloads import LENGTHS

_KINDS = {"text": "From text to label", "model": "Models", "train": "Steps of fine-tuning", "kernel": "Single kernels"}


def page(report: Report) -> str:
    """The report as a page."""
    loader = jinja2.PackageLoader(__package__, ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    shown = list(tables.cases(report))
    pictures = []
    for plot in plots(report):
        plot.figure.savefig(png := io.BytesIO(), format="png", dpi=160)
        pictures.append({"text": plot.text, "data": base64.b64encode(png.getvalue()).decode()})
    used = {case.workload.split(" x ")[1] for case in report.cases}
    arguments = {f"argument {name}": value for name, value in report.arguments.items()}
    provenance = {**report.provenance, **report.provenance["versions"], **arguments, "versions": None}
    return environment.get_template("report.html.jinja").render(
        report=report,
        facts=tables.facts(report.provenance),
        machine=tables.machine_line(report),
        pictures=pictures,
        groups={heading: [each for each in shown if each.case.kind == kind] for kind, heading in _KINDS.items()},
        published=tables.published_rows(report),
        first_call_headings=tables.FIRST_CALL,
        first_calls=[tables.first_call_cells(each) for each in report.first_calls],
        missing=tables.cannot_run(report),
        distributions={name: lengths for name, lengths in LENGTHS.items() if name in used},
        provenance={name: value for name, value in provenance.items() if value is not None},
    )
