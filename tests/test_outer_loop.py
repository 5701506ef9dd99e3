"""The outer loop with other objectives and rewards: what a step leaves, and how it goes on."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest
from judge_server import GOOD, completion
from tiny_run import CONFIG, run_loop

from seal_jax.commands import main as cli
from seal_jax.config import load_config
from seal_jax.hosts.files import read_jsonl
from seal_jax.tasks.facts import Facts
from seal_jax.tasks.knowledge.task import Knowledge
from seal_jax.tasks.task import Problem, Question

pytest_plugins = ["tiny_fixtures", "judge_server"]

SMALL = (
    "outer.num_steps=2",
    "inner.num_seeds=1",
    "inner.tokens_per_step=96",
    "eval.num_problems=1",
    "checkpoint.adapters=none",
)


def run(folder, *overrides):
    """Return the metrics and the self-edits of a run of the loop."""
    run_loop(load_config(CONFIG, (*SMALL, *overrides)), str(folder))
    return read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / "edits.jsonl")


def without_times(rows):
    return [
        {k: v for k, v in row.items() if k != "time" and not k.startswith("seconds/")}
        for row in rows
    ]


def test_ppo_goes_on_from_its_checkpoint_with_value_head_and_past(one_device, tmp_path):
    overrides = (
        "outer.objective=ppo",
        "outer.kl_coef=0.5",
        "outer.kl_target=1e-3",
        "outer.entropy_coef=0.01",
        "outer.num_epochs=3",
        "eval.every=1",
    )
    rows, edits = run(tmp_path / "run", *overrides)
    assert [row["policy/kl_coef"] for row in rows] == pytest.approx([0.5, 0.5 * 0.98])
    assert rows[0]["policy/kl"] == 0 < rows[1]["policy/kl"]
    assert all(row["outer/ratio_at_start"] == pytest.approx(1, abs=1e-4) for row in rows)
    assert all(row["policy/num_rows"] == 4 for row in rows)
    assert all({"eval/reward", "eval/reward_error"} < row.keys() for row in rows)
    assert {edit["advantage"] for edit in edits} == {edit["reward"] for edit in edits}
    for name in ("checkpoints/2", "adapters/policy-1"):
        shutil.rmtree(tmp_path / "run" / name)
    with pytest.warns(UserWarning, match=r"were written and are not there: \[2\]"):
        again, edits_again = run(tmp_path / "run", *overrides)
    assert without_times(again) == without_times(rows) and edits_again == edits


def test_adaptive_seeds_go_to_the_self_edits_that_compete(one_device, tmp_path):
    overrides = ("outer.num_steps=1", "sample.num_edits=5", "inner.num_seeds=2")
    (row,), edits = run(tmp_path, *overrides, "reward.adaptive_seeds=True")
    assert row["inner/runs"] <= 20
    for group in (edits[:5], edits[5:]):
        first = [edit["log_likelihood"][0] for edit in group]
        best = set(np.argsort(first)[-2:].tolist())  # log-likelihoods never tie
        assert [len(edit["log_likelihood"]) for edit in group] == [
            3 if r in best else 1 for r in range(5)
        ]
    assert {"reliability/reliability_of_mean", "reliability/gain_apparent"} < row.keys()


def test_a_reward_that_nobody_could_tell_is_dropped_and_the_step_a_counted_no_op(
    one_device, tmp_path
):
    # The random model writes no question at all.
    (row,), edits = run(
        tmp_path,
        *("outer.num_steps=1", "reward.weights={'self_questions': 1}", "outer.objective=grpo"),
    )
    assert row["reward/missing"] == 4 - row["edits/rejected"] > 0
    assert row["policy/no_advantage"] == 1 and row["policy/num_batches"] == 0
    assert all(edit["reward"] in (None, -100) for edit in edits)


def test_a_regression_penalty_asks_questions_of_earlier_problems(one_device, tmp_path):
    weights = "reward.weights={'log_likelihood': 1, 'regression': -1}"
    rows, edits = run(tmp_path, weights, "reward.num_earlier=4")
    # A random model has nothing to lose: but the questions were asked, beside the exam's three.
    answered = [[len(answers) for answers in edit["answers"]] for edit in edits]
    assert answered == [[3]] * 4 + [[7]] * 4
    assert all(row["reward/missing"] == 0 for row in rows)


def test_a_judge_is_asked_once_and_what_it_does_not_answer_is_dropped(one_device, tmp_path, server):
    # It answers about the first self-edits only; the wait between tries is left out.
    def some(body):
        good = json.dumps(dict.fromkeys(GOOD, len(server.requests) % 6))
        return completion(good if len(server.requests) <= 3 else "I cannot tell")

    server.replies = [some]
    url = f"http://127.0.0.1:{server.server_port}/v1"
    overrides = ("outer.num_steps=1", "reward.weights={'judge': 1}", f"reward.judge_url={url}")
    (row,), edits = run(tmp_path, *overrides, "reward.judge_tries=1")
    judged = [edit for edit in edits if not edit["why"].startswith("rejected")]
    assert len(server.requests) == len(judged) > 3
    assert row["reward/missing"] == len(judged) - 3
    rewards = sorted(edit["reward"] for edit in judged if edit["reward"] is not None)
    assert rewards == pytest.approx([0.2, 0.4, 0.6])
    assert not (tmp_path / "judged_0.json").exists()  # the step is on disk


def not_a_number(learning_rate):
    """Make every update of the model NaN, as an overflow would; small arrays are well."""

    def one(g):
        return -learning_rate * g * (np.nan if g.size > 100 else 1)

    return optax.stateless(lambda updates, _: jax.tree.map(one, updates))


def test_updates_that_are_not_finite_stop_the_run_after_as_many_as_allowed(
    one_device, tmp_path, capsys
):
    for allowed, steps in ((0, 1), (2, 2)):
        config = load_config(CONFIG, (*SMALL, f"outer.max_skipped={allowed}"))
        with config.unlocked():
            config.outer.optimizer = not_a_number
        folder = tmp_path / str(allowed)
        if allowed == 0:
            message = "step 0: 1 updates were not finite.*max_skipped = 0"
            with pytest.raises(FloatingPointError, match=message):
                run_loop(config, str(folder))
        else:
            run_loop(config, str(folder))
        rows = read_jsonl(folder / "metrics.jsonl")
        assert [row["policy/skipped"] for row in rows] == [1] * steps
    assert "SEAL step 0: update skipped: batch 0 has loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["outer.objective=grpo", "sample.num_edits=1"], "sample.num_edits = 1: grpo compares"),
        (["eval.objectives=grpo", "sample.num_edits=1"], "sample.num_edits = 1: grpo compares"),
        (
            ["eval.objectives=grpo", "eval.objective_kwargs={'grpo': {'clipp': 0.1}}"],
            "grpo has no option 'clipp'",
        ),
        (["outer.objective_kwargs={'clip': 0.1}"], "rest_em has no option 'clip'"),
        (["reward.weights={}"], "reward.weights = .*needs a dict of weights of accuracy, gain"),
        (["reward.weights={'acuracy': 1}"], "needs a dict of weights of accuracy, gain"),
        (["reward.weights={'accuracy': 'all'}"], "needs a dict of weights of accuracy, gain"),
    ],
)
def test_what_cannot_run_is_refused_before_a_model_is_loaded(
    one_device, tmp_path, capsys, overrides, message
):
    settings = [word for override in overrides for word in ("--set", override)]
    source = ["--set", "model.source=nowhere"]
    arguments = ["train", "--config", CONFIG, "--workdir", str(tmp_path / "run")]
    assert cli.main([*arguments, *source, *settings]) == 2
    found = capsys.readouterr().err
    assert np.any([part in found for part in message.split(".*")]) and "nowhere" not in found
    assert not (tmp_path / "run").exists()


def test_questions_that_the_policy_writes_are_read_with_care():
    facts = Facts()
    (problem, exam), *_ = facts.load("train")
    name = problem.title
    text = f"{name} color? red\nother color? blue\n{name} color? green\nzzz\n{name} home?\n"
    assert facts.parse_questions(problem, text) == (Question(f"{name} color?", "green"),)
    assert facts.parse_questions(problem, "") == ()
    assert problem.passage in facts.question_prompt(problem)
    assert not any(q.question in facts.question_prompt(problem) for q in exam.questions)

    knowledge, problem = Knowledge(), Problem("p", "Orrin", "Mara Teld built the mill.")
    text = (
        " Who built the mill?\nAnswer: Mara\nTeld\n\nQuestion 2: What?\nQuestion 3: Who?\nAnswer:"
    )
    text += (
        "\n\nQuestion 4: Who  built the\nmill?\nAnswer: nobody\nQuestion 5: x?\nAnswer: "
        + "y" * 201
    )
    assert knowledge.parse_questions(problem, text) == (Question("Who built the mill?", "Mara"),)
    assert "Mara Teld built the mill." in knowledge.question_prompt(problem)
