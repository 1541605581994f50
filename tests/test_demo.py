"""What the demo says of its measurements."""

from __future__ import annotations

import pytest

from fastcls.demo import _saved


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        pytest.param([1.0, 1.01, 0.99], [0.5, 0.51, 0.49], "500", id="clear"),
        pytest.param([1.0, 1.1, 0.9], [0.95, 1.05, 0.85], "within noise", id="within_noise"),
        pytest.param([1.0, 1.1, 0.9], [1.05, 1.15, 0.95], "within noise", id="within_noise_and_slower"),
        pytest.param([1.0], [2.0], "-1000", id="clearly_slower"),
    ],
)
def test_a_difference_within_the_scatter_is_called_none(before: list[float], after: list[float], said: str) -> None:
    assert _saved(before, after) == said
