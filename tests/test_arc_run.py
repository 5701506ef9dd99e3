"""Few-shot ARC through the loops: settings as data, what is logged, and a policy that learns."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import run_loop

from seal_jax.bench.timing import count_compiles
from seal_jax.commands.main import main
from seal_jax.config import load_config
from seal_jax.config.setup import longest_row, make_stages, settings_of
from seal_jax.hosts.files import read_jsonl
from seal_jax.outer.answers import baseline_accuracy
from seal_jax.outer.problems import OuterStep, split_problems
from seal_jax.outer.stages import check_prompts, parse, sample
from seal_jax.outer.waves import Examination, all_of, inner_runs
from seal_jax.sources import load_model
from seal_jax.tasks.arc.augmentations import GROUPS
from seal_jax.tasks.arc.small import CHOICES, self_edit_text
from seal_jax.tasks.task import Rejected, SelfEdit
from seal_jax.train import evaluate

pytest_plugins = ["tiny_fixtures"]

CONFIG = str(Path(__file__).parents[1] / "configs" / "arc_tiny.py")
RANDOM = (
    "model.source=random:byte-tiny",
    "sample.max_tokens=16",
    "answer.max_tokens=2",
    "inner.max_adapters=16",
    "inner.rank=2",
    "sample.num_edits=2",
    "eval.num_problems=1",
    "outer.problems_per_step=2",
)


@pytest.fixture
def arc(one_device):
    """Return the stages of configs/arc_tiny.py with a random model, and its training problems."""
    stages = make_stages(settings_of(load_config(CONFIG, RANDOM)))
    return stages, split_problems(stages.settings, stages.task)[0]


def evaluated(stages, runs, ledger):
    """Return the outcomes of inner runs."""
    return evaluate(stages, stages.model.params, Examination(partial(all_of, runs), ledger, "runs"))


def settings(count):
    """Return self-edits that differ in all that there is to choose."""
    rng = np.random.default_rng(0)
    for i in range(count):
        groups = [group for group in GROUPS if rng.random() < 0.5]
        strategy = CHOICES["strategy"][i % 2]
        yield self_edit_text(groups, strategy, f"{10 ** rng.uniform(-5, -2):.6f}", str(1 + i % 3))


def test_15_settings_are_one_population(arc, tmp_path):
    stages, problems = arc
    batch = problems[:1]
    (edits,) = parse(stages, batch, list(settings(15)))
    assert all(isinstance(edit, SelfEdit) for edit in edits)
    assert len({edit.learning_rate for edit in edits}) == 15
    assert len({(edit.outputs_only, edit.num_epochs) for edit in edits}) == 6
    runs = inner_runs(batch, [edits], 0, [0])
    others = [edit._replace(learning_rate=1e-3 / (1 + i)) for i, edit in enumerate(edits)]
    with jax.transfer_guard("disallow"), count_compiles() as compiled:
        outcomes = evaluated(stages, runs, str(tmp_path / "a"))
        first = len(compiled)
        again = evaluated(stages, inner_runs(batch, [others], 0, [0]), str(tmp_path / "b"))
        assert len(compiled) == first  # rates are data
    # Of another strategy, rate or number of epochs, another adapter comes out.
    losses = [outcome.loss_after for outcome in outcomes.values()]
    assert len(set(losses)) == 15 and np.isfinite(losses).all()
    assert losses != [outcome.loss_after for outcome in again.values()]
    # Each loss is as if its run were alone.
    alone = evaluated(stages, runs[3:4], str(tmp_path / "c"))
    found = alone[runs[3].name]
    assert found.loss_after == pytest.approx(outcomes[runs[3].name].loss_after, rel=1e-5)


def test_the_ledger_tells_settings_apart(arc, tmp_path):
    stages, problems = arc
    text = self_edit_text((), CHOICES["strategy"][1], "1e-3", "1")
    other = self_edit_text((), CHOICES["strategy"][0], "1e-3", "1")
    edits = [parse(stages, problems[:1], [t])[0][0] for t in (text, other)]
    assert edits[0].training_texts == edits[1].training_texts
    ledger, losses = str(tmp_path / "ledger.jsonl"), []
    for edit in edits:
        runs = inner_runs(problems[:1], [[edit]], 0, [0])
        (outcome,) = evaluated(stages, runs, ledger).values()
        losses.append(outcome.loss_before)
    assert len(read_jsonl(ledger)) == 2 and losses[0] != losses[1]


def test_one_long_text_takes_no_more_than_its_budget(arc):
    stages, problems = arc
    config = stages.settings
    longest = longest_row(stages, problems[:3])
    assert longest == config.inner.batch_size * config.task["max_tokens"]
    for problem, _ in problems[:3]:
        texts = stages.task.passage_only(problem).training_texts
        assert max(len(stages.encode(text, True).tokens) for text in texts) <= 192


def test_texts_beyond_the_model_are_refused_at_the_door(one_device):
    stages = make_stages(settings_of(load_config(CONFIG, [*RANDOM, "task.max_tokens=1025"])))
    problems, _ = split_problems(stages.settings, stages.task)
    with pytest.raises(ValueError, match="task.max_tokens = 1,025: expected at most 1,024"):
        check_prompts(stages, problems)


def test_constrained_self_edits_are_all_valid(one_device):
    pytest.importorskip("llguidance")
    options = [*RANDOM, "sample.constrained=True", "sample.max_tokens=320"]
    stages = make_stages(settings_of(load_config(CONFIG, options)))
    batch = split_problems(stages.settings, stages.task)[0][:2]
    with jax.transfer_guard("disallow"):
        step = OuterStep(0, "constrained", "", batch)
        _, texts = sample(stages, stages.model.params, step, 3)
    edits = [edit for row in parse(stages, batch, texts) for edit in row]
    assert [edit.reason for edit in edits if isinstance(edit, Rejected)] == []
    assert len({edit.text for edit in edits}) > 3


def test_only_a_task_with_a_grammar_can_be_constrained(one_device):
    tiny = str(Path(__file__).parent / "tiny_config.py")
    with pytest.raises(ValueError, match="self-edits of task 'facts' have no grammar"):
        make_stages(settings_of(load_config(tiny, ["sample.constrained=True"])))


def test_unknown_tiny_model():
    with pytest.raises(FileNotFoundError, match="no tiny model 'ark'; found arc"):
        load_model("tiny:ark")


def test_a_step_is_logged_without_hundreds_of_texts(one_device, tmp_path):
    options = [*RANDOM, "outer.num_steps=1", "eval.every=0", "reward.rejected=-1.0"]
    stages = run_loop(load_config(CONFIG, options), str(tmp_path))
    rows = read_jsonl(tmp_path / "edits.jsonl")
    # A random model writes nothing that can be read: every self-edit is counted as rejected.
    assert len(rows) == 4 and all("not one JSON object" in row["why"] for row in rows)
    assert all(row["num_training_texts"] == 0 and row["training_texts"] == [] for row in rows)
    (metrics,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert metrics["edits/rejected"] == 4
    problems, _ = split_problems(stages.settings, stages.task)
    with jax.transfer_guard("disallow"):
        assert baseline_accuracy(stages, stages.model.params, problems[:2]) == [0.0, 0.0]


@pytest.mark.long  # minutes: a model is trained on the spot
def test_the_policy_learns_to_choose_settings_that_work(tmp_path):
    """A run of configs/arc_tiny.py as it is, as a user would start it."""
    # Compiling with optimizations takes longer, and minutes of computing less.
    environment = {name: os.environ[name] for name in os.environ if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "seal_jax.commands", "train", "--config", CONFIG]
    command += ["--workdir", str(tmp_path / "run")]
    run = subprocess.run(command, env=environment | {"HOME": str(tmp_path)}, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    assert (tmp_path / ".cache" / "seal_jax" / "tiny-arc-1" / "model.safetensors").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    accuracy = {arm: row["accuracy"] for arm, row in summary["arms"].items()}
    assert accuracy["base"] < 0.4  # what is in context is not enough
    assert accuracy["passage"] > accuracy["base"]  # the recipe helps
    assert accuracy["seal"] > accuracy["own"] + 0.2 and accuracy["seal"] > accuracy["random"] + 0.2
    assert rows[-1]["eval/reward"] > rows[0]["eval/reward"]
    assert rows[-1]["reward/mean"] > rows[0]["reward/mean"] + 0.1
    assert rows[-1]["edits/rejected"] < rows[0]["edits/rejected"]
    table = run.stdout.decode()
    assert "| in context only |" in table and "12 test grids, solved in two attempts" in table
    view = ["view", "arc", "small-32", "--run", str(tmp_path / "run")]
    assert main(view) == 0
