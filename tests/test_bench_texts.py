"""From texts to scores: every way gives the model's own, in the order of the texts, and so does a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import floors
import pytest
import torch
import typer
from support import tiny_bert
from test_benchmarks import CPU, Silent, new_report, text_of
from transformers import BertForSequenceClassification
from typer.testing import CliRunner

from fastcls.tools.cli import app
from fastcls.tools.demo import sample_texts
from fastcls_benchmarks import runner, sentences, suites, texts
from fastcls_benchmarks.provider import Loaded, Provider
from fastcls_benchmarks.providers import EAGER, PROVIDERS, SDPA
from fastcls_benchmarks.results import AGAIN, Case, Row
from fastcls_benchmarks.suites import Plan, Suite
from fastcls_benchmarks.tables import published_rows, render
from fastcls_benchmarks.texts import CLASSIFIER, PIPELINE, TEXT_PROVIDERS, Texts, loop
from fastcls_benchmarks.verify import Reference
from fastcls_benchmarks.workloads import Workload


def tiny(num_labels: int) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return tiny_bert(vocab_size=30522, num_labels=num_labels, initializer_range=0.2, max_position_embeddings=512)


@pytest.fixture(scope="module", params=[3, 1], ids=["texts", "pairs"])
def case(request: pytest.FixtureRequest) -> tuple[Any, Texts, torch.Tensor]:
    """A model, a corpus in batches smaller than it, and the scores of each text alone."""
    model = tiny(request.param)
    items = texts.corpus("nq-9" if request.param == 1 else "sst2-short", 4, real=False).items[:9]
    tokenizer = texts.tokenizer_of(model)
    with torch.inference_mode():
        alone = [tokenizer(*([item] if isinstance(item, str) else item), return_tensors="pt") for item in items]
        scores = torch.cat([texts.scores_of(model(**each).logits) for each in alone])
    return model, Texts(items, "nine", 4), scores


WAYS = [name for name in TEXT_PROVIDERS if "compile" not in name and "int8" not in name and "default" not in name]


@pytest.mark.parametrize("name", WAYS)
def test_every_way_gives_each_texts_scores_in_their_order(name: str, case: tuple[Any, Texts, torch.Tensor]) -> None:
    model, given, expected = case
    provider = TEXT_PROVIDERS[name]
    missing = provider.missing(type(model), CPU, torch.float32)
    if missing:
        pytest.skip(missing)
    found = provider.load(model).forward(given)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 1e-4
    assert len({round(float(each), 3) for each in expected[:, 0]}) > 3, "texts that all score alike tell no order"


def test_a_loop_sorts_by_tokens_and_pads_batch_by_batch() -> None:
    shapes: list[tuple[int, ...]] = []
    model = tiny(2)

    def load(_: Any) -> Any:
        forward = SDPA.load(model).forward

        def counted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            shapes.append(tuple(batch["input_ids"].shape))
            return forward(batch)

        return Loaded(counted)

    given = texts.corpus("sst2-short", 32, real=False)
    loop(Provider("mine", "", 1e-5, load)).load(model).forward(given)
    assert [rows for rows, _ in shapes] == [32] * 8
    widths = [width for _, width in shapes]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1] / 2


def test_corpora_are_the_same_every_time_and_say_what_they_are() -> None:
    for name in ("sst2-dev", "nq-64"):
        assert texts.corpus(name, 8, False) == texts.corpus(name, 8, False)
    made_up = texts.corpus("sst2-dev", 8, real=False)
    assert len(made_up.items) == 872
    assert "made-up" in made_up.about
    words = [len(text.split()) for text in made_up.items]
    assert abs(sum(words) / len(words) - 21.3) < 1
    questions, passages = zip(*texts.corpus("nq", 8, False).items, strict=True)
    for parts, mean in ((questions, 9), (passages, 130)):
        assert abs(sum(len(part.split()) for part in parts) / 2048 / mean - 1) < 0.03


def plan_of(*names: str) -> Plan:
    chosen = tuple(TEXT_PROVIDERS[name] for name in names)
    return Plan("text", "minilm-l6", Workload(32, "sst2-short"), torch.float32, chosen, 0.0)


def test_wrong_scores_are_not_timed_and_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(model: Any) -> Any:
        forward = CLASSIFIER.load(model).forward
        return Loaded(lambda given: forward(given).flip(0))

    monkeypatch.setitem(TEXT_PROVIDERS, "wrong", Provider("wrong", "", 1e-5, swapped))
    monkeypatch.setattr(texts, "_made_up_texts", lambda _: sample_texts()[:12])
    found = runner.measure_case(tiny(2), plan_of(PIPELINE.name, CLASSIFIER.name, "wrong"), CPU)
    assert {row.provider: row.status for row in found.rows} == {
        PIPELINE.name: "timed",
        CLASSIFIER.name: "timed",
        "wrong": "failed",
    }
    report = new_report()
    report.cases.append(found)
    text = text_of(*render(report))
    assert "12 texts of made-up words" in text
    assert "vs pipeline" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_provider_on_resident_inputs_gives_the_same_logits() -> None:
    model = tiny(2)
    batches = Workload(4, "sst2").batches(2)
    reference = Reference(model, batches)
    for name in ("transformers sdpa", "torch packed", "fastcls"):
        forward = runner._resident(PROVIDERS[name].load(model), batches, CPU)
        assert reference.check(PROVIDERS[name], forward).passed, name
        # A batch that was not made ready is an error, and no silent copy.
        with pytest.raises(KeyError):
            forward(dict(batches[0]))


# A server


class Handler(BaseHTTPRequestHandler):
    """Answers as text-embeddings-inference or vLLM, by the scores of one model."""

    kind, wrong = "tei", False
    score: Any = None

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: Any) -> None:
        self.send_response(200 if body is not None else 404)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_GET(self) -> None:
        known: dict[str, dict[str, Any]] = {
            "tei": {"/info": {"version": "1.9.1", "model_id": "mine"}},
            "vllm": {"/version": {"version": "0.21"}, "/v1/models": {"data": [{"id": "mine"}]}},
        }
        self._answer(known[self.kind].get(self.path))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.kind == "tei":
            items = [tuple(each) if len(each) > 1 else each[0] for each in asked["inputs"]]
        else:
            assert asked["model"] == "mine"
            items = asked["input"] if "input" in asked else list(zip(asked["text_1"], asked["text_2"], strict=True))
        rows = type(self).score(Texts(items, "", 8)).tolist()
        if self.wrong:
            rows = [row[::-1] for row in rows]
        if self.kind == "tei":
            labelled = [[{"label": f"LABEL_{i}", "score": score} for i, score in enumerate(row)] for row in rows]
            self._answer([sorted(each, key=lambda label: -label["score"]) for each in labelled])
        else:
            key = "input" in asked
            self._answer({"data": [{"probs": row} if key else {"score": row[0]} for row in rows]})


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    Handler.kind, Handler.wrong = "tei", False


@pytest.mark.parametrize("kind", ["tei", "vllm"])
def test_a_servers_scores_come_in_the_order_of_the_texts(
    kind: str, url: str, case: tuple[Any, Texts, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given, expected = case
    Handler.kind, Handler.score = kind, staticmethod(loop(EAGER).load(model).forward)
    monkeypatch.setattr(texts, "TEXTS_IN_A_REQUEST", 2)
    provider = texts.server(url)
    loaded = provider.load(model)
    assert float((loaded.forward(given) - expected).abs().max()) < 1e-5
    assert {"tei": "text-embeddings-inference 1.9.1, mine", "vllm": "vLLM 0.21, mine"}[kind] in loaded.detail


def test_no_server_is_refused_before_anything_is_measured(url: str) -> None:
    for where in (url + "nothing", "http://127.0.0.1:9", "http://localhost:abc"):
        with pytest.raises(ValueError, match="--server must be the URL of text-embeddings-inference or vLLM, got"):
            texts.server(where)
    with pytest.raises(ValueError, match="--suite cpu has no such case"):
        suites.with_server(suites.suite("cpu", CPU), PIPELINE)
    done = CliRunner().invoke(app, ["bench", "--server", url, "--model", "bert-base", "--device", "cpu"])
    assert done.exit_code == 2
    assert "--server takes a suite's own cases" in " ".join(done.output.split())


# Suites


def test_rerankers_are_shown_at_their_best_batch_beside_what_was_published() -> None:
    report = new_report()
    for batch, seconds in ((32, 2.0), (64, 1.0)):
        row = {name: [[each] * 2] * 3 for name, each in ((PIPELINE.name, 4 * seconds), (CLASSIFIER.name, seconds))}
        each = Case("text", "minilm-l6-reranker", f"{batch} x nq-100", "float32", PIPELINE.name, 100)
        each.rows = [Row(name, "timed", 0.0) for name in row]
        each.seconds, each.published, each.about = {**row, PIPELINE.name + AGAIN: row[PIPELINE.name]}, 3817, "100 pairs"
        report.cases.append(each)
    assert published_rows(report) == [
        ("pairs/s at the best batch", PIPELINE.name, CLASSIFIER.name, "published"),
        ("minilm-l6-reranker", "25", "100", "3,817"),
    ]
    assert "the bar, not a comparison" in " ".join(text_of(*render(report)).split())


@pytest.mark.full
def test_a_text_case_runs_in_a_suite_without_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences, "missing", lambda: "SST-2 not found")
    report = new_report()
    runner.run(Suite("tiny", (plan_of(PIPELINE.name, CLASSIFIER.name),), (), 0.0), report, CPU, Silent())
    assert [row.status for row in report.cases[0].rows] == ["timed", "timed"]
    assert report.cases[0].batch_size == 256


def test_floors_need_no_gpu_and_no_goal_lies_below_its_own() -> None:
    command = typer.Typer()
    command.command()(floors.main)
    done = CliRunner().invoke(command, ["--tflops", "790"])
    assert done.exit_code == 0
    assert "Rates assumed: 790 TFLOP/s" in done.output
    rows = [line.split() for line in done.output.splitlines() if line.strip().startswith(("bert-", "minilm"))]
    shares = [float(row[-1].rstrip("%")) for row in rows if row[-1].endswith("%")]
    assert len(shares) == 5
    assert max(shares) < 100
