"""Models that are served: which kind a checkpoint is, what each kind answers, and several in one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("pydantic", reason="a server needs the extra serve")

from pydantic import ValidationError
from serving_support import (
    LIMIT,
    PROMPTS,
    SAVE,
    Answer,
    ask,
    post_of,
    running,
    save_classifier,
    save_encoder,
    save_reranker,
)
from support import tiny_bert, tiny_model

from fastcls import Classifier
from fastcls.serving.app import create_app
from fastcls.serving.loaded import load, load_all
from fastcls.serving.options import LoadOptions, ServeOptions
from fastcls.serving.schemas import DocumentsRequest, EmbedRequest, OpenAIRequest, PredictRequest
from fastcls.tools.demo import sample_texts, sample_tokenizer

TEXTS = ["fine", "not at all good", "very very good and warm", "a long walk through a film " * 3]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {kind: save(folder / kind) for kind, save in SAVE.items()}


@pytest.fixture(scope="module")
def url(checkpoints: dict[str, Path]) -> Iterator[str]:
    models = load_all([str(each) for each in checkpoints.values()], LoadOptions(device="cpu"))
    with running(create_app(lambda: models, ServeOptions(max_client_batch_size=8))) as found:
        yield found


def post(url: str, path: str, **body: Any) -> Any:
    return post_of(url, path, body)


def refused(answer: Answer, status: int, *words: str) -> None:
    assert answer.status == status, answer.content
    assert all(word in answer.json["error"] for word in words), answer.content


def test_each_kind_is_known_by_its_checkpoint(url: str) -> None:
    listed = ask(url, "/v1/models").json["data"]
    assert {each["id"]: each["kind"] for each in listed} == {kind: kind for kind in SAVE}
    types = {kind: ask(url, f"/models/{kind}/info").json["model_type"] for kind in SAVE}
    assert types["classifier"]["classifier"]["id2label"] == {"0": "bad", "1": "fair", "2": "good"}
    assert list(types["reranker"]) == ["reranker"]
    assert types["embedding"] == {"embedding": {"pooling": "mean"}}
    assert types["sparse"] == {"embedding": {"pooling": "splade"}}
    assert ask(url, "/info").json["served_model_name"] == "classifier"
    assert ask(url, "/models/embedding/info").json["max_input_length"] == LIMIT


def test_a_request_means_the_model_that_gives_what_it_asks_for(url: str) -> None:
    assert len(post(url, "/predict", inputs="fine")) == 3
    assert len(post(url, "/models/reranker/predict", inputs=["fine", "good"])) == 1
    assert len(post(url, "/rerank", query="fine", texts=["good", "bad"])) == 2
    assert post(url, "/v1/embeddings", input="fine", model="of somebody else's")["model"] == "embedding"
    refused(ask(url, "/models/sparse/embed", {"inputs": "fine"}), 424, "kind embedding", "sparse")
    refused(ask(url, "/models/other/predict", {"inputs": "fine"}), 404, "classifier, reranker", "'other'")


def test_vectors_are_those_of_sentence_transformers(url: str, checkpoints: dict[str, Path]) -> None:
    library = pytest.importorskip("sentence_transformers")
    eager = library.SentenceTransformer(str(checkpoints["embedding"]), device="cpu")
    for normalize in (True, False):
        expected = torch.tensor(eager.encode(TEXTS, normalize_embeddings=normalize))
        found = torch.tensor(post(url, "/embed", inputs=TEXTS, normalize=normalize))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    asked = eager.encode(TEXTS, prompt_name="query", normalize_embeddings=True)
    found = post(url, "/embed", inputs=TEXTS, prompt_name="query")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(asked), rtol=1e-4, atol=2e-5)
    refused(ask(url, "/embed", {"inputs": TEXTS, "prompt_name": "other"}), 413, *PROMPTS, "'other'")
    refused(
        ask(url, "/embed", {"inputs": [2, 3], "prompt_name": "query"}),
        413,
        "must be texts with the prompt",
        "token ids",
    )
    few = torch.tensor(post(url, "/embed", inputs=TEXTS, dimensions=5))
    whole = torch.tensor(post(url, "/embed", inputs=TEXTS, normalize=False))
    torch.testing.assert_close(few, torch.nn.functional.normalize(whole[:, :5]), rtol=1e-4, atol=2e-5)
    refused(ask(url, "/embed", {"inputs": TEXTS, "dimensions": 1000}), 413, "`dimensions`", "1000")


def test_every_token_has_a_vector(url: str, checkpoints: dict[str, Path]) -> None:
    found = post(url, "/embed_all", inputs=TEXTS)
    plain = checkpoints["embedding"]
    tokenizer, model = (kind.from_pretrained(plain) for kind in (transformers.AutoTokenizer, transformers.AutoModel))
    for text, vectors in zip(TEXTS, found, strict=True):
        with torch.inference_mode():
            expected = model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(torch.tensor(vectors), expected, rtol=1e-4, atol=1e-5)
    mean = torch.stack([torch.tensor(vectors).mean(0) for vectors in found])
    torch.testing.assert_close(torch.tensor(post(url, "/embed", inputs=TEXTS, normalize=False)), mean)


def test_weights_of_words_are_those_of_splade(url: str, checkpoints: dict[str, Path]) -> None:
    found = post(url, "/embed_sparse", inputs=TEXTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints["sparse"])
    model = transformers.BertForMaskedLM.from_pretrained(checkpoints["sparse"]).eval()
    for text, weights in zip(TEXTS, found, strict=True):
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        expected = logits.relu().log1p().amax(0)
        dense = torch.zeros_like(expected)
        dense[[each["index"] for each in weights]] = torch.tensor([each["value"] for each in weights])
        torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-5)
        assert [each["index"] for each in weights] == sorted(each["index"] for each in weights)
        assert all(each["value"] > 0 for each in weights)


def test_similarities_are_cosines(url: str) -> None:
    source, *others = torch.tensor(post(url, "/embed", inputs=TEXTS))
    found = post(url, "/similarity", inputs={"source_sentence": TEXTS[0], "sentences": TEXTS[1:]})
    assert found == pytest.approx([float(source @ other) for other in others], abs=1e-5)


def test_ranks_are_the_classifiers_scores_of_pairs(url: str, checkpoints: dict[str, Path]) -> None:
    classifier = Classifier.from_pretrained(checkpoints["reranker"], truncation=True)
    pairs = [("fine", text) for text in TEXTS]
    scores, logits = [row["score"] for row in classifier(pairs)], classifier.logits(pairs)[:, 0].tolist()
    found = post(url, "/rerank", query="fine", texts=TEXTS, return_text=True)
    assert [each["score"] for each in found] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    assert [each["text"] for each in found] == [TEXTS[each["index"]] for each in found]
    assert {each["index"]: each["score"] for each in found} == pytest.approx(dict(enumerate(scores)), abs=1e-5)
    raw = post(url, "/rerank", query="fine", texts=TEXTS, raw_scores=True)
    assert {each["index"]: each["score"] for each in raw} == pytest.approx(dict(enumerate(logits)), abs=1e-4)
    top = post(url, "/v1/rerank", query="fine", documents=[{"text": text} for text in TEXTS], top_n=2)
    assert [each["index"] for each in top["results"]] == [each["index"] for each in found[:2]]
    refused_by_name = ask(url, "/v1/rerank", {"query": "a", "documents": TEXTS, "max_tokens_per_doc": 9})
    assert (refused_by_name.status, refused_by_name.json["code"]) == (422, 422)
    assert "`max_tokens_per_doc` must be null, got 9" in refused_by_name.json["message"]


def test_token_ids_are_taken_as_they_are(url: str, checkpoints: dict[str, Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints["embedding"])
    ids = tokenizer(TEXTS)["input_ids"]
    assert post(url, "/embed", inputs=ids) == post(url, "/embed", inputs=TEXTS)
    assert post(url, "/embed", inputs=ids[1]) == post(url, "/embed", inputs=TEXTS[1])
    refused(ask(url, "/embed", {"inputs": [1, 99_999]}), 422, "99999, outside the vocabulary")
    refused(ask(url, "/embed", {"inputs": [5] * 200, "truncate": False}), 413, f"less than {LIMIT} tokens. Given: 200")
    long = list(range(5, 15)) * 20
    assert post(url, "/embed", inputs=long) == post(url, "/embed", inputs=long[:LIMIT])
    left = post(url, "/embed", inputs=long, truncation_direction="left")
    assert left == post(url, "/embed", inputs=long[-LIMIT:])


def test_a_prompt_needs_a_text(tmp_path: Path) -> None:
    models = load_all([str(save_encoder(tmp_path / "encoder"))], LoadOptions(device="cpu", default_prompt="x: "))
    with running(create_app(lambda: models, ServeOptions())) as url:
        refused(ask(url, "/embed", {"inputs": [5, 6]}), 413, "'x: '", "token ids")
        for sentences in (["fine", ""], [""]):
            body = {"inputs": {"source_sentence": "good", "sentences": sentences}}
            refused(ask(url, "/similarity", body), 400, "empty")
        refused(ask(url, "/embed", {"inputs": ["fine", ""]}), 400, "empty")
        (tokens,) = post(url, "/tokenize", inputs="fine", add_special_tokens=False)
        assert "".join(each["text"] for each in tokens) == "x:fine"
    pooling = tmp_path / "encoder" / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({**json.loads(pooling.read_text()), "include_prompt": False}))
    with pytest.raises(ValueError, match="include_prompt false"):
        load(str(tmp_path / "encoder"), "a", LoadOptions(device="cpu"))


def test_a_body_of_wrong_things_has_few_errors() -> None:
    wrong = b"[" + b"{}," * 10_000 + b"{}]"
    for kind, field in ((PredictRequest, b"inputs"), (EmbedRequest, b"inputs"), (OpenAIRequest, b"input")):
        with pytest.raises(ValidationError) as found:
            kind.model_validate_json(b'{"' + field + b'": ' + wrong + b"}")
        assert found.value.error_count() < 10
    with pytest.raises(ValidationError) as found:
        DocumentsRequest.model_validate_json(b'{"query": "a", "documents": ' + wrong + b"}")
    assert found.value.error_count() < 10


def test_a_key_that_means_nothing_chooses_no_model(url: str) -> None:
    assert len(post(url, "/", inputs="fine", model="reranker")) == 3
    assert len(post(url, "/predict", inputs="fine", model="nobody")) == 3


def test_health_is_that_of_every_model(url: str, checkpoints: dict[str, Path]) -> None:
    models = load_all([str(checkpoints[kind]) for kind in ("classifier", "embedding")], LoadOptions(device="cpu"))
    app = create_app(lambda: models, ServeOptions())
    with running(app) as found:
        passes = app.state.server.passes

        def fail(*_: Any, **__: Any) -> Any:
            raise RuntimeError("no memory")

        models[1].model.embeddings_of = fail  # type: ignore[method-assign]
        refused(ask(found, "/models/embedding/embed", {"inputs": "fine"}), 424, "Inference failed")
        assert ask(found, "/predict", {"inputs": "fine"}).status == 200
        refused(ask(found, "/health"), 503, "unhealthy")
        del models[1].model.embeddings_of
        assert ask(found, "/health").status == 200
        assert not passes.failing
    assert ask(url, "/health").status == 200


def test_tokens_and_their_places(url: str) -> None:
    # In bytes of UTF-8, as text-embeddings-inference has them.
    text = "Nót GOOD, át all"
    (tokens,) = post(url, "/tokenize", inputs=text)
    assert tokens[0]["special"]
    assert tokens[0]["start"] is None
    inner = [each for each in tokens if not each["special"]]
    assert [text.encode()[each["start"] : each["stop"]].decode() for each in inner] == [each["text"] for each in inner]
    (plain,) = post(url, "/tokenize", inputs=text, add_special_tokens=False)
    assert [each["id"] for each in plain] == [each["id"] for each in inner]
    assert post(url, "/decode", ids=[[each["id"] for each in tokens]] * 2) == ["not good , at all"] * 2
    refused(ask(url, "/decode", {"ids": [99_999]}), 422, "99999, outside the vocabulary")
    refused(ask(url, "/tokenize", {"inputs": ["a", ""]}), 400, "empty")
    refused(ask(url, "/tokenize", {"inputs": "word " * 50_000}), 413, "at most 200000 characters, got 250000")


@pytest.mark.parametrize("route", ["/predict", "/embed", "/embed_all", "/embed_sparse"])
def test_a_batch_has_at_most_so_many_texts(url: str, route: str) -> None:
    given = [["fine"]] * 9 if route == "/predict" else ["fine"] * 9
    refused(ask(url, route, {"inputs": given}), 413, "batch size 9 > maximum allowed batch size 8")
    assert len(post(url, route, inputs=given[:8])) == 8


def test_the_source_of_a_similarity_counts_as_a_text(url: str) -> None:
    body = {"inputs": {"source_sentence": "fine", "sentences": ["good"] * 8}}
    refused(ask(url, "/similarity", body), 413, "batch size 9 > maximum allowed batch size 8")
    body["inputs"]["sentences"] = ["good"] * 7
    assert len(post(url, "/similarity", **body)) == 7
    body["inputs"]["sentences"] = []
    refused(ask(url, "/similarity", body), 400, "`inputs.sentences` cannot be empty")


@pytest.mark.parametrize(("path", "method", "status"), [("/v1/none", "POST", 404), ("/v1/embeddings", "PUT", 405)])
def test_routes_of_openai_have_its_errors(url: str, path: str, method: str, status: int) -> None:
    answer = ask(url, path, {"input": "fine"}, method=method)
    assert (answer.status, answer.json["code"], answer.json["type"]) == (status, status, "Validation")
    assert path in answer.json["message"]


def test_an_answer_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    tokenizer = sample_tokenizer(sample_texts())
    model = tiny_bert(vocab_size=len(tokenizer), num_labels=1)
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    models = load_all([str(tmp_path)], LoadOptions(device="cpu"))
    with running(create_app(lambda: models, ServeOptions())) as url:
        for path, body in (
            ("/predict", {"inputs": "fine"}),
            ("/predict", {"inputs": "fine", "raw_scores": True}),
            ("/rerank", {"query": "fine", "texts": ["good"]}),
        ):
            refused(ask(url, path, body), 424, "NaN")


def test_heads_on_one_encoder_answer_as_their_classifiers(tmp_path: Path) -> None:
    tokenizer = sample_tokenizer(sample_texts())
    first = tiny_bert(vocab_size=len(tokenizer), id2label={0: "bad", 1: "fair", 2: "good"})
    second = tiny_bert(vocab_size=len(tokenizer), num_labels=2, id2label={0: "short", 1: "long"})
    second.bert.load_state_dict(first.bert.state_dict())
    for name, model in (("tone", first), ("size", second)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in ("tone", "size")]
    models = load_all(folders, LoadOptions(device="cpu", one_encoder=True))
    assert models[0].model is models[1].model
    encoded = [model.encode([_item(text) for text in [*TEXTS, TEXTS[0]]], True, "right") for model in models]
    passes: list[int] = []
    models[0].model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    found = models[0].computing.compute([*encoded[0], *encoded[1]], "logits")  # type: ignore[list-item]
    assert passes == [len(TEXTS)], "equal texts are computed once, for all heads"
    for number, folder in enumerate(folders):
        logits = Classifier.from_pretrained(folder, truncation=True).logits([*TEXTS, TEXTS[0]])
        own = torch.tensor([each.logits for each in found[number * 5 : number * 5 + 5]])
        torch.testing.assert_close(own, logits, rtol=1e-4, atol=1e-5)
    with running(create_app(lambda: models, ServeOptions())) as url:
        assert {each["label"] for each in post(url, "/models/size/predict", inputs="fine")} == {"short", "long"}
        assert {each["label"] for each in post(url, "/predict", inputs="fine")} == {"bad", "fair", "good"}


def _item(text: str) -> Any:
    from fastcls.texts import Item

    return Item(text, None)


def test_limits_of_length(tmp_path: Path) -> None:
    folder = str(save_classifier(tmp_path / "bert"))
    assert load(folder, "bert", LoadOptions(device="cpu", max_input_length=7)).limit == 7
    most = tiny_bert().config.max_position_embeddings
    assert load(folder, "bert", LoadOptions(device="cpu")).limit <= most
    assert load(folder, "bert", LoadOptions(device="cpu", max_input_length=10_000)).limit == most
    # Positions that are relative take any length, but a server must have a limit.
    tokenizer = sample_tokenizer(sample_texts())
    model = tiny_model("DebertaV2ForSequenceClassification", "deberta-v2", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "deberta")
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path / "deberta")
    served = load(str(tmp_path / "deberta"), "deberta", LoadOptions(device="cpu"))
    assert served.limit == model.config.max_position_embeddings


def test_a_prompt_can_stand_before_every_text(tmp_path: Path) -> None:
    folder = str(save_encoder(tmp_path / "encoder"))
    assert load(folder, "a", LoadOptions(device="cpu")).default_prompt == ""
    assert load(folder, "a", LoadOptions(device="cpu", default_prompt_name="query")).default_prompt == PROMPTS["query"]
    assert load(folder, "a", LoadOptions(device="cpu", default_prompt="x: ")).default_prompt == "x: "
    with pytest.raises(ValueError, match="default_prompt_name must be one of the prompts"):
        load(folder, "a", LoadOptions(device="cpu", default_prompt_name="other"))
    with pytest.raises(ValueError, match="leave one out"):
        LoadOptions(default_prompt_name="query", default_prompt="x: ")


def test_what_is_not_computed_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    tokenizer = sample_tokenizer(sample_texts())

    def saved(name: str, model: Any) -> str:
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    plain = saved("plain", tiny_model("BertModel", "bert", vocab_size=len(tokenizer)))
    tokens = saved("tokens", tiny_model("BertForTokenClassification", "bert", vocab_size=len(tokenizer)))
    pooled, ranked = str(save_encoder(tmp_path / "pooled")), str(save_reranker(tmp_path / "ranked"))
    for checkpoint, options, message in (
        (plain, {}, "got BertModel, and nothing says how"),
        (tokens, {}, "got BertForTokenClassification"),
        (pooled, {"pooling": "cls"}, "pooling must be mean for"),
        (ranked, {"pooling": "mean"}, "pooling must be left out"),
        (ranked, {"default_prompt": "x: "}, "default_prompt must be left out for sequence classifiers, got 'x: '"),
        (ranked, {"default_prompt_name": "x"}, "default_prompt_name must be left out"),
        (plain, {"one_encoder": True}, "BertModel|trained for"),
        (ranked, {"one_encoder": True, "pooling": "mean"}, "pooling must be left out for sequence classifiers"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            load_all([checkpoint], LoadOptions(device="cpu", **options))
    assert load(plain, "plain", LoadOptions(device="cpu", pooling="cls")).pooling == "first"
    (tmp_path / "pooled" / "modules.json").write_text(
        (tmp_path / "pooled" / "modules.json")
        .read_text()
        .replace("]", ', {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}]')
    )
    with pytest.raises(ValueError, match="a further layer, Dense"):
        load(pooled, "pooled", LoadOptions(device="cpu"))


@pytest.mark.parametrize(
    "option", ["max_concurrent_requests", "max_client_batch_size", "payload_limit", "max_batch_tokens"]
)
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_options_out_of_range_are_named(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        ServeOptions(**{option: value})


def test_names_tell_models_apart(checkpoints: dict[str, Path]) -> None:
    folder = str(checkpoints["classifier"])
    options = LoadOptions(device="cpu")
    assert [each.name for each in load_all([folder, folder], options, ["a", "b/c"])] == ["a", "b/c"]
    for names, message in (
        (["a", "a"], "'a' twice"),
        (["a"], "once for each of 2"),
        (["a", "/b"], "without / at its ends"),
    ):
        with pytest.raises(ValueError, match=message):
            load_all([folder, folder], options, names)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_on_a_gpu_requests_share_passes_and_have_the_classifiers_scores(
    checkpoints: dict[str, Path], batch_invariant: bool
) -> None:
    folder = str(checkpoints["classifier"])
    options = LoadOptions(device="cuda", dtype="float16", batch_invariant=batch_invariant)
    classifier = Classifier.from_pretrained(
        folder, device="cuda", dtype="float16", batch_invariant=batch_invariant, truncation=True
    )
    texts = [" ".join(TEXTS[number % 4].split() * (1 + number % 3)) for number in range(64)]
    expected = [classifier([text], top_k=None)[0] for text in texts]
    models = load_all([folder], options)
    app = create_app(lambda: models, ServeOptions())
    with running(app) as url, ThreadPoolExecutor(16) as clients:
        found = list(clients.map(lambda text: post(url, "/predict", inputs=text), texts))
        metrics = ask(url, "/metrics").content.decode()
    assert "fastcls_texts 64.0" in metrics
    for answer, labels in zip(found, expected, strict=True):
        scores = {each["label"]: each["score"] for each in labels}
        given = {each["label"]: each["score"] for each in answer}
        assert given == (scores if batch_invariant else pytest.approx(scores, abs=2e-3))
