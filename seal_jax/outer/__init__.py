"""The outer loop's stages: examine what was trained, reward it, update the policy, compare."""
