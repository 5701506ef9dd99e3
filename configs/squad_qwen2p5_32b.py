"""SEAL's published protocol with a model of 32 billion parameters, on a slice of 16 or more v5p.

command   bash launch/queued_resource.sh --config configs/squad_qwen2p5_32b.py \\
              --workdir gs://BUCKET/RUN
data      the model and SQuAD from the Hugging Face hub
size      that of squad_qwen2p5_7b.py: 1,500 inner runs, then 800 on held-out passages
slices    those of SLICES, compiled for them and never run on one
expect    nothing is published for it
"""

from seal_jax.config import default_config

# `bash tests/run.sh -m aot` compiles the run's programs for each.
SLICES = {"v5p:2x2x4": ()}


def get_config():
    config = default_config()
    config.model.source = "Qwen/Qwen2.5-32B"
    config.model.dtype = "bfloat16"
    config.model.chat = False  # a base model
    config.task.source = "hf:rajpurkar/squad"
    config.inner.max_adapters = 16
    config.inner.tokens_per_step = 1024
    config.mesh.tensor = 8
    config.outer.remat = "full"
    return config
