"""The inner loop: self-edits as batches, and many LoRA adapters trained side by side.

texts.py       training texts as tokens; an inner run as a job, a list of rows
packing.py     jobs to batches of fixed shapes, with little padding
teachers.py    a frozen model's distributions, from which texts may be learned
update.py      the training itself, on the devices
population.py  how many adapters fit side by side
"""
