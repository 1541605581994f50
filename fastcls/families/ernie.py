"""ERNIE (Sun et al., 2019): BERT, with an embedding for the kind of task where the config asks for it."""

from __future__ import annotations

from typing import Any

from . import bert
from .family import Built, Family, Names

_BUILT: Built = {**bert.BUILT, "use_task_id": lambda encoder, _: encoder.embeddings.use_task_id}


def _modules(config: Any) -> Names:
    # Calls that name no task take the table's first row, and no others are taken.
    task = {"embeddings.task": "embeddings.task_type_embeddings"} if config.use_task_id else {}
    return {**bert.modules(config), **task}


FAMILY = Family(
    *("ernie", "ernie.", bert.spec, _modules, bert.heads("Ernie", "ernie")),
    *("BaseModelOutputWithPoolingAndCrossAttentions", _BUILT),
)
