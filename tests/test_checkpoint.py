"""Checkpoints: round trips of any optimizer's state, damage, kills and other device counts."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seal_jax.runs import checkpoint, checkpoint_items
from seal_jax.runs.checkpoint import CheckpointError, make_manager, restore, save, tree_hash, wait

pytest_plugins = ["tiny_fixtures"]


class DelayedState(NamedTuple):
    """The state of `delayed`: all that Orbax finds hard."""

    count: jax.Array
    previous: optax.Updates
    none: None
    empty: optax.EmptyState
    no_rows: jax.Array
    scale: np.float32
    epochs: int
    name: str


def delayed() -> optax.GradientTransformation:
    """A user's own transform: apply the updates of the step before."""

    def init(params):
        previous = jax.tree.map(jnp.zeros_like, params)
        return DelayedState(
            count=jnp.zeros([], jnp.int32),
            previous=previous,
            none=None,
            empty=optax.EmptyState(),
            no_rows=jnp.zeros((0, 3)),
            scale=np.float32(0.1),
            epochs=3,
            name="delayed",
        )

    def update(updates, state, params=None):
        del params
        return state.previous, state._replace(count=state.count + 1, previous=updates)

    return optax.GradientTransformation(init, update)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-3),
    "sgd": lambda: optax.sgd(1e-3),
    "lion": lambda: optax.lion(1e-3),
    "adafactor": lambda: optax.adafactor(1e-3),
    "muon": lambda: optax.contrib.muon(1e-3),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-3),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(1e-3, 0.0, 10))
    ),
    "masked": lambda: optax.masked(optax.adam(1e-3), {"layers": True, "bias": False}),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-3), 5),
    "delayed": delayed,
}


def _params(dtype=jnp.float32):
    weights = jax.random.normal(jax.random.key(0), (3, 4, 6), dtype)
    return {"layers": [{"kernel": kernel} for kernel in weights], "bias": jnp.ones(6, dtype)}


def _assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(e)
        if hasattr(e, "dtype"):
            assert a.dtype == e.dtype and a.shape == e.shape
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes(), (a, e)  # NaN equals itself
    assert tree_hash(actual) == tree_hash(expected)


def _filled(folder, steps=(1, 2), keep=5):
    """Save params * step at each step; return the manager."""
    manager = make_manager(folder, keep)
    for step in steps:
        params = jax.tree.map(lambda x, step=step: x * step, _params())
        save(manager, step, {"policy": params}, {"step": step})
    wait(manager)
    return manager


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_state_round_trips_bit_for_bit(tmp_path, name, dtype):
    tx, params = OPTIMIZERS[name](), _params(dtype)
    state = tx.init(params)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    params = optax.apply_updates(params, updates)
    manager = make_manager(tmp_path, keep=2)
    position = {"step": 3, "rewards": [0.1, 1 / 3], "rejected": {"a": None}, "text": "é\n"}
    save(manager, 3, {"policy": params, "opt_state": state}, position)
    wait(manager)
    step, pytrees, restored = restore(tmp_path, {"policy": params, "opt_state": state})
    assert step == 3 and restored == position
    _assert_same(pytrees, {"policy": params, "opt_state": state})
    step, pytrees, _ = (
        restore(manager, {"opt_state": jax.eval_shape(lambda: state)})
        if (name != "delayed")
        else restore(manager, {"opt_state": state})
    )
    _assert_same(pytrees["opt_state"], state)


def test_numpy_leaves_come_back_as_numpy(tmp_path):
    tree = {
        "array": np.arange(6, dtype=np.float64).reshape(2, 3).T,
        "bf16": np.ones(3, jnp.bfloat16),
        "empty": np.zeros((2, 0), np.int8),
        "scalar": np.int64(7),
        "nan": np.float32(math.nan),
        "flag": True,
        "number": 0.1,
        "text": "",
    }
    manager = make_manager(tmp_path, keep=1)
    save(manager, 0, {"tree": tree}, {})
    wait(manager)
    _assert_same(restore(tmp_path, {"tree": tree})[1]["tree"], tree)


def test_a_new_folder_has_nothing_to_restore(tmp_path):
    assert restore(make_manager(tmp_path / "new", 2), {"policy": _params()}) is None
    assert restore(tmp_path / "new", {"policy": _params()}) is None


def test_keep_is_how_many_of_the_latest_stay(tmp_path):
    manager = _filled(tmp_path, steps=(1, 2, 3, 4), keep=2)
    assert sorted(manager.all_steps()) == [3, 4]
    assert restore(manager, {"policy": _params()}, step=3)[2] == {"step": 3}
    with pytest.raises(CheckpointError, match=r"no step 1, only \[4, 3\]"):
        restore(manager, {"policy": _params()}, step=1)


@pytest.mark.parametrize(
    ("values", "best", "stays"),
    [
        ([0.1, 0.9, 0.3, 0.2], 1, [2, 4]),
        ([0.1, 0.9, math.nan, 0.2, math.nan], 1, [2, 5]),  # NaN is never the best
        ([math.nan, math.nan, 0.2, 0.1], 2, [3, 4]),
        ([None, 0.5, 0.7, None, None], 2, [2, 3, 5]),
        ([-math.inf, -2.0, -3.0, math.nan], 1, [2, 4]),
        ([0.9, 0.8, 0.7], 0, [3]),
    ],
)
def test_the_best_stay_beside_the_latest(tmp_path, values, best, stays):
    """Through a kill after each step, too: values are on disk."""
    for step, value in enumerate(values, start=1):
        manager = make_manager(tmp_path, keep=1, best=best)
        save(manager, step, {"policy": _params()}, {"step": step}, value)
        wait(manager)
        manager.close()
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == stays
    assert restore(tmp_path, {"policy": _params()}, step=stays[0])[2] == {"step": stays[0]}


@pytest.mark.parametrize("damage", [b'"value": 0.1', b'"valu', b""])
def test_a_damaged_value_of_the_best_is_named_and_evicts_nothing(tmp_path, damage):
    with make_manager(tmp_path, keep=1, best=1) as manager:
        for step, value in ((1, 0.9), (2, 0.2)):
            save(manager, step, {"policy": _params()}, {"step": step}, value)
    (tmp_path / "3.orbax-checkpoint-tmp-0" / "metrics").mkdir(parents=True)  # of a kill
    restore(tmp_path, {})
    path = tmp_path / "1" / "metrics" / "metrics"
    path.write_bytes(path.read_bytes().replace(b'"value": 0.9', damage))
    found = checkpoint.verify(tmp_path)
    assert found[2] == "" and found[1].startswith("metrics/metrics: ")
    for use in (lambda: make_manager(tmp_path, keep=1, best=1), lambda: restore(tmp_path, {})):
        with pytest.raises(CheckpointError, match="damaged checkpoint .*/1: metrics/metrics"):
            use()


@pytest.mark.parametrize("damage", [_flip, _truncate, os.unlink])
def test_verify_names_every_damaged_step(tmp_path, damage):
    """It finds what a restore would not use, and only that, without a template."""
    _filled(tmp_path / "good").close()
    assert checkpoint.verify(tmp_path / "good") == {1: "", 2: ""}
    for number, original in enumerate(_files(tmp_path / "good" / "2")):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", folder)
        damage(folder / original.relative_to(tmp_path / "good"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            used = restore(folder, {"policy": _params()})[0]
        found = checkpoint.verify(folder)
        assert found[1] == ""
        assert (found.get(2) == "") == (used == 2), (original, found)
        shutil.rmtree(folder)


def test_the_same_or_an_earlier_step_is_refused(tmp_path):
    manager = _filled(tmp_path)
    for step in (1, 2):
        with pytest.raises(CheckpointError, match=f"step {step} was not saved"):
            save(manager, step, {"policy": _params()}, {})


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, np.float32(1)])
def test_a_position_that_is_not_json_is_refused(tmp_path, value):
    manager = make_manager(tmp_path, 1)
    with pytest.raises(ValueError, match="position of step 1 is not JSON"):
        save(manager, 1, {"policy": _params()}, {"rewards": [value]})
    assert not manager.all_steps()


@pytest.mark.parametrize("leaf", [object(), jax.random.key(0), np.array(["text"])])
def test_a_leaf_that_cannot_be_saved_is_named(tmp_path, leaf):
    with pytest.raises(ValueError, match=r"leaf policy\['a'\].*cannot be saved"):
        save(make_manager(tmp_path, 1), 1, {"policy": {"a": leaf}}, {})


@pytest.mark.parametrize(
    "template, words",
    [
        (
            _params(jnp.bfloat16),
            r"policy\['bias'\]: the checkpoint's is float32\[6\], the run's bf",
        ),
        ({**_params(), "bias": jnp.ones(7)}, r"policy\['bias'\].*float32\[6\].*float32\[7\]"),
        ({**_params(), "extra": jnp.ones(7)}, r"policy\['extra'\]: the checkpoint's is absent"),
        ({"bias": jnp.ones(6)}, r"policy\['layers'\]\[0\]\['kernel'\].*the run's absent"),
    ],
)
def test_another_template_is_an_error_not_a_cast(tmp_path, template, words):
    manager = _filled(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        restore(manager, {"policy": template})
    assert sorted(manager.all_steps()) == [1, 2], "nothing is damaged"
    with pytest.raises(CheckpointError, match="the checkpoint's is absent"):
        restore(manager, {"critic": _params()})


def _files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("damage", [_flip, _truncate, os.unlink])
def test_damage_of_any_file_is_never_used(tmp_path, damage):
    """Either the file does not matter and the values verify, or the step before is restored."""
    _filled(tmp_path / "good").close()
    newest = jax.tree.map(lambda x: x * 2, _params())
    fallbacks = 0
    for number, original in enumerate(_files(tmp_path / "good" / "2")):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", folder)
        damage(folder / original.relative_to(tmp_path / "good"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step, pytrees, position = restore(folder, {"policy": _params()})
        assert position == {"step": step}
        if step == 2:
            _assert_same(pytrees["policy"], newest)
        else:
            fallbacks += 1
            _assert_same(pytrees["policy"], _params())
            said = [str(w.message) for w in caught if f"damaged checkpoint {folder}/2" in str(w)]
            assert said and any(x in said[0] for x in (original.name, "bias", "kernel")), said
        shutil.rmtree(folder)
    assert fallbacks >= 3


def _save_wrong_hash(manager, step):
    """Save a step with one leaf's hash off by one: what a silent bit flip looks like."""
    describe = checkpoint_items.describe

    def lie(path, leaf):
        description = describe(path, leaf)
        if path.endswith("['bias']"):
            description["hash"] = f"{int(description['hash'], 16) ^ 1:016x}"
        return description

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_items, "describe", lie)
        save(manager, step, {"policy": _params()}, {"step": step})
    wait(manager)


def test_a_wrong_hash_names_the_leaf_and_the_step_can_be_saved_again(tmp_path):
    manager = _filled(tmp_path, steps=(1,))
    _save_wrong_hash(manager, 2)
    with pytest.warns(UserWarning, match=r"/2: ValueError: leaf policy\['bias'\].*hash"):
        assert restore(tmp_path, {"policy": _params()})[0] == 1
    assert (tmp_path / "2").exists(), "a reader moves nothing"
    with pytest.warns(UserWarning, match="damaged checkpoint"):
        assert restore(manager, {"policy": _params()})[0] == 1
    assert len(list((tmp_path / "damaged").iterdir())) == 1
    save(manager, 2, {"policy": _params()}, {"step": 2})
    wait(manager)
    assert restore(manager, {"policy": _params()})[0] == 2


@pytest.mark.parametrize("small_disk", [3], indirect=True)
@pytest.mark.parametrize("foreseen", [True, False])
def test_a_disk_that_fills_up_keeps_the_last_good_step(small_disk, monkeypatch, foreseen):
    """Foreseen, nothing is begun; else somebody else took the room meanwhile."""
    if not foreseen:
        monkeypatch.setattr(checkpoint, "check_room", lambda *arguments: None)
    good, tree = 0, {"x": jnp.arange(100_000.0)}
    manager = make_manager(small_disk / "run", keep=20)
    with pytest.raises((OSError, ValueError), match="No space left") as error:
        for step in range(1, 20):
            save(manager, step, {"policy": jax.tree.map(lambda x, s=step: x + s, tree)}, {})
            wait(manager)
            good = step
    if foreseen:
        assert "No space left for a checkpoint: needs 1 MB, has 1" in str(error.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step, trees, _ = restore(small_disk / "run", {"policy": tree})
    assert step == good >= 2
    np.testing.assert_array_equal(trees["policy"]["x"], tree["x"] + step)


def test_no_good_step_is_an_error(tmp_path):
    manager = make_manager(tmp_path, keep=2)
    _save_wrong_hash(manager, 1)
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=r"\[1\] damaged"):
        restore(manager, {"policy": _params()})
    with pytest.warns(UserWarning), pytest.raises(CheckpointError):
        restore(manager, {"policy": _params()}, step=1)


def test_a_changed_position_is_damage(tmp_path):
    _filled(tmp_path).close()
    (path,) = [p for p in _files(tmp_path / "2" / "position") if b"record" in p.read_bytes()]
    item = json.loads(path.read_text())
    item["record"]["position"]["step"] = 3
    path.write_text(json.dumps(item))
    with pytest.warns(UserWarning, match="position/metadata: its hash"):
        assert restore(tmp_path, {"policy": _params()})[0] == 1


@pytest.mark.parametrize("num_devices", [8, 4, 2, 1])
def test_restore_on_another_number_of_devices(tmp_path, num_devices):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    value = jnp.arange(64.0).reshape(16, 4)

    def place(count, spec):
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
        return NamedSharding(mesh, spec)

    tree = {
        "split": jax.device_put(value, place(8, PartitionSpec("data"))),
        "whole": jax.device_put(value, place(8, PartitionSpec())),
    }
    manager = make_manager(tmp_path, keep=1)
    save(manager, 1, {"tree": tree}, {})
    wait(manager)
    target = place(num_devices, PartitionSpec("data"))
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target), tree)
    restored = restore(tmp_path, {"tree": template})[1]["tree"]
    for leaf in restored.values():
        np.testing.assert_array_equal(leaf, value)
        assert leaf.sharding == target
    assert tree_hash(restored) == tree_hash(tree)


def test_tree_hash_sees_every_bit_path_and_dtype():
    params = _params()
    assert tree_hash(params) == tree_hash(jax.tree.map(np.asarray, params))
    others = [
        {**params, "bias": params["bias"].at[0].set(np.nextafter(np.float32(1), 2))},
        {**params, "bias": params["bias"].astype(jnp.bfloat16)},
        {**params, "bias": params["bias"].reshape(1, 6)},
        {"layers": params["layers"], "scale": params["bias"]},
        {"zero": -jnp.zeros(1)},
        {"zero": jnp.zeros(1)},
    ]
    hashes = {tree_hash(tree) for tree in [params, *others]}
    assert len(hashes) == 7


KILLED = """
import sys
import jax.numpy as jnp
from seal_jax.runs import checkpoint, checkpoint_items
manager = checkpoint.make_manager(sys.argv[1], keep=2)
for step in range(1, 1000):
    tree = {str(i): jnp.full((64, 64), step * 100.0 + i) for i in range(8)}
    checkpoint.save(manager, step, {"tree": tree}, {"step": step})
    print(step, flush=True)
"""


def _kill_and_check(folder, num_saves, delay):
    """Kill a process that saves without end `delay` s after a save; what is left must be good."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, folder], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stdout:
            if int(line) == num_saves:
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                break
    template = {str(i): jnp.zeros((64, 64)) for i in range(8)}
    manager = make_manager(folder, keep=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a kill damages no finished step
        step, pytrees, position = restore(manager, {"tree": template})
    # When save k returns, save k - 1 is finished.
    assert step >= num_saves - 1 and position == {"step": step}
    for i in range(8):
        np.testing.assert_array_equal(pytrees["tree"][str(i)], np.full((64, 64), step * 100.0 + i))
    assert not list(folder.glob("*orbax-checkpoint-tmp*"))
    save(manager, step + 1, {"tree": template}, {})
    wait(manager)


@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_kill_9_while_saving_leaves_a_good_step(tmp_path, delay):
    _kill_and_check(tmp_path, num_saves=3, delay=delay)


@pytest.mark.long
@pytest.mark.parametrize("repeat", range(20))
def test_kill_9_at_many_moments(tmp_path, repeat):
    _kill_and_check(tmp_path, num_saves=2 + repeat % 3, delay=repeat * 0.011)
