"""The command line: what it prints, what it writes, and that bad input is one clear message."""

import json
import shutil
import subprocess
import sys

import pytest
from tiny_run import CONFIG, TESTS, train_arguments

from seal_jax.commands import main as cli
from seal_jax.hosts.files import read_jsonl
from seal_jax.models.config import config_to_hf
from seal_jax.models.known_models import TINY

pytest_plugins = ["tiny_fixtures"]

PASSAGES = [
    {"title": "zorbin", "context": "zorbin color is red. zorbin home is cave."},
    {"title": "miral", "context": "miral food is figs. miral day is sunday."},
]


@pytest.fixture
def passages(tmp_path):
    path = tmp_path / "passages.json"
    path.write_text(json.dumps(PASSAGES))
    return path


def fail(capsys, arguments):
    """Run a command that must end with code 2 and one message; returns the message."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"seal-jax {arguments[0]}: ")
    assert "Traceback" not in output.err
    return output.err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("inner.lerning_rate=1e-3", ("inner.lerning_rate", "inner.learning_rate")),
        ("outr.num_steps=1", ("outr.num_steps", "outer.num_steps")),
        ("inner.learning_rate=nan", ("inner.learning_rate = nan", "finite number in (0, 10]")),
        ("inner.learning_rate=-1", ("inner.learning_rate = -1", "finite number in (0, 10]")),
        ("outer.num_steps=0", ("outer.num_steps = 0", "an integer >= 1")),
        ("inner.rank=many", ("inner.rank = many", "an integer in [1, 4096]")),
        ("task.name=fact", ("task.name = 'fact'", "'facts'")),
        ("inner.targets=q_proj,z_proj", ("inner.targets", "z_proj", "v_proj")),
        ("inner.optimizer=nowhere:nothing", ("inner.optimizer", "nowhere")),
        ("reward.rejected=inf", ("reward.rejected = inf", "finite")),
        ("inner.rank", ("'inner.rank'", "KEY=VALUE")),
    ],
)
def test_a_bad_override_names_key_value_and_what_is_allowed(tmp_path, capsys, override, words):
    message = fail(capsys, train_arguments(tmp_path / "run", override))
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_a_bad_config_stops_before_jax_is_imported(tmp_path):
    program = (
        "import sys; from seal_jax.commands.main import main; code = main(sys.argv[1:]);"
        "assert 'jax' not in sys.modules; sys.exit(code)"
    )
    arguments = train_arguments(tmp_path / "run", "inner.lerning_rate=1")
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "nearest valid key: 'inner.learning_rate'" in result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ("cannot read config file", "No such file")),
        ("def get_config(:\n", ("config.py:1", "SyntaxError")),
        ("x = 1\n", ("config.py", "no function get_config()")),
        (
            "from seal_jax.config import default_config\n"
            "def get_config():\n"
            "    config = default_config()\n"
            "    config.inner.rnk = 3\n"
            "    return config\n",
            ("config.py:4", "config.inner.rnk = 3", "'inner.rank'"),
        ),
    ],
    ids=["absent", "syntax", "empty", "typo"],
)
def test_a_bad_config_file_is_named_with_its_line(tmp_path, capsys, text, words):
    path = tmp_path / "config.py"
    if text is not None:
        path.write_text(text)
    message = fail(capsys, ["train", "--config", path, "--workdir", tmp_path / "run"])
    assert all(word in message for word in words), message


def pickled(folder):
    (folder / "config.json").write_text(json.dumps(config_to_hf(TINY)))
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    (folder / "weights.pt").write_bytes(b"never read")


def unsupported(folder):
    hf = config_to_hf(TINY) | {"model_type": "mamba"}
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "model.safetensors").write_bytes(b"never read")


def remote_code(folder):
    hf = config_to_hf(TINY) | {"auto_map": {"AutoModel": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "model.safetensors").write_bytes(b"never read")


@pytest.mark.parametrize(
    ("fill", "words"),
    [
        (shutil.rmtree, ("no such file or folder", "random:byte-tiny")),
        (lambda folder: None, ("no .safetensors file", "expected model.safetensors")),
        (pickled, ("pytorch_model.bin, weights.pt", "only safetensors or GGUF")),
        (unsupported, ("config.json", "model_type 'mamba'", "'llama'")),
        (remote_code, ("config.json", "auto_map", "trust_remote_code")),
    ],
    ids=["missing", "empty", "pickled", "unsupported", "remote_code"],
)
def test_a_bad_model_folder_is_named_and_claims_no_workdir(
    one_device, tmp_path, capsys, fill, words
):
    folder = tmp_path / "model"
    folder.mkdir()
    fill(folder)
    message = fail(capsys, train_arguments(tmp_path / "run", f"model.source={folder}"))
    assert all(word in message for word in (str(folder), *words)), message
    assert not (tmp_path / "run").exists()  # so that the corrected command may have it


def test_too_few_problems_are_counted_and_claim_no_workdir(one_device, tmp_path, capsys):
    message = fail(capsys, train_arguments(tmp_path / "run", "outer.num_steps=1000"))
    assert "asks for 2000 training problems; the task has 64" in message
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_holds_something_else_is_refused(one_device, tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("Dear ...")
    message = fail(capsys, train_arguments(tmp_path))
    assert str(tmp_path) in message and "not empty and has no config.json" in message
    message = fail(capsys, train_arguments(tmp_path / "letter.txt"))
    assert str(tmp_path / "letter.txt") in message


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", None, ("no such file",)),
        ("a.json", "[{", ("not JSON", "line 1, column 3")),
        ("a.json", "{}", ("expected a list of {title, context}", "an object")),
        ("a.json", '[{"title": "a"}]', ("[0]", "no field 'context'", "title")),
        ("a.json", '[{"title": "a", "context": 3}]', ("[0]", "'context'", "expected text")),
        ("a.json", '[{"title": "a", "context": " "}]', ("[0]", "field 'context' is empty")),
        ("a.txt", "", ("field 'context' is empty",)),
    ],
)
def test_a_bad_passage_file_is_named_with_index_and_field(tmp_path, capsys, name, text, words):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    message = fail(capsys, ["generate", "--config", CONFIG, "--passages", path])
    assert all(word in message for word in (str(path), *words)), message


def test_a_passage_beyond_the_context_is_refused(one_device, tmp_path, capsys):
    path = tmp_path / "long.txt"
    path.write_text("zorbin " * 200)
    message = fail(capsys, ["generate", "--config", CONFIG, "--passages", path])
    assert "1408 tokens" in message and "context of 1024 tokens" in message


@pytest.mark.parametrize("command", ["train", "eval", "generate", "tune"])
def test_help_fits_a_screen_and_has_an_example(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 100
    assert f"seal-jax {command} --config configs/" in text and "example" in text


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["train", "--config", CONFIG]])
def test_missing_arguments_are_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: seal-jax" in capsys.readouterr().err


def test_generate_writes_self_edits_as_text_and_as_json(
    finished, one_device, passages, tmp_path, capsys
):
    generate = ["generate", "--config", CONFIG, "--passages", str(passages)]
    assert cli.main(generate) == 0
    printed = capsys.readouterr().out
    for title in ("zorbin", "miral"):
        for number in (1, 2):
            assert f"=== {title}, self-edit {number}\n" in printed
    out = {name: tmp_path / f"{name}.jsonl" for name in ("base", "policy")}
    adapter = ["--adapter", str(finished / "checkpoints")]
    assert cli.main([*generate, "--out", str(out["base"])]) == 0
    assert cli.main([*generate, *adapter, "--out", str(out["policy"])]) == 0
    base, policy = (read_jsonl(out[name]) for name in ("base", "policy"))
    for rows in (base, policy):
        assert [(row["title"], row["edit"]) for row in rows] == [
            (title, edit) for title in ("zorbin", "miral") for edit in (0, 1)
        ]
        for row in rows:
            assert bool(row["training_texts"]) == (row["rejected"] is None)
    assert all(row["text"].strip() in printed for row in base)
    assert [row["text"] for row in base] != [row["text"] for row in policy]


def test_generate_refuses_a_folder_without_checkpoints(one_device, passages, tmp_path, capsys):
    generate = ["generate", "--config", CONFIG, "--passages", passages]
    assert str(tmp_path) in fail(capsys, [*generate, "--adapter", tmp_path])


def test_eval_of_a_checkpoints_folder_repeats_the_runs_own_comparison(
    finished, one_device, tmp_path, capsys
):
    evaluate = ["eval", "--config", CONFIG, "--workdir", str(tmp_path / "again")]
    policy = ["--policy", str(finished / "checkpoints")]
    assert cli.main([*evaluate, *policy]) == 0
    assert "| passage + self-edit of the SEAL policy |" in capsys.readouterr().out
    found, expected = (
        {tuple(row["name"]): row for row in read_jsonl(run / "eval_seal.jsonl")}
        for run in (tmp_path / "again", finished)
    )
    assert found.keys() == expected.keys()
    for name, row in found.items():
        assert row["text"] == expected[name]["text"]  # a hash of the training texts
        assert row["log_likelihood"] == pytest.approx(expected[name]["log_likelihood"], rel=1e-5)
    own = {row["text"] for row in read_jsonl(finished / "eval_own.jsonl")}
    assert own != {row["text"] for row in expected.values()}


def test_eval_refuses_a_policy_of_other_shapes(finished, one_device, tmp_path, capsys):
    """bfloat16 is another dtype than the checkpoint's."""
    arguments = ["eval", "--config", CONFIG, "--workdir", tmp_path, "--set", "model.dtype=bfloat16"]
    message = fail(capsys, [*arguments, "--policy", finished / "checkpoints"])
    assert "the checkpoint's is float32[264, 128], the run's bfloat16[264, 128]" in message
