"""The inner loop: self-edits as batches, and many LoRA adapters trained side by side."""
