"""`seal-jax tune`: a sweep is a slow loop over its settings, resumes, and leaks nothing."""

import json
import math
import shlex
from functools import partial
from signal import SIGKILL

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import CONFIG, run_process

from seal_jax import keys
from seal_jax.commands import main as cli
from seal_jax.commands import tune
from seal_jax.config import sweeps
from seal_jax.config.load import ConfigError, load_config, to_json, with_overrides
from seal_jax.config.setup import make_stages, settings_of
from seal_jax.config.workdir import refuse_other_kind
from seal_jax.inner import packing
from seal_jax.inner.texts import Job, make_job, text_of
from seal_jax.optim import SCHEDULES, scheduled_rate
from seal_jax.outer import sweep as sweeping
from seal_jax.outer.answers import mean_logp
from seal_jax.outer.problems import fresh_problems
from seal_jax.outer.sweep import Found, Scores, Setting, Sweep, halving
from seal_jax.outer.sweep_report import describe_mean, plot, summarize, to_markdown
from seal_jax.runs.verify import verify_run
from seal_jax.tasks import make_task
from seal_jax.tasks.task import SelfEdit

pytest_plugins = ["tiny_fixtures"]

OVER = (
    *("--over", "inner.learning_rate=1e-3,1e-2", "--over", "inner.num_epochs=2,4"),
    *("--over", "inner.schedule=linear,constant"),
)
NUM_PASSAGES, NUM_OTHERS = 4, 2


def tune_arguments(folder, *more):
    numbers = "--passages", str(NUM_PASSAGES), "--others", str(NUM_OTHERS)
    out = "--out", str(folder.parent / f"{folder.name}.py")
    return ["tune", "--config", CONFIG, "--workdir", str(folder), *OVER, *numbers, *out, *more]


@pytest.fixture(scope="module")
def tuned(compiled, tmp_path_factory):
    """Return the folder of a sweep that was killed and went on to its end; only read it."""
    folder = tmp_path_factory.mktemp("tune") / "sweep"
    kill = f"{folder}/tune_runs.jsonl:19"  # in the second round
    assert run_process(*tune_arguments(folder), kill=kill, check=False).returncode == -SIGKILL
    assert not (folder / "tune.json").exists() and not (folder.parent / "sweep.py").exists()
    done = (folder / "tune_runs.jsonl").read_text()
    assert done.count("\n") == 18
    run_process(*tune_arguments(folder))
    assert (folder / "tune_runs.jsonl").read_text().startswith(done)
    return folder


def slow_scores(stages, config, problem, texts, golds):
    """Train one adapter on the texts by the config, with idle ones beside it; score the golds."""
    inner, model, path = config.inner, stages.model, (keys.TUNE_STEP, keys.number_of(problem.id))
    job = make_job(
        [text_of(model.tokenizer.encode(text)) for text in texts],
        num_epochs=inner.num_epochs,
        batch_size=inner.batch_size,
        learning_rate=inner.learning_rate,
        key=(0, keys.SHUFFLE, *path, 0, 0),
    )._replace(schedule=inner.schedule)
    idle = inner.max_adapters - 1
    batches = packing.pack(
        [job, *[Job((), 0.0)] * idle],
        tokens_per_step=inner.tokens_per_step,
        pad_id=model.tokenizer.pad_id,
    )
    fresh = stages.init_adapters(keys.fold([(0, keys.ADAPTER, *path, 0, 0), *[(0,) * 6] * idle]))
    adapters, _ = stages.inner_update(model.params, fresh, jax.device_put(batches))
    encode = model.tokenizer.encode
    texts = [text_of(encode(asked + gold), len(encode(asked))) for asked, gold in golds]
    return mean_logp(model, model.params, adapters, [texts, *[[]] * idle], mesh=stages.mesh)[0]


def test_a_sweep_is_a_slow_loop_over_its_settings(tuned, one_device):
    """Each setting by itself: the same scores, and the same best, though a kill was in between."""
    found = json.loads((tuned / "tune.json").read_text())
    config = load_config(CONFIG)
    stages = make_stages(settings_of(config))
    task = stages.task
    training = task.load("train")
    problems = training[4 : 4 + NUM_PASSAGES]  # behind those that `train` takes
    rest = training[4 + NUM_PASSAGES :]
    some = NUM_PASSAGES * NUM_OTHERS
    others = [rest[i * len(rest) // some] for i in range(some)]
    golds, asked_beside = (
        [
            [(task.answer_prompt(p, q.question), f" {q.answer}") for q in exam.questions]
            for p, exam in group
        ]
        for group in (problems, others)
    )
    written = [
        text
        for first in (0, 2)
        for text in json.loads((tuned / f"tune_texts_0_{first}.json").read_text())["texts"]
    ]
    assert [count for count, _ in found["rounds"]] == [8, 4] and len(written) == NUM_PASSAGES
    competing, scores = list(range(8)), {i: [] for i in range(8)}
    for count, places in ((8, range(2)), (4, range(2, 4))):
        competing = sorted(competing, key=lambda i: -np.mean(scores[i] or [0]))[:count]
        for i in {*competing, found["own"]}:
            one = with_overrides(config, found["settings"][i]["set"])
            for p in places:
                edit = task.parse(problems[p][0], written[p])
                asked = [*golds[p], *[asked_beside[p * NUM_OTHERS + k][0] for k in (0, 1)]]
                logp = slow_scores(stages, one, problems[p][0], edit.training_texts, asked)
                scores[i].append(float(np.mean(logp[: len(golds[p])])))
                outcome = found["settings"][i]["outcomes"][p]
                assert outcome["problem"] == problems[p][0].id
                assert outcome["log_likelihood"] == pytest.approx(scores[i][-1], abs=2e-5)
                elsewhere = float(np.mean(logp[len(golds[p]) :]))
                assert outcome["log_likelihood_elsewhere"] == pytest.approx(elsewhere, abs=2e-5)
    assert found["best"] == max(competing, key=lambda i: np.mean(scores[i]))
    for i, row in enumerate(found["settings"]):
        assert len(row["outcomes"]) == len(scores[i])
    assert len({row["outcomes"][0]["log_likelihood"] for row in found["settings"]}) == 8


@pytest.mark.long
def test_a_killed_sweep_ends_as_if_it_had_not_been(tuned, tmp_path):
    folder = tmp_path / "sweep"
    run_process(*tune_arguments(folder))
    for name in ("tune.json", "tune.md", "tune_texts_0_2.json"):
        assert (folder / name).read_text() == (tuned / name).read_text(), name


def test_the_written_config_is_the_best_setting(tuned):
    assert verify_run(str(tuned))[1] == []
    found = json.loads((tuned / "tune.json").read_text())
    best = found["settings"][found["best"]]["set"]
    written = load_config(str(tuned.parent / "sweep.py"))
    assert to_json(written) == to_json(load_config(CONFIG, best))
    text = (tuned.parent / "sweep.py").read_text()
    assert "seal-jax train --config" in text and "import" not in text.split('"""')[1]


def test_a_finished_sweep_is_said_to_be_done_and_is_nothing_else_s(tuned, one_device, capsys):
    assert cli.main(tune_arguments(tuned)) == 0
    said = capsys.readouterr().out
    assert "is done already" in said and "Best: --set inner.learning_rate=" in said
    assert cli.main(tune_arguments(tuned, "--edits", "2")) == 2
    assert "holds another sweep: edits = 1, asked for 2" in capsys.readouterr().err
    (tuned.parent / "sweep.py").write_text("mine")
    assert cli.main(tune_arguments(tuned)) == 2
    assert "sweep.py exists" in capsys.readouterr().err
    assert (tuned.parent / "sweep.py").read_text() == "mine"
    assert cli.main(["train", "--config", CONFIG, "--workdir", str(tuned)]) == 2
    assert "is the folder of a sweep" in capsys.readouterr().err


def test_a_run_s_folder_is_no_sweep_s(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"folder of a training run \(it has metrics.jsonl\)"):
        refuse_other_kind(str(tmp_path), "tune")


@pytest.mark.parametrize(
    "over, words",
    [
        (
            "model.source=a,b",
            "model.source is no key that a sweep can go over: inner.learning",
        ),
        ("eval.num_edits=1,2", "eval.num_edits is no key"),
        ("inner.learning_rate", "expected KEY=VALUE,VALUE,... or KEY=LOW:HIGH"),
        ("inner.learning_rate=1e-2:1e-4", "0 < LOW < HIGH, found 1e-2:1e-4"),
        ("inner.learning_rate=0:1", "0 < LOW < HIGH"),
        ("inner.learning_rate=1e-3,,1e-2", "an empty value"),
        ("inner.learning_rate=1e-3,0.001", "are the same setting"),
        ("inner.num_epochs=2,2.5", "inner.num_epochs = 2.5: needs an integer"),
        ("inner.schedule=linear,step", "needs one of 'constant', 'linear', 'cosine'"),
        ("task.style=rewrite", "task 'facts' takes only"),
        ("inner.targets=q_proj,w_proj", "needs a tuple of different names"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_starts(over, words, tmp_path, capsys):
    workdir = tmp_path / "sweep"
    command = ["tune", "--config", CONFIG, "--workdir", str(workdir), "--over", over]
    assert cli.main(command) == 2
    assert words in capsys.readouterr().err
    assert not workdir.exists()


def test_a_file_that_is_there_is_not_overwritten(tmp_path, capsys):
    out = tmp_path / "mine.py"
    out.write_text("mine")
    command = ["tune", "--config", CONFIG, "--workdir", str(tmp_path / "w"), "--out", str(out)]
    assert cli.main(command) == 2
    assert "mine.py exists" in capsys.readouterr().err and out.read_text() == "mine"


def test_a_key_that_is_swept_twice_is_refused():
    over = ["inner.rank=4,8", "inner.rank=16"]
    with pytest.raises(ConfigError, match="--over inner.rank: given twice"):
        sweeps.candidates(load_config(CONFIG), over, None)


def test_a_grid_has_every_pair_once_and_the_config_s_own():
    config = load_config(CONFIG)  # 1e-3, two epochs
    found = sweeps.candidates(config, ["inner.learning_rate=1e-4,1e-2", "inner.rank=2,8"], None)
    assert [one.overrides for one in found] == [
        (),
        *[
            (f"inner.learning_rate={rate}", f"inner.rank={rank}")
            for rate in ("1e-4", "1e-2")
            for rank in (2, 8)
        ],
    ]
    assert found[3].config.inner.learning_rate == 1e-2 and found[3].config.inner.rank == 2
    within = sweeps.candidates(config, ["inner.learning_rate=1e-3,1e-2"], None)
    assert len(within) == 2 and sweeps.own_index(config, within) == 0
    assert len(sweeps.candidates(load_config("configs/quickstart.py"), [], None)) == 32
    targets = sweeps.candidates(config, ["inner.targets=q_proj;q_proj,v_proj"], None)
    assert targets[1].config.inner.targets == ("q_proj", "v_proj")


def test_a_random_sample_covers_each_range_evenly_in_its_logarithm():
    config = load_config(CONFIG)
    over = ["inner.learning_rate=1e-4:1e-2", "inner.schedule=linear,cosine", "inner.rank=2:32"]
    found = sweeps.candidates(config, over, 10)
    again = sweeps.candidates(config, over, 10)
    assert [one.overrides for one in found] == [one.overrides for one in again]
    drawn = [one.config.inner for one in found[1:]]
    parts = [int(10 * math.log(inner.learning_rate / 1e-4) / math.log(100)) for inner in drawn]
    assert sorted(parts) == list(range(10))
    assert sorted(inner.schedule for inner in drawn) == ["cosine"] * 5 + ["linear"] * 5
    assert all(2 <= inner.rank <= 32 for inner in drawn)


@pytest.mark.parametrize(
    "num_settings, num_problems, rounds",
    [
        (33, 16, [(33, 2), (17, 4), (9, 8), (5, 16)]),
        (8, 4, [(8, 2), (4, 4)]),
        (4, 64, [(4, 32), (2, 64)]),
        (9, 3, [(9, 3)]),
        (1, 9, [(1, 9)]),
    ],
)
def test_half_as_many_settings_see_twice_as_many_passages(num_settings, num_problems, rounds):
    assert halving(num_settings, num_problems) == rounds


def passages_file(tmp_path, content):
    path = tmp_path / "passages.json"
    path.write_text(json.dumps(content))
    overrides = ["task.name=knowledge", f"task.source=json:{path}", "outer.num_steps=1"]
    settings = settings_of(load_config(CONFIG, overrides))
    return settings, make_task(**settings.task)


def passage(i):
    questions = [{"question": f"What is {i}?", "answer": f"number {i}"}]
    return {"title": f"{i}", "context": f"This is {i}.", "questions": questions}


def test_passages_are_those_that_neither_training_nor_the_table_uses(tmp_path):
    """Of one list for both splits: `train` takes the first two, and the table asks them."""
    settings, task = passages_file(tmp_path, [passage(i) for i in range(6)])
    found = fresh_problems(settings, task, None, 3, 8)
    assert [problem.title for problem, _ in found.problems] == ["2", "3", "4"]
    assert [problem.title for problem, _ in found.others] == ["5"]
    assert "6 training problems, of which `train` takes 2" in found.which
    settings = settings._replace(eval=settings.eval._replace(num_problems=4))
    found = fresh_problems(settings, task, 2, 16, 8)
    assert [problem.title for problem, _ in found.problems] == ["4", "5"]
    assert "the held-out table asks 2 of the others" in found.which
    sweep = Sweep([], 0, found.problems, found.others, 1, 8, "")  # nothing else is left
    asked = [[problem.title for _, problem, _ in sweeping.elsewhere(sweep, p)] for p in (0, 1)]
    assert asked == [["5"], ["4"]]
    with pytest.raises(ValueError, match="needs 3 training problems, and 2 are left"):
        fresh_problems(settings, task, 3, 16, 8)


def test_a_sweep_without_passages_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    path = tmp_path / "passages.json"
    path.write_text(json.dumps({"train": [passage(1), passage(2)], "eval": [passage(8)]}))
    command = ["tune", "--config", CONFIG, "--workdir", str(tmp_path / "w")]
    changes = "task.name=knowledge", f"task.source={path}", "model.source=no/such/model"
    options = [word for change in (*changes, "outer.num_steps=1") for word in ("--set", change)]
    assert cli.main([*command, *options, "--set", "eval.num_problems=1"]) == 2
    found = capsys.readouterr().err
    assert "needs 2 training problems, and 0 are left: the task" in found
    assert found.count("\n") == 1 and not (tmp_path / "w").exists()


def test_a_task_whose_gold_answers_are_not_scored_is_refused(tmp_path, capsys):
    command = ["tune", "--config", "configs/arc_tiny.py", "--workdir", str(tmp_path / "w")]
    assert cli.main(command) == 2
    assert "task.name = 'arc': it asks each question in several ways" in capsys.readouterr().err


def test_a_sweep_goes_on_with_the_same_settings_and_questions_alone(tmp_path):
    sweep, _ = made_up()
    sweep = sweep._replace(folder=str(tmp_path))
    tune._claim(sweep)
    tune._refuse_other_sweep(sweep)
    (problem, exam), *rest = sweep.problems
    changed = [(problem, exam._replace(questions=exam.questions[1:])), *rest]
    with pytest.raises(ValueError, match="holds another sweep: questions = "):
        tune._refuse_other_sweep(sweep._replace(problems=changed))
    fewer = sweep._replace(settings=sweep.settings[:2])
    with pytest.raises(ValueError, match=r"settings\[2\] = .*1e-3'\], asked for None"):
        tune._refuse_other_sweep(fewer)


def test_the_best_is_printed_as_a_shell_takes_it():
    texts = ["inner.targets=('q_proj', 'v_proj')", "inner.learning_rate=1e-3"]
    printed = tune._as_options({"set": texts})
    assert shlex.split(printed) == ["--set", texts[0], "--set", texts[1]]


def test_what_self_edits_choose_themselves_cannot_be_swept():
    config = load_config(CONFIG)
    found = sweeps.candidates(config, ["inner.learning_rate=1e-3,1e-2"], None)
    settings = [Setting(one.overrides, settings_of(one.config)) for one in found]
    edit = SelfEdit("p", "", "", ("text",), learning_rate=1e-4, num_epochs=3)
    with pytest.raises(ValueError, match="inner.learning_rate: the self-edits of task 'facts'"):
        sweeping._refuse_chosen(Sweep(settings, 0, [], [], 1, 1, ""), [[edit]])
    sweeping._refuse_chosen(Sweep(settings[:1], 0, [], [], 1, 1, ""), [[edit]])


def test_what_is_data_shares_a_program_and_styles_share_none():
    config = load_config("configs/quickstart.py")
    over = ["inner.num_epochs=2,4", "inner.batch_size=1,2", "task.style=rewrite,self-qa"]
    found = sweeps.candidates(config, [*over, "inner.rank=8,16"], None)[1:]
    settings = [Setting(one.overrides, settings_of(one.config)) for one in found]
    groups = sweeping.groups_of(settings)
    assert sorted(map(len, groups)) == [4, 4, 4, 4]
    sweep = Sweep(settings, 0, [], [], 1, 1, "")
    like = [sweeping.texts_of_group(sweep, g) for g in range(4)]
    assert like == [0, 0, 2, 2]  # two ranks share a style's self-edits
    assert sweeping.stages_settings(settings, groups[0]).inner.batch_size == 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_is_data_has_the_rates_of_one_that_is_not(name):
    rate = jax.jit(partial(scheduled_rate, warmup_steps=2))
    expected = jax.jit(partial(scheduled_rate, name, warmup_steps=2))
    for step in range(9):
        numbers = jnp.float32(3e-3), jnp.int32(step), jnp.int32(8)
        assert rate(jnp.int32(SCHEDULES.index(name)), *numbers) == expected(*numbers)


def test_jobs_side_by_side_have_all_a_schedule_or_none():
    text = text_of(range(1, 9))
    jobs = [Job(((text,),), 1e-3, schedule=name) for name in ("cosine", "linear")]
    (batch,) = packing.pack([*jobs, Job((), 0.0)])
    assert batch.schedule.tolist() == [SCHEDULES.index("cosine"), SCHEDULES.index("linear"), 0]
    (batch,) = packing.pack([Job(((text,),), 1e-3), Job((), 0.0)])
    assert batch.schedule is None
    with pytest.raises(ValueError, match="only some have a schedule"):
        packing.pack([jobs[0], Job(((text,),), 1e-3)])


def load_config_problems(count):
    return make_task("facts").load("train")[:count]


def made_up(num_problems=4):
    """Return a sweep of three settings: one that diverged, one that forgets, the config's own."""
    config = load_config(CONFIG)
    found = sweeps.candidates(config, ["inner.learning_rate=1e-1,1e-2,1e-3"], None)
    settings = [Setting(one.overrides, settings_of(one.config)) for one in found]
    names = [f"p{p}" for p in range(num_problems)]
    base = [Scores(name, 0.25, -3.0 - 0.1 * p, 0.5, -2.0) for p, name in enumerate(names)]

    def row(gain, loss):
        return [
            Scores(one.problem, 0.5, one.log_likelihood + gain + 0.01 * p, 0.0, -2.0 - loss, 2.0, 1)
            for p, one in enumerate(base)
        ]

    rows = [row(-math.inf, math.inf)[:2], row(1.0, 0.5), row(0.5, 0.0)]
    problems = load_config_problems(num_problems)
    sweep = Sweep(settings, 2, problems, problems, 2, 1, "")
    return sweep, Found(base, rows, [0, 0, 0], 1)


def test_the_table_pairs_by_passage_and_names_what_diverged_and_what_forgets(tmp_path):
    sweep, found = made_up()
    summary = summarize(sweep, found)
    json.dumps(summary, allow_nan=False)
    diverged, forgets, own = summary["settings"]
    gain = forgets["log_likelihood_minus_base"]
    values = np.array([1.0, 1.01, 1.02, 1.03])
    half = 3.182446 * values.std(ddof=1) / 2  # Student's t of 3 degrees of freedom
    assert gain["mean"] == pytest.approx(1.015)
    np.testing.assert_allclose(gain["interval"], [1.015 - half, 1.015 + half], rtol=1e-6)
    assert forgets["log_likelihood_minus_own"]["mean"] == pytest.approx(0.5)
    assert forgets["forgets"] and not own["forgets"] and diverged["diverged"]
    assert diverged["log_likelihood"]["mean"] is None
    assert describe_mean([1.0, 2.0])["interval"] is None  # two tell too little
    assert summary["best"] == 1 and summary["best_that_forgets_nothing"] == 2
    text = to_markdown(summary, "From here.")
    assert "| **best**, forgets, 4 rejected |" in text and "| diverged, 2 rejected |" in text
    assert text.endswith("From here.\n")
    assert "+1.01 [+0.99, +1.04]" in text or "+1.02 [+0.99, +1.04]" in text
    plot(summary, str(tmp_path / "tune.png"))
    assert (tmp_path / "tune.png").read_bytes()[:4] == b"\x89PNG"


def test_a_setting_that_diverged_once_never_goes_on():
    _, found = made_up()
    assert sweeping.best_of(found.settings, [0, 1, 2], 2) == [1, 2]
    assert sweeping.best_of(found.settings, [0, 1, 2], 1) == [1]


def test_a_written_config_has_functions_by_import_and_refuses_those_of_the_file(
    tmp_path, monkeypatch
):
    mine = "import optax\n\n\ndef lion(rate):\n    return optax.sgd(rate)\n"
    (tmp_path / "other_lion.py").write_text(mine)
    monkeypatch.syspath_prepend(str(tmp_path))
    both = ["inner.optimizer=optax:lion", "outer.optimizer=other_lion:lion"]
    text = sweeps.config_source(load_config(CONFIG, both), "One.")
    (tmp_path / "new.py").write_text(text)
    found = load_config(str(tmp_path / "new.py"))
    assert found.inner.optimizer is optax.lion
    assert found.outer.optimizer.__module__ == "other_lion"
    own = tmp_path / "own.py"
    own.write_text(
        "import optax\nfrom seal_jax import default_config\n\n\ndef mine(rate):\n"
        "    return optax.sgd(rate)\n\n\ndef get_config():\n    config = default_config()\n"
        "    config.inner.optimizer = mine\n    return config\n"
    )
    with pytest.raises(ConfigError, match="inner.optimizer is the function mine of the given"):
        sweeps.config_source(load_config(str(own)), "One.")
