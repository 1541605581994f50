"""Several heads on one encoder, which is computed once for all of them."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..conversion import optimize
from ..engine.spec import LastLayer, Quantize, Task
from ..families import family_of
from ..models import FastEncoder, FastModel
from ..original.following import Original
from ..original.own_code import class_name
from ..original.places import set_weight

# The rows that a head reads.
HeadRows: TypeAlias = Literal["first", "mean", "all"]
# The tasks whose answer is one tensor of logits.
_TASKS: tuple[Task, ...] = ("sequence classification", "token classification", "next sentence prediction")
# Arguments of `FastEncoder` that are chosen here, and of models with a head that mean nothing to several.
_NOT_TAKEN = ("labels", "select", "return_dict")


class MultiHeadOutput(NamedTuple):
    """What `MultiHead` gives.

    Attributes:
        logits: what each head gives, by its name.
    """

    logits: dict[str, Tensor]


class MultiHead(nn.Module):
    """Several heads on one fast encoder: one pass over the texts, and an answer from each head.

    Made by `optimize_heads` of transformers models, or here of modules of your own. These are held and not copied, so
    that training them trains yours; the encoder computes no gradients and stays in eval mode.

    Args:
        encoder: what `optimize` makes of a transformers encoder without a head.
        heads: a module by each name, from rows to logits.
        rows: what the heads read, one word for all or one by each name: "first" for each text's first row, (batch,
            hidden_size), "mean" for the mean over its tokens, the same, or "all", (batch, seqlen, hidden_size), zeros
            for padding. If no head reads anything but "first", the last layer is computed for first rows alone.

    Raises:
        TypeError: the encoder is none of `optimize`'s, or a head is no module.
        ValueError: there is no head, a name that a module cannot have, or ``rows`` are others.
    """

    def __init__(
        self,
        encoder: FastEncoder,
        heads: Mapping[str, nn.Module],
        rows: HeadRows | Mapping[str, HeadRows] = "first",
    ) -> None:
        super().__init__()
        if not isinstance(encoder, FastEncoder):
            raise TypeError(f"encoder must be what fastcls.optimize makes of an encoder, got {class_name(encoder)}")
        _check_names(heads)
        for name, head in heads.items():
            if not isinstance(head, nn.Module):
                raise TypeError(f"heads[{name!r}] must be a torch module, got {class_name(head)}")
        self.rows: dict[str, HeadRows] = dict.fromkeys(heads, rows) if isinstance(rows, str) else dict(rows)
        if self.rows.keys() != heads.keys():
            raise ValueError(f"rows must name the heads {', '.join(heads)}, got {', '.join(self.rows) or 'none'}")
        for name, word in self.rows.items():
            if word not in get_args(HeadRows):
                raise ValueError(f"rows of {name!r} must be one of {', '.join(get_args(HeadRows))}, got {word!r}")
        self.encoder = encoder
        encoder.stays_in_eval = True
        self.heads = nn.ModuleDict(heads)
        self.register_state_dict_pre_hook(_catch_up_first)

    def __getstate__(self) -> dict[str, Any]:
        self._catch_up()
        return {**self.__dict__}

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any
    ) -> MultiHeadOutput:
        """Computes the encoder once, and each head.

        Args:
            input_ids, attention_mask, inputs: those of `FastEncoder.forward`, without ``select`` and ``return_dict``.

        Returns:
            The heads' logits by name: of `optimize_heads`, (batch, num_labels) for texts, NaN where a text is masked as
            a whole, and (batch, seqlen, num_labels) for tokens, zeros for padding; else what the modules give.

        Raises:
            TypeError: ``labels`` or another argument that is not taken.
            ValueError: as `FastEncoder.forward`, or a text's first token is masked and a head reads it; after training,
                a model whose encoder is no longer that of the others.
        """
        for name in _NOT_TAKEN:
            if inputs.get(name) is not None:
                raise TypeError(f"forward() takes no argument {name}: compute what you need of the heads' logits")
        self._catch_up()
        reads_first = "first" in self.rows.values()
        select: Literal["first", "all"] = "first" if set(self.rows.values()) == {"first"} else "all"
        if select == "all" and reads_first and attention_mask is not None:
            _check_starts(attention_mask)
        output: Any = self.encoder(input_ids, attention_mask, select=select, return_dict=True, **inputs)
        states: Tensor = output.last_hidden_state
        kept = None if attention_mask is None else (attention_mask != 0).to(states.device)
        read: dict[str, Tensor] = {}
        for word in dict.fromkeys(self.rows.values()):
            if word == "first":
                # A batch without texts has no first row.
                read[word] = states.select(1, 0).contiguous() if states.shape[1] else states.flatten(1)
                if select == "all" and kept is not None:
                    read[word] = read[word].masked_fill(~kept[:, :1], torch.nan)
            else:
                read[word] = _mean(states, kept) if word == "mean" else states
        logits: dict[str, Tensor] = {}
        for name, head in self.heads.items():
            rows = read[self.rows[name]]
            logits[name] = head.answer(self.encoder, rows, kept) if isinstance(head, _HeadOfModel) else head(rows)
        return MultiHeadOutput(logits)

    def stop_following(self) -> None:
        """Goes on with the weights as they are, whatever becomes of the models': see `FastModel.stop_following`."""
        self.encoder.stop_following()
        self._catch_up()

    def clear_caches(self) -> None:
        """To be called after writing to weights in a way that counts no changes: see `FastModel.clear_caches`."""
        self.encoder.clear_caches()
        for head in self.heads.values():
            if isinstance(head, _HeadOfModel) and head.watched is not None:
                head.watched.doubt()

    def _catch_up(self) -> None:
        heads = {name: each for name, each in self.heads.items() if isinstance(each, _HeadOfModel)}
        if not heads:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError("the heads of models must be called outside of what is compiled or exported")
        follows = self.encoder.follows
        if follows:
            self.encoder.catch_up()
        for name, head in heads.items():
            if follows:
                head.catch_up(name, self.encoder)
            else:
                head.stop_following()


def optimize_heads(
    models: Mapping[str, PreTrainedModel],
    *,
    last_layer: LastLayer = "absorbed",
    cuda_graphs: bool = True,
    quantize: Quantize | None = None,
    pack_weights: bool = True,
) -> MultiHead:
    """Several transformers models that share one encoder as one module, which computes the encoder once.

    They are models for a task that were trained on one frozen encoder: each has its own head, and a pooler of its own
    if it has one. Their weights are shared and followed, as `optimize` does it, and the models stay as they were. If a
    model's encoder is trained apart from the others', the next call raises an error.

    Args:
        models: a model by each name, for sequence or token classification or next sentence prediction. All have the
            encoder of the first, the same tensors or the same numbers in them.
        last_layer, cuda_graphs, quantize, pack_weights: see `FastModel`; they are the encoder's.

    Returns:
        A `MultiHead`.

    Raises:
        TypeError: as `optimize`.
        ValueError: as `optimize`, or for another task; an encoder is another than the first model's: the message names
            the first weight that differs.
    """
    _check_names(models)
    fast = {name: _fast(name, model) for name, model in models.items()}
    first = next(iter(models))
    family, _ = family_of(models[first])
    encoder: FastEncoder = optimize(
        models[first].get_submodule(family.prefix.rstrip(".")),
        last_layer=last_layer,
        cuda_graphs=cuda_graphs,
        quantize=quantize,
        pack_weights=pack_weights,
    )
    encoder.gives_pooler_output = False
    for name, each in fast.items():
        _check_same(name, each, encoder)
    heads = {name: _HeadOfModel(models[name], each) for name, each in fast.items()}
    return MultiHead(encoder, heads, {name: head.rows for name, head in heads.items()})


class _HeadOfModel(nn.Module):
    """The head of a transformers model, whose weights it follows.

    Args:
        model: the model.
        fast: what `optimize` makes of it.
    """

    def __init__(self, model: PreTrainedModel, fast: FastModel) -> None:
        super().__init__()
        self._take(model, fast)
        self.register_load_state_dict_pre_hook(_stop_following)

    def _take(self, model: PreTrainedModel, fast: FastModel) -> None:
        # Where this one was moved to, or converted.
        like = next(self.parameters(), None)
        self.head = fast.own_head if like is None else fast.own_head.to(like.device, like.dtype)
        self.model: weakref.ref[PreTrainedModel] | None = weakref.ref(model)
        # Of the encoder, too: see `catch_up`.
        self.watched: Original | None = Original(model, fast.weight_map.sources, fast.weight_map.aliases)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has weights of its own.
        return {**self.__dict__, "model": None, "watched": None}

    @property
    def rows(self) -> HeadRows:
        spec = self.head.spec
        return "all" if spec.is_late or spec.task == "token classification" else spec.pooling

    def answer(self, encoder: FastEncoder, rows: Tensor, kept: Tensor | None) -> Tensor:
        """Rows as the head reads them, and (batch, seqlen) bool which tokens are kept, to its logits."""
        with encoder.inference():
            logits: Tensor = self.head(rows.flatten(0, -2)).unflatten(0, rows.shape[:-1])
            if self.head.spec.is_late:
                return _mean(logits, kept)
            return logits if kept is None or rows.ndim == 2 else logits.masked_fill(~kept[..., None], 0.0)

    def catch_up(self, name: str, encoder: FastEncoder) -> None:
        """Takes the model's head as it is now, if a weight has changed; checks that the encoder is still the same."""
        model = None if self.model is None else self.model()
        if model is None or self.watched is None or self.watched.is_current():
            return
        fast = _fast(name, model)
        _check_same(name, fast, encoder)
        self._take(model, fast)

    def stop_following(self) -> None:
        """Goes on with the weights as they are, in memory of its own."""
        if self.watched is None:
            return
        self.model, self.watched = None, None
        with torch.inference_mode(False), torch.no_grad():
            for own, weight in list(self.named_parameters()):
                set_weight(self, own, weight.data.clone())


def _catch_up_first(several: Any, *_: object) -> None:
    several._catch_up()


def _stop_following(head: Any, *_: object) -> None:
    # Loading would write into the model's memory.
    head.stop_following()


def _check_names(heads: Mapping[str, object]) -> None:
    if not isinstance(heads, Mapping) or not heads:
        raise ValueError(f"there must be a dict with at least one head, got {heads!r}")
    for name in heads:
        if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ValueError(f"a head's name must be one that a torch module can have, got {name!r}")


def _fast(name: str, model: PreTrainedModel) -> FastModel:
    """The fast model of one of several, for its head and to see its encoder."""
    fast: Any = optimize(model)
    if not isinstance(fast, FastModel) or fast.own_head.spec.task not in _TASKS:
        found = fast.own_head.spec.task if isinstance(fast, FastModel) else class_name(model)
        raise ValueError(f"models[{name!r}] must be for one of {', '.join(_TASKS)}, got one for {found}")
    return fast


def _check_same(name: str, fast: FastModel, encoder: FastEncoder) -> None:
    """Checks that a model's encoder is another's, number for number.

    Raises:
        ValueError: it is not.
    """
    for option in dataclasses.fields(fast.spec):
        theirs, ours = getattr(fast.spec, option.name), getattr(encoder.spec, option.name)
        if theirs != ours:
            _refuse(name, f"{option.name} {theirs!r} and not {ours!r}")
    weights = dict(encoder.weights(all_names=True))
    for own, weight in fast.weights(all_names=True):
        if not own.startswith("encoder."):
            continue
        ours = weights.get(own)
        sources = fast.weight_map.sources.get(own) or (fast.weight_map.buffers.get(own, own),)
        if ours is None or (weight.dtype, weight.device) != (ours.dtype, ours.device):
            found = "none" if ours is None else f"{ours.dtype} on {ours.device}"
            _refuse(name, f"{sources[0]} of {weight.dtype} on {weight.device} and not {found}")
        if weight.data_ptr() == ours.data_ptr() or torch.equal(weight, ours):
            continue
        parts = fast.weight_map.parts if len(sources) > 1 else _alone
        for source, their, our in zip(sources, parts(own, weight), parts(own, ours), strict=True):
            if not torch.equal(their, our):
                _refuse(name, f"other numbers in {source}")


def _alone(_: str, weight: Tensor) -> tuple[Tensor]:
    return (weight,)


def _refuse(name: str, found: str) -> NoReturn:
    raise ValueError(
        f"models[{name!r}] must have the first model's encoder, got {found}: several heads share one frozen encoder"
    )


def _check_starts(attention_mask: Tensor) -> None:
    """Checks that no text begins with padding, as far as it has tokens."""
    if bool(((attention_mask[:, 0] == 0) & (attention_mask != 0).any(1)).any()):
        raise ValueError(
            'attention_mask must be 1 in its first column, which heads with rows "first" read: set '
            'tokenizer.padding_side = "right"'
        )


def _mean(states: Tensor, kept: Tensor | None) -> Tensor:
    """(batch, seqlen, width) to the mean over the kept tokens, (batch, width), NaN where there are none."""
    wide = states.float() if states.dtype in (torch.float16, torch.bfloat16) else states
    if kept is None:
        return wide.mean(1).to(states.dtype)
    total = wide.masked_fill(~kept[..., None], 0.0).sum(1)
    return (total / kept.sum(1, keepdim=True)).to(states.dtype)
