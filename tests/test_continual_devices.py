"""Edits one after another over eight devices: who divides, and that nothing else changes."""

import numpy as np
import pytest
from tiny_fixtures import on_one_device
from tiny_run import CONFIG

from seal_jax.commands.continual import draw, learn_in_sequence
from seal_jax.config.load import load_config
from seal_jax.config.setup import make_work, settings_of
from seal_jax.hosts.files import read_jsonl

pytest_plugins = ["tiny_fixtures"]


def config_of(num_sequences, *changes):
    sizes = {"num_sequences": num_sequences, "num_edits": 2, "num_control": 2}
    words = [f"continual.{name}={size}" for name, size in sizes.items()]
    return load_config(CONFIG, [*words, "model.dtype=float32", *changes])


def test_sequences_that_the_devices_do_not_divide_are_refused():
    config = config_of(4)
    with pytest.raises(ValueError, match=r"num_sequences = 4: expected a multiple of 8, over"):
        make_work(settings_of(config), draw(config).problems)


@pytest.mark.long
@pytest.mark.parametrize(
    "remedies",
    [
        "replay,a_gem,gate",
        "null_space",
        "ogd",
        "ewc,trim,distill",
        "o_lora,slao",
        "bank",
        "kl,ema",
        "recall,scale",
    ],
)
def test_eight_devices_do_what_one_does(remedies, compiled, tmp_path):
    config = config_of(8, f"continual.remedies={remedies}")
    learn_in_sequence(config, str(tmp_path / "eight"))
    with on_one_device():
        learn_in_sequence(config, str(tmp_path / "one"))
    eight, one = (read_jsonl(tmp_path / name / "continual.jsonl") for name in ("eight", "one"))
    texts = [read_jsonl(tmp_path / name / "edits.jsonl") for name in ("eight", "one")]
    assert texts[0] == texts[1]
    for line, other in zip(eight, one, strict=True):
        for name in ("accuracy", "log_likelihood", "control/log_likelihood", "perplexity"):
            np.testing.assert_allclose(line[name], other[name], rtol=2e-4, atol=2e-4)
