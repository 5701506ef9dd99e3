"""Whole runs: what they write, what they refuse, and that a kill changes no bit of them."""

import json
import shutil
import signal

import jax
import numpy as np
import optax
import pytest
from test_tokenizer import TEMPLATE, larger, tiny_fast
from tiny_run import CONFIG, run_loop, run_process, train_arguments

from seal_jax.commands import main as cli
from seal_jax.config.load import load_config, to_json
from seal_jax.config.setup import make_stages, settings_of
from seal_jax.hosts.files import read_jsonl
from seal_jax.inner.texts import encode_text
from seal_jax.models.tokenizer import HFTokenizer
from seal_jax.optim import optimizer_of
from seal_jax.outer.examination import Evaluated, reward
from seal_jax.outer.policy_step import init_train_state
from seal_jax.outer.problems import split_problems
from seal_jax.outer.rewards import Evidence, Outcome
from seal_jax.outer.stages import parse
from seal_jax.outer.step_log import why
from seal_jax.runs import adapters, checkpoint
from seal_jax.runs.folder import find_run
from seal_jax.runs.verify import verify_run
from seal_jax.sources import load_model
from seal_jax.tasks.task import Part, Rejected, SelfEdit, Turn
from seal_jax.train import train

pytest_plugins = ["tiny_fixtures"]

SMALL = (
    "outer.num_steps=1",
    "inner.num_seeds=1",
    "inner.tokens_per_step=96",
    "eval.random_control=False",
    "eval.num_problems=1",
)
ACCURACY = ("reward.weights={'accuracy': 1}",)
THRESHOLD = "outer.objective_kwargs={'select': 'threshold'}"
EDIT_FIELDS = {
    *("step", "problem", "title", "edit", "prompt", "text", "training_texts", "answers"),
    *("accuracy", "log_likelihood", "loss_before", "loss_after", "reward", "kept", "why"),
    *("advantage", "num_training_texts", "thoughts"),
}


def without_times(rows):
    """Return rows of a metrics file without what the clock decides."""
    return [
        {k: v for k, v in row.items() if k != "time" and not k.startswith("seconds/")}
        for row in rows
    ]


def restore_final(folder, *overrides):
    """Return the pytrees of the newest checkpoint: policy, opt_state, and adapters if there are."""
    config = load_config(CONFIG, overrides)
    stages, outer = make_stages(settings_of(config)), config.outer
    base = stages.model.params
    state = init_train_state(
        stages.model.config,
        base,
        optimizer_of(stages.settings.outer),
        mesh=stages.mesh,
        learning_rate=outer.learning_rate,
        update=outer["update"],
        rank=outer.rank,
        alpha=outer.alpha,
        targets=outer.targets,
    )
    trees = {"policy": state.params, "opt_state": state.opt_state}
    if state.adapters is not None:
        trees["adapters"] = state.adapters
    return base, checkpoint.restore(folder / "checkpoints", trees)[1]


def assert_same_run(left, right):
    """Compare what two runs wrote, bit for bit, but for the clock and the order of the ledgers."""
    names, others = (
        {
            path.relative_to(run).as_posix()
            for path in run.rglob("*.json*")
            if "check" not in str(path) and path.name != "manifest.json"  # it knows of the clock
        }
        for run in (left, right)
    )
    assert names == others
    assert verify_run(str(right))[1] == []
    assert "edits.jsonl" in names and "eval_seal.jsonl" in names
    for name in names:
        if name.endswith("metrics.jsonl"):
            found, expected = (without_times(read_jsonl(run / name)) for run in (right, left))
            assert found == expected, name
        else:
            assert (right / name).read_text() == (left / name).read_text(), name


def assert_same_adapters(left, right):
    names, config = adapters.list_adapters(str(left)), load_model("random:byte-tiny").config
    assert adapters.list_adapters(str(right)) == names
    for name in names:
        trees, parents = zip(
            *[adapters.load_adapter(str(run), name, config) for run in (left, right)], strict=True
        )
        assert len({checkpoint.tree_hash(tree) for tree in trees}) == 1, name
        assert parents[0] == parents[1]


def test_a_run_writes_its_whole_folder(finished):
    assert {path.name for path in finished.iterdir()} == {
        *("config.json", "metrics.jsonl", "edits.jsonl", "summary.json", "summary.md"),
        *("checkpoints", "adapters", "model", "random", "manifest.json"),
        *(f"eval_{arm}.jsonl" for arm in ("base", "passage", "own", "seal", "random")),
    }
    config = json.loads((finished / "config.json").read_text())
    assert config["task"]["name"] == "facts" and config["inner"]["optax_name"] == "adamw"
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"1", "2"}
    assert {p.name for p in (finished / "random").iterdir()} == {
        *("metrics.jsonl", "edits.jsonl", "checkpoints", "adapters", "manifest.json")
    }
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary["arms"]) == ["base", "own", "passage", "random", "seal"]
    assert (summary["num_problems"], summary["num_questions"]) == (2, 6)
    text = (finished / "summary.md").read_text()
    assert text.startswith("| method | accuracy") and "log p of gold answers" in text
    assert all("log_likelihood" in row for row in summary["arms"].values())
    assert {(row["arm"], row["minus"]) for row in summary["differences"]} == {
        *(("seal", other) for other in ("own", "random", "passage", "base")),
        ("own", "passage"),
    }
    assert len(summary["examples"]) == summary["num_questions"]
    for row in read_jsonl(finished / "eval_base.jsonl"):
        given = [one["answers"]["base"] for one in summary["examples"]]
        assert set(row["answers"]) <= set(given)


def test_metrics_of_a_run(finished):
    rows = read_jsonl(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert "nonfinite" not in row
        assert 0.2 < row["inner/useful_tokens"] <= 1
        assert row["inner/runs"] == 2 * (row["edits/num"] - row["edits/rejected"])
        assert row["inner/loss_after"] < row["inner/loss_before"]
        assert row["policy/loss_last"] < row["policy/loss_first"]
        assert row["edits/kept"] == row["policy/num_rows"] == 2
        assert row["reward/best"] == pytest.approx(row["reward/kept"])
        assert row["reward/best"] >= row["reward/mean"]
        assert {"seconds/sample", "seconds/inner", "seconds/policy"} < row.keys()


def test_every_self_edit_is_logged_with_its_reward_and_its_fate(finished):
    edits = read_jsonl(finished / "edits.jsonl")
    steps = [(edit["step"], edit["edit"]) for edit in edits]
    assert steps == [(s, r) for s in (0, 0, 1, 1) for r in (0, 1)]
    assert len({edit["problem"] for edit in edits}) == 4  # fresh problems in each step
    for group in (edits[i : i + 2] for i in range(0, 8, 2)):
        for edit in group:
            assert edit.keys() == EDIT_FIELDS
            assert edit["prompt"].endswith("notes:\n") and edit["title"] in edit["prompt"]
            if edit["why"].startswith("rejected: "):
                assert (edit["reward"], edit["kept"], edit["accuracy"]) == (-100, False, [])
                continue
            assert edit["training_texts"][-1] in edit["prompt"]
            assert all(after < before for before, after in zip(*losses(edit), strict=True))
            assert [len(a) for a in edit["answers"]] == [3, 3]
            assert len(edit["accuracy"]) == 2
            assert edit["reward"] == pytest.approx(np.mean(edit["log_likelihood"]))
        best = int(np.argmax([edit["reward"] for edit in group]))
        assert [edit["kept"] for edit in group] == [r == best for r in range(2)]
        assert group[best]["why"] == "selected by reward"


def losses(edit):
    return edit["loss_before"], edit["loss_after"]


def test_the_control_trains_on_self_edits_drawn_at_random_and_evaluates_none(finished):
    edits = read_jsonl(finished / "random" / "edits.jsonl")
    assert {edit["reward"] for edit in edits} <= {None, -100}
    assert sum(edit["kept"] for edit in edits) == 4
    assert {edit["why"] for edit in edits if edit["kept"]} == {"drawn at random"}
    assert all("inner/runs" not in row for row in read_jsonl(finished / "random" / "metrics.jsonl"))


def test_running_again_says_that_it_is_done_and_runs_nothing(
    finished, one_device, tmp_path, capsys
):
    run = shutil.copytree(finished, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert cli.main(train_arguments(run)) == 0
    assert "is done already; nothing was run" in capsys.readouterr().out
    # Another placement is the same experiment.
    assert cli.main(train_arguments(run, "inner.max_adapters=2")) == 0
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_another_config_in_the_same_folder_is_refused_with_a_diff(finished, one_device, capsys):
    arguments = train_arguments(finished, "inner.learning_rate=5e-4", "outer.update=full")
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert "inner.learning_rate: 0.001 -> 0.0005" in message
    assert 'outer.update: "lora" -> "full"' in message
    assert str(finished) in message and "Traceback" not in message


def killed_at(folder, line, *overrides):
    """Run until just before a line is written: 'edits.jsonl:7'."""
    result = run_process(*train_arguments(folder, *overrides), kill=f"{folder}/{line}", check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert verify_run(str(folder))[1] == []


def test_a_run_that_is_killed_three_times_is_the_uninterrupted_run(finished, one_device, tmp_path):
    run = tmp_path / "run"
    killed_at(run, "pending_0.jsonl:3")  # within a wave of step 0's inner runs
    assert not (run / "metrics.jsonl").exists()
    (run / "adapters" / "policy-0.orbax-checkpoint-tmp").mkdir()  # an adapter half saved
    killed_at(run, "edits.jsonl:7")  # step 1 is evaluated, its log half written, nothing saved
    assert len(read_jsonl(run / "metrics.jsonl")) == 2
    assert {p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()} == {"1"}
    killed_at(run, "eval_own.jsonl:2")  # within the final comparison
    assert not (run / "summary.json").exists()
    run_process(*train_arguments(run))
    assert_same_run(finished, run)
    assert_same_adapters(finished, run)
    _, found = restore_final(run)
    _, expected = restore_final(finished)
    assert found.keys() == {"policy", "opt_state", "adapters"}
    assert {k: checkpoint.tree_hash(v) for k, v in found.items()} == {
        k: checkpoint.tree_hash(v) for k, v in expected.items()
    }


def test_a_further_objective_is_an_arm_of_as_many_inner_runs(one_device, tmp_path, capsys):
    run, overrides = tmp_path / "run", (*SMALL, "eval.objectives=rloo", "eval.primary=seal-rloo")
    killed_at(run, "eval_own.jsonl:1", *overrides)
    (base,) = read_jsonl(run / "eval_base.jsonl")
    base["log_likelihood"] -= 0.25  # asked again, it would not have this value
    (run / "eval_base.jsonl").write_text(json.dumps(base) + "\n")
    (run / "manifest.json").unlink()  # else it is damaged
    summary = train(load_config(CONFIG, overrides), str(run))
    said = capsys.readouterr().out
    assert "(and once more for rloo)" in said
    assert "primary comparisons: seal-rloo, by accuracy" in said
    assert list(summary["arms"]) == ["base", "passage", "own", "seal", "rloo"]
    assert summary["arms"]["base"]["log_likelihood"] == base["log_likelihood"]
    (seal,), (rloo,) = (read_jsonl(folder / "metrics.jsonl") for folder in (run, run / "rloo"))
    for name in ("inner/runs", "reward/mean", "reward/best"):
        assert seal[name] == rloo[name]
    assert seal["policy/loss_first"] != rloo["policy/loss_first"]
    assert (run / "summary.md").read_text().startswith("**Primary comparisons, stated before")
    good, damaged = verify_run(str(run))
    assert {"rloo/checkpoints/1", "eval_base.jsonl", "eval_rloo.jsonl"} <= {*good} and not damaged
    assert find_run(run / "rloo").root == run


def test_a_run_that_is_told_to_end_finishes_its_wave_and_goes_on(finished, tmp_path):
    run = tmp_path / "run"
    ended = run_process(*train_arguments(run), tell=f"{run / 'pending_1.jsonl'}:2")
    assert "process 0 got SIGTERM: the same command resumes the run" in ended.stderr
    assert "Traceback" not in ended.stderr and "| method |" not in ended.stdout
    assert len(read_jsonl(run / "pending_1.jsonl")) == 4  # the wave, and no other
    assert {p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()} == {"1"}
    run_process(*train_arguments(run))
    assert_same_run(finished, run)


@pytest.mark.long
@pytest.mark.parametrize("name", ["adamw", "contrib.schedule_free_adamw"])
def test_a_full_updates_optimizer_state_survives_a_kill(one_device, tmp_path, name):
    overrides = ("outer.update=full", "eval.random_control=False", "outer.learning_rate=1e-3")
    overrides += (f"outer.optax_name={name}",)
    run_process(*train_arguments(tmp_path / "whole", *overrides))
    killed_at(tmp_path / "killed", "pending_1.jsonl:2", *overrides)
    run_process(*train_arguments(tmp_path / "killed", *overrides))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    _, whole = restore_final(tmp_path / "whole", *overrides)
    _, killed = restore_final(tmp_path / "killed", *overrides)
    assert checkpoint.tree_hash(whole) == checkpoint.tree_hash(killed)


def signed_step(learning_rate):
    """Follow the gradient's sign: a user's own transform, with a count as its state."""

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda g: -learning_rate * jax.numpy.sign(g), updates), state + 1

    return optax.GradientTransformation(lambda params: jax.numpy.int32(0), update)


def not_a_number(learning_rate):
    """Make every update of the model NaN, as an overflow would; small arrays are well."""

    def one(g):
        return -learning_rate * g * (np.nan if g.size > 100 else 1)

    return optax.stateless(lambda updates, _: jax.tree.map(one, updates))


def test_a_full_update_and_another_inner_optimizer_by_name(one_device, tmp_path):
    overrides = (*SMALL, "outer.update=full", "inner.optax_name=lion", *ACCURACY)
    run_loop(load_config(CONFIG, overrides), tmp_path)
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert row["inner/loss_after"] < row["inner/loss_before"]
    edits = read_jsonl(tmp_path / "edits.jsonl")
    assert all(edit["log_likelihood"] in ([None], []) for edit in edits)
    assert all(edit["reward"] in (*edit["accuracy"], -100) for edit in edits)
    base, final = restore_final(tmp_path, *overrides)
    assert final.keys() == {"policy", "opt_state"}
    same = jax.tree.map(lambda x, y: bool((x == y).all()), final["policy"], base)
    assert not any(jax.tree.leaves(same))  # every parameter was trained


def test_a_users_optimizer_in_both_loops_and_a_threshold_that_keeps_nothing(one_device, tmp_path):
    config = load_config(CONFIG, (*SMALL, THRESHOLD))  # log-likelihoods are below 0
    with config.unlocked():
        config.inner.optimizer = config.outer.optimizer = signed_step
    stages = run_loop(config, tmp_path)
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert row["inner/loss_after"] < row["inner/loss_before"]
    assert row["edits/kept"] == row["policy/num_batches"] == 0
    assert not any(edit["kept"] for edit in read_jsonl(tmp_path / "edits.jsonl"))
    base = stages.model.params
    policy = checkpoint.restore(tmp_path / "checkpoints", {"policy": base})[1]["policy"]
    assert checkpoint.tree_hash(policy) == checkpoint.tree_hash(base)
    assert '"optimizer": "test_train:signed_step"' in to_json(config)


def test_rejected_and_overflowing_self_edits_earn_what_is_configured(one_device, tmp_path):
    overrides = ("sample.num_edits=4", "sample.max_tokens=3", "reward.rejected=-1")
    config = load_config(CONFIG, (*SMALL, *overrides))
    with config.unlocked():
        config.inner.optimizer = not_a_number
    summary = train(config, tmp_path)
    edits = read_jsonl(tmp_path / "edits.jsonl")
    rejected = [edit for edit in edits if edit["why"].startswith("rejected: ")]
    applied = [edit for edit in edits if edit["why"].startswith("not finite: ")]
    assert len(edits) == len(rejected) + len(applied) == 8
    assert rejected and applied
    assert all(edit["reward"] == -1 and not edit["kept"] for edit in edits)
    assert all(edit["loss_before"] == edit["loss_after"] == [None] for edit in applied)
    assert {edit["why"].partition(": ")[2].partition(":")[0] for edit in rejected} <= {
        *("empty", "no words")
    }
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert row["edits/rejected"] == len(rejected) and row["edits/not_finite"] == len(applied)
    assert row["policy/num_batches"] == 0 and row["inner/loss_after"] == 0
    assert list(summary["arms"]) == ["base", "passage", "own", "seal"]
    assert summary["arms"]["passage"]["accuracy"] == summary["arms"]["seal"]["accuracy"] == 0


def outcome(accuracy, loss=1.0):
    return Outcome(accuracy, None, 2.0, loss, ("?",), 10)


def test_one_seed_that_overflows_rejects_its_self_edit_and_no_other():
    edit, rejected = SelfEdit("a", "", "x", ("x",)), Rejected("a", "", "", "empty")
    edits = [[edit, edit, rejected]]
    outcomes = {
        ("a", 0, 0): outcome(1.0),
        ("a", 0, 1): outcome(1.0, float("nan")),
        ("a", 1, 0): outcome(0.5),
        ("a", 1, 1): outcome(0.0),
    }
    seeds = list(outcomes.values())
    evidence = [
        Evidence(found, edit.text, "", 1.0, 0.0)
        for found, edit in zip((seeds[:2], seeds[2:], []), edits[0], strict=True)
    ]
    evaluated = Evaluated([evidence], outcomes, [0.0])
    section = settings_of(load_config(CONFIG)).reward
    section = section._replace(weights={"accuracy": 1.0}, rejected=-1.0)
    rewards = reward(edits, evaluated, section)
    np.testing.assert_array_equal(rewards.values, [[-1.0, 0.25, -1.0]])
    np.testing.assert_array_equal(rewards.keepable, [[False, True, False]])
    assert why(edit, seeds[:2], False).startswith("not finite")
    assert why(edit, seeds[2:], True) == "selected by reward"
    assert why(edit, seeds[2:], False) == "not selected by reward"
    assert why(rejected, [], False) == "rejected: empty"
    assert (why(edit, [], True), why(edit, [], False)) == ("drawn at random", "not drawn")


def test_a_self_edit_with_a_token_that_the_model_lacks_is_rejected(one_device):
    stages = make_stages(settings_of(load_config(CONFIG)))
    fast, num_rows = larger()
    tokenizer = HFTokenizer(fast, num_rows=num_rows)
    stages = stages._replace(encode=lambda text, _: encode_text(tokenizer, text, chat=False))
    batch = split_problems(stages.settings, stages.task)[0][:1]
    ((refused, used),) = parse(stages, batch, ["hmm <think>", "hmm <image>"])
    assert isinstance(refused, Rejected) and isinstance(used, SelfEdit)
    assert refused.reason.startswith(f"no token of the model: a text has token {num_rows + 2}")


def test_a_self_edit_that_the_chat_template_changes_is_rejected(one_device):
    stages = make_stages(settings_of(load_config(CONFIG)))
    template = TEMPLATE.replace("m['content']", "m['content'].split('</a>')[-1]")
    tokenizer = HFTokenizer(tiny_fast(template))
    asked = (Part("x", False),)
    stages = stages._replace(
        encode=lambda text, _: encode_text(tokenizer, Turn(asked, text), chat=True)
    )
    batch = split_problems(stages.settings, stages.task)[0][:1]
    ((refused, used),) = parse(stages, batch, ["hmm </a> b", "hmm b"])
    assert isinstance(refused, Rejected) and isinstance(used, SelfEdit)
    assert refused.reason.startswith("no text for the chat template: this model: its chat template")
