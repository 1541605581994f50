"""A small student of a fine-tuned teacher, distilled by fastcls on a CPU: the model of `fastcls demo` was made so.

    python examples/distill_sst2.py train.tsv dev.tsv --teacher teacher --out student

The teachers come from `finetune_sst2.py`. The student starts as a part of the first one: some of its layers, of each
the feed-forward neurons that its loss depends on most, and the embeddings of the pieces of words that the texts have
most often; other words are spelt by these pieces. Then it learns the teachers' logits on the training texts and on
others made of them: spans, halves of two texts, texts with words left out or replaced.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
import typer
from finetune_sst2 import (
    Labelled,
    Recipe,
    batch_of,
    check_curve,
    end,
    fit,
    judge,
    logits_of,
    read,
    tokens_of,
)
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import fastcls

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Letters up to here, Latin ones, stay in the vocabulary, so that every word of them can be spelt.
LAST_LETTER = "\u024f"
BATCH_SIZE = 64
# So many texts show what a teacher depends on.
NUM_IMPORTANT = 512


class Sizes(NamedTuple):
    """What is left of the teacher."""

    layers: list[int]
    neurons: int
    pieces: int
    positions: int


def importance(path: str, tokens: list[list[int]], labels: Tensor) -> list[Tensor]:
    """By how much a teacher's loss would change without each neuron, to the first order.

    Returns:
        Of each layer the sum over batches of |w * dL/dw|, (intermediate_size,), w being what a neuron gives to its
        layer's output.
    """
    # Without dropout, or the gradients would be those of a part of the model.
    options: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model: Any = BertForSequenceClassification.from_pretrained(path, dtype=torch.float32, **options)
    model.bert.embeddings.requires_grad_(False)
    fast: Any = fastcls.optimize(model).train()
    outputs: list[Any] = [layer.output.dense.weight for layer in model.bert.encoder.layer]
    totals = [torch.zeros(weight.shape[1]) for weight in outputs]
    for at in track(range(0, len(tokens), 16), description="What the teacher depends on"):
        fast(**batch_of(tokens[at : at + 16]), labels=labels[at : at + 16]).loss.backward()
        for total, weight in zip(totals, outputs, strict=True):
            total += (weight.detach() * weight.grad).sum(0).abs()
        fast.zero_grad()
    return totals


def smaller_vocabulary(tokenizer: Any, tokens: list[list[int]], size: int) -> list[str]:
    """The pieces to keep, in the teacher's order: special ones, single letters, and the most frequent of the texts'.

    Of pieces that are as frequent the teacher's first ones are kept, which are the more frequent ones of its language.

    Raises:
        typer.BadParameter: the letters alone are more than ``size``.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    needed = [
        piece
        for piece in vocabulary
        if piece in SPECIAL or (len(piece.removeprefix("##")) == 1 and piece[-1] <= LAST_LETTER)
    ]
    if size < len(needed):
        raise typer.BadParameter(f"--pieces must be at least {len(needed)}, the letters alone, got {size}")
    counts = Counter(chain.from_iterable(tokens))
    others = set(vocabulary).difference(needed)
    ordered = sorted(others, key=lambda piece: (-counts[vocabulary[piece]], vocabulary[piece]))
    return sorted([*needed, *ordered[: size - len(needed)]], key=vocabulary.__getitem__)


def tokenizer_of(tokenizer: Any, pieces: list[str], positions: int) -> PreTrainedTokenizerFast:
    """The teacher's tokenizer with these pieces alone."""
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = {piece: index for index, piece in enumerate(pieces)}
    made["model"]["vocab"] = ids
    made |= {"truncation": None, "padding": None}
    for token in made["added_tokens"]:
        token["id"] = ids[token["content"]]
    for name, token in made["post_processor"]["special_tokens"].items():
        token["ids"] = [ids[name]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)),
        **{f"{piece.strip('[]').lower()}_token": piece for piece in SPECIAL},
        model_max_length=positions,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def student_of(path: str, sizes: Sizes, kept: list[int], neurons: list[Tensor]) -> BertForSequenceClassification:
    """A smaller model with a part of the teacher's weights."""
    teacher: Any = BertForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    config = BertConfig.from_dict(
        {
            **teacher.config.to_dict(),
            "vocab_size": len(kept),
            "num_hidden_layers": len(sizes.layers),
            "intermediate_size": sizes.neurons,
            "max_position_embeddings": sizes.positions,
        }
    )
    student: Any = BertForSequenceClassification(config)
    state = teacher.state_dict()
    words, places = "bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight"
    state |= {words: state[words][kept], places: state[places][: sizes.positions]}
    for new, old in enumerate(sizes.layers):
        best = neurons[old].topk(sizes.neurons).indices.sort().values
        into, out = f"layer.{old}.intermediate.dense", f"layer.{old}.output.dense.weight"
        for name in list(state):
            if f".layer.{old}." not in name:
                continue
            value = state[name]
            value = value[best] if into in name else value[:, best] if out in name else value
            state[name.replace(f".layer.{old}.", f".kept.{new}.")] = value
    of_teacher = [name for name in state if ".layer." in name]
    for name in of_teacher:
        del state[name]
    student.load_state_dict({name.replace(".kept.", ".layer."): value for name, value in state.items()})
    return student


def variants(texts: list[str], each: int, words: list[str], seed: int) -> list[str]:
    """Other texts made of these, ``each`` as many: half of them shorter or mixed, half with other words."""
    draw = random.Random(seed)
    own = [word for text in texts for word in text.split()]
    made = []
    for text in texts * each:
        parts, kind = text.split(), draw.randrange(4)
        if kind == 0 and len(parts) > 3:
            length = draw.randint(2, len(parts) - 1)
            start = draw.randint(0, len(parts) - length)
            parts = parts[start : start + length]
        elif kind == 1:
            other = draw.choice(texts).split()
            parts = parts[: draw.randint(1, len(parts))] + other[draw.randrange(len(other)) :]
        else:
            share = draw.choice((0.1, 0.2, 0.3))
            changed = [draw.choice((draw.choice(own), draw.choice(words), "")) for _ in parts]
            parts = [new if draw.random() < share else old for old, new in zip(parts, changed, strict=True)]
        made.append(" ".join(filter(None, parts)) or text)
    return made


def teach(path: str, texts: list[str], cache: Path | None) -> Tensor:
    """A teacher's logits, (num_texts, num_labels); from the cache if the same teacher was asked the same before."""
    weights = (Path(path) / "model.safetensors").read_bytes()
    asked = hashlib.sha256("\n".join([hashlib.sha256(weights).hexdigest(), *texts]).encode()).hexdigest()
    known = None if cache is None else cache / f"{asked}.safetensors"
    if known is not None and known.is_file():
        return load_file(known)["logits"]
    tokens = tokens_of(AutoTokenizer.from_pretrained(path), texts)
    fast = fastcls.optimize(BertForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval())
    starts = range(0, len(tokens), 512)
    logits = torch.cat([logits_of(fast, tokens[at : at + 512]) for at in track(starts, f"Logits of {path}")])
    if known is not None:
        known.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logits": logits}, known)
    return logits


def distillation_loss(logits: Tensor, taught: Tensor, labels: Tensor, temperature: float, share: float) -> Tensor:
    """How far the student is from the teachers' softened answers, and for a share of it from the labels.

    Args:
        logits, taught: (num_texts, num_labels), the student's and the teachers'.
        labels: (num_texts,), -100 where a text has none.
    """
    soft = F.kl_div(
        (logits / temperature).log_softmax(1), (taught / temperature).log_softmax(1), log_target=True, reduction="none"
    )
    hard = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / len(labels)
    return (1 - share) * temperature**2 * soft.sum(1).mean() + share * hard


def save_small(model: Any, tokenizer: Any, out: Path) -> None:
    """A checkpoint with weights in float16, which is loaded in float32."""
    config = model.config.to_dict()
    half = BertForSequenceClassification(BertConfig.from_dict(config))
    half.load_state_dict(model.state_dict())
    # half() alone leaves the config's dtype, and save_pretrained writes that of the weights.
    torch.nn.Module.half(half).save_pretrained(out)
    path = out / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float32"}, indent=2) + "\n")
    tokenizer.save_pretrained(out)


def main(
    train: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Texts to learn from.")],
    dev: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Texts that choose the best checkpoint.")],
    teacher: Annotated[
        list[Path], typer.Option(exists=True, file_okay=False, help="A fine-tuned BERT; of several the mean teaches.")
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the checkpoint.")] = Path("student"),
    test: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Texts to be judged on once, at the end.")
    ] = None,
    layers: Annotated[str, typer.Option(help="The teacher's layers that stay, from 0, with commas.")] = "0,1,3,5",
    neurons: Annotated[int, typer.Option(min=1, help="Feed-forward neurons of a layer.")] = 384,
    pieces: Annotated[int, typer.Option(min=1, help="Size of the vocabulary.")] = 5400,
    positions: Annotated[int, typer.Option(min=1, help="Tokens of the longest text.")] = 256,
    each: Annotated[int, typer.Option(min=0, help="Texts to be made of each training text.")] = 3,
    epochs: Annotated[
        int, typer.Option(min=1, help="How often the training texts are gone through, each time with half of these.")
    ] = 6,
    learning_rate: Annotated[float, typer.Option(min=0, help="The largest, after the warm-up.")] = 3e-4,
    temperature: Annotated[float, typer.Option(min=0.1, help="By which logits are divided to soften them.")] = 2.0,
    label_share: Annotated[float, typer.Option(min=0, max=1, help="How much labels count beside the teachers.")] = 0.1,
    cache: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder that keeps the teachers' logits for another run.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the made texts, the order, and dropout.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(callback=check_curve, help="Write the learning curve here: .csv, .png, .pdf, .svg.")
    ] = None,
) -> None:
    """Distils a small student from fine-tuned teachers, and keeps what is best on the dev texts."""
    console = Console()
    learnt, chosen = read(train), read(dev)
    judged_last = None if test is None else read(test)
    paths = list(map(str, teacher))
    whole_tokenizer: Any = AutoTokenizer.from_pretrained(paths[0])
    num_layers = BertConfig.from_pretrained(paths[0]).num_hidden_layers
    sizes = Sizes(_layers(layers, num_layers), neurons, pieces, positions)
    of_teacher = tokens_of(whole_tokenizer, learnt.texts)
    vocabulary = smaller_vocabulary(whole_tokenizer, of_teacher, pieces)
    important = importance(paths[0], of_teacher[:NUM_IMPORTANT], torch.tensor(learnt.labels[:NUM_IMPORTANT]))
    ids = whole_tokenizer.get_vocab()
    student = student_of(paths[0], sizes, [ids[piece] for piece in vocabulary], important)
    tokenizer = tokenizer_of(whole_tokenizer, vocabulary, positions)

    words = sorted(piece for piece in ids if piece.isalpha() and piece <= "zz")
    texts = learnt.texts + variants(learnt.texts, each, words, seed)
    taught = torch.stack([teach(path, texts, cache) for path in paths]).mean(0)
    labels = torch.full((len(texts),), -100)
    labels[: len(learnt.labels)] = torch.tensor(learnt.labels)
    fast: Any = fastcls.optimize(student)
    tokens, dev_tokens = tokens_of(tokenizer, texts), tokens_of(tokenizer, chosen.texts)
    dev_labels = torch.tensor(chosen.labels)
    batches = _epochs(learnt, len(texts), epochs, seed)
    curve, whole = fit(
        fast,
        batches,
        sum(map(len, batches)),
        lambda rows: distillation_loss(
            fast(**batch_of([tokens[row] for row in rows])).logits, taught[rows], labels[rows], temperature, label_share
        ),
        lambda: judge(fast, dev_tokens, dev_labels),
        lambda: save_small(student, tokenizer, out),
        Recipe(learning_rate, parts=2),
        console,
        seed,
    )
    end(curve, whole, out, plot, console)
    size = sum(path.stat().st_size for path in out.iterdir())
    console.print(f"{out}: {size / 1e6:.1f} MB", highlight=False, soft_wrap=True)
    if judged_last is not None:
        best = fastcls.optimize(BertForSequenceClassification.from_pretrained(out).eval())
        accuracy, _ = judge(best, tokens_of(tokenizer, judged_last.texts), torch.tensor(judged_last.labels))
        console.print(f"Accuracy on {test}: {accuracy:.4f}", highlight=False, soft_wrap=True)


def _layers(given: str, available: int) -> list[int]:
    try:
        layers = [int(part) for part in given.split(",")]
    except ValueError:
        layers = []
    if not layers or sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= available:
        raise typer.BadParameter(f"--layers must be rising numbers from 0 to {available - 1}, got {given!r}")
    return layers


def _epochs(learnt: Labelled, count: int, epochs: int, seed: int) -> list[list[list[int]]]:
    """Of each epoch the batches: all training texts, and half of those made of them."""
    generator = torch.Generator().manual_seed(seed)
    first = len(learnt.texts)
    drawn = []
    for _ in range(epochs):
        made = first + torch.randperm(count - first, generator=generator)[: math.ceil((count - first) / 2)]
        rows = torch.cat((torch.arange(first), made))
        drawn.append([part.tolist() for part in rows[torch.randperm(len(rows), generator=generator)].split(BATCH_SIZE)])
    return drawn


if __name__ == "__main__":
    # Their bars and reports would stand between ours.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    typer.run(main)
