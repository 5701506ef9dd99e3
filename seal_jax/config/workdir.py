"""A run's folder belongs to one config: config.json says to which.

It also says that the folder has a manifest, so that one that is lost is missed.
"""

import fnmatch
import json
import os
import time
from collections.abc import Mapping

from ml_collections import ConfigDict

from seal_jax.config.load import diff, to_json
from seal_jax.hosts import manifest
from seal_jax.hosts.exchange import ask_first, exchange, is_first
from seal_jax.hosts.files import read_json, write_json
from seal_jax.hosts.folder_lock import NAME
from seal_jax.hosts.group import timeout_seconds
from seal_jax.hosts.json_text import read_text
from seal_jax.hosts.outputs import check_output
from seal_jax.tasks.knowledge.texts import digest_of, path_of

SWEEP = "tune_sweep.json"  # says what a sweep is over
SEQUENCES = "sequences.json"  # and this, which problems follow one another
_TEXTS = "texts.json"
# What a run that was killed before it had claimed the folder may leave there.
_LEFT = (NAME, ".config.json.*.tmp")


def check_workdir(config: ConfigDict, workdir: str) -> None:
    """Refuse a folder that is another config's or something else's, damaged, or not to be written.

    Raises:
      ValueError: it does, or is.
    """
    check_output(workdir, "--workdir", folder=True)
    path = os.path.join(workdir, "config.json")
    if os.path.exists(path):
        manifest.refuse_damaged(workdir)
        if difference := diff(read_text(path), config, path):
            raise ValueError(
                f"{workdir} belongs to another config; this one differs in\n{difference}\n"
                "Choose another --workdir, or go back to that config."
            )
        _refuse_changed_texts(config, workdir)
    elif os.path.exists(workdir) and not all(map(_is_left, os.listdir(workdir))):
        raise ValueError(f"{workdir} is not empty and has no config.json: choose another --workdir")


def _refuse_changed_texts(config: ConfigDict, workdir: str) -> None:
    """Refuse a folder whose rows of `eval.texts` were made of other files than these now are.

    The first process alone reads them: the others need not have them.
    """
    claimed = read_json(os.path.join(workdir, _TEXTS)) if is_first() else None
    for name, digest in (claimed or {}).items():
        path = path_of(config.eval.texts[name])
        if digest_of(read_text(path)) != digest:
            raise ValueError(
                f"{workdir} belongs to other texts of {name!r}: {path} has changed since the run"
                " began. Choose another --workdir, or go back to those texts."
            )


# What tells whose folder it is: the first of these that is there.
_KINDS = {
    "tune": ("a sweep", (SWEEP,)),
    "continual": ("a run of `continual`", (SEQUENCES,)),
    "eval": ("an evaluation", ("policy.json",)),
    "train": ("a training run", ("checkpoints", "metrics.jsonl", "edits.jsonl", "random")),
}


def refuse_other_kind(workdir: str, kind: str) -> None:
    """Refuse a folder of another command: either would write over the other's results.

    Args:
      kind: the command that asks, one of _KINDS.

    Raises:
      ValueError: it is one.
    """
    for found, (whose, names) in _KINDS.items():
        there = [name for name in names if os.path.lexists(os.path.join(workdir, name))]
        if there and found == kind:
            return
        if there:
            raise ValueError(
                f"{workdir} is the folder of {whose} (it has {there[0]}), whose results"
                f" {_KINDS[kind][0]} would replace: choose another --workdir"
            )


def _is_left(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _LEFT)


def claim_workdir(config: ConfigDict, workdir: str, texts: Mapping[str, str] = {}) -> None:
    """Write config.json and the manifest, once model and data are known to be good.

    Args:
      texts: digests of the files of `eval.texts`, which are part of what the run is.

    Raises:
      ValueError: not every process sees it there, or another run claimed it before it was held.
    """
    ask_first("workdir", lambda: check_workdir(config, workdir))
    os.makedirs(workdir, exist_ok=True)
    path = os.path.join(workdir, "config.json")
    patience = time.monotonic() + timeout_seconds() / 10
    if os.path.exists(path):
        for folder in manifest.arm_folders(workdir):
            manifest.take_up(folder)
        manifest.begin(workdir)  # a run of an older version has none
    write_json(path, {**json.loads(to_json(config)), manifest.KEY: manifest.MANIFEST})
    if texts:
        write_json(os.path.join(workdir, _TEXTS), texts)
    manifest.begin(workdir)
    manifest.update(workdir)
    ask_first("config.json", lambda: None)  # it is written
    while not os.path.exists(path) and time.monotonic() < patience:  # a bucket is seen late
        time.sleep(0.2)
    seen = exchange("workdir", "yes" if os.path.exists(path) else "no")
    if apart := [str(i) for i, word in enumerate(seen) if word == "no"]:
        raise ValueError(
            f"--workdir {workdir}: process {', '.join(apart)} does not see what process 0 writes"
            " there; all need the same folder (NFS, or a mounted bucket)"
        )


def is_done(config: ConfigDict, workdir: str) -> bool:
    """Return whether `workdir` holds the finished run of this config; no device is touched.

    Raises:
      ValueError: the folder belongs to another config.
    """
    ask_first("workdir", lambda: check_workdir(config, workdir))
    ask_first("workdir", lambda: refuse_other_kind(workdir, "train"))
    return ask_first("is done", lambda: os.path.exists(os.path.join(workdir, "summary.json")))
