"""Knowledge incorporation: read a passage, write a self-edit, answer without the passage.

    edit_prompt(problem) -> the policy writes -> parse -> training texts -> an adapter
    answer_prompt(problem, question) -> the adapted model answers -> grade

A self-edit is free text in one of five styles: implications of the passage (three lengths), the
passage rewritten, or questions with answers. `training_sequences` turns it into training texts by
the rules of the authors' code (SEAL, arXiv 2506.10943, section 4.1). The prompts are our own words;
each reads as raw text for a base model and as the user's message for a chat model.
"""

import re
from collections import Counter
from dataclasses import dataclass

from seal_jax.tasks.knowledge.grading import grade
from seal_jax.tasks.knowledge.passages import load_problems
from seal_jax.tasks.task import Exam, Problem, Question, Rejected, SelfEdit

_EDIT_PROMPTS = {
    "implications": (
        "Read the passage, then list what follows from it: facts that it states and facts that can "
        "be inferred from it. Write one per line, each a full sentence that can be understood "
        "without the passage.\n\n{passage}\n\nImplications:\n"
    ),
    "long": (
        "Read the passage, then write a long list of what follows from it: every fact that it "
        "states, what can be inferred from these facts, and how they relate to each other. Write "
        "one per line, each a full sentence that can be understood without the passage.\n\n"
        "{passage}\n\nA long list of implications:\n"
    ),
    "very-long": (
        "Read the passage, then write a very long and exhaustive list of what follows from it. "
        "Leave out no name, number, date, place, cause or consequence; state each in several ways, "
        "and add what can be inferred from them together. Aim for fifty lines or more, each a full "
        "sentence that can be understood without the passage.\n\n"
        "{passage}\n\nA very long list of implications:\n"
    ),
    "rewrite": (
        "Read the passage, then write it again several times, each time in other words and another "
        "order but with every fact kept. Put each version on one line, with no line breaks inside "
        "it.\n\n{passage}\n\nRewritten versions:\n"
    ),
    "self-qa": (
        "Read the passage, then write questions about it with their answers, so that together they "
        "cover every fact in it. Each must make sense without the passage. Use this form:\n"
        "Question 1: ...\nAnswer: ...\n\nQuestion 2: ...\nAnswer: ...\n\n"
        "{passage}\n\nQuestion 1:"
    ),
}
PROMPT_STYLES = tuple(_EDIT_PROMPTS)

_QUESTION_START = re.compile(r"Question\s+\d+:")
_NEXT_QUESTION = re.compile(r"\n(?=Question\s+\d+:)")
_ANSWER_START = re.compile(r"Answer\s*:")

# What no tokenizer should see. Those at which str.splitlines ends a line become a newline.
_UNPRINTABLE: dict[int, str | None] = dict.fromkeys(
    {*range(0x20), 0x7F, *range(0xD800, 0xE000)} - {*b"\t\n\r"}
)
_UNPRINTABLE |= dict.fromkeys([0x0B, 0x0C, 0x1C, 0x1D, 0x1E], "\n")


@dataclass(frozen=True)
class Knowledge:
    """The knowledge-incorporation task.

    The budgets stop a self-edit that does not end: by default they are far above everything in the
    authors' 4,250 published self-edits (at most 11,566 characters, 94 texts, one line 9 times).
    """

    source: str = "builtin"  # see passages.load_problems
    style: str = "implications"  # one of PROMPT_STYLES
    split_newlines: bool = True  # one training text per line, else one per self-edit
    max_chars: int = 32_000
    max_training_texts: int = 256
    max_repeats: int = 16  # of one line that has a letter in it

    def __post_init__(self):
        if self.style not in PROMPT_STYLES:
            raise ValueError(f"unknown style {self.style!r}: expected one of {PROMPT_STYLES}")
        for name in ("max_chars", "max_training_texts", "max_repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    def load(self, split: str) -> list[tuple[Problem, Exam]]:
        """Return the problems of 'train' or 'eval' with their exams, in the source's order."""
        return load_problems(self.source, split)

    def load_share(self, split: str, share: tuple[int, int]) -> list[tuple[Problem, Exam]]:
        """Return what one of several processes reads of them."""
        return load_problems(self.source, split, share)

    def edit_prompt(self, problem: Problem) -> str:
        """Return the prompt that asks for a self-edit in this task's style."""
        return _edit_prompt(problem, self.style)

    def parse(self, problem: Problem, text: str) -> SelfEdit | Rejected:
        """Turn what the policy wrote into training texts, or say why not. Never raises.

        Control characters and halves of surrogate pairs are dropped from the training texts.
        """
        prompt = self.edit_prompt(problem)
        texts = self._training_texts(problem, text)
        if isinstance(texts, str):
            return Rejected(problem.id, prompt, text, reason=texts)
        return SelfEdit(problem.id, prompt, text, tuple(texts))

    def question_prompt(self, problem: Problem) -> str:
        """Return the prompt that asks for questions with their answers, whatever the style."""
        return _edit_prompt(problem, "self-qa")

    def parse_questions(self, problem: Problem, text: str) -> tuple[Question, ...]:
        """Take every question with its answer that is there in full, each question once.

        An answer ends with its line. One that is longer than 200 characters is no short answer.
        """
        del problem
        questions = {}
        for part in _question_parts(text.translate(_UNPRINTABLE)):
            question, colon, answer = _QUESTION_START.sub("", part, count=1).partition("Answer:")
            question, answer = " ".join(question.split()), answer.strip().partition("\n")[0].strip()
            if colon and question and 0 < len(answer) <= 200:
                questions.setdefault(question, answer)
        return tuple(Question(question, answer) for question, answer in questions.items())

    def teacher_prompt(self, problem: Problem) -> str:
        """Return the titled passage, as one document before another."""
        return f"{problem.title}\n{problem.passage}\n\n"

    def passage_only(self, problem: Problem) -> SelfEdit:
        """Return the control that trains on the titled passage alone."""
        title, passage = problem.title, problem.passage
        texts = training_sequences("", title=title, passage=passage, split_newlines=True)
        return SelfEdit(problem.id, prompt="", text="", training_texts=tuple(texts))

    def answer_prompt(self, problem: Problem, question: str) -> str:
        """Return the question with its topic and without the passage."""
        return (
            "Answer the question from memory, in a few words and nothing else.\n"
            f"Topic: {problem.title}\nQuestion: {question}\nAnswer:"
        )

    def grade(self, question: Question, prediction: str) -> bool:
        """Return the offline grader's verdict."""
        return grade(question.question, (question.answer, *question.others), prediction)

    def _training_texts(self, problem: Problem, text: str) -> list[str] | str:
        """Return the training texts, or the reason why there are none."""
        if len(text) > self.max_chars:
            return f"too long: {len(text):,} characters, at most {self.max_chars:,}"
        written = text.translate(_UNPRINTABLE)
        if not written.strip():
            return "empty"
        lines = [line.strip() for line in written.splitlines() if any(map(str.isalpha, line))]
        if not lines:
            return "no words: not a single letter"
        repeats = max(Counter(lines).values())
        if repeats > self.max_repeats:
            return f"repeats itself: one line {repeats:,} times, at most {self.max_repeats:,}"
        texts = training_sequences(
            written,
            title=problem.title,
            passage=problem.passage,
            split_newlines=self.split_newlines,
        )
        if len(texts) > self.max_training_texts:
            return f"too many texts: {len(texts):,}, at most {self.max_training_texts:,}"
        return texts


def _edit_prompt(problem: Problem, style: str) -> str:
    passage = f"Passage:\n{problem.title}\n{problem.passage}"
    return _EDIT_PROMPTS[style].replace("{passage}", passage)


def training_sequences(
    self_edit: str, *, title: str, passage: str, split_newlines: bool
) -> list[str]:
    """Turn a self-edit into training texts, by the rules of the authors' code.

    1. Whole: the parts between '---', stripped, without blank ones. If none is left, the text is
       the one part, so that an empty self-edit makes one empty part.
    2. With `split_newlines`, the lines of those parts instead, again stripped and without blank
       ones. A first line before one that begins with '1.' introduces the list, and is dropped.
    3. With `split_newlines`, text that has both a 'Question N:' and an 'Answer:' in it is cut
       before each line that begins with 'Question N:' instead, and '---' is kept. The prompt may
       have ended in 'Question 1:', so the first part gets that label if it lacks one. 'Answer 1:'
       is not 'Answer:': such questions and answers become lines, by rule 2.
    4. The title, on a line of its own, precedes every text; the passage is the last text.

    Args:
      self_edit: what the policy wrote; anything at all.
      title: the topic of the passage.
      passage: the passage itself, which is trained on with the self-edit.
      split_newlines: whether rules 2 and 3 apply.
    """
    if not split_newlines:
        parts = _between_dashes(self_edit)
    elif _QUESTION_START.search(self_edit) and _ANSWER_START.search(self_edit):
        parts = _question_parts(self_edit)
    else:
        lines = "\n".join(_between_dashes(self_edit)).splitlines()
        parts = [line.strip() for line in lines if line.strip()]
        if len(parts) > 1 and parts[1].startswith("1."):
            del parts[0]
    return [f"{title}\n{part}" for part in [*parts, passage.strip()]]


def _between_dashes(text: str) -> list[str]:
    return [part.strip() for part in text.split("---") if part.strip()] or [text.strip()]


def _question_parts(text: str) -> list[str]:
    first, *others = _NEXT_QUESTION.split(text.strip())
    if not first.startswith("Question"):
        first = f"Question 1: {first.strip()}"
    return [first, *others]
