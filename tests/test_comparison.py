"""The final table: means, paired bootstrap intervals, and what counts as 0."""

from types import SimpleNamespace

import numpy as np
import pytest

from seal_jax.outer import comparison as compare
from seal_jax.outer import differences
from seal_jax.outer.examples import ArmRuns
from seal_jax.outer.rewards import Outcome
from seal_jax.outer.summary_text import describe_reliability, mean_reliability, to_markdown
from seal_jax.tasks.task import Exam, Problem, Question, Rejected, SelfEdit


def percentile(values, percent):
    """Interpolate between the two nearest of the sorted values."""
    values = sorted(values)
    at = percent / 100 * (len(values) - 1)
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (at - low) * (values[high] - values[low])


def slow_bootstrap(accuracy, num_samples, seed):
    """Return {arm: (mean interval, interval of the difference to 'own')}, draw by draw."""
    num_problems = len(accuracy["own"])
    rng = np.random.default_rng([seed, num_samples])
    means = {arm: [] for arm in accuracy}
    for draw in rng.integers(num_problems, size=(num_samples, num_problems)):
        for arm, values in accuracy.items():
            means[arm].append(sum(values[problem] for problem in draw) / num_problems)
    intervals = {}
    for arm, values in means.items():
        minus = [value - own for value, own in zip(values, means["own"], strict=True)]
        intervals[arm] = tuple(
            [percentile(numbers, 2.5), percentile(numbers, 97.5)] for numbers in (values, minus)
        )
    return intervals


def bootstrap(accuracy, num_samples, seed):
    return differences.bootstrap({"accuracy": accuracy}, num_samples, seed)


@pytest.fixture
def accuracy():
    rng = np.random.default_rng(5)
    return {arm: rng.integers(4, size=9) / 3 for arm in ("base", "passage", "own", "seal")}


def test_bootstrap_is_the_slow_loop(accuracy):
    arms = bootstrap(accuracy, 300, seed=2)
    expected = slow_bootstrap(accuracy, 300, seed=2)
    assert arms.keys() == accuracy.keys()
    for arm, row in arms.items():
        assert row["accuracy"] == pytest.approx(np.mean(accuracy[arm]))
        np.testing.assert_allclose(row["interval"], expected[arm][0], rtol=0, atol=1e-12)
        if arm == "own":
            assert row.keys() == {"accuracy", "interval"}
            continue
        difference = np.mean(accuracy[arm]) - np.mean(accuracy["own"])
        assert row["minus_own"] == pytest.approx(difference)
        np.testing.assert_allclose(row["minus_own_interval"], expected[arm][1], rtol=0, atol=1e-12)


def test_the_same_seed_draws_the_same_problems(accuracy):
    first, again, other = (bootstrap(accuracy, 200, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_constant_arms_have_intervals_of_no_width():
    arms = bootstrap({"own": np.full(5, 0.25), "seal": np.full(5, 0.75)}, 50, seed=0)
    assert arms["own"]["interval"] == [0.25, 0.25]
    assert arms["seal"]["interval"] == [0.75, 0.75]
    assert arms["seal"]["minus_own_interval"] == [0.5, 0.5]


def test_the_difference_is_paired(accuracy):
    own = accuracy["own"]
    arms = bootstrap({"own": own, "seal": own.copy(), "random": own + 0.125}, 100, seed=0)
    assert arms["own"]["interval"][0] < arms["own"]["interval"][1]
    assert (arms["seal"]["minus_own"], arms["seal"]["minus_own_interval"]) == (0, [0, 0])
    np.testing.assert_allclose(arms["random"]["minus_own_interval"], [0.125, 0.125], rtol=1e-12)
    np.testing.assert_allclose(arms["seal"]["minus_random_interval"], [-0.125] * 2, rtol=1e-12)
    assert "what selection is worth): -12.5 [-12.5, -12.5]" in to_markdown(summary_of(5, arms))


def summary_of(num_problems, arms):
    return {
        "num_problems": num_problems,
        "num_questions": 3 * num_problems,
        "num_edits": 1,
        "num_seeds": 2,
        "rejected_self_edits": {"own": 4, "seal": 0},
        "arms": arms,
    }


def test_the_table_has_a_row_for_each_arm_and_says_how_wide_it_is():
    arms = {
        "base": {
            "accuracy": 0.125,
            "interval": [0.0, 0.25],
            "minus_own": -0.375,
            "minus_own_interval": [-0.5, 0.0],
        },
        "own": {"accuracy": 0.5, "interval": [0.25, 0.75]},
    }
    few, many = (to_markdown(summary_of(n, arms)) for n in (10, 200))
    lines = few.splitlines()
    assert lines[2] == "| base model | 12.5 [0.0, 25.0] | -37.5 [-50.0, +0.0] |"
    assert lines[3] == "| passage + own self-edit | 50.0 [25.0, 75.0] |  |"
    assert "10 held-out passages, 30 questions asked without the passage" in few
    assert "'own': 4" in few
    assert "With 10 passages the intervals are wide" in few
    assert "wide" not in many


def test_the_summary_says_what_accuracy_alone_would_have_had():
    rows = [
        {
            "reliability/reliability_of_mean": 0.8,
            "reliability/reliability_of_one": 0.6,
            "reliability/accuracy/reliability_of_mean": 0.3,
            "reliability/accuracy/reliability_of_one": 0.1,
        }
    ]
    (line,) = describe_reliability(mean_reliability(rows))
    assert "reliability 0.80; 0.60 of one seed; accuracy alone" in line
    assert "would have had reliability 0.30, 0.10 of one seed" in line
    silent = {name: value for name, value in rows[0].items() if "accuracy" not in name}
    silent["reliability/accuracy/variance_within"] = 0.0
    assert "did not vary at all" in describe_reliability(mean_reliability([silent]))[0]


def test_the_summary_says_how_far_rewards_could_be_trusted():
    rows = [
        {"reliability/reliability_of_mean": 0.2, "reliability/reliability_of_one": 0.1},
        {"reliability/reliability_of_mean": 0.4, "reliability/reliability_of_one": 0.2, "other": 9},
        {"reliability/gain_apparent": 0.14, "reliability/gain_cross_validated": 0.036},
        {"reliability/reliability_of_mean": None},  # it was not finite
    ]
    report = mean_reliability(rows)
    assert report["reliability_of_mean"] == pytest.approx(0.3)
    (line,) = describe_reliability(report)
    assert "reliability 0.30; 0.15 of one seed" in line
    assert "looks +0.140 better than the mean and is +0.036, cross-validated" in line
    assert describe_reliability({}) == []


def outcome(accuracy, loss=1.0, log_likelihood=None, answers=()):
    return Outcome(accuracy, log_likelihood, 2.0, loss, answers, 1)


PROBLEMS = [(Problem(name, name, name), Exam(name, (Question("?", "!"),))) for name in ("a", "b")]
EDIT, REJECTED = SelfEdit("", "", "x", ("x",)), Rejected("", "", "", "empty")
BASE = ArmRuns(
    [[EDIT], [EDIT]],
    {
        ("a", 0, 0): outcome(0.0, float("nan"), -4.0),
        ("b", 0, 0): outcome(0.5, float("nan"), -3.0),
    },
)


def test_what_was_rejected_or_overflowed_counts_as_0_or_as_the_base_model():
    """Two problems, two self-edits each, two seeds."""
    nan = float("nan")
    outcomes = {
        ("a", 0, 0): outcome(1.0, log_likelihood=-1.0),
        ("a", 0, 1): outcome(0.5, log_likelihood=-2.0),
        ("b", 0, 0): outcome(1.0, log_likelihood=-0.5),
        ("b", 0, 1): outcome(1.0, loss=nan, log_likelihood=0.0),
        ("b", 1, 0): outcome(0.0, log_likelihood=-2.0),
        ("b", 1, 1): outcome(1.0, log_likelihood=nan),
    }
    arms = {"base": BASE, "seal": ArmRuns([[EDIT, REJECTED], [EDIT, EDIT]], outcomes)}
    scores = compare.scores_of(PROBLEMS, arms)
    np.testing.assert_allclose(scores["accuracy"]["seal"], [(0.75 + 0) / 2, (0.5 + 0.5) / 2])
    np.testing.assert_allclose(scores["accuracy"]["base"], [0, 0.5])
    dense = [((-1 - 2) / 2 + -4) / 2, ((-0.5 - 3) / 2 + (-2 - 3) / 2) / 2]
    np.testing.assert_allclose(scores["log_likelihood"]["seal"], dense)
    np.testing.assert_allclose(scores["log_likelihood"]["base"], [-4, -3])
    held = SimpleNamespace(num_edits=2, num_seeds=2, num_bootstrap=9, primary=(), primary_score="")
    stages = SimpleNamespace(settings=SimpleNamespace(eval=held, seed=0))
    arms["own"] = ArmRuns([[EDIT], [EDIT]], BASE.outcomes | {("b", 0, 0): outcomes["b", 0, 0]})
    summary = compare.summarize(stages, PROBLEMS, arms, {})
    assert summary["not_finite"] == {"own": 1, "seal": 2}
    assert summary["rejected_self_edits"] == {"seal": 1, "own": 0}


def test_what_was_not_measured_has_no_score():
    """An older ledger has no log-likelihoods, and an external arm may have no text."""
    outcomes = {("a", 0, 0): outcome(1.0)}
    scores = compare.scores_of(PROBLEMS, {"base": BASE, "gpt": ArmRuns([[EDIT], []], outcomes)})
    np.testing.assert_array_equal(scores["accuracy"]["gpt"], [1.0, np.nan])
    np.testing.assert_array_equal(scores["log_likelihood"]["gpt"], [np.nan, np.nan])
    for value in (None, -np.inf):  # an infinite one becomes nan in the ledger
        old = {name: one._replace(log_likelihood=value) for name, one in BASE.outcomes.items()}
        arms = {"base": BASE._replace(outcomes=old)}
        assert "log_likelihood" not in compare.scores_of(PROBLEMS, arms)


def test_an_arm_examines_every_self_edit_that_was_not_rejected():
    found = []

    def evaluate(stages, params, examination):
        assert (params, examination.ledger) == ("params", "folder/eval_seal.jsonl")
        assert examination.golds and examination.label == "held-out, SEAL"
        found.extend(run.name for run in examination.runs_to_make({}))
        return {}

    settings = SimpleNamespace(
        eval=SimpleNamespace(num_seeds=2), inner=SimpleNamespace(quantize="none")
    )
    stages = SimpleNamespace(settings=settings, task=None)
    edits, arm = [[EDIT, REJECTED], [EDIT, EDIT]], ("seal", "held-out, SEAL")
    compare.run_arm(stages, evaluate, PROBLEMS, "folder", arm, "params", edits)
    assert found == [("a", 0, 0), ("a", 0, 1), *(("b", r, e) for r in (0, 1) for e in (0, 1))]


def test_an_arm_without_a_text_on_some_problems_is_compared_on_the_others():
    own, other = np.array([0.0, 0.5, 1.0, 1.0]), np.array([1.0, np.nan, 1.0, np.nan])
    arms = bootstrap({"own": own, "gpt": other}, 100, seed=0)
    assert arms["gpt"]["accuracy"] == 1 and arms["gpt"]["accuracy_problems"] == 2
    assert arms["gpt"]["minus_own"] == 0.5 and arms["gpt"]["minus_own_problems"] == 2
    assert "accuracy_problems" not in arms["own"]


@pytest.mark.parametrize(
    "name, edits, why",
    [
        ("own", [["edit"]], "another arm"),
        ("gpt", [[], []], "none for any"),
    ],
)
def test_external_texts_that_cannot_be_an_arm_are_refused(name, edits, why):
    with pytest.raises(ValueError, match=f"'{name}'.*{why}"):
        compare.refuse_external({name: edits}, {"base": {}})


def table_of(scores, primary=(), score="accuracy"):
    """Return the Markdown of a run whose arms have these scores, as `compare` writes it."""
    held = SimpleNamespace(
        num_edits=1, num_seeds=1, num_bootstrap=200, primary=primary, primary_score=score
    )
    stages = SimpleNamespace(settings=SimpleNamespace(eval=held, seed=0))
    names = [f"p{i}" for i in range(len(scores["base"]))]
    problems = [(Problem(n, n, n), Exam(n, (Question("?", "!"),))) for n in names]
    arms = {}
    for arm, values in scores.items():
        edits = [[] if value is None else [EDIT] for value in values]
        outcomes = {
            (name, 0, 0): outcome(value, log_likelihood=value - 5)
            for name, value in zip(names, values, strict=True)
            if value is not None
        }
        arms[arm] = ArmRuns(edits, outcomes)
    summary = compare.summarize(stages, problems, arms, {"gpt-4.1"} & arms.keys())
    return to_markdown({**summary, "titles": {"gpt-4.1": "passage + self-edit of gpt-4.1"}})


SCORES = {
    "base": [0.0, 0.1, 0.0, 0.2],
    "passage": [0.3, 0.2, 0.3, 0.4],
    "own": [0.3, 0.4, 0.3, 0.4],
    "seal": [0.5, 0.6, 0.7, 0.6],
    "random": [0.6, 0.4, 0.7, 0.5],
    "gpt-4.1": [0.5, None, 0.9, 0.2],
}


def test_what_was_stated_before_the_run_comes_first_and_in_bold():
    text = table_of(SCORES, ("seal-own", "seal-random", "seal-grpo"), "log_likelihood")
    lines = text.splitlines()
    assert lines[0] == "**Primary comparisons, stated before the run:**"
    assert lines[2].startswith("- **SEAL policy minus own self-edit, log-likelihood of the gold")
    assert lines[2].endswith("nats per token, 4 passages; the interval is above 0.**")
    assert "so no difference is shown; one of 0." in lines[3] and lines[3].endswith(" been.**")
    assert lines[4] == "- **seal-grpo: not in this table.**"
    assert "stated before" not in table_of(SCORES)


def test_every_difference_has_its_interval_and_what_it_could_have_shown():
    lines = table_of(SCORES).splitlines()
    own = next(line for line in lines if line.startswith("| SEAL policy minus own self-edit |"))
    least = 2.8016 * np.std([0.2, 0.2, 0.4, 0.2], ddof=1) / 2
    assert own.startswith("| SEAL policy minus own self-edit | 4 | +25.0 [+20.0, +35.0] |")
    assert f"| {100 * least:.1f} | +0.250 [+0.200, +0.350] | {least:.3f} |" in own
    assert any(
        line.startswith("| own self-edit minus self-edit of gpt-4.1 | 3 |") for line in lines
    )
    assert any("| passage + self-edit of gpt-4.1 | 53.3 [" in line for line in lines)
    assert any("(3 of 4)" in line for line in lines)
    assert "SEAL policy minus own self-edit, accuracy: +25.0" in "\n".join(lines)
