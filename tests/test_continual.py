"""`seal-jax continual`: a whole run, resumed, beside a slow one; its remedies; what it refuses."""

import json
from signal import SIGKILL

import jax
import numpy as np
import pytest
from tiny_run import CONFIG, run_process

from seal_jax import keys
from seal_jax.commands import main as cli
from seal_jax.commands.continual import check, draw, learn_in_sequence
from seal_jax.config.load import load_config
from seal_jax.config.setup import make_work, settings_of
from seal_jax.config.workdir import refuse_other_kind
from seal_jax.continual.asking import ask
from seal_jax.continual.experiment import begin, one_edit, report, restore, run_sequences
from seal_jax.continual.remedies import REMEDIES
from seal_jax.continual.remedies.null_space import projectors_of
from seal_jax.hosts.files import read_jsonl
from seal_jax.inner import packing
from seal_jax.inner.texts import make_job
from seal_jax.models import lora
from seal_jax.models.own_kernels import model_at
from seal_jax.outer import answers
from seal_jax.outer.stages import exam_prompts, gold_texts, parse, write
from seal_jax.runs import checkpoint as checkpoints

pytest_plugins = ["tiny_fixtures"]

S, N, NUM_CONTROL = 2, 3, 2
SIZES = (
    *(f"continual.num_sequences={S}", f"continual.num_edits={N}"),
    *(f"continual.num_control={NUM_CONTROL}", "model.dtype=float32"),
)
REPLAY = "continual.remedies=replay,null_space"


def arguments(folder, *changes, more=()):
    settings = [word for change in (*SIZES, *changes) for word in ("--set", change)]
    return ["continual", "--config", CONFIG, "--workdir", str(folder), *settings, *map(str, more)]


def make(*changes):
    """Return the work of a config with these changes, and its control set."""
    config = load_config(CONFIG, [*SIZES, *changes])
    check(config)
    drawn = draw(config)
    return make_work(settings_of(config), drawn.problems), drawn.control


def without_seconds(folder):
    """Return a run's ledger without what no two runs share."""
    lines = read_jsonl(folder / "continual.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


@pytest.fixture(scope="module", autouse=True)
def one_device(compiled):
    from tiny_fixtures import on_one_device

    with on_one_device():
        yield


@pytest.fixture(scope="module")
def plain(one_device, tmp_path_factory):
    """Return the folder of a run with plain merging; only read it."""
    folder = tmp_path_factory.mktemp("continual") / "plain"
    assert cli.main(arguments(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def remedied(plain):
    """Return the folder of a run with a memory and stores, compared with the plain one."""
    folder = plain.parent / "remedied"
    assert cli.main(arguments(folder, REPLAY, more=("--against", plain))) == 0
    return folder


def test_a_run_leaves_its_figures_and_is_done(plain, capsys):
    names = {path.name for path in plain.iterdir()} - {".lock"}
    assert names == {
        *("config.json", "manifest.json", "sequences.json", "continual.jsonl", "edits.jsonl"),
        *("summary.json", "summary.md", "summary.png", "checkpoints"),
    }
    drawn = json.loads((plain / "sequences.json").read_text())
    assert [len(one) for one in drawn["sequences"]] == [N] * S
    assert len(drawn["control"]) == NUM_CONTROL
    assert len({*sum(drawn["sequences"], []), *drawn["control"]}) == S * N + NUM_CONTROL
    lines = read_jsonl(plain / "continual.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["problems"] for line in lines[1:]] == [
        *map(list, zip(*drawn["sequences"], strict=True))
    ]
    summary = json.loads((plain / "summary.json").read_text())
    assert (summary["kind"], summary["name"]) == ("continual", "plain merging")
    dense = np.array([line["log_likelihood"] for line in lines])  # [N+1 S N]
    assert summary["log_likelihood"]["final"]["mean"] == pytest.approx(dense[-1].mean())
    right_after = [dense[k + 1, :, k].mean() for k in range(N)]
    assert summary["log_likelihood"]["diagonal"]["mean"] == pytest.approx(np.mean(right_after))
    assert (plain / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["verify", str(plain)]) == 0
    assert "checkpoints/3" in capsys.readouterr().out
    ledger = (plain / "continual.jsonl").read_bytes()
    assert cli.main(arguments(plain)) == 0
    found = capsys.readouterr()
    assert "is done already; nothing was run" in found.err + found.out
    assert (plain / "summary.md").read_text() in found.out
    assert (plain / "continual.jsonl").read_bytes() == ledger


def test_two_runs_are_compared(plain, remedied):
    found = json.loads((remedied / "comparison.json").read_text())
    assert found["minus"] == str(plain) and [*found["runs"]] == [str(plain), str(remedied)]
    row = found["runs"][str(remedied)]
    assert row["name"] == "replay + null_space" and row["differences"]["final"]["mean"] == 0
    assert row["bytes_ratio"] > 1
    text = (remedied / "comparison.md").read_text()
    assert "minus plain merging" in text and "replay + null_space (remedied)" in text
    mine, others = (read_jsonl(one / "continual.jsonl") for one in (remedied, plain))
    # The first edit has no memory yet, and an empty null space: it is the same.
    for key in ("log_likelihood", "loss_after"):
        assert mine[1][key] == others[1][key] and mine[2][key] != others[2][key]
    assert mine[1]["replayed"] == 0 < mine[2]["replayed"]


def test_a_killed_run_goes_on_to_the_same_end(remedied, tmp_path):
    """Killed in its second edit, told to end in it the next time, and then ended."""
    folder = tmp_path / "run"
    line = f"{folder}/continual.jsonl:3"
    killed = run_process(*arguments(folder, REPLAY), kill=line, check=False)
    assert killed.returncode == -SIGKILL
    assert len(read_jsonl(folder / "edits.jsonl")) == 2 * S  # the second edit's are there already
    told = run_process(*arguments(folder, REPLAY), tell=line)
    assert "the same command resumes the run" in told.stderr
    assert [line["step"] for line in read_jsonl(folder / "continual.jsonl")] == [0, 1, 2]
    assert not (folder / "summary.json").exists()
    assert cli.main(arguments(folder, REPLAY)) == 0
    assert without_seconds(folder) == without_seconds(remedied)
    assert (folder / "edits.jsonl").read_bytes() == (remedied / "edits.jsonl").read_bytes()
    # The record of a checkpoint has a hash of every array, and the memories.
    last, same = (one / f"checkpoints/{N}/position/metadata" for one in (folder, remedied))
    record = json.loads(last.read_text())
    assert record == json.loads(same.read_text())
    assert {*record["record"]["leaves"]} == {"models", "stores"}
    assert all(one["entries"] for one in record["record"]["position"]["memories"])
    assert cli.main(["verify", str(folder)]) == 0


def test_it_is_a_slow_loop_over_sequences(plain):
    """Each sequence by itself: an ordinary model, one adapter, merged after every edit."""
    work, _ = make()
    stages, inner = work.stages, work.stages.settings.inner
    written = {(x["step"], x["edit"]): x["text"] for x in read_jsonl(plain / "edits.jsonl")}
    lines = read_jsonl(plain / "continual.jsonl")
    with checkpoints.make_manager(str(plain / "checkpoints"), keep=1, best=0) as manager:
        learner, step = restore(work, begin(work), manager, str(plain))
    assert step == N
    for s, sequence in enumerate(work.sequences):
        params = stages.model.params
        prompts = [prompt for pair in sequence for prompt in exam_prompts(stages, *pair)]
        golds = [gold_texts(stages, *pair) for pair in sequence]
        for k, pair in enumerate(sequence):
            path = 0, keys.SAMPLE, keys.CONTINUAL_STEP + k, keys.number_of(pair[0].id), s
            _, (text,) = write(stages, params, [stages.task.edit_prompt(pair[0])], [path], "")
            assert text == written[k + 1, s]
            ((edit,),) = parse(stages, [pair], [text])
            job = make_job(
                [stages.encode(one, False) for one in edit.training_texts],
                num_epochs=inner.num_epochs,
                batch_size=inner.batch_size,
                learning_rate=inner.learning_rate,
                key=(0, keys.SHUFFLE, keys.CONTINUAL_STEP + k, s),
            )
            batches = packing.pack([job], tokens_per_step=inner.tokens_per_step, pad_id=256)
            fresh = stages.init_adapters(keys.fold([(0, keys.ADAPTER, keys.CONTINUAL_STEP + k, s)]))
            adapters, _ = stages.inner_update(params, fresh, jax.device_put(batches))
            params = lora.merge(params, adapters)
            scores = answers.mean_logp(
                stages.model, params, None, [sum(golds, [])], mesh=stages.mesh
            )
            means = np.reshape(scores, (N, -1)).mean(axis=1)
            np.testing.assert_allclose(lines[k + 1]["log_likelihood"][s], means, atol=2e-5)
        ends = model_at(learner.params, s)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), ends, params)
        moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), params, stages.model.params)
        assert max(jax.tree.leaves(moved)) > 1e-3
        given = [
            answers.ask(stages.model, one, None, [prompts], stages.mesh, stages.settings.answer)
            for one in (ends, params)
        ]
        assert given[0] == given[1] and any(given[0][0])


def edits(work, folder, number=2, params=None):
    """Make the first edits; return the models after them, and each edit's line of the ledger."""
    lines = []
    with jax.transfer_guard("disallow"):
        learner = begin(work)
        for k in range(number):
            learner, line = one_edit(work, learner, k, str(folder))
            lines.append(line)
    return learner, lines


def known(work, learner):
    """Return how likely each sequence's gold answers are, f64[S N]."""
    with jax.transfer_guard("disallow"):
        return ask(work, learner, work.sequences).log_likelihood


def test_a_sequence_knows_nothing_of_its_neighbors(remedied, tmp_path):
    work, control = make(REPLAY)
    lines = run_sequences(work._replace(sequences=work.sequences[:1]), control, str(tmp_path))
    for alone, line in zip(lines, read_jsonl(remedied / "continual.jsonl"), strict=True):
        for key in ("log_likelihood", "perplexity", "loss_after", "memory_tokens"):
            if key in line:
                np.testing.assert_allclose(alone[key][0], line[key][0], rtol=2e-5)


# Together they have every remedy.
COMPOSITIONS = (
    *("replay,gate", "bank", "kl,trim", "distill,ema", "replay,a_gem,scale"),
    *("recall", "ogd", "ewc", "o_lora,slao", "null_space"),
)
SLOW = COMPOSITIONS[2:]


def test_every_remedy_is_tried():
    assert {*",".join(COMPOSITIONS).split(",")} == {*REMEDIES}


@pytest.mark.parametrize(
    "names",
    [pytest.param(x, marks=pytest.mark.long) if x in SLOW else x for x in COMPOSITIONS],
)
def test_a_remedy_changes_the_second_edit(names, plain, tmp_path):
    work, _ = make(
        f"continual.remedies={names}",
        "continual.remedy_kwargs={'recall': {'agrees': 0.0}}" if names == "recall" else "seed=0",
    )
    learner, lines = edits(work, tmp_path)
    found, expected = known(work, learner), read_jsonl(plain / "continual.jsonl")
    assert np.isfinite(found).all() and not any(sum((x["rejected"] for x in lines), []))
    first, second = (line["loss_after"] for line in lines)
    assert all(map(np.isfinite, (*first, *second)))
    own = [leaf for leaf in jax.tree.leaves(learner.params) if leaf.ndim == 3]
    assert all(np.isfinite(leaf).all() for leaf in own)
    if names == "bank":  # nothing is merged, and yet each edit is known
        base = jax.tree.leaves(begin(work).params)
        same = zip(base, jax.tree.leaves(learner.params), strict=True)
        assert all(np.array_equal(x, y) for x, y in same)
        unedited = np.array(expected[0]["log_likelihood"])
        assert (found[:, :2] > unedited[:, :2] + 0.01).all()
        return
    assert np.abs(found - expected[2]["log_likelihood"]).max() > 1e-4
    if "replay" in names or "kl" in names or "recall" in names:
        assert lines[0]["replayed"] == 0 < lines[1]["replayed"]
    if "ema" in names:
        assert jax.tree.structure(learner.answers) == jax.tree.structure(learner.params)


def test_no_decomposition_on_a_cpu_is_of_a_stack():
    """Those of several stacks at once may wait for each other for ever."""
    squares = {"attn": {name: np.ones((3, 2, 8, 8), np.float32) for name in ("q_proj", "v_proj")}}
    text = jax.jit(projectors_of).lower(squares).as_text()
    calls = [line for line in text.splitlines() if "syevd" in line]
    assert calls and all("tensor<8x8xf32>" in line for line in calls)
    assert not any("x8x8xf32>" in line for line in calls)


def test_a_gate_that_refuses_everything_is_counted_and_said(tmp_path, capsys):
    """It may choose no other scale."""
    folder, options = tmp_path / "run", "{'gate': {'scales': (0.0,)}}"
    changes = "continual.remedies=gate", f"continual.remedy_kwargs={options}"
    assert cli.main(arguments(folder, *changes)) == 0
    lines = read_jsonl(folder / "continual.jsonl")
    assert [line["refused"] for line in lines[1:]] == [S, 2 * S, 3 * S]
    said = f"The gate refused {S * N} of {S * N} trained edits: the models are as they began."
    assert said in capsys.readouterr().out and said in (folder / "summary.md").read_text()
    assert lines[-1]["log_likelihood"] == lines[0]["log_likelihood"]


def test_self_edits_that_are_all_rejected_train_nothing(plain, tmp_path, capsys):
    folder = tmp_path / "run"
    command = arguments(folder, "task.max_bytes=1", "continual.remedies=o_lora,replay")
    assert cli.main(command) == 0
    assert f"{S * N} of {S * N} self-edits were rejected" in capsys.readouterr().out
    lines = read_jsonl(folder / "continual.jsonl")
    unedited = read_jsonl(plain / "continual.jsonl")[0]["log_likelihood"]
    for line in lines:
        np.testing.assert_allclose(line["log_likelihood"], unedited, atol=1e-6)


REFUSED = {
    "continual.remedies=reply": "continual.remedies has 'reply'; did you mean 'replay'?",
    "continual.remedies=replay,replay": "continual.remedies has 'replay' 2 times",
    "continual.remedies=trim,scale": "'trim' and 'scale' contradict: both decide what is kept",
    "continual.remedies=a_gem,ogd": "'a_gem' and 'ogd' contradict: without the stored",
    "continual.remedies=ogd,slao": "'ogd' and 'slao' contradict: one needs adapters that begin",
    "continual.remedies=bank,replay": "'bank' and 'replay' contradict",
    "continual.remedy_kwargs={'gate': {}}": "remedy_kwargs has 'gate': continual.remedies is ()",
    "continual.memory_tokens=0": "continual.memory_tokens = 0: needs an integer >= 1",
    "continual.num_edits=31": "of 31 problems beside a control set of 2 needs 33 problems; the",
    "inner.quantize=int8": "inner.quantize = 'int8': `continual` merges edits into kernels",
    "inner.objective=distill": "expected continual.remedies = ('distill',) and inner.objective",
}
REFUSED_WITH = {
    ("a_gem", "inner.accumulation=2"): "inner.accumulation = 2: 'a_gem' needs the memory's",
    ("kl", "inner.pad_loss=sampled"): "inner.pad_loss = 'sampled': texts as 'kl' takes them",
    ("ogd", "inner.optax_name=contrib.schedule_free_adamw"): "it evaluates other parameters than",
    ("replay", "continual.remedy_kwargs={'replay': 3}"): "replay = 3: needs a dict",
    ("replay", "continual.remedy_kwargs={'replay': {'shares': 0.5}}"): "did you mean 'share'?",
    ("replay", "continual.remedy_kwargs={'replay': {'share': 1}}"): "share is 1: expected more",
    ("replay", "continual.remedy_kwargs={'replay': {'share': 'x'}}"): "'x': needs a number",
    ("ogd", "continual.remedy_kwargs={'ogd': {'num': 2.5}}"): "num = 2.5: needs a whole number",
    ("kl,distill", "continual.remedy_kwargs={'kl': {'top': 4}}"): "tell apart 4 tokens for the",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(((change,), message) for change, message in REFUSED.items()),
        *(((f"continual.remedies={x}", y), message) for (x, y), message in REFUSED_WITH.items()),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, tuple) else "",
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(changes, message, tmp_path, capsys):
    folder = tmp_path / "run"
    assert cli.main(arguments(folder, "model.source=no/such/model", *changes)) == 2
    found = capsys.readouterr().err
    assert message in found and found.count("\n") == 1
    assert not folder.exists()


def test_a_task_that_asks_in_several_ways_is_refused(tmp_path, capsys):
    command = ["continual", "--config", "configs/arc_tiny.py", "--workdir", str(tmp_path / "w")]
    assert cli.main(command) == 2
    assert "task.name = 'arc': it asks each question in several ways" in capsys.readouterr().err


def test_other_folders_and_other_sequences_are_refused(plain, tmp_path, capsys):
    def refused(*words):
        assert cli.main(list(words)) == 2
        found = capsys.readouterr().err
        assert found.startswith("seal-jax continual: ")
        return found

    assert "continual.remedies: [] -> " in refused(*arguments(plain, REPLAY))
    assert "began with no --policy, and --policy x is asked for" in refused(
        *arguments(plain, more=("--policy", "x"))
    )
    settings = arguments(plain)[1:]
    assert cli.main(["train", *settings]) == 2
    assert "is the folder of a run of `continual`" in capsys.readouterr().err
    (tmp_path / "train" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="is the folder of a training run"):
        refuse_other_kind(str(tmp_path / "train"), "continual")
    new = tmp_path / "new"
    missing = refused(*arguments(new, more=("--against", tmp_path)))
    assert "no summary.json: expected a finished run" in missing
    longer = "continual.num_edits=4"
    assert "it had other sequences" in refused(*arguments(new, longer, more=("--against", plain)))
    twice = refused(*arguments(new, more=("--against", plain, plain)))
    assert "asked for twice" in twice
    assert not new.exists()


def test_a_model_that_is_not_finite_any_more_knows_nothing(plain, tmp_path):
    """Its likelihoods are null in the ledger: never a likelihood of 1, nor left out of a mean."""
    lines = read_jsonl(plain / "continual.jsonl")
    for name in ("log_likelihood", "control/log_likelihood", "perplexity"):
        lines[-1][name][1] = [None] * N if name == "log_likelihood" else None
    work, _ = make()
    found = report(work, lines, str(tmp_path))
    assert (
        "In 1 sequences the model is not finite any more" in (tmp_path / "summary.md").read_text()
    )
    assert found["log_likelihood"]["final"]["mean"] < -1e8
    assert found["figures"]["perplexity_final"]["why"] == "not finite"


def test_replay_forgets_less(facts_model, tmp_path):
    """A model that writes notes: of what it knows right after an edit, plain merging keeps less."""
    sizes = {"num_sequences": 4, "num_edits": 6, "num_control": 2, "ask_every": 6}
    changes = [f"continual.{name}={size}" for name, size in sizes.items()]
    changes += [f"model.source={facts_model}", "inner.num_epochs=5", "inner.learning_rate=1e-2"]
    changes += ["inner.batch_size=8"]
    half = ["continual.remedies=replay", "continual.remedy_kwargs={'replay': {'share': 0.5}}"]
    found = []
    for number, more in enumerate(([], half)):
        config = load_config("configs/continual_tiny.py", [*changes, *more])
        run = learn_in_sequence(config, str(tmp_path / str(number)))
        figures = {**run["figures"], "likelihood": run["log_likelihood"]["final"]}
        found.append({name: figure["mean"] for name, figure in figures.items()})
    plain, replay = found
    assert plain["unedited"] == replay["unedited"] > plain["final"] < plain["diagonal"]
    assert plain["backward_transfer"] < replay["backward_transfer"]
    assert plain["final"] < replay["final"]
    assert plain["likelihood"] < replay["likelihood"] - 0.15  # without ties, so less by chance
