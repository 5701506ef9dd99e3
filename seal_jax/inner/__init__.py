"""The inner loop: self-edits as batches, and many LoRA adapters trained side by side.

texts.py       training texts as tokens; an inner run as a job, a list of rows
steps.py       which rows a step takes, and where they lie in it, with little padding
packing.py     jobs to batches of fixed shapes
teachers.py    a frozen model's distributions, from which texts may be learned
update.py      the training itself, on the devices
lane_update.py what the optimizer does for one lane of a step
population.py  how many adapters fit side by side
"""
