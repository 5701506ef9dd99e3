"""Inner runs, wave by wave: as many adapters side by side as the devices hold.

A run is one self-edit with one seed. A wave always has the same number of adapters (A, filled up
with idle ones), and each has its own prompts, so few programs serve all waves.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from typing import NamedTuple

from seal_jax import keys
from seal_jax.hosts.console import progress
from seal_jax.hosts.exchange import spread
from seal_jax.inner import packing
from seal_jax.inner.texts import PADDED, Job, make_job, num_trained, row_length
from seal_jax.outer.problems import Batch
from seal_jax.outer.rewards import Outcome
from seal_jax.outer.stages import Edit, Stages
from seal_jax.sharding import batch_sharding, leading, num_parts, num_shards, to_device
from seal_jax.tasks.task import Exam, Problem, SelfEdit
from seal_jax.types import Adapters, InnerBatch, InnerSettings

# Problem id, which self-edit, which seed; in a sweep 'setting:problem id'.
RunName = tuple[str, int, int]
Others = tuple[tuple[str, Problem, Exam], ...]  # exams beside a problem's own, by their kind


class InnerRun(NamedTuple):
    """One inner run to make: a self-edit with one seed."""

    name: RunName  # unique in its ledger
    step: int  # the outer step, for the randomness
    problem: Problem
    exam: Exam
    edit: SelfEdit
    others: Others = ()  # their accuracy is reported by kind
    inner: InnerSettings | None = None  # in place of the config's; with schedule '' the loop's

    def settings(self, inner: InnerSettings) -> InnerSettings:
        """Return what holds for this run: what the self-edit chose, then its own, then `inner`."""
        return chosen_by(self.edit, self.inner or inner)

    def exams(self) -> list[tuple[Problem, Exam]]:
        """Return its own exam, then the others."""
        return [(self.problem, self.exam), *((problem, exam) for _, problem, exam in self.others)]

    def path(self, seed: int, purpose: int) -> tuple[int, ...]:
        """Return the path of its key; see keys.py."""
        _, edit, seed_index = self.name
        return (seed, purpose, self.step, keys.number_of(self.problem.id), edit, seed_index)


def chosen_by(edit: SelfEdit, inner: InnerSettings) -> InnerSettings:
    """Return the settings with those that a self-edit chose in their place."""
    return inner._replace(
        learning_rate=edit.learning_rate or inner.learning_rate,
        num_epochs=edit.num_epochs or inner.num_epochs,
    )


class Place(NamedTuple):
    """A run in a wave, and its texts as an inner loop takes them."""

    run: InnerRun
    job: Job


class Wave(NamedTuple):
    """Runs that are trained and examined together."""

    places: list[Place | None]  # of each adapter; None is an idle one
    show: Callable[[int], object]  # is told after each batch how many rows of jobs it has trained


class Examination(NamedTuple):
    """Inner runs to make, and where those that have ended are noted."""

    # What is known so far -> the next runs to make, none where all have ended.
    runs_to_make: Callable[[dict[RunName, Outcome]], list[InnerRun]]
    ledger: str
    label: str  # of the progress
    golds: bool = False  # whether it is measured how likely the gold answers are


def inner_runs(
    batch: Batch,
    edits: Sequence[Sequence[Edit | None]],
    step: int,
    seeds: Sequence[int],
    others: Sequence[Others] | None = None,
) -> list[InnerRun]:
    """Return the inner runs: every self-edit that was not rejected, with each seed.

    Args:
      edits: [P][R]; None is left out.
      others: of each problem, the exams that its runs are given beside its own.
    """
    return [
        InnerRun((problem.id, r, e), step, problem, exam, edit, others[p] if others else ())
        for p, ((problem, exam), row) in enumerate(zip(batch, edits, strict=True))
        for r, edit in enumerate(row)
        if isinstance(edit, SelfEdit)
        for e in seeds
    ]


def all_of(runs: list[InnerRun], outcomes: Container[RunName]) -> list[InnerRun]:
    """Return the runs if one of them has no outcome, else none: what `train.evaluate` asks."""
    return runs if any(run.name not in outcomes for run in runs) else []


def waves(
    stages: Stages, runs: Sequence[InnerRun], done: Container[RunName], label: str
) -> Iterator[Wave]:
    """Yield the waves that make all runs; one whose runs are all done is left out.

    A wave that was cut short is made again as it was: beside other neighbors, padded to other
    lengths, the last bits of a run's numbers may differ.
    """
    if all(run.name in done for run in runs):
        return
    places = [Place(run, _job_of(stages, run)) for run in runs]
    longest = max((row_length(row) for place in places for row in place.job.rows), default=1)
    multiple = num_parts(stages.mesh, "adapter", stages.model.config.rules)
    size = -(-stages.at_once(longest) // multiple) * multiple
    # The longest first, so that those of a wave end together.
    places.sort(key=lambda place: -num_trained(place.job))
    groups = [places[i : i + size] for i in range(0, len(places), size)]
    groups = [group for group in groups if any(place.run.name not in done for place in group)]
    num_steps = sum(len(place.job.rows) for group in groups for place in group)
    bar = progress(num_steps, f"{label}: {sum(map(len, groups))} inner runs", "step")
    for group in groups:
        yield Wave(_deal(stages, group, size), bar.update)
    bar.close()


def pack(stages: Stages, wave: Wave) -> list[InnerBatch]:
    """Return the batches (numpy) that train the wave's adapters."""
    inner = stages.settings.inner
    return packing.pack(
        [place.job if place else Job((), 0.0) for place in wave.places],
        tokens_per_step=inner.tokens_per_step,
        steps_per_call=inner.steps_per_call,
        pad_id=stages.model.tokenizer.pad_id,
        num_shards=num_shards(stages.mesh, stages.model.config.rules),
    )


def fresh_adapters(stages: Stages, wave: Wave) -> Adapters:
    """Return a new adapter for each place, on the devices."""
    num_adapters, seed = len(wave.places), stages.settings.seed
    paths = [place.run.path(seed, keys.ADAPTER) if place else (0,) * 6 for place in wave.places]
    where = leading(stages.mesh, "adapter", num_adapters, stages.model.config.rules)
    return to_device(stages.init_adapters(keys.fold(paths)), where)


def on_devices(stages: Stages, batches: Sequence[InnerBatch]) -> list[InnerBatch]:
    """Return the batches where the inner loop takes them."""
    where = batch_sharding(stages.mesh, stages.model.config.rules)
    return [to_device(batch, where) for batch in batches]


def _job_of(stages: Stages, run: InnerRun) -> Job:
    inner, edit = run.settings(stages.settings.inner), run.edit
    texts = [stages.encode(text, edit.outputs_only) for text in edit.training_texts]
    job = make_job(
        [text for text in texts if len(text.tokens) > 1],
        num_epochs=inner.num_epochs,
        batch_size=inner.batch_size,
        learning_rate=inner.learning_rate,
        key=run.path(stages.settings.seed, keys.SHUFFLE),
        pad_loss=inner.pad_loss,
        padded=min(PADDED, stages.model.config.max_length),
    )
    return job if run.inner is None else job._replace(schedule=inner.schedule)


def _deal(stages: Stages, group: Sequence[Place], size: int) -> list[Place | None]:
    """Return a place for each adapter: all shards of the population have as much to train."""
    count = num_shards(stages.mesh, stages.model.config.rules)
    most = size // count
    shards: list[list[Place | None]] = [[] for _ in range(count)]
    owners = spread([num_trained(place.job) for place in group], count, most)
    for place, owner in zip(group, owners, strict=True):
        shards[owner].append(place)
    return [place for shard in shards for place in [*shard, *[None] * (most - len(shard))]]
