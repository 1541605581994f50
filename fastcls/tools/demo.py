"""The newcomer's first minute: a model's labels, and transformers and fastcls side by side on the same texts."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..classifier import Classifier
from ..conversion import optimize
from ..engine.spec import LastLayer, Quantize
from ..loading import load_model, load_tokenizer, parse_device, parse_dtype, parse_quantize
from ..tokenizing import length_limit
from . import demo_model

BATCH_SIZE = 32
# Letters of a text.
_MOST_SHOWN = 300
# The whole demo is to end within a minute on two cores. After so long no further round of a model is begun, and
# BERT-base is left out if its calls before the rounds and its first round would take longer than this.
_SECONDS, _SECONDS_FOR_BASE = 15.0, 30.0
# The weights of BERT-base's layers, to which its time is roughly proportional.
_WEIGHTS_OF_BASE = 85_054_464
_DEMO_MODEL = (
    "fastcls's own sentiment model: BERT with 4 layers and 6 million weights, which has learnt from English film "
    "reviews and is right about [bold]86.6%[/] of SST-2's test sentences. What it says of these:\n"
)

_RUNGS: tuple[tuple[LastLayer, str], ...] = (
    ("full", "fastcls: no padding"),
    ("selected", "  + last layer for [CLS] only"),
    ("absorbed", "  + its keys and values not made"),
)


class _Variant(NamedTuple):
    name: str
    classify: Callable[[BatchEncoding], Tensor]


def run_demo(
    name_or_path: str | None,
    rounds: int,
    device: str | None,
    dtype: str | None,
    out: Console,
    progress: Console,
    *,
    quantize: str | None = None,
    texts: Sequence[str] = (),
) -> None:
    """Runs the demo and prints its tables to ``out``, its progress to ``progress``.

    Args:
        name_or_path: a classifier, or None for fastcls's own (`demo_model`), and for the speed of BERT-base's shape.
        rounds: how often each variant is timed at most.
        device, dtype: None is the GPU if there is one, and the model's own dtype, or bfloat16 on a GPU.
        quantize: "int8" shows its products as a further step.
        texts: of the reader's own, which are labelled, too.
    """
    target, torch_dtype, products = parse_device(device), parse_dtype(dtype), parse_quantize(quantize)
    if name_or_path is None and torch_dtype is None and target.type == "cuda":
        torch_dtype = torch.bfloat16
    path = name_or_path or demo_model()
    with progress.status(f"Loading {name_or_path or 'the model'}"):
        tokenizer = load_tokenizer(path)
        model = load_model(path, target, torch_dtype)
        classifier = Classifier(model, tokenizer, truncation=True)
    if name_or_path is None:
        out.print(_DEMO_MODEL, highlight=False)
        _show_labels(out, classifier, [*_lines("reviews.txt"), *texts])
        out.print()
    elif texts:
        _show_labels(out, classifier, texts)
        out.print()
    seconds = _compare(name_or_path or "The same model", model, tokenizer, rounds, out, progress, products)
    if name_or_path is None:
        weights = model.num_parameters(exclude_embeddings=True)
        # Two calls of each variant, and of the larger products a weight takes half as long.
        expected = seconds * _WEIGHTS_OF_BASE / weights
        out.print()
        if expected <= _SECONDS_FOR_BASE:
            with progress.status("Building a model of BERT-base's shape"):
                own_tokenizer, large = sample_tokenizer(sample_texts()), _random_bert_base(target, torch_dtype)
            name = "BERT-base's shape, [bold]random weights: its labels mean nothing[/], its speed does"
            _compare(name, large, own_tokenizer, rounds, out, progress, products)
        else:
            out.print(
                f"BERT-base's shape is left out: it would take this machine some {expected:.0f} s now.", highlight=False
            )
    out.print(
        "\nNow with your own: [bold]fastcls demo --model PATH[/], [bold]fastcls classify PATH FILE[/], or in Python "
        "[bold]fast = fastcls.optimize(model)[/].",
        highlight=False,
    )
    if sys.stdin is not None and sys.stdin.isatty() and out.is_terminal:
        _ask(out, classifier)


def _ask(out: Console, classifier: Classifier) -> None:
    """Labels what the reader types, a sentence at a time, until an empty line or the end of the input."""
    while True:
        try:
            text = out.input("\nA sentence of yours (an empty line ends): ").strip()
        except EOFError:
            out.print()
            return
        if not text:
            return
        _show_labels(out, classifier, [text])


def _show_labels(out: Console, classifier: Classifier, texts: Sequence[str]) -> None:
    """Each text's label and its score, as a table."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for text, label in zip(texts, classifier(list(texts)), strict=True):
        shown = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
        table.add_row(f"[bold]{escape(str(label['label']))}[/]", f"{label['score']:.1%}", escape(shown))
    out.print(table)


def _compare(
    title: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rounds: int,
    out: Console,
    progress: Console,
    products: Quantize | None,
) -> float:
    """A model beside what fastcls makes of it: agreement, time, and where the time went.

    Returns:
        How many seconds a round took.
    """
    texts, target = sample_texts(), model.device
    with progress.status("Converting the model"):
        fast = optimize(model)
        if target.type == "cpu":
            fast.warm_up()
        # Where the compiled kernels take all layers whole, the last one makes keys and values whatever is asked for.
        rungs = _RUNGS if fast.own_encoder.packed.stack is None else _RUNGS[:-1]
        quantised = None if products is None else optimize(model, quantize=products)
        if quantised is not None and quantised.quantize is None:
            # It cannot be fast here: a warning has said why.
            quantised = None
    batches = [
        tokenizer(
            texts[start : start + BATCH_SIZE],
            padding=True,
            truncation=True,
            max_length=length_limit(tokenizer, fast.spec.max_positions),
            return_tensors="pt",
        ).to(target)
        for start in range(0, len(texts), BATCH_SIZE)
    ]
    _describe(out, title, model, batches, len(texts))

    def rung(last_layer: LastLayer) -> Callable[[BatchEncoding], Tensor]:
        def classify(batch: BatchEncoding) -> Tensor:
            fast.last_layer = last_layer
            return fast(**batch).logits

        return classify

    variants = [_Variant(f"transformers ({model.config._attn_implementation})", lambda batch: model(**batch).logits)]
    variants += [_Variant(name, rung(last_layer)) for last_layer, name in rungs]
    if quantised is not None:
        variants.append(_Variant(f"  + products in {products}", lambda batch: quantised(**batch).logits))
    with torch.inference_mode():
        logits, seconds = _time(variants, batches, rounds, progress)
    _show_agreement(out, logits[0], logits[len(rungs)])
    if quantised is not None:
        _show_agreement(out, logits[0], logits[-1], f" in {products}")
    _show_ladder(out, [variant.name for variant in variants], seconds)
    return sum(map(statistics.median, seconds))


def sample_texts() -> list[str]:
    """The project's own short texts: reviews, questions and news lines of one word to a hundred."""
    return _lines("sample_texts.txt")


def _lines(name: str) -> list[str]:
    return files("fastcls.tools").joinpath(f"data/{name}").read_text(encoding="utf-8").splitlines()


def sample_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer like BERT's, learnt from the texts themselves: no download, real lengths."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=4000, special_tokens=special))
    # The trainer numbers the special tokens first, in the order given.
    separator, classifier = (("[SEP]", special.index("[SEP]")), ("[CLS]", special.index("[CLS]")))
    tokenizer.post_processor = processors.BertProcessing(separator, classifier)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _random_bert_base(device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig()).eval()
    torch.nn.Module.to(model, device=device, dtype=dtype)
    return model


def _describe(out: Console, title: str, model: PreTrainedModel, batches: list[BatchEncoding], texts: int) -> None:
    out.print(f"{title}: {type(model).__name__}, {model.config.num_hidden_layers} layers", highlight=False)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    padded = sum(batch["attention_mask"].numel() for batch in batches)
    where = f"{torch.get_num_threads()} CPU threads" if model.device.type == "cpu" else str(model.device)
    out.print(
        f"{texts} texts in batches of {BATCH_SIZE}: {real} tokens, {padded} with padding "
        f"({1 - real / padded:.0%} of the work is padding). {str(model.dtype).removeprefix('torch.')} on {where}.\n",
        highlight=False,
    )


def _time(
    variants: list[_Variant], batches: list[BatchEncoding], rounds: int, console: Console
) -> tuple[list[Tensor], list[list[float]]]:
    """Each variant's logits, and its seconds in each round.

    The first call of each warms it up and gives the logits. A round runs all variants in a random order, so that drift
    hits all. No round is begun after `_SECONDS`, but for the first.
    """
    draw, began = random.Random(0), time.perf_counter()
    seconds: list[list[float]] = [[] for _ in variants]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Timing", total=(1 + rounds) * len(variants))
        logits = []
        for variant in variants:
            logits.append(torch.cat([variant.classify(batch) for batch in batches]).float())
            bar.advance(task)
        for number in range(rounds):
            if number > 0 and time.perf_counter() - began > _SECONDS:
                break
            for index in draw.sample(range(len(variants)), len(variants)):
                started = time.perf_counter()
                for batch in batches:
                    variants[index].classify(batch)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[index].append(time.perf_counter() - started)
                bar.advance(task)
    return logits, seconds


def _show_agreement(out: Console, theirs: Tensor, ours: Tensor, where: str = "") -> None:
    equal = int((theirs.argmax(-1) == ours.argmax(-1)).sum())
    out.print(
        f"[bold]Agreement{where}[/]  largest logit difference {float((theirs - ours).abs().max()):.1e}, "
        f"labels equal {equal} of {len(theirs)}",
        highlight=False,
    )


def _saved(before: list[float], after: list[float]) -> str:
    """Milliseconds between two medians, or "within noise" if they are not more than the samples' scatter."""
    medians = [statistics.median(samples) for samples in (before, after)]
    scatter = sum(
        statistics.median(abs(sample - median) for sample in samples)
        for samples, median in zip((before, after), medians, strict=True)
    )
    difference = medians[0] - medians[1]
    return "within noise" if abs(difference) <= scatter else f"{difference * 1e3:.0f}"


def _show_ladder(out: Console, names: list[str], seconds: list[list[float]]) -> None:
    medians = [statistics.median(samples) for samples in seconds]
    table: Any = Table(title="Time", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for heading, justify in (("", "left"), ("ms", "right"), ("saved by this step", "right"), ("times faster", "right")):
        table.add_column(heading, justify=justify)
    for index, (name, median) in enumerate(zip(names, medians, strict=True)):
        saved = "" if index == 0 else _saved(seconds[index - 1], seconds[index])
        table.add_row(name.replace("[CLS]", r"\[CLS]"), f"{median * 1e3:.0f}", saved, f"{medians[0] / median:.2f}")
    out.print(table)
    spread = max((max(samples) - min(samples)) / statistics.median(samples) for samples in seconds)
    rounds = f"{len(seconds[0])} interleaved rounds"
    said = f"Medians of {rounds}; the widest spread was {spread:.0%}." if len(seconds[0]) > 1 else "Times of one round."
    out.print(said, highlight=False)
