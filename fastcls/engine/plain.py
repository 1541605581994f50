"""Plain batches, on a CPU: ids with padding behind them, packed without a look at each token in Python.

For one short text the looks of `BatchReader` take longer than a layer. Whatever is out of the ordinary goes there,
errors too.
"""

from __future__ import annotations

import sys

from fastcls_kernels.packed.ids import IdLimits, plain_batch

from .batch import PaddedBatch
from .packed import is_plain
from .packing import PackedTokens, PackFields, PackShape, lay_out, packed_over
from .spec import EncoderSpec


def pack_plain(batch: PaddedBatch, spec: EncoderSpec, max_tokens: int) -> PackedTokens | None:
    """A batch that was checked, in one part; None where it is not plain, or has more than ``max_tokens`` tokens.

    Args:
        batch: a batch, of one text at least.
        spec: the encoder's shape.
        max_tokens: the most tokens of a part.
    """
    ids = batch.input_ids
    # PyTorch's attention wants texts sorted by length.
    in_order = batch.shape[0] == 1 or is_plain(spec)
    # Mask tokens are looked for, see `BatchReader`, where they are counted.
    if ids is None or not in_order or spec.mask_token_id is not None:
        return None
    if batch.position_ids is not None or batch.inputs_embeds is not None:
        return None
    # Tokenizers make token types for models without them, too.
    given_types = batch.token_type_ids if spec.token_types else None
    longest = sys.maxsize if spec.max_positions is None else spec.max_positions
    limits = IdLimits(spec.vocab_size, spec.token_types, longest, spec.padding_id, spec.first_position)
    plain = plain_batch(ids, batch.attention_mask, given_types, limits)
    if plain is None or plain.num_tokens > max_tokens:
        return None
    shape = PackShape(plain.num_tokens, plain.num_rows)
    fields = PackFields(ids=True, types=plain.has_types, places=False, rows=None)
    integers, parts = lay_out(shape, fields)
    types = parts.get("token_type_ids")
    max_seqlen = plain.pack(parts["cu_seqlens"], parts["position_ids"], parts["token_ids"], types)
    counts = {"max_seqlen": max_seqlen, "num_texts": plain.num_rows, "num_tokens": plain.num_tokens}
    return packed_over(integers, shape, fields, **counts, inputs_embeds=None, order=None, origins=None)
