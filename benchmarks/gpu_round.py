"""All that needs a GPU, in four calls of under ten minutes: tests, tiles, the suites to publish, one change.

python benchmarks/gpu_round.py --rehearse  # no GPU needed: what would run, and how long
python benchmarks/gpu_round.py --call 1 --out round
python benchmarks/gpu_round.py --call 1 --out new --record round/round.json  # only what is not done there
python benchmarks/gpu_round.py --call 4 --out round --before ../old -- --model bert-base --provider fastcls

A checkout need not be installed. Put the tiles of call 2 into kernels/fastcls_kernels/configs/, and commit them, before
call 3. A call leaves at most six files: round.json (how each step ended), call-N.log (what they printed) and results.
What call 4 changed: `fastcls bench --from after/results.json --compare before/results.json`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

ROOT = Path(__file__).resolve().parents[1]
# Where a checkout that is not installed keeps its packages.
PACKAGES = (".", "kernels", "benchmarks")
# Of a call's seconds: for starting and ending; the least that a step is started with; of a step's: from Ctrl-C to the
# end by force; what tune.py takes beyond its --seconds; what a suite takes to import torch and to write its report.
RESERVE, LEAST, GRACE, TUNE_MORE, SUITE_MORE = 20.0, 30.0, 15.0, 45.0, 20.0


class Step(NamedTuple):
    """One process of a call: python's arguments, in which {out} is the folder of results, {seconds} tune.py's time."""

    call: int
    command: tuple[str, ...]
    result: str = "{name}.tar.gz"  # a file in that folder
    share: float = 1.0  # of the time left
    tree: Path = ROOT  # the checkout that it runs


_PYTEST = ("-m", "pytest", "-m", "gpu", "--full", "-q", "--maxfail=30", "-n8", "--junitxml={out}/tests.xml", "tests")
_TUNED = [f"--operation={name}" for name in ("attention", "cls_attention", "linear_gelu", "linear_add_layer_norm")]
_BENCH = ("-m", "fastcls", "bench", "--device", "cuda", "--out", "{out}/{name}", "--suite")
_FILES = ("benchmarks/files.py", "--part=speed,duplicates,documents,plan", "--rounds=3")
STEPS = {
    # Eight minutes; the rest is for the first times.
    "tests": Step(1, _PYTEST, "tests.xml", share=7 / 8),
    "floors": Step(1, (*_BENCH, "floors")),
    "tune": Step(2, ("benchmarks/tune.py", "--seconds={seconds}", "--out={out}/tiles.json", *_TUNED), "tiles.json"),
    "release": Step(3, (*_BENCH, "release")),
    "rerankers": Step(3, (*_BENCH, "rerankers")),
    "train": Step(3, (*_BENCH, "train")),
    "files": Step(3, (*_FILES, "--device=cuda", "--out={out}/{name}")),
}


def compared(before: Path, more: Sequence[str]) -> dict[str, Step]:
    """Call 4, two checkouts in turn, twice, in equal shares: what the two runs of one differ by is drift."""
    step, names = Step(4, (*_BENCH, "quick", *more)), ("before", "after", "before-again", "after-again")
    return {name: step._replace(share=1 / (4 - i), tree=(before, ROOT)[i % 2]) for i, name in enumerate(names)}


def planned_seconds(suite: str) -> float:
    """About how long a suite of `fastcls bench` takes on a GPU."""
    sys.path[:0] = [str(ROOT / package) for package in PACKAGES]
    from fastcls_benchmarks import runner, suites

    return SUITE_MORE + sum(runner.planned_seconds(suites.suite(suite, cuda := torch.device("cuda")), cuda))


class Row(NamedTuple):
    """How a step ended: its exit status, None if it did not run; the same in words; its seconds, and their limit."""

    status: int | None
    about: str
    seconds: float
    limit: float


def stand_in(_name: str, step: Step, _command: Sequence[str], limit: float) -> Row:
    """No GPU: a step takes as long as is estimated."""
    if step.command[:-1] != _BENCH and step.result != "tiles.json":
        return Row(0, "unknown, at most its limit", limit, limit)
    seconds = planned_seconds(step.command[-1]) if step.command[:-1] == _BENCH else limit - TUNE_MORE
    return Row(0, "fits", seconds, limit) if seconds <= limit - GRACE else Row(1, "too long", seconds, limit)


def _apart() -> None:
    """A group of its own, which takes Ctrl-C even where this program, in the background of a shell, does not."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def on_gpu(name: str, step: Step, command: Sequence[str], limit: float, *, out: Path, site: str) -> Row:
    """This machine's GPU: all output goes to ``out``, and packages are found in ``site``, too."""
    start, log = time.monotonic(), out / f"call-{step.call}.log"
    shutil.rmtree(out / name, ignore_errors=True)
    path = [*(str(step.tree / package) for package in PACKAGES), site, os.environ.get("PYTHONPATH", "")]
    options: dict[str, Any] = {"cwd": step.tree, "stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    options["env"] = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}
    with log.open("a", encoding="utf-8") as heading:
        print(f"== {name}", file=heading)
    # A group, but no session of its own: what ends this program's session must end the step as well.
    with log.open("ab") as file, subprocess.Popen(command, stdout=file, preexec_fn=_apart, **options) as process:
        try:
            status = process.wait(limit - GRACE)
        except subprocess.TimeoutExpired:
            # As Ctrl-C: pytest then tells what failed so far, and the suites keep what is complete.
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            status = 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if (out / name).is_dir():
        shutil.make_archive(str(out / name), "gztar", out, name)
        shutil.rmtree(out / name)
    if status:
        print(*log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:], sep="\n", flush=True)
    about = {0: "done", 124: "out of time (124)"}.get(status, f"failed ({status})")
    return Row(status, f"{about}, {torch.cuda.get_device_name()}", time.monotonic() - start, limit)


def carry_out(steps: dict[str, Step], run: Callable[..., Row], limit: float, notes: dict[str, Any], file: Path) -> bool:
    """Runs in turn what is not done according to ``notes``, and writes them; returns whether all is done."""
    left, rows = dict.fromkeys(range(1, 5), limit - RESERVE), dict[str, Row]()
    for name, step in steps.items():
        seconds, past = left[step.call] * step.share, notes.get(name, {})
        # A rehearsal does nothing, and before and after are compared within one call alone.
        if past.get("about", "").startswith("done") and past["command"] == list(step.command) and step.call != 4:
            rows[name] = Row(0, f"{past['when']} {past['about']}", past["seconds"], past["limit"])
        elif seconds < LEAST:
            rows[name] = Row(None, "no time left", 0, max(seconds, 0))
        else:
            values = {"out": file.parent, "name": name, "seconds": max(1, int(seconds - TUNE_MORE))}
            command = [sys.executable, *(part.format(**values) for part in step.command)]
            print(f"{name}, at most {seconds:.0f} s, in {step.tree}: {' '.join(command)}", flush=True)
            when, rows[name] = time.strftime("%Y-%m-%d %H:%M"), run(name, step, command, seconds)
            left[step.call] -= rows[name].seconds
            notes[name] = {**rows[name]._asdict(), "when": when, "command": step.command}
            file.write_text(json.dumps(notes, indent=1), encoding="utf-8")
    print(f"\nIn {file.parent}: {', '.join(sorted(each.name for each in file.parent.glob('*.*')))}")
    print(f"{'step':13}{'status':45}{'seconds':>8}{'at most':>8}  result")
    for name, row in rows.items():
        print(f"{name:13}{row.about:45}{row.seconds:8.0f}{row.limit:8.0f}  {steps[name].result.format(name=name)}")
    return all(row.status == 0 for row in rows.values())


def main(
    bench: Annotated[list[str] | None, typer.Argument(help="For call 4, after --: options of `fastcls bench`.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = Path("fastcls-bench/gpu-round"),
    call: Annotated[int | None, typer.Option(min=1, max=4, help="Only this call.")] = None,
    step: Annotated[list[str] | None, typer.Option(help="Only this step; may be repeated.")] = None,
    limit: Annotated[float, typer.Option(min=1, help="Seconds of a call.")] = 570,
    before: Annotated[Path | None, typer.Option(exists=True, help="For call 4: a checkout of the code before.")] = None,
    record: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The round.json of an earlier call.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Run what is done once more.")] = False,
    wheels: Annotated[Path | None, typer.Option(exists=True, help="Folder of wheels to use; default: .whl.")] = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Show what would run, and how long; no GPU.")] = False,
) -> None:
    """Tests, tunes and measures on this machine's GPU; exit status 1 if a step is not done."""
    if not (rehearse or torch.cuda.is_available()):
        print("gpu_round.py needs a GPU that torch can use; with --rehearse it needs none.", file=sys.stderr)
        raise typer.Exit(2)
    if call == 4 and not (before or rehearse):
        raise typer.BadParameter("call 4 needs a checkout of the code before", param_hint="--before")
    steps = STEPS | (compared((before or ROOT).resolve(), bench or ()) if before or rehearse else {})
    steps = {name: each for name, each in steps.items() if call in (None, each.call)}
    if unknown := set(step or ()) - set(steps):
        raise typer.BadParameter(f"must be one of {', '.join(steps)}; got {', '.join(unknown)}", param_hint="--step")
    steps = {name: steps[name] for name in steps if name in (step or steps)}
    out, notes = out.resolve(), dict[str, Any]()
    out.mkdir(parents=True, exist_ok=True)
    for file in filter(Path.is_file, filter(None, (record, out / "round.json"))):
        notes |= json.loads(file.read_text(encoding="utf-8"))
    notes = {name: note for name, note in notes.items() if not (again and name in steps)}
    with tempfile.TemporaryDirectory() as site:
        if not rehearse and (files := sorted((wheels or ROOT / ".whl").glob("*.whl"))):
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site]
            subprocess.run([*pip, *files], check=True)
        device = stand_in if rehearse else functools.partial(on_gpu, out=out, site=site)
        record = out / ("rehearsal.json" if rehearse else "round.json")
        raise typer.Exit(not carry_out(steps, device, limit, notes, record))


if __name__ == "__main__":
    # What ends this program ends its step.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    typer.run(main)
