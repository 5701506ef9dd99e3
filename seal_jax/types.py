"""The axis letters, the NamedTuples that cross from stage to stage, and the settings.

Axis letters, used in every einsum and shape comment:
  P problems (in generation: prompts), R self-edits per problem, E seeds per self-edit, A adapters,
  U lanes (adapters that train in one step), W array rows of a step, M tokens of all rows (in a
  step, W * T), n chunks of a step, c slots of a chunk, I inner steps, B rows, T tokens (query), S
  key/value length, N query heads, K kv heads, G = N / K, H head dim, D model dim, F feed-forward
  dim, V vocabulary, L layers, r LoRA rank; of a teacher's distribution, K tokens that are known.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray  # on the devices, or on the host
Params = dict[str, Any]  # the base model or the policy: nested dict of arrays
# What optimizers may ask for by keyword: pytrees, every leaf with a leading [A].
Context = Mapping[str, Any]
# Pairs of a logical axis and the mesh axes that divide it, with spaces between; see sharding.py.
ParamRules = tuple[tuple[str, str], ...]


class Adapters(NamedTuple):
    """A stack of LoRA adapters: values, never state.

    weights['attn']['q_proj'] is {'a': f32[A L r in], 'b': f32[A L r out]} and adds
    scale * (x @ a.T) @ b to that linear map; likewise the other targets. The layers share an
    array because a loop that carries every matrix of every layer takes XLA minutes to compile.
    """

    weights: Params
    scale: Array  # f32[A] alpha / rank


class InnerState(NamedTuple):
    """What the inner loop carries from step to step, for a population of A adapters."""

    adapters: Adapters
    opt_state: Any  # of the adapters' weights, every leaf with a leading [A]
    step: jax.Array  # i32[A] steps that each adapter has taken


class Teacher(NamedTuple):
    """A teacher's distribution of each token, given those before it: its K likeliest, and the rest.

    The rest of the vocabulary is one outcome, the last one; where K = V nothing is left for it.
    """

    ids: Array  # i32[... K], none twice; -1 where there is no teacher
    logp: Array  # f32[... K+1]


class InnerBatch(NamedTuple):
    """Steps of one shape. A lane is an adapter's place in a step; -1 marks an empty one.

    An array row holds the rows of several adapters behind one another; chunks say whose they are.
    Learning rate and step count come from the self-edit, so they are data: one program serves all.
    Over a mesh, W, U and n are divided as the population is, and count within their shard.
    """

    lanes: Array  # i32[I U] which adapter takes the lane
    chunk_lanes: Array  # i32[I n] whose adapter a chunk takes, that of which lane
    chunk_tokens: Array  # i32[I n c] the token (of W * T) in each slot; W * T in an empty one
    tokens: Array  # i32[I W T]
    # 0 is nothing, 1.. are the texts of the array row, -s is padding that is in the loss: it sees
    # text s, and nobody sees it.
    segments: Array  # i32[I W T]
    positions: Array  # i32[I W T] restart with each text
    loss_weight: Array  # f32[I W T] how much predicting this token counts
    learning_rate: Array  # f32[A] at the first step
    num_steps: Array  # i32[A] at whose end the schedule ends
    seed: Array  # i32[A] of the LoRA dropout
    schedule: Array | None = None  # i32[A] in optim.SCHEDULES; None where all have the loop's
    # i32[I U] which adapter takes lane U + u: that of lane u, on its reference row. Its gradient is
    # shown to the optimizer of lane u. -1 marks an empty one; None where nobody has any.
    references: Array | None = None
    teacher: Teacher | None = None  # [I W T K], of the token itself; None where no text has one
    text_weight: Array | None = None  # f32[I W T] of the token's text; None where all have 1

    def map_steps(self, function: Callable[[Any], Any]) -> "InnerBatch":
        """Return the batch with `function` of each array that has steps [I ...]."""
        mapped = {name: jax.tree.map(function, getattr(self, name)) for name in STEP_FIELDS}
        return self._replace(**mapped)


OF_ADAPTERS = ("learning_rate", "num_steps", "seed", "schedule")  # of InnerBatch: [A]
STEP_FIELDS = tuple(name for name in InnerBatch._fields if name not in OF_ADAPTERS)


class Rollout(NamedTuple):
    """What the policy wrote, with its prompts; one row per self-edit, P * R rows."""

    tokens: Array  # i32[B T] prompt and self-edit, padded on the right
    logp: Array  # f32[B T] of each written token under the policy that wrote it, else 0
    loss_mask: Array  # bool[B T] the written tokens
    step: int = 0  # the outer step whose policy wrote them


class TrainState(NamedTuple):
    """The outer loop's state. No key is carried: they are folded from (seed, step, ...)."""

    step: jax.Array  # i32[] outer steps taken
    params: Params  # the policy
    adapters: Adapters | None  # the LoRA that the last outer step merged into params; None if full
    opt_state: Any
    value_head: Params | None = None  # {'kernel': f32[D], 'bias': f32[]} where an objective has one


# The sections of a config, key by key; config/table.py has defaults and meanings.


class ModelSettings(NamedTuple):
    source: str
    dtype: str
    attention: str
    chat: bool  # whether prompts go through the model's chat template
    template_args: Mapping[str, Any]  # of the chat template


class SampleSettings(NamedTuple):
    """How the policy writes self-edits."""

    num_edits: int  # R
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    max_tokens: int
    max_thought_tokens: int
    stop: tuple[str, ...]
    constrained: bool
    max_rows: int

    @property
    def most_tokens(self) -> int:
        return self.max_tokens + self.max_thought_tokens


class AnswerSettings(NamedTuple):
    """How adapted models answer: greedily."""

    max_tokens: int
    stop: tuple[str, ...]
    max_rows: int
    max_thought_tokens: int = 0
    prefix: str = ""  # what every answer begins with, which is not generated

    @property
    def most_tokens(self) -> int:
        return self.max_tokens + self.max_thought_tokens


class InnerSettings(NamedTuple):
    """The inner loop."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    learning_rate: float
    num_epochs: int
    batch_size: int
    accumulation: int
    dropout: float
    num_seeds: int
    optax_name: str
    optax_kwargs: Mapping[str, Any]
    optimizer: Any  # learning_rate -> GradientTransformation, or None
    schedule: str
    warmup_steps: int
    pad_loss: str
    grad_clip: float
    quantize: str
    remat: str
    max_adapters: int
    tokens_per_step: int
    steps_per_call: int
    objective: str = "sft"
    divergence: str = "forward"
    distill_top: int = 16

    @property
    def num_taught(self) -> int:
        """Return K, how many tokens of a teacher are known; 0 where texts have no teacher."""
        return self.distill_top if self.objective == "distill" else 0


class RewardSettings(NamedTuple):
    """Grades to rewards."""

    weights: Mapping[str, float]
    rejected: float
    adaptive_seeds: bool
    num_questions: int
    num_earlier: int
    judge_url: str
    judge_model: str
    judge_tries: int


class OuterSettings(NamedTuple):
    """The outer loop and its policy update."""

    objective: str
    objective_kwargs: Mapping[str, Any]
    kl_coef: float
    kl_target: float
    entropy_coef: float
    max_skipped: int
    num_steps: int
    problems_per_step: int  # P
    update: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    learning_rate: float
    num_epochs: int
    batch_size: int
    remat: str
    microbatch_size: int
    optax_name: str
    optax_kwargs: Mapping[str, Any]
    optimizer: Any  # learning_rate -> GradientTransformation, or None
    schedule: str
    grad_clip: float


class EvalSettings(NamedTuple):
    """Held-out problems."""

    num_problems: int
    num_edits: int
    num_seeds: int
    every: int
    random_control: bool
    num_bootstrap: int
    texts: Mapping[str, str] = {}  # further rows of the table: their names, and files of self-edits
    objectives: tuple[str, ...] = ()  # further policies, each trained by one of them
    objective_kwargs: Mapping[str, Any] = {}  # options of these, by name
    primary: tuple[str, ...] = ()  # comparisons stated before the run, as 'seal-own'
    primary_score: str = "accuracy"
    pilot: str = ""  # an earlier run, by which it is said what this one can show


class ContinualSettings(NamedTuple):
    """One self-edit after another."""

    num_sequences: int = 8  # S
    num_edits: int = 8  # N, in each
    num_control: int = 16  # problems that no edit is on
    ask_every: int = 1
    remedies: tuple[str, ...] = ()
    remedy_kwargs: Mapping[str, Any] = {}  # options of these, by name
    memory_tokens: int = 4096  # of each sequence


class CheckpointSettings(NamedTuple):
    keep: int
    best: int
    adapters: str
    adapters_gb: float


class MeshSettings(NamedTuple):
    """Devices along each axis; -1 takes what the others leave."""

    data: int
    fsdp: int
    tensor: int


class Settings(NamedTuple):
    """A whole config as plain values; config/setup.py makes it, and no stage sees a ConfigDict."""

    seed: int
    model: ModelSettings
    task: Mapping[str, Any]  # its name, and its own fields
    sample: SampleSettings
    answer: AnswerSettings
    inner: InnerSettings
    reward: RewardSettings
    outer: OuterSettings
    eval: EvalSettings
    continual: ContinualSettings
    checkpoint: CheckpointSettings
    mesh: MeshSettings
    rules: ParamRules  # the section `sharding`
