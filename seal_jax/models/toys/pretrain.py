"""Tiny models that are trained on the spot, from random numbers, for benchmarks and examples."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from seal_jax.hosts.console import progress
from seal_jax.hosts.replacing import whole_folder
from seal_jax.models.byte_tokenizer import ByteTokenizer
from seal_jax.models.config import ModelConfig
from seal_jax.models.logits import next_token_logp
from seal_jax.models.model import Model, save_config
from seal_jax.models.tokenizer import Tokenizer
from seal_jax.models.transformer import hidden_states, init_params
from seal_jax.models.weights import save_safetensors
from seal_jax.types import Params

Batch = tuple[np.ndarray, np.ndarray]  # tokens i32[B T], loss_mask bool[B T]
Document = tuple[str, str]  # what is shown, and what is learned


def pad_documents(documents: Sequence[Document], length: int, tokenizer: Tokenizer) -> Batch:
    """Return documents as rows of `length` tokens; the loss is on what is learned, and its end.

    Raises:
      ValueError: a document is longer.
    """
    tokens = np.full((len(documents), length), tokenizer.pad_id, np.int32)
    loss_mask = np.zeros(tokens.shape, bool)
    for row, (shown, learned) in enumerate(documents):
        prompt = tokenizer.encode_prompt(shown, chat=False)
        text = [*prompt, *tokenizer.encode(learned, start=False), tokenizer.stop_ids[0]]
        if len(text) > length:
            raise ValueError(f"a document of {len(text)} tokens: at most {length}")
        tokens[row, : len(text)] = text
        loss_mask[row, len(prompt) : len(text)] = True
    return tokens, loss_mask


def pretrain(
    config: ModelConfig,
    draw: Callable[[], Sequence[Batch]],
    *,
    num_steps: int,
    seed: int,
    label: str,
) -> Model:
    """Return a model of bytes, trained from random numbers with Muon.

    Args:
      draw: returns the batches of one step, always of the same shapes.
      label: of the progress bar.
    """
    schedule = optax.warmup_cosine_decay_schedule(0, 0.02, 20, num_steps)
    tx = optax.contrib.muon(schedule, adam_learning_rate=3e-3)

    def loss_of(params: Params, batches: Sequence[Batch]) -> jax.Array:
        total = count = 0.0
        for tokens, loss_mask in batches:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            hidden, _ = hidden_states(config, params, tokens, positions, jnp.ones_like(tokens))
            logp = next_token_logp(config, params, hidden, tokens, loss_mask)
            total, count = total - logp.sum(), count + loss_mask[:, 1:].sum()
        return jnp.asarray(total / count)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params: Params, opt_state: optax.OptState, batches: Sequence[Batch]):
        grads = jax.grad(loss_of)(params, batches)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    with jax.transfer_guard("allow"):
        params = init_params(config, jax.random.key(seed))
        opt_state = jax.jit(tx.init)(params)
        for _ in progress(range(num_steps), label, "step"):
            params, opt_state = train_step(params, opt_state, draw())
    return Model(config, params, ByteTokenizer())


def pretrained_folder(path: Path, train: Callable[[], Model]) -> Path:
    """Return a model's folder; it is trained and written where there is none."""
    if not path.exists():
        model = train()
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(path) as new:
            save_safetensors(new, model.params, model.config)
            save_config(new, model, "float32")
    return path
