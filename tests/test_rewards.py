"""What a self-edit earns, and how far that can be trusted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_jax.config.load import default_config
from seal_jax.config.setup import settings_of
from seal_jax.outer.examination import Evaluated, reward
from seal_jax.outer.reliability import reliability, seed_rounds
from seal_jax.outer.rewards import EARLIER, OWN, REWARDS, Evidence, Outcome, copying, reward_of
from seal_jax.outer.step_log import trust
from seal_jax.tasks.task import Rejected, SelfEdit

NAN = float("nan")


def outcome(accuracy=0.5, loss=1.0, **others):
    return Outcome(accuracy, -2.0 * accuracy, 2.0, loss, ("?",), 10, others=others)


def evidence(*outcomes, **fields):
    return Evidence(outcomes, "a b c d e", "x a b c d y", length=0.25, baseline=0.2, **fields)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"accuracy": 1.0}, 0.75),
        ({"gain": 1.0}, 0.55),
        ({"log_likelihood": 1.0}, -1.5),
        ({"self_questions": 1.0}, 0.3),
        ({"regression": -1.0}, -0.3),
        ({"judge": 2.0}, 1.6),
        ({"length": -1.0}, -0.25),
        ({"copying": -1.0}, -0.5),  # one of its two runs of four words
        ({"accuracy": 1.0, "length": -2.0}, 0.25),
    ],
)
def test_a_reward_is_a_weighted_mean_over_seeds(weights, expected):
    seeds = (
        outcome(1.0, **{OWN: 0.4, EARLIER: 0.1}),
        outcome(0.5, **{OWN: 0.2, EARLIER: 0.3}),
    )
    found = evidence(*seeds, judged=0.8, earlier_baseline=0.5)
    assert reward_of(found, weights, -9.0) == pytest.approx(expected)


def test_every_reward_is_tried_above():
    tried = test_a_reward_is_a_weighted_mean_over_seeds.pytestmark[0].args[1]
    assert {name for weights, _ in tried for name in weights} == set(REWARDS)


def test_what_no_grader_could_tell_is_missing_and_not_zero():
    assert np.isnan(reward_of(evidence(outcome()), {"judge": 1.0}, -9.0))
    assert np.isnan(reward_of(evidence(outcome()), {"self_questions": 1.0}, -9.0))
    assert np.isnan(reward_of(evidence(outcome()), {"accuracy": 1.0, "judge": 0.1}, -9.0))
    # Before there are earlier problems nothing can be lost.
    assert reward_of(evidence(outcome()), {"accuracy": 1.0, "regression": -1.0}, -9.0) == 0.5


def test_rejected_and_overflowing_self_edits_earn_what_is_configured():
    assert reward_of(evidence(), {"judge": 1.0}, -9.0) == -9.0
    assert reward_of(evidence(outcome(1.0), outcome(1.0, NAN)), {"accuracy": 1.0}, -9.0) == -9.0


def test_a_rejected_self_edit_never_earns_more_than_one_that_was_applied():
    section = settings_of(default_config()).reward._replace(weights={"log_likelihood": 1.0})
    applied, rejected = SelfEdit("p", "", "t", ("t",)), Rejected("p", "", "t", "empty")
    edits = [[applied, rejected, applied, applied], [rejected] * 4]
    found = [
        [evidence(outcome(0.5)), evidence(), evidence(outcome(1.0)), evidence(outcome(0.0, NAN))],
        [evidence()] * 4,
    ]
    rewards = reward(edits, Evaluated(found, {}, [0.0, 0.0]), section)
    assert rewards.values[0].tolist() == [-1.0, -2.0, -2.0, -2.0]  # reward.rejected is 0
    assert rewards.values[1].tolist() == [0.0] * 4
    assert rewards.keepable[0].tolist() == [True, False, True, False]
    lower = reward(edits, Evaluated(found, {}, [0.0, 0.0]), section._replace(rejected=-9.0))
    assert lower.values[0].tolist() == [-1.0, -9.0, -2.0, -9.0]


@given(st.text(), st.text())
def test_copying_is_a_share(text, passage):
    assert 0 <= copying(text, passage) <= 1


def test_copying_counts_runs_of_words():
    passage = "The mill at Orrin was built by Mara Teld."
    assert copying(passage, passage) == copying("  the MILL at-Orrin was!", passage) == 1
    assert copying("Mara Teld built the mill at Orrin.", passage) == 0.25  # 'the mill at orrin'
    assert copying("three words only", passage) == copying("", passage) == 0


def test_beside_another_reward_it_is_said_how_far_accuracy_alone_could_be_trusted():
    """The same inner runs: two problems, two self-edits, two seeds."""
    rng = np.random.default_rng(0)
    accuracy, dense = rng.integers(4, size=(2, 2, 2)) / 3, rng.normal(size=(2, 2, 2))

    def run(p, r, e):
        return outcome(float(accuracy[p, r, e]))._replace(log_likelihood=float(dense[p, r, e]))

    pairs = [[evidence(run(p, r, 0), run(p, r, 1)) for r in (0, 1)] for p in (0, 1)]
    evaluated = Evaluated(pairs, {}, [0.2, 0.2])
    settings = default_settings(weights={"log_likelihood": 1.0})
    found = trust(evaluated, settings)
    for prefix, rewards in (("reliability", dense), ("reliability/accuracy", accuracy)):
        for name, value in reliability(rewards).items():
            assert found.pop(f"{prefix}/{name}") == pytest.approx(value)
    assert found == {}
    alone = trust(evaluated, default_settings(weights={"accuracy": 1.0}))
    assert alone and not any("accuracy" in name for name in alone)


def default_settings(**keys):
    return settings_of(default_config()).reward._replace(**keys)


def simulate(rng, between, within, num_seeds, problems=400, edits=5):
    """Return rewards [P R E] with known variances; problems differ, which must not matter."""
    worth = 3 * rng.normal(size=(problems, 1, 1)) + between**0.5 * rng.normal(
        size=(problems, edits, 1)
    )
    return worth + within**0.5 * rng.normal(size=(problems, edits, num_seeds))


@pytest.mark.parametrize(("between", "within"), [(1.0, 1.0), (0.25, 1.0), (1.0, 0.1), (0.0, 1.0)])
def test_known_variances_are_found_again(between, within):
    found = reliability(simulate(np.random.default_rng(0), between, within, 3, problems=1500))
    assert found["variance_within"] == pytest.approx(within, rel=0.06)
    assert found["variance_between"] == pytest.approx(between, rel=0.12, abs=0.05)
    assert found["reliability_of_one"] == pytest.approx(between / (between + within), abs=0.04)
    mean = between / (between + within / 3)
    assert found["reliability_of_mean"] == pytest.approx(mean, abs=0.04)
    # The best of five normal draws is 1.163 deviations above the mean.
    apparent = 1.163 * (between + within / 3) ** 0.5
    assert found["gain_apparent"] == pytest.approx(apparent, rel=0.07)
    validated = 1.163 * between / (between + within / 2) ** 0.5  # chosen by two of three seeds
    assert found["gain_cross_validated"] == pytest.approx(validated, abs=0.07)


def test_the_papers_reward_looks_like_more_than_it_is():
    """3 seeds of a reward with reliability .22 to .45 (of one seed about .1 to .2): best of five
    looks several times what it is worth."""
    found = reliability(simulate(np.random.default_rng(1), 0.15, 0.85, 3))
    assert 0.22 < found["reliability_of_mean"] < 0.45
    assert found["gain_apparent"] > 2 * found["gain_cross_validated"] > 0


def test_unequal_and_missing_seeds():
    rng = np.random.default_rng(0)
    full = simulate(rng, 1.0, 1.0, 4, problems=600)
    ragged = [
        [seeds[: rng.integers(0, 5)].tolist() + [NAN] for seeds in problem] for problem in full
    ]
    found = reliability(ragged)
    assert found["variance_within"] == pytest.approx(1.0, rel=0.1)
    assert found["variance_between"] == pytest.approx(1.0, rel=0.15)


def test_variances_of_few_seeds_are_unbiased():
    found = reliability([[[0, 2], [4, 6]]])  # by hand: 4 / 2 within; (16 - 2) / 2 between
    assert (found["variance_within"], found["variance_between"]) == (2, 7)


def test_what_cannot_be_told_is_left_out():
    assert reliability([]) == {}
    assert reliability([[[], []]]) == {}
    assert reliability([[[0.3, 0.4]]]) == {}  # one self-edit: nothing to choose from
    assert reliability([[[0.3], [0.5]]]) == {"gain_apparent": pytest.approx(0.1)}
    found = reliability([[[0.5, 0.5], [0.5, 0.5]]])  # all the same
    assert found["variance_within"] == found["variance_between"] == 0
    assert "reliability_of_one" not in found and found["gain_cross_validated"] == 0


@given(num_edits=st.integers(1, 40), num_seeds=st.integers(1, 20))
def test_successive_halving_never_costs_more(num_edits, num_seeds):
    rounds = seed_rounds(num_edits, num_seeds)
    counts, seeds = zip(*rounds, strict=True)
    assert counts[0] == num_edits and seeds[0] >= 1  # everyone is tried
    assert list(counts) == sorted(counts, reverse=True) and list(seeds) == sorted(set(seeds))
    spent = sum(c * (s - t) for c, s, t in zip(counts, seeds, (0, *seeds), strict=False))
    assert spent <= num_edits * num_seeds
    assert spent >= 0.7 * num_edits * num_seeds  # and little is left over


def test_successive_halving_of_the_papers_setting():
    assert seed_rounds(5, 3) == [(5, 1), (3, 2), (2, 5)]
    assert seed_rounds(5, 1) == [(5, 1)]
