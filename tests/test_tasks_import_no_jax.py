"""Tasks run on the host alone: neither importing nor using them imports a framework."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in FORBIDDEN, name

FORBIDDEN = {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "tensorflow"}
LAZY = {"datasets", "tensorflow_datasets", "transformers"}
sys.meta_path.insert(0, Blocked())

import seal_jax.tasks
from seal_jax.tasks.arc.small import self_edit_text
from seal_jax.tasks.task import prompts_of

SMALL = {"source": "small", "train_tasks": "small-00", "eval_tasks": "small-01"}
for name in seal_jax.tasks.TASKS:
    task = seal_jax.tasks.make_task(name, **(SMALL if name == "arc" else {}))
    for split in ("train", "eval"):
        problem, exam = task.load(split)[0]
        text = "It is a thing."
        if name == "arc":
            text = self_edit_text(["basic"], "train_using_all_tokens", "1e-3", "1")
        assert task.parse(problem, text).training_texts
        assert task.passage_only(problem).training_texts
        task.answer_prompt(problem, exam.questions[0].question)
        assert prompts_of(task, problem, exam)
        assert task.grade(exam.questions[0], exam.questions[0].answer)

imported = {name.split(".")[0] for name in sys.modules}
assert not imported & (FORBIDDEN | LAZY), imported & (FORBIDDEN | LAZY)
"""


def test_tasks_import_no_framework():
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
