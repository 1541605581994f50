"""The nn.Module that stands where a transformers classifier stood."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from fastcls_kernels import explain_backend, warming_shapes

from .encoder import Embeddings, EncoderLayer, LastLayer, check_last_layer, cls_states_of
from .families import family_of
from .graphs import Graphs, being_captured, bucket_of, max_graph_tokens
from .heads import ClassificationHead
from .packing import PackedTokens, PackShape, Source, fill_rows, flat_integers, pack, source_of_padded, unpack_rows
from .spec import EncoderSpec, WeightMap

# On a CPU a pass over about this many tokens keeps its activations in cache; larger batches run in several passes.
CPU_TOKENS_PER_PASS = 2048
# On a GPU this many fill the largest chip, and bound the memory of a pass: some 1.6 GB for BERT-base in float32.
GPU_TOKENS_PER_PASS = 65536


class FastClassifier(nn.Module):
    """A BERT classifier that computes only what its label needs. Made by `optimize`; runs inference only.

    Attributes:
        config: the transformers config.
        spec: the encoder's shape.
        last_layer: how the last layer is computed: "absorbed" (no keys, no values, [CLS] alone), "selected" (keys and
            values for all tokens, the rest for [CLS] alone) or "full" (every row). The logits are the same up to
            rounding. May be set at any time.
        cuda_graphs: whether small passes are replayed as CUDA graphs, on a GPU with the Triton kernels. A graph is made
            at the second use of a shape and reads the weights where they were then: whoever puts others in their place
            by hand (``parameter.data = ...``) calls `clear_graphs`. May be set at any time.
    """

    def __init__(
        self,
        model_class: type[PreTrainedModel],
        config: PreTrainedConfig,
        spec: EncoderSpec,
        weight_map: WeightMap,
        weights: Mapping[str, nn.Parameter],
        last_layer: LastLayer = "absorbed",
        cuda_graphs: bool = True,
    ) -> None:
        super().__init__()
        self.model_class = model_class
        self.config = config
        self.spec = spec
        self.weight_map = weight_map
        self.last_layer = last_layer
        self.cuda_graphs = cuda_graphs
        self.embeddings = Embeddings(spec, _under("embeddings.", weights))
        self.layers = nn.ModuleList(
            EncoderLayer(spec, _under(f"layers.{layer}.", weights)) for layer in range(spec.num_layers)
        )
        self.head = ClassificationHead(_under("head.", weights))
        self.register_state_dict_post_hook(_to_checkpoint_names)
        self.register_load_state_dict_pre_hook(_from_checkpoint_names)
        self.register_load_state_dict_post_hook(_forget_graphs)
        self._graphs = self._new_graphs()
        self.eval()

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes graphs of its own, over its own weights.
        return {name: value for name, value in self.__dict__.items() if name != "_graphs"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._graphs = self._new_graphs()

    def _new_graphs(self) -> Graphs:
        # Weakly, so that a model that nobody holds gives its memory back at once.
        compute = weakref.WeakMethod(self._compute)

        def run(packed: PackedTokens, last_layer: LastLayer) -> Tensor:
            method = compute()
            assert method is not None
            return method(packed, last_layer)

        return Graphs(run, self.spec.max_positions)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FastClassifier:
        # Every way of moving or converting the weights comes through here.
        self._graphs.clear()
        return super()._apply(fn, recurse)

    def clear_graphs(self) -> None:
        """Forgets the CUDA graphs that were made, and their memory."""
        self._graphs.clear()

    @property
    def last_layer(self) -> LastLayer:
        return self._last_layer

    @last_layer.setter
    def last_layer(self, last_layer: LastLayer) -> None:
        check_last_layer(last_layer)
        self._last_layer = last_layer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embeddings.word_table.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of the computation."""
        return self.embeddings.word_table.dtype

    @property
    def _runs_triton(self) -> bool:
        return explain_backend(self.device)[0] == "triton"

    @property
    def num_labels(self) -> int:
        return self.head.classifier_weight.shape[0]

    def can_generate(self) -> bool:
        """False; transformers' pipelines ask."""
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Classifies a padded batch, as the transformers model does.

        Args:
            input_ids: (batch, seqlen), int64 or int32.
            attention_mask: (batch, seqlen), 1 for a token and 0 for padding, any pattern whose first column is 1;
                None keeps every token.
            token_type_ids: (batch, seqlen), or None for type 0.
            position_ids: (batch, seqlen) or (1, seqlen), or None for 0, 1, 2, ... along each row.
            inputs_embeds: (batch, seqlen, hidden_size), instead of ``input_ids``.
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
        if self.training:
            raise RuntimeError("fastcls runs inference only: call .eval() first, or train the transformers model")
        self._refuse_extras(output_attentions, output_hidden_states, kwargs)
        shape = self._batch_shape(input_ids, inputs_embeds)
        if labels is not None and (labels.ndim == 0 or labels.shape[0] != shape[0]):
            raise ValueError(f"labels must have one row for each of the {shape[0]} texts, got {tuple(labels.shape)}")
        source = self._checked_source(shape, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        with self._inference():
            logits = self._no_logits() if source is None else self._logits(self._pack(source))
        output = SequenceClassifierOutput(
            loss=None if labels is None else _loss(labels, logits, self.config), logits=logits
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def logits_of(
        self, token_ids: Sequence[Sequence[int]], token_type_ids: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """Classifies sequences of token ids as they come from a tokenizer without padding.

        Args:
            token_ids: for each text its ids, special tokens included; at most the model's positions each.
            token_type_ids: the same shape, or None for type 0.

        Returns:
            (num_texts, num_labels), in the texts' order.

        Raises:
            ValueError: an empty or too long sequence, an id outside its table, or shapes that differ.
        """
        source = self._source_of_lists(token_ids, token_type_ids)
        if source is None:
            return self._no_logits()
        with self._inference():
            return self._logits(self._pack(source))

    def pack(
        self, token_ids: Sequence[Sequence[int]], token_type_ids: Sequence[Sequence[int]] | None = None
    ) -> list[PackedTokens]:
        """Packs sequences of token ids on the model's device, for `forward_packed`.

        Args and errors are those of `logits_of`. Of many texts several parts are made.
        """
        source = self._source_of_lists(token_ids, token_type_ids)
        return [] if source is None else [part.to(self.device) for part in self._pack(source)]

    def forward_packed(self, packed: PackedTokens) -> Tensor:
        """Packed tokens to logits (num_texts, num_labels) in packed order, without waiting for a GPU.

        Args:
            packed: what `pack` gives, or its like in pinned memory of the CPU.
        """
        with self._inference():
            if self._replays(packed):
                logits = self._graphs(packed, self.last_layer, self.device)
            else:
                logits = self._compute(packed.to(self.device), self.last_layer)
        return logits[: packed.num_texts]

    def warm_up(self) -> None:
        """Compiles every kernel that a batch of token ids may need, so that none waits for it; on a CPU, nothing.

        It is for the present `last_layer`. Compiled kernels are kept on disk by triton, for other processes too. CUDA
        graphs are made as batches come.
        """
        if not self._runs_triton:
            return
        with self._inference():
            for lengths in warming_shapes(self.device, self.spec.max_positions, GPU_TOKENS_PER_PASS):
                token_ids = [[0] * length for length in lengths]
                for types in (None, token_ids):
                    source = self._source_of_lists(token_ids, types)
                    assert source is not None
                    for packed in pack(source, GPU_TOKENS_PER_PASS, fill_rows):
                        self._compute(packed.to(self.device), self.last_layer)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes a transformers checkpoint, which ``from_pretrained`` of the original class reads back.

        Args:
            save_directory: a folder, made if need be.
            kwargs: passed on to transformers' ``save_pretrained``.
        """
        with torch.device("meta"):
            model = self.model_class(self.config)
        model.load_state_dict(self.state_dict(), assign=True)
        model.save_pretrained(save_directory, **kwargs)

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """No gradients, and the model's own dtype: autocast would change it between one operation and the next."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            yield

    def _no_logits(self) -> Tensor:
        return self.head.classifier_weight.new_empty(0, self.num_labels)

    def _pack(self, source: Source) -> Iterator[PackedTokens]:
        on_cpu = self.device.type == "cpu"
        return pack(
            source,
            CPU_TOKENS_PER_PASS if on_cpu else GPU_TOKENS_PER_PASS,
            self._fill_up if self._runs_triton else fill_rows,
            sort=not self._runs_triton,
            pin=self.device.type == "cuda",
        )

    def _logits(self, parts: Iterable[PackedTokens]) -> Tensor:
        return unpack_rows([(self.forward_packed(part), part) for part in parts])

    def _fill_up(self, tokens: int, sequences: int) -> PackShape:
        bucket = bucket_of(tokens, sequences)
        return bucket if self._may_replay(bucket) else fill_rows(tokens, sequences)

    def _may_replay(self, shape: PackShape) -> bool:
        return self.cuda_graphs and self.device.type == "cuda" and shape.tokens <= max_graph_tokens(self.spec)

    def _replays(self, packed: PackedTokens) -> bool:
        return (
            self._may_replay(packed.shape)
            and packed.inputs_embeds is None
            and packed.shape == bucket_of(*packed.shape)
            and self._runs_triton
            # A replay would pass hooks by.
            and not any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())
            and not being_captured()
        )

    def _compute(self, packed: PackedTokens, last_layer: LastLayer) -> Tensor:
        """Packed tokens on the model's device to logits (num_sequences, num_labels)."""
        layers = cast(Sequence[EncoderLayer], self.layers)
        logits: Tensor = self.head(cls_states_of(layers, self.embeddings(packed), packed.layout, last_layer))
        return logits

    def _source_of_lists(
        self, token_ids: Sequence[Sequence[int]], token_type_ids: Sequence[Sequence[int]] | None
    ) -> Source | None:
        """All of it is checked before any of it is computed."""
        lengths = [len(ids) for ids in token_ids]
        if not lengths:
            return None
        if min(lengths) == 0:
            raise ValueError(f"token_ids must hold at least one token a text, got none for text {lengths.index(0)}")
        self._check_positions(max(lengths))
        if token_type_ids is not None and [len(types) for types in token_type_ids] != lengths:
            raise ValueError("token_type_ids must have the lengths of token_ids")
        ids = flat_integers("token_ids", token_ids)
        _check_range("token_ids", _range_of(ids), self.spec.vocab_size, "vocab_size")
        types = None if token_type_ids is None else flat_integers("token_type_ids", token_type_ids)
        if types is not None:
            _check_range("token_type_ids", _range_of(types), self.spec.token_types, "type_vocab_size")
        return Source(torch.tensor(lengths), None, ids, types, None, None)

    def _refuse_extras(
        self, output_attentions: bool | None, output_hidden_states: bool | None, kwargs: Mapping[str, Any]
    ) -> None:
        for name, asked in (
            ("output_attentions", output_attentions),
            ("output_hidden_states", output_hidden_states),
        ):
            if getattr(self.config, name, False) if asked is None else asked:
                raise ValueError(
                    f"{name} must be False: fastcls does not compute what the label does not need. "
                    "Use the transformers model for it"
                )
        unknown = [name for name, value in kwargs.items() if value is not None and value is not False]
        if unknown:
            raise TypeError(f"forward() takes no argument {', '.join(unknown)}")

    def _batch_shape(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> torch.Size:
        """(batch, seqlen)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if input_ids is not None:
            self._check_integers("input_ids", input_ids)
            if input_ids.ndim != 2:
                raise ValueError(f"input_ids must have shape (batch, seqlen), got {tuple(input_ids.shape)}")
            shape = input_ids.shape
        else:
            assert inputs_embeds is not None
            size = self.spec.hidden_size
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != size:
                raise ValueError(
                    f"inputs_embeds must have shape (batch, seqlen, {size}), got {tuple(inputs_embeds.shape)}"
                )
            if inputs_embeds.dtype != self.dtype:
                raise TypeError(f"inputs_embeds must be {self.dtype} like the model, got {inputs_embeds.dtype}")
            if inputs_embeds.device != self.device:
                raise ValueError(f"inputs_embeds must be on {self.device} like the model, got {inputs_embeds.device}")
            shape = inputs_embeds.shape[:2]
        if shape[0] and not shape[1]:
            raise ValueError(f"a batch of {shape[0]} texts must hold at least one token each, got shape {tuple(shape)}")
        return shape

    def _checked_source(
        self,
        shape: torch.Size,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Source | None:
        """What is to be packed, or None of no texts. All of it is checked before any of it is computed."""
        if attention_mask is not None:
            if not isinstance(attention_mask, Tensor):
                raise TypeError(f"attention_mask must be a torch.Tensor, got {type(attention_mask).__name__}")
            if attention_mask.shape != shape:
                raise ValueError(
                    f"attention_mask must have the batch's shape {tuple(shape)}, got {tuple(attention_mask.shape)}"
                )
            self._check_place("attention_mask", attention_mask)
        if token_type_ids is not None:
            self._check_integers("token_type_ids", token_type_ids)
            if token_type_ids.shape != shape:
                raise ValueError(f"token_type_ids must have shape {tuple(shape)}, got {tuple(token_type_ids.shape)}")
        if position_ids is not None:
            self._check_integers("position_ids", position_ids)
            if position_ids.shape not in (shape, (1, shape[1])):
                raise ValueError(
                    f"position_ids must have shape {tuple(shape)} or (1, {shape[1]}), got {tuple(position_ids.shape)}"
                )
        if not shape[0]:
            return None

        given = (input_ids, attention_mask, token_type_ids, position_ids)
        # One of them on a GPU has to be waited for anyway, so the rest follow it there.
        on_cpu = all(tensor is None or tensor.device.type == "cpu" for tensor in given)
        place = torch.device("cpu") if on_cpu else self.device

        def placed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(place, non_blocking=True)

        ids, values, types, positions = map(placed, given)
        mask = torch.ones(shape, dtype=torch.bool, device=place) if values is None else values.bool()
        positions = torch.arange(shape[1], device=place)[None] if positions is None else positions
        positions = positions.expand(shape)
        lengths = self._check_values(mask, values, ids, types, positions, own_positions=position_ids is not None)
        return source_of_padded(mask, ids, types, positions, inputs_embeds, lengths)

    def _check_values(
        self,
        mask: Tensor,
        values: Tensor | None,
        ids: Tensor | None,
        types: Tensor | None,
        positions: Tensor,
        *,
        own_positions: bool,
    ) -> Tensor:
        """Checks what the integers hold, and gives each text's length; waits for a GPU that they are on once."""
        binary = mask.new_ones(1) if values is None else (mask.to(values.dtype) == values).all()[None]
        ranges = [_bounds(torch.where(mask, tensor, 0)) for tensor in (types, positions, ids) if tensor is not None]
        found = [mask.sum(1), mask[:, 0], binary, *(bound[None] for bounds in ranges for bound in bounds)]
        facts = torch.cat([fact.long() for fact in found]).tolist()
        texts = mask.shape[0]
        lengths, first_column, (is_binary, *bounds) = facts[:texts], facts[texts : 2 * texts], facts[2 * texts :]
        if not is_binary:
            raise ValueError("attention_mask must hold 1 (token) and 0 (padding) only, got other values")
        if 0 in first_column:
            raise ValueError(
                "attention_mask must be 1 in its first column, where [CLS] is; "
                f"it is 0 in row {first_column.index(0)}. "
                'For left-padded batches set tokenizer.padding_side = "right"'
            )
        spec = self.spec
        if types is not None:
            _check_range("token_type_ids", bounds[:2], spec.token_types, "type_vocab_size")
            bounds = bounds[2:]
        if own_positions:
            _check_range("position_ids", bounds[:2], spec.max_positions, "max_position_embeddings")
        else:
            self._check_positions(bounds[1] + 1)
        if ids is not None:
            _check_range("input_ids", bounds[2:], spec.vocab_size, "vocab_size")
        return torch.tensor(lengths)

    def _check_positions(self, longest: int) -> None:
        if longest > self.spec.max_positions:
            raise ValueError(
                f"a text of {longest} tokens is longer than the model's {self.spec.max_positions} positions: "
                f"pass truncation=True, max_length={self.spec.max_positions} to the tokenizer"
            )

    def _check_integers(self, name: str, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int64, torch.int32):
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be an int64 or int32 tensor, got {found}")
        self._check_place(name, tensor)

    def _check_place(self, name: str, tensor: Tensor) -> None:
        if tensor.device.type != "cpu" and tensor.device != self.device:
            raise ValueError(f"{name} must be on the CPU or on {self.device} like the model, got {tensor.device}")


def optimize(model: PreTrainedModel, *, last_layer: LastLayer = "absorbed", cuda_graphs: bool = True) -> FastClassifier:
    """A module with the same interface that gives the same logits, faster. Inference only.

    It shares the model's weights: query, key and value become one matrix, of which the model's own parameters are
    views from then on, so that both go on working and no memory is doubled.

    Args:
        model: a transformers ``BertForSequenceClassification`` in float32, float16 or bfloat16, on one device.
        last_layer, cuda_graphs: see `FastClassifier`.

    Raises:
        TypeError: the model's class is not supported, or its parameters' dtype is not.
        ValueError: its config asks for what fastcls does not compute, or its parameters are not those of its class
            (adapters must be merged first), or lie on several devices.
    """
    check_last_layer(last_layer)
    family = family_of(model)
    spec = family.spec(model.config)
    weight_map = family.weights(spec)
    parameters = dict(model.named_parameters())
    _check_parameters(parameters, weight_map)
    _check_tables(parameters, spec, weight_map)
    weights = {own: _take_over([parameters[name] for name in names]) for own, names in weight_map.sources.items()}
    return FastClassifier(type(model), model.config, spec, weight_map, weights, last_layer, cuda_graphs)


def _check_parameters(parameters: Mapping[str, nn.Parameter], weight_map: WeightMap) -> None:
    differing = sorted(parameters.keys() ^ weight_map.checkpoint_names)
    if differing:
        raise ValueError(
            "model must have just the parameters of its class (merge or remove adapters first); "
            f"these differ: {', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''}"
        )
    dtypes = {parameter.dtype for parameter in parameters.values()}
    allowed = {torch.float32, torch.float16, torch.bfloat16}
    if not any(parameter.is_cuda for parameter in parameters.values()):
        # To prove exactness with; no GPU kernel computes in it.
        allowed.add(torch.float64)
    if len(dtypes) != 1 or not dtypes <= allowed:
        raise TypeError(
            "model must have all its parameters in one of float32, float16 or bfloat16, "
            f"got {', '.join(sorted(map(str, dtypes)))}"
        )
    devices = {parameter.device for parameter in parameters.values()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model must have all its parameters on one device that holds data, got {found}")


def _check_tables(parameters: Mapping[str, nn.Parameter], spec: EncoderSpec, weight_map: WeightMap) -> None:
    """Ids are checked against the config's sizes, so the tables must have them."""
    for own, size in (
        ("embeddings.word_table", spec.vocab_size),
        ("embeddings.position_table", spec.max_positions),
        ("embeddings.token_type_table", spec.token_types),
    ):
        (name,) = weight_map.sources[own]
        if parameters[name].shape != (size, spec.hidden_size):
            raise ValueError(
                f"{name} must have shape {(size, spec.hidden_size)} as the config says, "
                f"got {tuple(parameters[name].shape)}"
            )


def _take_over(parameters: list[nn.Parameter]) -> nn.Parameter:
    """A parameter over the same memory; several become one, and they its views."""
    if len(parameters) == 1:
        return nn.Parameter(parameters[0].data, requires_grad=False)
    first, rows = parameters[0].data, [parameter.shape[0] for parameter in parameters]
    starts = [first.data_ptr() + sum(rows[:index]) * first.stride(0) * first.itemsize for index in range(len(rows))]
    if [parameter.data_ptr() for parameter in parameters] == starts and _same_storage(parameters):
        # Optimized before: the views lie as they must, and whoever made them goes on sharing.
        fused = first.as_strided((sum(rows), *first.shape[1:]), first.stride())
    else:
        fused = torch.cat([parameter.data for parameter in parameters])
        for parameter, part in zip(parameters, fused.split(rows), strict=True):
            parameter.data = part
    return nn.Parameter(fused, requires_grad=False)


def _same_storage(parameters: list[nn.Parameter]) -> bool:
    return len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == 1


def _under(prefix: str, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _to_checkpoint_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, FastClassifier)
    for own, names in module.weight_map.sources.items():
        for name, part in zip(names, state_dict.pop(prefix + own).chunk(len(names)), strict=True):
            state_dict[prefix + name] = part


def _from_checkpoint_names(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    _local_metadata: dict[str, Any],
    _strict: bool,
    missing_keys: list[str],
    _unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    assert isinstance(module, FastClassifier)
    for own, names in module.weight_map.sources.items():
        current = module.get_parameter(own).data.chunk(len(names))
        missing_keys.extend(prefix + name for name in names if prefix + name not in state_dict)
        parts = [state_dict.pop(prefix + name, part) for name, part in zip(names, current, strict=True)]
        for name, part, kept in zip(names, parts, current, strict=True):
            if part.shape != kept.shape:
                error_msgs.append(
                    f"size mismatch for {prefix + name}: the checkpoint's is {tuple(part.shape)}, "
                    f"the model's {tuple(kept.shape)}"
                )
                parts = list(current)
                break
        state_dict[prefix + own] = parts[0] if len(parts) == 1 else torch.cat(parts)


def _bounds(integers: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(integers)
    return low, high


def _range_of(integers: Tensor) -> list[int]:
    return [int(bound) for bound in _bounds(integers)]


def _check_range(name: str, bounds: Sequence[int], size: int, config_name: str) -> None:
    low, high = bounds
    if low < 0 or high >= size:
        raise ValueError(f"{name} must lie from 0 to {size - 1} (config.{config_name} = {size}), got {low} to {high}")


def _forget_graphs(module: nn.Module, _incompatible_keys: object) -> None:
    assert isinstance(module, FastClassifier)
    module.clear_graphs()


def _loss(labels: Tensor, logits: Tensor, config: PreTrainedConfig) -> Tensor:
    from transformers.loss.loss_utils import ForSequenceClassificationLoss

    loss: Tensor = ForSequenceClassificationLoss(labels, logits, config)
    return loss
