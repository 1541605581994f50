"""The README's table, from the published results: python -m benchmarks.readme_table [--check]"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from .providers import ABSORBED, EAGER, ONNXRUNTIME, SDPA
from .results import Case, Report
from .tables import NONE, times
from .workloads import ROOT, WORKLOADS

BEGIN = "<!-- benchmark table: begin -->"
END = "<!-- benchmark table: end -->"

_PEERS = (EAGER, SDPA, ONNXRUNTIME)


def table_of(results: Path) -> str:
    """Markdown for every ``results/*/compare.json``."""
    parts = [_chip_table(Report.read(path)) for path in sorted(results.glob("*/compare.json"))]
    return "\n\n".join(parts) or "Not measured yet."


def _chip_table(report: Report) -> str:
    return "\n".join((_headline(report), "", *_rows(report)))


def _headline(report: Report) -> str:
    provenance = report.provenance
    packages = ("torch", "transformers", "onnxruntime")
    versions = [f"{name} {provenance['versions'][name]}" for name in packages if provenance["versions"][name]]
    noises = [case.noise for case in report.cases if case.noise is not None]
    facts = [
        f"**{provenance['chip']}**",
        f"{provenance['threads']} threads",
        ", ".join(versions),
        f"commit {(provenance['commit'] or 'unknown')[:9]}",
        provenance["date"][:10],
    ]
    if noises:
        facts.append(f"noise up to {max(noises):.1%}")
    return " · ".join(facts)


def _rows(report: Report) -> Iterator[str]:
    headings = ["model", "workload", "dtype"]
    headings += [*(f"{peer.name}, ms" for peer in _PEERS), "fastcls, ms"]
    headings += [f"fastcls vs {peer.name}" for peer in _PEERS]
    headings += ["of the machine's product rate", "peak memory, MiB: transformers sdpa", "fastcls"]
    yield _line(headings)
    yield _line(["---"] * 3 + ["---:"] * (len(headings) - 3))
    for case in report.cases:
        yield _line(
            [
                case.model,
                WORKLOADS[case.workload].description,
                case.dtype,
                *(_milliseconds(case, provider.name) for provider in (*_PEERS, ABSORBED)),
                *(times(case.times_faster(ABSORBED.name, peer.name), case.noise) for peer in _PEERS),
                _share(case),
                *(_peak(report, case, provider.name) for provider in (SDPA, ABSORBED)),
            ]
        )


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _share(case: Case) -> str:
    share = case.share(ABSORBED.name, case.flops)
    return NONE if share is None else f"{share:.0%}"


def _peak(report: Report, case: Case, provider: str) -> str:
    for each in report.memory:
        if (each.model, each.workload, each.provider) == (case.model, case.workload, provider) and each.peak_bytes:
            return f"{each.peak_bytes / 2**20:.1f}"
    return NONE


def _milliseconds(case: Case, provider: str) -> str:
    seconds = case.batch_seconds(provider)
    return f"{1e3 * statistics.median(seconds):.1f}" if seconds else NONE


def with_table(text: str, table: str) -> str:
    """``text`` with ``table`` between its markers.

    Raises:
        ValueError: there is not one pair of markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"there must be one pair of markers, {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


app = typer.Typer(add_completion=False)


@app.command()
def main(
    check: Annotated[bool, typer.Option("--check", help="Only exit 1 if the README is out of step.")] = False,
    readme: Annotated[Path, typer.Option(help="The file with the markers.")] = ROOT / "README.md",
    results: Annotated[Path, typer.Option(help="The folder of */compare.json.")] = ROOT / "benchmarks" / "results",
) -> None:
    """Writes the table of all published results into the README, between its markers."""
    text = readme.read_text(encoding="utf-8")
    try:
        wanted = with_table(text, table_of(results))
    except ValueError as error:
        typer.echo(f"{readme}: {error}", err=True)
        raise typer.Exit(1) from None
    if wanted == text:
        return
    if check:
        typer.echo(f"{readme} is out of step with {results}: run python -m benchmarks.readme_table", err=True)
        raise typer.Exit(1)
    readme.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    app()
