"""From a config to a run's stages: its sections become NamedTuples, and these what a loop calls.

Nothing past this module takes a ConfigDict.
"""

import dataclasses
import typing
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from seal_jax.config.check_optimizers import check_optimizers, check_updates_are_all
from seal_jax.config.load import task_arguments
from seal_jax.continual.memory_gradients import make_memory_gradients
from seal_jax.continual.remedies import make_remedies, transformations
from seal_jax.continual.remedies.remedy import Work
from seal_jax.inner.population import Needs, Population, fit_population
from seal_jax.inner.steps import LONGEST
from seal_jax.inner.texts import PAD_SAMPLES, PADDED, encode_text
from seal_jax.inner.update import InnerLoop, inner_setup, make_inner_loop
from seal_jax.models import lora
from seal_jax.models.mesh_fit import check_divides
from seal_jax.models.model import Model
from seal_jax.models.quantize import quantize_params
from seal_jax.objectives import make_objective
from seal_jax.objectives.objective import Objective
from seal_jax.optim import Optimizer, optimizer_of
from seal_jax.outer.policy_step import init_train_state, state_shapes, update_settings
from seal_jax.outer.policy_update import PolicyUpdate, make_policy_update
from seal_jax.outer.problems import Batch
from seal_jax.outer.stages import Constrain, Stages
from seal_jax.sharding import make_mesh, num_parts, param_shardings, shaped, tree_bytes
from seal_jax.sources import load_model, load_policy
from seal_jax.tasks import TASKS, field_names, make_task
from seal_jax.tasks.task import Task, constrain_of, max_tokens_of
from seal_jax.types import OuterSettings, Params, Settings, TrainState

# The sections that are a NamedTuple in types.py, with a field for each key.
SECTIONS = {
    name: kind for name, kind in typing.get_type_hints(Settings).items() if hasattr(kind, "_fields")
}


def settings_of(config: ConfigDict) -> Settings:
    """Return a validated config as values."""
    plain = config.to_dict()
    return Settings(
        seed=config.seed,
        task=task_arguments(config),
        rules=tuple(plain["sharding"].items()),
        **{name: kind(**plain[name]) for name, kind in SECTIONS.items()},
    )


def make_stages(
    settings: Settings, model: Model | None = None, optimizer: Optimizer | None = None
) -> Stages:
    """Make the mesh, load the model onto it and build the stages that loops and table share.

    Args:
      model: the settings' own, where it is loaded and placed already.
      optimizer: of the inner loop, in place of the one that the settings name.
    """
    check_optimizers(settings)
    inner, chat = settings.inner, settings.model.chat
    mesh = make_mesh(*settings.mesh)
    if model is None:
        model = place_model(settings, settings.model.source, mesh)
    check_divides(mesh, model.config)
    _check_thoughts(settings, model)
    # A task's texts are shared by many self-edits and seeds.
    encode = lru_cache(maxsize=4096)(
        lambda text, outputs_only: encode_text(model.tokenizer, text, outputs_only, chat=chat)
    )
    given = {
        "batch_size": inner.batch_size,
        "count_tokens": lambda text: len(encode(text, False).tokens),
    }
    taken = field_names(settings.task["name"])
    task = make_task(**settings.task, **{k: v for k, v in given.items() if k in taken})
    sizes = {"rank": inner.rank, "alpha": inner.alpha, "targets": inner.targets}
    init_adapters = jax.jit(partial(lora.init_adapters, model.config, **sizes))
    optimizer = optimizer or optimizer_of(inner)
    loop = make_inner_loop(inner_setup(model.config, optimizer, inner, mesh))
    at_once = _at_once(settings, model, loop)
    constrain = _make_constrain(settings, model, task)
    return Stages(
        settings, model, task, mesh, encode, init_adapters, loop.update, at_once, constrain
    )


def make_work(settings: Settings, sequences: Sequence[Batch]) -> Work:
    """Return what edits one after another are made with: the stages, with remedies in them.

    Args:
      sequences: [S][N] problems.
    """
    asked = settings.continual
    remedies = make_remedies(asked.remedies, asked.remedy_kwargs)
    before, after = transformations(remedies)
    optimizer = optimizer_of(settings.inner, before, after)
    if after:
        check_updates_are_all(settings, ", ".join(remedies))
    teachers = [one.top for one in remedies.values() if one.teach is not None]
    for top in teachers:  # what a model writes must have room behind the passage
        taught = settings.inner._replace(objective="distill", distill_top=top)
        settings = settings._replace(inner=taught)
    stages = make_stages(settings, optimizer=optimizer)
    known = stages.model.config.vocab_size
    for name, one in remedies.items():
        if one.top > known:
            raise ValueError(
                f"continual.remedy_kwargs: {name}: top = {one.top:,}: expected at most the"
                f" {known:,} tokens of the model"
            )
    parts = num_parts(stages.mesh, "adapter", stages.model.config.rules)
    if len(sequences) % parts:
        raise ValueError(
            f"continual.num_sequences = {len(sequences)}: expected a multiple of {parts}, over"
            " which the mesh divides them (mesh.data, sharding.adapter)"
        )
    setup = inner_setup(stages.model.config, optimizer, settings.inner, stages.mesh)
    return Work(stages, make_memory_gradients(setup), remedies, sequences)


def place_model(settings: Settings, source: str, mesh: Mesh) -> Model:
    """Load a model onto the mesh; it lies there, and computes attention, as the settings say."""
    model = load_model(source, settings.model.dtype, mesh, settings.rules)
    section = settings.model
    return model._replace(
        config=dataclasses.replace(model.config, attention=section.attention),
        tokenizer=model.tokenizer.with_template(source, section.template_args),
    )


def policy_params(stages: Stages, source: str) -> Params:
    """Return a policy's parameters, of the architecture of the stages' model.

    Args:
      source: a folder of checkpoints, a PEFT adapter of the model, or any model source.
    """
    model = stages.settings.model
    return load_policy(source, stages.model, model.source, model.dtype, stages.mesh)


def configured_objective(settings: Settings) -> Objective:
    """Return the objective that the settings name.

    Raises:
      ValueError: its options are wrong, or there are too few self-edits per problem for it.
    """
    name = settings.outer.objective
    objective = make_objective(name, **settings.outer.objective_kwargs)
    if settings.sample.num_edits < objective.min_edits:
        raise ValueError(
            f"sample.num_edits = {settings.sample.num_edits}: {name} compares the self-edits of a"
            f" problem with each other and needs at least {objective.min_edits}"
        )
    return objective


def further_objectives(settings: Settings) -> dict[str, Objective]:
    """Return the objectives of `eval.objectives`, by name; see `configured_objective`."""
    held, outer = settings.eval, settings.outer
    found = {}
    for name in held.objectives:
        options = held.objective_kwargs.get(name, {})
        asked = outer._replace(objective=name, objective_kwargs=options)
        found[name] = configured_objective(settings._replace(outer=asked))
    return found


def make_update(stages: Stages, objective: Objective) -> tuple[PolicyUpdate, TrainState]:
    """Return the policy update that the settings ask for, and the state before the first step."""
    settings, model = stages.settings, stages.model
    outer, optimizer = settings.outer, optimizer_of(settings.outer)
    policy_update = make_policy_update(
        dataclasses.replace(model.config, remat=outer.remat),
        objective,
        optimizer,
        mesh=stages.mesh,
        seed=settings.seed,
        **update_settings(outer)._asdict(),
    )
    state = init_train_state(
        model.config,
        model.params,
        optimizer,
        mesh=stages.mesh,
        learning_rate=outer.learning_rate,
        value_head=objective.gae is not None,
        **_lora_sizes(outer),
    )
    return policy_update, state


def _lora_sizes(outer: OuterSettings) -> dict[str, Any]:
    return {name: getattr(outer, name) for name in ("update", "rank", "alpha", "targets")}


def _check_thoughts(settings: Settings, model: Model) -> None:
    """Raise ValueError where tokens are set aside for thoughts, and the model is to have none."""
    thoughts = model.tokenizer.thoughts(settings.model.chat)
    source, why = settings.model.source, ""
    if thoughts is None:
        why = f"the chat template of {source} knows no thoughts"
    elif thoughts.is_closed:
        why = f"the chat template of {source} tells it not to think (model.template_args)"
    for name, section in (("sample", settings.sample), ("answer", settings.answer)):
        if why and section.max_thought_tokens:
            raise ValueError(
                f"{name}.max_thought_tokens = {section.max_thought_tokens}: expected 0, as {why}"
            )
    if thoughts is not None and thoughts.is_open and settings.answer.prefix:
        raise ValueError(
            f"answer.prefix = {settings.answer.prefix!r}: expected '', as prompts of {source} begin"
            " a thought, and the answer comes behind it; see model.template_args"
        )
    if thoughts is not None and thoughts.is_open and settings.sample.constrained:
        raise ValueError(
            f"sample.constrained = True: prompts of {source} begin a thought, which no grammar of a"
            " self-edit lets it end; see model.template_args"
        )


def _make_constrain(settings: Settings, model: Model, task: Task) -> Constrain | None:
    """Return which tokens a self-edit may go on with; None where it may with any.

    Raises:
      ValueError: that is asked for, and the task cannot say.
    """
    if not settings.sample.constrained:
        return None
    constrain = constrain_of(task)
    if constrain is None:
        raise ValueError(
            "sample.constrained = True: self-edits of task"
            f" {settings.task['name']!r} have no grammar"
        )
    return constrain(model.tokenizer, model.config.vocab_size)


def _at_once(settings: Settings, model: Model, loop: InnerLoop) -> Callable[[int], int]:
    """Return how many adapters are in flight, given the tokens of the longest row."""
    inner = settings.inner
    if inner.max_adapters != -1:
        return lambda longest: inner.max_adapters
    # No more than there are runs at once, and than there may be rows of answers: every adapter
    # answers at least one question at a time.
    runs = max(
        settings.outer.problems_per_step * settings.sample.num_edits * inner.num_seeds,
        settings.eval.num_problems * settings.eval.num_edits * settings.eval.num_seeds,
    )
    base = jax.eval_shape(partial(quantize_params, word=inner.quantize), model.params)
    mesh = loop.setup.mesh
    assert mesh is not None  # see `make_stages`
    base = shaped(base, param_shardings(mesh, base, model.config.rules))
    needs = Needs(loop, inner, base, resident=resident_bytes(settings, model, mesh))
    latest = [Population(min(settings.answer.max_rows, runs))]  # it never grows

    def at_once(longest: int) -> int:
        latest[0] = fit_population(needs, longest, latest[0])
        return latest[0].number

    return at_once


def resident_bytes(settings: Settings, model: Model, mesh: Mesh) -> int:
    """Return what lies on each device beside the inner loop's own base and adapters, at most."""
    outer, policy = settings.outer, tree_bytes(model.params)
    optimizer = optimizer_of(outer)
    state = state_shapes(model.config, model.params, optimizer, **_lora_sizes(outer))
    state = state.adapters, state.opt_state  # a value head is nothing beside them
    # While a policy is trained there are the base and those that were trained before; in the end,
    # every policy that was trained. The random control, the last one, makes no inner runs.
    trained = 1 + len(settings.eval.objectives)
    training = tree_bytes(shaped(state, param_shardings(mesh, state, model.config.rules)))
    training += policy * trained
    comparing = policy * (trained + settings.eval.random_control)
    own = 0 if settings.inner.quantize == "none" else policy  # a quantized base is one more
    return max(training, comparing) + own


def longest_row(stages: Stages, problems: Batch) -> int:
    """Return about how many tokens the longest row of an inner run on these problems will have."""
    passage = max(
        len(stages.encode(text, False).tokens)
        for problem, _ in problems
        for text in stages.task.passage_only(problem).training_texts
    )
    return row_tokens(stages.settings, passage, stages.model.config.max_length)


def row_tokens(settings: Settings, passage: int, max_length: int) -> int:
    """Return about how many tokens the longest row of an inner run has.

    Args:
      passage: tokens of the longest.
      max_length: of the model.
    """
    size, written = settings.inner.batch_size, settings.sample.most_tokens
    longest = max(passage, written) if size == 1 else passage + written
    if (most := text_limit(settings)) is not None:
        longest = size * most
    if settings.inner.pad_loss == "sampled":
        longest += size * (PAD_SAMPLES + 1)
    if settings.inner.pad_loss == "exact":
        longest = max(longest, size * min(PADDED, max_length))
    return min(longest, LONGEST)


def text_limit(settings: Settings) -> int | None:
    """Return how many tokens a text has at most that the task makes; None if the policy writes."""
    default = max_tokens_of(TASKS[settings.task["name"]])
    return None if default is None else settings.task.get("max_tokens", default)
