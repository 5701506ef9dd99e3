"""How far a student is from a teacher of whom the likeliest tokens are known.

The teacher's distribution of a token has K + 1 outcomes: its K likeliest tokens, and all others
together. The student's is taken over the same ones, from all of its logits:

  q_k = softmax(logits)[id_k],    q_rest = 1 - sum_k q_k

  forward  KL(p || q) = sum_k p_k (log p_k - log q_k) + p_rest (log p_rest - log q_rest)
  reverse  KL(q || p) = sum_k q_k (log q_k - log p_k) + q_rest (log q_rest - log p_rest)

The forward one asks for some probability wherever the teacher has some; the reverse one for none
where the teacher has little. To join outcomes can only lower a divergence, so either is a lower
bound of that over the whole vocabulary, and is that one where K = V. Of a student that is the
teacher both are 0. No gradient goes to the teacher.

A token without a teacher costs -log q(token), its negative log-likelihood.

References:
  Askell et al., A General Language Assistant as a Laboratory for Alignment, arXiv 2112.00861:
    context distillation.
  Snell et al., Learning by Distilling Context, arXiv 2209.15189.
  Agarwal et al., On-Policy Distillation of Language Models, arXiv 2306.13649: both directions, on
    the student's own samples, over the whole vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax.nn import logsumexp

from seal_jax.models.config import ModelConfig
from seal_jax.models.logits import by_tiles, head_of, if_any, unembed
from seal_jax.types import Array, Params, Teacher

DIVERGENCES = ("forward", "reverse")


def next_token_costs(
    config: ModelConfig,
    params: Params,
    hidden: jax.Array,
    tokens: Array,
    wanted: Array,
    teacher: Teacher,
    divergence: str,
) -> jax.Array:
    """Return what each token but a row's first costs, f32[B T-1], given those before it.

    Args:
      hidden: [B T D] of the tokens i32[B T].
      wanted: [B T], 0 or False where a token costs nothing.
      teacher: [B T K], of the token itself. What is not a number in it counts as 0, so that nobody
        else is harmed; see `lane_losses`.
      divergence: one of DIVERGENCES.

    Raises:
      ValueError: there is no such divergence, or the teacher has more tokens than the vocabulary.
    """
    B, T, D = hidden.shape
    before, targets = hidden[:, :-1].reshape(-1, D), tokens[:, 1:].reshape(-1)
    teacher = teacher._replace(logp=jnp.where(jnp.isnan(teacher.logp), 0, teacher.logp))
    taught = jax.tree.map(lambda x: x[:, 1:].reshape(B * (T - 1), -1), teacher)
    asked = wanted[:, 1:].reshape(-1).astype(bool)
    costs = token_costs(config, params, before, targets, taught, asked, divergence)
    return costs.reshape(B, T - 1)


@functools.partial(jax.named_call, name="token_costs")
def token_costs(
    config: ModelConfig,
    params: Params,
    hidden: jax.Array,
    targets: Array,
    teacher: Teacher,
    wanted: Array,
    divergence: str,
    tile: int = 1024,
) -> jax.Array:
    """Return what each token costs, f32[M], for hidden states [M D] and tokens i32[M].

    As in `token_logp` logits are made tile by tile, and with them the gradient of the hidden
    states: no logits are kept, and none made again but for who trains the head.

    Args:
      teacher: [M K].
      wanted: bool[M]; the others cost 0.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r}: expected one of {', '.join(DIVERGENCES)}")
    if (known := teacher.ids.shape[-1]) > config.vocab_size:
        raise ValueError(
            f"a teacher of {known} tokens: expected at most the model's {config.vocab_size}"
        )
    head = head_of(config, params)
    return by_tiles(
        lambda may_skip, *arrays: _tile_costs(config, divergence, may_skip, head, *arrays),
        (hidden, targets, teacher),
        wanted,
        tile,
    )


def likeliest(
    config: ModelConfig, params: Params, hidden: jax.Array, wanted: Array, top: int
) -> Teacher:
    """Return the `top` likeliest next tokens [M K] for hidden states [M D], tile by tile.

    Args:
      wanted: bool[M]; what is returned for others means nothing.
    """
    head = head_of(config, params)

    def of_tile(may_skip: bool, hidden: jax.Array, wanted: Array) -> Teacher:
        return if_any(
            wanted, may_skip, lambda hidden: _likeliest(config, head, hidden, top), hidden
        )

    return by_tiles(of_tile, (hidden,), wanted, tile=1024)


def _likeliest(config: ModelConfig, head: Params, hidden: jax.Array, top: int) -> Teacher:
    logits = unembed(config, head, hidden)
    _, ids = jax.lax.top_k(logits, top)
    return Teacher(ids, _logp_of(logits, ids))


def _logp_of(logits: jax.Array, ids: Array) -> jax.Array:
    """Return the log-probabilities f32[M K+1] of tokens i32[M K], and of all others together."""
    M, V = logits.shape
    others = jnp.full((M, 1), -jnp.inf)
    if ids.shape[1] < V:
        # Summed by themselves: 1 - sum_k would be rounding where the others are unlikely.
        others = logits.at[jnp.arange(M)[:, None], ids].set(-jnp.inf)
        others = logsumexp(others, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, ids, axis=-1)
    every = jnp.concatenate([chosen, others], axis=-1)
    return every - logsumexp(logits, axis=-1, keepdims=True)


_Given = tuple[Array, Teacher, Array]  # targets, teacher, wanted


def _costs(
    config: ModelConfig, divergence: str, given: _Given, head: Params, hidden: jax.Array
) -> jax.Array:
    """Return what each token costs, f32[M]; 0 where not wanted."""
    targets, teacher, wanted = given
    logits = unembed(config, head, hidden)
    known, has_teacher = teacher.ids.shape[1], teacher.ids[:, 0] >= 0
    ids = jnp.where(has_teacher[:, None], teacher.ids, jnp.arange(known)[None])
    log_p, log_q = teacher.logp, _logp_of(logits, ids)
    if known == logits.shape[1]:  # nothing is left for the others
        log_p, log_q = log_p[:, :-1], log_q[:, :-1]
    if divergence == "forward":
        p = jnp.exp(log_p)
        costs = jnp.where(p > 0, p * (log_p - log_q), 0.0)
    else:
        costs = jnp.exp(log_q) * (log_q - log_p)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    plain = logsumexp(logits, axis=-1) - chosen
    return jnp.where(wanted, jnp.where(has_teacher, costs.sum(axis=-1), plain), 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _tile_costs(
    config: ModelConfig,
    divergence: str,
    may_skip: bool,
    head: Params,
    hidden: jax.Array,
    targets: Array,
    teacher: Teacher,
    wanted: Array,
) -> jax.Array:
    costs = functools.partial(_costs, config, divergence, (targets, teacher, wanted))
    return if_any(wanted, may_skip, costs, head, hidden)


def _forward(
    config: ModelConfig,
    divergence: str,
    may_skip: bool,
    head: Params,
    hidden: jax.Array,
    targets: Array,
    teacher: Teacher,
    wanted: Array,
) -> tuple[jax.Array, tuple]:
    given = targets, teacher, wanted
    costs = functools.partial(_costs, config, divergence, given)

    def costs_and_slope(head: Params, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        found, pull_back = jax.vjp(functools.partial(costs, head), hidden)
        return found, pull_back(jnp.ones_like(found))[0]  # a token's cost is of its own state alone

    found, slope = if_any(wanted, may_skip, costs_and_slope, head, hidden)
    return found, (head, hidden, given, slope)


def _backward(
    config: ModelConfig, divergence: str, may_skip: bool, saved: tuple, grads: jax.Array
) -> tuple[Params, jax.Array, None, None, None]:
    head, hidden, given, slope = saved

    def pull_back_to_head(head: Params, hidden: jax.Array) -> Params:
        costs = functools.partial(_costs, config, divergence, given)
        return jax.vjp(lambda head: costs(head, hidden), head)[1](grads)[0]

    # A sum over tokens; left out of the program where nobody wants it.
    d_head = if_any(given[-1], may_skip, pull_back_to_head, head, hidden)
    d_hidden = slope.astype(jnp.float32) * grads[:, None]
    return d_head, d_hidden.astype(hidden.dtype), None, None, None


_tile_costs.defvjp(_forward, _backward)
