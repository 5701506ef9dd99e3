"""One self-edit after another: what is kept of each, what is forgotten, and remedies.

sequences.py   which problems come one after another, and a control set that no edit touches
memory.py      earlier training texts, and which of them are trained on again
keeping.py     what becomes of a trained edit: merged, scaled, trimmed, averaged, gated
retrieval.py   which earlier edit a question is about, by its passage's words
matrix.py      what the matrix of scores says: transfer, forgetting by age, cost; with intervals
report.py      that as JSON, text and picture, and several runs side by side
remedies/      ways to forget less, a file each
"""
