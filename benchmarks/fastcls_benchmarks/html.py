"""One HTML file with everything: no network, no scripts."""

from __future__ import annotations

import base64
import io
from typing import Any

import jinja2

from . import tables
from .plots import plots
from .results import Report
from .workloads import LENGTHS

_KINDS = {"text": "From text to label", "model": "Models", "kernel": "Single kernels"}


def page(report: Report) -> str:
    """The report as a page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    groups: dict[str, list[dict[str, Any]]] = {heading: [] for heading in _KINDS.values()}
    for (case, rows), notes in zip(tables.case_rows(report), tables.new_remarks(report.cases), strict=True):
        about = {
            "title": tables.title(case),
            "caption": tables.caption(report, case),
            "headings": tables.headings(case),
        }
        groups[_KINDS[case.kind]].append({**about, "rows": rows, "notes": notes})
    used = {case.workload.split(" x ")[1] for case in report.cases}
    provenance = {**report.provenance, **report.provenance["versions"]}
    provenance |= {f"argument {name}": value for name, value in report.arguments.items()}
    del provenance["versions"]
    return environment.get_template("report.html.jinja").render(
        report=report,
        facts=tables.facts(report.provenance),
        machine=tables.machine_line(report),
        pictures=[{"text": plot.text, "data": _png(plot.figure)} for plot in plots(report)],
        groups=groups,
        published=tables.published_rows(report),
        first_call_headings=tables.FIRST_CALL,
        first_calls=[tables.first_call_cells(each) for each in report.first_calls],
        missing=tables.cannot_run(report),
        distributions={name: lengths for name, lengths in LENGTHS.items() if name in used},
        provenance={name: value for name, value in provenance.items() if value is not None},
    )


def _png(figure: Any) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160)
    return base64.b64encode(out.getvalue()).decode()
