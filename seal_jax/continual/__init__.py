"""One self-edit after another: what is kept of each, what is forgotten, and remedies."""
