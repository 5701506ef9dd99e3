"""What the outer loop makes of rewards: one objective a file, found by its name."""
