"""How fast a classifier is on this machine: texts are streamed through it for some seconds."""

from __future__ import annotations

import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, cycle
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ..classifier import Classifier
from ..texts import Item
from ..tokenizing import Cut, length_limit, token_lists

# As many different texts as the largest window of `Classifier.stream`, where none may stand twice.
TEXTS = 4096
# Fewer where texts are long, so that they are made in a second or two.
_WORDS_IN_ALL = 2_000_000
_FEWEST_TEXTS = 64
_CANDIDATES = 20_000
WANTED_BLOCKS = 10
_WARM_UP_SECONDS = 1.0
# How many texts are tokenized at once for the tokenizer's own time, as a CPU's window.
_AT_ONCE = 256
_STAT = Path("/proc/stat")


class Block(NamedTuple):
    """Some neighbouring windows of texts: how many texts and tokens, and their seconds.

    Of several processes together it may end within a text.
    """

    texts: float
    tokens: float
    seconds: float


class Lengths(NamedTuple):
    """What the tokenizer makes of the texts.

    Attributes:
        tokens: of each text as it is computed, after cutting, special tokens included.
        mean: tokens of a text before cutting, on average.
        limit: the length that texts are cut to, None if there is none.
        cut: how many texts are longer than that.
        seconds: the tokenizer's own time for a text, on average.
    """

    tokens: list[int]
    mean: float
    limit: int | None
    cut: int
    seconds: float


class Measured(NamedTuple):
    """What a machine did.

    Attributes:
        lengths: of the texts.
        blocks: one after another.
        others: how many cores computed anything else meanwhile; None where the system does not tell.
        memory: see `peak_memory`; of several processes what one of them held at most.
        starting: seconds until the slowest of several processes was ready.
    """

    lengths: Lengths
    blocks: list[Block]
    others: float | None
    memory: dict[str, int]
    starting: float | None = None


def erlang_quantile(share: float) -> float:
    """A quantile of the gamma distribution with mean 1 and coefficient of variation 0.5, that is of shape 4."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        below = 1 - math.exp(-middle) * (1 + middle + middle**2 / 2 + middle**3 / 6)
        low, high = (middle, high) if below < share else (low, middle)
    return low / 4


def made_lengths(mean: float, count: int) -> list[int]:
    """Numbers of words, at least 1, that spread around a mean as `erlang_quantile` does; their sum is exact.

    Args:
        mean: words of a text, at least 1.
        count: how many texts.

    Returns:
        (count,) in a random order, the same each time.
    """
    lengths = [max(1, round(mean * erlang_quantile((row + 0.5) / count))) for row in range(count)]
    surplus = sum(lengths) - round(mean * count)
    step = 1 if surplus > 0 else -1
    row = count - 1
    # Rounding, and the least length, moved the mean: the longest texts give or take the difference, a word each.
    while surplus != 0:
        if lengths[row] - step >= 1:
            lengths[row] -= step
            surplus -= step
        row = (row or count) - 1
    random.Random(0).shuffle(lengths)
    return lengths


def made_texts(tokenizer: PreTrainedTokenizerBase, mean_tokens: float) -> list[str]:
    """Texts of words that are a token each, so long on average, special tokens included.

    Raises:
        ValueError: the special tokens leave no room for a word, or the vocabulary has no words.
    """
    special = tokenizer.num_special_tokens_to_add(pair=False)
    if mean_tokens < special + 1:
        raise ValueError(
            f"--mean-tokens must be at least {special + 1}, this model's {special} special tokens and a word, "
            f"got {mean_tokens:g}"
        )
    words = _words(tokenizer)
    mean = mean_tokens - special
    count = min(TEXTS, max(_FEWEST_TEXTS, int(_WORDS_IN_ALL / mean)))
    draw = random.Random(0)
    # The first words differ, so that texts do even if they are short.
    return [
        " ".join([words[row % len(words)], *draw.choices(words, k=length - 1)])
        for row, length in enumerate(made_lengths(mean, count))
    ]


def _words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words of the vocabulary that are one token wherever they stand, in a random order, the same each time."""
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    random.Random(0).shuffle(ids)
    decoded = (str(tokenizer.decode([token])).strip() for token in ids[:_CANDIDATES])
    candidates = list(dict.fromkeys(word for word in decoded if word.isalpha()))
    if candidates:
        twice = tokenizer([f"{word} {word}" for word in candidates], add_special_tokens=False)["input_ids"]
        words = [
            word
            for word, tokens in zip(candidates, twice, strict=True)
            if len(tokens) == 2 and tokenizer.unk_token_id not in tokens
        ]
        if words:
            return words
    raise ValueError("--mean-tokens needs a vocabulary that has words, which this model's has not: use --like")


def lengths_of(classifier: Classifier, texts: Sequence[str]) -> Lengths:
    """Tokenizes the texts alone, cut as a run cuts them, and counts."""
    tokenizer = classifier.tokenizer
    limit = length_limit(tokenizer, classifier.model.spec.max_positions)
    items = [Item(text, None) for text in texts]
    windows = [(first, items[first : first + _AT_ONCE]) for first in range(0, len(items), _AT_ONCE)]
    # The first call sets the tokenizer's own state.
    token_lists(tokenizer, windows[0][1], 0, Cut("longest_first", limit))
    began = time.perf_counter()
    tokens = [
        len(ids)
        for first, window in windows
        for ids in token_lists(tokenizer, window, first, Cut("longest_first", limit))[0]
    ]
    seconds = time.perf_counter() - began
    # Only a text that reached the limit may be longer than it.
    full = [item for item, length in zip(items, tokens, strict=True) if length == limit]
    whole = [len(ids) for ids in token_lists(tokenizer, full, 0, Cut(False, None))[0]] if full else []
    mean = (sum(tokens) - len(full) * (limit or 0) + sum(whole)) / len(tokens)
    return Lengths(tokens, mean, limit, sum(length > (limit or 0) for length in whole), seconds / len(texts))


def measure_alone(
    classifier: Classifier, texts: Sequence[str], seconds: float, progress: Callable[[float], None]
) -> Measured:
    """Measures in this process: see `measure`."""
    lengths = lengths_of(classifier, texts)
    others, began = others_seconds(), time.perf_counter()
    blocks = measure(classifier, texts, lengths.tokens, seconds, progress)
    took, others_after = time.perf_counter() - began, others_seconds()
    busy = None if others is None or others_after is None else max(0.0, (others_after - others) / took)
    return Measured(lengths, blocks, busy, peak_memory(classifier.model.device))


def measure(
    classifier: Classifier,
    texts: Sequence[str],
    tokens: Sequence[int],
    seconds: float,
    progress: Callable[[float], None],
    is_over: Callable[[], bool] = lambda: True,
) -> list[Block]:
    """Streams the texts, again and again, and times blocks of whole windows.

    What is timed is a steady stream: the first windows, at least one and a second of them, are left out, and no block
    waits for the last of its results.

    Args:
        classifier: what to measure.
        texts: in an order that stands for the whole of them.
        tokens: of each text, as it is computed.
        seconds: how long to measure; a window that has begun is ended, and one is always measured.
        progress: is called after each block with the seconds done.
        is_over: is asked after each block once the seconds are over, whether to end.

    Returns:
        At least one block; fewer than ten where a window takes more than a tenth of the time.
    """
    before = [0, *accumulate(tokens)]

    def tokens_of_first(count: int) -> int:
        rounds, rest = divmod(count, len(texts))
        return rounds * before[-1] + before[rest]

    blocks: list[Block] = []
    done = counted = 0
    warm_up = min(_WARM_UP_SECONDS, seconds / WANTED_BLOCKS)
    began = time.perf_counter()

    def source() -> Iterator[str]:
        nonlocal counted
        start: tuple[float, int] | None = None
        first = 0.0
        for text in cycle(texts):
            # A text is asked for after results came: a window has ended.
            if done > counted:
                counted, now = done, time.perf_counter()
                if start is None:
                    if now - began >= warm_up:
                        start, first = (now, done), now
                elif now - start[0] >= seconds / WANTED_BLOCKS:
                    known = tokens_of_first(done) - tokens_of_first(start[1])
                    blocks.append(Block(done - start[1], known, now - start[0]))
                    start = (now, done)
                    progress(now - first)
                    if now - first >= seconds and is_over():
                        return
            yield text

    for _ in classifier.stream(source(), truncation=True):
        done += 1
    return blocks


def quartiles(blocks: Iterable[Block]) -> tuple[float, float, float]:
    """Tokens a second: lower quartile, median and upper quartile of the blocks."""
    rates = [block.tokens / block.seconds for block in blocks]
    if len(rates) == 1:
        return rates[0], rates[0], rates[0]
    low, middle, high = statistics.quantiles(rates, n=4, method="inclusive")
    return low, middle, high


def others_seconds() -> float | None:
    """Seconds that the cores of this process have computed anything else, since some time in the past.

    Time that a virtual machine's host took away is counted, too. None where the system does not tell.
    """
    try:
        lines = _STAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    own = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for name, *numbers in map(str.split, filter(None, lines)):
        if name in own:
            # Of user, nice, system, idle, iowait, irq, softirq, steal: all but idle and iowait.
            ticks += sum(map(int, (*numbers[:3], *numbers[5:8])))
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes that this process held at most: "host" where the system tells, "device" on a GPU."""
    found = {}
    if sys.platform != "win32":
        import resource

        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        found["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        found["device"] = torch.cuda.max_memory_reserved(device)
    return found
