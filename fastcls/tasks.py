"""What each task takes and gives: the modules that stand where transformers' models stood."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, get_args

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, modeling_outputs
from transformers.loss.loss_utils import ForMaskedLMLoss, ForQuestionAnsweringLoss
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import ModelOutput

from . import traced
from .encoder import How, has_hooks
from .families import family_of_class
from .inputs import Batch
from .model import FastModel
from .packing import unpack_rows, unpack_selected, unpack_tokens
from .spec import HeadSpec, Pooling, Task, WeightMap
from .targets import IGNORED, checked_labels, checked_positions, classification_loss, deberta_loss, token_loss
from .traced import Rows

# What `FastEncoder` gives of its last layer: a boolean mask of tokens stands for "rows".
Select: TypeAlias = "Literal['all', 'first'] | Tensor"

_Output = TypeVar("_Output", bound=ModelOutput)


class TaskModel(FastModel):
    """What the models of all tasks share: rows of their heads, and outputs of transformers' kind."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.description = traced.describe(self)
        traced.own(self)

    # What stands for a text that the mask leaves out as a whole: no answer, and nothing that looks like one.
    _of_empty_text = math.nan

    def _made_known(self) -> None:
        traced.own(self)

    @property
    def options(self) -> traced.Options:
        """What may be set at any time."""
        return traced.Options(self.last_layer, self.cuda_graphs, self.batch_invariant)

    @property
    def base_model(self) -> FastEncoder:
        """The encoder, and its pooler if it has one, over the same weights; it follows the original as this one does.

        It is this model's own encoder, as transformers' ``base_model`` is: moving the one moves the other.
        """
        return FastEncoder.inside(self)

    def _given(self, output: _Output, return_dict: bool | None) -> _Output | tuple[Any, ...]:
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _empty(self, *shape: int) -> Tensor:
        return self.encoder.embeddings.word_weight.new_empty(shape)

    def _out_features(self) -> int:
        assert self.head.out_weight is not None
        return self.head.out_weight.shape[0]

    def rows_of(self, batch: Batch, rows: Rows, fill: float, selected: Tensor | None) -> Tensor:
        """What `traced.forward` gives, whose arguments these are, of a batch that nobody has checked yet."""
        self._checked(batch, {})
        if rows == "texts":
            return self._text_rows(batch)
        return self._token_rows(batch, fill) if selected is None else self._wanted_rows(batch, selected)

    def pooled(self, states: Tensor) -> Tensor:
        """The head over (num_texts, hidden_size), of an encoder its pooler."""
        if torch.compiler.is_compiling():
            return traced.pool(self, states)
        with self._inference():
            rows: Tensor = self.head(states)
            return rows

    def _wanted_rows(self, batch: Batch, wanted: Tensor) -> Tensor:
        """(batch, seqlen, width), zeros but for ``wanted`` tokens, of those that the mask keeps."""
        if torch.compiler.is_compiling():
            return traced.forward(self, batch, "tokens", selected=wanted)
        if batch.attention_mask is not None:
            wanted = wanted & batch.attention_mask.to(wanted.device).bool()
        if not bool(wanted.any()):
            return self._empty(*batch.shape, self._out_features()).zero_()
        with self._inference():
            how = self._selected_rows
            return unpack_tokens(self._run(self._source(batch, how, wanted), how), batch.shape)

    def _token_rows(self, batch: Batch, fill: float = 0.0) -> Tensor:
        """(batch, seqlen, width), ``fill`` where the mask leaves tokens out."""
        if torch.compiler.is_compiling():
            return traced.forward(self, batch, "tokens", fill)
        if not batch.shape[0]:
            return self._empty(*batch.shape, self._out_features())
        with self._inference():
            source = self._source(batch, self._every_row)
            if source.num_texts == 0:
                return self._empty(*batch.shape, self._out_features()).fill_(fill)
            return unpack_tokens(self._run(source, self._every_row), batch.shape, fill)

    def _text_rows(self, batch: Batch) -> Tensor:
        """(batch, width), `_EMPTY` where the mask leaves out a text as a whole."""
        if torch.compiler.is_compiling():
            return traced.forward(self, batch, "texts")
        if not batch.shape[0]:
            return self._empty(0, self._out_features())
        with self._inference():
            source = self._source(batch, self._pooled)
            if source.num_texts == 0:
                return self._empty(batch.shape[0], self._out_features()).fill_(self._of_empty_text)
            return unpack_rows(self._run(source, self._pooled), batch.shape[0], self._of_empty_text)

    def _list_rows(
        self, token_ids: Iterable[Iterable[int]], token_type_ids: Iterable[Iterable[int]] | None, how: How
    ) -> Tensor:
        """(num_texts, width), in the texts' order."""
        self._check_no_hooks_of_its_own("a method that takes lists of ids")
        self._follow()
        source = self._reader.source_of_lists(token_ids, token_type_ids)
        if source is None:
            return self._empty(0, self._out_features())
        with self._inference():
            return unpack_rows(self._run(source, how))


class Labelled(TaskModel):
    """What has a logit for each label.

    Attributes:
        loss_labels: how many labels the loss counts with: the given model's ``num_labels``, which transformers takes
            for it, whatever its head gives. None is as many as there are logits.
    """

    loss_labels: int | None = None

    @property
    def num_labels(self) -> int:
        return self._out_features()

    def _labels_of_loss(self) -> int:
        return self.num_labels if self.loss_labels is None else self.loss_labels


class FastClassifier(Labelled):
    """A sequence classifier: see `FastModel`."""

    @property
    def _how(self) -> How:
        return self._pooled

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Classifies a padded batch, as the transformers model does.

        Args:
            input_ids: (batch, seqlen), int64 or int32.
            attention_mask: (batch, seqlen), 1 for a token and 0 for padding, any pattern whose first column is 1;
                None keeps every token.
            token_type_ids: (batch, seqlen), or None for type 0. A model without types ignores them.
            position_ids: (batch, seqlen) or (1, seqlen), or None for those that the model's own would take.
            inputs_embeds: (batch, seqlen, embedding_size), instead of ``input_ids``.
            labels: (batch,) or (batch, num_labels); adds the loss that the config's problem type asks for.
            return_dict: False gives a tuple; None asks the config.

        Integer inputs may lie on the CPU or on the model's device. From the CPU nothing waits for a GPU; where one of
        them lies on the GPU, it is waited for once, to read and check them.

        Returns:
            SequenceClassifierOutput with ``logits`` (batch, num_labels), without gradient.

        Raises:
            TypeError: an argument of the wrong type or dtype, or one that this model does not take.
            ValueError: a shape, device or value that does not fit; attentions or hidden states asked for.
            RuntimeError: the module is in training mode.
        """
        batch = Batch(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        texts = self._checked(batch, kwargs)[0]
        if labels is not None and (labels.ndim == 0 or labels.shape[0] != texts):
            raise ValueError(f"labels must have one row for each of the {texts} texts, got {tuple(labels.shape)}")
        logits = self._text_rows(batch)
        loss = None
        if labels is not None and self.config.model_type == "deberta-v2" and self.config.problem_type is None:
            loss, logits = deberta_loss(logits, labels, self._labels_of_loss())
        elif labels is not None:
            loss = classification_loss(logits, labels, self._labels_of_loss(), self.config.problem_type)
        return self._given(SequenceClassifierOutput(loss=loss, logits=logits), return_dict)

    def logits_of(
        self, token_ids: Iterable[Iterable[int]], token_type_ids: Iterable[Iterable[int]] | None = None
    ) -> Tensor:
        """Classifies sequences of token ids as they come from a tokenizer without padding.

        Args:
            token_ids: for each text its ids, special tokens included; at most the model's positions each.
            token_type_ids: the same shape, or None for type 0; a model without types ignores them.

        Returns:
            (num_texts, num_labels), in the texts' order.

        Raises:
            TypeError: something that is not an integer.
            ValueError: an empty or too long sequence, an id outside its table, or shapes that differ.
        """
        return self._list_rows(token_ids, token_type_ids, self._pooled)


class FastNextSentencePredictor(TaskModel):
    """Does the second text of a pair follow the first? See `FastModel`."""

    @property
    def _how(self) -> How:
        return self._pooled

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> NextSentencePredictorOutput | tuple[Any, ...]:
        """Scores a padded batch of pairs, as the transformers model does.

        Args and errors are those of `FastClassifier.forward`; ``labels`` are (batch,), 0 where the second text follows.

        Returns:
            NextSentencePredictorOutput with ``logits`` (batch, 2), without gradient.
        """
        batch = Batch(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        texts = self._checked(batch, kwargs)[0]
        if labels is not None and labels.numel() != texts:
            raise ValueError(f"labels must be one for each of the {texts} pairs, got {tuple(labels.shape)}")
        logits = self._text_rows(batch)
        loss = None if labels is None else F.cross_entropy(logits, labels.view(-1).to(logits.device))
        return self._given(NextSentencePredictorOutput(loss=loss, logits=logits), return_dict)


class FastMultipleChoice(TaskModel):
    """Which of several continuations fits best? See `FastModel`."""

    @property
    def _of_empty_text(self) -> float:  # type: ignore[override]
        # No choice is made of one that is not there.
        return torch.finfo(self.dtype).min

    @property
    def _how(self) -> How:
        return self._pooled

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput | tuple[Any, ...]:
        """Scores a padded batch of questions with their choices, as the transformers model does.

        Args and errors are those of `FastClassifier.forward`, but all inputs are (batch, num_choices, seqlen), and
        ``labels`` are (batch,), the right choice.

        Returns:
            MultipleChoiceModelOutput with ``logits`` (batch, num_choices), without gradient.
        """
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
        for name, tensor in zip(names, given, strict=True):
            wanted = 4 if name == "inputs_embeds" else 3
            if isinstance(tensor, Tensor) and tensor.ndim != wanted:
                found = tuple(tensor.shape)
                raise ValueError(
                    f"{name} must have {wanted} dimensions, (batch, num_choices, seqlen, ...), got {found}"
                )
        # What is no tensor is refused below, by name.
        batch = Batch(*(tensor.flatten(0, 1) if isinstance(tensor, Tensor) else tensor for tensor in given))
        self._checked(batch, kwargs)
        texts, choices = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]  # type: ignore[union-attr]
        if labels is not None and labels.shape != (texts,):
            raise ValueError(f"labels must have shape ({texts},), one a question, got {tuple(labels.shape)}")
        logits = self._text_rows(batch).view(texts, choices)
        loss = None if labels is None else F.cross_entropy(logits, labels.to(logits.device))
        return self._given(MultipleChoiceModelOutput(loss=loss, logits=logits), return_dict)


class FastTokenClassifier(Labelled):
    """A label for each token: see `FastModel`."""

    @property
    def _how(self) -> How:
        return self._every_row

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Classifies the tokens of a padded batch, as the transformers model does.

        Args and errors are those of `FastClassifier.forward`, but any mask with a token in each row is taken, and
        ``labels`` are (batch, seqlen), -100 where none is wanted, as for padding.

        Returns:
            TokenClassifierOutput with ``logits`` (batch, seqlen, num_labels), without gradient; zeros for padding.
        """
        batch = Batch(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        shape = self._checked(batch, kwargs)
        if labels is not None:
            labels = checked_labels(labels, shape, attention_mask)
        logits = self._token_rows(batch)
        loss = None if labels is None else token_loss(logits, labels, self._labels_of_loss())
        return self._given(TokenClassifierOutput(loss=loss, logits=logits), return_dict)


class FastQuestionAnswerer(TaskModel):
    """Where in a text the answer begins and ends: see `FastModel`."""

    @property
    def _how(self) -> How:
        return self._every_row

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Scores each token of a padded batch as the answer's first and last, as the transformers model does.

        Args and errors are those of `FastClassifier.forward`, but any mask with a token in each row is taken;
        ``start_positions`` and ``end_positions``, (batch,) and together, add the loss. It leaves padding out, where
        transformers' own counts what it computes there.

        Returns:
            QuestionAnsweringModelOutput with ``start_logits`` and ``end_logits`` (batch, seqlen), without gradient; the
            lowest number there is for padding, so that no answer is found in it.
        """
        batch = Batch(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        texts = self._checked(batch, kwargs)[0]
        for name, positions in (("start_positions", start_positions), ("end_positions", end_positions)):
            if positions is not None and positions.numel() != texts:
                raise ValueError(f"{name} must be one for each of the {texts} texts, got {tuple(positions.shape)}")
        if start_positions is not None:
            start_positions = checked_positions("start_positions", start_positions, attention_mask)
        if end_positions is not None:
            end_positions = checked_positions("end_positions", end_positions, attention_mask)
        if self._out_features() != 2:
            raise ValueError(f"config.num_labels must be 2 for question answering, got {self._out_features()}")
        start, end = self._token_rows(batch, torch.finfo(self.dtype).min).unbind(2)
        start, end, loss = start.contiguous(), end.contiguous(), None
        if start_positions is not None and end_positions is not None:
            loss = ForQuestionAnsweringLoss(
                start, end, start_positions.to(start.device), end_positions.to(start.device)
            )
        return self._given(QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end), return_dict)


@dataclass
class FastMaskedLMOutput(MaskedLMOutput):
    """A masked language model's output, which says what it computed.

    Attributes:
        logits: (batch, seqlen, vocab_size), zeros where nothing was predicted; or, not dense, (num_rows, vocab_size).
        rows: (num_rows, 2) int64 on the CPU, text and token of each row that was predicted, in their order; None from a
            graph, compiled or exported. It is no item of the output, whose items and tuple are transformers' own.
    """

    rows: ClassVar[Tensor | None] = None

    @classmethod
    def of(cls, loss: Tensor | None, logits: Tensor, rows: Tensor) -> FastMaskedLMOutput:
        output = cls(loss=loss, logits=logits)
        object.__setattr__(output, "rows", rows)
        return output


class FastMaskedLM(TaskModel):
    """Fills masks: see `FastModel`. The last layer and the product with the vocabulary run for the masked tokens alone.

    Attributes:
        mask_token_id: the id of the token that stands for what is to be predicted, ``tokenizer.mask_token_id``. While
            it is None every token is predicted, unless labels say which.
        dense: whether logits come at their places in a padded batch, or one row for each predicted token.
    """

    mask_token_id: int | None = None
    dense: bool = True

    @property
    def _how(self) -> How:
        return self._every_row

    @property
    def _ways(self) -> tuple[How, ...]:
        return (self._every_row, self._selected_rows)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> FastMaskedLMOutput | tuple[Any, ...]:
        """Predicts tokens of a padded batch: those that labels name, else those that are masked, else all.

        Args and errors are those of `FastClassifier.forward`, but any mask with a token in each row is taken, and
        ``labels`` are (batch, seqlen), -100 for tokens that are not to be predicted; they add the loss.

        Returns:
            FastMaskedLMOutput, without gradient.
        """
        batch = Batch(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        shape = self._checked(batch, kwargs)
        wanted: Tensor | None = None
        if labels is not None:
            labels = checked_labels(labels, shape, attention_mask)
            wanted = labels != IGNORED
        elif self.mask_token_id is not None and input_ids is not None:
            wanted = input_ids == self.mask_token_id
        if torch.compiler.is_compiling():
            return self._given(self._traced(batch, wanted, labels), return_dict)
        all_of_them = wanted is None
        if wanted is None:
            wanted = torch.ones(shape, dtype=torch.bool, device="cpu")
        if attention_mask is not None:
            wanted = wanted & attention_mask.to(wanted.device).bool()
        rows = wanted.nonzero().cpu()
        if rows.shape[0]:
            how = self._every_row if all_of_them else self._selected_rows
            with self._inference():
                parts = self._run(self._source(batch, how, None if all_of_them else wanted), how)
                logits = unpack_tokens(parts, shape) if self.dense else unpack_selected(parts)[0]
        else:
            logits = self._empty(*(shape if self.dense else (0,)), self._out_features()).zero_()
        loss = None
        if labels is not None:
            found = logits[tuple(rows.T)] if self.dense else logits
            expected = labels[tuple(rows.to(labels.device).T)]
            loss = ForMaskedLMLoss(found, expected, found.shape[1])
        return self._given(FastMaskedLMOutput.of(loss, logits, rows), return_dict)

    def _traced(self, batch: Batch, wanted: Tensor | None, labels: Tensor | None) -> FastMaskedLMOutput:
        if not self.dense:
            raise RuntimeError(
                "dense must be True in a graph, which does not know how many tokens are masked: set it, or call the "
                "model outside of what is compiled or exported"
            )
        logits = self._token_rows(batch) if wanted is None else self._wanted_rows(batch, wanted)
        loss = None if labels is None else ForMaskedLMLoss(logits, labels, self._out_features())
        return FastMaskedLMOutput(loss=loss, logits=logits)


class FastEncoder(TaskModel):
    """An encoder for heads of one's own, and for embeddings: see `FastModel`.

    Attributes:
        select: what `forward` gives of the last layer where a call does not say.
        gives_pooler_output: whether a model with a pooler runs it.
    """

    select: Literal["all", "first"] = "all"
    gives_pooler_output: bool = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._output_class = _output_class(self.model_class)
        # The model that this is the encoder of, if it is one's.
        self._whole: tuple[TaskModel, ...] = ()

    @classmethod
    def inside(cls, model: TaskModel) -> FastEncoder:
        """The encoder of a model."""
        family, _ = family_of_class(model.model_class)
        base = next(name for name in family.heads if "For" not in name)
        pools = model.head.spec.names.get("dense", "").startswith(family.prefix)
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
        )
        head = HeadSpec("encoder", {"dense": "pooler"} if pools else {}, activation=model.head.spec.activation)
        encoder = cls(getattr(transformers, base), model.config, model.spec, head, weight_map, weights, *model.options)
        encoder.encoder = model.encoder
        encoder._watch_hooks()
        # In a tuple, so that it is not registered as a part.
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

    def _never_called(self, name: str, module: nn.Module, how: How) -> str | None:
        pools = self.gives_pooler_output and self.head.dense_weight is not None
        if name == "head" and (not pools or how.pools or how.selection == "rows"):
            return "no pooler's output is computed here"
        return super()._never_called(name, module, how)

    @property
    def base_model(self) -> FastEncoder:
        return self

    def _follow(self) -> None:
        for whole in self._whole:
            whole._follow()
            for name in dict(self.head.named_parameters()):
                setattr(self.head, name, whole.head.get_parameter(name))
        super()._follow()

    def stop_following(self) -> None:
        """Of the whole model, whose encoder this is, too."""
        for whole in self._whole:
            whole.stop_following()
            self._follow()
        super().stop_following()

    @property
    def _how(self) -> How:
        return self._every_row if self.select == "all" else self._pooled

    @property
    def _ways(self) -> tuple[How, ...]:
        return (self._pooled, self._every_row, self._selected_rows, self._averaged)

    @property
    def _averaged(self) -> How:
        return How(self.last_layer, "all", pools=True)

    def _finish(self, states: Tensor) -> Tensor:
        # The pooler, where there is one, takes the first row of those that are given.
        return states

    def _out_features(self) -> int:
        return self.spec.hidden_size

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
        """Encodes a padded batch, as the transformers model does, or of its last layer only what is wanted.

        Args and errors are those of `FastClassifier.forward`, and:

        Args:
            select: "all", "first" for the first token of each text, or a boolean mask (batch, seqlen) of the tokens
                that are wanted, where the attention mask keeps them. None takes the attribute.

        Returns:
            What the transformers model gives, without gradient. ``last_hidden_state`` is (batch, seqlen, hidden_size),
            zeros for padding; of first tokens (batch, 1, hidden_size); of a mask (num_tokens, hidden_size), in the
            order in which indexing with the mask gives them. ``pooler_output`` is there where the model has a pooler
            and first tokens were computed; NaN for a text whose first place the mask leaves out, as padding on the left
            does: what transformers' pooler makes of padding is no answer.
        """
        batch = Batch(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        shape = self._checked(batch, kwargs)
        wanted = self.select if select is None else select
        pooled = None
        if isinstance(wanted, Tensor):
            states = self._selected_states(batch, wanted, attention_mask)
        elif wanted == "first":
            states = self._text_rows(batch)[:, None]
        elif wanted == "all":
            states = self._token_rows(batch)
        else:
            raise ValueError(f"select must be 'all', 'first' or a boolean mask {tuple(shape)}, got {wanted!r}")
        pools = self.gives_pooler_output and self.head.dense_weight is not None
        if pools and not isinstance(wanted, Tensor):
            pooled = self.pooled(states[:, 0] if states.shape[1] else self._empty(0, self.spec.hidden_size))
            if wanted == "all" and attention_mask is not None:
                # The pooler reads the first place of a text, where padding on the left has nothing that was computed.
                is_padding = attention_mask[:, :1] == 0
                pooled = pooled.masked_fill(is_padding.to(pooled.device), self._of_empty_text)
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
        if has_hooks(self.head):
            raise RuntimeError("head must have no forward hooks, which would not run: embeddings are made without it")
        return self._list_rows(token_ids, token_type_ids, self._pooled if pooling == "first" else self._averaged)

    def _selected_states(self, batch: Batch, wanted: Tensor, attention_mask: Tensor | None) -> Tensor:
        shape = batch.shape
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "select must be 'all' or 'first' in a graph, which does not know how many tokens a mask keeps: "
                "call the model outside of what is compiled or exported"
            )
        if wanted.dtype != torch.bool:
            raise TypeError(f"select must be a boolean mask, got {wanted.dtype}")
        if wanted.shape != shape:
            raise ValueError(f"select must have the batch's shape {tuple(shape)}, got {tuple(wanted.shape)}")
        dropped = False if attention_mask is None else (wanted.cpu() & ~attention_mask.cpu().bool()).any()
        if dropped:
            raise ValueError("select must be False where attention_mask is 0, got True there")
        if not bool(wanted.any()):
            return self._empty(0, self.spec.hidden_size)
        with self._inference():
            how = self._selected_rows
            return unpack_selected(self._run(self._source(batch, how, wanted), how))[0]


def _output_class(model_class: type[PreTrainedModel]) -> type[BaseModelOutput]:
    """What the transformers model of an encoder gives."""
    if model_class is PreTrainedModel:
        # In a graph, of which the rows alone are asked.
        return BaseModelOutput
    family, _ = family_of_class(model_class)
    found: type[BaseModelOutput] = getattr(modeling_outputs, family.output)
    return found


TASKS: Mapping[Task, type[TaskModel]] = {
    "sequence classification": FastClassifier,
    "next sentence prediction": FastNextSentencePredictor,
    "multiple choice": FastMultipleChoice,
    "masked language modelling": FastMaskedLM,
    "token classification": FastTokenClassifier,
    "question answering": FastQuestionAnswerer,
    "encoder": FastEncoder,
}
