"""A new task, objective, reward, optimizer, family or command is one new file, found by name."""

import subprocess
import sys

import numpy as np
import optax
import pytest
from tiny_run import CONFIG, TESTS

from seal_jax import commands, objectives, tasks
from seal_jax.commands.main import main
from seal_jax.config import ConfigError, load_config
from seal_jax.config.load import from_json, task_arguments, to_json
from seal_jax.config.setup import settings_of
from seal_jax.extensions import load_plugin, plugin_names
from seal_jax.models.config import config_from_hf
from seal_jax.objectives import OBJECTIVES, make_objective
from seal_jax.objectives.objective import Past, Rewards
from seal_jax.optim import make_optimizer
from seal_jax.outer.rewards import Evidence, Outcome, reward_of
from seal_jax.tasks import TASKS, make_task

TASK = '''
import dataclasses

from seal_jax.tasks.task import Exam, Problem, Question, Rejected, SelfEdit


@dataclasses.dataclass(frozen=True)
class Sums:
    """Add numbers."""

    largest: int = 3

    def __post_init__(self):
        if self.largest < 1:
            raise ValueError(f"largest is {self.largest}, expected at least 1")

    def load(self, split):
        numbers = range(1, self.largest + 1) if split == "train" else range(self.largest + 1, 9)
        return [(Problem(str(n), f"{n} + {n}", ""), Exam(str(n), self.ask(n))) for n in numbers]

    def ask(self, n):
        return (Question(f"{n} + {n}?", str(n + n)),)

    def edit_prompt(self, problem):
        return problem.passage

    def parse(self, problem, text):
        if not text:
            return Rejected(problem.id, problem.passage, text, "empty")
        return SelfEdit(problem.id, problem.passage, text, (text,))

    def passage_only(self, problem):
        return SelfEdit(problem.id, "", "", (problem.passage,))

    def answer_prompt(self, problem, question):
        return question

    def grade(self, question, prediction):
        return prediction == question.answer
'''
OBJECTIVE = '''
import numpy as np

from seal_jax.objectives.objective import Objective, imitate


def sign(threshold: float = 0.0) -> Objective:
    """Imitate every self-edit above a threshold."""

    def advantages(rewards, past, rng):
        return np.where(rewards.values > threshold, 1.0, np.nan).astype(np.float32)

    return Objective(advantages, imitate)
'''
REWARD = '''
def vowels(evidence, outcome):
    """Return how many vowels were written."""
    return float(sum(evidence.text.count(vowel) for vowel in "aeiou"))
'''
OPTIMIZER = """
import optax


def slow_descent(learning_rate):
    return optax.sgd(learning_rate / 10)
"""
FAMILY = """
from seal_jax.models.config import Family

family = Family("ToyForCausalLM", {"head_dim": 16}, {"qk_norm": True})
"""
COMMAND = """
HELP = "Say nothing."
EXAMPLES = "example:\\n  seal-jax hush"


def add_arguments(parser):
    parser.add_argument("--words", default="")


def run(arguments):
    print(arguments.words, end="")
    return 0
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return (file, kind, name, attribute) -> None: install a package of one file."""

    def make(text: str, kind: str = "", name: str = "", attribute: str = "", folder: str = "a"):
        path = tmp_path / folder
        described = path / f"toy_{folder}-1.dist-info"
        described.mkdir(parents=True)
        (path / "toy_package.py").write_text(text)
        (described / "METADATA").write_text(f"Name: toy-{folder}\nVersion: 1\n")
        value = f"toy_package{attribute and ':'}{attribute}"
        if kind:
            entry = f"[seal_jax.{kind}]\n{name} = {value}\n"
            (described / "entry_points.txt").write_text(entry)
        monkeypatch.delitem(sys.modules, "toy_package", raising=False)
        monkeypatch.syspath_prepend(path)

    yield make
    sys.modules.pop("toy_package", None)


def test_a_task(install, capsys):
    install(TASK, "tasks", "sums", "Sums")
    config = load_config(CONFIG, ["task.name=sums", "task.largest=2"])
    task = make_task(**task_arguments(config))
    assert [problem.id for problem, _ in task.load("train")] == ["1", "2"]
    assert "sums" in TASKS and list(TASKS) == ["arc", "facts", "knowledge", "sums"]
    assert to_json(from_json(to_json(config))) == to_json(config)
    for override, words in (("largest=0", "task: largest is 0"), ("larg=1", "'task.largest'")):
        with pytest.raises(ConfigError, match=words):
            load_config(CONFIG, ["task.name=sums", f"task.{override}"])
    with pytest.raises(ValueError, match="'sums' has no field 'larg'; did you mean 'largest'"):
        make_task("sums", larg=1)


def test_an_objective(install):
    with pytest.raises(ConfigError, match="outer.objective = 'sign': needs one of 'grpo', 'ppo'"):
        load_config(CONFIG, ["outer.objective=sign"])
    install(OBJECTIVE, "objectives", "sign", "sign")
    config = load_config(
        CONFIG, ["outer.objective=sign", "outer.objective_kwargs={'threshold': 0.5}"]
    )
    outer = settings_of(config).outer
    objective = make_objective(outer.objective, **outer.objective_kwargs)
    rewards = Rewards(np.array([[0.0, 1.0]], np.float32), np.ones((1, 2), bool))
    found = objective.advantages(rewards, Past(), np.random.default_rng(0))
    np.testing.assert_array_equal(found, [[np.nan, 1.0]])
    with pytest.raises(ValueError, match="sign has no option 'thresh'; did you mean 'threshold'"):
        make_objective("sign", thresh=1)


def test_a_reward(install):
    install(REWARD, "rewards", "vowels", "vowels")
    config = load_config(CONFIG, ["reward.weights={'accuracy': 1.0, 'vowels': 0.5}"])
    outcome = Outcome(0.25, -1.0, 2.0, 1.0, ("?",), 10)
    evidence = Evidence([outcome], "red cave", "", length=0.25, baseline=0.2)
    assert reward_of(evidence, settings_of(config).reward.weights, 0.0) == 0.25 + 0.5 * 3
    with pytest.raises(ConfigError, match="a dict of weights of accuracy, .*, vowels$"):
        load_config(CONFIG, ["reward.weights={'vowel': 0.5}"])


def test_an_optimizer(install):
    """No entry point: a function of the learning rate, named where it is."""
    install(OPTIMIZER)
    names = [f"{loop}.optimizer=toy_package:slow_descent" for loop in ("inner", "outer")]
    settings = settings_of(load_config(CONFIG, names))
    for section in (settings.inner, settings.outer):
        tx = make_optimizer(optimizer=section.optimizer, grad_clip=None)(1.0)
        updates, _ = tx.update(np.ones(2, np.float32), tx.init(np.ones(2, np.float32)))
        np.testing.assert_allclose(optax.apply_updates(np.ones(2), updates), 0.9)
    config = load_config(CONFIG, names)
    assert from_json(to_json(config)).inner.optimizer is config.inner.optimizer


def test_a_family(install):
    install(FAMILY, "families", "toy", "family")
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
    config = config_from_hf({"model_type": "toy", "num_attention_heads": 4, **sizes})
    assert (config.family, config.head_dim, config.qk_norm) == ("toy", 16, True)


def test_a_command(install, capsys):
    install(COMMAND, "commands", "hush")
    assert main(["hush", "--words", "nothing"]) == 0
    assert capsys.readouterr().out == "nothing"
    for words, shown in {"--help": "hush      Say nothing.", "hush -h": "seal-jax hush"}.items():
        with pytest.raises(SystemExit) as end:
            main(words.split())
        assert end.value.code == 0 and shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "base", "text", "find"),
    [
        (objectives, "objective", OBJECTIVE, lambda: make_objective("sign").min_edits == 1),
        (tasks, "task", f"{TASK}\n\nTASK = Sums\n", lambda: make_task("sign").largest == 3),
        (commands, "main", COMMAND, lambda: main(["sign"]) == 0),
    ],
    ids=["objectives", "tasks", "commands"],
)
def test_a_new_file_in_a_folder_is_found(folder, base, text, find, tmp_path, monkeypatch):
    (tmp_path / "sign.py").write_text(text)
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    name = f"{folder.__name__}.sign"
    monkeypatch.setattr(folder, "sign", None, raising=False)  # what the import sets goes again
    try:
        assert find()
    finally:
        sys.modules.pop(name, None)


def test_names_cost_no_jax(tmp_path):
    """`seal-jax --help` imports all commands, the config asks for all names."""
    program = (
        "import sys; from seal_jax.commands.main import main\n"
        "from seal_jax.objectives import OBJECTIVES\n"
        "assert 'rloo' in OBJECTIVES and len(OBJECTIVES) == 6\n"
        "try: main(['--help'])\n"
        "finally: assert not {'jax', 'flax', 'orbax'} & set(sys.modules), 'imported'\n"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for name in "bench doctor eval export generate plan train verify view".split():
        assert f"\n    {name} " in result.stdout


def test_what_cannot_be_imported_is_named(install, capsys):
    install("", "tasks", "sums", "Sums")
    with pytest.raises(ValueError, match="tasks: 'sums' is registered as toy_package:Sums: "):
        load_config(CONFIG, ["task.name=sums"])
    install("", "rewards", "vowels", "vowels", folder="b")
    with pytest.raises(ConfigError, match="reward.weights: rewards: 'vowels' is registered as"):
        load_config(CONFIG, ["reward.weights={'vowels': 1.0}"])


def test_a_name_of_two_packages_is_refused(install):
    install(OBJECTIVE, "objectives", "sign", "sign")
    install(OBJECTIVE, "objectives", "sign", "other", folder="b")
    assert plugin_names("objectives") == ["sign"] and "sign" in OBJECTIVES
    with pytest.raises(ValueError, match="'sign' is registered more than once: "):
        load_plugin("objectives", "sign")
    assert load_plugin("objectives", "nothing") is None
