"""One self-edit after another: what is kept of each, what is forgotten, and remedies.

experiment.py        the loop over edits: write, train, keep, ask; and resume
edits.py             one edit of all sequences: self-edits, training, keeping
asking.py            what the models know: all problems, a control set, general text
sequences.py         which problems follow one another, and which no edit touches
memory.py            texts of earlier edits, under a budget
retrieval.py         which earlier edit a question is about
keeping.py           arithmetic on what an edit changes: scale, trim, average, gate
memory_gradients.py  gradients and inputs of texts, for remedies that store them
decompositions.py    of stacks of matrices, so that CPUs end with them
given.py             how a transformation is given what it needs
matrix.py            from scores after each edit to transfer and forgetting
report.py            the same as JSON, tables and a heat map
remedies/            ways to forget less, a file each

Many sequences learn side by side: each has a model of its own, which is the base with kernels
[S in out] where the inner loop adapts it.
"""
