"""The encoder as a model of its own, and the base of all models that have one inside."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, get_args

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, modeling_outputs
from transformers.modeling_outputs import BaseModelOutput

from ..engine import operator
from ..engine.batch import PaddedBatch
from ..engine.spec import HeadSpec, Pooling, Rows
from ..engine.weights import has_hooks
from ..families import family_of_class, head_in
from ..families.family import WeightMap
from .base import FastModel

# The rows that `FastEncoder` gives of its last layer: a boolean mask of tokens stands for "chosen".
Select: TypeAlias = "Literal['all', 'first'] | Tensor"


class FastEncoder(FastModel):
    """Encodes texts, for custom heads and for embeddings: see `FastModel`.

    Attributes:
        select: the rows that `forward` gives by default.
        gives_pooler_output: whether a model with a pooler runs it.
    """

    select: Literal["all", "first"] = "all"
    gives_pooler_output: bool = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._output_class = _output_class(self.model_class)
        # The model whose encoder this is, if any.
        self._whole: tuple[FastModel, ...] = ()

    @classmethod
    def inside(cls, model: FastModel) -> FastEncoder:
        """The encoder of a model."""
        family, _ = family_of_class(model.model_class)
        base = next(name for name in family.heads if not head_in(name))
        pools = model.own_head.spec.names.get("dense", "").startswith(family.prefix)
        parts = ("encoder.", "head.dense_") if pools else ("encoder.",)
        weights = {name: weight for name, weight in model.weights() if name.startswith(parts)}
        theirs = model.weight_map
        weight_map = WeightMap(
            {
                own: tuple(name.removeprefix(family.prefix) for name in names)
                for own, names in theirs.sources.items()
                if own in weights
            },
            {},
            {own: name.removeprefix(family.prefix) for own, name in theirs.buffers.items()},
            theirs.rows,
            theirs.layouts,
        )
        head = HeadSpec("encoder", {"dense": "pooler"} if pools else {}, activation=model.own_head.spec.activation)
        encoder = cls(getattr(transformers, base), model.config, model.spec, head, weight_map, weights, *model.options)
        encoder.encoder = model.own_encoder
        encoder._watch_modules()
        # A tuple, so that the model is not registered as a part.
        encoder._whole = (model,)
        return encoder

    def register_forward_hook(self, *arguments: Any, **options: Any) -> RemovableHandle:
        self._check_is_called()
        return super().register_forward_hook(*arguments, **options)

    def register_forward_pre_hook(self, *arguments: Any, **options: Any) -> RemovableHandle:
        self._check_is_called()
        return super().register_forward_pre_hook(*arguments, **options)

    def _check_is_called(self) -> None:
        """A whole model does not call what its ``base_model`` gives, where transformers' does."""
        if self._whole:
            raise RuntimeError(
                "the base_model of a fast model must have no forward hooks, which would not run when the model is "
                "called: register them on its encoder, which gives packed rows"
            )

    def never_called(self, name: str, module: nn.Module, rows: Rows) -> str | None:
        pools = self.gives_pooler_output and self.own_head.dense_weight is not None
        if name == "head" and (not pools or rows in ("mean", "chosen")):
            return "no pooler's output is computed here"
        return super().never_called(name, module, rows)

    @property
    def base_model(self) -> FastEncoder:
        return self

    def catch_up(self, *, adds: bool = True) -> None:
        for whole in self._whole:
            whole.catch_up(adds=adds)
            for name in dict(self.own_head.named_parameters()):
                setattr(self.own_head, name, whole.own_head.get_parameter(name))
        super().catch_up(adds=adds)

    def stop_following(self) -> None:
        """Ends following for the whole model, whose encoder this is, too."""
        for whole in self._whole:
            whole.stop_following()
            self.catch_up()
        super().stop_following()

    @property
    def _task_rows(self) -> Rows:
        return self.select

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
        """Encodes a padded batch, as the transformers model does, or only the wanted rows of its last layer.

        Arguments and errors are those of `FastClassifier.forward`, and:

        Args:
            select: "all", "first" for the first token of each text, or a boolean mask (batch, seqlen) of the tokens
                that are wanted, where the attention mask keeps them. None takes the attribute.

        Returns:
            The transformers model's output, without gradient. ``last_hidden_state`` is (batch, seqlen, hidden_size),
            zeros for padding; of first tokens (batch, 1, hidden_size); of a mask (num_tokens, hidden_size), in the
            order in which indexing with the mask gives them. ``pooler_output`` is there where the model has a pooler
            and first tokens were computed; NaN for a text whose first place the mask leaves out, as padding on the left
            does: what transformers' pooler makes of padding is no answer.
        """
        batch = PaddedBatch(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        shape = self._checked(batch, kwargs)
        wanted = self.select if select is None else select
        pooled = None
        if isinstance(wanted, Tensor):
            states = self._chosen_states(batch, wanted)
        elif wanted == "first":
            states = self._rows(batch, "first", self.fill_of_texts)[:, None]
        elif wanted == "all":
            states = self._rows(batch, "all")
        else:
            raise ValueError(f"select must be 'all', 'first' or a boolean mask {tuple(shape)}, got {wanted!r}")
        pools = self.gives_pooler_output and self.own_head.dense_weight is not None
        if pools and not isinstance(wanted, Tensor):
            first = states[:, 0] if states.shape[1] else states.new_empty(0, self.spec.hidden_size)
            pooled = self._pooled(first)
            if wanted == "all" and attention_mask is not None:
                # The pooler reads a text's first place, where nothing was computed if the padding is on the left.
                is_padding = attention_mask[:, :1] == 0
                pooled = pooled.masked_fill(is_padding.to(pooled.device), math.nan)
        output = self._output_class(last_hidden_state=states)
        if pooled is not None:
            output["pooler_output"] = pooled
        return self._given(output, return_dict)

    def embeddings_of(
        self,
        token_ids: Iterable[Iterable[int]],
        token_type_ids: Iterable[Iterable[int]] | None = None,
        *,
        pooling: Pooling = "first",
    ) -> Tensor:
        """A vector for each of many sequences of token ids as they come from a tokenizer without padding.

        Args:
            token_ids, token_type_ids: as in `FastModel.pack`.
            pooling: "first" for the first token's ([CLS]), "mean" for the mean over a text's tokens.

        Returns:
            (num_texts, hidden_size), in the texts' order.

        Raises:
            TypeError: something that is not an integer.
            ValueError: another pooling, an empty or too long sequence, an id outside its table, or shapes that differ.
        """
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
        if has_hooks(self.own_head):
            raise RuntimeError("head must have no forward hooks, which would not run: embeddings are made without it")
        return self._list_rows(token_ids, token_type_ids, pooling)

    def _pooled(self, states: Tensor) -> Tensor:
        """The pooler over (num_texts, hidden_size)."""
        if self.keeps_graph(states):
            return torch.compiler.disable(self.trained_pooled)(states)
        if torch.compiler.is_compiling():
            if self.is_for_graphs:
                return operator.pool(self, self.description, states)
            outside: Tensor = torch.compiler.disable(self.head_of)(states)
            return outside
        return self.head_of(states)

    def head_of(self, states: Tensor) -> Tensor:
        # Behind the rows' pass, where FSDP has let go of weights.
        leave = self.gather()
        return leave(super().head_of(states))

    def _chosen_states(self, batch: PaddedBatch, chosen: Tensor) -> Tensor:
        """(num_tokens, hidden_size), the tokens of a mask in the order in which indexing with it gives them."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "select must be 'all' or 'first' in a graph, which does not know how many tokens a mask keeps: "
                "call the model outside of what is compiled or exported"
            )
        if chosen.dtype != torch.bool:
            raise TypeError(f"select must be a boolean mask, got {chosen.dtype}")
        if chosen.shape != batch.shape:
            raise ValueError(f"select must have the batch's shape {tuple(batch.shape)}, got {tuple(chosen.shape)}")
        mask = batch.attention_mask
        if mask is not None and (chosen.cpu() & ~mask.cpu().bool()).any():
            raise ValueError("select must be False where attention_mask is 0, got True there")
        return self._rows(batch, "chosen", chosen=chosen, dense=False)


class ModelWithHead(FastModel):
    """A model for a task, whose encoder can be called alone."""

    @property
    def base_model(self) -> FastEncoder:
        """The encoder, and its pooler if it has one, over the same weights; it follows the original as this one does.

        It is this model's own encoder, as transformers' ``base_model`` is: moving the one moves the other.
        """
        return FastEncoder.inside(self)


def _output_class(model_class: type[PreTrainedModel]) -> type[BaseModelOutput]:
    """The class of the transformers model's output."""
    family, _ = family_of_class(model_class)
    found: type[BaseModelOutput] = getattr(modeling_outputs, family.output)
    return found
