"""Texts in, labels out: against transformers' own pipeline, and on input of every kind."""

from __future__ import annotations

import copy
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import live_bytes, tiny_bert
from transformers import PreTrainedTokenizerBase

import fastcls
from fastcls.demo import sample_texts, sample_tokenizer

# Its overloads know no model but transformers' own.
pipeline: Any = transformers.pipeline

TEXTS = [
    "a visually stunning rumination on love",
    "the plot is nothing but boilerplate cliches from start to finish",
    "",
    "ok",
]
PAIRS = [("is it raining?", "rain is expected by noon"), ("where is it?", "here")]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return sample_tokenizer(sample_texts())


def sample_bert(tokenizer: PreTrainedTokenizerBase, **overrides: Any) -> Any:
    return tiny_bert(vocab_size=len(tokenizer), **overrides)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A fine-tuned model's folder, as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    names = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    sample_bert(tokenizer, **names).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def classifier(checkpoint: Path, device: str) -> fastcls.Classifier:
    return fastcls.Classifier.from_pretrained(checkpoint, device=device)


def assert_same(actual: Any, expected: Any) -> None:
    """Equal labels in equal structure, scores to float32's rounding in a softmax."""
    if isinstance(expected, list):
        assert isinstance(actual, list)
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
        return
    assert actual["label"] == expected["label"]
    assert actual["score"] == pytest.approx(expected["score"], abs=1e-5)


CONFIGS: dict[str, dict[str, Any]] = {
    "three_labels": {},
    "one_label": {"num_labels": 1},
    "regression": {"num_labels": 1, "problem_type": "regression"},
    "multi_label": {"problem_type": "multi_label_classification"},
    "single_label": {"problem_type": "single_label_classification"},
}


@pytest.mark.parametrize("overrides", list(CONFIGS.values()), ids=list(CONFIGS))
def test_answers_are_those_of_the_pipeline(tokenizer: PreTrainedTokenizerBase, overrides: dict[str, Any]) -> None:
    model = sample_bert(tokenizer, **overrides)
    theirs = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    ours = fastcls.Classifier(model, tokenizer)
    as_mappings = [{"text": text, "text_pair": pair} for text, pair in PAIRS]
    assert_same(ours(TEXTS), theirs(TEXTS))
    assert_same(ours(TEXTS[0]), theirs(TEXTS[0]))
    assert_same(ours(TEXTS[0], top_k=None), theirs(TEXTS[0], top_k=None))
    assert_same(ours(TEXTS, top_k=2), theirs(TEXTS, top_k=2))
    assert_same(ours(PAIRS), theirs(as_mappings))
    assert_same(ours(as_mappings), theirs(as_mappings))
    assert_same(ours(TEXTS, function_to_apply="none"), theirs(TEXTS, function_to_apply="none"))


def test_a_tokenizer_without_types_means_type_0(tokenizer: PreTrainedTokenizerBase) -> None:
    model, plain = sample_bert(tokenizer), copy.deepcopy(tokenizer)
    plain.model_input_names = ["input_ids", "attention_mask"]
    theirs = pipeline("text-classification", model=model, tokenizer=plain, device="cpu")
    as_mappings = [{"text": text, "text_pair": pair} for text, pair in PAIRS]
    assert_same(fastcls.Classifier(model, plain)(PAIRS), theirs(as_mappings))
    assert fastcls.Classifier(model, plain)(PAIRS) != fastcls.Classifier(model, tokenizer)(PAIRS)


@pytest.mark.parametrize("make", [lambda: tiny_bert().bert, lambda: fastcls.optimize(tiny_bert().bert)])
def test_a_model_that_does_not_classify_is_refused(make: Callable[[], Any], tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TypeError, match=r"model must be a sequence classifier.*, got (BertModel|FastEncoder)"):
        fastcls.Classifier(make(), tokenizer)


def test_the_fast_model_works_in_the_pipeline(tokenizer: PreTrainedTokenizerBase) -> None:
    model = sample_bert(tokenizer)
    theirs = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    ours = pipeline("text-classification", model=fastcls.optimize(model), tokenizer=tokenizer, device="cpu")
    assert_same(ours(TEXTS, batch_size=3), theirs(TEXTS, batch_size=3))


def test_order_is_kept_over_many_windows(classifier: fastcls.Classifier) -> None:
    texts = sample_texts() * 9
    results = classifier(texts)
    alone = {text: classifier([text])[0] for text in set(texts)}
    assert len(results) == len(texts) > 512
    assert_same(results, [alone[text] for text in texts])


def test_texts_and_pairs_may_be_mixed(classifier: fastcls.Classifier) -> None:
    mixed: list[Any] = [TEXTS[0], PAIRS[0], TEXTS[1], {"text": "a"}]
    assert_same(classifier(mixed), [classifier([item])[0] for item in mixed])


def test_a_pair_is_not_its_first_text(classifier: fastcls.Classifier) -> None:
    assert classifier([PAIRS[0]]) != classifier([PAIRS[0][0]])
    # An empty second text is still a pair: it brings a separator of its own.
    assert classifier([("ok", "")]) != classifier(["ok"])


def test_nothing_in_nothing_out(classifier: fastcls.Classifier) -> None:
    assert classifier([]) == []
    assert list(classifier.stream(iter(()))) == []
    assert classifier.logits([]).shape == (0, 3)


@pytest.fixture(params=[0, 1], ids=["one_after_another", "one_underway"])
def windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Windows of 256 texts everywhere, and how many are underway while the next is tokenized."""
    for place in ("cpu", "cuda"):
        monkeypatch.setitem(fastcls.classifier._WINDOW, place, (256, 32_768))
        monkeypatch.setitem(fastcls.classifier._WINDOWS_UNDERWAY, place, request.param)
    underway: int = request.param
    return underway


@pytest.mark.usefixtures("windows")
def test_windows_come_in_order(classifier: fastcls.Classifier) -> None:
    texts = [f"{'very ' * (index % 5)}{TEXTS[index % 2]}" for index in range(600)]
    assert_same(list(classifier.stream(iter(texts))), classifier(texts[:300]) + classifier(texts[300:]))


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("bad", [0, 300, 599])
def test_what_stands_in_windows_before_a_bad_text_is_not_lost(classifier: fastcls.Classifier, bad: int) -> None:
    texts: list[Any] = ["ok"] * 600
    texts[bad] = 7
    results: list[Any] = []
    stream = classifier.stream(iter(texts))
    with pytest.raises(TypeError, match=rf"texts\[{bad}\] must be a string"):
        results.extend(stream)
    assert len(results) == bad // 256 * 256


def test_stream_reads_ahead_by_as_many_windows_as_it_says(classifier: fastcls.Classifier, windows: int) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "ok"

    results = classifier.stream(endless())
    first = [next(results) for _ in range(300)]
    assert len(first) == 300
    assert taken <= 512 + windows * 256


@pytest.mark.usefixtures("windows")
def test_memory_does_not_grow_with_the_number_of_texts(classifier: fastcls.Classifier) -> None:
    # Tensors are counted on their own: tracemalloc does not see their memory.
    tracemalloc.start()
    held = {}
    for index, _ in enumerate(classifier.stream("some words to classify" for _ in range(2049))):
        if index in (512, 2048):
            held[index] = tracemalloc.get_traced_memory()[0] + live_bytes()
    tracemalloc.stop()
    assert held[2048] < held[512] + 200_000


# The last stands in the second window of a CPU.
@pytest.mark.parametrize("place", [1, 300])
def test_long_texts_are_refused_or_cut(checkpoint: Path, place: int) -> None:
    texts = ["ok"] * place + ["word " * 200]
    message = rf"texts\[{place}\] is \d+ tokens long and the model has 96 positions: .*truncation"
    with pytest.raises(ValueError, match=message):
        fastcls.Classifier.from_pretrained(checkpoint, device="cpu")(texts)
    assert len(fastcls.Classifier.from_pretrained(checkpoint, device="cpu", truncation=True)(texts)) == place + 1


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        pytest.param(["ok", 3], r"texts\[1\] must be a string, a pair .*got int: 3", id="number"),
        pytest.param(["ok", None], r"texts\[1\] .*got NoneType", id="none"),
        pytest.param([b"ok"], r"texts\[0\] .*got bytes", id="bytes"),
        pytest.param([("a", "b", "c")], r"texts\[0\] .*got tuple", id="triple"),
        pytest.param([{"txt": "a"}], r"texts\[0\] .*got dict", id="mapping_without_text"),
        pytest.param([{"text": "a", "label": "b"}], r"texts\[0\] .*got dict", id="mapping_with_more"),
        pytest.param(7, "texts must be an iterable of texts, got int", id="no_iterable"),
        pytest.param(("a", "b"), r"texts must be a list: \[\(text, text_pair\)\]", id="bare_pair"),
    ],
)
def test_what_is_no_text_is_named_before_anything_is_computed(
    classifier: fastcls.Classifier, texts: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier.model, "logits_of", lambda *_: pytest.fail("computed before it was checked"))
    with pytest.raises(TypeError, match=message):
        classifier(texts)


def test_bad_options_are_named(classifier: fastcls.Classifier) -> None:
    with pytest.raises(ValueError, match="top_k must be a positive int or None, got 0"):
        classifier(TEXTS, top_k=0)
    with pytest.raises(ValueError, match="function_to_apply must be one of softmax, sigmoid, none or None, got 'max'"):
        classifier(TEXTS, function_to_apply="max")  # type: ignore[call-overload]


def test_bad_loading_options_are_named(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, got 'int8'"):
        fastcls.Classifier.from_pretrained(checkpoint, dtype="int8")
    with pytest.raises(ValueError, match="device must be one that torch can use here, got 'gpu'"):
        fastcls.Classifier.from_pretrained(checkpoint, device="gpu")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16], ids=["name", "dtype"])
def test_dtype_may_be_chosen(checkpoint: Path, dtype: Any) -> None:
    classifier = fastcls.Classifier.from_pretrained(checkpoint, device="cpu", dtype=dtype)
    assert classifier.model.dtype == torch.bfloat16
    assert classifier(TEXTS)[0]["label"] in ("bad", "fair", "good")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name.startswith(names):
                path.unlink()

    return damage


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def drop_classifier(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("classifier")}
    save_file(weights, path, metadata={"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no_config": (drop("config"), FileNotFoundError, "the folder has no config.json"),
    "no_weights": (drop("model"), OSError, "no file named model.safetensors"),
    "no_tokenizer": (drop("tokenizer"), ValueError, "holds no tokenizer"),
    "cut_weights": (cut_weights, ValueError, "the checkpoint is damaged or incomplete"),
    "broken_tokenizer": (break_tokenizer, ValueError, "the checkpoint is damaged or incomplete"),
    "broken_config": (lambda folder: (folder / "config.json").write_text("{"), OSError, "not a valid JSON file"),
    "other_shapes": (
        lambda folder: edit_config(folder, hidden_size=128),
        ValueError,
        r"does not fit its config.json: .* is \(64,\), the config asks for \(128,\)",
    ),
    "no_classifier": (drop_classifier, ValueError, "no weights for classifier.bias, classifier.weight"),
    "other_family": (
        lambda folder: edit_config(folder, model_type="gpt2"),
        TypeError,
        "family bert, .*got a config of 'gpt2' for sequence classification",
    ),
    "decoder": (lambda folder: edit_config(folder, is_decoder=True), ValueError, "config.is_decoder must be False"),
    "relative_positions": (
        lambda folder: edit_config(folder, position_embedding_type="relative_key"),
        ValueError,
        "config.position_embedding_type must be 'absolute'",
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), list(DAMAGES.values()), ids=list(DAMAGES))
def test_bad_checkpoints_are_named(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder)
    with pytest.raises(error, match=message):
        fastcls.Classifier.from_pretrained(folder, device="cpu")


def test_missing_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        fastcls.Classifier.from_pretrained(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match=r"must be a folder with config\.json and weights, got the file"):
        fastcls.Classifier.from_pretrained(file)
