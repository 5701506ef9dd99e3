"""Reading a config: what is refused and in which words, overrides, files, JSON and diffs."""

import functools
import json
import math
import subprocess
import sys

import pytest

from seal_jax.config import load as config_lib
from seal_jax.config.check_arms import arm_conflicts
from seal_jax.config.load import (
    ConfigError,
    default_config,
    diff,
    flatten,
    from_json,
    load_config,
    to_json,
    validate,
)
from seal_jax.config.setup import SECTIONS, settings_of
from seal_jax.config.table import FIELDS
from seal_jax.tasks import make_task
from seal_jax.types import Settings

HEADER = """
from seal_jax.config import default_config

def make(learning_rate):
    return ('tx', learning_rate)

def get_config():
    config = default_config()
"""


def _set(config, key, value):
    """Assign past the lock and the types, as a stored or hand-made config could be."""
    *path, leaf = key.split(".")
    for name in path:
        config = config[name]
    with config.unlocked(), config.ignore_type():
        config[leaf] = value


def _write(folder, *lines):
    path = folder / "experiment.py"
    path.write_text(HEADER + "".join(f"    {line}\n" for line in lines) + "    return config\n")
    return str(path)


def test_default_config_is_valid_locked_and_the_papers():
    config = default_config()
    validate(config)
    assert config.is_locked
    assert (config.inner.rank, config.inner.alpha, config.inner.learning_rate) == (32, 64.0, 1e-3)
    assert config.inner.targets == ("q_proj", "v_proj")
    assert config.outer.targets[-1] == "down_proj" and len(config.outer.targets) == 7
    other = default_config()
    other.inner.optax_kwargs.weight_decay = 0.5
    assert config.inner.optax_kwargs.weight_decay == 0.0, "defaults are shared between configs"


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_refuses_nan_infinity_and_another_type(key):
    for value in (math.nan, math.inf, b"bytes", {"a": math.nan}):
        config = default_config()
        _set(config, key, value)
        with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
            validate(config)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("inner.learning_rate", -1e-3, ["inner.learning_rate = -0.001", "(0, 10]"]),
        ("inner.learning_rate", 0.0, ["(0, 10]"]),
        ("inner.learning_rate", "1e-3", ["'1e-3'", "a finite number"]),
        ("inner.rank", 0, ["inner.rank = 0", "[1, 4096]"]),
        ("inner.rank", 2.5, ["an integer"]),
        ("inner.rank", True, ["an integer"]),
        ("inner.targets", ("q_porj",), ["q_porj", "q_proj"]),
        ("inner.targets", ("q_proj", "q_proj"), ["different"]),
        ("inner.targets", (), ["a tuple of different names"]),
        ("inner.targets", "q_proj", ["a tuple of different names"]),
        ("sample.stop", "END", ["a tuple of non-empty strings"]),
        ("answer.stop", ("END", ""), ["a tuple of non-empty strings"]),
        ("inner.schedule", "lineer", ["'constant', 'linear', 'cosine'"]),
        ("inner.optax_kwargs", {"b1": math.nan}, ["b1", "finite"]),
        ("inner.optax_kwargs", {"mask": len}, ["a dict of finite numbers"]),
        ("inner.optimizer", "adamw", ["a named function"]),
        ("inner.optimizer", functools.partial(max, 1), ["a named function"]),
        ("inner.optimizer", lambda rate: rate, ["found by its name"]),
        ("inner.optimizer", functools.wraps(math.sqrt)(lambda rate: rate), ["found by its name"]),
        ("inner.grad_clip", -1.0, ["(0, inf)"]),
        ("sample.temperature", -0.1, ["[0, 10]"]),
        ("sample.top_p", 1.5, ["(0, 1]"]),
        ("seed", -1, ["seed = -1", "[0, 2147483647]"]),
        ("model.dtype", "float16", ["'float32', 'bfloat16'"]),
        ("model.source", "", ["a non-empty string"]),
        ("model.chat", 1, ["True or False"]),
        ("model.template_args", {"enable_thinking": len}, ["model.template_args", "a dict"]),
        ("sample.max_thought_tokens", -1, ["an integer >= 0"]),
        ("task.name", "knowlege", ["task.name = 'knowlege'", "knowledge"]),
        ("task.styl", "qa", ["unknown key 'task.styl'", "'task.style'"]),
        ("outer.objective", "grop", ["'rest_em'", "'grpo'"]),
        ("answer.prefix", "Answer: ", ["answer.prefix = 'Answer: '", "no space or line end"]),
        ("eval.objectives", ("grop",), ["different names from", "grpo", "or ()"]),
        ("eval.objectives", ("grpo", "grpo"), ["different names"]),
        ("eval.objectives", ("rest_em",), ["eval.objectives has 'rest_em'", "outer.objective"]),
        ("eval.objectives", ("random_em",), ["'random_em': eval.random_control"]),
        ("eval.objective_kwargs", {"ppo": {}}, ["has 'ppo'", "eval.objectives is ()"]),
        ("eval.primary", ("seal-own", "seal-rnadom"), ["'seal-rnadom'", "seal, random"]),
        ("eval.primary", ("seal-grpo",), ["'seal-grpo': needs ARM-ARM"]),
        ("eval.primary_score", "acc", ["'accuracy', 'log_likelihood'"]),
        ("mesh.fsdp", 0, ["an integer >= 1 or -1"]),
        ("mesh.fsdp", -1, ["mesh.data and mesh.fsdp = -1"]),
        ("sharding.embed", "data", ["'fsdp tensor'"]),
        ("sharding.mlp", "fsdp tensor", ["sharding.embed and sharding.mlp = 'fsdp'"]),
        ("sharding.rows", "data tensor", ["sharding.rows and sharding.vocab = 'tensor'"]),
        ("inner.learning_rte", 1.0, ["unknown key", "'inner.learning_rate'"]),
        ("inner.optimiser", None, ["unknown key", "'inner.optimizer'"]),
        ("outer.num_seeds", 3, ["unknown key", "'inner.num_seeds'"]),
        ("inner", {"rank": 8}, ["missing keys", "inner.learning_rate"]),
        ("inner", 3, ["unknown key 'inner'", "inner.rank"]),
    ],
)
def test_validate_names_key_value_and_what_is_allowed(key, value, words):
    config = default_config()
    _set(config, key, value)
    with pytest.raises(ConfigError) as caught:
        validate(config)
    for word in words:
        assert word in str(caught.value)


def test_further_arms_are_told_apart():
    config = default_config()
    config.eval.objectives = ("grpo", "ppo")
    config.eval.objective_kwargs = {"grpo": {"clip": 0.1}}
    config.eval.primary = ("seal-own", "seal-grpo", "ppo-random")
    config.eval.primary_score = "log_likelihood"
    validate(config)
    assert from_json(to_json(config)).to_dict() == config.to_dict()
    values = dict(flatten(config)) | {"eval.objectives": ("seal", "model")}
    found = list(arm_conflicts(values))
    assert [word in line for word, line in zip(("'seal'", "'model'"), found, strict=False)]
    assert all("another arm or folder of that name" in line for line in found[:2])
    config.task.name = "arc"
    with pytest.raises(ConfigError, match="'arc' asks each question in several ways"):
        validate(config)


def test_a_pilot_may_change_and_what_was_stated_may_not():
    old, pilot, primary = default_config(), default_config(), default_config()
    pilot.eval.pilot, primary.eval.primary = "runs/pilot", ("seal-own",)
    assert diff(old, pilot) == "" and "eval.primary" in diff(old, primary)


def test_a_sections_keys_are_the_fields_of_its_namedtuple():
    keys = [key.split(".", 1) for key in FIELDS if "." in key]
    for section, kind in SECTIONS.items():
        assert sorted(kind._fields) == sorted(leaf for name, leaf in keys if name == section)
    others = {"seed", "task", "mesh", "rules"}
    assert set(Settings._fields) == {*SECTIONS, *others}
    assert {name for name, _ in keys} == {*SECTIONS, "task", "mesh", "sharding"}
    settings_of(default_config())


def test_the_task_section_takes_the_keys_of_its_task():
    config = default_config()
    assert config_lib.task_arguments(config) == config.task.to_dict()
    config.task.max_repeats = 3
    assert make_task(**config_lib.task_arguments(config)).max_repeats == 3
    config = default_config()
    config.task.name = "facts"
    config.task.num_facts = 2
    validate(config)
    assert config_lib.task_arguments(config) == {"name": "facts", "num_facts": 2}
    make_task(**config_lib.task_arguments(config))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"style": "poem"}, "task: .*'poem'"),
        ({"name": "facts", "style": "long"}, "task.style = 'long': task 'facts' takes only"),
        ({"name": "facts", "num_facts": 2.5}, "task.num_facts = 2.5: needs an integer"),
        ({"name": "facts", "num_fact": 2}, "'task.num_fact'; nearest valid key: 'task.num_facts'"),
        ({"name": "knowledge", "num_facts": 2}, "unknown key 'task.num_facts'"),
        ({"max_repeats": 0}, "task: .*max_repeats"),
    ],
)
def test_the_task_section_refuses_what_its_task_does(values, words):
    config = default_config()
    config.task.update(values)
    with pytest.raises(ConfigError, match=words):
        validate(config)


def test_validate_lists_everything_wrong_at_once():
    config = default_config()
    _set(config, "inner.rank", 0)
    _set(config, "outer.num_stesp", 3)
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    "override, value",
    [
        ("seed=7", 7),
        ("inner.learning_rate=1e-4", 1e-4),
        ("inner.learning_rate=1", 1.0),
        ("inner.num_epochs = 3", 3),
        ("model.chat=false", False),
        ("model.chat=1", True),
        ("model.source=/a=b", "/a=b"),
        ("model.source='quoted'", "quoted"),
        ("inner.targets=q_proj,down_proj", ("q_proj", "down_proj")),
        ("inner.targets=('q_proj',)", ("q_proj",)),
        (r"sample.stop=('\n\n', '#')", ("\n\n", "#")),
        ("inner.optax_name=contrib.muon", "contrib.muon"),
        ("inner.optax_kwargs.b1=0.5", 0.5),
        ("model.template_args.enable_thinking=False", False),
        ("inner.optimizer=math:sqrt", math.sqrt),
        ("inner.optimizer=none", None),
        ("mesh.data=-1", -1),
        ("task.max_repeats=3", 3),
    ],
)
def test_overrides_are_read_by_the_type_of_the_key(tmp_path, override, value):
    config = load_config(_write(tmp_path), [override])
    for name in override.partition("=")[0].strip().split("."):
        config = config[name]
    assert config == value and type(config) is type(value)


def test_a_dict_override_replaces_and_the_last_override_wins(tmp_path):
    overrides = ["inner.optax_kwargs={'b1': 0.8}", "seed=1", "seed=2"]
    config = load_config(_write(tmp_path), overrides)
    assert config.inner.optax_kwargs.to_dict() == {"b1": 0.8}
    assert config.seed == 2 and config.is_locked and config.inner.is_locked


@pytest.mark.parametrize(
    "override, words",
    [
        ("inner.learning_rte=1", ["unknown key 'inner.learning_rte'", "'inner.learning_rate'"]),
        ("learning_rte=1", ["unknown key 'learning_rte'", "learning_rate"]),
        ("inner=1", ["unknown key 'inner'"]),
        ("inner.rank", ["KEY=VALUE"]),
        ("inner.rank=1e3", ["inner.rank = 1e3", "an integer"]),
        ("inner.learning_rate=fast", ["a finite number"]),
        ("inner.learning_rate=nan", ["inner.learning_rate = nan", "(0, 10]"]),
        ("inner.learning_rate=inf", ["inner.learning_rate = inf"]),
        ("model.chat=maybe", ["True or False"]),
        ("inner.optimizer=no_such_module:f", ["cannot import 'no_such_module:f'"]),
        ("inner.optimizer=math", ["'module:name'"]),
        ("inner.optax_kwargs={", ["a dict"]),
        ("inner.optax_kwargs=3", ["a dict"]),
        ("task.name=nothing", ["task.name = 'nothing'", "knowledge"]),
    ],
)
def test_a_bad_override_is_refused_in_words(tmp_path, override, words):
    with pytest.raises(ConfigError) as caught:
        load_config(_write(tmp_path), [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "line, words",
    [
        ("config.inner.learning_rte = 1e-3", ["'inner.learning_rte'", "'inner.learning_rate'"]),
        ("config.iner.rank = 3", ["unknown key 'iner.rank'", "'inner.rank'"]),
        ("inner = config.inner; inner.rnk = 3", ["unknown key 'rnk'", "rank'"]),
        ("config.inner.rank = 'many'", ["TypeError", "rank", "config.inner.rank = 'many'"]),
        ("config.inner.rank = = 3", ["SyntaxError", "config.inner.rank = = 3"]),
        ("import no_such_module", ["ModuleNotFoundError", "no_such_module"]),
        ("1 / 0", ["ZeroDivisionError"]),
    ],
)
def test_a_failing_file_is_named_with_its_line(tmp_path, line, words):
    path = _write(tmp_path, line)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for word in [f"{path}:9:", *words]:
        assert word in str(caught.value)


def test_a_file_that_is_no_config(tmp_path):
    with pytest.raises(ConfigError, match="cannot read config file .*No such file"):
        load_config(str(tmp_path / "absent.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match=r"has no function get_config\(\)"):
        load_config(str(tmp_path / "empty.py"))
    (tmp_path / "other.py").write_text("def get_config():\n    return {}\n")
    with pytest.raises(ConfigError, match="returned dict, not ConfigDict"):
        load_config(str(tmp_path / "other.py"))


def test_json_round_trip_keeps_types_and_functions(tmp_path):
    path = _write(tmp_path, "config.inner.optimizer = make", "config.inner.targets = ['k_proj']")
    config = load_config(path, ["inner.optax_kwargs.b1=0.5"])
    text = config_lib.to_json(config)
    again = config_lib.from_json(text)
    assert config_lib.to_json(again) == text and again.is_locked
    assert again.inner.targets == ("k_proj",)
    assert again.inner.optimizer is config.inner.optimizer
    assert json.loads(text)["inner"]["optimizer"] == "seal_jax_config_experiment:make"


def test_a_function_is_stored_by_the_name_that_was_given(tmp_path, monkeypatch):
    (tmp_path / "own_optimizers.py").write_text(
        "import functools, math\n"
        "partial = functools.partial(math.fmod, 7)\n"
        "renamed = functools.wraps(math.sqrt)(lambda rate: 2 * rate)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = _write(tmp_path)
    texts = []
    for name, value in (("partial", 7 % 4), ("renamed", 8)):
        config = load_config(path, [f"inner.optimizer=own_optimizers:{name}"])
        texts.append(config_lib.to_json(config))
        assert config_lib.from_json(texts[-1]).inner.optimizer(4) == value
    assert config_lib.diff(*texts).startswith('inner.optimizer: "own_optimizers:partial" -> ')


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not a config's JSON"),
        ("[1]", "not a config's JSON"),
        ("{}", "missing keys: seed"),
        ('{"seed": NaN}', "NaN is no number"),
        ('{"inner": {"optimizer": "no_such_module:f"}}', "cannot import 'no_such_module:f'"),
    ],
)
def test_from_json_refuses_what_is_no_config(text, words):
    with pytest.raises(ConfigError, match=words):
        config_lib.from_json(text)


def test_diff_and_fingerprint_see_the_experiment_not_its_placement():
    old, new = default_config(), default_config()
    new.mesh.fsdp = 4
    new.sample.max_rows = 3
    assert config_lib.diff(old, new) == ""
    assert config_lib.fingerprint(old) == config_lib.fingerprint(new)
    new.inner.learning_rate = 2e-3
    new.inner.targets = ("q_proj",)
    new.inner.optax_kwargs.b1 = 0.5
    new.inner.optimizer = math.sqrt
    stored = config_lib.to_json(old)
    assert config_lib.diff(stored, new).splitlines() == [
        "inner.learning_rate: 0.001 -> 0.002",
        'inner.optax_kwargs: {"weight_decay": 0.0} -> {"b1": 0.5, "weight_decay": 0.0}',
        'inner.optimizer: null -> "math:sqrt"',
        'inner.targets: ["q_proj", "v_proj"] -> ["q_proj"]',
    ]
    assert config_lib.fingerprint(stored) == config_lib.fingerprint(old)
    assert config_lib.fingerprint(old) != config_lib.fingerprint(new)


def test_diff_with_the_config_of_another_version():
    stored = json.loads(config_lib.to_json(default_config()))
    del stored["inner"]["rank"]
    stored["inner"]["gone"] = 1
    lines = config_lib.diff(json.dumps(stored), default_config()).splitlines()
    assert lines == ["inner.gone: 1 -> (absent)", "inner.rank: (absent) -> 32"]


def test_a_key_that_older_versions_lack_is_at_its_default():
    stored = json.loads(config_lib.to_json(default_config()))
    del stored["model"]["template_args"], stored["answer"]["max_thought_tokens"]
    text, now = json.dumps(stored), default_config()
    assert config_lib.diff(text, now) == ""
    assert config_lib.to_json(config_lib.from_json(text)) == config_lib.to_json(now)
    now.model.template_args = {"enable_thinking": False}
    assert config_lib.diff(text, now) == 'model.template_args: {} -> {"enable_thinking": false}'
    now.model.chat = False
    with pytest.raises(ConfigError, match="no template to read them"):
        validate(now)


def test_the_door_imports_no_jax(tmp_path):
    code = (
        "import sys\n"
        "from seal_jax import config\n"
        f"config.load_config({_write(tmp_path)!r}, ['inner.rank=8'])\n"
        "found = {'jax', 'flax', 'torch', 'tensorflow'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
