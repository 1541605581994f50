"""The measure of exactness itself: a bound that is not what it says lets errors through, or refuses what is right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import eager_runs
from torch import Tensor


@pytest.mark.parametrize(
    "product", [F.linear, lambda x, weight, bias: x @ weight.T + bias], ids=["linear", "product of matrices"]
)
def test_eager_runs_add_up_in_orders_of_their_own(product: Callable[..., Tensor]) -> None:
    x, weight, bias = torch.randn(40, 64), torch.randn(30, 64), torch.randn(30)
    forwards = sum((x[:, term, None] * weight[:, term] for term in range(64)), torch.zeros(40, 30)) + bias
    runs = eager_runs(product, x, weight, bias)
    assert torch.equal(runs[1], forwards)
    # The machine's own may be the same as one of the others.
    assert len({tuple(run.flatten().tolist()) for run in runs[1:]}) == 4
