#!/usr/bin/env bash
# optax 0.2.8: MultiSteps averages gradients over mini-steps, and not the loss that it hands on.
#
# contrib.momo, polyak_sgd and contrib.reduce_on_plateau ask for the loss (`value=`). Inside
# MultiSteps they get the mean gradient of k mini-steps beside the loss of the last mini-step alone,
# so they pair two things of different batches. polyak_sgd's step size is (value - f_min) / |grad|^2,
# and follows whichever batch came last. With the mean loss, or all batches in one step, it is another.
#
# Seen: after losses 1 and 3 with gradients 1 and 3 the wrapped transformation is given gradient 2
# and loss 3; polyak_sgd moves by another step than on the mean of both batches.
# The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 optax==0.2.8

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax.numpy as jnp
import optax


def spy():
    def update(updates, state, params=None, *, value, **others):
        return updates, {"grad": updates, "value": jnp.asarray(value)}

    zeros = {"grad": jnp.float32(0), "value": jnp.float32(0)}
    return optax.GradientTransformationExtraArgs(lambda params: zeros, update)


def end(tx, batches, weights=jnp.float32(0)):
    state = tx.init(weights)
    for loss, grad in batches:
        updates, state = tx.update(jnp.float32(grad), state, weights, value=jnp.float32(loss))
        weights = optax.apply_updates(weights, updates)
    return weights, state


_, state = end(optax.MultiSteps(spy(), 2), [(1, 1), (3, 3)])
seen = {name: float(x) for name, x in state.inner_opt_state.items()}
print("given after losses 1 and 3 with gradients 1 and 3:", seen)
assert seen == {"grad": 2.0, "value": 3.0}, "it no longer does so"

for order in ([(1, 1), (3, 3)], [(3, 3), (1, 1)]):
    moved, _ = end(optax.MultiSteps(optax.polyak_sgd(max_learning_rate=10.0), 2), order)
    print("polyak_sgd with mini-steps", order, "moves to", float(moved))
together, _ = end(optax.polyak_sgd(max_learning_rate=10.0), [(2, 2)])
print("polyak_sgd on both batches at once moves to", float(together))
assert (float(moved), float(together)) == (-0.5, -1.0), "it no longer does so"
PYTHON
