"""`experiments/membership.py` runs on a small scale, and its attacks are what they are called."""

import importlib.util
import math
import sys

import numpy as np
import pytest
from scipy import special

from tests.pins import ROOT
from tests.test_experiments import _smoke


@pytest.fixture(scope="module")
def membership():
    folder = ROOT / "experiments"
    sys.path.insert(0, str(folder))  # it imports its neighbours
    spec = importlib.util.spec_from_file_location("membership", folder / "membership.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["membership"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(folder))


def test_membership_smoke_attacks_with_and_without_privacy(tmp_path):
    line = _smoke("membership", tmp_path)
    rows = {(row["epsilon"], row["attack"]): row for row in line["metrics"]}
    assert set(rows) == {(e, a) for e in line["config"]["epsilons"] for a in ("loss", "lira")}
    for (epsilon, _), row in rows.items():
        assert 0 <= row["true_positive_rate"] <= 1 and 0 <= row["auc"] <= 1
        if epsilon is None:
            assert row["bound"] is None and row["noise_multiplier"] is None
        else:
            assert 0.01 < row["bound"] < 0.4
            assert row["true_positive_rate"] <= row["bound"] + 4 * row["standard_error"]
    # Overfit models give their records away; private ones of the same batches do not.
    assert rows[None, "lira"]["auc"] > rows[8.0, "lira"]["auc"] + 0.05
    assert rows[None, "lira"]["true_positive_rate"] > 0.02


def test_area_and_true_positives_are_those_of_known_laws(membership):
    assert membership.area(np.array([1.0, 2.0]), np.array([1.0, 0.0])) == (0.5 + 3) / 4
    scores = np.array([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]] * 2)
    member = np.array([[True, False, True, False, False, False]] * 2)
    # 8 others: a quarter of them, both fours, may lie above the threshold.
    assert membership.true_positives(scores, member, 0.25) == (1.0, 0.0)
    assert membership.true_positives(scores, member, 0.1) == (0.5, 0.0)
    membership.check(membership.SMOKE)


def _models(membership, gap: float, seed: int = 0):
    """Log-odds of many models: each record has a difficulty, and members gain `gap`."""
    source = np.random.default_rng(seed)
    member = source.random((64, 2000)) < 0.5
    odds = 10.0 * source.normal(size=2000) + source.normal(size=member.shape) + gap * member
    return membership.Models(member, odds, 1.0, 1.0)


def test_lira_finds_what_the_best_test_finds_and_the_loss_does_not(membership):
    gap = 3.0
    models = _models(membership, gap)
    found, error = membership.true_positives(membership.lira_scores(models), models.is_member, 0.01)
    # The best test knows both means: TPR Φ(Φ⁻¹(.01) + gap); 31 shadows of each kind lose a little.
    best = special.ndtr(special.ndtri(0.01) + gap)
    assert 0.93 * best < found < best + 5 * error
    by_loss, _ = membership.true_positives(membership.loss_scores(models), models.is_member, 0.01)
    assert by_loss < 0.05


def test_lira_finds_nothing_where_there_is_nothing(membership):
    # Its own score in its shadows' means would show here, and pass for an attack.
    models = _models(membership, 0.0)
    scores = membership.lira_scores(models)
    found, error = membership.true_positives(scores, models.is_member, 0.01)
    assert abs(found - 0.01) < 5 * error
    assert math.isclose(
        membership.area(scores[models.is_member], scores[~models.is_member]), 0.5, abs_tol=0.01
    )


def test_membership_writes_no_line_where_the_bound_is_broken_or_the_control_is_weak(membership):
    settings, data = membership.SMOKE, membership.load(membership.SMOKE)
    weak = _models(membership, 0.0)
    strong = _models(membership, 6.0)

    def run(models, epsilon):
        return membership.rows_of(settings, models, epsilon, None if epsilon is None else (1, 0.2))

    assert data.rows.shape == (settings.records, 64)
    with pytest.raises(RuntimeError, match="find nothing"):
        run(weak, None)
    with pytest.raises(RuntimeError, match=r"bound 0\.2"):
        run(strong, 8.0)
    assert [row["bound"] for row in run(weak, 8.0)] == [0.2, 0.2]
    assert run(strong, None)[1]["true_positive_rate"] > 0.99
