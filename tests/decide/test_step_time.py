"""The fitted step time against coefficients that made the data."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_distkv.decide.pace import StepTime

TRUE = (4e-3, 2e-5, 3e-9)


def seconds(rows: int, kv_tokens: int, true: tuple[float, float, float] = TRUE) -> float:
    return true[0] + true[1] * rows + true[2] * kv_tokens


def batch(rng: random.Random) -> tuple[int, int]:
    rows = rng.randint(1, 512)
    return rows, rows * rng.randint(100, 20_000)


def fitted(
    steps: int, noise: float = 0.05, outliers: float = 0.0, times: float = 5.0
) -> tuple[StepTime, random.Random]:
    rng, model = random.Random(7), StepTime()
    for _ in range(steps):
        rows, kv_tokens = batch(rng)
        delay = times if rng.random() < outliers else 1.0
        model.observe(rows, kv_tokens, seconds(rows, kv_tokens) * rng.gauss(1, noise) * delay)
    return model, rng


def coefficients(model: StepTime) -> tuple[float, float, float]:
    return model.fixed, model.per_token, model.per_kv


def test_coefficients_are_recovered_from_noisy_steps():
    model, _ = fitted(1500)
    assert coefficients(model) == pytest.approx(TRUE, rel=0.05)
    assert model.observations == 1500


def test_a_score_of_exact_steps_is_enough():
    model, _ = fitted(20, noise=0.0)
    assert coefficients(model) == pytest.approx(TRUE, rel=0.05)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_units_do_not_matter(unit):
    """One row of a hundred million tokens as well as a thousand short ones."""
    rng, model, true = random.Random(7), StepTime(), (0.02 * unit, 3e-4 * unit, 2e-8 * unit)
    for _ in range(1500):
        rows, kv_tokens = rng.choice([(1, 10**8), (1000, 10**6), (1, 10), (30, 10**7)])
        model.observe(rows, kv_tokens, seconds(rows, kv_tokens, true) * rng.gauss(1, 0.02))
    assert coefficients(model) == pytest.approx(true, rel=0.05)


def test_the_error_is_that_of_predictions_made_beforehand():
    """|1 + noise − 1| / (1 + noise) is 0.8 · noise in the mean for a normal noise."""
    model, _ = fitted(1500, noise=0.1)
    assert model.error == pytest.approx(0.08, rel=0.5)
    assert StepTime().error == 1.0
    exact, _ = fitted(1500, noise=0.0)
    assert exact.error < 1e-3


def test_without_observations_nothing_is_predicted():
    model = StepTime()
    assert (model.predict(3, 100), model.observations) == (0.0, 0)


@given(st.integers(0, 1000), st.integers(0, 10**8), st.floats(1e-5, 1e3), st.integers(1, 300))
def test_a_step_that_never_changes_is_predicted_right(rows, kv_tokens, time, steps):
    model = StepTime()
    for _ in range(steps):
        model.observe(rows, kv_tokens, time)
    assert model.predict(rows, kv_tokens) == pytest.approx(time, rel=1e-6)


def test_what_was_learned_survives_a_long_time_of_equal_steps():
    model, rng = fitted(1500)
    learned = coefficients(model)
    for _ in range(20_000):
        model.observe(8, 80_000, seconds(8, 80_000) * rng.gauss(1, 0.05))
    assert model.predict(8, 80_000) == pytest.approx(seconds(8, 80_000), rel=0.03)
    assert coefficients(model) == pytest.approx(learned, rel=0.3)


def test_one_outlier_hardly_moves_the_fit():
    model, _ = fitted(500)
    before = model.predict(256, 10**6)
    model.observe(256, 10**6, 5 * before)
    assert model.predict(256, 10**6) == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize("times", [0.3, 2.0, 5.0, 50.0])
def test_a_few_per_cent_of_outliers_do_not_bend_the_fit(times):
    model, rng = fitted(1500, noise=0.01, outliers=0.05, times=times)
    for _ in range(50):
        rows, kv_tokens = batch(rng)
        assert model.predict(rows, kv_tokens) == pytest.approx(seconds(rows, kv_tokens), rel=0.04)


def test_a_slow_start_is_forgotten():
    rng, model = random.Random(7), StepTime()
    for step in range(60):
        rows, kv_tokens = batch(rng)
        model.observe(rows, kv_tokens, seconds(rows, kv_tokens) * (100 if step < 2 else 1))
    rows, kv_tokens = batch(rng)
    assert model.predict(rows, kv_tokens) == pytest.approx(seconds(rows, kv_tokens), rel=0.05)


def test_a_lasting_change_is_learned():
    model, rng = fitted(1000)
    for _ in range(1000):
        rows, kv_tokens = batch(rng)
        model.observe(rows, kv_tokens, 2 * seconds(rows, kv_tokens))
    assert model.predict(256, 10**6) == pytest.approx(2 * seconds(256, 10**6), rel=0.05)


observed = st.tuples(st.integers(0, 1000), st.integers(0, 10**8), st.floats(1e-6, 1e4))


@given(st.lists(observed, max_size=40), st.integers(0, 1000), st.integers(0, 10**8))
def test_nothing_is_ever_negative_or_infinite(steps, rows, kv_tokens):
    model = StepTime()
    for step in steps:
        model.observe(*step)
        assert all(0 <= c < math.inf for c in coefficients(model))
        assert 0 <= model.predict(rows, kv_tokens) < math.inf
        assert 0 <= model.error <= 1


@pytest.mark.parametrize("step", [(1, 1, 0.0), (1, 1, -1.0), (1, 1, math.nan), (-1, 1, 1.0)])
def test_impossible_steps_are_refused(step):
    with pytest.raises(ValueError, match="a step of"):
        StepTime().observe(*step)
