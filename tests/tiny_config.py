"""The facts task and a random model of 0.4 M parameters: a whole run in seconds on a CPU.

seal-jax train --config tests/tiny_config.py --workdir runs/tiny
"""

from seal_jax.config import default_config


def get_config():
    config = default_config()
    config.model.source = "random:byte-tiny"
    config.model.chat = False
    config.task.name = "facts"
    config.sample.num_edits = 2
    config.sample.max_tokens = 24
    config.answer.max_tokens = 4
    config.inner.rank = 4
    config.inner.num_epochs = 2
    config.inner.batch_size = 8
    config.inner.num_seeds = 2
    config.inner.max_adapters = 4
    config.inner.tokens_per_step = 384
    # The accuracy of a random model is 0 throughout.
    config.reward.weights = {"log_likelihood": 1.0}
    config.reward.rejected = -100.0
    config.outer.num_steps = 2
    config.outer.problems_per_step = 2
    config.outer.rank = 4
    config.outer.learning_rate = 3e-3
    config.eval.num_problems = 2
    config.eval.num_bootstrap = 100
    config.checkpoint.adapters = "kept"
    return config
