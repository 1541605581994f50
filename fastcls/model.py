"""What the fast models of all tasks share: packing, passes, weights; `tasks` has what each of them takes and gives."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import inspect
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastcls_kernels import batch_invariant, explain_backend, is_batch_invariant, mean_pool, warming_shapes

from . import traced
from .convolution import EmbeddingConvolution
from .encoder import Encoder, How, LastLayer, check_last_layer, has_hooks
from .graphs import Graphs, being_captured, bucket_of, max_graph_tokens
from .heads import Head
from .inputs import Batch, Reader
from .original import NO_LONGER_FOLLOWED, Companion, Original, has_weights, set_weight, weakly
from .packing import PackedTokens, PackShape, Source, fill_rows, pack
from .relative import BiasTable
from .spec import EncoderSpec, HeadSpec, WeightMap
from .weights import from_checkpoint_names, to_checkpoint_names, under

# On a CPU a pass over about this many tokens keeps its activations in cache; larger batches run in several passes.
CPU_TOKENS_PER_PASS = 2048
# On a GPU this many fill the largest chip, and bound the memory of a pass: some 1.6 GB for BERT-base in float32.
GPU_TOKENS_PER_PASS = 65536

# Longer texts are rare, and compile what they need when they come.
_WARM_TOKENS = 512

# What transformers' models take besides, and what changes their answer. Whatever else they are given they ignore.
_CHANGING = frozenset(
    {
        *("encoder_hidden_states", "encoder_attention_mask", "past_key_values", "head_mask", "is_causal"),
        *("sliding_window", "softcap", "s_aux", "position_bias", "num_items_in_batch", "next_sentence_label"),
        *("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_seqlen", "max_length_q", "max_length_k", "indices"),
    }
)

# Tables of embeddings, by the ends of their names.
_TABLES = ("word_weight", "position_weight", "token_type_weight", "relative.table_weight")

# How alike two names are of which one is taken for a mistyped other, from 0 to 1.
_TYPING_ERROR = 0.85

# Rows of a pass, and the packing that they come from.
Parts = list[tuple[Tensor, PackedTokens]]


class FastModel(nn.Module):
    """An encoder and its head that compute only what their answer needs. Made by `optimize`; runs inference only.

    It follows the weights of the model that it was made of, see `optimize`; a copy of it, or what a pickle gives back,
    has weights of its own. Whatever module it is part of, it stays in eval mode.

    Attributes:
        config: the transformers config.
        spec: the encoder's shape.
        last_layer: how the last layer is computed: "absorbed" (no values, and no keys where they do not depend on
            positions, for the wanted rows alone), "selected" (keys and values for all tokens, the rest for the wanted
            rows alone) or "full" (every row). The results are the same up to rounding. May be set at any time.
        cuda_graphs: whether small passes are replayed as CUDA graphs, on a GPU with the Triton kernels. A graph is made
            at the second use of a shape and reads the weights where they were then: whoever puts others in their place
            by hand (``parameter.data = ...``) calls `clear_caches`. May be set at any time.
        batch_invariant: whether a text's answer is the same bit for bit whatever batch it comes in, on one machine with
            one number of threads: see `fastcls_kernels.batch_invariant`. It costs speed. May be set at any time.
    """

    # transformers' Trainer asks: losses are means over a batch's labels, by whatever number it would have them divided.
    accepts_loss_kwargs = False

    def __init__(
        self,
        model_class: type[PreTrainedModel],
        config: PreTrainedConfig,
        spec: EncoderSpec,
        head: HeadSpec,
        weight_map: WeightMap,
        weights: Mapping[str, Tensor],
        last_layer: LastLayer = "absorbed",
        cuda_graphs: bool = True,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__()
        self.model_class = model_class
        self.config = config
        self.spec = spec
        self.weight_map = weight_map
        self.last_layer = last_layer
        self.cuda_graphs = cuda_graphs
        self._original: Original | None = None
        # What follows weights along with this one, of the modules around it.
        self._companion: Companion | None = None
        self.encoder = Encoder(spec, under("encoder.", weights))
        self.head = Head(head, under("head.", weights))
        self.register_state_dict_pre_hook(_follow_first)
        self.register_state_dict_post_hook(_to_checkpoint_names)
        self.register_load_state_dict_pre_hook(_from_checkpoint_names)
        self.register_load_state_dict_post_hook(_forget_caches)
        self._graphs = self._new_graphs()
        self._watch_hooks()
        self._order = _own_order(cast("Any", model_class), cast("Any", type(self)))
        self.batch_invariant = batch_invariant
        self.eval()

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes graphs of its own, over its own weights.
        self._follow()
        state = {name: value for name, value in self.__dict__.items() if name not in ("_graphs", "_hooks", "_inside")}
        return {**state, "_original": None, "_companion": None}

    def __copy__(self) -> FastModel:
        # One that shares modules would be left with some weights of before, and others of after, the original's change.
        return copy.deepcopy(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._graphs = self._new_graphs()
        self._watch_hooks()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            known = self.__dict__.get("model_class")
            if name.startswith("__") or known is None:
                raise
            if name == known.base_model_prefix:
                hint = "its encoder is base_model"
            elif hasattr(known, name) or name in ("classifier", "lm_head", "pooler", "qa_outputs"):
                hint = f"the transformers model has, whose weights it follows; here is {type(self).__name__} alone"
            else:
                raise
            raise AttributeError(f"{error}: {hint}", name=name, obj=self) from None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _check_not_traced()
        # Each class of transformers has an order of its own, some without token types, some with positions later.
        if self._order is not None and len(args) > 1:
            if len(args) > len(self._order):
                raise TypeError(f"forward() takes {len(self._order)} arguments without names, got {len(args)}")
            args, kwargs = args[:1], {**dict(zip(self._order[1:], args[1:], strict=False)), **kwargs}
        return super().__call__(*args, **kwargs)

    def _new_graphs(self) -> Graphs:
        # Weakly, so that a model that nobody holds gives its memory back at once.
        compute = weakref.WeakMethod(self._compute)

        def run(packed: PackedTokens, how: How) -> Tensor:
            method = compute()
            assert method is not None
            return method(packed, how)

        return Graphs(run, self.spec.max_positions)

    def _watch_hooks(self) -> None:
        """Notes where modules keep hooks, and what is set on them: each call looks there, in a microsecond or two."""
        modules = list(self.modules())
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._inside = [vars(module) for module in modules[1:]]

    def _are_hooked(self) -> bool:
        """Whether a module has hooks, or one inside has another ``forward`` set on it."""
        return any(self._hooks) or any("forward" in state for state in self._inside)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FastModel:
        # Every way of moving or converting the weights comes through here.
        self._forget_made()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> FastModel:  # noqa: ARG002  # its name is torch's
        """Stays in eval mode, so that a module that trains can hold a frozen encoder; see `requires_grad_`."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> FastModel:
        """Gradients are not computed, and so may not be asked for.

        Raises:
            RuntimeError: ``requires_grad`` is True.
        """
        if requires_grad:
            raise RuntimeError("fastcls computes no gradients: train the transformers model, which this follows")
        return super().requires_grad_(requires_grad)

    def _replicate_for_data_parallel(self) -> FastModel:
        raise RuntimeError(
            "nn.DataParallel must be left out: it copies the model to every GPU at each call. "
            "Give each GPU a process, or a copy.deepcopy(fast).to(device), of its own"
        )

    def clear_caches(self) -> None:
        """Forgets the CUDA graphs and whatever else was made from the weights, and their memory.

        To be called after writing to weights in a way that counts no changes, ``weight.data.mul_(2)`` or weights made
        in inference mode: what was copied or made of them is made anew.
        """
        self._forget_made()
        if self._original is not None:
            self._original.doubt()
        if self._companion is not None:
            self._companion.doubt()

    def _forget_made(self) -> None:
        self._graphs.clear()
        self.encoder.clear()
        traced.forget(next(self.parameters()))

    def stop_following(self) -> None:
        """Goes on with the weights as they are, in memory of its own, whatever becomes of the original's."""
        companion, self._companion = self._companion, None
        if companion is not None:
            companion.stop()
        original = self._original
        if original is None:
            return
        with contextlib.suppress(RuntimeError):
            # What is not followed any more is what the fast model had last.
            self._follow()
        self._original = None
        # By their place, so that weights that are tied go on being one.
        own: dict[int, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for name, weight in [*self.weights()]:
                place = weight.data_ptr()
                if place not in own:
                    # Through ``data``, which counts changes of its own: those of ours are not the original's any more.
                    own[place] = weight.data.clone() if original.holds(weight) else weight.data
                set_weight(self, name, own[place])
        self._forget_made()

    def follow(self, original: Original) -> None:
        """Follows the weights of a model from now on, that those of this one were made of."""
        self._original = original
        original.settle = weakly(self._follow)

    def follow_along(self, companion: Companion) -> None:
        """Has weights around this model follow whenever it does."""
        self._companion = companion

    @property
    def follows(self) -> bool:
        """Whether the weights of another model are followed."""
        return self._original is not None

    def _follow(self) -> None:
        """Brings the weights up to the original's, where those have changed."""
        if self._companion is not None:
            self._companion.bring()
        original = self._original
        if original is None or original.is_current():
            return
        is_doubted = original.is_doubted
        if original.update(self):
            # Tables that were made of weights are made anew where they are needed: others may be reading them.
            self._graphs.clear()
            traced.forget(next(self.parameters()))
            self._made_known()
        if is_doubted:
            self.encoder.doubt()
            traced.forget(next(self.parameters()))

    def _made_known(self) -> None:
        """Tells graphs where the weights are, once they are elsewhere."""

    def current_weights(self) -> list[Tensor]:
        """The weights in their order, brought up to the original's; for graphs, which pass hooks inside by."""
        if self._are_hooked():
            self._check_no_hooks_inside()
        self._follow()
        return [weight for _, weight in self.weights()]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All that came from the original, by our names: parameters, and buffers that no state dict holds."""
        yield from self.named_parameters()
        for name in self.weight_map.buffers:
            yield name, self.get_buffer(name)

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
        return self.encoder.embeddings.word_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of the computation."""
        return self.encoder.embeddings.word_weight.dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the weights are, as transformers counts them.

        Args:
            only_trainable: of those that require gradients: none.
            exclude_embeddings: without the tables of embeddings.
        """
        # By their place, since weights that are tied lie in one.
        counts = {weight.data_ptr(): weight.numel() for weight in self.parameters()}
        if exclude_embeddings:
            for name, weight in self.named_parameters():
                if name.endswith(_TABLES):
                    counts.pop(weight.data_ptr(), None)
        return 0 if only_trainable else sum(counts.values())

    @property
    def main_input_name(self) -> str:
        """Of `forward`; transformers' Trainer asks, for how many floating point operations it counts."""
        return self.model_class.main_input_name

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights, those that are shared with the original included."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    @property
    def name_or_path(self) -> str:
        """Where the transformers model came from."""
        return str(getattr(self.config, "name_or_path", ""))

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of words, over the same memory: for ``inputs_embeds``."""
        self._follow()
        return nn.Embedding.from_pretrained(self.encoder.embeddings.word_weight.detach(), freeze=True)

    def can_generate(self) -> bool:
        """False; transformers' pipelines ask."""
        return False

    @property
    def base_model_prefix(self) -> str:
        """The encoder's name in the transformers model; its pipelines ask, for what they say."""
        return self.model_class.base_model_prefix

    @property
    def input_modalities(self) -> Any:
        """What the transformers model takes; its pipelines ask, for what they say."""
        return self.model_class.input_modalities

    def pack(
        self, token_ids: Iterable[Iterable[int]], token_type_ids: Iterable[Iterable[int]] | None = None
    ) -> list[PackedTokens]:
        """Packs sequences of token ids on the model's device, for `forward_packed`.

        Args:
            token_ids: for each text its ids, special tokens included; at most the model's positions each.
            token_type_ids: the same shape, or None for type 0; a model without types ignores them.

        Of many texts several parts are made.

        Raises:
            TypeError: something that is not an integer.
            ValueError: an empty or too long sequence, an id outside its table, or shapes that differ.
        """
        source = self._reader.source_of_lists(token_ids, token_type_ids)
        return [] if source is None else [part.to(self.device) for part in self._pack(source)]

    def forward_packed(self, packed: PackedTokens) -> Tensor:
        """Packed tokens to what the model makes of them, in packed order, without waiting for a GPU.

        Args:
            packed: what `pack` gives, or its like in pinned memory of the CPU.

        Returns:
            One row a text, (num_texts, num_labels), or one a token, (num_tokens, width), as the model's task is.
        """
        self._check_no_hooks_of_its_own("forward_packed")
        self._follow()
        return self._run_packed(packed, self._how)

    def warm_up(self) -> None:
        """Compiles every kernel that a batch of token ids may need, so that none waits for it; on a CPU, nothing.

        It is for the present `last_layer`. Compiled kernels are kept on disk by triton, for other processes too. CUDA
        graphs are made as batches come.
        """
        if not self._runs_triton:
            return
        self._follow()
        with self._inference():
            self.encoder.prepare()
            longest = self.spec.max_positions or _WARM_TOKENS
            for lengths in warming_shapes(self.device, longest, GPU_TOKENS_PER_PASS):
                token_ids = [[0] * length for length in lengths]
                for types in (None, token_ids) if self.spec.token_types else (None,):
                    source = self._reader.source_of_lists(token_ids, types)
                    assert source is not None
                    self._warm(source)

    def _warm(self, source: Source) -> None:
        first = torch.zeros(int(source.lengths.sum()), dtype=torch.bool, device="cpu")
        first[source.lengths.cumsum(0) - source.lengths] = True
        for how in self._ways:
            wanted = source._replace(selected=first if how.selection == "rows" else None)
            for packed in pack(wanted, GPU_TOKENS_PER_PASS, fill_rows):
                self._compute(packed.to(self.device), how)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes a transformers checkpoint, which ``from_pretrained`` of the original class reads back.

        Args:
            save_directory: a folder, made if need be.
            kwargs: passed on to transformers' ``save_pretrained``.
        """
        with torch.device("meta"):
            model = nn.Module.to(self.model_class(self.config), self.dtype)
        # The weights are given apart: they are the modules' as these are, where the config may say otherwise.
        model.save_pretrained(save_directory, **{"state_dict": self.state_dict(), **kwargs})

    @property
    def _how(self) -> How:
        """What the task needs of a pass."""
        raise NotImplementedError

    @property
    def _ways(self) -> tuple[How, ...]:
        """All that calls may ask of a pass."""
        return (self._how,)

    @property
    def _pooled(self) -> How:
        """One row a text, as the head's pooling is."""
        pools = self.head.spec.pooling == "mean"
        return How(self.last_layer, "all" if pools else "first", pools)

    @property
    def _every_row(self) -> How:
        return How(self.last_layer, "all", pools=False)

    @property
    def _selected_rows(self) -> How:
        return How(self.last_layer, "rows", pools=False)

    @property
    def _reader(self) -> Reader:
        return Reader(self.spec, self.device, self.dtype)

    @property
    def _runs_triton(self) -> bool:
        return explain_backend(self.device)[0] == "triton"

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """No gradients, and the model's own dtype: autocast would change it between one operation and the next."""
        invariant = self.batch_invariant or is_batch_invariant()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), batch_invariant(invariant):
            yield

    def _checked(self, batch: Batch, extras: Mapping[str, Any]) -> torch.Size:
        """The shape of a batch that is fit to be computed, as far as can be said without reading its values.

        Args:
            batch: the inputs.
            extras: the other arguments: of those of transformers that ask for more than the answer some are known.
        """
        if self.training:
            raise RuntimeError("fastcls runs inference only: call .eval() first, or train the transformers model")
        if torch.compiler.is_compiling():
            self._check_no_hooks_inside()
        if torch.is_grad_enabled():
            _check_no_gradients(self, batch)
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(self.config, name, False) if extras.get(name) is None else extras[name]:
                raise ValueError(
                    f"{name} must be False: fastcls does not compute what the answer does not need. "
                    "Use the transformers model for it"
                )
        if extras:
            self._check_extras(extras)
        self._reader.check(batch)
        return batch.shape

    def _check_extras(self, extras: Mapping[str, Any]) -> None:
        """Arguments that transformers' models ignore are ignored, but for those that are meant for another one."""
        for name, value in extras.items():
            if value is None or value is False:
                continue
            if name in _CHANGING:
                raise TypeError(f"forward() takes no argument {name}: fastcls does not compute with it")
            if meant := _mistyped(cast("Any", type(self)), name):
                raise TypeError(f"forward() takes no argument {name}: is {meant} meant?")

    def _check_no_hooks_of_its_own(self, method: str) -> None:
        """Hooks on the model, or another ``forward`` set on it, are part of what calling it gives."""
        if has_hooks(self):
            raise RuntimeError(
                f"a {type(self).__name__} with forward hooks, or another forward, must be called as a whole: {method} "
                "would pass them by"
            )

    def _hooked_inside(self) -> list[tuple[str, nn.Module]]:
        """The modules below this one that have forward hooks, or another ``forward``, by their names."""
        return [(name, module) for name, module in self.named_modules() if name and has_hooks(module)]

    def _check_no_hooks_inside(self) -> None:
        for name, _ in self._hooked_inside():
            raise RuntimeError(
                f"{name} must have no forward hooks, and no other forward, in a graph, which would pass them by: "
                "remove them, or call the model outside of what is compiled or exported"
            )

    def _check_hooks(self, how: How) -> None:
        """Refuses hooks on modules that a pass does not call as a whole."""
        for name, module in self._hooked_inside():
            reason = self._never_called(name, module, how)
            if reason is not None:
                raise RuntimeError(
                    f"{name} must have no forward hooks, and no other forward, which would not run: {reason}"
                )

    def _never_called(self, name: str, module: nn.Module, how: How) -> str | None:
        last = f"encoder.layers.{self.spec.layers[-1]}"
        if name == last and how.selection != "all" and how.last_layer != "full":
            return f'only some rows of it are computed. Set last_layer = "full", got {how.last_layer!r}'
        if name not in ("encoder", "head") and not name.startswith(("encoder.layers.", "encoder.embeddings")):
            called = isinstance(module, (BiasTable, EmbeddingConvolution))
            return None if called else "it holds tables that others read"
        return None

    def _source(self, batch: Batch, how: How, selected: Tensor | None = None) -> Source:
        # First, so that an original that has become another model is named, and not what no longer fits it.
        self._follow()
        return self._reader.source_of_batch(
            batch,
            needs_first=how.selection == "first",
            selected=selected,
            keeps_origins=how.selection != "first" and not how.pools,
        )

    def _run(self, source: Source, how: How) -> Parts:
        return [(self._run_packed(part, how), part) for part in self._pack(source)]

    def _pack(self, source: Source) -> Iterator[PackedTokens]:
        on_cpu = self.device.type == "cpu"
        return pack(
            source,
            CPU_TOKENS_PER_PASS if on_cpu else GPU_TOKENS_PER_PASS,
            self._fill_up if self._runs_triton else fill_rows,
            sort=not self._runs_triton,
            pin=self.device.type == "cuda",
        )

    def _run_packed(self, packed: PackedTokens, how: How) -> Tensor:
        if self._are_hooked():
            self._check_hooks(how)
        with self._inference():
            self.encoder.prepare()
            if self._replays(packed):
                rows = self._graphs(packed, how, self.device)
            else:
                rows = self._compute(packed.to(self.device), how)
        if how.selection == "rows":
            return rows
        return rows[: packed.num_tokens if how.selection == "all" and not how.pools else packed.num_texts]

    def _fill_up(self, tokens: int, sequences: int) -> PackShape:
        bucket = bucket_of(tokens, sequences)
        return bucket if self._may_replay(bucket) else fill_rows(tokens, sequences)

    def _may_replay(self, shape: PackShape) -> bool:
        return self.cuda_graphs and self.device.type == "cuda" and shape.tokens <= max_graph_tokens(self.spec)

    def _replays(self, packed: PackedTokens) -> bool:
        return (
            self._may_replay(packed.shape)
            and packed.inputs_embeds is None
            # How many rows are wanted differs from batch to batch.
            and packed.rows is None
            and packed.shape == bucket_of(*packed.shape)
            and self._runs_triton
            # A replay would pass hooks by.
            and not self._are_hooked()
            and not being_captured()
        )

    def _compute(self, packed: PackedTokens, how: How) -> Tensor:
        """Packed tokens on the model's device to what the head makes of the wanted rows."""
        states: Tensor = self.encoder(packed, how.last_layer, how.selection)
        if how.pools:
            layout = packed.layout
            states = mean_pool(states, layout.cu_seqlens, layout.max_seqlen, layout=layout)
        return self._finish(states)

    def _finish(self, states: Tensor) -> Tensor:
        """What is left of a pass behind the encoder."""
        out: Tensor = self.head(states)
        return out


def _check_not_traced() -> None:
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "torch.jit.trace, and torch.onnx.export with dynamo=False, must be left out: a trace would hold the "
            "lengths of its example for all texts. Use torch.export.export, or trace the transformers model"
        )


@functools.lru_cache(maxsize=64)
def _own_order(model_class: type[PreTrainedModel], fast_class: type[FastModel]) -> tuple[str, ...] | None:
    """The order in which a transformers class takes arguments without names, None where it is that of ours."""
    theirs, ours = (
        tuple(
            name
            for name, parameter in inspect.signature(each.forward).parameters.items()
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and name != "self"
        )
        for each in (model_class, fast_class)
    )
    return None if not theirs or theirs == ours[: len(theirs)] or ours == theirs[: len(ours)] else theirs


@functools.lru_cache(maxsize=1024)
def _mistyped(model_class: type[FastModel], name: str) -> str | None:
    """The argument of a class that another name is all but the same as."""
    taken = inspect.signature(model_class.forward).parameters
    return next(iter(difflib.get_close_matches(name, taken, 1, _TYPING_ERROR)), None)


def _check_no_gradients(model: FastModel, batch: Batch) -> None:
    asked = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if batch.inputs_embeds is not None and batch.inputs_embeds.requires_grad:
        asked.append("inputs_embeds")
    if asked:
        raise RuntimeError(
            f"{asked[0]} must not require gradients, which fastcls does not compute: call this inside "
            "torch.no_grad(), or train the transformers model"
        )


def _follow_first(module: nn.Module, _prefix: str, _keep_vars: bool) -> None:
    assert isinstance(module, FastModel)
    module._follow()


def _to_checkpoint_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, FastModel)
    to_checkpoint_names(module.weight_map, state_dict, prefix)


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
    assert isinstance(module, FastModel)
    try:
        module._follow()
    except RuntimeError:
        # What is loaded stands for what cannot be followed any more.
        module.stop_following()
    from_checkpoint_names(module.weight_map, module, state_dict, prefix, missing_keys, error_msgs)
    names = module.weight_map.sources
    if prefix and has_weights(module, {name: state_dict[prefix + name] for name in names}):
        # A larger module holds the original, too, and has loaded it before: a trainer's that goes on where it was.
        for name in names:
            state_dict[prefix + name] = module.get_parameter(name)
        return
    # What is loaded is this model's own: the original keeps its weights.
    if prefix and module._original is not None and module._original.is_there:
        warnings.warn(NO_LONGER_FOLLOWED, RuntimeWarning, stacklevel=2)
    module.stop_following()


def _forget_caches(module: nn.Module, _incompatible_keys: object) -> None:
    assert isinstance(module, FastModel)
    module.clear_caches()
