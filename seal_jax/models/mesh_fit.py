"""Whether a mesh divides a model."""

from jax.sharding import Mesh

from seal_jax.models.config import ModelConfig
from seal_jax.sharding import mesh_axes, num_parts


def check_divides(mesh: Mesh, config: ModelConfig) -> None:
    """Raise ValueError where an axis of the mesh does not divide what it is there to divide.

    Fewer key and value heads than `tensor` are no mistake: they are divided within a head.
    """
    for logical, what, size in (
        ("embed", "dimensions of the model", config.embed_dim),
        ("heads", "heads", config.num_heads),
        ("mlp", "dimensions of the MLP", config.mlp_dim),
    ):
        axes = mesh_axes(logical, config.rules)
        if size % num_parts(mesh, logical, config.rules):
            found = " x ".join(f"mesh.{axis} = {mesh.shape[axis]}" for axis in axes)
            raise ValueError(f"{found} does not divide the {size} {what}")


def undivided(mesh: Mesh, config: ModelConfig) -> str:
    """Return what to say where the vocabulary, which `check_divides` lets pass, stays whole, or ''.

    Vocabularies have odd sizes, and an embedding that every device has is no mistake.
    """
    parts, size = num_parts(mesh, "vocab", config.rules), config.vocab_size
    if size % parts == 0:
        return ""
    return f"every device has the whole vocabulary: {parts} parts do not divide its {size:,} tokens"
