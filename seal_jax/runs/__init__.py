"""What a run leaves on disk: checkpoints, adapters, and what other libraries read."""
