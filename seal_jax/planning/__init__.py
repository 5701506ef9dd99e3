"""What a run will cost, before it runs.

run_estimate.py    what a run is going to do, printed before it starts
pilot.py           how small a difference it can show, by an earlier run
slice_plan.py      `seal-jax plan`: does a config fit a slice, and how long does it take
stage_programs.py  a run's device programs, made from shapes alone
compiled_cost.py   what a compiled program needs of a device
program_text.py    operations and collectives, read from the program's text
chips.py           TPU chips and slices
"""
