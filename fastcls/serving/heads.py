"""Several heads on one encoder, which is computed once for a text, however many of them are asked about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..heads.several import MultiHead
from ..predicting.padded import padded
from .served import Encoded, Want


class Heads:
    """Computes passes for classifiers that share an encoder.

    Args:
        module: see `optimize_heads`.
        names: the heads' names in it, in the order of `Encoded.head`.
    """

    def __init__(self, module: MultiHead, names: Sequence[str]) -> None:
        self._module, self._names = module, names

    def compute(self, texts: Sequence[Encoded], want: Want) -> list[Any]:
        """One pass: of each text its head's logits.

        Raises:
            Exception: whatever a model raises that has no memory left, or fails.
        """
        assert want == "logits", "heads classify"
        place: dict[tuple[bytes, bytes], int] = {}
        rows = [place.setdefault((text.ids.tobytes(), text.types.tobytes()), len(place)) for text in texts]
        first = dict(zip(reversed(rows), reversed(texts), strict=True))
        different = [first[row] for row in range(len(first))]
        inputs = padded(
            [text.ids for text in different], [text.types for text in different], self._module.encoder.device
        )
        logits = {name: each.float().cpu() for name, each in self._module(**inputs).logits.items()}
        return [logits[self._names[text.head]][row] for row, text in zip(rows, texts, strict=True)]
