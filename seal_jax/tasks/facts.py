"""Synthetic facts about invented things, for a tiny model with a byte tokenizer on a CPU.

    title      zorbin
    passage    red is zorbin's color. cave is zorbin's home.
    self-edit  any lines; the good ones restate a fact as it will be asked: "zorbin color? red"
    question   zorbin color?
    answer     red

It tests the loops, not the method. Names are invented, so nothing can be known beforehand. Values
come from small vocabularies, so that a tiny model can learn them. The passage is not phrased as the
questions are, so there is something to gain by writing a self-edit.
"""

import random
import re
from dataclasses import dataclass

from seal_jax.tasks.task import Exam, Problem, Question, Rejected, SelfEdit

ATTRIBUTES = {
    "color": ("red", "blue", "green", "gold", "black", "white", "pink", "gray"),
    "home": ("cave", "lake", "tree", "sand", "moon", "reef", "hill", "barn"),
    "food": ("fish", "corn", "moss", "nuts", "bread", "figs", "rice", "kelp"),
    "size": ("tiny", "small", "big", "huge"),
    "sound": ("hum", "buzz", "roar", "click", "hiss", "purr", "bark", "ring"),
    "day": ("monday", "tuesday", "friday", "sunday"),
}
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "dr", "kr", "tr")
_VOWELS = ("a", "e", "i", "o", "u")
_ENDINGS = ("b", "d", "k", "l", "m", "n", "p", "r", "t", "x")


@dataclass(frozen=True)
class Facts:
    """The synthetic task, a function of the seed; a larger `num_train` only adds problems."""

    seed: int = 0
    num_train: int = 64
    num_eval: int = 32
    num_facts: int = 3  # about each thing, with one question each
    max_texts: int = 32  # lines in a self-edit
    max_bytes: int = 64  # in one line

    def __post_init__(self):
        bounds = {"num_train": 4000, "num_eval": 4000, "num_facts": len(ATTRIBUTES)}
        for name, most in (bounds | {"max_texts": 1000, "max_bytes": 1000}).items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 to {most}")

    def load(self, split: str) -> list[tuple[Problem, Exam]]:
        """Return the problems of 'train' or 'eval'; no name is in both."""
        counts = {"train": self.num_train, "eval": self.num_eval}
        if split not in counts:
            raise ValueError(f"unknown split {split!r}: expected 'train' or 'eval'")
        return [self._problem(name) for name in _names(self.seed, split, counts[split])]

    def edit_prompt(self, problem: Problem) -> str:
        """Return the passage and a cue, in as few bytes as possible."""
        return f"{problem.passage}\nnotes:\n"

    def parse(self, problem: Problem, text: str) -> SelfEdit | Rejected:
        """Take every line's printable ASCII, and the passage's sentences, as training texts."""
        prompt = self.edit_prompt(problem)
        lines = ["".join(filter(_is_plain, line)).strip() for line in text.splitlines()]
        lines = [line for line in lines if line]
        longest = max(map(len, lines), default=0)
        if not lines:
            reason = "empty"
        elif not any(char.isalpha() for line in lines for char in line):
            reason = "no words: not a single letter"
        elif len(lines) > self.max_texts:
            reason = f"too many texts: {len(lines)}, at most {self.max_texts}"
        elif longest > self.max_bytes:
            reason = f"too long: a line of {longest} bytes, at most {self.max_bytes}"
        else:
            return SelfEdit(problem.id, prompt, text, (*lines, *_sentences(problem.passage)))
        return Rejected(problem.id, prompt, text, reason)

    def question_prompt(self, problem: Problem) -> str:
        """Return the passage and a cue."""
        return f"{problem.passage}\nquestions:\n"

    def parse_questions(self, problem: Problem, text: str) -> tuple[Question, ...]:
        """Take every line of the form "zorbin color? red" about this thing, each question once."""
        found = re.findall(rf"^({re.escape(problem.title)} [a-z]+\?) ([a-z]+)$", text, re.MULTILINE)
        return tuple(Question(question, answer) for question, answer in dict(found).items())

    def teacher_prompt(self, problem: Problem) -> str:
        """Return the passage and the cue for notes, which the training texts are."""
        return self.edit_prompt(problem)

    def passage_only(self, problem: Problem) -> SelfEdit:
        """Return the control that trains on the passage's sentences alone."""
        return SelfEdit(problem.id, prompt="", text="", training_texts=_sentences(problem.passage))

    def answer_prompt(self, problem: Problem, question: str) -> str:
        """Return the question, which names its thing."""
        del problem
        return question

    def grade(self, question: Question, prediction: str) -> bool:
        """Return whether the first word of the prediction is the answer."""
        first = re.search(r"[a-z]+", prediction.lower())
        return first is not None and first.group() == question.answer

    def _problem(self, name: str) -> tuple[Problem, Exam]:
        rng = random.Random(f"{self.seed} {name}")
        attributes = rng.sample(list(ATTRIBUTES), self.num_facts)
        values = {attribute: rng.choice(ATTRIBUTES[attribute]) for attribute in attributes}
        passage = " ".join(f"{values[attribute]} is {name}'s {attribute}." for attribute in values)
        questions = [Question(f"{name} {attribute}?", values[attribute]) for attribute in values]
        return Problem(name, name, passage), Exam(name, tuple(questions))


TASK = Facts


def facts_of(passage: str) -> list[tuple[str, str]]:
    """Return the (attribute, value) pairs of a passage of this task."""
    found = re.findall(r"(\S+) is \S+'s (\S+)\.", passage)
    return [(attribute, value) for value, attribute in found]


def _names(seed: int, split: str, count: int) -> list[str]:
    """Invent `count` names. A checksum of its letters, not its place, says a name's split."""
    rng = random.Random(f"{seed} {split}")
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = (_ONSETS, _VOWELS, _ONSETS, _VOWELS, _ENDINGS)
        name = "".join(rng.choice(letters) for letters in syllables)
        if (sum(map(ord, name)) % 3 == 0) == (split == "eval"):
            names[name] = None
    return list(names)


def _sentences(passage: str) -> tuple[str, ...]:
    return tuple(f"{sentence}." for sentence in passage.rstrip(".").split(". "))


def _is_plain(char: str) -> bool:
    return " " <= char <= "~"
