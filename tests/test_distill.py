"""A teacher's distributions as what the inner loop learns from, against dense computations."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import assert_same_run, killed_at
from tiny_run import CONFIG as TINY_RUN
from tiny_run import run_process, train_arguments

from seal_jax.config import ConfigError, load_config
from seal_jax.config.setup import make_stages, settings_of
from seal_jax.hosts.files import read_jsonl
from seal_jax.inner.packing import Layout, job_losses, pack
from seal_jax.inner.teachers import Lesson, with_teachers
from seal_jax.inner.texts import Job, text_of
from seal_jax.inner.update import make_inner_update
from seal_jax.models import lora
from seal_jax.models.byte_tokenizer import ByteTokenizer
from seal_jax.models.config import ModelConfig
from seal_jax.models.divergence import DIVERGENCES, likeliest, token_costs
from seal_jax.models.logits import unembed
from seal_jax.models.model import Model
from seal_jax.models.own_kernels import model_at, own_kernels
from seal_jax.models.transformer import forward, init_params
from seal_jax.optim import make_optimizer
from seal_jax.outer.stages import check_prompts, parse
from seal_jax.outer.teaching import teach
from seal_jax.outer.waves import Place, Wave, _job_of, inner_runs
from seal_jax.outer.waves import pack as pack_wave
from seal_jax.sharding import make_mesh
from seal_jax.tasks.task import SelfEdit
from seal_jax.types import Teacher

pytest_plugins = ["tiny_fixtures"]
M, D, V = 11, 8, 13
CONFIG = ModelConfig(
    vocab_size=260,
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    max_length=64,
)
LAYOUT = Layout((32, 64), chunk=8)


class Head(NamedTuple):
    config: ModelConfig
    params: dict
    hidden: jax.Array
    teacher_hidden: jax.Array
    targets: jax.Array
    wanted: jax.Array


@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(0)
    config = dataclasses.replace(CONFIG, vocab_size=V, embed_dim=D, tie_embeddings=True)
    states = jnp.asarray(rng.normal(size=(2, M, D)), jnp.float32)
    params = {"embed": {"embedding": jnp.asarray(rng.normal(size=(V, D)), jnp.float32)}}
    wanted = jnp.asarray(rng.random(M) < 0.7)
    return Head(config, params, *states, jnp.asarray(rng.integers(0, V, M)), wanted)


@partial(jax.jit, static_argnums=(0, 4))
def _teacher_of(config, params, hidden, wanted, top):
    return likeliest(config, params, hidden, wanted, top), unembed(config, params, hidden)


def teacher_of(head, hidden, top):
    return _teacher_of(head.config, head.params, hidden, jnp.ones(len(hidden), bool), top)


def dense(head, teacher_logits, params, hidden, top, divergence):
    """Return the divergence over K + 1 outcomes from whole distributions, as the formula has it."""
    p = jax.nn.softmax(teacher_logits)
    q = jax.nn.softmax(unembed(head.config, params, hidden))
    chosen = jnp.argsort(-p, axis=-1)[:, :top]
    p_k, q_k = (jnp.take_along_axis(x, chosen, axis=-1) for x in (p, q))
    if top < V:
        p_k, q_k = (jnp.append(x, 1 - x.sum(-1, keepdims=True), axis=-1) for x in (p_k, q_k))
    if divergence == "reverse":
        p_k, q_k = q_k, p_k
    return jnp.where(head.wanted, (p_k * jnp.log(p_k / q_k)).sum(-1), 0.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("top", "tile"), [(3, 4), (V, 1024)])
def test_costs_and_gradients_are_those_of_whole_distributions(head, top, tile, divergence):
    teacher, logits = teacher_of(head, head.teacher_hidden, top)
    shares = jnp.exp(teacher.logp).sum(axis=-1)
    np.testing.assert_allclose(shares, 1, rtol=1e-5)
    factors = jnp.linspace(-1.0, 2.0, M)  # other gradients for each token

    def fast(params, hidden):
        given = head.targets, teacher, head.wanted, divergence
        costs = token_costs(head.config, params, hidden, *given, tile=tile)
        return (factors * costs).sum(), costs

    def slow(params, hidden):
        costs = dense(head, logits, params, hidden, top, divergence)
        return (factors * costs).sum(), costs

    @jax.jit
    def both(*arrays):
        return [jax.grad(f, argnums=(0, 1), has_aux=True)(*arrays) for f in (fast, slow)]

    found, expected = both(head.params, head.hidden)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)
    assert (found[1] >= -1e-6).all() and found[1].max() > 0.1
    for one, other in zip(*map(jax.tree.leaves, (found[0], expected[0])), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_is_the_teacher_costs_nothing_and_a_text_without_one_its_likelihood(
    head, divergence
):
    teacher, logits = teacher_of(head, head.hidden, 3)
    ids = teacher.ids.at[::2].set(-1)
    mixed = Teacher(ids, teacher.logp.at[::2].set(0.0))
    every = jnp.ones(M, bool)
    given = head.config, head.params, head.hidden, head.targets, mixed, every, divergence
    costs = token_costs(*given)
    np.testing.assert_allclose(costs[1::2], 0, atol=1e-6)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), head.targets[:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(costs[::2], -chosen[::2], rtol=1e-5)


def test_the_likeliest_tokens_do_not_depend_on_tiles(head):
    whole, _ = teacher_of(head, jnp.tile(head.hidden, (100, 1)), 3)
    _, logits = teacher_of(head, head.hidden, 3)
    values, ids = jax.lax.top_k(jax.nn.log_softmax(logits), 3)
    np.testing.assert_array_equal(whole.ids, np.tile(ids, (100, 1)))
    np.testing.assert_allclose(whole.logp[:, :3], np.tile(values, (100, 1)), rtol=1e-5, atol=1e-6)
    rest = np.log1p(-np.exp(values).sum(-1))
    np.testing.assert_allclose(whole.logp[:, 3], np.tile(rest, 100), rtol=1e-4)


def test_what_does_not_fit_is_refused(head):
    teacher = Teacher(jnp.zeros((M, V + 1), jnp.int32), jnp.zeros((M, V + 2)))
    given = head.config, head.params, head.hidden, head.targets
    with pytest.raises(ValueError, match="a teacher of 14 tokens: expected at most the model's 13"):
        token_costs(*given, teacher, head.wanted, "forward")
    with pytest.raises(ValueError, match="divergence='both': expected one of forward, reverse"):
        token_costs(*given, teacher, head.wanted, "both")
    texts = [
        text_of([1, 2])._replace(teacher=Teacher(np.zeros((2, k), np.int32), np.zeros((2, k + 1))))
        for k in (2, 3)
    ]
    with pytest.raises(ValueError, match="teachers of 2, 3 tokens: expected one number for all"):
        pack([Job(((text,),), 0.1) for text in texts], layout=LAYOUT)


# --- texts of a whole model ---


@pytest.fixture(scope="module")
def model():
    """Return a random model whose next token depends much on what it has read."""
    params = jax.jit(partial(init_params, CONFIG))(jax.random.key(0))
    params = jax.tree.map(lambda x: 8.0 * x if x.ndim == 2 else x, params)
    return Model(CONFIG, params, ByteTokenizer())


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def lessons(model):
    encode = model.tokenizer.encode
    contexts = [tuple(encode(passage)) for passage in ("a red cave. ", "gold fish are huge. ")]
    texts = [text_of(encode(text)) for text in ("it is red", "a cave", "fish")]
    # Of a text that does not begin as the context does, every token is read behind it.
    texts.append(text_of(encode("gold", start=False), 2))
    return [
        [Lesson(texts[0], contexts[0]), Lesson(texts[1], contexts[0]), Lesson(texts[1])],
        [Lesson(texts[2], contexts[1]), Lesson(texts[3], contexts[1])],
    ]


@pytest.fixture(scope="module")
def taught(model, mesh, lessons):
    return with_teachers(model, model.params, lessons, top=4, mesh=mesh)


def test_a_teacher_reads_the_context_and_then_the_text(model, mesh, lessons, taught):
    by_turns = with_teachers(model, model.params, lessons, top=4, mesh=mesh, max_rows=2)
    logits_of = jax.jit(partial(forward, CONFIG))
    for group, texts, others in zip(lessons, taught, by_turns, strict=True):
        assert len(texts) == len(group)
        for (text, context), found, other in zip(group, texts, others, strict=True):
            assert found._replace(teacher=None) == text
            np.testing.assert_array_equal(found.teacher.ids, other.teacher.ids)
            np.testing.assert_allclose(found.teacher.logp, other.teacher.logp, atol=1e-5)
            own = text.tokens[context != () and text.tokens[0] == model.tokenizer.bos :]
            tokens = np.zeros((1, 32), np.int32)
            tokens[0, : len(context) + len(own)] = [*context, *own]
            logp = jax.nn.log_softmax(logits_of(model.params, jnp.asarray(tokens))[0])
            for t, counts in enumerate(text.loss_mask):
                if not counts:
                    assert (found.teacher.ids[t] == -1).all()
                    continue
                expected = logp[len(context) + len(own) - len(text.tokens) + t - 1]
                values, ids = jax.lax.top_k(expected, 4)
                np.testing.assert_array_equal(found.teacher.ids[t], ids)
                np.testing.assert_allclose(found.teacher.logp[t, :4], values, atol=1e-4)
    assert with_teachers(model, model.params, [[], []], top=4, mesh=mesh) == [[], []]


def test_each_group_is_taught_by_the_model_of_its_sequence(model, mesh, lessons, taught):
    own = own_kernels(model.params, ("q_proj", "up_proj"), 2)
    own = jax.tree.map(
        lambda x: x * jnp.array([1.0, 0.5])[:, None, None] if x.ndim == 3 else x, own
    )
    found = with_teachers(model, own, lessons, top=4, mesh=mesh)
    other = model_at(own, 1)
    alone = with_teachers(model, other, [lessons[1]], top=4, mesh=mesh)
    for text, expected in zip((*found[0], *found[1]), (*taught[0], *alone[0]), strict=True):
        np.testing.assert_array_equal(text.teacher.ids, expected.teacher.ids)
        np.testing.assert_allclose(text.teacher.logp, expected.teacher.logp, atol=1e-4)
    assert np.abs(found[1][0].teacher.logp - taught[1][0].teacher.logp).max() > 1e-2
    with pytest.raises(ValueError, match="rows in 1 groups"):
        with_teachers(model, own, lessons[:1], top=4, mesh=mesh)


def test_what_no_teacher_can_read_is_refused(model, mesh):
    long = Lesson(text_of(range(1, 60)), tuple(range(1, 20)))
    with pytest.raises(ValueError, match="has 78 tokens: expected at most 64"):
        with_teachers(model, model.params, [[long]], top=4, mesh=mesh)
    with pytest.raises(ValueError, match="top = 300: expected from 1 to the model's 260"):
        with_teachers(model, model.params, [[long]], top=300, mesh=mesh)


@pytest.fixture(scope="module")
def update():
    """Return inner updates by their divergence."""
    optimizer = make_optimizer(optax_kwargs={"weight_decay": 0.0, "eps": 1e-4})
    return {name: make_inner_update(CONFIG, optimizer, divergence=name) for name in DIVERGENCES}


def train(model, update, rows, adapters=4, steps=6):
    """Return the losses of each adapter, which takes its row again and again; None trains none."""
    keys = jax.random.split(jax.random.key(1), adapters)
    sizes = {"rank": 2, "alpha": 8.0, "targets": ("q_proj", "v_proj")}
    start = jax.jit(lambda keys: lora.init_adapters(CONFIG, keys, **sizes))(keys)
    rows = [*rows, *[None] * (adapters - len(rows))]
    jobs = [Job((row,) * steps if row else (), 3e-2) for row in rows]
    batches = pack(jobs, tokens_per_step=128, steps_per_call=steps, layout=LAYOUT)
    _, losses = update(model.params, start, batches)
    return [np.array(found) for found in job_losses(batches, jax.device_get(losses), adapters)]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_moves_towards_its_teacher_beside_others_that_have_none(
    model, update, taught, divergence
):
    text, plain = taught[0][0], taught[0][0]._replace(teacher=None)
    broken = text._replace(teacher=text.teacher._replace(logp=text.teacher.logp * np.nan))
    itself = taught[0][2]  # its teacher is the student, at first
    losses = train(model, update[divergence], [(text,), (plain,), (broken,), (itself,)])
    assert (losses[0] > 0).all() and losses[0][-1] < 0.7 * losses[0][0]
    assert np.isnan(losses[2]).all()  # and nobody else's
    assert losses[3][0] == pytest.approx(0, abs=1e-5) and losses[3][-1] < 1e-3
    if divergence == "forward":
        _, alone, *_ = train(model, update[divergence], [None, (plain,)])
        np.testing.assert_allclose(losses[1], alone, rtol=1e-4)


def test_a_weight_multiplies_what_a_text_costs_but_not_how_many_tokens_there_are(
    model, update, taught
):
    plain, other = taught[0][0]._replace(teacher=None), taught[0][1]
    rows = [(plain, other._replace(weight=weight)) for weight in (1.0, 0.0, 3.0)]
    losses = train(model, update["forward"], [*rows, (plain,)])
    whole, without, more, alone = (found[0] for found in losses)
    assert more - without == pytest.approx(3 * (whole - without), rel=1e-4)
    counts = [sum(text.loss_mask) for text in (plain, other)]
    assert without == pytest.approx(alone * counts[0] / sum(counts), rel=1e-4)


def test_batches_are_as_ever_where_nobody_has_a_teacher_or_a_weight(taught):
    plain, other = taught[0][1]._replace(teacher=None), taught[1][0]
    (batch,) = pack([Job(((plain,),), 0.1)], layout=LAYOUT)
    assert batch.teacher is None and batch.text_weight is None
    (batch,) = pack([Job(((plain, other),), 0.1)], layout=LAYOUT)
    length, end = len(plain.tokens), len(plain.tokens) + len(other.tokens)
    assert (batch.teacher.ids[0, 0, :length] == -1).all() and batch.text_weight is None
    np.testing.assert_array_equal(batch.teacher.ids[0, 0, length:end], other.teacher.ids)
    np.testing.assert_array_equal(batch.teacher.logp[0, 0, length:end], other.teacher.logp)
    assert (batch.teacher.ids[0, 0, end:] == -1).all() and (batch.teacher.ids[1:] == -1).all()


def test_references_may_have_teachers_where_rows_have_none(taught):
    text = taught[0][1]
    job = Job(((text._replace(teacher=None),),), 0.1, references=((text._replace(weight=0.5),),))
    (batch,) = pack([job], layout=LAYOUT)
    of_reference = batch.teacher.ids[0][batch.text_weight[0] == 0.5]
    np.testing.assert_array_equal(of_reference, text.teacher.ids)


# --- in a run ---

DISTILL = ("inner.objective=distill", "inner.distill_top=4")


@pytest.fixture
def stages(one_device):
    return make_stages(settings_of(load_config(TINY_RUN, DISTILL)))


def test_a_waves_texts_are_taught_by_the_model_with_the_passage(stages):
    problems = stages.task.load("train")[:2]
    edits = [[stages.task.parse(problem, "a line\nanother")] for problem, _ in problems]
    runs = inner_runs(problems, edits, 0, range(2))
    wave = Wave([*(Place(run, _job_of(stages, run)) for run in runs), None], print)
    with jax.transfer_guard("disallow"):
        found = teach(stages, stages.model.params, wave)
    assert found.places[-1] is None
    encode = stages.model.tokenizer.encode
    problem = problems[0][0]
    passage = {tuple(encode(text)) for text in stages.task.passage_only(problem).training_texts}
    taught = {}
    for place, before in zip(found.places[:-1], wave.places, strict=False):
        assert place.run == before.run
        for row, plain in zip(place.job.rows, before.job.rows, strict=True):
            for text, other in zip(row, plain, strict=True):
                assert text._replace(teacher=None) == other
                taught[place.run.problem.id, text.tokens] = text
    assert len(passage) == 3
    assert all(taught[problem.id, tokens].teacher is None for tokens in passage)
    # A line is read behind the passage and the lines before it.
    context = tuple(encode(stages.task.teacher_prompt(problem)))
    lessons = [
        Lesson(text_of(encode("a line")), context),
        Lesson(text_of(encode("another")), (*context, *encode("a line\n", start=False))),
    ]
    given = {"top": 4, "mesh": stages.mesh}
    (alone,) = with_teachers(stages.model, stages.model.params, [lessons], **given)
    for text in alone:
        expected = taught[problem.id, text.tokens].teacher
        np.testing.assert_allclose(text.teacher.logp, expected.logp, atol=1e-5)
    assert pack_wave(stages, found)[0].teacher.ids.shape[-1] == 4
    inner = stages.settings.inner._replace(objective="sft")
    sft = stages._replace(settings=stages.settings._replace(inner=inner))
    assert teach(sft, stages.model.params, wave) is wave


def test_what_the_teacher_cannot_read_is_said_before_the_run_or_rejects_a_self_edit(stages):
    problems = stages.task.load("train")[:1]
    short = dataclasses.replace(stages.model.config, max_length=100)
    narrow = stages._replace(model=stages.model._replace(config=short))
    (edit,), (long,) = (parse(narrow, problems, [text])[0] for text in ("a line", "word " * 12))
    assert isinstance(edit, SelfEdit)
    assert "training text behind what the teacher reads of 1" in long.reason
    assert long.reason.endswith("at most 100")
    check_prompts(stages, problems)
    inner = stages.settings.inner._replace(distill_top=4000)
    many = stages._replace(settings=stages.settings._replace(inner=inner))
    with pytest.raises(ValueError, match=r"inner.distill_top = 4,000: expected at most the \d+"):
        check_prompts(many, problems)


def test_a_config_that_no_teacher_can_serve_is_refused():
    with pytest.raises(ConfigError, match="task 'arc' does not say what a teacher reads"):
        load_config(TINY_RUN, ("task.name=arc", *DISTILL))
    with pytest.raises(ConfigError, match="'sampled': with inner.objective = 'distill' padding"):
        load_config(TINY_RUN, (*DISTILL, "inner.pad_loss=sampled"))
    with pytest.raises(ConfigError, match="inner.objective = 'kl': needs one of 'sft', 'distill'"):
        load_config(TINY_RUN, ("inner.objective=kl",))


@pytest.mark.long
def test_a_run_that_distills_goes_on_after_a_kill_as_if_there_had_been_none(compiled, tmp_path):
    overrides = (*DISTILL, "inner.divergence=reverse", "eval.random_control=False")
    overrides += ("outer.num_steps=1",)
    run_process(*train_arguments(tmp_path / "whole", *overrides))
    killed_at(tmp_path / "killed", "pending_0.jsonl:3", *overrides)
    run_process(*train_arguments(tmp_path / "killed", *overrides))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    edits = read_jsonl(tmp_path / "whole" / "edits.jsonl")
    assert all(0 < loss < 5 for edit in edits for loss in edit["loss_before"])
