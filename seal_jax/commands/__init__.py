"""The commands of `seal-jax`, one a file."""
