"""The peak memory of a function is that of its largest allocations, not of what is left at the end."""

import operator

import pytest

from convnext_min.experiments.memory import added_memory


def test_the_peak_of_a_known_allocation_counts_though_it_is_freed():
    assert added_memory(operator.mul, b"x", 300_000_000) == pytest.approx(300e6, rel=0.05)
