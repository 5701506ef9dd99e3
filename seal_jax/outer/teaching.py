"""Teachers for a wave's training texts: the frozen base that has read the passage.

With `inner.objective = 'distill'` the base of the inner loop (the policy as it is) reads a
problem's passage and then a training text. Its distribution of every token is what the adapter
learns from, which reads the text alone. The passage's own texts, which a self-edit has at its end,
are taught in the same way: behind the passage the teacher is nearly sure of each of their tokens,
so that is close to plain training on them.
"""

from seal_jax.inner.teachers import Lesson, with_teachers
from seal_jax.inner.texts import Job, Text
from seal_jax.outer.stages import Stages, teacher_context
from seal_jax.outer.waves import Wave
from seal_jax.types import Params


def teach(stages: Stages, params: Params, wave: Wave) -> Wave:
    """Return the wave with teachers of its texts, as far as its runs distill.

    A text is scored once, in however many epochs, seeds and self-edits it is. How a run's texts are
    tokens is the same with and without the passage: it stands before them as plain text, outside
    any chat template, as the texts themselves do. So the passage is all that the teacher has more.

    Args:
      params: the frozen base, which teaches.
    """
    inner = stages.settings.inner
    contexts = [
        teacher_context(stages, place.run.problem)
        if place and place.run.settings(inner).num_taught
        else None
        for place in wave.places
    ]
    lessons = {
        Lesson(text, context): None
        for place, context in zip(wave.places, contexts, strict=True)
        if place and context is not None
        for row in place.job.rows
        for text in row
    }
    if not lessons:
        return wave
    (texts,) = with_teachers(
        stages.model,
        params,
        None,
        [list(lessons)],
        top=inner.distill_top,
        mesh=stages.mesh,
        max_rows=stages.settings.answer.max_rows,
    )
    taught = dict(zip(lessons, texts, strict=True))
    places = [
        place
        if place is None or context is None
        else place._replace(job=_taught_job(place.job, context, taught))
        for place, context in zip(wave.places, contexts, strict=True)
    ]
    return wave._replace(places=places)


def _taught_job(job: Job, context: tuple[int, ...], taught: dict[Lesson, Text]) -> Job:
    rows = tuple(tuple(taught[Lesson(text, context)] for text in row) for row in job.rows)
    return job._replace(rows=rows)
