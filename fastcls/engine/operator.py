"""An engine in a graph that ``torch.compile`` or ``torch.export`` traces: one operator over the engine's weights.

How many tokens a batch has is known once its values are read. From that follows how they are packed, in how many
passes, and whether a pass is replayed: a graph that held all this would pad again, or be compiled again for each batch.
So the whole way from padded ids to the head's numbers is one node, ``torch.ops.fastcls.forward``, whose result has the
batch's shape. The node takes the weights as a list of tensors and the rest of the engine as text, so that an exported
program holds all that it needs: it runs wherever ``import fastcls.engine`` has registered the operator, without
transformers. A graph does not run hooks on modules inside the engine.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .batch import PaddedBatch
from .engine import Engine, Options
from .spec import BucketBias, Convolution, Disentangled, EncoderSpec, HeadSpec, LastLayer, Quantize, Rows
from .weights import weight_version


def describe(engine: Engine) -> str:
    """All of an engine but its weights and options, as the operator takes it."""
    relative, convolution = engine.spec.relative, engine.spec.convolution
    described = {
        "spec": {
            **vars(engine.spec),
            "relative": None if relative is None else vars(relative),
            "convolution": None if convolution is None else vars(convolution),
        },
        "head": vars(engine.own_head.spec),
        "weights": [name for name, _ in engine.weights()],
        "buffers": [name for name, _ in engine.named_rotary()],
    }
    return json.dumps(described)


def forward(
    engine: Engine, description: str, batch: PaddedBatch, rows: Rows, fill: float = 0.0, chosen: Tensor | None = None
) -> Tensor:
    """`Engine.rows`, dense, as a node of the graph that is being traced; the weights become the graph's."""
    weights = [weight for _, weight in engine.weights()]
    options = engine.options
    given = (*options[:_FIRST_OPTIONS], rows, fill, chosen, *batch, *options[_FIRST_OPTIONS:])
    return _forward(weights, description, *given)


# Options that came later stand behind the inputs, since programs that earlier versions exported do not give them.
_FIRST_OPTIONS = 3


@torch.library.custom_op("fastcls::forward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _forward(
    weights: Sequence[Tensor],
    model: str,
    last_layer: str,
    cuda_graphs: bool,
    batch_invariant: bool,
    rows: str,
    fill: float,
    selected: Tensor | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    quantize: str | None = None,
    pack_weights: bool = True,
) -> Tensor:
    options = _options(last_layer, cuda_graphs, batch_invariant, quantize, pack_weights)
    engine = _engine_over(weights, model, options)
    batch = PaddedBatch(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
    engine.check(batch)
    if rows == "texts":
        # Programs that earlier versions exported leave this to the task.
        fill = engine.fill_of_texts
    return engine.rows(batch, _rows_named(rows, engine.own_head.spec, selected is not None), fill, selected)


@_forward.register_fake
def _(
    weights: Sequence[Tensor],
    model: str,
    _last_layer: str,
    _cuda_graphs: bool,
    _batch_invariant: bool,
    rows: str,
    _fill: float,
    _selected: Tensor | None,
    input_ids: Tensor | None,
    _attention_mask: Tensor | None,
    _token_type_ids: Tensor | None,
    _position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    _quantize: str | None = None,
    _pack_weights: bool = True,
) -> Tensor:
    given = input_ids if inputs_embeds is None else inputs_embeds
    assert given is not None
    shape = given.shape[:1] if rows in ("first", "mean", "texts") else given.shape[:2]
    return weights[0].new_empty(*shape, _parse(model).width(weights))


def pool(engine: Engine, description: str, states: Tensor) -> Tensor:
    """`Engine.head_of` as a node of the graph: what an encoder's pooler makes of (num_texts, hidden_size)."""
    weights = [weight for _, weight in engine.weights()]
    options = engine.options
    return _pool(weights, description, *options[:_FIRST_OPTIONS], states, *options[_FIRST_OPTIONS:])


@torch.library.custom_op("fastcls::pool", mutates_args=())
def _pool(
    weights: Sequence[Tensor],
    model: str,
    last_layer: str,
    cuda_graphs: bool,
    batch_invariant: bool,
    states: Tensor,
    quantize: str | None = None,
    pack_weights: bool = True,
) -> Tensor:
    options = _options(last_layer, cuda_graphs, batch_invariant, quantize, pack_weights)
    return _engine_over(weights, model, options).head_of(states)


@_pool.register_fake
def _(
    _weights: Sequence[Tensor],
    _model: str,
    _last_layer: str,
    _cuda_graphs: bool,
    _batch_invariant: bool,
    states: Tensor,
    _quantize: str | None = None,
    _pack_weights: bool = True,
) -> Tensor:
    return states.new_empty(states.shape)


def _options(
    last_layer: str, cuda_graphs: bool, batch_invariant: bool, quantize: str | None, pack_weights: bool
) -> Options:
    """As an engine takes them, from what a graph holds."""
    words = (cast(LastLayer, last_layer), cast("Quantize | None", quantize))
    return Options(words[0], cuda_graphs, batch_invariant, words[1], pack_weights)


def _rows_named(name: str, head: HeadSpec, are_chosen: bool) -> Rows:
    """The rows that a graph asks for; "texts" and "tokens" stand in programs that earlier versions exported."""
    earlier: dict[str, Rows] = {"texts": head.pooling, "tokens": "chosen" if are_chosen else "all"}
    return earlier.get(name, cast(Rows, name))


class _Description(NamedTuple):
    spec: EncoderSpec
    head: HeadSpec
    names: tuple[str, ...]
    buffers: frozenset[str]

    def width(self, weights: Sequence[Tensor]) -> Any:
        """How many numbers a row has behind the head."""
        if "head.out_weight" in self.names:
            return weights[self.names.index("head.out_weight")].shape[0]
        return self.spec.hidden_size


@functools.lru_cache(maxsize=64)
def _parse(model: str) -> _Description:
    described = json.loads(model)
    return _Description(
        _spec_of(described["spec"]),
        HeadSpec(**described["head"]),
        tuple(described["weights"]),
        frozenset(described["buffers"]),
    )


def _spec_of(given: dict[str, Any]) -> EncoderSpec:
    # JSON has neither tuples nor classes.
    for name in ("layers", "windows", "rotary"):
        given[name] = tuple(given[name])
    if given["relative"] is not None:
        given["relative"] = (BucketBias if "num_buckets" in given["relative"] else Disentangled)(**given["relative"])
    if given["convolution"] is not None:
        given["convolution"] = Convolution(**given["convolution"])
    return EncoderSpec(**given)


class _Built(NamedTuple):
    """An engine that graphs run, and where its weights were and how often they had changed when it was built."""

    places: tuple[object, ...]
    engine: Engine


# By their first weight, so that engines go with their weights; then by their description and options.
_built: WeakIdKeyDictionary = WeakIdKeyDictionary()
# An engine that is built may end a model whose weights are forgotten, in the same thread.
_building = threading.RLock()
# What gives the current weights of a model that follows others, by its first weight, then by its description.
_sources: WeakIdKeyDictionary = WeakIdKeyDictionary()


def take_weights_from(weight: Tensor, description: str, source: Callable[[], Sequence[Tensor] | None]) -> None:
    """Has graphs of this process ask for the weights at each call: those in the graph may be behind what they follow.

    Args:
        weight: the first of the weights.
        description: `describe` of their engine.
        source: gives them, or None once their owner is gone.
    """
    _sources.setdefault(weight, {})[description] = source


def forget(weight: Tensor) -> None:
    """Forgets the engines that graphs run over the weights of which this is the first, and what they have made."""
    with _building:
        _built.pop(weight, None)


def _engine_over(weights: Sequence[Tensor], model: str, options: Options) -> Engine:
    """An engine over these weights as they are now, built at the first call with them."""
    source = _sources.get(weights[0], {}).get(model)
    weights = (source and source()) or weights
    # An operator is given detached tensors, each with a count of changes of its own: so the engine is built anew after
    # a change.
    places = tuple((*weight_version(weight), weight.dtype, weight.device) for weight in weights)
    with _building:
        engines = cast("dict[tuple[str, Options], _Built]", _built.setdefault(weights[0], {}))
        built = engines.get((model, options))
        if built is None or built.places != places:
            described = _parse(model)
            own = {
                # Over the same memory.
                name: weight.detach()
                if name in described.buffers
                else nn.Parameter(weight.detach(), requires_grad=False)
                for name, weight in zip(described.names, weights, strict=True)
            }
            built = engines[model, options] = _Built(places, Engine(described.spec, described.head, own, *options))
    return built.engine
