#!/usr/bin/env bash
# optax 0.2.8: contrib.prodigy and contrib.dadapt_adamw under a warm-up that begins at 0.
#
# A learning rate that rises from 0 is what optax's own schedules (linear_schedule,
# warmup_cosine_decay_schedule) begin with. Both optimizers divide by a sum that the rate is a factor
# of. So a first rate of 0 makes their estimate of the distance NaN, and with it every parameter, for
# good: nothing is raised. The same schedule that begins at 0.1 trains, and adam trains with both.
#
# Seen: prodigy is NaN after the first step, dadapt_adamw after the second.
# The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 optax==0.2.8

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import optax

GOAL = jnp.arange(1.0, 5.0)


def loss_of(weights):
    return 0.5 * jnp.sum((weights - GOAL) ** 2)


def losses(make, first_rate):
    tx = make(optax.linear_schedule(first_rate, 1.0, 10))
    weights = jnp.full(4, 0.1)
    state, found = tx.init(weights), []
    for _ in range(20):
        loss, grads = jax.value_and_grad(loss_of)(weights)
        updates, state = tx.update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        found.append(float(loss))
    return found


for name, make in {
    "adam": optax.adam,
    "prodigy": optax.contrib.prodigy,
    "dadapt_adamw": optax.contrib.dadapt_adamw,
}.items():
    for first_rate in (0.0, 0.1):
        found = losses(make, first_rate)
        print(f"{name:12} first rate {first_rate}: {found[:4]} ... {found[-1]}")
        spoiled = name != "adam" and first_rate == 0
        assert (found[-1] != found[-1]) == spoiled, "it no longer does so"
PYTHON
