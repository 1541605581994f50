"""Padded batches or lists of token ids to the rows that a head gives: checked, packed, and computed in passes."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from fastcls_kernels import batch_invariant, explain_backend, is_batch_invariant, warming_shapes
from fastcls_kernels.packed import Packing
from fastcls_kernels.unchecked import mean_pool

from .batch import BatchReader, PaddedBatch, check_packed
from .cuda_graphs import CudaGraphs, being_captured, bucket_of, graph_key, max_graph_tokens
from .encoder import Encoder
from .head import Head
from .packed import LET_GO, check_quantizes, packing_of
from .packing import (
    FlatBatch,
    PackedTokens,
    PackShape,
    fill_rows,
    pack,
    parts_of,
)
from .plain import pack_plain
from .spec import EncoderSpec, HeadSpec, LastLayer, Quantize, Rows, check_last_layer, check_quantize
from .unpacking import unpack_chosen, unpack_rows, unpack_tokens
from .watching import WatchedModule
from .weights import checked_rows, is_intercepted, under

# On a CPU a pass over about this many tokens keeps its activations in cache; larger batches run in several passes.
CPU_TOKENS_PER_PASS = 2048
# On a GPU this many fill the largest chip, and bound the memory of a pass: some 1.6 GB for BERT-base in float32.
GPU_TOKENS_PER_PASS = 65536

# Longer texts are rare, and compile their kernels when they come.
_WARM_TOKENS = 512


class Options(NamedTuple):
    """What may be set on an engine at any time: see `FastModel`."""

    last_layer: LastLayer
    cuda_graphs: bool
    batch_invariant: bool
    quantize: Quantize | None = None
    pack_weights: bool = True


class Engine(WatchedModule):
    """An encoder and the head on it, over packed tokens. Inference only.

    Args:
        spec, head: their shapes.
        weights: their parameters, and the frequencies of rotary positions, by our names.
        last_layer, cuda_graphs, batch_invariant, quantize, pack_weights: see `FastModel`.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        head: HeadSpec,
        weights: Mapping[str, Tensor],
        last_layer: LastLayer = "absorbed",
        cuda_graphs: bool = True,
        batch_invariant: bool = False,
        quantize: Quantize | None = None,
        pack_weights: bool = True,
    ) -> None:
        super().__init__()
        check_quantize(quantize)
        self.spec = spec
        self.last_layer = last_layer
        self.cuda_graphs = cuda_graphs
        self.batch_invariant = batch_invariant
        self._quantize = quantize
        self.pack_weights = pack_weights
        self._tokens_per_pass: int | None = None
        self.encoder = Encoder(spec, under("encoder.", weights))
        self.head = Head(head, under("head.", weights))
        self.own_encoder.packed.take_head(self.own_head)
        self._graphs = CudaGraphs(spec.max_positions)
        self._watch_modules()
        self.eval()

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes graphs of its own, over its own weights.
        own = ("_graphs", "_hooks", "_states", "_fit")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._graphs = CudaGraphs(self.spec.max_positions)
        self._watch_modules()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Engine:
        # Every way of moving or converting the weights comes through here.
        if self.own_encoder.packed.is_alone:
            probe = fn(self._like.detach())
            if (probe.device, probe.dtype) == (self.device, self.dtype):
                return self
            raise RuntimeError(
                f"the model must stay in {self.dtype} on {self.device}, got {probe.dtype} on {probe.device}: {LET_GO}"
            )
        self.forget_made()
        return super()._apply(fn, recurse)

    def forget_made(self) -> None:
        """Forgets the CUDA graphs, and what was made from weights."""
        self._graphs.clear()
        self.own_encoder.clear()

    @property
    def last_layer(self) -> LastLayer:
        return self._last_layer

    @last_layer.setter
    def last_layer(self, last_layer: LastLayer) -> None:
        check_last_layer(last_layer)
        self._last_layer = last_layer

    @property
    def options(self) -> Options:
        """What may be set at any time."""
        return Options(self.last_layer, self.cuda_graphs, self.batch_invariant, self.quantize, self.pack_weights)

    @property
    def quantize(self) -> Quantize | None:
        """What products are computed in, if not in `dtype`."""
        return self._quantize

    @quantize.setter
    def quantize(self, quantize: Quantize | None) -> None:
        check_quantize(quantize)
        if quantize is not None:
            check_quantizes(self.spec, self.device, self.dtype)
        self._quantize = quantize

    @property
    def tokens_per_pass(self) -> int:
        """The most tokens of a pass over several texts; a batch with more runs in several passes."""
        usual = CPU_TOKENS_PER_PASS if self.device.type == "cpu" else GPU_TOKENS_PER_PASS
        return usual if self._tokens_per_pass is None else self._tokens_per_pass

    @tokens_per_pass.setter
    def tokens_per_pass(self, tokens: int) -> None:
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"tokens_per_pass must be a positive int, got {tokens!r}")
        self._tokens_per_pass = tokens

    @property
    def width(self) -> int:
        """How many numbers a row has behind the head."""
        weight = self.own_head.out_weight
        return self.spec.hidden_size if weight is None else weight.shape[0]

    @property
    def fill_of_texts(self) -> float:
        """Stands for a text that is masked as a whole: NaN, or for a choice, which must not win, the lowest number."""
        return torch.finfo(self.dtype).min if self.own_head.spec.task == "multiple choice" else math.nan

    def rows(
        self,
        batch: PaddedBatch,
        rows: Rows,
        fill: float = 0.0,
        chosen: Tensor | None = None,
        *,
        dense: bool = True,
        run: Callable[[PackedTokens, Rows], Tensor] | None = None,
    ) -> Tensor:
        """Rows of a padded batch behind the head; of an encoder without one, of its last layer.

        Args:
            batch: a batch that `check` has passed.
            rows: "first" or "mean" for one row a text, "all" for one a token, "chosen" for the tokens of a mask.
            fill: stands where the attention mask leaves out a token, or a text as a whole.
            chosen: (batch, seqlen) bool, the tokens that are chosen as far as the attention mask keeps them.
            dense: whether the rows of tokens stand at their places in the batch, or one after the other.
            run: one pass of another kind for the whole batch, from packed tokens, which nothing fills up, to rows in
                packed order: so a model is trained. None for the engine's own, which keep no graph.

        Returns:
            (batch, width) for "first" and "mean", (batch, seqlen, width) for "all" and "chosen", or, not dense,
            (num_rows, width).

        Raises:
            ValueError: ``rows`` is another word, ``chosen`` is given with other rows, or a value does not fit.
        """
        if rows not in get_args(Rows):
            raise ValueError(f"rows must be one of {', '.join(get_args(Rows))}, got {rows!r}")
        if (chosen is not None) != (rows == "chosen"):
            raise ValueError(f'chosen must be given with rows "chosen" and with no others, got rows {rows!r}')
        if chosen is not None and batch.attention_mask is not None:
            chosen = chosen & batch.attention_mask.to(chosen.device).bool()
        per_text = rows in ("first", "mean")
        empty = batch.shape[:1] if per_text else batch.shape if dense else (0,)
        # A model that is trained computes all the same, so that a loss over no rows has gradients, which are zero.
        if not batch.shape[0] or (run is None and chosen is not None and not bool(chosen.any())):
            return self._filled(empty, fill)
        with self.inference() if run is None else contextlib.nullcontext():
            takes_plain = run is None and per_text and self._packing is not None
            plain = pack_plain(batch, self.spec, CPU_TOKENS_PER_PASS) if takes_plain else None
            if plain is not None:
                return self._pass(plain, rows)
            flat = self._reader.flatten(batch, needs_first=rows == "first", chosen=chosen, keeps_origins=not per_text)
            if not flat.num_texts:
                return self._filled(empty, fill)
            parts = [
                ((run or self._pass)(packed, rows), packed) for packed in self._packed(flat, as_one=run is not None)
            ]
            if per_text:
                return unpack_rows(parts, batch.shape[0], fill)
            return unpack_tokens(parts, batch.shape, fill) if dense else unpack_chosen(parts)[0]

    def rows_of_lists(
        self, token_ids: Iterable[Iterable[int]], token_type_ids: Iterable[Iterable[int]] | None, rows: Rows
    ) -> Tensor:
        """(num_texts, width), one row of "first" or "mean" for each sequence of token ids, in their order."""
        flat = self._reader.flatten_lists(token_ids, token_type_ids)
        if flat is None:
            return self._filled((0,), 0.0)
        with self.inference():
            return unpack_rows([(self._pass(packed, rows), packed) for packed in self._packed(flat)])

    def pack(
        self, token_ids: Iterable[Iterable[int]], token_type_ids: Iterable[Iterable[int]] | None = None
    ) -> list[PackedTokens]:
        """Packs sequences of token ids on the model's device, for `forward_packed`.

        Args:
            token_ids: for each text its ids, special tokens included; at most the model's positions each.
            token_type_ids: the same shape, or None for type 0; a model without types ignores them.

        Many texts make several parts.

        Raises:
            TypeError: something that is not an integer.
            ValueError: an empty or too long sequence, an id outside its table, or shapes that differ.
        """
        flat = self._reader.flatten_lists(token_ids, token_type_ids)
        return [] if flat is None else [part.to(self.device) for part in self._packed(flat)]

    def rows_of_packed(self, packed: PackedTokens, rows: Rows) -> Tensor:
        """Rows of packed tokens of a caller's, in packed order, without waiting for a GPU.

        Raises:
            TypeError: a dtype that does not fit.
            ValueError: a shape, stride or device that does not fit, or, on a CPU, an id or position outside its table.
        """
        packed = check_packed(packed, self.spec, self._like)
        with self.inference():
            return self._pass(packed, rows)

    def head_of(self, states: Tensor) -> Tensor:
        """The head over (num_texts, hidden_size); of an encoder its pooler."""
        self.check_weights()
        self.own_encoder.prepare(self._packing)
        with self.inference():
            rows: Tensor = self.own_head(states)
            return rows

    def check(self, batch: PaddedBatch) -> None:
        """Checks types, shapes and devices, but no values.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a shape or device that does not fit.
        """
        self._reader.check(batch)

    def warm_up(self) -> None:
        """Compiles every kernel that a batch of token ids may need, so that none waits for it; on a CPU, packs weights.

        It is for the present `last_layer`. Compiled kernels are kept on disk by triton, for other processes too. CUDA
        graphs are made as batches come.
        """
        self.check_weights()
        if not self._runs_triton:
            self.own_encoder.prepare(self._packing)
            return
        with self.inference():
            self.own_encoder.prepare()
            longest = self.spec.max_positions or _WARM_TOKENS
            for lengths in warming_shapes(self.device, longest, GPU_TOKENS_PER_PASS):
                token_ids = [[0] * length for length in lengths]
                for types in (None, token_ids) if self.spec.token_types else (None,):
                    flat = self._reader.flatten_lists(token_ids, types)
                    assert flat is not None
                    self._warm(flat)

    def _warm(self, flat: FlatBatch) -> None:
        first = torch.zeros(int(flat.lengths.sum()), dtype=torch.bool, device="cpu")
        first[flat.lengths.cumsum(0) - flat.lengths] = True
        for rows in self.own_head.spec.possible_rows:
            batch = flat._replace(chosen=first if rows == "chosen" else None)
            for part in parts_of(batch, GPU_TOKENS_PER_PASS, sort=False):
                packed = pack(batch, part, fill_rows(part.num_tokens, part.num_texts))
                self._compute(packed.to(self.device), rows, self.last_layer)

    @property
    def _reader(self) -> BatchReader:
        weight = self._like
        return BatchReader(self.spec, weight.device, weight.dtype)

    @property
    def _packing(self) -> Packing | None:
        """As what the layers' weights are packed now."""
        on_cpu = self.device.type == "cpu" and not self._runs_triton
        return packing_of(self.spec, self._like, self.quantize, may_pack=self.pack_weights and on_cpu)

    @property
    def _runs_triton(self) -> bool:
        return explain_backend(self.device)[0] == "triton"

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """No gradients, and no autocast, which would change the dtype between one operation and the next."""
        invariant, device = self.batch_invariant or is_batch_invariant(), self.device.type
        # Entering one takes some 10 us, so those are left out that would change nothing.
        nothing, is_on = contextlib.nullcontext(), torch.is_autocast_enabled(device)
        autocast = torch.autocast(device, enabled=False) if is_on else nothing
        grad = torch.no_grad() if torch.is_grad_enabled() else nothing
        with grad, autocast, batch_invariant(invariant) if invariant != is_batch_invariant() else nothing:
            yield

    def _filled(self, shape: Iterable[int], fill: float) -> Tensor:
        return self._like.new_full((*shape, self.width), fill)

    def _packed(self, flat: FlatBatch, *, as_one: bool = False) -> Iterator[PackedTokens]:
        device, triton = self.device, self._runs_triton
        if as_one:
            tokens = int(flat.lengths.sum())
            for part in parts_of(flat, tokens, sort=not triton):
                yield pack(flat, part, PackShape(tokens, part.num_texts), pin=device.type == "cuda").to(device)
            return
        for part in parts_of(flat, self.tokens_per_pass, sort=not triton):
            shape = (self._shape if triton else fill_rows)(part.num_tokens, part.num_texts)
            yield pack(flat, part, shape, pin=device.type == "cuda")

    def _shape(self, tokens: int, sequences: int) -> PackShape:
        """The shape of a pass with the Triton kernels: a graph's, where it may be replayed."""
        bucket = bucket_of(tokens, sequences)
        return bucket if self._may_replay(bucket) else fill_rows(tokens, sequences)

    def _may_replay(self, shape: PackShape) -> bool:
        return self.cuda_graphs and self.device.type == "cuda" and shape.tokens <= max_graph_tokens(self.spec)

    def _replays(self, packed: PackedTokens) -> bool:
        return (
            self._may_replay(packed.shape)
            and packed.inputs_embeds is None
            # How many rows are chosen differs from batch to batch.
            and packed.rows is None
            and packed.shape == bucket_of(*packed.shape)
            # A replay would not run hooks.
            and not self.is_hooked()
            and not being_captured()
        )

    def _pass(self, packed: PackedTokens, rows: Rows) -> Tensor:
        """One pass, without the rows that fill it up."""
        if self.is_hooked():
            self._check_hooks(rows)
        last_layer, device = self.last_layer, self.device
        key = graph_key(packed, rows, last_layer) if self._runs_triton and self._replays(packed) else None
        if key is None or key not in self._graphs:
            self.check_weights()
        self.own_encoder.prepare(self._packing)
        if key is None:
            computed = self._compute(packed.to(device), rows, last_layer)
        else:
            compute = functools.partial(self._compute, rows=rows, last_layer=last_layer)
            computed = self._graphs(compute, key, packed, device)
        if rows == "chosen":
            return computed
        return computed[: packed.num_tokens if rows == "all" else packed.num_texts]

    def _compute(self, packed: PackedTokens, rows: Rows, last_layer: LastLayer) -> Tensor:
        """Packed tokens on the device to rows behind the head."""
        states: Tensor = self.own_encoder(packed, rows, last_layer)
        if is_intercepted(self.own_encoder):
            layout = packed.layout
            counts = {"first": layout.num_sequences, "chosen": 0 if packed.rows is None else packed.rows.numel()}
            shape = (counts.get(rows, layout.total_tokens), self.spec.hidden_size)
            states = checked_rows("the encoder's rows", states, shape, self._like)
        # An encoder's pooler runs over first rows only, behind the pass: see `head_of`.
        has_head = self.own_head.spec.task != "encoder"
        if has_head and self.own_head.spec.is_late:
            return mean_pool(self.own_head(states), packed.layout)
        if rows == "mean":
            states = mean_pool(states, packed.layout)
        return self.own_head(states) if has_head else states
