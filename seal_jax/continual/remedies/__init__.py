"""Ways to forget less, a file each."""
