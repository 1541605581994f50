"""The newcomer's first minute: transformers and fastcls side by side on the same texts."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from rich.console import Console
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

from ..conversion import optimize
from ..engine.spec import LastLayer
from ..loading import load_model, load_tokenizer, parse_device, parse_dtype, parse_quantize
from ..texts import length_limit

BATCH_SIZE = 32

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
) -> None:
    """Runs the demo and prints its tables to ``out``, its progress to ``progress``."""
    target, torch_dtype, products = parse_device(device), parse_dtype(dtype), parse_quantize(quantize)
    texts = sample_texts()
    with progress.status("Building the model" if name_or_path is None else f"Loading {name_or_path}"):
        if name_or_path is None:
            tokenizer: PreTrainedTokenizerBase = sample_tokenizer(texts)
            model = _random_bert_base(target, torch_dtype)
        else:
            tokenizer = load_tokenizer(name_or_path)
            model = load_model(name_or_path, target, torch_dtype)
        fast = optimize(model)
        if target.type == "cpu":
            fast.warm_up()
        # Where the compiled kernels take all layers whole, the last one makes keys and values whatever is asked for.
        rungs = _RUNGS if fast.encoder.packed.stack is None else _RUNGS[:-1]
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
    _describe(out, name_or_path, model, batches, len(texts))

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
        # The first call of each variant warms it up and gives the logits to compare.
        logits = [torch.cat([variant.classify(batch) for batch in batches]).float() for variant in variants]
        seconds = _time(variants, batches, rounds, progress)
    _show_agreement(out, logits[0], logits[len(rungs)])
    if quantised is not None:
        _show_agreement(out, logits[0], logits[-1], f" in {products}")
    _show_ladder(out, [variant.name for variant in variants], seconds)
    out.print(
        "\nNow with your own: [bold]fastcls demo --model PATH[/], [bold]fastcls classify PATH FILE[/], or in Python "
        "[bold]fast = fastcls.optimize(model)[/].",
        highlight=False,
    )


def sample_texts() -> list[str]:
    """The project's own short texts: reviews, questions and news lines of one word to a hundred."""
    return files("fastcls.tools").joinpath("data/sample_texts.txt").read_text(encoding="utf-8").splitlines()


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
    torch.nn.Module.to(model, device=device, dtype=dtype or (torch.bfloat16 if device.type == "cuda" else None))
    return model


def _describe(out: Console, name: str | None, model: PreTrainedModel, batches: list[BatchEncoding], texts: int) -> None:
    if name is None:
        out.print(
            "A BERT-base-shaped classifier with [bold]random weights: its labels mean nothing[/], "
            "its speed and its exactness do."
        )
    else:
        out.print(f"{name}: {type(model).__name__}, {model.config.num_hidden_layers} layers", highlight=False)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    padded = sum(batch["attention_mask"].numel() for batch in batches)
    where = f"{torch.get_num_threads()} CPU threads" if model.device.type == "cpu" else str(model.device)
    out.print(
        f"{texts} texts in batches of {BATCH_SIZE}: {real} tokens, {padded} with padding "
        f"({1 - real / padded:.0%} of the work is padding). {str(model.dtype).removeprefix('torch.')} on {where}.\n",
        highlight=False,
    )


def _time(variants: list[_Variant], batches: list[BatchEncoding], rounds: int, console: Console) -> list[list[float]]:
    """Seconds of each variant in each round; a round runs all variants in a random order, so that drift hits all."""
    order = random.Random(0)
    seconds: list[list[float]] = [[] for _ in variants]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Timing", total=rounds * len(variants))
        for _ in range(rounds):
            for index in order.sample(range(len(variants)), len(variants)):
                started = time.perf_counter()
                for batch in batches:
                    variants[index].classify(batch)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[index].append(time.perf_counter() - started)
                bar.advance(task)
    return seconds


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
    out.print(f"Medians of {len(seconds[0])} interleaved rounds; the widest spread was {spread:.0%}.", highlight=False)
