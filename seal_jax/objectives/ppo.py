"""PPO: a value head is the baseline of each token."""

import jax
import jax.numpy as jnp
import numpy as np

from seal_jax.objectives.objective import Gae, Objective, Past, Rewards, Tokens, check, clipped


def ppo(
    clip: float = 0.2,
    value_coef: float = 0.5,
    value_clip: float = 0.2,
    discount: float = 1.0,
    gae_decay: float = 0.95,
    normalize_advantages: bool = True,
) -> Objective:
    """Return PPO: the clipped ratio, and a value head on the policy.

    loss_t = -min(ratio_t A_t, clip(ratio_t, 1 - clip, 1 + clip) A_t)
             + value_coef / 2 max((V_t - R_t)^2, (V_old + clip(V_t - V_old) - R_t)^2)

    with A from `Gae` and R = A + V_old before the normalization of A. Entropy bonus and KL penalty:
    `outer.entropy_coef`, `outer.kl_coef` and `outer.kl_target`.

    References:
      Schulman et al., Proximal Policy Optimization, arXiv 1707.06347, equations 7 and 9.
    """

    def advantages(rewards: Rewards, past: Past, rng: np.random.Generator) -> np.ndarray:
        del past, rng
        return rewards.values

    def loss(tokens: Tokens) -> jax.Array:
        moved = jnp.clip(tokens.values - tokens.old_values, -value_clip, value_clip)
        errors = tokens.values - tokens.returns, tokens.old_values + moved - tokens.returns
        value_loss = 0.5 * jnp.maximum(errors[0] ** 2, errors[1] ** 2)
        return clipped(tokens, clip, clip) + value_coef * value_loss

    check(0 < clip < 1, f"clip={clip}: needs 0 < clip < 1")
    check(value_clip > 0 and value_coef >= 0, f"value_clip={value_clip}, value_coef={value_coef}")
    check(0 < discount <= 1 and 0 <= gae_decay <= 1, f"discount={discount}, gae_decay={gae_decay}")
    return Objective(advantages, loss, gae=Gae(discount, gae_decay, normalize_advantages))
