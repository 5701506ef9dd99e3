"""The device's part of generation: read prompts, begin rows, let them write, move them.

All state is `Rows`, which every call takes and gives back. Rows that continue one prompt are
neighbors and share its keys and values. Each row writes into slots of its own, so rows of any age
stand side by side. Rows are divided over the mesh as any rows are, and the caches over the heads
too.
"""

from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike

from seal_jax.models.config import ModelConfig
from seal_jax.models.kv_cache import KVCache, RowCaches, init_cache
from seal_jax.models.logits import unembed
from seal_jax.models.transformer import hidden_states, split_layers
from seal_jax.models.turned_kernels import turn_kernels
from seal_jax.sampling.draw import Settings, draw, first_uniforms
from seal_jax.sharding import along, leading, shaped
from seal_jax.types import Adapters, Params


class Prefilled(NamedTuple):
    """Prompts that were read, [P ...]."""

    logits: jax.Array  # f32[P V] for the next token
    seen: jax.Array | None  # bool[P V] the tokens of the prompt; see `Rows`
    length: jax.Array  # i32[P]
    cache: KVCache  # S slots each


class Rows(NamedTuple):
    """Rows that are being written, [B ...]."""

    logits: jax.Array  # f32[B V] for the next token
    seen: jax.Array | None  # bool[B V] the tokens so far, where a row has a penalty for them
    length: jax.Array  # i32[B] of the prompt
    prompts: KVCache  # of P prompts, which B/P neighbours share: S slots each
    cache: KVCache  # of what each row wrote
    keys: jax.Array  # typed PRNG keys [B T], of each token
    uniforms: jax.Array  # f32[B T] of each token's first try, see draw.py
    settings: Settings
    written: jax.Array  # i32[B]
    tokens: jax.Array  # i32[B T]
    logp: jax.Array  # f32[B T]
    done: jax.Array  # bool[B] written to the end, or empty
    finished: jax.Array  # bool[B] by a stop token

    @property
    def num_prompts(self) -> int:
        return len(self.prompts.keys[0])

    @property
    def num_slots(self) -> int:
        return self.cache.values[0].shape[2]


class RowsShape(NamedTuple):
    """The sizes of `Rows`: static, as each set of them is a program."""

    dtype: jnp.dtype  # of the params; see `cache_dtype`
    num_rows: int  # B
    num_prompts: int  # P
    prompt_slots: int  # S
    num_slots: int  # tokens of each row that its cache has room for
    max_tokens: int  # T
    pad_id: int = 0
    keep_seen: bool = False  # whether it is kept which tokens a row has


State = TypeVar("State", Prefilled, Rows)
_NO_CACHE = KVCache((), ())


def cache_dtype(dtype: jnp.dtype, mesh: Mesh) -> jnp.dtype:
    """Return the type of a cache of parameters of type `dtype`: float32 on CPUs.

    XLA writes no bfloat16 there: at each token it would turn the whole cache into float32 and back.
    """
    return jnp.dtype(jnp.float32 if mesh.devices.flat[0].platform == "cpu" else dtype)


def cache_sharding(config: ModelConfig, mesh: Mesh, num_rows: int) -> NamedSharding:
    """Return where a cache's [B K ...] lie: divided over rows and heads where they can be."""
    return along(mesh, config.rules, rows=num_rows, heads=config.num_kv_heads)


def _where(config: ModelConfig, mesh: Mesh, state: Prefilled | Rows) -> Any:
    """Return the shardings of the state, a prefix of it."""
    shardings = [leading(mesh, "rows", len(state.length), config.rules)] * len(state)
    for i, x in enumerate(state):
        if isinstance(x, KVCache) and x.keys:
            shardings[i] = cache_sharding(config, mesh, len(x.keys[0]))
    return state._make(shardings)


def _placed(config: ModelConfig, mesh: Mesh, state: State) -> State:
    """Say where the state lies: the same for every program, or the next one is compiled anew."""
    return jax.lax.with_sharding_constraint(state, _where(config, mesh, state))


def _next_logits(config: ModelConfig, mesh: Mesh, params: Params, hidden: jax.Array) -> jax.Array:
    """Return the logits f32[B V] of hidden states [B D].

    Their place is said, or every device would collect the output head's kernel to draw from them.
    """
    where = along(mesh, config.rules, rows=len(hidden), vocab=config.vocab_size)
    return jax.lax.with_sharding_constraint(unembed(config, params, hidden), where)


@partial(jax.jit, static_argnames=("config", "mesh", "keep_seen"))
def prefill(
    config: ModelConfig,
    params: Params,
    adapters: Adapters | None,
    prompts: jax.Array,
    length: jax.Array,
    *,
    mesh: Mesh,
    keep_seen: bool = False,
) -> Prefilled:
    """Read prompts i32[P S], padded on the right, of length [P]; for `keep_seen` see `Rows`."""
    P, S = prompts.shape
    slots = jnp.broadcast_to(jnp.arange(S), (P, S))
    ones = jnp.ones((P, S), jnp.int32)  # causal: nobody looks at what is behind a prompt
    hidden, cache = hidden_states(config, params, prompts, slots, ones, adapters)
    dtype = cache_dtype(params["embed"]["embedding"].dtype, mesh)
    cache = jax.tree.map(lambda x: x.astype(dtype), cache)
    last = jnp.take_along_axis(hidden, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
    seen = None
    if keep_seen:
        seen = jnp.zeros((P, config.vocab_size), bool)
        seen = seen.at[jnp.arange(P)[:, None], prompts].max(slots < length[:, None])
    logits = _next_logits(config, mesh, params, last)
    return _placed(config, mesh, Prefilled(logits, seen, length, cache))


@partial(jax.jit, static_argnums=(0, 1, 2))
def no_rows(config: ModelConfig, shape: RowsShape, mesh: Mesh) -> Rows:
    """Return empty rows."""
    B, each = shape.num_rows, (shape.num_rows, shape.max_tokens)
    dtype = cache_dtype(shape.dtype, mesh)
    count, some = jnp.zeros(B, jnp.int32), jnp.zeros(B, jnp.float32)
    rows = Rows(
        logits=jnp.zeros((B, config.vocab_size), jnp.float32),
        seen=jnp.zeros((B, config.vocab_size), bool) if shape.keep_seen else None,
        length=count,
        prompts=init_cache(config, shape.num_prompts, shape.prompt_slots, dtype),
        cache=init_cache(config, B, shape.num_slots, dtype),
        keys=jnp.broadcast_to(jax.random.key(0), each),
        uniforms=jnp.zeros(each, jnp.float32),
        settings=Settings(some, count, some, some, some),
        written=count,
        tokens=jnp.full(each, shape.pad_id, jnp.int32),
        logp=jnp.zeros(each, jnp.float32),
        done=jnp.ones(B, bool),
        finished=jnp.zeros(B, bool),
    )
    return _placed(config, mesh, rows)


def rows_shapes(config: ModelConfig, shape: RowsShape, mesh: Mesh) -> Rows:
    """Return `no_rows` as ShapeDtypeStructs with their shardings."""
    rows = jax.eval_shape(lambda: no_rows(config, shape, mesh))
    return shaped(rows, _where(config, mesh, rows))


@partial(jax.jit, static_argnames=("config", "shape", "mesh"))
def start(
    config: ModelConfig,
    params: Params | None,
    adapters: Adapters | None,
    shape: RowsShape,
    mesh: Mesh,
) -> tuple[Params | None, Adapters | None, Rows]:
    """Return params with turned kernels, adapters split by layers, and `no_rows`.

    One program for what a call needs before it begins.
    """
    if adapters is not None:
        adapters = adapters._replace(weights=split_layers(adapters.weights))
    return params and turn_kernels(params), adapters, no_rows(config, shape, mesh)


@partial(jax.jit, donate_argnames="rows", static_argnames=("config", "mesh", "pad_id"))
def admit(
    config: ModelConfig,
    rows: Rows,
    new: Prefilled,
    source: jax.Array,
    key_data: jax.Array,
    settings: Settings,
    *,
    mesh: Mesh,
    pad_id: int,
) -> Rows:
    """Begin rows anew with prompt source[b], i32[B]; those with -1 go on.

    Rows that share a prompt begin together: those of them that are -1 stay empty.
    """
    fresh = source >= 0
    prompt = source.reshape(rows.num_prompts, -1).max(axis=1)

    def put(old: jax.Array, x: ArrayLike) -> jax.Array:
        return jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 1)), x, old)

    def put_prompt(old: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.where((prompt >= 0).reshape(-1, 1, 1, 1), x[prompt], old)

    # Of all tokens at once, not one by one in the loop.
    numbers = jnp.arange(rows.tokens.shape[1])
    token_keys = jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(numbers))
    keys = token_keys(jax.random.wrap_key_data(key_data))
    seen = rows.seen
    if seen is not None:
        assert new.seen is not None
        seen = put(seen, new.seen[source])
    rows = rows._replace(
        logits=put(rows.logits, new.logits[source]),
        seen=seen,
        length=put(rows.length, new.length[source]),
        prompts=jax.tree.map(put_prompt, rows.prompts, new.cache),
        keys=put(rows.keys, keys),
        uniforms=put(rows.uniforms, first_uniforms(keys)),
        settings=jax.tree.map(put, rows.settings, settings),
        written=put(rows.written, 0),
        tokens=put(rows.tokens, pad_id),
        logp=put(rows.logp, 0.0),
        done=rows.done & ~fresh,
        finished=rows.finished & ~fresh,
    )
    return _placed(config, mesh, rows)


@partial(jax.jit, static_argnames=("config", "mesh", "num_slots"))
def move(
    config: ModelConfig,
    rows: Rows,
    index: jax.Array,
    prompt: jax.Array,
    *,
    mesh: Mesh,
    num_slots: int,
) -> Rows:
    """Return the rows at index [B'] with the prompts at prompt [P'], which B'/P' of them share.

    Their caches then have room for `num_slots` tokens each: as many as now, or more.
    """
    more = num_slots - rows.num_slots

    def longer(arrays: tuple[jax.Array, ...], axis: int) -> tuple[jax.Array, ...]:
        width = [(0, more if i == axis else 0) for i in range(4)]
        return tuple(jnp.pad(x[index], width) for x in arrays)

    cache = KVCache(longer(rows.cache.keys, 3), longer(rows.cache.values, 2))
    prompts = jax.tree.map(lambda x: x[prompt], rows.prompts)
    rest = jax.tree.map(lambda x: x[index], rows._replace(cache=_NO_CACHE, prompts=_NO_CACHE))
    return _placed(config, mesh, rest._replace(cache=cache, prompts=prompts))


@partial(jax.jit, donate_argnames="rows", static_argnames=("config", "mesh"))
def decode(
    config: ModelConfig,
    params: Params,
    adapters: Adapters | None,
    rows: Rows,
    stop_ids: jax.Array,
    num_steps: jax.Array,
    allowed: jax.Array | None = None,
    *,
    mesh: Mesh,
) -> Rows:
    """Let every row that is not done write up to `num_steps` tokens, i32[].

    Args:
      adapters: split by layers, or every call would do it.
      stop_ids: i32[n]; a row ends with the first of them, which counts as written.
      allowed: bool[B V], the tokens that may be drawn: for one step.
    """
    B, max_tokens = rows.tokens.shape
    each, last = jnp.arange(B), rows.num_slots - 1
    ones, prompts = jnp.ones((B, 1), jnp.int32), rows.prompts

    def running(carry: tuple) -> jax.Array:
        step, rows = carry
        return (step < num_steps) & ~rows.done.all()

    def step(carry: tuple) -> tuple:
        number, r = carry
        now = each, jnp.minimum(r.written, max_tokens - 1)
        token, logp = draw(r.logits, r.keys[now], r.settings, r.seen, allowed, r.uniforms[now])
        place = jnp.where(r.done, max_tokens, r.written)  # beyond the end: written nowhere
        written = r.written + (~r.done).astype(jnp.int32)
        finished = r.finished | (~r.done & (token[:, None] == stop_ids[None]).any(axis=1))
        caches = RowCaches(prompts, r.cache, r.length, jnp.minimum(r.written, last))
        at = (r.length + r.written)[:, None]
        hidden, cache = hidden_states(config, params, token[:, None], at, ones, adapters, caches)
        return number + 1, _placed(
            config,
            mesh,
            r._replace(
                logits=_next_logits(config, mesh, params, hidden[:, 0]),
                seen=None if r.seen is None else r.seen.at[each, token].set(True),
                cache=cache,
                written=written,
                tokens=r.tokens.at[each, place].set(token, mode="drop"),
                logp=r.logp.at[each, place].set(logp, mode="drop"),
                done=r.done | finished | (written >= max_tokens),
                finished=finished,
            ),
        )

    rows = rows._replace(prompts=_NO_CACHE)  # they stay as they are
    rows = jax.lax.while_loop(running, step, (jnp.int32(0), rows))[1]
    return rows._replace(prompts=prompts)
