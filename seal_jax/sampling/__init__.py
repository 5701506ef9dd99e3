"""The policy writes, adapted models answer: many rows at once, each with its own adapter."""
