"""Few-shot ARC with a tiny model on small invented tasks: the settings that work are learned.

command   seal-jax train --config configs/arc_tiny.py --workdir runs/arc_tiny
size      4 rounds of 6 tasks x 6 self-edits, a look at 12 held-out tasks after each; then those in
          5 ways: 252 inner runs of at most 40 steps
time      80 seconds for the model, once, then 4 minutes, on 2 CPU cores (2026-11-23)
expect    held-out tasks solved: 17 % in context, 25 % by the policy's own self-edits, 83 % by those
          of the SEAL policy, 17 % by the control's (one run). It shows the loop, and nothing of ARC
"""

from seal_jax.config import default_config
from seal_jax.tasks.arc.small import EDIT_INSTRUCTION, INSTRUCTION, NUM_TASKS

# `bash tests/run.sh -m aot` compiles the run's programs for it; the run needs none.
SLICES = {"v5e:2x2": ()}


def get_config():
    config = default_config()
    config.model.source = "tiny:arc"
    config.model.chat = False
    config.task.name = "arc"
    config.task.source = "small"
    names = [f"small-{i:02}" for i in range(NUM_TASKS)]
    config.task.train_tasks = " ".join(names[:32])
    config.task.eval_tasks = " ".join(names[32:])
    config.task.instruction = INSTRUCTION
    config.task.edit_instruction = EDIT_INSTRUCTION
    config.task.max_turns = 12
    config.task.max_tokens = 192
    config.task.max_steps = 40
    config.sample.num_edits = 6
    config.sample.top_p = 1.0
    config.sample.max_tokens = 320
    config.sample.max_rows = 36
    config.answer.max_tokens = 24
    config.answer.max_rows = 96
    config.inner.rank = 8
    config.inner.alpha = 16.0
    config.inner.targets = config.outer.targets
    config.inner.learning_rate = 1e-2
    config.inner.num_epochs = 6
    config.inner.batch_size = 2
    config.inner.num_seeds = 1
    config.inner.schedule = "cosine"
    config.inner.warmup_steps = 2
    config.inner.max_adapters = 36
    config.inner.tokens_per_step = 1024
    # Imitate every self-edit that solved its task, as the paper does.
    config.outer.objective_kwargs = {"select": "threshold", "threshold": 0.0}
    config.outer.num_steps = 4
    config.outer.problems_per_step = 6
    config.outer.update = "full"
    config.outer.learning_rate = 5e-4
    config.outer.schedule = "constant"
    config.outer.num_epochs = 6
    config.outer.batch_size = 8
    config.outer.microbatch_size = 8
    config.eval.num_problems = 12
    config.eval.every = 1
    return config
