"""What all commands do alike: progress, errors in one line, exit statuses."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from typing import NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

stderr = Console(stderr=True)

_P = ParamSpec("_P")

# A shell's exit statuses after SIGINT and SIGPIPE; by number, since not every system has SIGPIPE.
INTERRUPTED, _CLOSED_PIPE = 130, 141


def fail(message: str) -> NoReturn:
    stderr.print(f"[bold red]Error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(2)


def expected_errors(command: Callable[_P, None]) -> Callable[_P, None]:
    """Shows errors that the user can mend in one line; any other error is a bug and keeps its traceback."""

    @wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            # The reader of our output is gone; Python would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(_CLOSED_PIPE) from None
        except KeyboardInterrupt:
            stderr.print("Interrupted.")
            raise typer.Exit(INTERRUPTED) from None
        except OSError as error:
            fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        # Of an optional package that is missing the message says how to install it.
        except (ValueError, TypeError, ImportError) as error:
            if not _is_ours(error):
                raise
            fail(str(error))

    return run


def _is_ours(error: BaseException) -> bool:
    """Whether one of our checks raised the error, and not a defect somewhere below."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module: str = frame.f_globals["__name__"]
    return module.split(".")[0] in ("fastcls", "fastcls_kernels", "fastcls_benchmarks")


def progress_bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=stderr,
        # A log file needs no animation.
        disable=not stderr.is_terminal,
        transient=True,
    )


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
