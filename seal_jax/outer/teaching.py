"""Teachers for a wave's training texts: the frozen base that has read the passage.

With `inner.objective = 'distill'` the base of the inner loop (the policy as it is) reads a
problem's passage and then the texts of a self-edit, one after the other. Its distribution of every
token is what the adapter learns from, which reads each text alone; see `lessons_of` in stages.py.
"""

from seal_jax.inner.teachers import Lesson, with_teachers
from seal_jax.inner.texts import Text
from seal_jax.outer.stages import Stages, lessons_of
from seal_jax.outer.waves import InnerRun, Wave
from seal_jax.types import Params


def teach(stages: Stages, params: Params, wave: Wave) -> Wave:
    """Return the wave with teachers of its texts, as far as its runs distill.

    A text behind the same context is scored once, in however many epochs and seeds it is.

    Args:
      params: the frozen base, which teaches.
    """
    inner = stages.settings.inner
    of_places = [
        _lessons(stages, place.run) if place and place.run.settings(inner).num_taught else {}
        for place in wave.places
    ]
    lessons = dict.fromkeys(lesson for found in of_places for lesson in found.values())
    if not lessons:
        return wave
    (texts,) = with_teachers(
        stages.model,
        params,
        [list(lessons)],
        top=inner.distill_top,
        mesh=stages.mesh,
        max_rows=stages.settings.answer.max_rows,
    )
    taught = dict(zip(lessons, texts, strict=True))
    places = []
    for place, found in zip(wave.places, of_places, strict=True):
        if place and found:
            rows = tuple(tuple(taught[found[text]] for text in row) for row in place.job.rows)
            place = place._replace(job=place.job._replace(rows=rows))
        places.append(place)
    return wave._replace(places=places)


def _lessons(stages: Stages, run: InnerRun) -> dict[Text, Lesson]:
    """Return each text of a run with its lesson; of one that is there twice the first."""
    edit = run.edit
    texts = [stages.encode(text, edit.outputs_only) for text in edit.training_texts]
    lessons = lessons_of(stages, run.problem, texts)
    return {lesson.text: lesson for lesson in reversed(lessons)}
