"""A fast model that can be trained: in training mode its parameters are those of the model that it was made of."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..engine.batch import PaddedBatch
from ..engine.packed import LET_GO
from ..engine.spec import Rows
from ..engine.training import DropoutRates, TrainingOptions, TrainingPass, num_seeds
from ..engine.weights import is_spread
from ..families.dropout import dropout_rates
from ..families.family import WeightMap
from ..original.following import Original, tell_of_steps
from ..original.training import Trained, check_rates, model_over
from . import training_node
from .following import FollowingModel

_EXPLAINING = "eval mode with gradients of inputs_embeds"

_Model = TypeVar("_Model", bound="TrainableModel")


class _Once:
    """A function of tensors that gives those of one memory one result, as those who share it go on to share."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        # The tensors stay alive meanwhile, so that no memory is given out again.
        self._found: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if not tensor.data_ptr():
            return self._function(tensor)
        if place not in self._found:
            self._found[place] = tensor.detach(), self._function(tensor)
        return self._found[place][1]


def _as_they_are(rows: Tensor) -> Tensor:
    return rows


class TrainableModel(FollowingModel):
    """A following model with a training mode.

    Attributes:
        trained: the model whose parameters are trained, once `train` was called.
        stays_in_eval: whether `train` changes nothing, as in a module that trains its own head on a frozen encoder.
        checkpointed_layers: n where the backward pass computes each n-th layer again, 0 where it computes none.
    """

    # transformers' Trainer asks.
    supports_gradient_checkpointing = True

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    weight_map: WeightMap
    trained: Trained | None = None
    stays_in_eval: bool = False
    checkpointed_layers: int = 0
    _training_options: TrainingOptions | None = None
    # By which nodes of graphs find this model.
    number: int = -1
    # The parameters that were shown before `train`.
    _early: tuple[weakref.ref[Tensor], ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        self.check_no_adapters("a copy, or a pickle,")
        state = super().__getstate__()
        if self.trained is None:
            return state
        # A copy has weights of its own, and trains those.
        for name in ("trained", "_training_options", "_early"):
            state.pop(name)
        return {**state, "_modules": state.pop("own_parts"), "_parameters": {}, "_buffers": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.training:
            self._begin_training()

    def train(self: _Model, mode: bool = True) -> _Model:
        """Sets training mode, or eval mode.

        From the first time on, the model holds the transformers model that it was made of, and shows its modules and
        parameters as its own: optimizers, `state_dict` and transformers' Trainer see what they would see of that
        model. If nobody holds it any more, another one is made over the same weights. Make optimizers of this model's
        parameters after this call.

        In training mode a call keeps a graph for gradients, and drops out where the config says so. In eval mode it is
        what it was before, with the weights as they are trained by then. The shown modules take the mode, too.

        Raises:
            RuntimeError: the model cannot be trained, and why.
        """
        if mode and not self.stays_in_eval:
            self._check_trains()
            if self.trained is None:
                self._begin_training()
        self.training = mode and not self.stays_in_eval
        # The engine's own never leave eval mode.
        for _, module in self.own_modules():
            module.training = False
        if self.trained is not None:
            self.trained.model.train(self.training)
        return self

    def requires_grad_(self: _Model, requires_grad: bool = True) -> _Model:
        """Sets whether parameters have gradients, of a model that is trained.

        Raises:
            RuntimeError: ``requires_grad`` is True, and `train` was not called yet.
        """
        if requires_grad and self.trained is None:
            raise RuntimeError("gradients must be asked for in training mode: call train() first, then this")
        return super().requires_grad_(requires_grad)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Has the backward pass compute layers again, so that their activations need not be kept.

        Args:
            activation_checkpointing_kwargs: taken for transformers' sake; ``use_reentrant`` and ``preserve_rng_state``
                change nothing here, where the same numbers are dropped again in any case.
            every_n_layers: 1 for all layers, n for each n-th one, from the first on.
            offload: must be False.

        Raises:
            TypeError: an option that is not known.
            ValueError: ``every_n_layers`` is below 1, or ``offload`` is set.
        """
        unknown = set(activation_checkpointing_kwargs or {}) - {"use_reentrant", "preserve_rng_state"}
        if unknown:
            found = ", ".join(sorted(unknown))
            raise TypeError(
                f"activation_checkpointing_kwargs may hold use_reentrant and preserve_rng_state alone, got {found}"
            )
        if every_n_layers < 1:
            raise ValueError(f"every_n_layers must be at least 1, got {every_n_layers}")
        if offload:
            raise ValueError(f"offload must be False, got {offload!r}: activations stay on the model's device")
        self.checkpointed_layers = every_n_layers

    def activation_checkpointing_disable(self) -> None:
        """Has layers' activations kept for the backward pass."""
        self.checkpointed_layers = 0

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether `activation_checkpointing_enable` was called last; transformers asks."""
        return self.checkpointed_layers > 0

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """`activation_checkpointing_enable`, under the name that transformers gave it before 5.23."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """`activation_checkpointing_disable`, under its old name."""
        self.activation_checkpointing_disable()

    def _apply(self: _Model, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Model:
        if self.trained is None:
            super()._apply(fn, recurse)
            return self

        def away(weight: Tensor) -> Tensor:
            dtype = fn(torch.empty(0, dtype=weight.dtype)).dtype
            return torch.empty_like(weight, dtype=dtype, device="meta")

        once, in_parts = _Once(fn), is_spread(self)
        super()._apply(once, recurse)
        # What is shown are the given model's modules, which were moved; ours read the same memory, or copies. Where
        # each process has a part of the weights, the next pass, for which they are whole, takes those.
        for own in (self.own_encoder, self.own_head):
            own._apply(away if in_parts else once, recurse)
        if not in_parts:
            self.catch_up()
        return self

    def stop_following(self) -> None:
        """Goes on with the weights as they are, in memory of its own, whatever becomes of the original's.

        Raises:
            RuntimeError: the model is trained, and so has no weights but those.
        """
        if self.trained is not None:
            raise RuntimeError(
                "stop_following must be left out: the weights that this model follows are those it trains"
            )
        super().stop_following()

    def _begin_training(self) -> None:
        if is_spread(self):
            raise RuntimeError("fully_shard must be called after train(), whose parameters are those of the original")
        if self.own_encoder.packed.is_alone:
            raise RuntimeError(f"the model must keep its weights to be trained: {LET_GO}")
        if self._original is not None:
            # Those that leave no count among them.
            self._original.doubt()
        self.catch_up()
        # Other weights in the modules around end following.
        original, companion = self._original, self._companion
        early: list[Tensor] = [weight for _, weight in self.own_parameters()]
        if companion is not None:
            self._companion = None
            early += companion.hand_over()
        early += [] if original is None else [weight for parts in original.tensors().values() for weight in parts]
        model = None if original is None else original.model
        like = None if model is None else next(model.parameters(), None)
        if original is None or model is None or like is None or (like.device, like.dtype) != (self.device, self.dtype):
            # What is followed from afar is another model, which somebody else may train.
            super().stop_following()
            model = model_over(
                self.model_class, self.config, dict(self.weights(all_names=True)), self.weight_map, self.frozen
            )
            sources = {**self.weight_map.sources, **{own: (name,) for own, name in self.weight_map.buffers.items()}}
            original = Original(model, sources, self.weight_map.aliases, self.weight_map.layouts)
            self.follow(original)
        assert isinstance(model, PreTrainedModel)
        shown = {id(weight) for weight in model.parameters()}
        self._early = tuple(weakref.ref(weight) for weight in early if id(weight) not in shown)
        check_rates(model)
        self.trained = Trained(model, original, self.weight_map)
        self.number = training_node.number_of(self)
        rates = dropout_rates(self.config, self.own_head.spec)
        self._training_options = TrainingOptions(rates, self.trained.padding_ids)
        tell_of_steps(self)
        self.own_parts = self._modules
        self.__dict__.update(_modules=model._modules, _parameters=model._parameters, _buffers=model._buffers)

    def doubt_if(self, stepped: set[int]) -> None:
        """Refuses an optimizer that was made before `train`: it holds none of the parameters that are trained.

        Args:
            stepped: the ids of the parameters that an optimizer has stepped; of none where it holds none, as the one
                that transformers' Trainer makes of a model without gradients.

        Raises:
            RuntimeError: it holds no parameters, or those of eval mode.
        """
        if not self.training or any(id(weight) in stepped for weight in self.parameters()):
            return
        early = (weight() for weight in self._early)
        if not stepped or any(weight is not None and id(weight) in stepped for weight in early):
            raise RuntimeError(
                "an optimizer has stepped that holds no parameter of the model in training: call train() before the "
                "optimizer, or transformers' Trainer, is made"
            )

    def _check_trains(self, what: str = "training") -> None:
        """Refuses options and hooks that a pass with gradients passes by.

        Args:
            what: what the message calls it.

        Raises:
            RuntimeError: one is set.
        """
        for name, value, needed in (
            ("quantize", self.quantize, None),
            ("batch_invariant", self.batch_invariant, False),
        ):
            if value != needed:
                raise RuntimeError(f"{name} must be {needed} in {what}, got {value!r}")
        for name, _ in self.hooked_inside():
            raise RuntimeError(
                f"{name} must have no forward hooks, and no other forward, in {what}, where they would not run"
            )
        if self.trained is not None:
            self.trained.check()

    def check_no_adapters(self, what: str) -> None:
        """Raises RuntimeError for what a model with PEFT's adapters in it cannot give: the adapters are PEFT's."""
        if self.trained is not None and self.trained.original.standing.has_adapters:
            raise RuntimeError(
                f"{what} must be made of a model without adapters: save the PEFT model, or merge them into it with "
                "merge_and_unload()"
            )

    def enable_input_require_grads(self) -> None:
        """Does nothing: layers that are computed again need no gradients of the embeddings. PEFT asks."""

    def disable_input_require_grads(self) -> None:
        """Does nothing, as `enable_input_require_grads`."""

    def show_original(self) -> None:
        """Shows the modules and parameters of the model that this one was made of, as `train` does, in eval mode."""
        if self.trained is None:
            self._begin_training()

    def _check_in_eval(self, method: str) -> None:
        if self.training:
            raise RuntimeError(
                f"the model must be in eval mode for {method}, which gives no gradients: call eval() first"
            )

    @property
    def training_dtype(self) -> torch.dtype:
        """What products are computed in: autocast's dtype where that is on."""
        kind = self.device.type
        # As autocast does, which leaves float64 alone.
        narrows = torch.is_autocast_enabled(kind) and self.dtype != torch.float64
        return torch.get_autocast_dtype(kind) if narrows else self.dtype

    def training_pass(
        self,
        dtype: torch.dtype | None = None,
        seeds: Sequence[int] | None = None,
        instead: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> TrainingPass:
        """A pass over the weights as they are.

        Args:
            dtype: what products are computed in, or None for `training_dtype`.
            seeds: of dropout, or None to draw them.
            instead: for ids of parameters tensors of the same numbers, whose gradients are asked for instead.
        """
        assert self.trained is not None
        assert self._training_options is not None
        self._check_gathered()
        # Writes through ``data`` leave no count; an optimizer has stepped since the last pass, as a rule.
        self.trained.original.doubt()
        self.catch_up(adds=False)
        self.trained.check_pass(self.device, self.dtype, drops=any(self._training_options.rates))
        if self.own_encoder.rotary is not None:
            with torch.no_grad():
                self.own_encoder.rotary.refresh()
        options = self._training_options._replace(
            padding_ids=self.trained.padding_ids, checkpointed_layers=self.checkpointed_layers
        )
        ours = dict(self.weights())
        return TrainingPass(
            *(self.spec, self.own_head.spec, self.own_encoder, self.trained.weights(ours, instead)),
            *(self.trained.adapters(ours), options, dtype or self.training_dtype),
            seeds=seeds,
        )

    @property
    def is_training_node(self) -> bool:
        """Whether a graph can hold a pass in training mode: adapters, and weights that are spread, are left outside."""
        trained = self.trained
        return trained is not None and not trained.original.standing.has_adapters and not is_spread(self)

    def count_seeds(self) -> int:
        """How many seeds a pass in training mode takes."""
        assert self._training_options is not None
        return num_seeds(self._training_options.rates, self.spec.num_layers)

    def trained_parameters(self) -> list[Tensor]:
        """The parameters that are trained, each once, in their order."""
        assert self.trained is not None
        return list(self.trained.model.parameters())

    def rows_over(
        self,
        leaves: Sequence[Tensor],
        seeds: Sequence[int],
        dtype: torch.dtype,
        batch: PaddedBatch,
        rows: Rows,
        fill: float,
        chosen: Tensor | None,
    ) -> Tensor:
        """`trained_rows`, dense, whose graph leads to ``leaves``, one for each of `trained_parameters`."""
        instead = {id(weight): leaf for weight, leaf in zip(self.trained_parameters(), leaves, strict=True)}
        run = self.training_pass(dtype, seeds, instead)
        with torch.autocast(self.device.type, enabled=False):
            return self.rows(batch, rows, fill, chosen, run=run.rows)

    @property
    def is_spread_by_parts(self) -> bool:
        """Whether `fully_shard` has spread parts of the model."""
        return self.trained is not None and self.trained.is_spread_by_parts

    def gather(self) -> Callable[[Tensor], Tensor]:
        """Has weights whole that `fully_shard` has spread by parts of the model: see `Trained.gather`.

        Raises:
            RuntimeError: it has spread parts of the model, but not the model.
        """
        if self.trained is None or not self.is_spread_by_parts:
            return _as_they_are
        if not is_spread(self):
            raise RuntimeError(
                "fully_shard must be called on the fast model, too, at last, and not on its parts alone: the "
                "gradients of all other weights would be those of one process"
            )
        return self.trained.gather()

    def keeps_graph(self, states: Tensor | None) -> bool:
        """Whether a call keeps a graph: in training, and in eval mode where the embeddings given ask for gradients."""
        return self.training or (states is not None and states.requires_grad and torch.is_grad_enabled())

    def explaining_pass(self) -> TrainingPass:
        """A pass in eval mode for the gradients of what it reads alone: no dropout, and the weights ask for none.

        Raises:
            RuntimeError: an option or a hook that it would pass by, or weights that were let go.
        """
        self._check_trains(_EXPLAINING)
        if self.own_encoder.packed.is_alone:
            raise RuntimeError(f"the model must keep its weights for {_EXPLAINING}: {LET_GO}")
        self.catch_up()
        self.check_weights()
        if self.own_encoder.rotary is not None:
            with torch.no_grad():
                self.own_encoder.rotary.refresh()
        weights = dict(self.weights(all_names=True))
        options = TrainingOptions(DropoutRates(), {}, self.checkpointed_layers)
        return TrainingPass(self.spec, self.own_head.spec, self.own_encoder, weights, {}, options, self.dtype)

    # How a batch is packed follows from its values, and what is kept for the backward pass from how it is packed.
    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="this pass with gradients is no node of a graph: leave fullgraph=True out"
    )
    def trained_rows(
        self, batch: PaddedBatch, rows: Rows, fill: float = 0.0, chosen: Tensor | None = None, *, dense: bool = True
    ) -> Tensor:
        """`Engine.rows` with a graph, and in training mode with dropout."""
        leave = self.gather()
        run = self.training_pass() if self.training else self.explaining_pass()
        with torch.autocast(self.device.type, enabled=False):
            return leave(self.rows(batch, rows, fill, chosen, dense=dense, run=run.rows))

    def trained_pooled(self, states: Tensor) -> Tensor:
        """The pooler over (num_texts, hidden_size), with a graph."""
        leave = self.gather()
        run = self.training_pass() if self.training else self.explaining_pass()
        with torch.autocast(self.device.type, enabled=False):
            return leave(run.head(states))
