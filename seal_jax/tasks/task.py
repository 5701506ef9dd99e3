"""What a task is: the host side of SEAL, text in and text or numbers out.

A task turns a `Problem` into a prompt, the policy's text into a `SelfEdit` (or a `Rejected` with
its reason), and an answer into a verdict. `Problem` is what the policy may see; `Exam` is what
only the grader sees. They are two types so that a question cannot reach the policy by accident.
Nothing below `tasks/` imports jax.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol


class Problem(NamedTuple):
    """What the policy may see."""

    id: str  # unique in its split; names the problem in every log
    title: str  # the topic, which prefixes training texts and questions
    passage: str


class Question(NamedTuple):
    """One question about a problem and its gold answer."""

    question: str
    answer: str


class Exam(NamedTuple):
    """What only the grader sees: the questions asked without the passage in context."""

    problem_id: str
    questions: tuple[Question, ...]


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


class Rejected(NamedTuple):
    """A self-edit that cannot be applied, and why. It is counted and logged, never fatal."""

    problem_id: str
    prompt: str
    text: str
    reason: str


class Task(Protocol):
    """What the loop asks of a task. No base class: any object with these methods is one.

    A task may have more:
      load_share(split, (i, n)) -> what the i-th of n processes reads of `load(split)`
        for sources that are read piece by piece; `join_shares` of all n is what `load` returns.
      question_prompt(problem) -> str, parse_questions(problem, text) -> questions
        for the reward `self_questions`: they ask the policy for questions on what it sees, and read
        what it wrote, untrusted too: a tuple, empty where there is none.
      queries(problem, exam) -> prompts, marks(problem, exam, answers) -> floats
        where a question is asked in several ways: all prompts of an exam, and a mark from 0 to 1
        for each of its questions, given the answers to all of them.
      constrain(tokenizer, vocab_size) -> ((tokens written so far) -> bool[V])
        for `sample.constrained`: which tokens a self-edit may go on with.
      titles: what the rows of the final table are called here, see compare.TITLES.
    Fields named in `tasks.GIVEN` are given by the run, and are no keys of a config.
    """

    def load(self, split: str) -> list[tuple[Problem, Exam]]:
        """Return the problems of `split` ('train' or 'eval') with their exams, in a fixed order."""
        ...

    def edit_prompt(self, problem: Problem) -> str:
        """Return the prompt that asks the policy for a self-edit."""
        ...

    def parse(self, problem: Problem, text: str) -> SelfEdit | Rejected:
        """Turn what the policy wrote, which is untrusted, into a self-edit or a reason."""
        ...

    def passage_only(self, problem: Problem) -> SelfEdit:
        """Return the control that trains on the problem alone, with no policy's text."""
        ...

    def answer_prompt(self, problem: Problem, question: str) -> str:
        """Return the prompt that asks a question, without the passage."""
        ...

    def grade(self, question: Question, prediction: str) -> bool:
        """Return whether `prediction` answers `question` correctly."""
        ...


def join_shares(shares: Iterable[Iterable[tuple[Problem, Exam]]]) -> list[tuple[Problem, Exam]]:
    """Return the problems of all shares in their order, each once and with all its questions.

    A question that is repeated keeps its first answer.
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
    if hasattr(task, "queries"):
        return list(task.queries(problem, exam))
    return [task.answer_prompt(problem, question.question) for question in exam.questions]


def marks_of(task: Task, problem: Problem, exam: Exam, answers: Sequence[str]) -> list[float]:
    """Return a mark from 0 to 1 for each question of an exam, given the answers to its prompts."""
    if hasattr(task, "marks"):
        return list(task.marks(problem, exam, answers))
    return [float(task.grade(q, a)) for q, a in zip(exam.questions, answers, strict=True)]
