"""Few-shot ARC: the policy chooses augmentations and training settings for each task."""
