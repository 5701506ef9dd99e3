"""The offline grader: words -> features and rules -> grader; fit.py makes its table."""

from seal_jax.tasks.knowledge.grading.grader import (
    exact_match,
    grade,
    grade_probability,
    normalize,
    settle,
    token_f1,
)

__all__ = ["exact_match", "grade", "grade_probability", "normalize", "settle", "token_f1"]
