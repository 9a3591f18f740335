"""Cost classes of links."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_distkv.control.lending.links import Links

places = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8)


@given(places)
def test_without_a_measurement_the_node_counts_then_the_switch(nodes_and_switches):
    nodes, switches = zip(*nodes_and_switches, strict=True)
    links = Links(nodes, switches)
    for one, (node, switch) in enumerate(nodes_and_switches):
        expected = [
            0 if node == other else 1 if switch == behind else 2
            for other, behind in nodes_and_switches
        ]
        assert links.classes(one).tolist() == expected
        assert [links.between(one, other) for other in range(len(nodes))] == expected


def test_without_switches_other_nodes_are_anywhere():
    assert Links([0, 0, 1, 2]).classes(1).tolist() == [0, 0, 2, 2]


LEVELS = np.array([[0, 3e-6, 3e-6, 5e-5], [0, 0, 3e-6, 5e-5], [0, 0, 0, 5e-5], [0, 0, 0, 0]])


def test_classes_are_powers_of_two_above_the_shortest_round_trip():
    """log2(3 / 1.5) = 1, log2(11 / 1.5) = 2.87."""
    seconds = np.outer([1, 1.5, 3, 11], [1, 1, 1, 1])
    links = Links([0] * 4, seconds=np.maximum(seconds, seconds.T))
    assert links.classes(0).tolist() == [0, 0, 1, 3]
    assert links.classes(3).tolist() == [3, 3, 3, 0]


@given(st.lists(st.floats(1.0, 1.4), min_size=16, max_size=16))
def test_delays_of_some_ten_per_cent_do_not_set_equal_links_apart(noise):
    seconds = (LEVELS + LEVELS.T) * np.array(noise).reshape(4, 4)
    links = Links([0] * 4, seconds=seconds)
    assert links.classes(0)[:3].tolist() == [0, 0, 0]
    assert links.classes(0)[3] >= 3


@given(st.lists(st.floats(1e-7, 1.0), min_size=25, max_size=25))
def test_measured_classes_are_symmetric_and_never_reverse_an_order(times):
    seconds = np.array(times).reshape(5, 5)
    links = Links([0] * 5, seconds=seconds)
    classes = np.array([links.classes(i) for i in range(5)])
    assert (classes == classes.T).all()
    assert (classes.diagonal() == 0).all()
    pairs = [(min(seconds[i, j], seconds[j, i]), classes[i, j]) for i in range(5) for j in range(i)]
    ordered = [int(link_class) for _, link_class in sorted(pairs)]
    assert ordered == sorted(ordered)
    assert ordered[0] == 0
    assert links.between(1, 3) == classes[1, 3]


def test_an_instance_alone_is_near_itself():
    assert Links([0], seconds=np.zeros((1, 1))).classes(0).tolist() == [0]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="1 switches for 2 instances"):
        Links([0, 1], [0])
    with pytest.raises(ValueError, match=r"times \[3, 3\] for 2 instances"):
        Links([0, 1], seconds=np.ones((3, 3)))
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="positive and finite"):
            Links([0, 1], seconds=np.full((2, 2), bad))


def test_links_of_a_class_cost_what_the_slowest_of_them_cost():
    seconds = np.array([[0, 1, 5], [1, 0, 3], [5, 3, 0]], dtype=float)
    row_seconds = 100 / np.array([[1, 50, 20], [50, 1, 10], [20, 10, 1]])
    links = Links([0] * 3, seconds=seconds, row_seconds=row_seconds)
    assert [links.between(a, b) for a, b in ((1, 0), (2, 0), (2, 1))] == [0, 2, 2]
    for rows in (0, 1, 7):
        assert links.exchange_seconds(0, rows) == 1 + rows * 2.0
        assert links.exchange_seconds(2, rows) == 5 + rows * 10.0
        assert links.exchange_seconds(1, rows) == 0.0, "there are none"


def test_without_a_measurement_links_cost_what_their_class_does():
    links = Links([0, 0, 1], exchange=[(0.5, 0.25)])
    assert links.exchange_seconds(0, 3) == 0.5 + 3 * 0.25
    assert links.exchange_seconds(2, 3) == 0.0
