"""SEAL, self-adapting language models, in JAX. The loop is in `seal_jax.train`.

Public names are imported when they are first used, so that `import seal_jax` (and the task side,
and the config's checks) touches no accelerator.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec

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
    "load_model": "sources",
    "forward": "models.transformer",
    # adapters and the inner loop
    "Adapters": "types",
    "InnerBatch": "types",
    "init_adapters": "models.lora",
    "merge": "models.lora",
    "concatenate": "models.lora",
    "make_job": "inner.texts",
    "pack": "inner.packing",
    "text_of": "inner.texts",
    "make_inner_update": "inner.update",
    "make_optimizer": "optim",
    # gradient projections and penalties, for any optax chain
    "a_gem": "continual.remedies.a_gem",
    "ewc": "continual.remedies.ewc",
    "null_space": "continual.remedies.null_space",
    "o_lora": "continual.remedies.o_lora",
    "ogd": "continual.remedies.ogd",
    # taking it elsewhere
    "export_run": "commands.export.export_run",
    "load_peft": "runs.peft",
    "save_peft": "runs.peft",
    # sampling
    "generate": "sampling.generate",
    # rewards and the outer loop
    "make_objective": "objectives",
    "rest_em": "objectives",
    "random_em": "objectives",
    "reinforce": "objectives",
    "rloo": "objectives",
    "grpo": "objectives",
    "ppo": "objectives",
    "make_policy_update": "outer.policy_update",
    "TrainState": "types",
    "default_config": "config",
    "load_config": "config",
}
__all__ = sorted(_HOME)
# Modules that had another name: the old name gives what the new ones hold, with a warning.
_MOVED = {
    "adapters": "runs.adapters",
    "cache_plan": "sampling.call_shapes",
    "checkpoint": "runs.checkpoint",
    "cli": "commands.main",
    "compare": "outer.comparison",
    "config_table": "config.table config.allowed",
    "decode": "sampling.decode",
    "doctor": "commands.doctor.checks",
    "draw": "sampling.draw",
    "export": "commands.export.export_run",
    "gguf_tokenizer": "models.gguf_tokenizer",
    "lora": "models.lora",
    "memory": "inner.population hosts.memory sharding",
    "metrics": "hosts.files hosts.console",
    "peft": "runs.peft",
    "peft_config": "runs.peft_config",
    "policy": "outer.policy_update outer.policy_step",
    "preemption": "hosts.preemption",
    "pretrain": "models.toys.pretrain",
    "problems": "outer.problems",
    "processes": "hosts.group hosts.exchange hosts.failure",
    "reliability": "outer.reliability",
    "rewards": "outer.rewards",
    "sample": "sampling.generate sampling.self_edits",
    "self_edit": "inner.texts inner.packing inner.steps models.padded_lengths",
    "start": "hosts.start_jax",
    "tasks.fit_grading": "tasks.knowledge.grading.fit",
    "tasks.grading": "tasks.knowledge.grading.grader",
    "tasks.grading_features": "tasks.knowledge.grading.features",
    "tasks.grading_params": "tasks.knowledge.grading.grader",
    "tasks.grading_rules": "tasks.knowledge.grading.rules",
    "tasks.grading_text": "tasks.knowledge.grading.words",
    "tasks.judge": "outer.judge",
    "tasks.sources": "tasks.knowledge.passages tasks.knowledge.libraries",
    "tokenizer": "models.tokenizer",
    "verify": "runs.verify",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'seal_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"seal_jax.{_HOME[name]}"), name)


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Find modules by the names in _MOVED, which the usual finders do not know any more."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> ModuleSpec | None:
        known = fullname.removeprefix("seal_jax.") in _MOVED
        return importlib.util.spec_from_loader(fullname, self) if known else None

    def exec_module(self, module: types.ModuleType) -> None:
        homes = _homes(module.__name__)
        message = f"{module.__name__} is now {' and '.join(homes)}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        module.__getattr__ = functools.partial(_find, list(map(importlib.import_module, homes)))

    def get_source(self, fullname: str) -> str:
        """Return the program that `python -m OLD_NAME` runs."""
        new = _homes(fullname)[0]
        return f"import runpy\nrunpy.run_module({new!r}, run_name='__main__', alter_sys=True)"


def _homes(fullname: str) -> list[str]:
    return [f"seal_jax.{new}" for new in _MOVED[fullname.removeprefix("seal_jax.")].split()]


def _find(modules: list[types.ModuleType], name: str):
    for module in modules:
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"none of {', '.join(m.__name__ for m in modules)} has {name!r}")


sys.meta_path.append(_Moved())
