"""A tiny model that writes notes on synthetic facts: the policy of `seal-jax bench learning`.

It is trained on the spot, in about a minute on two CPU cores, on documents of two forms:

  a passage, "notes:" and notes on it in one of STYLES, drawn with its frequency
  a question about a thing that nobody knows, and a random answer

So it can write each style on any passage, knows how questions are answered, and knows no answer.
Which style teaches best is nothing that these documents tell: that is left to the outer loop.
"""

import functools
import random
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from seal_jax.metrics import progress
from seal_jax.models import TINY, Model
from seal_jax.models.transformer import hidden_states, init_params, token_logp
from seal_jax.models.weights import save_safetensors
from seal_jax.runs import save_config, whole_folder
from seal_jax.tasks.facts import ATTRIBUTES, Facts, facts_of
from seal_jax.tasks.task import Problem
from seal_jax.tokenizer import ByteTokenizer

NUM_STEPS, NUM_ROWS, LENGTH = 300, 24, 192


def _asked(name: str, facts: list[tuple[str, str]]) -> list[str]:
    return [f"{name} {attribute}? {value}" for attribute, value in facts]


# How the notes are written, and how often; 'asked' is how the exam asks.
STYLES: dict[str, tuple[float, Callable[[str, list[tuple[str, str]]], list[str]]]] = {
    "asked": (0.1, _asked),
    "one asked": (0.15, lambda name, facts: _asked(name, facts)[:1]),
    "stated": (0.375, lambda name, facts: [f"{v} is {name}'s {a}." for a, v in facts]),
    "backward": (0.375, lambda name, facts: [f"{v} {a} {name}" for a, v in facts]),
}


def notes(problem: Problem, style: str) -> str:
    """Return the notes on a problem in one of STYLES."""
    lines = STYLES[style][1](problem.title, facts_of(problem.passage))
    return "".join(f"{line}\n" for line in lines)


def make_documents(seed: int) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """Return `batch() -> tokens i32[B T], loss_mask bool[B T]`: notes and answers are learned."""
    tokenizer, rng = ByteTokenizer(), random.Random(seed)
    task = Facts(seed=seed, num_train=4000)
    problems = [problem for problem, _ in task.load("train")]
    weights = [frequency for frequency, _ in STYLES.values()]

    def document() -> tuple[list[int], list[int]]:
        problem = rng.choice(problems)
        if rng.random() < 0.2:
            attribute = rng.choice(list(ATTRIBUTES))
            prompt = f"{problem.title} {attribute}?"
            written = f" {rng.choice(ATTRIBUTES[attribute])}"
        else:
            prompt = task.edit_prompt(problem)
            written = notes(problem, rng.choices(list(STYLES), weights)[0])
        ending = [*tokenizer.encode(written, start=False), tokenizer.stop_ids[0]]
        return tokenizer.encode_prompt(prompt, chat=False), ending

    def batch() -> tuple[np.ndarray, np.ndarray]:
        tokens = np.full((NUM_ROWS, LENGTH), tokenizer.pad_id, np.int32)
        loss_mask = np.zeros((NUM_ROWS, LENGTH), bool)
        for row in range(NUM_ROWS):
            prompt, ending = document()
            text = [*prompt, *ending][:LENGTH]
            tokens[row, : len(text)] = text
            loss_mask[row, len(prompt) : len(text)] = True
        return tokens, loss_mask

    return batch


def pretrain(seed: int = 1, num_steps: int = NUM_STEPS) -> Model:
    """Return the model, trained from random numbers with Muon."""
    config = TINY
    schedule = optax.warmup_cosine_decay_schedule(0, 0.02, 20, num_steps)
    tx = optax.contrib.muon(schedule, adam_learning_rate=3e-3)

    def loss_of(params, tokens, loss_mask):
        B, T = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        hidden, _ = hidden_states(config, params, tokens, positions, jnp.ones_like(tokens))
        before = hidden[:, :-1].reshape(B * (T - 1), -1)
        wanted = loss_mask[:, 1:].reshape(-1)
        logp = token_logp(config, params, before, tokens[:, 1:].reshape(-1), wanted)
        return -logp.sum() / wanted.sum()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, tokens, loss_mask):
        grads = jax.grad(loss_of)(params, tokens, loss_mask)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    batch = make_documents(seed)
    params = init_params(config, jax.random.key(seed))
    opt_state = jax.jit(tx.init)(params)
    for _ in progress(range(num_steps), "training a tiny model to take notes", "step"):
        params, opt_state = train_step(params, opt_state, *batch())
    return Model(config, params, ByteTokenizer())


def pretrained_folder(folder: Path) -> Path:
    """Return the model's folder within `folder`; it is trained and written where there is none."""
    path = folder / "model"
    if not path.exists():
        model = pretrain()
        with whole_folder(path) as new:
            save_safetensors(new, model.params, model.config)
            save_config(new, model, "float32")
    return path
