"""Publishes a run of the suite release, cpu or rerankers: keeps its results, and makes the tables and the picture of
README.md and docs/performance.md from all kept results.

python benchmarks/publish.py fastcls-bench/2026-01-31-120000/results.json
python benchmarks/publish.py --check
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from fastcls_benchmarks.plots import plots
from fastcls_benchmarks.provenance import PACKAGES, output_of, slug, source_digest
from fastcls_benchmarks.providers import FASTCLS, INVARIANT, OURS, SDPA
from fastcls_benchmarks.results import Case, Report
from fastcls_benchmarks.tables import NONE, duration, published_rows, share, times
from fastcls_benchmarks.texts import CLASSIFIER

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
SUITES = ("release", "cpu", "rerankers")
MARKERS = re.compile(r"<!-- benchmarks: begin (\w+) -->\n.*?<!-- benchmarks: end -->", re.DOTALL)
# What the README shows of the newest run: kind, model and workload, and what that is in words.
SUMMARY = {
    ("text", "minilm-l6-sst2", "32 x sst2-dev"): "MiniLM-L6, SST-2's dev split, from text to label",
    ("model", "minilm-l6", "1 x sst2"): "MiniLM-L6, one sentence",
    ("model", "minilm-l6", "32 x sst2"): "MiniLM-L6, 32 sentences",
    ("model", "bert-base", "32 x sst2"): "BERT-base, 32 sentences",
    ("model", "bert-base", "8 x 128"): "BERT-base, 8 texts of 128 tokens",
    ("model", "bert-base", "32 x 128"): "BERT-base, 32 texts of 128 tokens",
}
# The picture's field for the digest of the results that it was made from.
DIGEST = "Source"


def reason_not_to_publish(report: Report) -> str | None:
    """Why a run's figures may not be published; fills in a commit that only the code itself identifies."""
    if report.suite not in SUITES:
        return f"only the suites {', '.join(SUITES)} are published, this is {report.suite}"
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


def is_ours(provider: str) -> bool:
    return provider in OURS or "fastcls" in provider


def fastest_peer(case: Case, exact: bool = True) -> str | None:
    """The fastest provider that is not ours; if ``exact``, none of reduced precision."""
    reduced = {row.provider for row in case.rows if exact and re.search("int8|default", row.provider)}
    names = [row.provider for row in case.rows if not is_ours(row.provider) and row.provider not in reduced]
    timed = {name: seconds for name in names if (seconds := case.typical_seconds(name)) is not None}
    return min(timed, key=lambda name: timed[name], default=None)


def _table(heading: Iterable[str], rows: Iterable[Iterable[str]], left: int) -> str:
    heading = list(heading)
    rule = ["---"] * left + ["---:"] * (len(heading) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *rows))


def _newest_first(results: Path, suite: str) -> list[tuple[Path, Report]]:
    reports = [(path, Report.read(path)) for path in results.glob(f"*/{suite}.json")]
    return sorted(reports, key=lambda each: each[1].provenance["date"], reverse=True)


def _headline(report: Report) -> str:
    provenance = report.provenance
    versions = [f"{name} {provenance['versions'][name]}" for name in PACKAGES if provenance["versions"].get(name)]
    noises = sorted(case.noise for case in report.cases if case.kind != "kernel" and case.noise is not None)
    # Cases of the suite cpu have threads of their own.
    threads = [] if report.suite == "cpu" else [f"{provenance['threads']} threads"]
    commit = f"commit {provenance['commit'][:9]}"
    facts = [f"**{provenance['chip']}**", *threads, ", ".join(versions), commit, provenance["date"][:10]]
    if noises:
        facts.append(f"noise {noises[0]:.1%} to {noises[-1]:.1%}")
    return " · ".join(facts)


def headline(results: Path, _page: Path) -> Iterator[str]:
    """One figure of the newest machine, from text to label."""
    for _, report in _newest_first(results, "release")[:1]:
        for case in report.cases:
            row, ratio = case.row(CLASSIFIER.name), case.times_faster(CLASSIFIER.name)
            if case.kind == "text" and row and ratio:
                labels = "" if row.agreement is None else f", with {row.agreement:.0%} of its labels"
                yield (
                    f"**{ratio:.1f} times as fast as transformers' pipeline** from text to label{labels}: MiniLM-L6, "
                    f"{case.about}, {case.dtype}, {report.provenance['chip']}."
                )


def summary(results: Path, page: Path) -> Iterator[str]:
    """The newest machine: a few rows and one picture."""
    for path, report in _newest_first(results, "release")[:1]:
        provenance = report.provenance
        yield f"{provenance['chip']}, milliseconds, commit {provenance['commit'][:9]}, {provenance['date'][:10]}:"
        cases = {case.key[:3]: case for case in report.cases}
        rows = []
        for key, about in SUMMARY.items():
            case = cases.get(key)
            ours = CLASSIFIER.name if key[0] == "text" else FASTCLS.name
            if case is None or case.typical_seconds(ours) is None:
                continue
            peer = fastest_peer(case)
            shown = (case.typical_seconds(name) for name in (case.baseline, peer, ours) if name)
            transformers, fastest, fast = map(duration, shown)
            ratios = (times(case, ours), times(case, ours, peer or ""))
            rows.append([about, transformers, f"{fastest} ({peer})", f"**{fast}**", *ratios])
        heading = ("", "transformers", "fastest peer, same precision", "fastcls", "vs transformers", "vs that peer")
        yield _table(heading, rows, 1)
        if path.with_suffix(".png").is_file():
            where = path.with_suffix(".png").resolve().relative_to(page.resolve().parent).as_posix()
            yield f"![From text to label, by provider]({where})"


def release(results: Path, _page: Path) -> Iterator[str]:
    """Every machine, the newest first: the facts, a table, what batch invariance costs."""
    for _, report in _newest_first(results, "release"):
        yield _headline(report)
        rows, costs = [], []
        for case in report.cases:
            ours = CLASSIFIER.name if case.kind == "text" else FASTCLS.name
            if case.kind == "kernel" or case.typical_seconds(ours) is None:
                continue
            peer, floor, seconds = fastest_peer(case), report.floor_seconds(case), case.typical_seconds(ours)
            # Marks a model that transformers does not compute with sdpa.
            mark = "" if case.baseline == SDPA.name else f" ({case.baseline.removeprefix('transformers ')})"
            noise = "" if (case.noise or 0) <= 0.08 else f", noise {case.noise:.0%}"
            fastest = f"{duration(case.typical_seconds(peer))} ({peer})" if peer else NONE
            rows.append(
                [
                    case.subject,
                    f"{case.workload}{', from text' * (case.kind == 'text')}{noise}",
                    case.dtype,
                    duration(case.typical_seconds(case.baseline)) + mark,
                    fastest,
                    duration(seconds),
                    times(case, ours),
                    times(case, ours, peer) if peer else NONE,
                    share(floor / seconds if floor and seconds else None),
                ]
            )
            if (invariant := case.typical_seconds(INVARIANT.name)) is not None:
                costs.append(f"{case.subject}, {case.workload}: {duration(invariant)} ms")
        heading = ("model", "batch", "dtype", "transformers, ms", "fastest peer, ms", "fastcls, ms")
        yield _table((*heading, "vs transformers", "vs peer", "of floor"), rows, 3)
        for case in report.cases:
            if case.kind == "text":
                yield f"From text to label, {case.subject}, {case.about}, ms: {_listed(case)}."
        calls = [each for each in report.first_calls if each.peak_bytes]
        if peaks := [f"{each.provider} {(each.peak_bytes or 0) / 2**20:.1f}" for each in calls]:
            first = calls[0]
            yield f"Peak memory of a forward, {first.model}, {first.workload}, MiB: {'; '.join(peaks)}."
        if costs:
            yield f"With `batch_invariant=True`: {'; '.join(costs)}."


def _listed(case: Case) -> str:
    parts = []
    for row in case.rows:
        if (seconds := case.typical_seconds(row.provider)) is not None:
            kept = "" if row.agreement is None else f" ({row.agreement:.1%} of the labels)"
            parts.append(f"{row.provider} {duration(seconds)}{kept}")
    return "; ".join(parts)


def cpu(results: Path, _page: Path) -> Iterator[str]:
    """Every machine, the newest first: the facts, a table of times, the labels kept."""
    for _, report in _newest_first(results, "cpu"):
        names = [row.provider for row in report.cases[0].rows]
        rows = [
            [case.subject, case.workload, str(case.threads), *(duration(case.typical_seconds(name)) for name in names)]
            for case in report.cases
        ]
        yield _headline(report)
        yield _table(("model", "batch", "threads", *names), rows, 2)
        kept = report.cases[0]
        shares = [
            f"{row.provider} {row.agreement:.1%}, {row.mean_error:.3f}"
            for row in kept.rows
            if row.agreement is not None and row.mean_error is not None and row.provider != kept.baseline
        ]
        yield f"{kept.subject} on {kept.judged_on}: labels kept, mean error of a logit: {'; '.join(shares)}."


def rerankers(results: Path, _page: Path) -> Iterator[str]:
    """Every machine, the newest first: the facts, pairs a second beside published figures."""
    for _, report in _newest_first(results, "rerankers"):
        yield _headline(report)
        heading, *rows = published_rows(report)
        yield _table(heading, rows, 1)


SECTIONS: dict[str, Callable[[Path, Path], Iterator[str]]] = {
    "headline": headline,
    "summary": summary,
    "release": release,
    "cpu": cpu,
    "rerankers": rerankers,
}


def with_sections(page: Path, results: Path) -> str:
    """The page's text with the sections between its markers.

    Raises:
        ValueError: it has none, or names one that there is not.
    """
    text = page.read_text(encoding="utf-8")
    names = MARKERS.findall(text)
    if not names or set(names) - set(SECTIONS) or text.count("<!-- benchmarks: ") != 2 * len(names):
        raise ValueError(f"{page} must have pairs of markers, begin with one of {', '.join(SECTIONS)} and end")

    def section(found: re.Match[str]) -> str:
        parts = "\n\n".join(SECTIONS[found[1]](results, page)) or "Not measured yet."
        return f"<!-- benchmarks: begin {found[1]} -->\n{parts}\n<!-- benchmarks: end -->"

    return MARKERS.sub(section, text)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw(results: Path) -> None:
    """Draws the first picture of a results file beside it, marked with that file's digest."""
    for plot in plots(Report.read(results))[:1]:
        plot.figure.savefig(results.with_suffix(".png"), dpi=150, metadata={DIGEST: _digest(results)})


def out_of_step(pages: Iterable[Path], results: Path) -> list[str]:
    """The files that no longer show the kept results."""
    found = [str(page) for page in pages if with_sections(page, results) != page.read_text(encoding="utf-8")]
    pictures = {path: path.with_suffix(".png") for path in sorted(results.glob("*/release.json"))}
    stale = [p for path, p in pictures.items() if not p.is_file() or Image.open(p).info.get(DIGEST) != _digest(path)]
    return found + [str(picture) for picture in stale]


app = typer.Typer(add_completion=False)


@app.command()
def main(
    run: Annotated[Path | None, typer.Argument(help="The results.json of the run to publish.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only exit 1 if anything is out of step.")] = False,
    page: Annotated[list[Path] | None, typer.Option(help="A file with markers; may be repeated.")] = None,
    results: Annotated[Path, typer.Option(help="The folder of CHIP/SUITE.json.")] = RESULTS,
) -> None:
    """Keeps a run's results, if one is given, and makes tables and pictures from all results."""
    pages = page or PAGES
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
        for each in pages:
            each.write_text(with_sections(each, results), encoding="utf-8")
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
