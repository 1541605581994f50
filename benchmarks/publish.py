"""Publishes a run of the suite release, cpu, rerankers or train: keeps its results, and makes the tables and the
picture of README.md, docs/performance.md and docs/training.md from all kept results.

python benchmarks/publish.py fastcls-bench/2026-01-31-120000/results.json
python benchmarks/publish.py --check
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from fastcls_benchmarks.plots import plots
from fastcls_benchmarks.provenance import PACKAGES, output_of, slug, source_digest
from fastcls_benchmarks.providers import FASTCLS, INVARIANT, SDPA
from fastcls_benchmarks.results import Case, Report
from fastcls_benchmarks.tables import NONE, duration, number, published_rows, share, times
from fastcls_benchmarks.texts import CLASSIFIER
from fastcls_benchmarks.workloads import data

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "training.md")
SUITES = ("release", "cpu", "rerankers", "train")
MARKERS = re.compile(r"<!-- benchmarks: begin (\w+) -->\n.*?<!-- benchmarks: end -->", re.DOTALL)
# The picture's field for the digest of the results that it was made from.
DIGEST = "Source"


def reason_not_to_publish(report: Report) -> str | None:
    """Why a run's figures may not be published; fills in a commit that only the code itself identifies."""
    if report.suite not in SUITES:
        return f"only the suites {', '.join(SUITES)} are published, this is {report.suite}"
    if report.partial:
        return "the run was stopped before its end"
    if ours := [each for each in _failed(report) if "fastcls" in each.partition(" in ")[0]]:
        return f"{'; '.join(ours)} failed"
    provenance = report.provenance
    if provenance["commit"] is None and provenance["source_digest"] == source_digest():
        # The run had no git: the code of this checkout is the code that ran.
        provenance["commit"] = output_of("git", "rev-parse", "HEAD")
        changes = output_of("git", "status", "--porcelain", "--", "fastcls", "kernels", "benchmarks/fastcls_benchmarks")
        provenance["dirty"] = bool(changes)
    if provenance["commit"] is None:
        return "its commit is unknown, and its code is not this checkout's"
    return "its code had changes: commit them and run again" if provenance["dirty"] else None


def _failed(report: Report) -> list[str]:
    return [f"{row.provider} in {case.name}" for case in report.cases for row in case.rows if row.status == "failed"]


def _failures(report: Report) -> Iterator[str]:
    if failed := _failed(report):
        yield f"Failed, and not among the peers: {'; '.join(failed)}."


def _timed(case: Case) -> dict[str, float]:
    return {row.provider: seconds for row in case.rows if (seconds := case.typical_seconds(row.provider)) is not None}


def _compared(case: Case) -> tuple[float, tuple[str, ...]] | None:
    """Fastcls's seconds, if it was timed; the milliseconds of transformers, a peer and itself, and its two ratios."""
    ours, seconds = CLASSIFIER.name if case.kind == "text" else FASTCLS.name, _timed(case)
    if case.kind == "kernel" or ours not in seconds:
        return None
    # The fastest that is neither transformers as it comes, nor ours, nor of reduced precision.
    peers = [name for name in seconds if name != case.baseline and not re.search("fastcls|int8|default", name)]
    peer = min(peers, key=lambda name: seconds[name], default="")
    fastest, vs_peer = (f"{duration(seconds[peer])} ({peer})", times(case, ours, peer)) if peer else (NONE, NONE)
    transformers = duration(case.typical_seconds(case.baseline))
    return seconds[ours], (transformers, fastest, duration(seconds[ours]), times(case, ours), vs_peer)


_TIMES = ("transformers, ms", "fastest peer, ms", "fastcls, ms", "vs transformers", "vs peer")
_COMPARED = ("model", "batch", "dtype", *_TIMES)


def _row(case: Case) -> tuple[float, list[str]] | None:
    """Fastcls's seconds, if it was timed, and the cells under `_COMPARED`."""
    if (compared := _compared(case)) is None:
        return None
    seconds, (transformers, *others) = compared
    # Marks a model that transformers does not compute with sdpa.
    mark = "" if case.baseline == SDPA.name else f" ({case.baseline.removeprefix('transformers ')})"
    noise = f", noise {case.noise:.0%}" if case.is_noisy else ""
    batch = f"{case.workload}{', from text' * (case.kind == 'text')}{noise}"
    return seconds, [case.subject, batch, case.dtype, transformers + mark, *others]


def _peaks(report: Report, what: str) -> Iterator[str]:
    if calls := [each for each in report.first_calls if each.peak_bytes]:
        peaks = "; ".join(f"{each.provider} {(each.peak_bytes or 0) / 2**20:.1f}" for each in calls)
        yield f"Peak memory of {what}, {calls[0].model}, {calls[0].workload}, MiB: {peaks}."


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
    noise = [f"noise {noises[0]:.1%} to {noises[-1]:.1%}"] if noises else []
    facts = [*threads, ", ".join(versions), f"commit {provenance['commit'][:9]}", provenance["date"][:10], *noise]
    return " · ".join([f"**{provenance['chip']}**", *facts])


def headline(results: Path, _page: Path) -> Iterator[str]:
    """One figure of the newest machine, from text to label."""
    for _, report in _newest_first(results, "release")[:1]:
        for case in report.cases:
            row, ratio = case.row(CLASSIFIER.name), case.times_faster(CLASSIFIER.name)
            if case.kind == "text" and row and ratio:
                labels = "" if row.agreement is None else f", with {row.agreement:.1%} of its labels"
                faster = f"**{ratio:.1f} times as fast as transformers' pipeline** from text to label{labels}"
                where = f"{report.provenance['chip']}, {report.provenance['threads']} threads"
                yield f"{faster}: MiniLM-L6, {case.about}, {case.dtype}, {where}."


def summary(results: Path, page: Path) -> Iterator[str]:
    """The newest machine: a few rows and one picture."""
    for path, report in _newest_first(results, "release")[:1]:
        chip, commit, date = (report.provenance[name] for name in ("chip", "commit", "date"))
        yield f"{chip}, milliseconds, commit {commit[:9]}, {date[:10]}:"
        cases, rows = {", ".join(case.key[:3]): case for case in report.cases}, []
        for key, about in data("summary.toml").items():
            if key in cases and (compared := _compared(cases[key])):
                transformers, fastest, fast, *ratios = compared[1]
                rows.append([about, transformers, fastest, f"**{fast}**", *ratios])
        heading = ("", "transformers", "fastest peer, same precision", "fastcls", "vs transformers", "vs that peer")
        yield _table(heading, rows, 1)
        if (picture := path.with_suffix(".png")).is_file():
            where = picture.resolve().relative_to(page.resolve().parent).as_posix()
            yield f"![From text to label, by provider]({where})"


def release(results: Path, _page: Path) -> Iterator[str]:
    """Every machine, the newest first: the facts, a table, what batch invariance costs."""
    for _, report in _newest_first(results, "release"):
        yield _headline(report)
        rows, costs = [], []
        for case in report.cases:
            if (compared := _row(case)) is None:
                continue
            (seconds, cells), floor = compared, report.floor_seconds(case)
            rows.append([*cells, share(floor and floor / seconds)])
            if (invariant := case.typical_seconds(INVARIANT.name)) is not None:
                costs.append(f"{case.subject}, {case.workload}: {duration(invariant)} ms")
        yield _table((*_COMPARED, "of floor"), rows, 3)
        for case in report.cases:
            if case.kind == "text":
                judged = [row for row in case.rows if row.agreement is not None]
                kept = {row.provider: f" ({row.agreement:.1%} of the labels)" for row in judged}
                listed = "; ".join(
                    f"{name} {duration(each)}{kept.get(name, '')}" for name, each in _timed(case).items()
                )
                yield f"From text to label, {case.subject}, {case.about}, ms: {listed}."
        yield from _peaks(report, "a forward")
        if costs:
            yield f"With `batch_invariant=True`: {'; '.join(costs)}."
        yield from _failures(report)


def cpu(results: Path, _page: Path) -> Iterator[str]:
    """Every machine, the newest first: the facts, a table of times, the labels kept."""
    for _, report in _newest_first(results, "cpu"):
        kept = report.cases[0]
        names = [row.provider for row in kept.rows]
        rows = []
        for case in report.cases:
            seconds = [duration(case.typical_seconds(name)) for name in names]
            rows.append([case.subject, case.workload, str(case.threads), *seconds])
        yield _headline(report)
        yield _table(("model", "batch", "threads", *names), rows, 2)
        judged = [row for row in kept.rows if row.agreement is not None and row.provider != kept.baseline]
        shares = "; ".join(f"{row.provider} {row.agreement:.1%}, {row.mean_error:.3f}" for row in judged)
        yield f"{kept.subject} on {kept.judged_on}: labels kept, mean error of a logit: {shares}."


def rerankers(results: Path, _page: Path) -> Iterator[str]:
    """Every machine, the newest first: the facts, pairs a second beside published figures."""
    for _, report in _newest_first(results, "rerankers"):
        heading, *rows = published_rows(report)
        yield _headline(report)
        yield _table(heading, rows, 1)
        yield f"Texts: {'; '.join(dict.fromkeys(case.about for case in report.cases))}."


def train(results: Path, _page: Path) -> Iterator[str]:
    """Every machine, the newest first: the facts, a table of steps with their memory and the gradients' error."""
    for _, report in _newest_first(results, "train"):
        yield _headline(report)
        figures, rows = report.figures().set_index(["case", "provider"]), []
        for case in report.cases:
            if (compared := _row(case)) is not None:
                theirs, ours = (figures.loc[(case.name, name)] for name in (case.baseline, FASTCLS.name))
                memory = f"{number(ours.step_bytes / 2**20)} of {number(theirs.step_bytes / 2**20)}"
                rows.append([*compared[1], number(ours.tokens), memory, f"{ours.difference / theirs.difference:.2f}"])
        yield _table((*_COMPARED, "tokens/s", "MiB", "error"), rows, 3)
        yield from _peaks(report, "a whole step, gradients included")
        yield from _failures(report)


SECTIONS = {section.__name__: section for section in (headline, summary, release, cpu, rerankers, train)}


def with_sections(page: Path, results: Path) -> str:
    """The page's text with the sections between its markers; ValueError if it has none, or one that there is not."""
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


def out_of_step(pages: Iterable[Path], results: Path) -> list[str]:
    """The files that no longer show the kept results."""
    found = [page for page in pages if with_sections(page, results) != page.read_text(encoding="utf-8")]
    pictures = {path: path.with_suffix(".png") for path in sorted(results.glob("*/release.json"))}
    stale = [p for path, p in pictures.items() if not p.is_file() or Image.open(p).info.get(DIGEST) != _digest(path)]
    return [str(each) for each in found + stale]


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
            if reason := reason_not_to_publish(report):
                raise ValueError(f"{run} is not published: {reason}")
            report.write(results / slug(report.provenance["chip"]) / f"{report.suite}.json")
        if check:
            if differing := out_of_step(pages, results):
                raise ValueError(f"out of step with {results}: {', '.join(differing)}; run benchmarks/publish.py")
            return
        for path in sorted(results.glob("*/release.json")):
            for plot in plots(Report.read(path))[:1]:
                plot.figure.savefig(path.with_suffix(".png"), dpi=150, metadata={DIGEST: _digest(path)})
        for each in pages:
            each.write_text(with_sections(each, results), encoding="utf-8")
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
