"""What the families with rotary positions share: they read a config's frequencies, and name a model's buffers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..engine.spec import EncoderSpec
from .family import check_options

# Their frequencies depend on nothing but the config; those of "dynamic" and "longrope" on the padded length, too.
_TYPES = ("default", "linear", "llama3", "yarn")


def with_rotary(spec: EncoderSpec, config: Any, kinds: Iterable[str] = ()) -> EncoderSpec:
    """A spec whose layers turn queries and keys, by the frequencies of their kinds, or all by the same.

    Args:
        spec: of the encoder without positions.
        config: the model's.
        kinds: for each layer the key of ``config.rope_parameters`` that holds its own; none where there is one set.

    Raises:
        ValueError: frequencies that are not known before a batch is, or heads that are not turned as a whole.
    """
    check_options(config, (("head_dim", spec.head_dim),))
    kinds, scales = tuple(kinds), set()
    for kind in dict.fromkeys(kinds) or (None,):
        parameters = config.rope_parameters if kind is None else config.rope_parameters[kind]
        rope_type = parameters["rope_type"]
        if rope_type not in _TYPES:
            raise ValueError(
                f"config.rope_parameters must have a rope_type of {', '.join(_TYPES)}, got {rope_type!r}: fastcls "
                "takes frequencies that depend on the config alone"
            )
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                "config.rope_parameters must leave partial_rotary_factor out, got "
                f"{parameters['partial_rotary_factor']}: fastcls turns whole heads"
            )
        # What a "default" one does stands in each model's own file: it scales nothing.
        is_default = rope_type == "default"
        scales.add(1.0 if is_default else float(ROPE_INIT_FUNCTIONS[rope_type](config, layer_type=kind)[1]))
    if len(scales) > 1:
        raise ValueError(
            f"config.rope_parameters must give all kinds of layers one attention factor, got {sorted(scales)}"
        )
    layers = kinds or ("default",) * spec.num_layers
    return replace(spec, max_positions=config.max_position_embeddings, rotary=layers, rotary_scale=scales.pop())


def frequencies(_config: Any) -> dict[str, str]:
    """The buffer of a model whose layers all turn by the same frequencies."""
    return {"rotary.default": "rotary_emb.inv_freq"}
