"""Ray: a model over Ray Data's datasets, and files to files over a cluster's workers.

labelled = fastcls.ray.predict(ray.data.read_parquet("reviews/"), "your/bert-classifier")
"""

from __future__ import annotations

from .data import Predictor, predict

__all__ = ["Predictor", "predict"]
