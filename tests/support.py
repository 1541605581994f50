"""What the tests share: the measure of exactness, packings of odd sizes, a small classifier."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from packaging.version import Version
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastcls.engine.packing import FlatBatch, PackedTokens, PackShape, fill_rows, pack, parts_of

# The shape that some tokens in some sequences are filled up to.
FillUp = Callable[[int, int], PackShape]


def pack_parts(
    batch: FlatBatch, max_tokens: int, fill_up: FillUp = fill_rows, *, sort: bool = False
) -> list[PackedTokens]:
    """All of a batch, packed part by part."""
    parts = parts_of(batch, max_tokens, sort=sort)
    return [pack(batch, part, fill_up(part.num_tokens, part.num_texts)) for part in parts]


# Each list is one packing. Zeros are empty sequences; the odd ones straddle every tile size.
PACKINGS = {
    "one_token": [1],
    "around_a_tile": [15, 16, 17, 31, 32, 33, 63, 64, 65],
    "with_empty_sequences": [0, 1, 0, 0, 40, 2, 0, 7, 33, 0],
    "many_short": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3],
    "long_and_short": [300, 1, 129, 7],
    "nothing_at_all": [0, 0],
    "no_sequences": [],
}

# Of a classifier whose errors are compared: the RMS of few numbers varies by more than the bound's tenth.
MANY_LABELS = 32

TINY: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 112,
    "max_position_embeddings": 96,
    "num_labels": 3,
}


# What a tiny config of each family has besides; each exercises what is special in it.
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
_TINY_FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "camembert": {"type_vocab_size": 1},
    "distilbert": {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 112},
    "electra": {"embedding_size": 32},
    "albert": {"embedding_size": 32, "num_hidden_groups": 2, "inner_group_num": 2, "hidden_act": "gelu_new"},
    "mpnet": {},
    "modernbert": {"local_attention": 8, "initializer_cutoff_factor": 3.0, **_SPECIAL_TOKENS},
    "deberta": {
        "relative_attention": True,
        "max_relative_positions": 12,
        "pos_att_type": ["c2p", "p2c"],
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
    },
    "data2vec-text": {"type_vocab_size": 1},
    "ernie": {"use_task_id": True},
    "megatron-bert": {},
    "roberta-prelayernorm": {"type_vocab_size": 1},
    "xlm-roberta-xl": {"type_vocab_size": 1},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 48},
    "roformer": {"embedding_size": 32, "summary_type": "first"},
    "xmod": {"type_vocab_size": 1, "languages": ["en_XX", "de_DE", "fr_XX"], "default_language": "de_DE"},
    "gte": {"type_vocab_size": 2},
    "nomic_bert": {},
    "jina_embeddings_v3": {"type_vocab_size": 1},
    "eurobert": {"num_key_value_heads": 2, **_SPECIAL_TOKENS},
    "ultrabert": {"num_key_value_heads": 2, "sliding_window": 4, "prediction_head_size": 48, **_SPECIAL_TOKENS},
    "esm": {"position_embedding_type": "rotary", "token_dropout": True, "mask_token_id": 2, "pad_token_id": 0},
    "esmc": {"mask_token_id": 4, **_SPECIAL_TOKENS},
}
# Earlier releases of transformers lack some.
TINY_FAMILIES = {name: sizes for name, sizes in _TINY_FAMILIES.items() if name in transformers.CONFIG_MAPPING}


# Releases of transformers before the one that CI pins refuse some configs, and break in some classes, by themselves.
IS_OLD = Version(transformers.__version__) < Version("5.23")
WITHOUT_POOLER = ("XLMRobertaForMultipleChoice", "CamembertForMultipleChoice")


def has_compiler() -> bool:
    """Whether torch.compile can make code for the CPU here."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def tiny_bert(**overrides: Any) -> Any:
    """A small random classifier whose weights are large enough that its logits differ from text to text."""
    return tiny_model("BertForSequenceClassification", "bert", **overrides)


def tiny_model(model_class: str, family: str, **overrides: Any) -> Any:
    """A small random model of any class, whose answers differ from text to text."""
    torch.manual_seed(0)
    if family not in TINY_FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    if "QuestionAnswering" in model_class:
        overrides = {"num_labels": 2, **overrides}
    sizes = {**TINY, "initializer_range": 0.2, **TINY_FAMILIES[family], **overrides}
    try:
        config = transformers.AutoConfig.for_model(family, **sizes)
    except (KeyError, StrictDataclassFieldValidationError) as error:
        if not IS_OLD:
            raise
        pytest.skip(f"transformers {transformers.__version__} refuses this config itself: {error!r:.100}")
    model = getattr(transformers, model_class)(config).eval()
    if IS_OLD and model_class in WITHOUT_POOLER and model.base_model.pooler is None:
        pytest.skip(
            f"{model_class} of transformers {transformers.__version__} looks for a pooler that it does not have"
        )
    # transformers starts biases at 0 and norms at 1: a lost or misplaced one would go unseen.
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.2)
        elif (module := name.split(".")[-2].lower()) == "ln" or "norm" in module:
            parameter.data.normal_(mean=1.0, std=0.2)
    return model


def live_bytes() -> int:
    """Bytes of all CPU tensors that this process holds."""
    gc.collect()
    storages = {
        thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()
        for thing in gc.get_objects()
        # The exact type, since asking some lazy modules for theirs makes them warn.
        if type(thing) in (Tensor, torch.nn.Parameter) and thing.device.type == "cpu"
    }
    return sum(storages.values())


def cu_seqlens_of(lengths: Sequence[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def random(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    """Standard normal numbers from torch's global generator, drawn on the CPU so that devices agree."""
    return (torch.randn(*shape) * scale).to(dtype).to(device)


class _SumsInOrder(TorchFunctionMode):
    """Products of matrices add one term after another in some order, each sum rounded to the tensors' dtype.

    Norms take their columns in that order, and round each product, as CPUs without fused multiply-add do.
    """

    def __init__(self, order: Callable[[int], Iterable[int]]) -> None:
        super().__init__()
        self.order = order

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = args
            return self._product(x, weight.T) + bias
        if func is F.layer_norm:
            x, shape = args
            columns = torch.tensor(list(self.order(*shape)), device=x.device)
            centred = x - x[..., columns].mean(-1, keepdim=True)
            variance = centred[..., columns].square().mean(-1, keepdim=True)
            return centred * torch.rsqrt(variance + kwargs["eps"]) * kwargs["weight"] + kwargs["bias"]
        if func is F.rms_norm:
            x, shape = args
            columns = torch.tensor(list(self.order(*shape)), device=x.device)
            return x * torch.rsqrt(x[..., columns].square().mean(-1, keepdim=True) + kwargs["eps"]) * kwargs["weight"]
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
            return self._product(*args)
        return func(*args, **(kwargs or {}))

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        # Added up here, since the mode is off in its own methods: a product asked for by name would be the machine's.
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        total = left.new_zeros(*batch, left.shape[-2], right.shape[-1])
        for term in self.order(left.shape[-1]):
            total = total + left[..., :, term, None] * right[..., term, None, :]
        return total


def _shuffled(terms: int) -> list[int]:
    return torch.randperm(terms).tolist()


def eager_runs(reference: Callable[..., Tensor], *arguments: Any) -> list[Tensor]:
    """What eager PyTorch makes of ``reference``: by the machine's own products, and in float32 in other orders too.

    How a float32 product errs depends on the order of its sum, which differs from library to library and from one
    instruction set to the next. In 16-bit dtypes the sums are float32 and their order is lost in the rounding of the
    result.
    """
    runs = [reference(*arguments)]
    if runs[0].dtype == torch.float32:
        for order in (range, lambda terms: reversed(range(terms)), _shuffled, _shuffled):
            with _SumsInOrder(order):
                runs.append(reference(*arguments))
    return runs


def assert_as_exact_as(
    actual: Tensor,
    eager: Sequence[Tensor],
    exact: Tensor,
    what: str = "result",
    *,
    times: float = 1.1,
    times_worst: float = 2.0,
) -> None:
    """Checks ``actual`` against float64 truth, allowed ``times`` eager's error in RMS and twice its worst element.

    ``times_worst`` is what that twice is.

    Of several eager runs the worst counts. Where all happen to be better than their dtype can store (a sum of one
    term, say), the rounding of the truth itself to that dtype is the allowance instead.
    """
    dtype = eager[0].dtype
    assert actual.dtype == dtype, f"{what} is {actual.dtype}, not {dtype}"
    assert actual.shape == exact.shape, f"{what} has shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{what} has {int((~torch.isfinite(actual)).sum())} non-finite numbers"
    if actual.numel() == 0:
        return
    exact = exact.cpu()
    errors = [_errors(run, exact) for run in (*eager, exact.to(dtype))]
    rms, worst = _errors(actual, exact)
    allowed_rms, allowed_worst = times * max(rms for rms, _ in errors), times_worst * max(worst for _, worst in errors)
    assert rms <= allowed_rms, f"{what}: RMS error {rms:.3e}, allowed {allowed_rms:.3e}"
    assert worst <= allowed_worst, f"{what}: worst error {worst:.3e}, allowed {allowed_worst:.3e}"


def _errors(values: Tensor, exact: Tensor) -> tuple[float, float]:
    difference = values.double().cpu() - exact
    return float(difference.square().mean().sqrt()), float(difference.abs().max())


def product_bound(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The textbook bound on the error of ``x @ weight.T + bias`` summed in x's dtype in any order (Higham, 3.5)."""
    terms = x.shape[1] + 1
    unit = torch.finfo(x.dtype).eps / 2
    magnitude = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    return magnitude * (terms * unit / (1 - terms * unit))


class CountTokenProducts(TorchDispatchMode):
    """Counts matrix products, by whatever operator, whose result has a row for each of ``tokens`` tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_product = any(name in str(func) for name in ("linear", "mm"))
        self.count += (
            is_product
            and isinstance(out, Tensor)
            and out.ndim == 2
            and out.shape[0] == fill_rows(self.tokens, 1).tokens
        )
        return out
