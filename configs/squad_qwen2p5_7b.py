"""SEAL as published: Qwen2.5-7B on SQuAD, on a slice of TPUs.

command   bash launch/queued_resource.sh --config configs/squad_qwen2p5_7b.py --workdir gs://BUCKET/RUN
data      the model and SQuAD from the Hugging Face hub
size      2 rounds of 50 passages x 5 self-edits x 3 seeds = 1,500 inner runs, then 200 held-out
          passages in 5 ways, 800 inner runs
slices    those of SLICES, with what to --set there; compiled for them, and never run on one
expect    published: 32.7 % base, 39.7 own self-edit, 47.0 SEAL
"""

from seal_jax.config import default_config

# `bash tests/run.sh -m aot` compiles the run's programs for each.
SLICES = {
    "v5e:4x4": ("mesh.fsdp=2", "mesh.tensor=4", "outer.microbatch_size=4"),
    "v5p:2x2x1": ("outer.microbatch_size=4",),
    "v6e:2x4": ("mesh.tensor=4", "outer.microbatch_size=2"),
}


def get_config():
    config = default_config()
    config.model.source = "Qwen/Qwen2.5-7B"
    config.model.dtype = "bfloat16"
    config.model.chat = False  # a base model
    config.task.source = "hf:rajpurkar/squad"
    config.inner.max_adapters = 32
    config.inner.tokens_per_step = 1024
    config.outer.remat = "full"
    return config
