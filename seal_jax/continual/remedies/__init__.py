"""Ways to forget less, a file each.

Transformations of gradients or updates, for any optax chain. What one needs is closed over when it
is made, or comes with every update under its keyword; `continual/memory_gradients.py` computes it
from a model.

  name        keyword       place             what it does                     parameters
  ewc         importance    1, in the loss    pulls back what earlier texts need   any
  o_lora      subspaces     1, in the loss    turns `a` from earlier adapters      adapters
  a_gem       memory_grads  2, the gradient   no step against the memory           any
  (clipping, then the optimizer)
  ogd         directions    3, the update     no step along stored directions      any
  null_space  projectors    3, the update     `a` does not see the memory          adapters

The penalties (1) add up, and come before A-GEM, which then looks at all of the gradient. After
A-GEM Adam still scales every number by itself, so its promise is about the gradient; OGD and the
null space project what is added to the parameters, and their promise is exact.

ogd contradicts a_gem, and null_space contradicts ogd: what one takes away changes what the other
has made sure of. See CONTRADICT.
"""

# Pairs of which the second breaks what the first promises, and why.
CONTRADICT = {
    ("a_gem", "ogd"): "without the stored directions, a step may go against the memory again",
    ("ogd", "null_space"): "projected into the null space, a step may have stored directions again",
}
# Where each stands in a chain: before the optimizer in this order, or after it.
BEFORE, AFTER = ("ewc", "o_lora", "a_gem"), ("ogd", "null_space")
