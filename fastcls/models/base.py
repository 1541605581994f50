"""What transformers sees of every fast model: arguments, outputs, weights under a checkpoint's names."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..engine import Engine, operator
from ..engine.batch import PaddedBatch
from ..engine.packed import LET_GO
from ..engine.packing import PackedTokens
from ..engine.spec import EncoderSpec, HeadSpec, LastLayer, Quantize, Rows
from ..engine.weights import has_hooks, is_spread
from ..families import family_of_class
from ..families.family import WeightMap
from . import training_node
from .arguments import check_extras, check_not_traced, divides_by_count, order_of, takes_positions
from .state_dict import register_hooks
from .trainable import TrainableModel

# Tables of embeddings, by the ends of their names.
_TABLES = (
    *("word_weight", "position_weight", "token_type_weight", "task_weight"),
    *("relative.table_weight", "rotary.table_weight"),
)


def _place(weight: Tensor) -> object:
    """What tells weights apart, by their memory as far as they have any."""
    return id(weight) if weight.is_meta else weight.data_ptr()


_Output = TypeVar("_Output", bound=ModelOutput)


class FastModel(TrainableModel):
    """An encoder and its head that compute only what their answer needs. Made by `optimize`, in eval mode.

    It follows the weights of the model that it was made of, see `optimize`; a copy of it, or what a pickle gives back,
    has weights of its own. In eval mode it gives no gradients but those of ``inputs_embeds`` that require them; `train`
    makes it a model that is trained.

    Attributes:
        config: the transformers config.
        spec: the encoder's shape.
        last_layer: how the last layer is computed: "absorbed" (no values, and no keys where they do not depend on
            positions, for the wanted rows alone), "selected" (keys and values for all tokens, the rest for the wanted
            rows alone) or "full" (every row). The results are the same up to rounding. Where the compiled kernels take
            whole layers on a CPU, "absorbed" computes what "selected" does. May be set at any time.
        cuda_graphs: whether small passes are replayed as CUDA graphs, on a GPU with the Triton kernels. A graph is made
            at the second use of a shape and reads the weights where they were then: whoever puts others in their place
            by hand (``parameter.data = ...``) calls `clear_caches`. May be set at any time.
        batch_invariant: whether a text's answer is the same bit for bit whatever batch it comes in, on one machine with
            one number of threads: see `fastcls_kernels.batch_invariant`. It costs speed. May be set at any time.
        quantize: "int8" computes the layers' products in int8, of a float32 model on a CPU; None computes them in
            `dtype`. Answers come near the model's own: ``fastcls verify --quantize int8`` says how near. May be set
            while no call runs, unless the weights were let go.
        pack_weights: whether a CPU that runs the compiled kernels (`fastcls_kernels.explain_compiled`) keeps a packed
            copy of the layers' weights, once more their memory, and is faster for it. False runs PyTorch's operators.
            With ``quantize`` weights are packed all the same. May be set at any time.
    """

    # transformers' Trainer asks: whether the loss is divided by the number of labels that it gives, in all batches of a
    # step. Others are means over a batch's labels, and the Trainer divides by the number of batches.
    accepts_loss_kwargs: bool = False

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
        quantize: Quantize | None = None,
        pack_weights: bool = True,
    ) -> None:
        super().__init__(spec, head, weights, last_layer, cuda_graphs, batch_invariant, quantize, pack_weights)
        self.model_class = model_class
        self.config = config
        self.weight_map = weight_map
        self._order = order_of(cast("Any", model_class), cast("Any", type(self)))
        self._takes_positions = takes_positions(cast("Any", model_class))
        # A copy, since some are lists.
        read = family_of_class(model_class)[0].read_at_calls
        self._read_at_calls = {name: copy.deepcopy(getattr(config, name, None)) for name in read}
        self.accepts_loss_kwargs = divides_by_count(cast("Any", model_class))
        register_hooks(self)
        self.description = operator.describe(self)
        self._announce_weights()

    def __copy__(self) -> FastModel:
        # A copy that shared modules would keep some weights as they were when the original changes, and not others.
        return copy.deepcopy(self)

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
        check_not_traced()
        # Each class of transformers has an order of its own, some without token types, some with positions later.
        if self._order is not None and len(args) > 1:
            if len(args) > len(self._order):
                raise TypeError(f"forward() takes {len(self._order)} arguments without names, got {len(args)}")
            args, kwargs = args[:1], {**dict(zip(self._order[1:], args[1:], strict=False)), **kwargs}
        return super().__call__(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> FastModel:
        raise RuntimeError(
            "nn.DataParallel must be left out: it copies the model to every GPU at each call. "
            "Give each GPU a process, or a copy.deepcopy(fast).to(device), of its own"
        )

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the weights are, as transformers counts them.

        Args:
            only_trainable: count those that require gradients: none, before the model is trained.
            exclude_embeddings: leave out the tables of embeddings.
        """
        if self.trained is not None:
            return self.trained.model.num_parameters(only_trainable, exclude_embeddings)
        if only_trainable:
            return 0
        # By their place, since tied weights share one.
        counts = {_place(weight): self.weight_map.numel(name, weight) for name, weight in self.own_parameters()}
        if exclude_embeddings:
            for name, weight in self.own_parameters():
                if name.endswith(_TABLES):
                    counts.pop(_place(weight), None)
        return sum(counts.values())

    @property
    def main_input_name(self) -> str:
        """Of `forward`; transformers' Trainer asks, to count floating point operations."""
        return self.model_class.main_input_name

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights, those that are shared with the original and those that are packed included."""
        tensors: list[Tensor] = [weight for _, weight in self.own_parameters()]
        if return_buffers:
            tensors += [buffer for _, module in self.own_modules() for buffer in module.buffers(recurse=False)]
        there = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if not tensor.is_meta}
        return sum(there.values()) + self.own_encoder.packed.nbytes

    @property
    def name_or_path(self) -> str:
        """Where the transformers model came from."""
        return str(getattr(self.config, "name_or_path", ""))

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of words, for ``inputs_embeds``: over the same memory, or the model's own where that is trained."""
        if self.trained is not None:
            return cast(nn.Embedding, self.trained.model.get_input_embeddings())
        self.catch_up()
        self.check_not_let_go("get_input_embeddings")
        return nn.Embedding.from_pretrained(self.own_encoder.embeddings.word_weight.detach(), freeze=True)

    def get_output_embeddings(self) -> nn.Module | None:
        """The layer of a masked language model that gives the vocabulary's logits, None of others; accelerate asks.

        Raises:
            RuntimeError: a masked language model does not show its layers, as it does from `train` on.
        """
        if self.trained is not None:
            return cast("nn.Module | None", self.trained.model.get_output_embeddings())
        if self.own_head.spec.task == "masked language modelling":
            raise RuntimeError("get_output_embeddings must be called after train(), which shows the model's layers")
        return None

    def tie_weights(self, **options: Any) -> None:
        """Ties weights of the model that is shown from `train` on once more; accelerate asks, where it has moved them.

        Args:
            options: of the transformers model's method.
        """
        if self.trained is not None:
            self.trained.model.tie_weights(**options)

    def let_go(self) -> None:
        """Packs the weights for `quantize`, and lets those go that are packed."""
        if self.own_encoder.packed.is_alone:
            return
        self.own_encoder.packed.refresh(self._packing)
        self.own_encoder.packed.let_go(self.weights(all_names=True))

    def check_not_let_go(self, what: str) -> None:
        """Raises RuntimeError where the weights are gone that ``what`` gives or takes."""
        if self.own_encoder.packed.is_alone:
            raise RuntimeError(f"{what} must be left out: {LET_GO}")

    def can_generate(self) -> bool:
        """False; transformers' pipelines ask."""
        return False

    @property
    def base_model_prefix(self) -> str:
        """The encoder's name in the transformers model; transformers' pipelines ask, for their messages."""
        return self.model_class.base_model_prefix

    @property
    def input_modalities(self) -> Any:
        """What the transformers model takes; transformers' pipelines ask, for their messages."""
        return self.model_class.input_modalities

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes a transformers checkpoint, which ``from_pretrained`` of the original class reads back.

        Args:
            save_directory: a folder, made if need be.
            kwargs: passed on to transformers' ``save_pretrained``.

        Raises:
            RuntimeError: the model has adapters of PEFT, whose own ``save_pretrained`` saves them.
            RuntimeError: `fully_shard` has spread the weights, and no ``state_dict`` is given.
        """
        self.check_no_adapters("a checkpoint")
        if is_spread(self) and "state_dict" not in kwargs:
            raise RuntimeError(
                "state_dict must be given to save_pretrained of a model that fully_shard has spread over processes: "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict gathers it, with full_state_dict=True"
            )
        with torch.device("meta"):
            model = nn.Module.to(self.model_class(self.config), self.dtype)
        # The weights are given apart, in the shapes that they have here, which the config may contradict.
        model.save_pretrained(save_directory, **{"state_dict": self.state_dict(), **kwargs})

    def forward_packed(self, packed: PackedTokens) -> Tensor:
        """Packed tokens to the rows that the model's task reads, in packed order, without waiting for a GPU.

        Args:
            packed: what `pack` gives, or its like in pinned memory of the CPU.

        Returns:
            One row a text, (num_texts, num_labels), or one a token, (num_tokens, width), as the model's task is.
        """
        self._begin_outside_of_calls("forward_packed")
        return self.rows_of_packed(packed, self._task_rows)

    def warm_up(self) -> None:
        self.catch_up()
        super().warm_up()

    warm_up.__doc__ = Engine.warm_up.__doc__

    @property
    def _width(self) -> int:
        """How many numbers a row has behind the head."""
        out = self.own_head.out_weight
        return self.spec.hidden_size if out is None else len(out)

    @property
    def _task_rows(self) -> Rows:
        """The rows that the task reads where a call does not say."""
        return self.own_head.spec.rows

    def _rows(
        self, batch: PaddedBatch, rows: Rows, fill: float = 0.0, chosen: Tensor | None = None, *, dense: bool = True
    ) -> Tensor:
        """`Engine.rows` of the weights as the original has them, or in a graph one node for it."""
        if self.keeps_graph(batch.inputs_embeds):
            if torch.compiler.is_compiling() and self.training and dense and self.is_training_node:
                is_headless = self.own_head.spec.task == "encoder"
                return training_node.trained_rows(self, batch, rows, fill, chosen, self._width, is_headless=is_headless)
            return self.trained_rows(batch, rows, fill, chosen, dense=dense)
        if torch.compiler.is_compiling():
            if self.is_for_graphs and dense:
                return operator.forward(self, self.description, batch, rows, fill, chosen)
            outside: Tensor = torch.compiler.disable(self._rows)(batch, rows, fill, chosen, dense=dense)
            return outside
        leave = self.gather()
        # First, so that an original that has become another model is named, and not the input that does not fit it.
        self.catch_up()
        return leave(self.rows(batch, rows, fill, chosen, dense=dense))

    @property
    def is_for_graphs(self) -> bool:
        """Whether a graph can hold the model: its weights are there and whole, and no hooks inside would be passed by.

        Where it cannot, a graph that must be whole was refused before this is asked. Of others PyTorch runs what raised
        once more, outside, and compiles the functions that are called there: so each that would make a node asks.
        """
        return not self.own_encoder.packed.is_alone and not self.hooked_inside() and not self.is_spread_by_parts

    def _list_rows(
        self, token_ids: Iterable[Iterable[int]], token_type_ids: Iterable[Iterable[int]] | None, rows: Rows
    ) -> Tensor:
        """`Engine.rows_of_lists` of the weights as the original has them."""
        self._begin_outside_of_calls("a method that takes lists of ids")
        return self.rows_of_lists(token_ids, token_type_ids, rows)

    def _given(self, output: _Output, return_dict: bool | None) -> _Output | tuple[Any, ...]:
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _checked(self, batch: PaddedBatch, extras: Mapping[str, Any]) -> torch.Size:
        """The shape of a batch that can be computed, as far as its values need not be read to say so.

        Args:
            batch: the inputs.
            extras: the arguments that ``forward`` does not name.
        """
        if self.training:
            self._check_trains()
        elif self.trained is not None:
            self.trained.check_unhooked()
        if torch.compiler.is_compiling():
            self._check_no_hooks_inside()
            self.check_not_let_go("torch.compile and torch.export")
            if torch.compiler.is_exporting() and (self.trained is not None or self.follows_adapters):
                raise RuntimeError(
                    "torch.export must be given a model with weights of its own, not one that shows those it trains: "
                    "export copy.deepcopy(fast), or of a model with adapters what merge_and_unload() gives"
                )
        if torch.is_grad_enabled() and not self.training:
            self._check_no_gradients(batch)
        check_extras(type(self), self.config, extras, accepts_count=self.accepts_loss_kwargs)
        if batch.position_ids is not None and not self._takes_positions:
            raise TypeError("forward() takes no argument position_ids: the transformers model computes nothing with it")
        for name, value in self._read_at_calls.items():
            if (found := getattr(self.config, name, None)) != value:
                raise RuntimeError(
                    f"config.{name} must stay {value!r}, which this model was made for, got {found!r}: optimize the "
                    "transformers model anew"
                )
        self.check(batch)
        return batch.shape

    def _check_no_gradients(self, batch: PaddedBatch) -> None:
        # Of a model that is trained the parameters that are shown are the given model's.
        shown = self.named_parameters() if self.trained is None else self.weights()
        asking = next((name for name, weight in shown if weight.requires_grad), None)
        if asking is not None:
            raise RuntimeError(
                f"{asking} must not require gradients, which a model in eval mode does not compute: call train() "
                "first, or this inside torch.no_grad()"
            )
        if torch.compiler.is_compiling() and self.keeps_graph(batch.inputs_embeds):
            raise RuntimeError(
                "inputs_embeds must not require gradients in a graph, of a model in eval mode: call it outside of what "
                "is compiled or exported"
            )

    def _begin_outside_of_calls(self, method: str) -> None:
        """Refuses what runs only where the model is called as a whole, and brings the weights up to the original's."""
        if has_hooks(self):
            raise RuntimeError(
                f"a {type(self).__name__} with forward hooks, or another forward, must be called as a whole: {method} "
                "would pass them by"
            )
        self._check_in_eval(method)
        if self.trained is not None:
            self.trained.check_unhooked()
        self.catch_up()
