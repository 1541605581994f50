"""Publishes a run of the suite release or cpu: keeps its results, and makes tables and pictures from all kept results,
those of release in the README, those of cpu in docs/performance.md.

python benchmarks/publish.py fastcls-bench/2026-01-31-120000/results.json
python benchmarks/publish.py --check
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from fastcls_benchmarks.peers import ONNXRUNTIME
from fastcls_benchmarks.plots import relative_speed
from fastcls_benchmarks.provenance import PACKAGES, output_of, slug, source_digest
from fastcls_benchmarks.providers import FASTCLS, INVARIANT, OURS, SDPA
from fastcls_benchmarks.results import Case, Report
from fastcls_benchmarks.tables import NONE, duration, times

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
# The cases of a run that the README shows.
FEATURED = (
    "32 x sst2",
    "8 x sst2",
    "1 x sst2",
    "8 x 128",
    "32 x 128",
    "1 x 128",
    "128 x 512",
    "128 x mixed-512",
    "32 x squad",
)
# What makes a page's section, from the folder of results and the page's own path.
Pages = dict[Path, Callable[[Path, Path], str]]
# The picture's field for the digest of the results that it was made from.
DIGEST = "Source"


def reason_not_to_publish(report: Report) -> str | None:
    """Why a run's figures may not be published; fills in a commit that only the code itself identifies."""
    if report.suite not in ("release", "cpu"):
        return f"only the suites release and cpu are published, this is {report.suite}"
    if report.partial:
        return "the run was stopped before its end"
    provenance = report.provenance
    if provenance["commit"] is None and provenance["source_digest"] == source_digest():
        # The run had no git: the code of this checkout is the code that ran.
        provenance["commit"] = output_of("git", "rev-parse", "HEAD")
        changes = output_of("git", "status", "--porcelain", "--", "fastcls", "kernels", "benchmarks/fastcls_benchmarks")
        provenance["dirty"] = bool(changes)
    if provenance["commit"] is None:
        return "its commit is unknown, and its code is not this checkout's"
    if provenance["dirty"]:
        return "its code had changes: commit them and run again"
    return None


def section_of(results: Path, readme: Path) -> str:
    """Markdown for every ``results/*/release.json``, the newest first: the facts, a picture, a table."""
    parts = []
    for path, report in _newest_first(results, "release"):
        picture = path.with_suffix(".png")
        parts.append(_headline(report))
        if picture.is_file():
            where = picture.resolve().relative_to(readme.resolve().parent).as_posix()
            parts.append(f"![Times as fast as transformers sdpa, by provider]({where})")
        parts.append("\n".join(_rows(report)))
        if invariant := _invariant(report):
            parts.append(invariant)
    return "\n\n".join(parts) or "Not measured yet."


def cpu_section_of(results: Path, _page: Path) -> str:
    """Markdown for every ``results/*/cpu.json``, the newest first: the facts, a table of times, the labels kept."""
    parts = []
    for _, report in _newest_first(results, "cpu"):
        names = [row.provider for row in report.cases[0].rows]
        headings = ["model", "batch", "threads", *names]
        rows = [headings, ["---"] * 2 + ["---:"] * (len(headings) - 2)]
        for case in report.cases:
            times = [duration(case.typical_seconds(name)) for name in names]
            rows.append([case.subject, case.workload, str(case.threads), *times])
        parts += [_headline(report), "\n".join(map(_line, rows))]
        kept = report.cases[0]
        shares = [
            f"{row.provider} {row.agreement:.1%}, {row.mean_error:.3f}"
            for row in kept.rows
            if row.agreement is not None and row.mean_error is not None and row.provider != kept.baseline
        ]
        parts.append(f"{kept.subject} on {kept.judged_on}: labels kept, mean error of a logit: {'; '.join(shares)}.")
    return "\n\n".join(parts) or "Not measured yet."


def _newest_first(results: Path, suite: str) -> list[tuple[Path, Report]]:
    reports = [(path, Report.read(path)) for path in results.glob(f"*/{suite}.json")]
    return sorted(reports, key=lambda each: each[1].provenance["date"], reverse=True)


def _headline(report: Report) -> str:
    provenance = report.provenance
    versions = [f"{name} {provenance['versions'][name]}" for name in PACKAGES if provenance["versions"].get(name)]
    noises = sorted(case.noise for case in _featured(report) if case.noise is not None)
    # Cases of the suite cpu have threads of their own.
    threads = [] if report.suite == "cpu" else [f"{provenance['threads']} threads"]
    facts = [
        f"**{provenance['chip']}**",
        *threads,
        ", ".join(versions),
        f"commit {provenance['commit'][:9]}",
        provenance["date"][:10],
    ]
    if noises:
        facts.append(f"noise {noises[0]:.1%} to {noises[-1]:.1%}")
    return " · ".join(facts)


def _invariant(report: Report) -> str | None:
    """The times with the same bits in every batch."""
    costs = [
        f"{case.subject}, {case.workload}: {duration(seconds)} ms"
        for case in report.cases
        if (seconds := case.typical_seconds(INVARIANT.name)) is not None
    ]
    return f"With `batch_invariant=True`: {'; '.join(costs)}." if costs else None


def _featured(report: Report) -> list[Case]:
    return [
        case
        for case in report.cases
        if case.kind == "model" and case.workload in FEATURED and case.round_seconds(FASTCLS.name)
    ]


def _rows(report: Report) -> Iterator[str]:
    headings = [
        "model",
        "batch",
        "dtype",
        "transformers sdpa, ms",
        "onnxruntime, ms",
        "fastest peer, ms",
        "fastcls, ms",
    ]
    headings += ["vs sdpa", "vs onnxruntime", "vs fastest peer", "of floor", "peak MiB: sdpa", "fastcls"]
    yield _line(headings)
    yield _line(["---"] * 3 + ["---:"] * (len(headings) - 3))
    for case in _featured(report):
        peer = fastest_peer(case)
        share = report.share_of_floor(case, FASTCLS.name)
        # Marks a model that transformers does not compute with sdpa.
        mark = "" if case.baseline == SDPA.name else f" ({case.baseline.removeprefix('transformers ')})"
        peer_cell = f"{duration(case.typical_seconds(peer))} ({peer})" if peer else NONE
        yield _line(
            [
                case.subject,
                case.workload,
                case.dtype,
                duration(case.typical_seconds(case.baseline)) + mark,
                duration(case.typical_seconds(ONNXRUNTIME.name)),
                peer_cell,
                duration(case.typical_seconds(FASTCLS.name)),
                times(case, FASTCLS.name) + mark,
                *(times(case, FASTCLS.name, name) if name else NONE for name in (ONNXRUNTIME.name, peer)),
                NONE if share is None else f"{share:.0%}",
                *(_peak(report, case, name) for name in (SDPA.name, FASTCLS.name)),
            ]
        )


def fastest_peer(case: Case) -> str | None:
    """The fastest provider that is not ours."""
    seconds = {row.provider: case.typical_seconds(row.provider) for row in case.rows if row.provider not in OURS}
    timed = {name: each for name, each in seconds.items() if each is not None}
    return min(timed, key=lambda name: timed[name], default=None)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _peak(report: Report, case: Case, provider: str) -> str:
    found = report.first_call(case, provider)
    return f"{found.peak_bytes / 2**20:.1f}" if found and found.peak_bytes else NONE


def with_section(text: str, section: str) -> str:
    """``text`` with ``section`` between its markers.

    Raises:
        ValueError: there is not one pair of markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"there must be one pair of markers, {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw(results: Path) -> Path | None:
    """Draws the picture beside a results file, marked with that file's digest; None if it would show nothing."""
    plot = relative_speed(Report.read(results))
    if plot is None:
        return None
    picture = results.with_suffix(".png")
    plot.figure.savefig(picture, dpi=150, metadata={DIGEST: _digest(results)})
    return picture


def out_of_step(pages: Pages, results: Path) -> list[str]:
    """The files that no longer show the kept results."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    found = [str(page) for page, text in texts.items() if with_section(text, pages[page](results, page)) != text]
    for path in sorted(results.glob("*/release.json")):
        picture = path.with_suffix(".png")
        if not picture.is_file() or Image.open(picture).info.get(DIGEST) != _digest(path):
            found.append(str(picture))
    return found


app = typer.Typer(add_completion=False)


@app.command()
def main(
    run: Annotated[Path | None, typer.Argument(help="The results.json of the run to publish.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only exit 1 if anything is out of step.")] = False,
    readme: Annotated[Path, typer.Option(help="The file with release's markers.")] = ROOT / "README.md",
    page: Annotated[Path, typer.Option(help="The file with cpu's markers.")] = ROOT / "docs" / "performance.md",
    results: Annotated[Path, typer.Option(help="The folder of */release.json and */cpu.json.")] = RESULTS,
) -> None:
    """Keeps a run's results, if one is given, and makes tables and pictures from all results."""
    pages: Pages = {readme: section_of, page: cpu_section_of}
    try:
        if run is not None:
            report = Report.read(run)
            reason = reason_not_to_publish(report)
            if reason:
                raise ValueError(f"{run} is not published: {reason}")
            report.write(results / slug(report.provenance["chip"]) / f"{report.suite}.json")
        if check:
            differing = out_of_step(pages, results)
            if differing:
                raise ValueError(f"out of step with {results}: {', '.join(differing)}; run benchmarks/publish.py")
            return
        for path in sorted(results.glob("*/release.json")):
            draw(path)
        for each, section in pages.items():
            text = each.read_text(encoding="utf-8")
            each.write_text(with_section(text, section(results, each)), encoding="utf-8")
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
