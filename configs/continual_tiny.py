"""One self-edit after another with a tiny model: what it forgets, and which remedies help.

command   seal-jax continual --config configs/continual_tiny.py --workdir runs/continual_tiny
          --set continual.remedies=replay,gate   with remedies
          --set continual.num_edits=8            a shorter sequence
size      16 sequences of 32 self-edits on synthetic facts, side by side, each asked about all 32
          things and 16 others after every edit
hardware  2 CPU cores
time      some 6 minutes, and once 1 to 3 for the model (2026-11-29)
expect    plain merging breaks down; replay with half merges keeps more than the unedited model
          knows. seal_jax/continual/README.md has the table
"""

from seal_jax.config import default_config


def get_config():
    config = default_config()
    config.model.source = "tiny:facts-asked"
    config.model.chat = False
    config.task.name = "facts"
    config.task.num_train = 12
    config.task.num_eval = 600
    config.sample.top_p = 1.0
    config.sample.max_tokens = 72
    config.sample.max_rows = 64
    config.answer.max_tokens = 8
    config.answer.max_rows = 512
    config.inner.rank = 8
    config.inner.alpha = 16.0
    config.inner.targets = config.outer.targets
    # At ten times the rate and a quarter of the epochs the model breaks down after four edits.
    config.inner.learning_rate = 1e-3
    config.inner.num_epochs = 40
    config.inner.batch_size = 4
    config.inner.num_seeds = 1
    config.inner.tokens_per_step = 4096
    config.continual.num_sequences = 16
    config.continual.num_edits = 32
    config.continual.num_control = 16
    config.continual.memory_tokens = 8192
    config.outer.num_steps = 2
    config.outer.problems_per_step = 6
    config.eval.num_problems = 16
    config.checkpoint.keep = 1
    return config
