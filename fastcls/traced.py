"""A fast model in a graph that ``torch.compile`` or ``torch.export`` traces: one operator, over the model's weights.

How many tokens a batch has is known once its values are read, and from that follows how they are packed, in how many
passes, and whether a pass is replayed. A graph that held all this would pad again, or be compiled again for each batch.
So the whole pass from padded ids to the head's numbers is one node, ``torch.ops.fastcls.forward``, whose result has the
batch's shape. It takes the weights as a list of tensors and the rest of the model as text: an exported program holds
all that it needs, and runs wherever ``import fastcls.traced`` has made the operator known. Hooks on modules inside the
model are the eager call's: a graph passes them by.
"""

from __future__ import annotations

import functools
import json
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch

# Its classes are what an exported program gives, which PyTorch can load once they are defined.
import transformers.modeling_outputs
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .encoder import LastLayer
from .inputs import Batch
from .spec import BucketBias, Convolution, Disentangled, EncoderSpec, HeadSpec, WeightMap
from .weights import weight_version

if TYPE_CHECKING:
    from .tasks import TaskModel

# One row of numbers a text, or one a token.
Rows = Literal["texts", "tokens"]


def describe(model: TaskModel) -> str:
    """All of a model but its weights, as the operator takes it."""
    relative, convolution = model.spec.relative, model.spec.convolution
    described = {
        "spec": {
            **vars(model.spec),
            "relative": None if relative is None else vars(relative),
            "convolution": None if convolution is None else vars(convolution),
        },
        "head": vars(model.head.spec),
        "weights": [name for name, _ in model.weights()],
        "buffers": list(model.weight_map.buffers),
    }
    return json.dumps(described)


class Options(NamedTuple):
    """What may be set on a model at any time.

    Attributes:
        last_layer, cuda_graphs, batch_invariant: those of the model.
    """

    last_layer: LastLayer
    cuda_graphs: bool
    batch_invariant: bool


def forward(model: TaskModel, batch: Batch, rows: Rows, fill: float = 0.0, selected: Tensor | None = None) -> Tensor:
    """What the head makes of a padded batch, as a node of the graph that is being traced.

    Args:
        model: the model, whose weights become the graph's.
        batch: its inputs.
        rows: of what there is one row.
        fill: what stands in the rows that the mask leaves out.
        selected: (batch, seqlen) boolean, the tokens whose rows alone are wanted; zeros stand in the others.

    Returns:
        (batch, width) of texts, else (batch, seqlen, width).
    """
    weights = [weight for _, weight in model.weights()]
    return _forward(weights, model.description, *model.options, rows, fill, selected, *batch)


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
) -> Tensor:
    weights = _followed(weights, model)
    fast = _model_over(weights, model, Options(cast(LastLayer, last_layer), cuda_graphs, batch_invariant))
    batch = Batch(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
    return fast.rows_of(batch, cast(Rows, rows), fill, selected)


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
) -> Tensor:
    given = input_ids if inputs_embeds is None else inputs_embeds
    assert given is not None
    description = _parse(model)
    shape = given.shape[:1] if rows == "texts" else given.shape[:2]
    return weights[0].new_empty(*shape, description.width(weights))


def pool(model: TaskModel, states: Tensor) -> Tensor:
    """What an encoder's pooler makes of (num_texts, hidden_size), in their shape, as a node of the graph."""
    weights = [weight for _, weight in model.weights()]
    return _pool(weights, model.description, *model.options, states)


@torch.library.custom_op("fastcls::pool", mutates_args=())
def _pool(
    weights: Sequence[Tensor],
    model: str,
    last_layer: str,
    cuda_graphs: bool,
    batch_invariant: bool,
    states: Tensor,
) -> Tensor:
    options = Options(cast(LastLayer, last_layer), cuda_graphs, batch_invariant)
    return _model_over(_followed(weights, model), model, options).pooled(states)


@_pool.register_fake
def _(
    _weights: Sequence[Tensor],
    _model: str,
    _last_layer: str,
    _cuda_graphs: bool,
    _batch_invariant: bool,
    states: Tensor,
) -> Tensor:
    return states.new_empty(states.shape)


class _Description(NamedTuple):
    spec: EncoderSpec
    head: HeadSpec
    names: tuple[str, ...]
    buffers: frozenset[str]

    def width(self, weights: Sequence[Tensor]) -> Any:
        """Numbers in a row that the model gives."""
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
    """A model that graphs run, and where its weights were and how often they had changed when it was made."""

    places: tuple[object, ...]
    model: TaskModel


# By their first weight, so that models are gone with their weights; and by what a graph says of them.
_built: WeakIdKeyDictionary = WeakIdKeyDictionary()
# A model that is made forgets, as any does, what was made of its weights.
_building = threading.RLock()
# The models that graphs were made of, while they live, by their first weight and by what a graph says of them.
_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()


def own(model: TaskModel) -> None:
    """Makes a model known as the one whose weights graphs are given."""
    _owners.setdefault(next(model.parameters()), {})[model.description] = weakref.ref(model)


def _followed(weights: Sequence[Tensor], model: str) -> Sequence[Tensor]:
    """The weights as the model's original has them now, of a graph in the process that it was made in."""
    owner = _owners.get(weights[0], {}).get(model, lambda: None)()
    return weights if owner is None else owner.current_weights()


def forget(weight: Tensor) -> None:
    """Forgets the models that graphs run over the weights of which this is the first, and what those have made."""
    with _building:
        _built.pop(weight, None)


def _model_over(weights: Sequence[Tensor], model: str, options: Options) -> TaskModel:
    """A fast model over these weights, made at the first call with them."""
    from .tasks import TASKS

    # Within an operator a detached tensor has a count of changes of its own, so that the model is made anew after one.
    places = tuple((*weight_version(weight), weight.dtype, weight.device) for weight in weights)
    with _building:
        models = cast("dict[tuple[str, Options], _Built]", _built.setdefault(weights[0], {}))
        built = models.get((model, options))
        if built is None or built.places != places:
            described = _parse(model)
            own_weights = {
                # Over the same memory.
                name: weight.detach()
                if name in described.buffers
                else nn.Parameter(weight.detach(), requires_grad=False)
                for name, weight in zip(described.names, weights, strict=True)
            }
            parts = (described.spec, described.head, WeightMap({}, {}, {}), own_weights)
            fast = TASKS[described.head.task](
                transformers.PreTrainedModel, transformers.PreTrainedConfig(), *parts, *options
            )
            built = models[model, options] = _Built(places, fast)
    return built.model
