"""Several heads on one encoder, which is computed once for a text, however many of them are asked about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..heads.several import MultiHead
from ..predicting.padded import padded
from .served import Encoded, Served, Want


class Heads:
    """Computes passes for classifiers that share an encoder.

    Args:
        module: see `optimize_heads`.

    Attributes:
        served: the models by their names in the module, in the order of `Encoded.head`.
    """

    def __init__(self, module: MultiHead) -> None:
        self._module = module
        self.served: dict[str, Served] = {}

    def compute(self, texts: Sequence[Encoded], want: Want) -> list[Any]:
        """One pass: of each text what its head gives.

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
        logits = self._module(**inputs).logits
        found = [served.labelled(logits[name]) for name, served in self.served.items()]
        return [found[text.head][row] for row, text in zip(rows, texts, strict=True)]
