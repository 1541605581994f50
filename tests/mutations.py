"""Whether the short test run bites: faults are put into a copy of the tree, one at a time, and its tests must notice.

python tests/mutations.py --check
python tests/mutations.py --results mutations.jsonl
python tests/mutations.py --path fastcls/families --near-only

The faults stand in mutations.toml. A fault is met by the tests near it, first as `pytest` runs them, then as `pytest
--full` does; where the short run has not noticed it, by the rest of that, and where nobody has, by the rest of the full
one. What the short run notices, the full one notices, too, since the one is a part of the other. The exit status is 1
where the short run notices less than 95 % of what the full one does, and where nobody notices any. It takes hours for
all of them, so nothing but a developer starts it.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Literal, NamedTuple

import typer

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).with_suffix(".toml")
# What a copy goes without: a test that all faults apply fails wherever one has been.
LEFT_OUT = ("tests/mutations.py", "tests/mutations.toml", "tests/test_mutations.py")
# Built from the sources, and ignored by git: without it the tests of the compiled kernels are skipped in a copy.
BUILT = "kernels/fastcls_kernels/packed/source/_library*"
# Of the faults that the full run notices the short one must notice so many.
ENOUGH = 0.95
# The rest of the tests may take so many times as long as those near a fault.
REST = 4
# pytest's exit statuses: no test failed, the command line is wrong, there was no test.
PASSED, USAGE_ERROR, NO_TESTS = 0, 4, 5
INTERRUPTED = 130
# Stands in the place of a test.
TIMEOUT = "timeout"

Run = Literal["short", "full"]


class Mutant(NamedTuple):
    """A fault.

    Attributes:
        name: says what it is.
        path: of the file, from the root.
        old: a text that stands in the file once.
        new: what stands there instead.
        near: the tests that are run first, "model" for tests/test_model.py.
    """

    name: str
    path: str
    old: str
    new: str
    near: tuple[str, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:12]

    @property
    def near_files(self) -> list[str]:
        return [f"tests/test_{stem}.py" for stem in self.near]


class Result(NamedTuple):
    """What became of a fault.

    Attributes:
        name, digest: the mutant's.
        by: the run that noticed it, or None.
        test: the first test that failed, or "timeout".
        seconds: that all its runs took.
        near_only: whether a fault that nobody near notices was left there.
    """

    name: str
    digest: str
    by: Run | None
    test: str
    seconds: float
    near_only: bool


class Step(NamedTuple):
    """A part of the tests: of one of the two runs, what is near or the rest."""

    by: Run
    near: bool


def load() -> list[Mutant]:
    """The faults of mutations.toml."""
    if sys.version_info < (3, 11):
        raise SystemExit("tests/mutations.py needs Python 3.11 or newer, which reads TOML")
    import tomllib

    found = tomllib.loads(DATA.read_text(encoding="utf-8"))["mutant"]
    return [Mutant(**{**each, "near": tuple(each["near"])}) for each in found]


def problems(mutants: Sequence[Mutant], root: Path) -> list[str]:
    """Why faults cannot be put into a tree, one line each."""
    names = [mutant.name for mutant in mutants]
    twice = sorted({name for name in names if names.count(name) > 1})
    return [f"{name}: there are two of this name" for name in twice] + [
        f"{mutant.name}: {what}" for mutant in mutants for what in _problems(mutant, root)
    ]


def _problems(mutant: Mutant, root: Path) -> Iterator[str]:
    for file in mutant.near_files:
        if not (root / file).is_file():
            yield f"{file} is not there"
    if not mutant.near:
        yield "it has no tests near it"
    path = root / mutant.path
    if not path.is_file():
        yield f"{mutant.path} is not there"
        return
    text = path.read_text(encoding="utf-8")
    count = text.count(mutant.old)
    if count != 1:
        yield f"its old text must stand once in {mutant.path}, and stands there {count} times"
        return
    changed = text.replace(mutant.old, mutant.new)
    try:
        if path.suffix == ".json":
            same = json.loads(changed) == json.loads(text)
        else:
            same = ast.dump(ast.parse(changed)) == ast.dump(ast.parse(text))
    except (SyntaxError, ValueError) as error:
        yield f"with it {mutant.path} cannot be read: {error}"
        return
    if same:
        yield f"it changes nothing in {mutant.path}"


class StoppedError(Exception):
    """Ctrl-C came: nothing is begun any more."""


class Children:
    """The processes that are running, so that all of them end with this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(
        self, command: Sequence[str], cwd: Path, environment: dict[str, str], seconds: float
    ) -> tuple[int | None, str]:
        """The exit status, None where the time was over, and what was printed.

        Raises:
            StoppedError: `stop` came before its end.
        """
        # No pipe: a process that it leaves behind would keep one open, and be waited for.
        with tempfile.TemporaryFile() as output:
            with self._lock:
                if self._stopped:
                    raise StoppedError
                child = subprocess.Popen(
                    command,
                    cwd=cwd,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    # A group of its own, which ends as a whole.
                    start_new_session=True,
                )
                self._running.add(child)
            status: int | None = None
            try:
                status = child.wait(seconds)
            except subprocess.TimeoutExpired:
                _end(child)
                child.wait()
            except BaseException:
                _end(child)
                raise
            finally:
                with self._lock:
                    self._running.discard(child)
            if self._stopped:
                raise StoppedError
            output.seek(0)
            return status, output.read().decode("utf-8", "replace")

    def stop(self) -> None:
        """Ends what is running, and lets nothing begin."""
        with self._lock:
            self._stopped = True
            for child in self._running:
                _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends a process with all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


class Tree:
    """A copy of the tree, in which one fault stands at a time."""

    def __init__(self, root: Path, children: Children, minutes: float) -> None:
        self.root = root
        self.children = children
        self.minutes = minutes
        folders = (root, root / "kernels", root / "benchmarks", root / "tests")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        self.environment |= {
            # For processes that tests start: the installed fastcls is the original tree's.
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "OMP_NUM_THREADS": "1",
            # A file that is changed and changed back within a second would be taken for what was compiled of it.
            "PYTHONDONTWRITEBYTECODE": "1",
            # The tests look for it beside the tree.
            "FASTCLS_SST2": os.environ.get("FASTCLS_SST2", str(ROOT.parent / "shared" / "data" / "sst2")),
        }

    def foreign(self) -> list[str]:
        """The packages that a process in another folder would not take from this copy."""
        names = ("fastcls", "fastcls_kernels", "fastcls_benchmarks")
        code = f"import {', '.join(names)}; print(*(each.__file__ for each in ({', '.join(names)})), sep=chr(10))"
        status, output = self.children.run([sys.executable, "-c", code], self.root.parent, self.environment, 600)
        if status:
            return [output.strip()]
        # Whatever a library prints comes first.
        return [path for path in output.splitlines()[-len(names) :] if not Path(path).is_relative_to(self.root)]

    @contextlib.contextmanager
    def fault(self, mutant: Mutant) -> Iterator[None]:
        """Inside the ``with`` block the fault stands in the copy."""
        path = self.root / mutant.path
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(text, encoding="utf-8")
            # Examples that failed would be tried again with the next fault.
            shutil.rmtree(self.root / ".hypothesis", ignore_errors=True)

    def judge(self, mutant: Mutant, near_only: bool) -> Result:
        """What the tests say of a fault."""
        began = time.monotonic()
        near = mutant.near_files
        with self.fault(mutant):
            test = short = self.failing(near, Step("short", near=True))
            if not short:
                test = self.failing(near, Step("full", near=True))
                # The rest takes minutes; where nobody near notices, a first look ends here.
                if test or not near_only:
                    short = self.failing(near, Step("short", near=False))
                    test = short or test or ("" if near_only else self.failing(near, Step("full", near=False)))
        by: Run | None = "short" if short else "full" if test else None
        return Result(mutant.name, mutant.digest, by, test, round(time.monotonic() - began, 1), near_only)

    def failing(self, near: Sequence[str], step: Step) -> str:
        """The first test of a part that fails, "timeout" if the time is over, "" if all pass."""
        status, output = self.run(near, step)
        if status is None:
            return TIMEOUT
        return "" if status in (PASSED, NO_TESTS) else _culprit(status, output)

    def run(self, near: Sequence[str], step: Step) -> tuple[int | None, str]:
        """pytest's exit status and what it printed."""
        files = near if step.near else [f"--ignore={file}" for file in near]
        # One process each: faults are what is shared out.
        alone = ["-n", "0"] if importlib.util.find_spec("xdist") else []
        options = ["-x", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", *alone]
        command = [sys.executable, "-m", "pytest", *options, *(["--full"] if step.by == "full" else []), *files]
        seconds = 60 * self.minutes * (1 if step.near else REST)
        return self.children.run(command, self.root, self.environment, seconds)


def _culprit(status: int, output: str) -> str:
    """The test or the file that failed, as pytest's summary names it; else what the process died of."""
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    if found:
        return found[1]
    if status < 0:
        return signal.Signals(-status).name
    if status == USAGE_ERROR and "conftest" not in output:
        raise RuntimeError(f"pytest was not called as it should be:\n{output}")
    return "tests/conftest.py" if status == USAGE_ERROR else f"exit status {status}"


def copy_tree(target: Path) -> None:
    """Copies what git tracks or would take up, and the compiled kernels."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    built = [str(path.relative_to(ROOT)) for path in ROOT.glob(BUILT)]
    for name in filter(None, [*listed.split("\0"), *built]):
        source = ROOT / name
        # A file that was deleted is listed until that is committed.
        if name not in LEFT_OUT and source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


def read_results(path: Path | None) -> dict[str, Result]:
    """By the mutants' names, of a file that an earlier run has written."""
    if path is None or not path.is_file():
        return {}
    found: dict[str, Result] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        # A run that was ended while it wrote leaves half a line.
        with contextlib.suppress(ValueError, TypeError):
            result = Result(**json.loads(line))
            found[result.name] = result
    return found


def is_settled(result: Result | None, mutant: Mutant, near_only: bool) -> bool:
    """Whether an earlier run has said of this very fault what is asked."""
    if result is None or result.digest != mutant.digest:
        return False
    return result.by is not None or near_only or not result.near_only


def line_of(result: Result) -> str:
    """A fault and who noticed it, for people who wait."""
    return f"{result.name}: {result.by or 'nobody'}, {result.seconds:.0f} s{', ' if result.test else ''}{result.test}"


def report(mutants: Sequence[Mutant], results: dict[str, Result]) -> str:
    """A table in Markdown and the figures."""
    finished = [(mutant, results[mutant.name]) for mutant in mutants if mutant.name in results]
    lines = ["| fault | in | noticed by | s | test |", "|---|---|---|---|---|"]
    for mutant, result in finished:
        nobody = "nobody near" if result.near_only else "nobody"
        cells = (mutant.name, mutant.path, result.by or nobody, f"{result.seconds:.0f}", result.test)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    short, full = noticed(result for _, result in finished)
    lines += ["", f"{len(finished)} of {len(mutants)} faults are judged."]
    lines.append(
        f"The full run notices {full} of them, the short run {short}{f' ({short / full:.1%})' if full else ''}."
    )
    timeouts = sum(result.test == TIMEOUT for _, result in finished)
    if timeouts:
        lines.append(f"Of {timeouts} more the time was over.")
    if any(result.near_only and result.by is None for _, result in finished):
        lines.append("What nobody near a fault notices was left there (--near-only).")
    for what, by in (("the short run misses", "full"), ("nobody notices", None)):
        names = [result.name for _, result in finished if result.by == by and result.test != TIMEOUT]
        if names:
            lines.append(f"What {what}: {', '.join(names)}.")
    return "\n".join(lines)


def noticed(results: Iterator[Result]) -> tuple[int, int]:
    """How many faults the short and the full run noticed, without those of which the time was over."""
    runs = [result.by for result in results if result.test != TIMEOUT]
    return runs.count("short"), len(runs) - runs.count(None)


def judge_all(
    mutants: Sequence[Mutant], trees: Sequence[Tree], near_only: bool, children: Children
) -> Generator[Result, None, None]:
    """Results as they come, one fault a tree at a time. Ctrl-C ends what is running, and then this."""
    free: SimpleQueue[Tree] = SimpleQueue()
    for tree in trees:
        free.put(tree)

    def judge(mutant: Mutant) -> Result:
        tree = free.get()
        try:
            return tree.judge(mutant, near_only)
        finally:
            free.put(tree)

    with ThreadPoolExecutor(len(trees)) as pool:
        waiting = [pool.submit(judge, mutant) for mutant in mutants]
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BaseException:
            for each in waiting:
                each.cancel()
            children.stop()
            raise


def check_tree(tree: Tree, mutants: Sequence[Mutant], baseline: bool) -> None:
    """Checks that a copy is fit for it: its own packages, all faults apply, and without one its tests pass.

    Raises:
        RuntimeError: they do not.
    """
    found = problems(mutants, tree.root)
    if found:
        raise RuntimeError("\n".join(found))
    foreign = tree.foreign()
    if foreign:
        raise RuntimeError(f"a copy must be imported from itself, and these are not: {', '.join(foreign)}")
    if not baseline:
        return
    near = sorted({file for mutant in mutants for file in mutant.near_files})
    typer.echo(f"Without a fault: {', '.join(near)}", err=True)
    status, output = tree.run(near, Step("short", near=True))
    if status != PASSED:
        raise RuntimeError(f"without a fault the tests must pass, and do not:\n{output[-6000:]}")


def chosen(only: Collection[str], path: str) -> list[Mutant]:
    """The faults that were asked for.

    Raises:
        typer.BadParameter: there is none of that name, or none at all.
    """
    everything = load()
    unknown = sorted(set(only) - {mutant.name for mutant in everything})
    if unknown:
        raise typer.BadParameter(f"there is no {', '.join(unknown)}; --list shows all", param_hint="--only")
    found = [each for each in everything if each.path.startswith(path) and (not only or each.name in only)]
    if not found:
        raise typer.BadParameter(f"no fault lies below {path}", param_hint="--path")
    return found


def main(
    check: Annotated[bool, typer.Option("--check", help="Only say whether all faults still apply.")] = False,
    list_them: Annotated[bool, typer.Option("--list", help="Only list them.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="This fault alone; may be repeated.")] = None,
    path: Annotated[str, typer.Option(help="Those in files whose paths begin so.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Faults at a time, each in a copy of its own.")] = 2,
    near_only: Annotated[
        bool, typer.Option("--near-only", help="What nobody notices near a fault is left there: a first look.")
    ] = False,
    no_baseline: Annotated[
        bool, typer.Option("--no-baseline", help="Do not run the tests near the faults without one before.")
    ] = False,
    minutes: Annotated[
        float, typer.Option(min=0.1, help=f"What a run near a fault may take, the rest {REST} times as much.")
    ] = 30,
    results: Annotated[
        Path | None, typer.Option(help="Keep results in this file, and leave out what it says already.")
    ] = None,
) -> None:
    """Puts faults into copies of the tree, and says which of them the tests notice."""
    # Whoever ends this ends its processes, too, which have groups of their own.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    mutants = chosen(only or (), path)
    if list_them:
        for mutant in mutants:
            typer.echo(f"{mutant.name}  {mutant.path}  {' '.join(mutant.near)}")
        return
    if check:
        found = problems(mutants, ROOT)
        typer.echo("\n".join(found) if found else f"All {len(mutants)} faults apply.", err=bool(found))
        raise typer.Exit(1 if found else 0)
    known = read_results(results)
    settled = {each.name: known[each.name] for each in mutants if is_settled(known.get(each.name), each, near_only)}
    left = [mutant for mutant in mutants if mutant.name not in settled]
    status = 0
    try:
        if left:
            _run(left, settled, jobs, near_only, not no_baseline, minutes, results)
    except RuntimeError as error:
        typer.echo(str(error), err=True)
        status = 2
    except KeyboardInterrupt:
        typer.echo("Interrupted: what was judged so far is kept.", err=True)
        status = INTERRUPTED
    typer.echo(report(mutants, settled))
    short, full = noticed(iter(settled.values()))
    raise typer.Exit(status or int(not full or short < ENOUGH * full))


def _run(
    mutants: Sequence[Mutant],
    settled: dict[str, Result],
    jobs: int,
    near_only: bool,
    baseline: bool,
    minutes: float,
    results: Path | None,
) -> None:
    """Adds to ``settled``, and to the file of results, as faults are judged."""
    children = Children()
    with (
        tempfile.TemporaryDirectory(prefix="mutations-", ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as kept,
    ):
        trees = [Tree(Path(folder).resolve() / str(job), children, minutes) for job in range(min(jobs, len(mutants)))]
        copy_tree(trees[0].root)
        check_tree(trees[0], mutants, baseline)
        for tree in trees[1:]:
            # Of the first copy, since others may be at work on the original.
            shutil.copytree(trees[0].root, tree.root)
        file = None if results is None else kept.enter_context(results.open("a", encoding="utf-8"))
        # Closed before the copies go, which processes may be at work in.
        found = kept.enter_context(contextlib.closing(judge_all(mutants, trees, near_only, children)))
        for number, result in enumerate(found, start=1):
            settled[result.name] = result
            typer.echo(f"{number}/{len(mutants)} {line_of(result)}", err=True)
            if file is not None:
                # Before it, too, where a line was left half written.
                file.write(f"\n{json.dumps(result._asdict())}\n")
                file.flush()


if __name__ == "__main__":
    typer.run(main)
