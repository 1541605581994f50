"""A fast encoder inside a module of the user's own, in the place of its transformers encoder."""

from __future__ import annotations

import copy
import dis
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import CodeType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..conversion import optimize
from ..engine.spec import LastLayer, Quantize
from ..families import family_of, head_in, supported
from ..models import FastEncoder
from ..models.arguments import check_extras
from ..models.embeddings import Select
from ..original.companion import Companion, weights_around
from ..original.own_code import advice_for, class_name
from .first_row import FirstRow
from .padding import PaddingProbe

_Module = TypeVar("_Module", bound=nn.Module)

_READS = "a head calls the encoder as a whole, and reads last_hidden_state and pooler_output of what it gives"


def optimize_encoder(
    model: _Module,
    *,
    name: str | Sequence[str] | None = None,
    select: Literal["all", "first"] = "all",
    last_layer: LastLayer = "absorbed",
    cuda_graphs: bool = True,
    quantize: Quantize | None = None,
    pack_weights: bool = True,
    check_padding: bool = True,
) -> _Module:
    """A copy of a module of your own, with a fast encoder in the place of the transformers encoder that it holds.

    It is for heads that `optimize` does not know: a subclass of ``BertPreTrainedModel`` with a ``forward`` of its own,
    or any ``nn.Module`` with ``self.encoder = AutoModel.from_pretrained(...)``. Your code runs as it is, on the rows
    that the fast encoder gives.

    What a head may read of the encoder's output, by index or by name:

    - ``last_hidden_state``: with ``select="all"`` every row, (batch, seqlen, hidden_size), zeros where the attention
      mask is 0. So a mean, a maximum or an attention over tokens has to leave padding out by the mask: see
      ``check_padding``. With ``select="first"`` only ``last_hidden_state[:, 0]``: see `FirstRow`; any other row is an
      error.
    - ``pooler_output``, if the encoder has a pooler; NaN where the mask leaves out a text's first token.

    What it may not: hidden states of other layers, attentions, caches, the encoder's submodules
    (``self.bert.embeddings(...)``), gradients of the encoder. Each is an error that names it.

    The model stays as it was, bit for bit. The encoder's weights are shared and followed, as `optimize` says. All else
    is the copy's own, as `copy.deepcopy` makes it, and follows the given model's weights until you load or train the
    copy's. The copy is in eval mode. ``train()`` reaches the head alone, so that it can be trained on a frozen encoder.
    State dicts have the given model's names.

    Args:
        model: the module; its encoder of a supported family, without a head of transformers' around it.
        name: where the encoder is, "bert" or "tower.bert"; several for several encoders. None finds the only one.
        select: the rows of the last layer that the head reads. "first" is faster.
        last_layer, cuda_graphs, quantize, pack_weights: see `FastModel`; they are the encoder's.
        check_padding: computes the module twice more at the first padded batch in eval mode, with other numbers in the
            rows of padding, and raises ValueError if the answer differs anywhere but at padding.

    Returns:
        A module of the same class.

    Raises:
        TypeError: the module, or what ``name`` leads to, is none that fastcls takes.
        ValueError: there is no encoder, or more than one and no ``name``; the encoder is not what its config builds;
            a submodule of the encoder is used, or held elsewhere; hidden states or attentions are asked for.
    """
    # By its name, since looking the class up would import torch's compiler.
    if not isinstance(model, nn.Module) or type(model).__name__ == "OptimizedModule":
        raise TypeError(f"model must be a torch module of your own, got {class_name(model)}: {advice_for(model)}")
    if select not in ("all", "first"):
        raise ValueError(f"select must be 'all' or 'first', got {select!r}")
    encoders = _encoders_of(model, name)
    # The deep copy takes these objects over instead of copying them.
    memo: dict[int, Any] = {}
    fast_ones: list[EncoderInside] = []
    probe = PaddingProbe() if check_padding and select == "all" else None
    for path, encoder in encoders.items():
        check_extras(FastEncoder, encoder.config, {})
        _check_forward(model, path, encoder)
        plain = optimize(
            encoder,
            last_layer=last_layer,
            cuda_graphs=cuda_graphs,
            quantize=quantize,
            pack_weights=pack_weights,
            select=select,
        )
        fast = EncoderInside.of(plain, path, encoder)
        fast.probe = probe
        # The copy's own, as its config is: one object, where the model and its encoder have one.
        fast.config = copy.deepcopy(encoder.config, memo)
        memo[id(encoder)] = fast
        fast_ones.append(fast)
    # Tensors made in inference mode cannot be written to outside of it.
    with torch.inference_mode(False):
        made = copy.deepcopy(model, memo).eval()
    for path, encoder in encoders.items():
        _check_not_copied(path, encoder, memo)
    names = weights_around(model, encoders.values())
    if names:
        companion = Companion(model, made, names, stop=partial(_stop_following, fast_ones))
        for each in fast_ones:
            each.follow_along(companion)
    # A head may read weights of its own before it calls the encoder, which would bring them up to date.
    made.register_forward_pre_hook(partial(_catch_up, fast_ones))
    if probe is not None:
        made.register_forward_hook(probe, with_kwargs=True)
    return made


class EncoderInside(FastEncoder):
    """A `FastEncoder` in a user's module, which says by name what the module may not read of it.

    Attributes:
        probe: sees whether the module reads the rows of padding.
    """

    probe: PaddingProbe | None = None
    stays_in_eval = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._place = ""
        self._parts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, fast: FastEncoder, place: str, encoder: nn.Module) -> EncoderInside:
        """The same encoder over the same weights.

        Args:
            fast: the encoder, which must not be used afterwards.
            place: where the module has it.
            encoder: the transformers encoder that it was made of.
        """
        weights, head = dict(fast.weights()), fast.own_head.spec
        inside = cls(fast.model_class, fast.config, fast.spec, head, fast.weight_map, weights, *fast.options)
        inside.select = fast.select
        inside._place, inside._parts = place, frozenset(encoder._modules)
        if fast._original is not None:
            inside.follow(fast._original)
        return inside

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_parts", ()) and name not in self._modules:
            raise AttributeError(f"{self._place}.{name} is not there: {_READS}", name=name, obj=self)
        return super().__getattr__(name)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        select: Select | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """`FastEncoder.forward`, with a `FirstRow` for the states of first rows."""
        # transformers' Trainer gives it to whoever takes any argument, for the loss, which an encoder has none of.
        kwargs.pop("num_items_in_batch", None)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        output: Any = super().forward(*inputs, select=select, return_dict=True, **kwargs)
        wanted = self.select if select is None else select
        states: Tensor = output.last_hidden_state
        if isinstance(wanted, str) and wanted == "first":
            # One of the two is there: the call above has checked it.
            given: Any = inputs_embeds if input_ids is None else input_ids
            output["last_hidden_state"] = FirstRow(states, given.shape[1])
        elif isinstance(wanted, str) and self.probe is not None and not torch.compiler.is_compiling():
            output["last_hidden_state"] = self.probe.rows(states, attention_mask)
        return self._given(output, return_dict)


def _encoders_of(model: nn.Module, name: str | Sequence[str] | None) -> dict[str, PreTrainedModel]:
    """The encoders to be replaced, by their places."""
    if isinstance(model, PreTrainedModel) and _is_encoder(model):
        raise TypeError(f"model must hold an encoder, got {class_name(model)}, which is one: give it to optimize")
    candidates = dict(_candidates("", model))
    shown = ", ".join(f"{path} ({type(each).__name__})" for path, each in candidates.items())
    if name is None:
        if len({id(each) for each in candidates.values()}) == 1:
            return dict([next(iter(candidates.items()))])
        if candidates:
            raise ValueError(f"name must say which of the encoders is to be fast, got None: there are {shown}")
        others = [f"{path} ({class_name(each)})" for path, each in model.named_modules() if _is_transformers(each)]
        raise ValueError(
            f"model must hold an encoder, {supported()} of its own, got {class_name(model)} with "
            f"{', '.join(each for each in others if not each.startswith(' ')) or 'no model of transformers'}"
        )
    names = [name] if isinstance(name, str) else list(name)
    for each in names:
        if each not in candidates:
            raise ValueError(f"name must lead to an encoder without a head, got {each!r}: there are {shown or 'none'}")
    if not names:
        raise ValueError(f"name must lead to an encoder, got none: there are {shown or 'none'}")
    return {each: candidates[each] for each in names}


def _candidates(path: str, module: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """All encoders below a module, under each of their places."""
    for key, child in module._modules.items():
        below = f"{path}.{key}" if path else key
        if isinstance(child, PreTrainedModel) and _is_encoder(child):
            yield below, child
        elif child is not None:
            yield from _candidates(below, child)


def _is_transformers(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel)


def _is_encoder(model: PreTrainedModel) -> bool:
    try:
        _, model_class = family_of(model)
    except TypeError:
        return False
    return not head_in(model_class)


def _check_forward(model: nn.Module, path: str, encoder: nn.Module) -> None:
    """Refuses a ``forward`` that goes to the encoder's submodules.

    It sees ``self.bert.embeddings``. What it does not see, as through a variable, fails when it runs: a fast encoder
    has no such submodules.
    """
    above, _, key = path.rpartition(".")
    holder = model.get_submodule(above)
    code = getattr(inspect.unwrap(getattr(holder.forward, "__func__", holder.forward)), "__code__", None)
    if code is None:
        return
    for part in _reads_of(code, key):
        if part in encoder._modules:
            raise ValueError(
                f"{type(holder).__name__}.forward must not use the encoder's submodules, got {key}.{part}: {_READS}"
            )


def _reads_of(code: CodeType, key: str) -> Iterator[str]:
    """The attributes that code reads of the attribute ``key``."""
    before = None
    for instruction in dis.get_instructions(code):
        is_read = instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
        if is_read and before == key:
            yield instruction.argval
        before = instruction.argval if is_read else None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _reads_of(constant, key)


def _check_not_copied(path: str, encoder: nn.Module, memo: Mapping[int, Any]) -> None:
    """Refuses submodules of an encoder that are held elsewhere, too: their copies would not follow."""
    for below, module in encoder.named_modules():
        if below and id(module) in memo:
            raise ValueError(f"model must hold {path}.{below} in its encoder alone, got it elsewhere, too: {_READS}")


def _catch_up(models: Iterable[FastEncoder], *_: object) -> None:
    if not torch.compiler.is_compiling():
        for each in models:
            each.catch_up()


def _stop_following(models: Iterable[FastEncoder]) -> None:
    for each in models:
        each.stop_following()
