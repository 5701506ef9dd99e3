"""Paired differences against a plain loop, and the smallest one that can be shown."""

import itertools
import json

import numpy as np
import pytest
from test_comparison import percentile
from test_tune import made_up

from seal_jax.outer import differences
from seal_jax.outer.sweep_report import summarize
from seal_jax.planning import pilot
from seal_jax.types import EvalSettings


@pytest.fixture
def scores():
    """Return scores of eight problems; the arm 'gpt-4.1' has a text on six."""
    rng = np.random.default_rng(3)
    arms = ("base", "passage", "own", "seal", "grpo", "random", "gpt-4.1")
    accuracy = {arm: rng.integers(4, size=8) / 3 for arm in arms}
    accuracy["gpt-4.1"][[1, 4]] = np.nan
    return {"accuracy": accuracy, "log_likelihood": {arm: rng.normal(size=8) for arm in arms}}


def slow_difference(one, other, num_samples, seed):
    """Return mean, interval and number of problems, value by value."""
    pairs = zip(one.tolist(), other.tolist(), strict=True)
    values = [a - b for a, b in pairs if a == a and b == b]
    rng = np.random.default_rng([seed, num_samples])
    means = []
    for draw in rng.integers(len(values), size=(num_samples, len(values))):
        means.append(sum(values[i] for i in draw) / len(values))
    interval = [percentile(means, 2.5), percentile(means, 97.5)]
    return sum(values) / len(values), interval, len(values)


def test_the_pairs_are_those_of_a_slow_loop(scores):
    pairs = differences.pairs_of(list(scores["accuracy"]), ["gpt-4.1"])
    assert pairs == [
        *(("seal", arm) for arm in ("own", "random", "passage", "base", "grpo", "gpt-4.1")),
        *(("own", arm) for arm in ("passage", "gpt-4.1")),
    ]
    found = differences.compare_pairs(scores, pairs, 200, seed=1)
    assert len(found) == 2 * len(pairs)
    for one in found:
        values = scores[one["score"]]
        mean, interval, count = slow_difference(values[one["arm"]], values[one["minus"]], 200, 1)
        assert one["difference"] == pytest.approx(mean)
        assert one["num_problems"] == count
        np.testing.assert_allclose(one["interval"], interval, atol=1e-12)
    counts = {(one["minus"], one["score"]): one["num_problems"] for one in found}
    assert counts["gpt-4.1", "accuracy"] == 6 and counts["gpt-4.1", "log_likelihood"] == 8


def test_arms_that_share_no_problem_have_no_difference():
    one, other = np.array([1.0, np.nan]), np.array([np.nan, 1.0])
    scores = {"accuracy": {"seal": one, "gpt": other}}
    assert differences.compare_pairs(scores, [("seal", "gpt")], 50, 0) == []


def test_a_pair_is_read_where_names_have_hyphens():
    arms = ["seal", "own", "gpt-4.1", "gpt"]
    assert differences.read_pair("seal-gpt-4.1", arms) == ("seal", "gpt-4.1")
    assert differences.read_pair("gpt-4.1-seal", arms) == ("gpt-4.1", "seal")
    assert differences.read_pair("seal-random", arms) is None
    assert differences.read_pair("seal-seal", arms) is None
    assert differences.read_pair("seal", arms) is None
    arms += ["4.1-seal", "gpt-4.1-seal"]  # gpt and 4.1-seal, or gpt-4.1 and seal
    assert differences.read_pair("gpt-4.1-seal", arms) is None


def test_the_smallest_difference_is_shown_in_80_percent_of_cases():
    """Experiments with that true difference: in how many is its z test significant?"""
    rng, spread, count = np.random.default_rng(0), 0.3, 50
    least = differences.smallest_shown(spread, count)
    assert least == pytest.approx(2.8016 * spread / np.sqrt(count), rel=1e-4)
    shown = 0
    for _ in range(4000):
        mean = rng.normal(least, spread, size=count).mean()
        shown += abs(mean) / (spread / np.sqrt(count)) > 1.959964
    assert shown / 4000 == pytest.approx(0.8, abs=0.025)


def test_without_a_spread_nothing_is_said_to_be_shown():
    assert differences.spread_of(np.array([0.5])) is None
    assert differences.spread_of(np.array([0.5, 0.5, np.nan])) is None
    assert differences.spread_of(np.array([0.0, 1.0, np.nan])) == pytest.approx(np.sqrt(0.5))


def held(**keys):
    return EvalSettings(8, 1, 1, 0, True, 100)._replace(**keys)


def write_pilot(folder, scores):
    """Write what `compare` would: a value that is not there is left out."""
    arms = list(scores["accuracy"])
    content = {
        f"{score}_by_problem": {
            str(p): {arm: found[arm][p] for arm in arms if np.isfinite(found[arm][p])}
            for p in range(8)
        }
        for score, found in scores.items()
    }
    (folder / "summary.json").write_text(json.dumps(content))


def test_a_pilot_says_what_a_run_can_show(tmp_path, scores):
    write_pilot(tmp_path, scores)
    spread = {
        score: np.std(found["seal"] - found["own"], ddof=1) for score, found in scores.items()
    }
    settings = held(pilot=str(tmp_path), primary=("seal-own", "own-seal"))
    first, line = pilot.describe_power(settings, 200, "passages")
    assert first == "primary comparisons: seal-own, own-seal, by accuracy"
    points = 100 * 2.8016 * spread["accuracy"] / np.sqrt(200)
    nats = 2.8016 * spread["log_likelihood"] / np.sqrt(200)
    assert f"seal-own {points:.1f} points, own-seal {points:.1f} points" in line
    assert f"seal-own {nats:.3f} nats per token" in line
    (line,) = pilot.describe_power(held(pilot=str(tmp_path / "summary.json")), 200, "passages")
    assert "seal-random" in line


def test_a_sweep_is_a_pilot(tmp_path):
    """By its base model and the settings that went through to its end without diverging."""
    summary = summarize(*made_up())
    ended = [summary["base"], *summary["settings"][1:]]
    assert [len(row["outcomes"]) for row in summary["settings"]] == [2, 4, 4]
    values = [np.array([one["log_likelihood"] for one in row["outcomes"]]) for row in ended]
    spreads = [np.std(a - b, ddof=1) for a, b in itertools.combinations(values, 2)]
    spreads = [spread for spread in spreads if spread > 1e-9]  # two settings differ by a constant
    (tmp_path / "tune.json").write_text(json.dumps(summary))
    (line,) = pilot.describe_power(held(pilot=str(tmp_path)), 100, "passages")
    said = f"{0.28016 * np.median(spreads):.3f} nats per token (its 2 pairs of arms"
    assert len(spreads) == 2 and said in line
    assert "points" not in line and "settings of a sweep share self-edits" in line


def test_without_a_pilot_the_start_says_so():
    (line,) = pilot.describe_power(held(), 200, "passages")
    assert "not known without an earlier run" in line and "at worst 19.8 points" in line
    assert "at worst none" in pilot.describe_power(held(), 6, "passages")[0]


@pytest.mark.parametrize(
    "content, why",
    [
        (None, "no such file"),
        ("{}", "has no scores of single problems"),
        ('{"accuracy_by_problem": {"a": {"seal": "high"}}}', "has no scores"),
        ('{"settings": [1, {"outcomes": [2, {"accuracy": 1.0}]}], "base": 3}', "no two arms"),
        ('{"settings": 4}', "has no scores"),
        ('{"accuracy_by_problem": {"a": {"seal": 1.0, "own": 0.5}}}', "no two arms"),
        ("[1]", "expected a JSON object"),
    ],
)
def test_a_pilot_that_says_nothing_is_refused(tmp_path, content, why):
    path = tmp_path / "pilot.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=why) as found:
        pilot.describe_power(held(pilot=str(path)), 10, "passages")
    assert "pilot" in str(found.value)
    if content is None:
        with pytest.raises(ValueError, match=r"has no summary.json or tune.json"):
            pilot.read_pilot(str(tmp_path))
