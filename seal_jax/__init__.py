"""SEAL, self-adapting language models, in JAX. The loop is in `seal_jax.train`.

Public names are imported when they are first used, so that `import seal_jax` (and the task side,
and the config's checks) touches no accelerator.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    # the task: host only
    "Problem": "tasks.task",
    "Exam": "tasks.task",
    "Question": "tasks.task",
    "SelfEdit": "tasks.task",
    "Rejected": "tasks.task",
    "TASKS": "tasks",
    "make_task": "tasks",
    # the model
    "ModelConfig": "models.config",
    "load_model": "models",
    "forward": "models.transformer",
    # adapters and the inner loop
    "Adapters": "types",
    "InnerBatch": "types",
    "init_adapters": "lora",
    "merge": "lora",
    "concatenate": "lora",
    "make_job": "self_edit",
    "pack": "self_edit",
    "text_of": "self_edit",
    "make_inner_update": "inner",
    "make_optimizer": "optim",
    # taking it elsewhere
    "export_run": "export",
    "load_peft": "peft",
    "save_peft": "peft",
    # sampling
    "generate": "sample",
    # rewards and the outer loop
    "make_objective": "objectives",
    "rest_em": "objectives",
    "random_em": "objectives",
    "reinforce": "objectives",
    "rloo": "objectives",
    "grpo": "objectives",
    "ppo": "objectives",
    "make_policy_update": "policy",
    "TrainState": "types",
    "default_config": "config",
    "load_config": "config",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'seal_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"seal_jax.{_HOME[name]}"), name)
