"""A server in processes of its own: it is started, measured and ended with all that it started. On Linux."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

SECONDS_TO_START = 180
_SECONDS_TO_END = 30
_LINES_OF_LOG = 20


class Process(NamedTuple):
    """A process: its number, which may be given again, and when it started, which tells it from a later one."""

    pid: int
    started: int


class Server:
    """A server, from the start of its processes to their end: ``with Server(...)`` waits until it answers.

    Args:
        name: for messages.
        command: what starts it.
        url: of the route that answers once it is ready.
        environment: for it, beside this process's own.
    """

    def __init__(self, name: str, command: list[str], url: str, environment: Mapping[str, str]) -> None:
        self.name, self.command, self.url = name, command, url
        self._environment = {**os.environ, **environment}

    def __enter__(self) -> Server:
        # What it says is read when it is over. A pipe that nobody reads would stop it.
        self._log = tempfile.TemporaryFile()
        # Ctrl-C is for this process, which then ends its servers.
        self._popen = subprocess.Popen(
            self.command, stdout=self._log, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
        )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _wait(self) -> None:
        """Until it answers.

        Raises:
            ValueError: it ended before, or takes too long.
        """
        until = time.monotonic() + SECONDS_TO_START
        while self._popen.poll() is None and time.monotonic() < until:
            if _answers(self.url):
                return
            time.sleep(0.1)
        code = self._popen.poll()
        why = f"does not answer after {SECONDS_TO_START} s" if code is None else f"ended with status {code}"
        raise ValueError(f"{self.name} did not start: it {why}. It said last:\n{self.said()}")

    def said(self) -> str:
        """The last lines of its log."""
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-_LINES_OF_LOG:])

    def resident(self) -> float:
        """MiB of all its processes; of several, what they share counts several times."""
        return sum(_resident(each.pid) for each in processes_of(self._popen.pid))

    def stop(self) -> None:
        """Ends it and, if it leaves processes behind, those."""
        started = set(processes_of(self._popen.pid))
        try:
            self._popen.terminate()
            self._popen.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Those, too, that came while it ended.
            left = started | set(processes_of(self._popen.pid))
            for each in left & _processes().keys():
                _kill(each.pid)
            self._popen.kill()
            self._popen.wait()
            # They are nobody's children here, so that nobody can wait for their end.
            until = time.monotonic() + _SECONDS_TO_END
            while left & _processes().keys() and time.monotonic() < until:
                time.sleep(0.01)
            self._log.close()


@contextmanager
def running(url: str) -> Iterator[None]:
    """A server that somebody else started.

    Raises:
        ValueError: it does not answer.
    """
    if not _answers(url):
        raise ValueError(f"no server answers at {url}")
    yield


def processes_of(first: int) -> list[Process]:
    """A process with all that it started, and what those left behind in its session."""
    found = _processes()
    ours, size = {first}, 0
    while len(ours) > size:
        size = len(ours)
        ours |= {each.pid for each, (parent, session) in found.items() if parent in ours or session == first}
    return [each for each in found if each.pid in ours]


def _processes() -> dict[Process, tuple[int, int]]:
    """All that run, with parent and session."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            # After the name, which may hold anything: state, parent, group, session, ..., and as 20th the start.
            fields = (path / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            found[Process(int(path.name), int(fields[19]))] = int(fields[1]), int(fields[3])
    return found


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _resident(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def _answers(url: str) -> bool:
    data = json.dumps({"inputs": "Is anybody there?"}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False
    except Exception:
        # Half an answer, of a server that is starting.
        return False
