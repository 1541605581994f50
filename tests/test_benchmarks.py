"""The benchmarks' promises: a wrong answer is not timed, noise is no difference, and the README is in step."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from conftest import Sentences
from rich.console import Console
from support import tiny_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerBase
from typer.testing import CliRunner, Result

from fastcls.families import FAMILIES
from fastcls.tools.cli import app
from fastcls_benchmarks import comparison, first_call, roofline, runner, sentences, suites, texts
from fastcls_benchmarks.kernels import KERNELS, KernelProvider, Prepared
from fastcls_benchmarks.peers import ONNXRUNTIME, ONNXRUNTIME_INT8, OPENVINO, OPENVINO_DEFAULT, OPENVINO_INT8
from fastcls_benchmarks.provenance import slug, source_digest
from fastcls_benchmarks.provider import Loaded, Model, Provider, own_copy
from fastcls_benchmarks.providers import (
    BFLOAT16,
    COMPILED,
    EAGER,
    FASTCLS,
    FLASH,
    FULL,
    INT8,
    INVARIANT,
    PACKED,
    PROVIDERS,
    SDPA,
    SELECTED,
    baseline_of,
)
from fastcls_benchmarks.results import (
    AGAIN,
    Case,
    FirstCall,
    Rate,
    Report,
    Row,
    floor_seconds,
    median_interval,
    noise_of,
    percentile,
)
from fastcls_benchmarks.roofline import ModelShape, product_shapes, useful_flops, weight_bytes
from fastcls_benchmarks.suites import FirstCallPlan, Plan, Suite
from fastcls_benchmarks.tables import cannot_run, render
from fastcls_benchmarks.timing import Effort, time_rounds
from fastcls_benchmarks.training import TRAINING_PROVIDERS
from fastcls_benchmarks.verify import Judge, Reference
from fastcls_benchmarks.workloads import (
    LENGTHS,
    MASK_ID,
    MODELS,
    Batch,
    Checkpoint,
    ModelInputs,
    Workload,
    build_model,
    class_of,
    config_of,
    lengths_of,
    masked_rows,
    padded_tokens,
)

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def publish() -> ModuleType:
    """benchmarks/publish.py, which is a script and no part of the package."""
    for library in ("matplotlib", "PIL"):
        pytest.importorskip(library, reason='pip install -e ".[bench]"')
    spec = importlib.util.spec_from_file_location("publish", ROOT / "benchmarks" / "publish.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plots() -> ModuleType:
    pytest.importorskip("matplotlib", reason='pip install -e ".[bench]"')
    from fastcls_benchmarks import plots

    return plots


# Large enough weights for logits that a wrong mask moves.
TINY = Checkpoint(
    options={
        "vocab_size": 1200,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "initializer_range": 0.2,
    }
)


@pytest.fixture(scope="module")
def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**TINY.options)).eval()


@pytest.fixture
def tiny_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite may name the model "tiny"."""
    monkeypatch.setitem(MODELS, "tiny", TINY)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for lengths in ([5, 9, 3], [7, 2, 8]):
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(1, 100, mask.shape, generator=generator) * mask
        made.append({"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": mask})
    return made


class TinyWorkload(Workload):
    """Batches for the tiny model's vocabulary."""

    def batches(self, count: int, inputs: ModelInputs | None = None) -> list[Batch]:
        del inputs
        return [batch | {"input_ids": batch["input_ids"] % 100} for batch in super().batches(count)]


def ignore_mask(model: Model) -> Loaded:
    def forward(batch: Batch) -> Tensor:
        return right(batch | {"attention_mask": torch.ones_like(batch["attention_mask"])})

    right = baseline_of(type(model)).load(model).forward
    return Loaded(forward)


def stay_in_training_mode(model: Model) -> Loaded:
    trained = own_copy(model).train()

    def forward(batch: Batch) -> Tensor:
        logits: Tensor = trained(**batch).logits
        return logits

    return Loaded(forward)


def give_nan(model: Model) -> Loaded:
    forward = SDPA.load(model).forward
    return Loaded(lambda batch: forward(batch) * torch.nan)


def give_one_row(model: Model) -> Loaded:
    forward = SDPA.load(model).forward
    return Loaded(lambda batch: forward(batch)[:1])


def break_down(*_: object) -> Loaded:
    raise OSError("no such library\nand a long story")


def plan_of(*providers: Provider, batch_size: int = 4, seconds: float = 0.0) -> Plan:
    return Plan("model", "tiny", TinyWorkload(batch_size, "sst2"), torch.float32, providers, seconds)


def measured(model: BertForSequenceClassification, *providers: Provider, batch_size: int = 4) -> Case:
    return runner.measure_case(model, plan_of(*providers, batch_size=batch_size), CPU)


# Providers


def test_later_runs_are_checked_because_they_are_timed(model: BertForSequenceClassification) -> None:
    def right_at_first(given: Model) -> Loaded:
        forward, met = SDPA.load(given).forward, set[int]()

        def answer(batch: Batch) -> torch.Tensor:
            again = id(batch) in met
            met.add(id(batch))
            return forward(batch) * (0 if again else 1)

        return Loaded(answer)

    late = dataclasses.replace(SDPA, name="late", load=right_at_first, bound=1e-4)
    row = measured(model, SDPA, late).rows[1]
    assert row.status == "failed"
    assert "logits differ" in row.detail


@pytest.mark.parametrize("load", [ignore_mask, stay_in_training_mode])
def test_provider_with_wrong_logits_is_caught_and_not_timed(
    model: BertForSequenceClassification, load: Callable[..., Loaded]
) -> None:
    broken = dataclasses.replace(SDPA, name="broken", load=load, bound=1e-4)
    case = measured(model, SDPA, broken, FASTCLS)
    row = case.row("broken")
    assert row is not None
    assert row.status == "failed"
    assert row.difference is not None
    assert row.difference > 1e-3
    assert "broken" not in case.seconds
    assert case.times_faster("broken") is None
    assert case.times_faster(FASTCLS.name) is not None


# Some machines that test do not hold what is as deep as two of BERT-base, or RoBERTa with more words.
TOO_LARGE = ("bert-large", "xlm-roberta-base", "camembert-base")
# A reranker is another model with one label.
SHAPES_OF_FAMILIES = [name for name, each in MODELS.items() if "num_labels" not in each.options]
SHAPES = [
    n
    for n, each in MODELS.items()
    if n not in TOO_LARGE and not (each.fitted or each.adapters) and "num_labels" not in each.options
]
# BERT-base once more, with other words, half its layers or another task; and what takes longest.
TWINS = (
    *("roberta-base", "electra-base", "distilbert", "bert-base-fill", "gte-multilingual-base", "jina-embeddings-v3"),
    *("deberta-base", "eurobert-210m", "nomic-embed-text-v1.5", "modernbert-base", "deberta-v3-base", "mpnet-base"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name in TWINS else []) for name in SHAPES]
)
def test_real_shapes_tell_a_wrong_mask(name: str) -> None:
    """The random weights of the suites must not be so tame that an error goes unseen, in 16 bits either."""
    model = build_model(name, CPU, torch.float32)
    batches = Workload(2, "sst2").batches(1, ModelInputs.of(type(model), model.config))
    reference = Reference(model, batches)
    wrong = reference.check(baseline_of(type(model)), ignore_mask(model).forward)
    in_half = Reference(own_copy(model).bfloat16(), batches)
    assert wrong.difference is not None
    assert wrong.difference > 100 * FASTCLS.bound
    assert wrong.difference > in_half.bound(FASTCLS)
    # The bound is meant for logits of about 1.
    assert 0.02 < float(reference.answers[0].std()) < 2


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (give_nan, "not all finite"),
        (give_one_row, "shape (1, 2) and not (4, 2)"),
        (break_down, "OSError: no such library"),
    ],
)
def test_provider_that_breaks_is_shown_with_its_reason(
    model: BertForSequenceClassification, load: Callable[..., Loaded], reason: str
) -> None:
    case = measured(model, SDPA, dataclasses.replace(SDPA, name="broken", load=load))
    row = case.row("broken")
    assert row is not None
    assert row.status == "failed"
    assert row.detail.endswith(reason)
    assert "broken" not in case.seconds


def test_provider_that_cannot_run_here_says_why(model: BertForSequenceClassification) -> None:
    missing = dataclasses.replace(EAGER, available=lambda _device, _dtype: "no such chip")
    assert measured(model, SDPA, missing).row(EAGER.name) == Row(EAGER.name, "unavailable", detail="no such chip")


@pytest.mark.parametrize("name", [name for name in PROVIDERS if "compile" not in name])
def test_provider_agrees_with_transformers_and_prints_nothing(
    model: BertForSequenceClassification, batches: list[Batch], name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those that compile take half a minute; `torch packed` is what one of them compiles."""
    provider = PROVIDERS[name]
    missing = provider.available(CPU, torch.float32)
    if missing:
        pytest.skip(missing)
    capfd.readouterr()
    loaded = provider.load(model)
    assert capfd.readouterr() == ("", "")
    verdict = Reference(model, batches).check(provider, loaded.forward)
    assert verdict.passed, verdict.reason
    if provider.reduced:
        assert not judge_of(model).judge(loaded.forward).reason


TINY_MODELS = {
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForSequenceClassification",
    "xlm-roberta": "XLMRobertaForSequenceClassification",
    "camembert": "CamembertForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
    "electra": "ElectraForSequenceClassification",
    "albert": "AlbertForSequenceClassification",
    "mpnet": "MPNetForSequenceClassification",
    "modernbert": "ModernBertForSequenceClassification",
    "deberta-v2": "DebertaV2ForSequenceClassification",
}


def tiny_of(family: str) -> Model:
    return tiny_model(TINY_MODELS[family], family, vocab_size=1200, initializer_range=0.05)


@pytest.mark.parametrize("family", TINY_MODELS)
def test_every_family_is_computed_by_transformers_and_by_every_step_of_fastcls(family: str) -> None:
    made = tiny_of(family)
    batches = Workload(4, "sst2").batches(2, ModelInputs.of(type(made), made.config))
    reference = Reference(made, batches)
    for provider in (baseline_of(type(made)), EAGER, FULL, SELECTED, FASTCLS):
        verdict = reference.check(provider, provider.load(made).forward)
        assert verdict.passed, f"{provider.name}: {verdict.reason}"
    assert not reference.check(FASTCLS, ignore_mask(made).forward).passed


def test_answer_of_filling_is_the_masked_rows() -> None:
    made = tiny_of("bert")
    (batch,) = Workload(4, "sst2").batches(1, ModelInputs.of(type(made), made.config))
    texts, places = masked_rows(batch).T
    with torch.inference_mode():
        logits = made(**batch).logits
    expected = logits[texts, places]
    assert expected.shape == (4, 1200)
    assert torch.equal(SDPA.load(made).forward(batch), expected)
    reference = Reference(made, [batch])
    assert not reference.check(FASTCLS, lambda _: logits[texts, places - 1]).passed


@pytest.mark.parametrize("family", ["mpnet", "deberta-v2"])
def test_baseline_is_eager_where_transformers_has_no_sdpa_and_the_tables_say_so(family: str) -> None:
    made = tiny_of(family)
    case = runner.measure_case(
        made, Plan("model", family, Workload(2, "16"), torch.float32, (EAGER, SDPA, FASTCLS), 0.0), CPU
    )
    assert case.baseline == EAGER.name
    assert case.times_faster(FASTCLS.name) is not None
    row = case.row(SDPA.name)
    assert row is not None
    assert (row.status, row.detail) == ("unavailable", "transformers has no sdpa for them: eager is the baseline")
    report = new_report()
    report.cases.append(case)
    text = text_of(*render(report))
    assert "vs eager" in text
    assert "transformers eager: the baseline, because transformers has no sdpa for this model" in text


def test_eager_is_no_baseline_where_there_is_sdpa(model: BertForSequenceClassification) -> None:
    assert baseline_of(type(model)) is SDPA
    assert EAGER.load(model).detail == ""


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name.startswith(("torch packed", "onnx", "openvino"))])
def test_providers_of_bert_classifiers_say_that_they_take_no_others(name: str) -> None:
    provider = dataclasses.replace(PROVIDERS[name], available=lambda _device, _dtype: None)
    assert provider.missing(BertForSequenceClassification, CPU, torch.float32) is None
    for other in ("bert-base-fill", "distilbert", "roberta-base"):
        missing = provider.missing(class_of(other), CPU, torch.float32)
        assert missing == "written for BERT classifiers alone"


def test_flash_attention_is_left_out_where_transformers_has_none() -> None:
    flash = dataclasses.replace(FLASH, available=lambda _device, _dtype: None)
    assert flash.missing(class_of("modernbert-base"), GPU, torch.bfloat16) is None
    assert flash.missing(class_of("deberta-v3-base"), GPU, torch.bfloat16) is not None


def test_onnxruntime_is_fused(model: BertForSequenceClassification) -> None:
    missing = ONNXRUNTIME.available(CPU, torch.float32)
    if missing:
        pytest.skip(missing)
    detail = ONNXRUNTIME.load(model).detail
    assert detail == "fused: 1 EmbedLayerNormalization, 2 Attention, 2 BiasGelu, 4 SkipLayerNormalization"


def test_providers_that_need_another_device_say_so() -> None:
    assert PROVIDERS["transformers flash"].available(CPU, torch.float32) == "flash-attention needs a GPU and 16 bits"
    for provider in (OPENVINO, OPENVINO_DEFAULT, OPENVINO_INT8, ONNXRUNTIME_INT8, BFLOAT16, INT8):
        assert provider.available(GPU, torch.bfloat16) == "measured in float32 on the CPU"
    assert SDPA.available(GPU, torch.bfloat16) is None


@pytest.mark.parametrize(("provider", "package"), [(OPENVINO_INT8, "nncf"), (ONNXRUNTIME_INT8, "onnxruntime")])
def test_peer_that_is_not_installed_is_named(provider: Provider, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else True)
    assert provider.available(CPU, torch.float32) == f"{package} not installed"


# Reduced precision


def judge_of(model: Model, fitted: bool = False) -> Judge:
    inputs = ModelInputs.of(type(model), model.config)
    batches = sentences.judged() if fitted else Workload(32, "sst2").batches(2, inputs)
    return Judge(SDPA.load(model).forward, batches, fitted, "texts")


def test_reduced_precision_is_judged_by_its_labels(model: BertForSequenceClassification, batches: list[Batch]) -> None:
    forward = SDPA.load(model).forward
    judge = Judge(forward, batches, True, "texts")
    assert judge.judge(forward) == (1.0, 0.0, "")
    assert judge.judge(lambda batch: forward(batch) + 0.25).mean_error == pytest.approx(0.25)

    def other_label(batch: Batch) -> Tensor:
        """Of the first text of three."""
        logits = forward(batch).clone()
        logits[0] = logits[0].flip(0)
        return logits

    lost = judge.judge(other_label)
    assert lost.agreement == pytest.approx(2 / 3)
    assert lost.reason == "keeps 66.7% of the labels, less than 90%"


def test_on_random_weights_only_errors_are_shown_and_what_is_far_off_is_not_timed(
    model: BertForSequenceClassification,
) -> None:
    def load(factor: float) -> Callable[[Model], Loaded]:
        return lambda model: Loaded(lambda batch: SDPA.load(model).forward(batch) * factor)

    near, far = (dataclasses.replace(BFLOAT16, name=str(factor), load=load(factor)) for factor in (1.001, 2.0))
    case = measured(model, SDPA, near, far, INT8)
    assert {row.provider: row.status for row in case.rows} == {
        SDPA.name: "timed",
        near.name: "timed",
        far.name: "failed",
        INT8.name: "timed",
    }
    assert all(row.agreement is None and row.mean_error is not None for row in case.rows)
    assert "random weights, whose labels mean nothing" in case.judged_on
    report = new_report()
    report.cases.append(case)
    text = text_of(*render(report))
    assert "mean off" in text
    assert "of floor" not in text
    assert "64 random texts" in text
    assert measured(model, SDPA, FASTCLS).judged_on == ""


def test_precision_that_is_not_reduced_is_said(model: BertForSequenceClassification) -> None:
    same = dataclasses.replace(BFLOAT16, load=FASTCLS.load)
    row = measured(model, SDPA, same).row(same.name)
    assert row is not None
    assert row.detail == "nothing is reduced here, these are float32's logits."


@pytest.mark.full
def test_real_sentences_tell_a_wrong_mask_from_int8(sst2: Callable[[str], Sentences], minilm_path: Path) -> None:
    pytest.importorskip("sklearn", reason='pip install -e ".[bench]"')
    # Skips where the sentences are not.
    labels = torch.tensor(sst2("dev").labels)
    assert sentences.missing() is None, (sst2, minilm_path)
    fitted = sentences.fitted_model("minilm-l6-sst2", CPU, torch.float32)
    assert fitted is not None
    judge = judge_of(fitted, fitted=True)
    assert float((judge.answers.argmax(1) == labels).double().mean()) > 0.7
    assert judge.judge(ignore_mask(fitted).forward).reason
    for provider in (BFLOAT16, INT8):
        assert not judge.judge(provider.load(fitted).forward).reason


def test_without_sentences_weights_and_calibration_are_random(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sentences, "not_installed", lambda *_: None)
    monkeypatch.setattr(sentences, "SST2", tmp_path)
    assert sentences.missing() == "SST-2 not found: set FASTCLS_SST2 to its folder"
    assert sentences.fitted_model("minilm-l6-sst2", CPU, torch.float32) is None
    config = BertConfig(vocab_size=1100)
    texts = sentences.calibration(config)
    assert len(texts) == sentences.NUM_CALIBRATION
    assert max(int(batch["input_ids"].max()) for batch in texts) < 1100


@pytest.mark.full
@pytest.mark.usefixtures("tiny_is_known")
def test_plan_by_threads_of_its_own_loads_peers_with_them() -> None:
    seen: list[int] = []

    def load(model: Model) -> Loaded:
        seen.append(torch.get_num_threads())
        return SDPA.load(model)

    before = torch.get_num_threads()
    plans = [dataclasses.replace(plan_of(dataclasses.replace(SDPA, load=load)), threads=count) for count in (1, 2)]
    report = new_report()
    runner.run(Suite("tiny", tuple(plans), machine_seconds=0.0), report, CPU, Silent())
    assert torch.get_num_threads() == before
    assert seen == [1, 2]
    assert [case.name.rpartition(", ")[2] for case in report.cases] == ["1 thread", "2 threads"]
    assert len({case.key for case in report.cases}) == 2
    assert report.floor_seconds(report.cases[0]) is None


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert COMPILED.available(CPU, torch.float32) == "no C++ compiler found: install g++ or set CXX"
    assert COMPILED.available(GPU, torch.bfloat16) is None


def test_loading_leaves_the_model_as_it_was(model: BertForSequenceClassification) -> None:
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    measured(model, SDPA, EAGER, PACKED, FULL, FASTCLS)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert model.config._attn_implementation == "sdpa"


def test_bound_in_16_bits_is_twice_the_difference_of_eager(
    model: BertForSequenceClassification, batches: list[Batch]
) -> None:
    halved = BertForSequenceClassification(model.config).eval()
    halved.load_state_dict(model.state_dict())
    reference = Reference(halved.bfloat16(), batches)
    difference = reference.check(EAGER, EAGER.load(halved).forward).difference
    assert difference is not None
    assert difference > EAGER.bound
    assert reference.bound(FASTCLS) == 2 * difference
    assert not reference.check(EAGER, ignore_mask(halved).forward).passed


# Timing


def test_every_round_times_everything_and_the_baseline_twice(model: BertForSequenceClassification) -> None:
    case = measured(model, SDPA, EAGER, FULL)
    assert set(case.seconds) == {SDPA.name, SDPA.name + AGAIN, EAGER.name, FULL.name}
    calls = {tuple(map(len, rounds)) for rounds in case.seconds.values()}
    assert len(calls) == 1
    assert len(calls.pop()) == Effort(0).min_rounds
    assert case.noise is not None


def test_latency_is_of_a_hundred_calls(model: BertForSequenceClassification) -> None:
    case = measured(model, SDPA, FULL, batch_size=1)
    assert case.is_latency
    assert len(case.call_seconds(FULL.name)) >= suites.LATENCY_CALLS
    report = new_report()
    report.cases.append(case)
    assert report.figures().set_index("provider").p99[FULL.name] == percentile(case.call_seconds(FULL.name), 99)
    assert case.typical_seconds(FULL.name) == statistics.median(case.call_seconds(FULL.name))


def case_of(seconds: dict[str, float], **change: object) -> Case:
    """Three rounds of two calls, each as long as told."""
    rows = [Row(name, "timed", 1e-7) for name in seconds if not name.endswith(AGAIN)]
    rounds = {name: [[each, each]] * 3 for name, each in seconds.items()}
    case = Case("model", "bert-base", "32 x sst2", "float32", SDPA.name, 32, 700, 1400, 1e9, 1e6, rows, rounds)
    return dataclasses.replace(case, **change)  # type: ignore[arg-type]


def empty_case() -> Case:
    return Case("model", "tiny", "4 x sst2", "float32", "a")


def test_order_changes_from_round_to_round_and_inputs_take_turns() -> None:
    calls: list[tuple[str, int]] = []
    turns: list[str] = []
    functions = {name: (lambda index, name=name: calls.append((name, index))) for name in "abc"}
    effort = Effort(0.0, min_rounds=6, min_calls=3, max_calls=3)
    time_rounds(empty_case(), functions, effort, CPU, progress=lambda text: turns.append(text.split(", ")[-1]))
    rounds = {tuple(turns[start : start + 4]) for start in range(0, len(turns), 4)}
    assert len(rounds) > 1
    assert {frozenset(names) for names in rounds} == {frozenset(["a", "a" + AGAIN, "b", "c"])}
    assert {index for name, index in calls if name == "b"} >= set(range(18))


def test_nothing_is_timed_without_a_baseline() -> None:
    case = empty_case()
    time_rounds(case, {"b": lambda _: None}, Effort(0.0), CPU)
    assert case.seconds == {}


def test_what_breaks_while_it_is_timed_fails_alone() -> None:
    def break_in_the_second_round(index: int) -> None:
        if index >= 5:
            raise ConnectionError("gone")

    case = empty_case()
    case.rows = [Row("a", "timed"), Row("b", "timed")]
    functions = {"a": lambda _: None, "b": break_in_the_second_round}
    time_rounds(case, functions, Effort(0.0, min_calls=5, max_calls=5), CPU)
    assert [row.status for row in case.rows] == ["timed", "failed"]
    assert case.rows[1].detail == "ConnectionError: gone"
    assert case.seconds.keys() == {"a", "a" + AGAIN}
    assert len(case.seconds["a"]) == Effort(0.0).min_rounds


def test_what_spins_on_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("fastcls_benchmarks.timing.time.sleep", slept.append)
    time_rounds(empty_case(), {"a": lambda _: None, "b": lambda _: None}, Effort(0.0), CPU, spinning=["b"])
    assert slept.count(max(slept)) == Effort(0.0).min_rounds
    assert max(slept) > 0.1


def test_stopping_keeps_the_complete_rounds() -> None:
    def stop_in_the_second_round(index: int) -> None:
        if index >= 5:
            raise KeyboardInterrupt

    case = empty_case()
    functions = {"a": lambda _: None, "b": stop_in_the_second_round}
    with pytest.raises(KeyboardInterrupt):
        time_rounds(case, functions, Effort(0.0, min_calls=5, max_calls=5), CPU)
    assert {len(rounds) for rounds in case.seconds.values()} == {1}


# Statistics


def test_percentiles_are_interpolated() -> None:
    assert percentile([3.0], 20) == 3.0
    assert [percentile([5.0, 1.0, 2.0, 4.0, 3.0, 0.0], each) for each in (20, 50, 80)] == [1.0, 2.5, 4.0]


def test_median_interval_holds_the_median_19_times_of_20() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (5, 7, 10, 25):
        samples = (1 + 0.1 * torch.randn(2000, count, generator=generator)).tolist()
        inside = [low <= 1 <= high for low, _, high in map(median_interval, samples)]
        assert 0.88 < statistics.fmean(inside) < 0.98, count


def test_drift_cancels_out_of_ratios() -> None:
    seconds = {SDPA.name: [[2.0], [4.0], [8.0]], FASTCLS.name: [[1.0], [2.0], [4.0]]}
    assert dataclasses.replace(case_of({}), seconds=seconds).ratios(FASTCLS.name) == [2.0, 2.0, 2.0]


def test_noise_is_what_one_provider_differs_from_itself_by() -> None:
    noise = noise_of([1.0, 1.02, 0.98, 1.02, 0.98, 1.0, 1.0, 1.02, 0.98])
    assert 0.02 < noise < 0.03
    # The more rounds, the less; and a constant difference of a provider from itself is noise too.
    assert noise_of([1.0, 1.02, 0.98] * 12) < noise
    assert noise_of([1.04] * 9) == pytest.approx(0.04)
    # As much to either side: the farther end of an interval of 0.0124 around the median.
    for sign in (1, -1):
        assert noise_of([1 + sign * off for off in (0.02, 0.04, 0.06)] * 12) == pytest.approx(0.0524, abs=1e-4)


def test_interval_of_few_samples_holds_the_middle_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (3, 5, 10):
        drawn = torch.randn(2000, count, generator=generator).tolist()
        held = sum(low <= 0 <= high for low, _, high in map(median_interval, drawn))
        assert held / 2000 > 0.94


# Work and workloads


def test_useful_work_of_bert_base() -> None:
    shape = ModelShape.named("bert-base")
    (batch,) = Workload(2, "128").batches(1)
    tokens, weights = 256, 12 * 768**2
    layer = 2 * weights * tokens + 2 * (2 * 2 * 768 * 128**2)
    # The design's figure: without keys and values the last layer costs 1/384 a token, besides the [CLS] rows.
    last = 2 * weights * tokens // 384 + 2 * (weights + 768**2) * 2
    assert useful_flops(shape, batch) == 11 * layer + last
    assert weight_bytes(shape, 2) == 2 * 12 * weights


def useful_flops_of(name: str, workload: Workload, **options: object) -> int:
    config = config_of(name)
    for option, value in options.items():
        setattr(config, option, value)
    (batch,) = workload.batches(1, ModelInputs.of(class_of(name), config))
    return useful_flops(ModelShape.of(class_of(name), config), batch)


def pairs_within(length: int, window: int) -> int:
    places = torch.arange(length)
    return int(((places[:, None] - places).abs() <= window).sum())


def test_useful_work_of_distilbert_is_that_of_half_a_bert() -> None:
    workload = Workload(2, "64")
    assert useful_flops_of("distilbert", workload) == useful_flops_of("bert-base", workload, num_hidden_layers=6)


def test_useful_work_of_modernbert_is_gated_within_windows_and_makes_the_last_keys() -> None:
    texts, length, width, inner = 2, 256, 768, 1152
    tokens, weights = texts * length, 4 * width**2 + 3 * width * inner
    # Every third layer sees everything, the others 64 tokens to each side.
    wide, narrow = (4 * width * texts * pairs for pairs in (length**2, pairs_within(length, 64)))
    layers = 21 * 2 * weights * tokens + 7 * wide + 14 * narrow
    # The last layer: keys of all tokens, one score a head and token, and 12 heads' sums over whole rows.
    last = 2 * width**2 * tokens + 2 * width * tokens + 2 * 12 * width * tokens
    rows = 2 * (weights - width**2 + width**2) * texts
    first, mean = (
        useful_flops_of("modernbert-base", Workload(texts, str(length)), classifier_pooling=pooling)
        for pooling in ("cls", "mean")
    )
    assert first == layers + last + rows
    # A mean reads every row: the last layer sees everything, and the head has one a text.
    assert mean == layers + 2 * weights * tokens + wide + 2 * width**2 * texts


def test_useful_work_of_a_late_mean_is_the_head_on_every_token() -> None:
    workload = Workload(2, "64")
    mean, late = (useful_flops_of("eurobert-210m", workload, classifier_pooling=each) for each in ("mean", "late"))
    assert late - mean == 2 * 768**2 * (2 * 64 - 2)


def test_useful_work_of_deberta_counts_distances_that_have_an_embedding_of_their_own() -> None:
    texts, length, width = 2, 512, 768
    tokens, weights = texts * length, 12 * width**2
    # 256 buckets: distances up to 128 have one each. Two terms besides the contents' own.
    scores = length**2 + 2 * pairs_within(length, 128)
    layer = 2 * weights * tokens + 2 * width * texts * (scores + length**2)
    seen_near = 129
    last = 2 * width**2 * tokens + 2 * width * texts * (length + 2 * seen_near) + 2 * 12 * width * tokens
    rows = 2 * weights * texts
    assert useful_flops_of("deberta-v3-base", Workload(texts, str(length))) == 11 * layer + last + rows


def test_useful_work_of_filling_is_the_masked_rows_through_head_and_vocabulary() -> None:
    workload = Workload(3, "64")
    rows = 3
    classified, filled = (useful_flops_of(name, workload) for name in ("bert-base", "bert-base-fill"))
    # Both heads have one dense layer.
    assert filled - classified == 2 * 30522 * 768 * rows
    shape = ModelShape.named("bert-base-fill")
    assert product_shapes(shape)[4:] == [(768, 768), (30522, 768)]
    assert weight_bytes(shape, 4) - weight_bytes(ModelShape.named("bert-base"), 4) == 4 * (768 + 30522) * 768


def test_shared_layers_are_read_once_and_small_embeddings_widened() -> None:
    shape, projection = ModelShape.named("albert-base-v2"), 768 * 128
    assert product_shapes(shape)[4:] == [(768, 128)]
    assert weight_bytes(shape, 4) == 4 * (12 * 768**2 + projection)
    workload = Workload(2, "64")
    assert useful_flops_of("albert-base-v2", workload) == useful_flops_of("bert-base", workload) + 2 * projection * 128


def test_rows_in_the_middle_see_to_both_sides() -> None:
    """A last layer with a window, of which masked rows are read."""
    config = transformers.ModernBertConfig(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    shape = ModelShape.of(transformers.ModernBertForMaskedLM, config)
    mask = torch.ones(1, 512, dtype=torch.long)
    ids = torch.full_like(mask, 7)
    found = []
    for place in (0, 256):
        masked = ids.clone()
        masked[0, place] = MASK_ID
        found.append(useful_flops(shape, {"input_ids": masked, "attention_mask": mask}))
    # 64 tokens more: a score and 12 sums each.
    assert found[1] - found[0] == 2 * 64 * (768 + 12 * 768)


@pytest.mark.parametrize("name", SHAPES_OF_FAMILIES)
def test_padding_is_no_useful_work(name: str) -> None:
    shape = ModelShape.named(name)
    (batch,) = Workload(4, "sst2").batches(1, ModelInputs.of(class_of(name), config_of(name)))
    alone = [
        {key: each[row : row + 1, : int(length)] for key, each in batch.items()}
        for row, length in enumerate(batch["attention_mask"].sum(1))
    ]
    assert len({each["input_ids"].shape for each in alone}) > 1, "no text of the batch is padded"
    assert useful_flops(shape, batch) == sum(useful_flops(shape, each) for each in alone)


def test_floor_is_the_longer_of_computing_and_moving() -> None:
    assert floor_seconds(100, 10, 50, 10) == 2
    assert floor_seconds(100, 10, 50, 2) == 5


def test_floor_is_that_of_a_cases_own_dtype() -> None:
    report = new_report()
    report.rates = [Rate("copy", "1 MiB", "float32", 1e9)]
    report.rates += [Rate("product", "1 x 1", name, rate) for name, rate in (("float32", 5e10), ("bfloat16", 2e11))]
    case = case_of({SDPA.name: 0.1, FASTCLS.name: 0.05})
    # 1e9 operations at 5e10 or 2e11 a second.
    assert report.floor_seconds(case) == pytest.approx(0.02)
    report.cases.append(case)
    assert report.figures().set_index("provider").share[FASTCLS.name] == pytest.approx(0.4)
    assert report.floor_seconds(dataclasses.replace(case, dtype="bfloat16")) == pytest.approx(0.005)
    assert report.floor_seconds(dataclasses.replace(case, dtype="float16")) is None


def test_lengths_follow_what_they_are_named_for() -> None:
    for name, mean, longest in (("sst2", 23, 67), ("mnli", 39, 128), ("squad", 177, 384), ("mixed-512", 205, 408)):
        found = torch.cat([lengths_of(batch) for batch in Workload(32, name).batches(8)])
        assert abs(float(found.double().mean()) / mean - 1) < 0.05, name
        assert int(found.max()) <= longest
        assert LENGTHS[name].source


def test_sst2_lengths_are_those_of_the_sentences(
    sst2: Callable[[str], Sentences], minilm_tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = [text for split in ("train", "dev", "test") for text in sst2(split).texts]
    found = sorted(len(ids) for ids in minilm_tokenizer(texts)["input_ids"])
    quantiles = LENGTHS["sst2"].quantiles
    for index, expected in enumerate(quantiles):
        assert abs(found[round(index / (len(quantiles) - 1) * (len(found) - 1))] - expected) <= 1


@pytest.mark.parametrize("name", SHAPES_OF_FAMILIES)
def test_batches_are_what_the_model_reads(name: str) -> None:
    config = config_of(name)
    (batch,) = Workload(32, "sst2").batches(1, ModelInputs.of(class_of(name), config))
    ids, kept = batch["input_ids"], batch["attention_mask"].bool()
    assert int(ids.max()) < config.vocab_size
    assert bool((ids[~kept] == config.pad_token_id).all())
    assert bool((ids[kept] != config.pad_token_id).all()), "padding among a text's tokens"
    assert ("token_type_ids" in batch) == (getattr(config, "type_vocab_size", 0) > 1)
    if name == "bert-base-fill":
        texts, places = masked_rows(batch).T
        assert texts.tolist() == list(range(32))
        assert bool((places > 0).all())
        assert bool((places < lengths_of(batch) - 1).all())
        assert len(set(places.tolist())) > 5
    else:
        assert not len(masked_rows(batch))


def test_bert_gets_the_batches_that_it_always_got() -> None:
    """Kept results stay comparable."""
    (batch,) = Workload(8, "sst2").batches(1)
    assert int(batch["input_ids"].sum()) == 2880497


def test_batches_are_typical_different_and_the_same_every_time() -> None:
    workload = Workload(32, "sst2")
    batches = workload.batches(8)
    sizes = [padded_tokens(batch) for batch in batches]
    assert max(sizes) < 1.1 * min(sizes)
    assert len({batch["input_ids"].sum().item() for batch in batches}) == 8
    again = workload.batches(8)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))


def test_single_texts_cover_the_distribution() -> None:
    found = sorted(int(lengths_of(batch)) for batch in Workload(1, "sst2").batches(20))
    assert found[0] < 10
    assert found[-1] > 45
    assert abs(statistics.fmean(found) - 23.3) < 1


# Kernels


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_providers_agree(name: str) -> None:
    kernel = KERNELS[name]
    inputs = kernel.inputs(Workload(4, "sst2"), CPU, torch.float32, 1)
    for provider in kernel.providers:
        if "compile" in provider.name or "Flex" in provider.name:
            continue
        row, _ = runner.prepare_kernel(provider, kernel.check, inputs, CPU, torch.float32)
        assert row.status == "timed" or row.provider == "torch varlen_attn", row.detail


def test_wrong_kernel_is_caught_and_not_timed() -> None:
    kernel = KERNELS["add + layer norm"]
    inputs = kernel.inputs(Workload(4, "sst2"), CPU, torch.float32, 1)
    right = kernel.providers[-1].prepare(inputs[0]).run
    for wrong in (lambda: right() * 1.001, lambda: right() * torch.nan, lambda: right()[1:]):
        provider = KernelProvider("wrong", lambda _, run=wrong: Prepared(run))  # type: ignore[misc]
        row, prepared = runner.prepare_kernel(provider, kernel.check, inputs, CPU, torch.float32)
        assert row.status == "failed"
        assert prepared == []


# Suites


@pytest.mark.parametrize(("name", "device"), [(name, each) for each in (CPU, GPU) for name in suites.names(each)])
def test_suites_start_with_the_baseline_and_fit_their_time(name: str, device: torch.device) -> None:
    suite = suites.suite(name, device)
    limit = {
        "quick": 65,
        "default": 310,
        "release": 480 if device == CPU else 500,
        "cpu": 1200,
        "rerankers": 400,
        "train": 640,
        "floors": 120,
    }[name]
    assert sum(runner.planned_seconds(suite, device)) <= limit
    for plan in suite.plans:
        if plan.kind == "kernel":
            assert plan.subject in KERNELS
            continue
        baseline, ours = baseline_of(class_of(plan.subject)), FASTCLS
        if plan.kind == "text":
            baseline, ours = texts.PIPELINE, texts.CLASSIFIER
        if plan.kind == "train":
            baseline, ours = (TRAINING_PROVIDERS[each.name] for each in (baseline, ours))
        assert {baseline, ours} <= set(plan.providers)
        assert all(each.takes(class_of(plan.subject)) is None for each in plan.providers if each is not FLASH)


def test_cpu_suite_sets_each_precision_beside_its_peers() -> None:
    assert "cpu" not in suites.names(GPU)
    peers = {ONNXRUNTIME_INT8, OPENVINO_INT8, OPENVINO_DEFAULT, OPENVINO, BFLOAT16, INT8}
    plans = suites.suite("cpu", CPU).plans
    assert all(peers <= set(plan.providers) for plan in plans)
    assert {plan.threads for plan in plans} <= {1, 2}


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_release_suite_measures_every_family_but_twins(device: torch.device) -> None:
    plans = [plan for plan in suites.suite("release", device).plans if plan.kind == "model"]
    found = {config_of(plan.subject).model_type for plan in plans}
    # These compute what another does, but for norms, embeddings and heads, or are of a size that no suite has time for.
    twins = {"data2vec-text", "ernie", "megatron-bert", "rembert", "roberta-prelayernorm", "roformer", "ultrabert"}
    twins |= {"xlm-roberta", "camembert", "esmc", "xlm-roberta-xl", "xmod"}
    twins |= {"electra", "jina_embeddings_v3"} if device == CPU else set()
    assert found | twins == {family.model_type for family in FAMILIES}


def test_proteins_are_residues_between_the_tokens_of_esm() -> None:
    config = config_of("esm2-35m")
    (batch,) = Workload(8, "proteins").batches(1, ModelInputs.of(class_of("esm2-35m"), config))
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    assert set(ids[:, 0].tolist()) == {0}
    residues = ids[:, 1:][mask[:, 1:]]
    assert (int(residues.min()), int(residues.max())) == (4, 23)
    assert set(ids[~mask].tolist()) == {config.pad_token_id}
    assert "token_type_ids" not in batch


def test_building_a_model_is_planned_for() -> None:
    plan, other = plan_of(SDPA), plan_of(SDPA, batch_size=2)
    one, two = (dataclasses.replace(each, subject="bert-base") for each in (plan, other))
    alone = sum(runner.planned_seconds(Suite("one", (one,), machine_seconds=0.0), CPU))
    both = sum(runner.planned_seconds(Suite("two", (one, two), machine_seconds=0.0), CPU))
    assert both < 2 * alone


@pytest.mark.parametrize(("model_name", "expected"), [("bert-base", (SDPA, FASTCLS)), ("mpnet-base", (EAGER, FASTCLS))])
def test_asked_for_models_get_their_own_baseline(model_name: str, expected: tuple[Provider, ...]) -> None:
    for asked in ([FASTCLS], [SDPA, FASTCLS]):
        names = [each.name for each in asked]
        (plan,) = suites.custom(suites.suite("quick", CPU), [model_name], [8], ["16"], names, []).plans
        assert plan.providers == expected
    only = Suite("some", (Plan("model", model_name, Workload(8, "16"), torch.float32, expected, 1.0),))
    assert suites.custom(only, [], [], [], [FASTCLS.name], []).plans[0].providers == expected


def test_custom_suite_is_the_grid_of_what_was_asked_for() -> None:
    like = suites.suite("quick", CPU)
    found = suites.custom(like, ["bert-base"], [1, 8], ["16", "sst2"], [FASTCLS.name], [])
    assert [(plan.subject, plan.workload.name) for plan in found.plans] == [
        ("bert-base", "1 x 16"),
        ("bert-base", "1 x sst2"),
        ("bert-base", "8 x 16"),
        ("bert-base", "8 x sst2"),
    ]
    assert all(plan.providers == (SDPA, FASTCLS) for plan in found.plans)


class Silent:
    """Hears everything, and remembers when a report was to be kept."""

    def __init__(self) -> None:
        self.kept: list[int] = []
        self.seconds = 0.0

    def doing(self, what: str) -> None:
        pass

    def done(self, what: str, seconds: float) -> None:
        assert what
        self.seconds += seconds

    def keep(self, report: Report) -> None:
        self.kept.append(len(report.cases))


def new_report(suite: str = "quick") -> Report:
    provenance = {
        "chip": "Made-up Chip, 2 cores",
        "driver": None,
        "cuda": None,
        "cpu": "Made-up Chip",
        "cores": 2,
        "threads": 2,
        "system": "Made-up",
        "python": "3.99",
        "fastcls": "0.0",
        "versions": {"torch": "9.9", "transformers": "8.8", "onnxruntime": None},
        "commit": "0123456789abcdef",
        "dirty": False,
        "source_digest": "unknown",
        "date": "2000-01-02T03:04:05+00:00",
    }
    return Report(suite, provenance, {"device": "cpu"})


@pytest.mark.usefixtures("tiny_is_known")
def test_run_measures_all_and_keeps_each_case_as_it_is_complete() -> None:
    kernel = Plan("kernel", "[CLS] pass", Workload(4, "sst2"), torch.float32, (), 0.0)
    suite = Suite("tiny", (plan_of(SDPA, FULL), plan_of(SDPA, FULL, batch_size=2), kernel), (), 0.0)
    listener, report = Silent(), new_report()
    runner.run(suite, report, CPU, listener)
    assert not report.partial
    assert [case.name for case in report.cases] == [
        "tiny, 4 x sst2, float32",
        "tiny, 2 x sst2, float32",
        "[CLS] pass, 4 x sst2, float32",
    ]
    assert listener.kept == [0, 1, 2, 3, 3]
    assert listener.seconds == pytest.approx(sum(runner.planned_seconds(suite, CPU)))
    assert report.best_rate("product", "float32")
    assert (report.figures().query("provider == baseline").share.dropna() > 0).all()
    # Loaded once for both workloads.
    assert [case.rows[1].convert_seconds is None for case in report.cases[:2]] == [False, True]


@pytest.mark.usefixtures("tiny_is_known")
def test_interrupted_run_keeps_the_rounds_of_the_case_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measured_rates", lambda *_: [])

    class Impatient(Silent):
        def doing(self, what: str) -> None:
            if "round 3" in what:
                raise KeyboardInterrupt

    report = new_report()
    with pytest.raises(KeyboardInterrupt):
        runner.run(Suite("tiny", (plan_of(SDPA, FULL),), machine_seconds=0.0), report, CPU, Impatient())
    assert report.partial
    assert [len(rounds) for rounds in report.cases[0].seconds.values()] == [2, 2, 2]
    assert "Partial" in text_of(*render(report))


@pytest.mark.full
@pytest.mark.usefixtures("tiny_is_known")
def test_what_breaks_a_case_is_shown_and_the_rest_is_measured(
    model: BertForSequenceClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def break_later(model: Model) -> Loaded:
        forward = FULL.load(model).forward

        def breaking(batch: Batch) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > 2:
                raise RuntimeError("out of something")
            return forward(batch)

        return Loaded(breaking)

    case = measured(model, SDPA, dataclasses.replace(FULL, name="broken", load=break_later), FASTCLS)
    row = case.row("broken")
    assert row is not None
    assert (row.status, row.detail) == ("failed", "RuntimeError: out of something")
    assert case.times_faster(FASTCLS.name) is not None

    monkeypatch.setattr(runner, "Reference", break_down)
    report = new_report()
    runner.run(Suite("tiny", (plan_of(SDPA),), machine_seconds=0.0), report, CPU, Silent())
    assert not report.partial
    assert report.cases[0].rows[-1].status == "failed"
    assert "failed" in text_of(*render(report))


def test_given_providers_are_no_longer_the_suite() -> None:
    found = suites.custom(suites.suite("release", CPU), [], [], [], [ONNXRUNTIME.name], [])
    assert found.name == "custom"
    assert {plan.kind for plan in found.plans} == {"model"}
    assert found.first_calls == ()
    assert {plan.providers for plan in found.plans} == {(SDPA, ONNXRUNTIME), (EAGER, ONNXRUNTIME)}


@pytest.mark.full
def test_first_call_is_measured_in_a_process_of_its_own() -> None:
    plan = FirstCallPlan("minilm-l6", Workload(2, "16"), torch.float32, FASTCLS)
    found = first_call.measure(plan, "cpu", 1)
    assert found.detail == ""
    assert found.import_seconds is not None
    assert found.import_seconds > 0.2
    assert found.first_seconds is not None
    if Path("/proc/self/clear_refs").exists():
        assert found.peak_bytes is not None
        assert found.peak_bytes > 0


@pytest.mark.full
def test_first_call_that_breaks_says_why() -> None:
    plan = FirstCallPlan("no-such-model", Workload(2, "16"), torch.float32, FASTCLS)
    assert "no-such-model" in first_call.measure(plan, "cpu", 1).detail


# Reports


def made_up_report(suite: str = "release", fastcls_seconds: float = 0.05) -> Report:
    """Times with known ratios; the baseline differs from itself by 2 %."""
    seconds = {
        EAGER.name: 0.101,
        SDPA.name: 0.1,
        SDPA.name + AGAIN: 0.098,
        PACKED.name: 0.0625,
        FULL.name: 0.06,
        SELECTED.name: 0.055,
        FASTCLS.name: fastcls_seconds,
    }
    report = new_report(suite)
    report.partial = False
    report.rates = [Rate("product", "1 x 1", "float32", 5e10), Rate("copy", "1 MiB", "float32", 1e9)]
    for batch_size, lengths in ((32, "sst2"), (8, "16"), (8, "64"), (8, "128"), (1, "sst2"), (8, "sst2")):
        scaled = {name: each * batch_size / 32 for name, each in seconds.items()}
        case = case_of(scaled, workload=f"{batch_size} x {lengths}", batch_size=batch_size)
        case.rows.append(Row(ONNXRUNTIME.name, "failed", 0.5, "logits differ by 5.0e-01, more than 1e-04"))
        case.rows.append(Row("transformers flash", "unavailable", detail="needs a GPU [really]"))
        report.cases.append(case)
    kernel = case_of(
        {"torch": 2e-5, "torch" + AGAIN: 2e-5, "fastcls": 1e-5}, kind="kernel", subject="add", baseline="torch"
    )
    report.cases.append(kernel)
    for provider, peak in ((SDPA, 4 * 2**20), (FASTCLS, 2**20)):
        report.first_calls.append(
            FirstCall("bert-base", "32 x sst2", "float32", provider.name, 3.0, 1.0, 0.1, 2.0, peak)
        )
    return report


def text_case() -> Case:
    """From text to label; the fastest peer is one of reduced precision."""
    names = {texts.PIPELINE.name: 1.0, texts.PIPELINE.name + AGAIN: 1.0, "openvino, sorted": 0.5}
    names |= {"openvino default, sorted": 0.2, texts.CLASSIFIER.name: 0.25}
    case = case_of(names, kind="text", subject="minilm-l6-sst2", workload="32 x sst2-dev", baseline=texts.PIPELINE.name)
    case.flops = case.num_bytes = 0.0
    case.about, case.judged_on = "872 sentences", "872 texts"
    for row in case.rows:
        row.agreement, row.mean_error = 0.98, 0.01
    return case


def timed_names() -> list[str]:
    return [EAGER.name, FASTCLS.name, ONNXRUNTIME.name]


def text_of(*parts: object) -> str:
    out = io.StringIO()
    console = Console(file=out, width=100)
    for part in parts:
        console.print(part)
    return out.getvalue()


def test_report_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    made_up_report().write(path)
    assert Report.read(path) == made_up_report()
    assert [each.name for each in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 0}', '{"format": 1}', '{"format": 1, "provenance": {}}'])
def test_what_is_no_results_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.json must be a results\.json of fastcls bench"):
        Report.read(path)


def test_results_without_versions_are_refused(tmp_path: Path) -> None:
    report = made_up_report()
    report.provenance["versions"] = None
    report.write(tmp_path / "run.json")
    with pytest.raises(ValueError, match="its versions are no mapping"):
        Report.read(tmp_path / "run.json")


def test_csv_holds_every_sample_with_its_provenance(tmp_path: Path) -> None:
    report = made_up_report()
    report.samples().to_csv(tmp_path / "samples.csv", index=False)
    with (tmp_path / "samples.csv").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    assert reader.fieldnames is not None
    assert len(set(reader.fieldnames)) == len(reader.fieldnames)
    assert {line["threads"] for line in lines} == {"2"}
    assert len(lines) == sum(
        len(calls) for case in report.cases for rounds in case.seconds.values() for calls in rounds
    )
    assert lines[0]["provider"] == EAGER.name
    assert float(lines[0]["seconds"]) == 0.101
    assert {line["chip"] for line in lines} == {"Made-up Chip, 2 cores"}
    assert {line["torch"] for line in lines} == {"9.9"}


def test_terminal_tables_fit_100_columns_and_hide_noise() -> None:
    text = text_of(*render(made_up_report()))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100
    rows = [line.split("  ") for line in text.splitlines() if line.startswith(" ")]
    first = {name: "  ".join(next(row for row in rows if row[0].strip() == name)) for name in timed_names()}
    assert "none" in first[EAGER.name]
    assert "2.00 x" in first[FASTCLS.name]
    assert "failed" in first[ONNXRUNTIME.name]
    assert "5.0e-01" in first[ONNXRUNTIME.name]
    assert "Cannot run here: transformers flash (needs a GPU [really])" in text
    # 1e9 operations at 5e10 a second are 20 ms: 40 % of 50 ms.
    assert "Floor 20.00 ms. Noise 2.0% in 3 rounds." in text
    assert "40%" in text


def test_who_cannot_run_one_model_alone_is_named_with_it() -> None:
    report = made_up_report()
    for name in ("mpnet-base", "distilbert"):
        rows = [Row(PACKED.name, "unavailable", detail="written for BERT")]
        report.cases.append(dataclasses.replace(report.cases[0], subject=name, rows=rows, seconds={}))
    assert cannot_run(report) == {
        "transformers flash": "needs a GPU [really]",
        PACKED.name: "mpnet-base, distilbert: written for BERT",
    }


def test_partial_report_says_so() -> None:
    assert "Partial" in text_of(*render(dataclasses.replace(made_up_report(), partial=True)))


def test_empty_report_is_rendered(tmp_path: Path, plots: ModuleType) -> None:
    from fastcls_benchmarks import html

    report = new_report()
    assert "Made-up Chip" in text_of(*render(report))
    assert plots.save(report, tmp_path) == []
    assert "Made-up Chip" in html.page(report)


def test_plots_are_drawn_for_what_there_is(tmp_path: Path, plots: ModuleType) -> None:
    paths = plots.save(made_up_report(), tmp_path)
    assert [path.stem for path in paths] == [
        "relative_speed",
        "ladder",
        "latency_by_batch",
        "throughput_by_length",
        "share_of_floor",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def eager_case() -> Case:
    """A model that transformers computes by eager attention alone."""
    seconds = {EAGER.name: 0.1, EAGER.name + AGAIN: 0.1, FULL.name: 0.06, SELECTED.name: 0.055, FASTCLS.name: 0.04}
    return case_of(seconds, subject="deberta-v3-base", baseline=EAGER.name)


def test_plots_name_the_baseline_that_there_was(plots: ModuleType) -> None:
    report = made_up_report()
    title_of = lambda plot: plot.figure.axes[0].get_title(loc="left")  # noqa: E731
    drawn = lambda of: {plot.name: plot for plot in plots.plots(of)}  # noqa: E731
    alone = dataclasses.replace(report, cases=[eager_case()])
    assert title_of(drawn(report)["relative_speed"]) == "Times as fast as transformers sdpa"
    assert title_of(drawn(alone)["relative_speed"]) == "Times as fast as transformers eager"
    mixed = dataclasses.replace(report, cases=[report.cases[0], eager_case()])
    assert title_of(drawn(mixed)["relative_speed"]) == "Times as fast as transformers"
    for plot in (drawn(alone)["ladder"], drawn(alone)["share_of_floor"]):
        assert EAGER.name in [label.get_text() for label in plot.figure.axes[0].get_yticklabels()]


def test_a_provider_has_one_colour_and_a_line_three_points(plots: ModuleType) -> None:
    report = made_up_report()
    report.cases[0].seconds["openvino"] = [[0.07, 0.07]] * 3
    report.cases[0].rows.append(Row("openvino", "timed", 1e-7))
    drawn = {plot.name: plot.figure.axes[0] for plot in plots.plots(report)}
    lines = {line.get_label(): line.get_color() for line in drawn["latency_by_batch"].get_lines()}
    assert SDPA.name in lines
    assert "openvino" not in lines, "it ran on one batch size"
    labels = [label.get_text() for label in drawn["relative_speed"].get_yticklabels()]
    colours = {
        bar.get_facecolor()
        for bar, label in zip(drawn["relative_speed"].patches, labels, strict=True)
        if label == SDPA.name
    }
    assert len(colours) == 1
    # Cases by other threads are no points of one line.
    for case in report.cases:
        case.threads = 1 if case.batch_size == 1 else 2
    assert "latency_by_batch" not in {plot.name for plot in plots.plots(report)}


def test_page_stands_alone(plots: ModuleType) -> None:
    from fastcls_benchmarks import html

    text = html.page(made_up_report())
    assert "needs a GPU [really]" in text
    assert "2.00 x" in text
    assert text.count("data:image/png;base64,") == len(plots.plots(made_up_report()))
    assert "<script" not in text
    assert 'src="http' not in text
    assert 'href="http' not in text


# Comparing two runs


def test_same_figures_compare_as_unchanged() -> None:
    found = comparison.compare(made_up_report(), made_up_report())
    assert found.moved.empty
    assert found.machine == pytest.approx(1)
    assert "Unchanged" in text_of(*comparison.render(found))


def test_slower_hour_of_the_machine_is_no_change() -> None:
    slower = made_up_report()
    for case in slower.cases:
        case.seconds = {
            name: [[2 * each for each in calls] for calls in rounds] for name, rounds in case.seconds.items()
        }
    found = comparison.compare(made_up_report(), slower)
    assert found.moved.empty
    assert found.machine == pytest.approx(0.5)
    assert "2.00 times as long" in text_of(*comparison.render(found))


def test_change_within_noise_is_none_and_beyond_it_is_shown() -> None:
    within = comparison.compare(made_up_report(), made_up_report(fastcls_seconds=0.0505))
    assert within.moved.empty
    beyond = comparison.compare(made_up_report(), made_up_report(fastcls_seconds=0.06))
    assert set(beyond.moved.provider) == {FASTCLS.name}
    assert len(beyond.moved) == 6
    text = text_of(*comparison.render(beyond))
    assert "2.00 to 1.67" in text
    assert "-17%" in text
    # 60 ms after 50 ms are 20 % slower.
    assert len(beyond.reasons_to_fail(19)) == 6
    assert beyond.reasons_to_fail(21) == []
    faster = comparison.compare(made_up_report(fastcls_seconds=0.06), made_up_report())
    assert len(faster.moved) == 6
    assert faster.reasons_to_fail(0) == []


def test_a_baseline_that_moved_is_no_change_of_the_others() -> None:
    new = made_up_report()
    for name in (SDPA.name, SDPA.name + AGAIN):
        new.cases[0].seconds[name] = [[0.11, 0.11]] * 3
    assert comparison.compare(made_up_report(), new).moved.empty


def test_broken_provider_and_another_machine_do_not_pass() -> None:
    new = made_up_report()
    del new.cases[0].seconds[FASTCLS.name]
    row = new.cases[0].row(FASTCLS.name)
    assert row is not None
    row.status = "failed"
    broken = comparison.compare(made_up_report(), new)
    assert broken.reasons_to_fail(5) == [f"bert-base, 32 x sst2, float32, {FASTCLS.name} has failed"]
    assert "Failed now" in text_of(*comparison.render(broken))

    elsewhere = made_up_report()
    elsewhere.provenance["chip"] = "Another Chip"
    assert comparison.compare(made_up_report(), elsewhere).reasons_to_fail(5) == [
        "the runs are of different machines or numbers of threads"
    ]
    nothing = comparison.compare(made_up_report(), new_report())
    assert nothing.reasons_to_fail(5) == ["the runs have no figures in common"]
    assert "no figures in common" in text_of(*comparison.render(nothing))


def test_what_only_one_run_has_is_named() -> None:
    new = made_up_report()
    del new.cases[0]
    new.provenance["threads"] = 4
    found = comparison.compare(made_up_report(), new)
    assert f"bert-base, 32 x sst2, float32, {FASTCLS.name}" in found.only_old
    assert found.only_new == []
    assert found.differing == ["threads: 2 before, 4 now"]


# The command


def bench(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", *arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.usefixtures("plots")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "slow"], "--suite must be one of quick, default, release, cpu, train, rerankers; got slow"),
        (["--model", "bert-huge"], "--model must be one of minilm-l6"),
        (["--lengths", "17"], "--lengths must be one of sst2"),
        (["--provider", "mine"], "--provider must be one of transformers eager"),
        (["--dtype", "int8"], "--dtype must be one of float32"),
        (["--suite", "rerankers", "--lengths", "sst2"], "--suite rerankers has no cases of batches"),
        (["--suite", "rerankers", "--provider", "fastcls"], "--suite rerankers has no cases of batches"),
        (
            ["--suite", "train", "--provider", "onnxruntime"],
            "--provider must be one of transformers eager, transformers",
        ),
        (["--save", "here", "--model", "bert-base"], "--save measures nothing"),
        (["--device", "meta"], "--device must be cpu or cuda, got meta"),
        (["--fail-above", "5"], "--fail-above needs --compare"),
        (["--from", "old.json", "--model", "bert-base"], "--from measures nothing"),
        (["--compare", "no-such-file.json"], "no-such-file.json: No such file"),
    ],
)
def test_bench_refuses_before_it_measures(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = bench("--device", "cpu", *arguments)
    assert code == 2
    assert message in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("plots")
def test_bench_does_not_write_over_results(tmp_path: Path) -> None:
    made_up_report().write(tmp_path / "results.json")
    code, output = bench("--suite", "quick", "--out", str(tmp_path))
    assert code == 2
    assert "--out must be a folder without results" in output


@pytest.mark.usefixtures("plots")
def test_bench_lists_what_there_is() -> None:
    code, output = bench("--list", "--device", "cpu")
    assert code == 0
    for name in (*suites.names(CPU), *MODELS, *LENGTHS, *PROVIDERS):
        assert name in output


@pytest.mark.usefixtures("plots")
def test_bench_shows_and_compares_earlier_runs(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    made_up_report().write(old)
    made_up_report(fastcls_seconds=0.06).write(new)
    code, output = bench("--from", str(old), "--out", str(tmp_path / "out"))
    assert code == 0
    assert "2.00 x" in output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"results.json", "samples.csv", "report.html", "ladder.png"} <= written
    assert bench("--from", str(new), "--compare", str(old))[0] == 0
    assert bench("--from", str(new), "--compare", str(old), "--fail-above", "50")[0] == 0
    code, output = bench("--from", str(new), "--compare", str(old), "--fail-above", "5")
    assert code == 1
    assert "20% slower, more than 5 %" in output
    assert bench("--from", str(old), "--compare", str(new), "--fail-above", "5")[0] == 0


@pytest.mark.full
@pytest.mark.usefixtures("plots")
def test_bench_measures_a_case_and_keeps_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, output = bench(
        *("--suite", "quick", "--model", "minilm-l6", "--batch-size", "2", "--lengths", "16", "--device", "cpu"),
        *("--provider", "fastcls", "--out", str(out)),
    )
    assert code == 0, output
    report = Report.read(out / "results.json")
    assert not report.partial
    assert report.suite == "custom"
    assert [row.provider for row in report.cases[0].rows] == [SDPA.name, FASTCLS.name]
    assert report.provenance["source_digest"] == source_digest()
    assert "minilm-l6, 2 x 16, float32" in output


@pytest.mark.usefixtures("plots")
def test_interrupted_bench_keeps_what_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_suite: Suite, report: Report, _device: torch.device, listener: runner.Listener) -> None:
        report.cases.append(made_up_report().cases[0])
        listener.keep(report)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    code, output = bench("--suite", "quick", "--device", "cpu", "--out", str(tmp_path / "out"))
    assert code == 130
    assert "Interrupted: what was measured so far is kept" in output
    assert "Partial" in output
    report = Report.read(tmp_path / "out" / "results.json")
    assert report.partial
    assert len(report.cases) == 1
    assert (tmp_path / "out" / "report.html").exists()


def test_bench_without_what_draws_keeps_the_figures_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_report().write(tmp_path / "old.json")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "fastcls_benchmarks.command.importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    code, output = bench("--from", str(tmp_path / "old.json"), "--out", str(tmp_path / "out"))
    assert code == 0
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"results.json", "samples.csv"}
    assert output.endswith("results.json, samples.csv.")


# Publishing


def test_results_folder_is_named_for_the_chip() -> None:
    assert slug("Some(R) Chip 42 @ 3.0GHz, 2 cores") == "some-r-chip-42-3-0ghz-2-cores"


PAGE = "before\n<!-- benchmarks: begin {0} -->\nold\n<!-- benchmarks: end -->\nafter\n"


def publish_in(folder: Path, publish: ModuleType, *arguments: str) -> Result:
    """Runs benchmarks/publish.py on pages and results of a folder."""
    pages = {"README.md": ["summary"], "page.md": ["release", "cpu", "rerankers", "train"]}
    for name, sections in pages.items():
        if not (folder / name).exists():
            (folder / name).write_text("".join(map(PAGE.format, sections)), encoding="utf-8")
    where = ("--page", "README.md", "--page", "page.md", "--results", "results")
    paths = [each if each.startswith("--") else str(folder / each) for each in where]
    return CliRunner().invoke(publish.app, [*arguments, *paths])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"suite": "quick"}, "only the suites release, cpu, rerankers, train"),
        ({"partial": True}, "stopped before its end"),
        ({"dirty": True}, "had changes"),
        ({"commit": None}, "its commit is unknown"),
    ],
)
def test_only_whole_release_runs_of_a_clean_commit_are_published(
    publish: ModuleType, tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    report = made_up_report()
    for name, value in change.items():
        if name in report.provenance:
            report.provenance[name] = value
        else:
            setattr(report, name, value)
    report.write(tmp_path / "run.json")
    result = publish_in(tmp_path, publish, str(tmp_path / "run.json"))
    assert result.exit_code == 1
    assert reason in result.output
    assert not (tmp_path / "results").exists()


def test_a_run_in_which_fastcls_failed_is_not_published(publish: ModuleType) -> None:
    report = made_up_report()
    report.cases[0].rows.append(Row(INVARIANT.name, "failed", detail="wrong"))
    assert f"{INVARIANT.name} in {report.cases[0].name} failed" in publish.reason_not_to_publish(report)


def test_transformers_is_no_peer_of_its_own_and_a_peer_that_failed_is_named(
    publish: ModuleType, tmp_path: Path
) -> None:
    report = made_up_report()
    for case in report.cases:
        case.seconds.pop(PACKED.name, None)
    report.cases[0].rows.append(Row("onnxruntime", "failed", detail="wrong"))
    report.write(tmp_path / "chip" / "release.json")
    text = "\n".join(publish.release(tmp_path, ROOT / "README.md"))
    assert "(transformers sdpa)" not in text
    assert f"Failed, and not among the peers: onnxruntime in {report.cases[0].name}" in text


def test_code_tells_the_commit_where_there_was_no_git(publish: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    report = made_up_report()
    report.provenance |= {"commit": None, "dirty": None, "source_digest": source_digest()}
    answers = {"rev-parse": "abc123", "status": ""}
    monkeypatch.setattr(publish, "output_of", lambda *command: answers[command[1]])
    assert publish.reason_not_to_publish(report) is None
    assert report.provenance["commit"] == "abc123"
    report.provenance["commit"] = None
    answers["status"] = " M fastcls/models/base.py"
    assert "had changes" in publish.reason_not_to_publish(report)


def test_published_readme_is_in_step_until_anything_changes(publish: ModuleType, tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    made_up_report().write(tmp_path / "run.json")

    def run(*arguments: str) -> int:
        return publish_in(tmp_path, publish, *arguments).exit_code

    assert run("--check") == 1
    assert run(str(tmp_path / "run.json")) == 0
    assert run("--check") == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "(results/made-up-chip-2-cores/release.png)" in text
    assert "| BERT-base, 32 sentences | 100.0 | 62.50 (torch packed) | **50.00** | 2.00 x | 1.25 x |" in text

    published = results / "made-up-chip-2-cores" / "release.json"
    made_up_report(fastcls_seconds=0.0501).write(published)
    assert run("--check") == 1
    assert run() == 0
    assert run("--check") == 0
    picture = published.with_suffix(".png")
    drawn = picture.read_bytes()
    with publish.Image.open(picture) as image:
        image.save(picture)
    assert run("--check") == 1, "a picture of other results, or of none, is out of step"
    picture.write_bytes(drawn)
    assert run("--check") == 0
    picture.unlink()
    assert run("--check") == 1

    readme.write_text("no markers", encoding="utf-8")
    assert run() == 1


def cells_of(heading: str, row: str) -> dict[str, str]:
    return dict(zip(heading.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))


def release_of(publish: ModuleType, folder: Path, report: Report) -> list[str]:
    (folder / "chip").mkdir(exist_ok=True)
    report.write(folder / "chip" / "release.json")
    return [line for part in publish.release(folder, ROOT / "README.md") for line in part.splitlines()]


def test_published_table_has_times_and_ratios(publish: ModuleType, tmp_path: Path) -> None:
    report = made_up_report()
    report.cases.append(text_case())
    headline, heading, _, row, *others = release_of(publish, tmp_path, report)
    assert headline == (
        "**Made-up Chip, 2 cores** · 2 threads · torch 9.9, transformers 8.8 · commit 012345678 · 2000-01-02 · "
        "noise 0.0% to 2.0%"
    )
    cells = cells_of(heading, row)
    assert (cells["transformers, ms"], cells["fastcls, ms"], cells["vs transformers"]) == ("100.0", "50.00", "2.00 x")
    assert (cells["fastest peer, ms"], cells["vs peer"]) == ("62.50 (torch packed)", "1.25 x")
    assert cells["of floor"] == "40%"
    from_text = cells_of(heading, others[5])
    assert (from_text["batch"], from_text["vs transformers"]) == ("32 x sst2-dev, from text", "4.00 x")
    assert from_text["fastest peer, ms"] == "500.0 (openvino, sorted)", "one of reduced precision is no peer"
    assert "openvino default, sorted 200.0 (98.0% of the labels)" in others[6]
    assert others[7] == "Peak memory of a forward, bert-base, 32 x sst2, MiB: transformers sdpa 4.0; fastcls 1.0."


def test_published_table_marks_a_baseline_that_is_not_sdpa_and_much_noise(publish: ModuleType, tmp_path: Path) -> None:
    report = made_up_report()
    report.cases = [eager_case()]
    report.cases[0].seconds[EAGER.name + AGAIN] = [[0.11, 0.11]] * 3
    _, heading, _, row, *_ = release_of(publish, tmp_path, report)
    cells = cells_of(heading, row)
    assert (cells["transformers, ms"], cells["batch"]) == ("100.0 (eager)", "32 x sst2, noise 9%")


def test_the_newest_machine_comes_first_and_says_what_invariance_costs(publish: ModuleType, tmp_path: Path) -> None:
    for name, date in (("a", "2026-01-01T00:00:00"), ("b", "2026-02-01T00:00:00")):
        report = made_up_report()
        report.provenance |= {"chip": f"Chip {name}", "date": date, "commit": "0" * 40}
        if name == "b":
            report.cases[0].seconds[INVARIANT.name] = [[0.0614, 0.0614]] * 3
        (tmp_path / name).mkdir()
        report.write(tmp_path / name / "release.json")
    section = "\n".join(publish.release(tmp_path, ROOT / "README.md"))
    assert section.index("Chip b") < section.index("With `batch_invariant=True`: bert-base, 32 x sst2: 61.40 ms.")
    assert section.index("With `batch_invariant=True`") < section.index("Chip a")
    assert "Chip a" not in "\n".join(publish.summary(tmp_path, ROOT / "README.md"))


def test_the_suite_cpu_is_published_with_the_labels_kept(publish: ModuleType, tmp_path: Path) -> None:
    report = made_up_report("cpu")
    report.cases = report.cases[:2]
    for case, threads in zip(report.cases, (1, 2), strict=True):
        case.threads, case.judged_on = threads, "872 sentences"
        row = case.row(FASTCLS.name)
        assert row is not None
        row.agreement, row.mean_error = 0.979, 0.0423
    report.write(tmp_path / "run.json")
    assert publish_in(tmp_path, publish, str(tmp_path / "run.json")).exit_code == 0
    assert publish_in(tmp_path, publish, "--check").exit_code == 0
    assert "Not measured yet." in (tmp_path / "README.md").read_text(encoding="utf-8")
    page = tmp_path / "page.md"
    section = page.read_text(encoding="utf-8").split("begin cpu -->\n")[1].split("<!--")[0]
    headline, _, heading, _, row_32, row_8, _, kept = section.splitlines()
    assert "2 threads" not in headline
    cells = dict(zip(heading.strip("| ").split(" | "), row_32.strip("| ").split(" | "), strict=True))
    assert (cells["batch"], cells["threads"], cells["transformers sdpa"], cells["fastcls"]) == (
        *("32 x sst2", "1"),
        *("100.0", "50.00"),
    )
    assert row_8.startswith("| bert-base | 8 x 16 | 2 |")
    assert kept == "bert-base on 872 sentences: labels kept, mean error of a logit: fastcls 97.9%, 0.042."
    page.write_text(page.read_text(encoding="utf-8").replace("97.9%", "99.9%"), encoding="utf-8")
    assert publish_in(tmp_path, publish, "--check").exit_code == 1


def test_steps_of_training_are_published_with_their_memory(publish: ModuleType, tmp_path: Path) -> None:
    report = made_up_report("train")
    report.cases = [dataclasses.replace(report.cases[0], kind="train", flops=0.0, num_bytes=0.0)]
    for name, difference, size in ((SDPA.name, 1e-6, 3), (PACKED.name, 1e-6, 2), (FASTCLS.name, 1.5e-6, 1)):
        row = report.cases[0].row(name)
        assert row is not None
        row.difference, row.step_bytes = difference, size * 2**20
    report.write(tmp_path / "run.json")
    assert publish_in(tmp_path, publish, str(tmp_path / "run.json")).exit_code == 0
    section = (tmp_path / "page.md").read_text(encoding="utf-8").split("begin train -->\n")[1].split("<!--")[0]
    _, _, heading, _, line, _, peaks, *_ = section.splitlines()
    cells = cells_of(heading, line)
    assert (cells["transformers, ms"], cells["fastcls, ms"], cells["vs transformers"]) == ("100.0", "50.00", "2.00 x")
    assert (cells["fastest peer, ms"], cells["MiB"], cells["error"]) == ("62.50 (torch packed)", "1 of 3", "1.50")
    assert cells["tokens/s"] == "14,000"
    assert peaks.startswith("Peak memory of a whole step, gradients included, bert-base, 32 x sst2, MiB: transformers")
