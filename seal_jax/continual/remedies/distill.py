"""Self-distillation: the model that has read the passage teaches the one that has not.

  loss(text) = KL(p(. | passage, text so far) || q(. | text so far)),  p a model that does not train

The teacher is the unedited model; with `teacher='current'` each sequence's model before its edit.
The self-edit was drawn with the passage in context, so it is the teacher's own sample.

References:
  Snell et al., Learning by Distilling Context, arXiv 2209.15189.
  Agarwal et al., On-Policy Distillation of Language Models, arXiv 2306.13649.
"""

from functools import partial

from seal_jax.continual.remedies.remedy import Edit, Learner, Remedy, Texts, Work
from seal_jax.inner.teachers import with_teachers
from seal_jax.outer.stages import lessons_of

TEACHERS = ("frozen", "current")


def remedy(teacher: str = "frozen", top: int = 16) -> Remedy:
    """Return self-distillation.

    Args:
      teacher: 'frozen' or 'current'.
      top: how many tokens of each distribution are told apart.
    """
    if teacher not in TEACHERS:
        raise ValueError(f"teacher is {teacher!r}: expected one of {', '.join(TEACHERS)}")
    if top < 1:
        raise ValueError(f"top is {top}: expected 1 or more")
    return Remedy(teach=partial(_teach, teacher, top), top=top)


def _teach(teacher: str, top: int, work: Work, learner: Learner, edit: Edit) -> Texts:
    stages = work.stages
    lessons = [
        lessons_of(stages, problem, texts)
        for texts, (problem, _) in zip(edit.texts, edit.problems, strict=True)
    ]
    params = learner.params if teacher == "current" else stages.model.params
    groups = lessons if teacher == "current" else [[one for row in lessons for one in row]]
    given = {"top": top, "mesh": stages.mesh, "max_rows": stages.settings.answer.max_rows}
    found = with_teachers(stages.model, params, groups, **given)
    if teacher == "current":
        return found
    taught = iter(found[0])
    return [[next(taught) for _ in row] for row in lessons]
