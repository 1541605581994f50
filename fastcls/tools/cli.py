"""The command line: classify, plan, serve, verify, demo, bench, doctor."""

from __future__ import annotations

import json
from itertools import tee
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .classify import classify
from .lines import count_lines, decoded_lines, labelled, opened, texts_of, write_utf8
from .options import Device, DType, Quantize, Threads
from .plan import plan
from .serve import serve
from .terminal import INTERRUPTED, expected_errors, fail, progress_bar, set_threads, stderr

app = typer.Typer(
    help="BERT classifiers that compute only what the label needs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Pairs = Annotated[bool, typer.Option("--pairs", help="Each line is two texts with a tab between.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long for the model.")]

app.command()(classify)
app.command()(plan)
app.command()(serve)


@app.command()
@expected_errors
def verify(
    model: Annotated[str, typer.Argument(help="A folder with a checkpoint of any supported head, or a hub name.")],
    file: Annotated[Path, typer.Argument(help="UTF-8 text, one text a line; - is standard input.")] = Path("-"),
    pairs: Pairs = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in a batch.")] = 32,
    truncate: Truncate = False,
    labelled_lines: Annotated[
        bool,
        typer.Option(
            "--labelled", help="Each line ends with a tab and its true label, by name or number: show accuracy, too."
        ),
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Compare the first so many texts.")] = None,
    reduced: Annotated[
        list[str] | None,
        typer.Option(
            help="bfloat16 or float16: compare both models in it with the float32 original, too. Can be given "
            "several times. Default: bfloat16, or with --quantize none, which leaves it out."
        ),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8: compare fastcls with products in it, on a CPU and in float32 alone.")
    ] = None,
    max_changed: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="With --quantize: status 1 if more percent of the labels changed. Default: 1.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Labels of fastcls in every dtype shown decide the exit status, too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output, for machines.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a histogram of the differences: .png, .pdf, .svg.")] = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16, for both models.")] = "float32",
    threads: Threads = None,
) -> None:
    """Compare a model with what fastcls makes of it, on your own texts.

    Shows the labels that changed, with both scores; how far logits differ, in
    reduced precision, too; and the time of each. Of multiple choice each line
    is a question and its choices, with tabs between. A model that fills masks
    predicts every token of a text without one.

    Exit status 0 if fastcls gives the original's answers, 1 if not, 2 for a
    mistake in what was asked, 130 after Ctrl-C (with a report of what was
    done). Not the original's answer is a label that changed by more than
    rounding explains, or a logit that is off by more than ten times that.
    Numbers that are infinite or none are never fine, whosever they are.

    Two computations of a logit may differ by three times the original's own
    rounding error: once for its own, and twice for fastcls's. It is measured
    against float64, on the first 64 texts and on each text in question. So
    rounding explains a changed label where the original preferred its own by
    at most twice that, since both logits may move. Where a model gives no
    labels, numbers that differ by more than that count instead.

    With --quantize rounding decides nothing, because int8 moves every logit by
    more. Exit status 1 then says that more labels changed than --max-changed
    allows, or that a number is not finite. Where a model gives no labels, only
    the latter counts.
    """
    if max_changed is not None and quantize is None:
        raise ValueError("--max-changed needs --quantize: without it rounding decides which labels may change")
    total = None if str(file) == "-" else count_lines(file)
    from ..loading import load_model, load_tokenizer, parse_device, parse_dtype, parse_quantize
    from .verify import check_picture, draw, show, task_of
    from .verify import verify as compare

    if plot is not None:
        check_picture(plot)
    if reduced is not None and "none" in reduced:
        if len(reduced) > 1:
            raise ValueError(f"--reduced none must stand alone, got {', '.join(reduced)}")
        reduced = []
    set_threads(threads)
    place, torch_dtype, products = parse_device(device), parse_dtype(dtype), parse_quantize(quantize)
    with stderr.status("Loading the model", spinner="dots"):
        tokenizer = load_tokenizer(model)
        original = load_model(model, place, torch_dtype, task=None)
    is_choice = task_of(original) == "multiple choice"
    if is_choice and pairs:
        raise ValueError("--pairs is not for multiple choice: each line is a question and its choices, tabs between")
    with opened(file) as source, progress_bar() as progress:
        lines = decoded_lines(source, str(file))
        labels = None
        if labelled_lines:
            rows, again = tee(labelled(lines, str(file)))
            lines, labels = (line for line, _ in rows), (label for _, label in again)
        texts = (line.split("\t") for line in lines) if is_choice else texts_of(lines, str(file), pairs)
        task = progress.add_task("texts", total=total if total is None or limit is None else min(total, limit))
        found = compare(
            original,
            tokenizer,
            texts,
            labels=labels,
            quantize=products,
            max_changed=max_changed,
            reduced=reduced,
            batch_size=batch_size,
            truncation=truncate,
            limit=limit,
            source=str(file),
            progress=lambda done: progress.update(task, completed=done),
        )
    write_utf8()
    if found.texts and as_json:
        typer.echo(json.dumps(found.to_json(), ensure_ascii=False, allow_nan=False))
    elif found.texts:
        show(found, Console(), strict=strict)
    if found.texts and plot is not None:
        draw(found, plot)
    if found.interrupted:
        stderr.print(f"Interrupted: {found.texts} texts compared.")
        raise typer.Exit(INTERRUPTED)
    if not found.fine(strict=strict):
        raise typer.Exit(1)


@app.command()
@expected_errors
def demo(
    model: Annotated[
        str | None, typer.Option(help="A checkpoint of yours (folder or hub name) instead of fastcls's own.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="A sentence of yours to be labelled. Can be given several times.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each variant is timed, if time allows.")] = 5,
    device: Device = None,
    dtype: DType = None,
    quantize: Quantize = None,
    threads: Threads = None,
) -> None:
    """See a model's labels, and transformers and fastcls side by side: agreement, time, and where the time went.

    Takes less than a minute and needs neither network nor GPU: without --model it
    labels English reviews by fastcls's own small sentiment model, and where the
    machine is fast enough times BERT-base's shape with random weights, too. On a
    terminal it then asks for sentences of yours; an empty line ends it.
    """
    from .demo import run_demo

    set_threads(threads)
    run_demo(model, rounds, device, dtype, Console(), stderr, quantize=quantize, texts=text or ())


@app.command()
@expected_errors
def bench(
    suite: Annotated[
        str, typer.Option(help="quick (a minute), default, release, rerankers ...: see --list.", rich_help_panel="What")
    ] = "default",
    model: Annotated[
        list[str] | None, typer.Option(help="This model instead of the suite's cases.", rich_help_panel="What")
    ] = None,
    lengths: Annotated[list[str] | None, typer.Option(help="Texts so long, likewise.", rich_help_panel="What")] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Batches of so many texts, likewise.", rich_help_panel="What")
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="By this one and the baseline alone.", rich_help_panel="What")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, float16 or bfloat16, likewise.", rich_help_panel="What")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Beside text-embeddings-inference or vLLM there.", rich_help_panel="What"),
    ] = None,
    list_choices: Annotated[bool, typer.Option("--list", help="Show all choices, and leave.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of results. Default: by date.")] = None,
    from_file: Annotated[Path | None, typer.Option("--from", help="Show an earlier results.json.")] = None,
    compare: Annotated[Path | None, typer.Option(help="What moved since an earlier results.json.")] = None,
    fail_above: Annotated[
        float | None, typer.Option(min=0, help="Status 1 if something is slower by more percent.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write a server's checkpoint here, and leave.")] = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Time fastcls and its peers side by side, after checking each one's answers.

    The options under "What" can be repeated; --model, --lengths, --batch-size and --dtype
    replace the suite's cases by all combinations. Ctrl-C keeps what was measured.
    """
    if fail_above is not None and compare is None:
        raise ValueError("--fail-above needs --compare: the results.json to compare with")
    own_cases = model or lengths or batch_size or provider or dtype
    if from_file is not None and (own_cases or server):
        raise ValueError(
            "--from measures nothing: --model, --lengths, --batch-size, --provider, --dtype and --server do not fit"
        )
    if server is not None and own_cases:
        raise ValueError("--server takes a suite's own cases: --model, --lengths and their like do not fit")
    if save is not None and (own_cases or server or from_file or compare or out):
        raise ValueError("--save measures nothing: beside it only --suite, --device and --threads fit")
    command = _bench_command()
    from fastcls_benchmarks.results import Report

    from ..loading import parse_device

    set_threads(threads)
    place = parse_device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {place}: suites are made for these")
    if list_choices:
        command.show_choices(place, Console())
        return
    if save is not None:
        Console().print(f"Written to {command.save_checkpoint(suite, save, place)}.", highlight=False)
        return
    old = Report.read(compare) if compare else None
    if from_file is not None:
        report = Report.read(from_file)
        folder = None if out is None else command.result_folder(out)
    else:
        folder = command.result_folder(out)
        options = (model or [], lengths or [], batch_size or [], provider or [], dtype or [], server)
        chosen = command.chosen_suite(suite, *options, place)
        if missing := command.pictures_missing():
            stderr.print(missing, style="yellow")
        report = command.measure(chosen, place, folder, stderr)
    console = Console()
    command.show(report, console)
    if folder is not None:
        written = command.write(report, folder)
        console.print(f"\nWritten to [bold]{escape(str(folder))}[/]: {', '.join(written)}.")
    fine = old is None or command.show_comparison(old, report, fail_above, console)
    if report.partial and from_file is None:
        raise typer.Exit(INTERRUPTED)
    if not fine:
        raise typer.Exit(1)


def _bench_command() -> ModuleType:
    try:
        from fastcls_benchmarks import command
    except ModuleNotFoundError as error:
        if error.name in ("pandas", "tomli"):
            fail(f'{error.name} is not installed: pip install "fastcls[bench]"')
        if error.name != "fastcls_benchmarks":
            raise
        fail("fastcls_benchmarks is not found: in a checkout that is not installed, add benchmarks/ to PYTHONPATH")
    return command


@app.command()
@expected_errors
def doctor(
    warm: Annotated[
        bool, typer.Option("--warm", help="Compile the GPU's kernels now; on a CPU say what packed weights take.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="With --warm: the checkpoint to compile for. Default: BERT-base's shapes.")
    ] = None,
    device: Device = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="With --warm: float32, float16 or bfloat16. Default: the checkpoint's own, or the usual one."
        ),
    ] = None,
) -> None:
    """Report what was found (torch, triton, GPU) and which path would run, and why."""
    from . import doctor

    if not warm:
        for name, given in (("--model", model), ("--device", device), ("--dtype", dtype)):
            if given is not None:
                raise ValueError(f"{name} is for --warm: add it, or leave {name} out")
    doctor.report(Console())
    if warm:
        doctor.warm(Console(), model, device, dtype)


def _version(show: bool) -> None:
    if show:
        from .. import __version__

        typer.echo(f"fastcls {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """BERT classifiers that compute only what the label needs."""
