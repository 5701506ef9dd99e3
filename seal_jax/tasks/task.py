"""What a task is: the host side of SEAL, text in and text or numbers out.

A task turns a `Problem` into a prompt, the policy's text into a `SelfEdit` (or a `Rejected` with
its reason), and an answer into a verdict. `Problem` is what the policy may see; `Exam` is what
only the grader sees. They are two types so that a question cannot reach the policy by accident.
Nothing below `tasks/` imports jax.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np

# (tokens written so far) -> bool[V], which may come next.
AllowedTokens = Callable[[Sequence[int]], np.ndarray]


class Problem(NamedTuple):
    """What the policy may see."""

    id: str  # unique in its split; names the problem in every log
    title: str  # the topic, which prefixes training texts and questions
    passage: str


class Question(NamedTuple):
    """One question about a problem and its gold answers, any of which counts as right."""

    question: str
    answer: str
    others: tuple[str, ...] = ()  # further gold answers, none twice


class Exam(NamedTuple):
    """What only the grader sees: the questions asked without the passage in context."""

    problem_id: str
    questions: tuple[Question, ...]


Pairs = Sequence[tuple[Problem, Exam]]


class Part(NamedTuple):
    """A piece of a prompt, and whether it is an output, as the answer is."""

    text: str
    is_output: bool


class Turn(NamedTuple):
    """One training text: a user's message and the answer to it."""

    prompt: tuple[Part, ...]
    answer: str

    @property
    def message(self) -> str:
        return "".join(part.text for part in self.prompt)


class SelfEdit(NamedTuple):
    """A parsed self-edit: data and hyperparameters for one inner-loop run.

    `None` for a hyperparameter means the config's value.
    """

    problem_id: str
    prompt: str  # what the policy was shown
    text: str  # what the policy wrote
    training_texts: tuple[str | Turn, ...]
    learning_rate: float | None = None
    num_epochs: int | None = None
    outputs_only: bool = False  # of Turns: the loss is on outputs, not on all tokens
    thoughts: str = ""  # what the policy thought before; a task sees nothing of it


class Rejected(NamedTuple):
    """A self-edit that cannot be applied, and why. It is counted and logged, never fatal."""

    problem_id: str
    prompt: str
    text: str
    reason: str
    thoughts: str = ""


class Task(Protocol):
    """What the loop asks of a task. No base class: any object with these methods is one.

    What it may have more is in `AbleTask`. Fields named in `tasks.GIVEN` are given by the run, and
    are no keys of a config.
    """

    def load(self, split: str) -> list[tuple[Problem, Exam]]:
        """Return the problems of `split` ('train' or 'eval') with their exams, in a fixed order."""

    def edit_prompt(self, problem: Problem) -> str:
        """Return the prompt that asks the policy for a self-edit."""

    def parse(self, problem: Problem, text: str) -> SelfEdit | Rejected:
        """Turn what the policy wrote, which is untrusted, into a self-edit or a reason."""

    def passage_only(self, problem: Problem) -> SelfEdit:
        """Return the control that trains on the problem alone, with no policy's text."""

    def answer_prompt(self, problem: Problem, question: str) -> str:
        """Return the prompt that asks a question, without the passage."""

    def grade(self, question: Question, prediction: str) -> bool:
        """Return whether `prediction` answers `question` correctly."""


class AbleTask(Task, Protocol):
    """What a task may have beside; each part is optional, and asked for by a function below."""

    max_tokens: int  # of a training text, where the task writes them and not the policy
    titles: Mapping[str, str]  # what the rows of the final table are called here

    def load_share(self, split: str, share: tuple[int, int]) -> Pairs:
        """Return what the i-th of n processes reads, for (i, n); `join_shares` makes all of it."""

    def question_prompt(self, problem: Problem) -> str:
        """Return the prompt that asks the policy for questions, for the reward self_questions."""

    def parse_questions(self, problem: Problem, text: str) -> tuple[Question, ...]:
        """Read the questions that the policy wrote, which are untrusted; () where there is none."""

    def teacher_prompt(self, problem: Problem) -> str:
        """Return what a teacher reads before a training text, for `inner.objective = 'distill'`."""

    def queries(self, problem: Problem, exam: Exam) -> Sequence[str]:
        """Return all prompts of an exam, where a question is asked in several ways."""

    def marks(self, problem: Problem, exam: Exam, answers: Sequence[str]) -> Sequence[float]:
        """Return a mark from 0 to 1 for each question, given the answers to all `queries`."""

    def constrain(self, tokenizer: Any, vocab_size: int) -> AllowedTokens:
        """Return which tokens a self-edit may go on with, for `sample.constrained`."""


def constrain_of(task: Task) -> Callable[[Any, int], AllowedTokens] | None:
    """Return the task's grammar, a method; None where it has none."""
    return getattr(task, "constrain", None)


def load_share_of(task: Task) -> Callable[[str, tuple[int, int]], Pairs] | None:
    """Return the method that reads a share of the problems; None where all are read at once."""
    return getattr(task, "load_share", None)


def teacher_prompt_of(task: Task | Callable[..., Task]) -> Callable[[Problem], str] | None:
    """Return the method of a task, or of its class, that says what a teacher reads; or None."""
    return getattr(task, "teacher_prompt", None)


def titles_of(task: Task) -> Mapping[str, str]:
    """Return the task's own names for the rows of the final table."""
    return getattr(task, "titles", {})


def max_tokens_of(task: Task | Callable[..., Task]) -> int | None:
    """Return how many tokens a text of a task, or its class, has at most; None without a bound."""
    return getattr(task, "max_tokens", None)


def asks_itself(task: Task) -> TypeGuard[AbleTask]:
    """Return whether the policy can be asked for questions on a problem."""
    return hasattr(task, "question_prompt")


def asks_once(task: Task | Callable[..., Task]) -> bool:
    """Return whether a task, or its class, asks every question by one prompt, for its gold text."""
    return not hasattr(task, "queries")


def join_shares(shares: Iterable[Iterable[tuple[Problem, Exam]]]) -> list[tuple[Problem, Exam]]:
    """Return the problems of all shares in their order, each once and with all its questions.

    A question that is repeated keeps its first answers.
    """
    problems: dict[str, Problem] = {}
    asked: dict[str, dict[str, Question]] = {}
    for problem, exam in itertools.chain.from_iterable(shares):
        problems.setdefault(problem.id, problem)
        questions = asked.setdefault(problem.id, {})
        for question in exam.questions:
            questions.setdefault(question.question, question)
    return [(problem, Exam(key, tuple(asked[key].values()))) for key, problem in problems.items()]


def prompts_of(task: Task, problem: Problem, exam: Exam) -> list[str]:
    """Return all prompts that ask an exam, without the passage."""
    if queries := getattr(task, "queries", None):
        return list(queries(problem, exam))
    return [task.answer_prompt(problem, question.question) for question in exam.questions]


def marks_of(task: Task, problem: Problem, exam: Exam, answers: Sequence[str]) -> list[float]:
    """Return a mark from 0 to 1 for each question of an exam, given the answers to its prompts."""
    if marks := getattr(task, "marks", None):
        return list(marks(problem, exam, answers))
    return [float(task.grade(q, a)) for q, a in zip(exam.questions, answers, strict=True)]
