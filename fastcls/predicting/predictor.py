"""Tables of Arrow in, with the model's columns out, in whatever process an engine runs."""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import Any

import torch

from ..tables import Errors, Job, with_results
from ..texts import read_count
from .checkpoint import Checkpoint
from .loaded import load_shared
from .options import PredictOptions


class Predictor:
    """A model over tables of Arrow, a column a result.

    Args:
        model: a folder with a checkpoint that this process sees, or a name on the hub.
        text_column: the column of texts; None is "text", or else the only column of strings.
        pair_column: the column of second texts, where texts are pairs.
        errors: what becomes of a text that is null or cannot be computed. "column" gives nulls and says why in a column
            "error", "null" gives nulls, "raise" ends the job.
        threads: CPU threads of this process; None for as many as OMP_NUM_THREADS says, or torch.
        options: what is computed: see `PredictOptions`.

    Raises:
        ValueError, TypeError, OSError: an option that does not fit; as `Classifier.from_pretrained`.
    """

    def __init__(
        self,
        model: Checkpoint,
        *,
        text_column: Hashable | None = None,
        pair_column: Hashable | None = None,
        errors: Errors = "column",
        threads: int | None = None,
        **options: Any,
    ) -> None:
        asked = PredictOptions.of(options)
        asked.check()
        set_threads(threads)
        loaded = load_shared(model, asked)
        self._job = Job(text_column, pair_column, loaded.answers, loaded.flow, errors)

    def __call__(self, table: Any) -> Any:
        """A table with the columns added.

        Args:
            table: a Table or RecordBatch of pyarrow, of any number of rows.

        Raises:
            TypeError: no such table, a column that holds no strings.
            ValueError: a column that is not there, or a new one that is there already; with errors="raise" a text that
                cannot be computed.
        """
        return with_results(table, self._job)


def set_threads(threads: int | None) -> None:
    """Has this process compute, and tokenize, with so many threads; None takes what torch has.

    The tokenizer has as many only if it has not run before in this process.

    Raises:
        ValueError: no positive int.
    """
    if threads is not None:
        torch.set_num_threads(read_count("threads", threads))
    # Tokenizers in Rust would take every core, in each process of the machine.
    os.environ.setdefault("RAYON_NUM_THREADS", str(torch.get_num_threads()))
