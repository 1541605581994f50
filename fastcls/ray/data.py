"""A model over datasets of Ray Data."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from ..flow import MAX_ROWS
from ..predicting.loaded import answers_of
from ..predicting.options import PredictOptions
from ..predicting.predictor import Predictor as ArrowPredictor
from ..tables import check_errors
from ..texts import read_count
from .library import import_ray, machines_of
from .sent import sent
from .share import shares


class Predictor(ArrowPredictor):
    """A model for ``Dataset.map_batches``, loaded once an actor; the actors of a machine share its weights.

        dataset.map_batches(
            fastcls.ray.Predictor,
            fn_constructor_args=["your/bert-classifier"],
            fn_constructor_kwargs={"text_column": "review", "threads": 1},
            batch_format="pyarrow",
            batch_size=4096,
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=0.5,
        )

    `predict` chooses these. Arguments are those of `fastcls.predicting.predictor.Predictor`; the model's folder must be
    one that each machine sees.
    """

    def __call__(self, table: Any) -> Any:
        """A batch with the columns added.

        Args:
            table: a Table of pyarrow.

        Raises:
            TypeError: a batch in another format, in which nulls may arrive as other rows' texts.
            ValueError, TypeError: see `fastcls.predicting.predictor.Predictor`.
        """
        if not isinstance(table, pa.Table):
            raise TypeError(
                f'map_batches must be called with batch_format="pyarrow", got a batch as {type(table).__name__}: in '
                "Ray's default format the null of a dictionary column arrives as another row's text"
            )
        return super().__call__(table)


def predict(
    dataset: Any,
    model: str,
    *,
    actors: int | None = None,
    threads: int = 1,
    gpus: float = 0,
    block_rows: int = MAX_ROWS,
    **options: Any,
) -> Any:
    """A dataset with the model's columns added, computed where and when it is read.

    A row keeps its columns; rows keep their order where ``ray.data.DataContext``'s ``preserve_order`` is set. An actor
    that dies is started again by Ray, and its blocks are computed again.

    Args:
        dataset: a ``ray.data.Dataset``.
        model: a folder with a checkpoint that this process sees, whose files the cluster is sent, or a name on the hub.
        actors: processes with the model; None takes all CPUs of the cluster as it is now, or all its GPUs.
        threads: CPU threads an actor. One each is the fastest way to use many cores.
        gpus: of each actor; a fraction lets several share one.
        block_rows: rows of a block, which goes to one actor; up to 4,096 are computed at once, sorted by length.
        options: ``text_column``, ``pair_column``, ``errors`` of `Predictor`, and those of
            `fastcls.predicting.options.PredictOptions`.

    Raises:
        ImportError: Ray is not installed.
        TypeError, OSError: something that is no dataset, an option that does not exist, a checkpoint that does not.
        ValueError: an option with another value; more actors than the cluster has CPUs or GPUs for, which Ray would
            wait for without a word.
    """
    ray = import_ray()
    if not isinstance(dataset, ray.data.Dataset):
        raise TypeError(f"dataset must be a ray.data.Dataset, got {type(dataset).__name__}")
    columns = ("text_column", "pair_column", "errors")
    own: dict[str, Any] = {name: options.pop(name) for name in columns if name in options}
    options.setdefault("device", "cuda" if gpus else "cpu")
    asked = PredictOptions.of(options)
    asked.check()
    # Columns of results that do not exist are refused here, before actors are.
    answers_of(model, asked)
    check_errors(own.get("errors", "column"))
    read_count("block_rows", block_rows)
    if not ray.is_initialized():
        ray.init()
    found = shares(machines_of(ray), actors, threads, gpus)
    given = {**own, "threads": threads, **options}
    return dataset.repartition(target_num_rows_per_block=block_rows).map_batches(
        Predictor,
        fn_constructor_args=[sent(model)],
        fn_constructor_kwargs=given,
        batch_format="pyarrow",
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=found.processes),
        num_cpus=found.cpus,
        num_gpus=gpus or None,
    )
