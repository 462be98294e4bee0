"""The statistics of arms, by hand."""

from __future__ import annotations

import pytest

from rmoe.reporting.statistics import paired


def test_a_paired_interval_by_hand() -> None:
    mean, interval = paired([1.0, 2.0, 3.0])
    assert mean == 2.0
    # Student's t of 2 degrees of freedom is 4.3027; the standard error 1 / √3.
    assert interval == pytest.approx([2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5], abs=1e-3)
    assert paired([0.5]) == (0.5, None)
