"""What a remedy is: what it does at each place of an edit.

share, old   a share of the texts that an edit trains on comes from the memory
teach        who teaches the new texts, in place of plain next-token training
reference    every step shows the optimizer the gradient of a batch of the memory
before       an optax transformation that sees the gradient first
after        one that sees the optimizer's update last
context      what these two are told, the same in every step of an edit
start        how a fresh adapter begins
keep         what becomes of the model, given the trained adapter; by default it is merged
learn        what is stored of an edit for the next ones
route        who answers a question, where that is not the sequence's model
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from seal_jax.continual.memory import Memory
from seal_jax.continual.memory_gradients import MemoryGradients
from seal_jax.inner.texts import Text
from seal_jax.outer.problems import Batch
from seal_jax.outer.stages import Stages
from seal_jax.sharding import leading, replicated, to_device
from seal_jax.types import Adapters, Array, ContinualSettings, InnerSettings, Params

Store = Any  # what a remedy keeps between edits: a pytree of arrays [S ...], of constant size
Texts = Sequence[Sequence[Text]]  # of each sequence


class Learner(NamedTuple):
    """S models that learn side by side, and what they keep of their past."""

    params: Params  # with kernels of their own [S in out]: these write, and are trained
    memories: tuple[Memory, ...]  # of each sequence
    stores: dict[str, Store]  # of each remedy that has one, by name
    answers: Params | None = None  # what answers, where that is not `params`
    refused: int = 0  # edits of which a gate has kept nothing

    @property
    def answering(self) -> Params:
        return self.params if self.answers is None else self.answers


class Work(NamedTuple):
    """What remedies compute with."""

    stages: Stages
    look: MemoryGradients
    remedies: "dict[str, Remedy]"
    sequences: Sequence[Batch]  # [S][N]

    @property
    def settings(self) -> ContinualSettings:
        return self.stages.settings.continual

    @property
    def num(self) -> int:
        """S, how many sequences there are."""
        return len(self.sequences)

    def placed(self, tree: Any) -> Any:
        """Return arrays where they belong: [S ...] divided as the sequences are, others whole."""
        mesh, rules = self.stages.mesh, self.stages.model.config.rules
        divided, whole = leading(mesh, "adapter", self.num, rules), replicated(mesh)

        def place(x: Array) -> jax.Array:
            return to_device(x, divided if x.shape[:1] == (self.num,) else whole)

        return jax.tree.map(place, tree)


class Edit(NamedTuple):
    """The edits number k of all sequences."""

    number: int  # k, from 0
    problems: Batch  # [S]
    texts: Texts  # the new ones; none of a sequence whose self-edit was rejected
    sources: Sequence[Sequence[str]]  # the same as text
    inner: Sequence[InnerSettings]  # what holds for each: its self-edit may choose some
    adapters: Adapters | None = None  # [S], once they are trained


class Remedy(NamedTuple):
    """One way to forget less; None where it does nothing."""

    share: float = 0.0
    extra: bool = False  # old texts come beside the new ones, not in their place
    memory: str = ""  # the kind of memory that it needs, see memory.KINDS
    old: Callable[[Work, Learner, int, Sequence[int]], Texts] | None = None
    teach: Callable[[Work, Learner, Edit], Texts] | None = None
    top: int = 0  # tokens of a teacher's distributions that are told apart, where texts have one
    reference: bool = False
    before: optax.GradientTransformation | None = None
    after: optax.GradientTransformation | None = None
    begin: Callable[[Work, Params, Adapters], Store] | None = None  # the store before all edits
    context: Callable[[Store, Adapters], dict[str, Any]] | None = None
    start: Callable[[Store, Adapters], Adapters] | None = None
    keep: Callable[[Work, Learner, Edit], Learner] | None = None
    splits: bool = False  # what answers is not what is trained
    remember: Callable[[Work, Learner, Edit], Any] | None = None  # (text, its tokens) [S][any]
    learn: Callable[[Work, Learner, Edit, Store], Store] | None = None
    route: Callable[[Work, Learner, Store, Sequence[Batch]], Any] | None = None  # -> asking.Asked
    # Which adapters it needs to begin with: 'fixed', of a sequence always the same first `a`;
    # 'fresh'; or 'own', where it makes them begin otherwise.
    frame: str = ""
    alone: bool = False  # no other remedy can do anything beside it
