"""Edits one after another, of many sequences side by side.

  known[0] = ask(models, problems)                       # unedited
  for k in range(N):
    edit     = write_edits(models, problems[k])          # each model on its sequence's next problem
    adapters = train(models, edit, remedies)             # [S] LoRA adapters in lockstep
    models   = keep(models, adapters, remedies)          # merged, or what a remedy does instead
    memory   = learn(models, edit, remedies)
    known[k + 1] = ask(models, problems)                 # what is still known, and what already

After every edit the models and all that remedies keep are saved: the same call goes on there.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from seal_jax.continual import memory
from seal_jax.continual.asking import ask, perplexity
from seal_jax.continual.edits import fresh_adapters, keep, learn, train, write_edits
from seal_jax.continual.matrix import Record, summarize
from seal_jax.continual.remedies.remedy import Learner, Work
from seal_jax.continual.report import write_report
from seal_jax.hosts import manifest
from seal_jax.hosts.console import progress
from seal_jax.hosts.files import append_json, read_jsonl, truncate_after
from seal_jax.hosts.preemption import stop_if_told
from seal_jax.models.own_kernels import own_kernels, own_leaves, with_leaves
from seal_jax.outer.problems import Batch
from seal_jax.outer.stages import Edit
from seal_jax.outer.step_log import Clock, number
from seal_jax.runs import checkpoint as checkpoints
from seal_jax.sharding import tree_bytes
from seal_jax.tasks.task import Rejected

LEDGER = "continual.jsonl"


def run_sequences(work: Work, control: Batch, folder: str) -> list[dict[str, Any]]:
    """Make all edits, or those that are left, and return the ledger: a line for each.

    Line 0 is of the unedited models. Where not all problems were asked, a value is None.

    Args:
      control: problems that no edit is on.

    Raises:
      Stopped: a process was told to end; the edits that are finished are on disk.
    """
    ledger, path = os.path.join(folder, LEDGER), os.path.join(folder, "checkpoints")
    manifest.begin(folder)
    with checkpoints.make_manager(path, keep=1, best=0) as manager:
        learner, first = restore(work, begin(work), manager, folder)
        total = work.settings.num_edits
        bar = progress(total, f"{work.num} sequences", "edit")
        bar.update(first)
        if first == 0 and not _lines(ledger):
            append_json(ledger, {"step": 0} | _ask_all(work, learner, control, 0))
        for step in range(first, total):
            stop_if_told()
            learner, line = one_edit(work, learner, step, folder)
            clock = Clock()
            line |= _ask_all(work, learner, control, step + 1)
            clock.lap("ask")
            append_json(ledger, {"step": step + 1} | line | clock.laps)
            _save(manager, learner, step + 1)
            manifest.update(folder)
            bar.update(1)
        checkpoints.wait(manager)
        bar.close()
    manifest.update(folder, settled=True)
    return _lines(ledger)


def begin(work: Work) -> Learner:
    """Return the models before any edit: copies of the base, and nothing in memory."""
    stages = work.stages
    targets, mesh, rules = stages.settings.inner.targets, stages.mesh, stages.model.config.rules
    params = own_kernels(stages.model.params, targets, work.num, mesh, rules)
    remedies = sorted(work.remedies.values(), key=lambda one: one.old is None)  # replay's first
    kinds = [one.memory for one in remedies if one.memory]
    empty = memory.make_memory(kinds[0] if kinds else "reservoir", work.settings.memory_tokens)
    learner = Learner(params, (empty,) * work.num, {})
    if any(one.splits for one in work.remedies.values()):
        learner = learner._replace(answers=params)
    adapters = fresh_adapters(work._replace(remedies={}), learner, 0)
    stores = {
        name: work.placed(remedy.begin(work, params, adapters))
        for name, remedy in work.remedies.items()
        if remedy.begin is not None
    }
    return learner._replace(stores=stores)


def one_edit(work: Work, learner: Learner, step: int, folder: str) -> tuple[Learner, dict]:
    """Make one edit of all sequences; return the models after it, and its line of the ledger."""
    clock = Clock()
    edit, parsed = write_edits(work, learner, step)
    clock.lap("write")
    edit, trained = train(work, learner, edit)
    clock.lap("train")
    learner = jax.block_until_ready(keep(work, learner, edit))
    clock.lap("keep")
    learner = jax.block_until_ready(learn(work, learner, edit))
    clock.lap("learn")
    _log_edits(folder, step, parsed)
    line = {
        "problems": [problem.id for problem, _ in edit.problems],
        "rejected": [isinstance(one, Rejected) for one in parsed],
        "loss_before": [_mean(losses[:1]) for losses in trained.losses],
        "loss_after": [_mean(losses[-1:]) for losses in trained.losses],
        "tokens": trained.num_tokens,
        "replayed": trained.replayed,
        "memory_tokens": [memory.num_tokens(one) for one in learner.memories],
        "too_long": sum(one.num_too_long for one in learner.memories),
        "bytes/models": tree_bytes(own_leaves(learner.params)),
        "bytes/stores": tree_bytes(learner.stores),
        "refused": learner.refused,
    }
    return learner, line | clock.laps


def _mean(values: Sequence[float]) -> float | None:
    return number(float(np.mean(values))) if len(values) else None


def _ask_all(work: Work, learner: Learner, control: Batch, edits: int) -> dict[str, Any]:
    """Return what the models know after so many edits.

    Of all problems every `ask_every` edits, before the first and after the last one; else of the
    problem that was learned last alone.
    """
    settings = work.settings
    if edits % settings.ask_every and edits < settings.num_edits:
        asked = [edits - 1]
    else:
        asked = list(range(settings.num_edits))
    posed = [[sequence[i] for i in asked] for sequence in work.sequences]
    everything = len(asked) == settings.num_edits
    if everything:
        posed = [[*batch, *control] for batch in posed]
    known, count = ask(work, learner, posed), len(asked)
    found: dict[str, Any] = {"asked": asked}
    for name, values in known._asdict().items():
        found[name] = _plain(values[:, :count])
        if everything and control:
            found[f"control/{name}"] = _plain(values[:, count:].mean(axis=1))
    if everything and control:
        passages = [work.stages.task.passage_only(problem).training_texts for problem, _ in control]
        texts = [work.stages.encode(text, False) for row in passages for text in row]
        found["perplexity"] = _plain(perplexity(work, learner, texts))
    return found


def _plain(values: np.ndarray) -> Any:
    return jax.tree.map(number, values.tolist())


def _log_edits(folder: str, step: int, parsed: Sequence[Edit]) -> None:
    """Write down what was written: a line for each self-edit."""
    for s, one in enumerate(parsed):
        reason = {"rejected": one.reason} if isinstance(one, Rejected) else {}
        line = {"step": step + 1, "problem": one.problem_id, "edit": s, "text": one.text}
        append_json(os.path.join(folder, "edits.jsonl"), line | reason)


def _lines(ledger: str) -> list[dict[str, Any]]:
    return read_jsonl(ledger, ["step"]) if os.path.exists(ledger) else []


def _trees(learner: Learner) -> dict[str, Any]:
    trees = {"models": own_leaves(learner.params), "stores": learner.stores}
    if learner.answers is not None:
        trees["answers"] = own_leaves(learner.answers)
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def _save(manager: ocp.CheckpointManager, learner: Learner, step: int) -> None:
    memories = [memory.to_json(one) for one in learner.memories]
    position = {"edits": step, "memories": memories, "refused": learner.refused}
    checkpoints.save(manager, step, _trees(learner), position)


def restore(
    work: Work, learner: Learner, manager: ocp.CheckpointManager, folder: str
) -> tuple[Learner, int]:
    """Return the newest good checkpoint's models and how many edits they have had.

    Lines of the ledger on edits that are to be made again are dropped.
    """
    restored = checkpoints.restore(manager, _trees(learner))
    step = restored[2]["edits"] if restored else 0
    for name in (LEDGER, "edits.jsonl"):
        truncate_after(os.path.join(folder, name), step)
    manifest.forget_checkpoints(folder, above=step)
    if restored is None:
        return learner, 0
    _, trees, position = restored
    learner = learner._replace(
        params=with_leaves(learner.params, trees.get("models", {})),
        memories=tuple(
            memory.from_json(one, f"{folder}: sequence {s}")
            for s, one in enumerate(position["memories"])
        ),
        stores=trees.get("stores", learner.stores),
        refused=position["refused"],
    )
    if learner.answers is not None:
        learner = learner._replace(answers=with_leaves(learner.answers, trees["answers"]))
    return learner, step


# What a score is of a model that is not finite any more: it answers nothing.
_OF_NONE = {"accuracy": 0.0, "log_likelihood": memory.LOST}


def record_of(work: Work, lines: Sequence[Mapping[str, Any]], score: str) -> Record:
    """Return the ledger as arrays.

    Args:
      score: one of `Known`'s.
    """
    none = _OF_NONE[score]
    S, N = work.num, work.settings.num_edits
    scores = np.full((S, N + 1, N), np.nan)
    control, perplexity = np.full((S, N + 1), np.nan), np.full((S, N + 1), np.nan)
    for k, line in enumerate(lines):
        scores[:, k, line["asked"]] = _floats(line[score], none)
        if f"control/{score}" in line:
            control[:, k] = _floats(line[f"control/{score}"], none)
            perplexity[:, k] = _floats(line["perplexity"], np.inf)
    parts = [f"seconds/{name}" for name in ("write", "train", "keep", "learn")]
    seconds = np.array([sum(line[part] for part in parts) for line in lines[1:]])
    sizes = np.array([line["bytes/models"] + line["bytes/stores"] for line in lines[1:]])
    ids = [[problem.id for problem, _ in sequence] for sequence in work.sequences]
    return Record(ids, scores, control, perplexity, seconds, sizes.astype(np.float64))


def _floats(values: Any, missing: float) -> np.ndarray:
    """Return numbers of the ledger: None, of a model that is not finite any more, as `missing`."""
    array = np.array(values, np.float64)
    return np.where(np.isnan(array), missing, array)


def report(work: Work, lines: Sequence[Mapping[str, Any]], folder: str) -> dict[str, Any]:
    """Write what the edits have shown, and return what summary.json holds."""
    name = " + ".join(work.remedies) or "plain merging"
    dense = summarize(record_of(work, lines, "log_likelihood"))
    return write_report(
        record_of(work, lines, "accuracy"),
        folder,
        name,
        _notes(work, lines),
        remedies=list(work.remedies),
        log_likelihood=dense["figures"],
    )


def _notes(work: Work, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what figures do not show: what was not trained on, replayed, kept, or remembered."""
    edits, last = work.num * work.settings.num_edits, lines[-1]
    rejected = sum(sum(line["rejected"]) for line in lines[1:])
    notes = [f"{rejected} of {edits} self-edits were rejected: nothing was trained on them."]
    if any(remedy.old is not None for remedy in work.remedies.values()):
        replayed = sum(line["replayed"] for line in lines[1:])
        notes.append(f"{replayed} times a text of the memory was trained on.")
    if last["too_long"]:
        notes.append(
            f"{last['too_long']} texts have more tokens than the memory"
            f" (continual.memory_tokens = {work.settings.memory_tokens}): they were never in it."
        )
    if "gate" in work.remedies:
        refused, trained = last["refused"], edits - rejected
        none = ": the models are as they began" if refused == trained else ""
        notes.append(f"The gate refused {refused} of {trained} trained edits{none}.")
    lost = sum(None in row for row in last["log_likelihood"])
    if lost:
        notes.append(f"In {lost} sequences the model is not finite any more: it knows nothing.")
    return notes
