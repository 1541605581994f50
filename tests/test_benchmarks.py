"""The benchmarks' promises: a wrong answer is not timed, noise is no difference, and the README is in step."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from benchmarks import compare, readme_table
from benchmarks.compare import Settings, measure, new_case
from benchmarks.provenance import slug
from benchmarks.providers import ABSORBED, EAGER, FULL, ONNXRUNTIME, SDPA, Forward, Loaded, Provider
from benchmarks.results import BASELINE, BASELINE_AGAIN, Case, Report, Row
from benchmarks.stats import is_noise, noise_of, round_ratios, spread
from benchmarks.tables import render
from benchmarks.verify import Reference
from benchmarks.work import absorbed_flops, padded_flops, selected_flops, useful_flops
from benchmarks.workloads import Batch, UnavailableError, equal_length_batches, sst2_batches

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        # Large enough for logits that a wrong mask moves.
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for lengths in ([5, 9, 3], [7, 2, 8]):
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(1, 100, mask.shape, generator=generator) * mask
        made.append({"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": mask})
    return made


def ignore_mask(model: BertForSequenceClassification) -> Loaded:
    def forward(batch: Batch) -> Tensor:
        return SDPA.load(model).forward(batch | {"attention_mask": torch.ones_like(batch["attention_mask"])})

    return Loaded(forward)


def stay_in_training_mode(model: BertForSequenceClassification) -> Loaded:
    trained = BertForSequenceClassification(model.config)
    trained.load_state_dict(model.state_dict())
    trained.train()

    def forward(batch: Batch) -> Tensor:
        logits: Tensor = trained(**batch).logits
        return logits

    return Loaded(forward)


def give_nan(model: BertForSequenceClassification) -> Loaded:
    forward = SDPA.load(model).forward
    return Loaded(lambda batch: forward(batch) * torch.nan)


def give_one_row(model: BertForSequenceClassification) -> Loaded:
    forward = SDPA.load(model).forward
    return Loaded(lambda batch: forward(batch)[:1])


def break_down(_: BertForSequenceClassification) -> Loaded:
    raise OSError("no such library")


def measured(model: BertForSequenceClassification, batches: list[Batch], *providers: Provider, rounds: int = 2) -> Case:
    case = new_case("tiny", "sst2-32", model, batches)
    measure(case, model, batches, Settings(providers, rounds, len(batches), CPU, pause_seconds=0))
    return case


@pytest.mark.parametrize("load", [ignore_mask, stay_in_training_mode])
def test_provider_with_wrong_logits_is_caught_and_not_timed(
    model: BertForSequenceClassification, batches: list[Batch], load: Callable[..., Loaded]
) -> None:
    broken = dataclasses.replace(SDPA, name="broken", load=load, bound=1e-4)
    case = measured(model, batches, SDPA, broken, ABSORBED)
    row = case.row("broken")
    assert row is not None
    assert row.status == "failed"
    assert row.difference is not None
    assert row.difference > 1e-3
    assert "broken" not in case.seconds
    assert case.times_faster("broken") is None
    assert len(case.batch_seconds(ABSORBED.name)) == 2


@pytest.mark.parametrize(
    ("load", "reason"),
    [(give_nan, "not all finite"), (give_one_row, "shape (1, 2) and not (3, 2)"), (break_down, "no such library")],
)
def test_provider_that_breaks_is_shown_with_its_reason(
    model: BertForSequenceClassification, batches: list[Batch], load: Callable[..., Loaded], reason: str
) -> None:
    case = measured(model, batches, SDPA, dataclasses.replace(SDPA, name="broken", load=load))
    row = case.row("broken")
    assert row is not None
    assert row.status == "failed"
    assert reason in row.detail
    assert "broken" not in case.seconds


def test_provider_that_cannot_run_here_says_why(model: BertForSequenceClassification, batches: list[Batch]) -> None:
    missing = dataclasses.replace(EAGER, available=lambda _: "no such chip")
    row = measured(model, batches, SDPA, missing, rounds=1).row(EAGER.name)
    assert row == Row(EAGER.name, "unavailable", detail="no such chip")


def test_every_round_times_everything_once_on_every_batch(
    model: BertForSequenceClassification, batches: list[Batch]
) -> None:
    case = measured(model, batches, SDPA, EAGER, FULL, rounds=3)
    assert set(case.seconds) == {BASELINE, BASELINE_AGAIN, EAGER.name, FULL.name, *case.ceilings}
    for rounds in case.seconds.values():
        assert [len(seconds) for seconds in rounds] == [len(batches)] * 3
    assert case.noise is not None
    assert case.share(FULL.name, case.flops) is not None


def test_stopping_keeps_the_complete_rounds(model: BertForSequenceClassification, batches: list[Batch]) -> None:
    calls = 0

    def load(model: BertForSequenceClassification) -> Loaded:
        forward: Forward = EAGER.load(model).forward

        def stopping(batch: Batch) -> Tensor:
            nonlocal calls
            calls += 1
            # Two batches are checked, a round takes three; this is the second round's first.
            if calls == 6:
                raise KeyboardInterrupt
            return forward(batch)

        return Loaded(stopping)

    case = new_case("tiny", "sst2-32", model, batches)
    settings = Settings([SDPA, dataclasses.replace(EAGER, load=load)], 3, len(batches), CPU, pause_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        measure(case, model, batches, settings)
    assert {len(rounds) for rounds in case.seconds.values()} == {1}


def test_bound_in_16_bits_is_twice_the_difference_of_eager(
    model: BertForSequenceClassification, batches: list[Batch]
) -> None:
    halved = BertForSequenceClassification(model.config).eval()
    halved.load_state_dict(model.state_dict())
    reference = Reference(halved.bfloat16(), batches)
    difference = reference.check(EAGER, EAGER.load(halved).forward).difference
    assert difference is not None
    assert difference > EAGER.bound
    assert reference.bound(ABSORBED) == 2 * difference
    assert not reference.check(EAGER, ignore_mask(halved).forward).passed


def test_onnxruntime_is_fused_and_agrees(model: BertForSequenceClassification, batches: list[Batch]) -> None:
    missing = ONNXRUNTIME.available(CPU)
    if missing:
        pytest.skip(missing)
    loaded = ONNXRUNTIME.load(model)
    assert loaded.detail == "fused: 1 EmbedLayerNormalization, 2 Attention, 2 BiasGelu, 4 SkipLayerNormalization"
    assert Reference(model, batches).check(ONNXRUNTIME, loaded.forward).passed


def test_loading_leaves_the_model_as_it_was(model: BertForSequenceClassification, batches: list[Batch]) -> None:
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    measured(model, batches, SDPA, EAGER, ABSORBED, rounds=1)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert model.config._attn_implementation == "sdpa"


def test_work_of_bert_base() -> None:
    config = BertConfig()
    (batch,) = equal_length_batches(1, 2, 128)
    tokens, layer = 256, 2 * 12 * 768**2
    assert padded_flops(config, batch) == useful_flops(config, batch) == 12 * layer * tokens
    assert selected_flops(config, batch) == 11 * layer * tokens + layer * tokens // 6 + layer * 5 // 6 * 2
    # The design's figure: without keys and values the last layer costs 1/384 a token, besides two rows.
    assert absorbed_flops(config, batch) == 11 * layer * tokens + layer * tokens // 384 + layer * 2


def test_padding_is_no_useful_work(batches: list[Batch]) -> None:
    config = BertConfig()
    assert useful_flops(config, batches[0]) * 27 == padded_flops(config, batches[0]) * 17


def test_spread() -> None:
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0, 0.0]) == (1.0, 2.5, 4.0)


def test_drift_cancels_out_of_ratios() -> None:
    assert round_ratios([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == [2.0, 2.0, 2.0]


def test_noise_is_what_one_provider_differs_from_itself_by() -> None:
    noise = noise_of([0.98, 1.0, 1.0, 1.0, 1.01, 1.05])
    assert noise == pytest.approx(0.01)
    assert is_noise(1.005, noise)
    assert not is_noise(1.02, noise)
    assert not is_noise(0.98, noise)


def test_missing_data_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLS_SST2", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"FASTCLS_SST2") as error:
        sst2_batches()
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "bert-huge"], "bert-base"),
        (["--provider", "mine"], "fastcls absorbed"),
        (["--publish", "--quick"], "not published"),
    ],
)
def test_compare_refuses_before_it_measures(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(compare.app, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_results_folder_is_named_for_the_chip() -> None:
    assert slug("Some(R) Chip 42 @ 3.0GHz, 2 cores") == "some-r-chip-42-3-0ghz-2-cores"


def made_up_report() -> Report:
    """Times with known ratios; the baseline differs from itself by 2 %."""
    rows = [Row(provider.name, "timed", 1e-7, flops=10**9) for provider in (EAGER, SDPA, ABSORBED)]
    rows.append(Row(ONNXRUNTIME.name, "failed", 0.5, "logits differ by 5.0e-01, more than 1e-04"))
    seconds = {EAGER.name: 0.101, BASELINE: 0.1, BASELINE_AGAIN: 0.098, ABSORBED.name: 0.05, "F.linear": 0.04}
    case = Case(
        model="bert-base",
        workload="sst2-32",
        dtype="float32",
        num_batches=2,
        real_tokens=100,
        padded_tokens=200,
        flops=10**9,
        ceilings=["F.linear", "fastcls_kernels.linear"],
        ceiling_flops=10**9,
        rows=rows,
        seconds={name: [[each, each]] * 3 for name, each in seconds.items()},
    )
    provenance = {
        "chip": "Made-up Chip, 2 cores",
        "threads": 2,
        "versions": {"torch": "9.9", "transformers": "8.8", "onnxruntime": None},
        "commit": "0123456789abcdef",
        "dirty": False,
        "date": "2000-01-02T03:04:05+00:00",
    }
    return Report(provenance, {"rounds": 3}, partial=False, cases=[case])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    made_up_report().write(folder / "made-up-chip-2-cores" / "compare.json")
    return folder


def test_report_survives_its_file(results: Path) -> None:
    path = results / "made-up-chip-2-cores" / "compare.json"
    assert Report.read(path) == made_up_report()
    assert json.loads(path.read_text(encoding="utf-8"))["cases"][0]["seconds"][BASELINE] == [[0.1, 0.1]] * 3


def test_readme_table_has_times_and_ratios(results: Path) -> None:
    headline, _, heading, _, row = readme_table.table_of(results).splitlines()
    assert headline == (
        "**Made-up Chip, 2 cores** · 2 threads · torch 9.9, transformers 8.8 · commit 012345678 · 2000-01-02 · "
        "noise up to 2.0%"
    )
    cells = dict(zip(heading.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert cells["transformers sdpa, ms"] == "100.0"
    assert cells["fastcls, ms"] == "50.0"
    assert cells["fastcls vs transformers sdpa"] == "2.00 x"
    assert cells["fastcls vs transformers eager"] == "2.02 x"
    assert cells["onnxruntime, ms"] == cells["fastcls vs onnxruntime"] == "-"


def test_readme_table_without_results_says_so(tmp_path: Path) -> None:
    assert readme_table.table_of(tmp_path) == "Not measured yet."


def test_readme_check_fails_until_the_table_is_written(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    arguments = ["--readme", str(readme), "--results", str(results)]
    readme.write_text(f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n", encoding="utf-8")
    assert CliRunner().invoke(readme_table.app, [*arguments, "--check"]).exit_code == 1
    assert "old" in readme.read_text(encoding="utf-8")
    assert CliRunner().invoke(readme_table.app, arguments).exit_code == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert CliRunner().invoke(readme_table.app, [*arguments, "--check"]).exit_code == 0

    readme.write_text("no markers", encoding="utf-8")
    assert CliRunner().invoke(readme_table.app, arguments).exit_code == 1


def test_terminal_table_fits_100_columns_and_hides_noise() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100)
    for part in render(made_up_report()):
        console.print(part)
    text = out.getvalue()
    assert "…" not in text
    lines = {line.split("  ")[1]: line for line in text.splitlines() if line.startswith("  ") and line.strip()}
    assert "none" in lines[EAGER.name]
    assert "2.00 x" in lines[ABSORBED.name]
    assert "80%" in lines[ABSORBED.name]
    assert "failed" in lines[ONNXRUNTIME.name]
    assert "5.0e-01" in lines[ONNXRUNTIME.name]
