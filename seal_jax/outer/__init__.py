"""The outer loop's stages: examine what was trained, reward it, update the policy, compare.

stages.py         what every step calls; self-edits are written and parsed
problems.py       the problems of a run, and those of a step
waves.py          inner runs, as many at a time as train side by side
teaching.py       teachers for a wave's texts, where its runs distill
answers.py        adapted models answer, and the answers get marks
ledger.py         what became of each inner run, a line for each
examination.py    which inner runs a step needs, and what its rewards are made of
rewards.py        the terms of a reward, and their weighted sum
judge.py          an LLM's scores, for the reward `judge`
reliability.py    how far a reward can be trusted; which self-edits get more seeds
policy_update.py  the policy is trained: which rows, how often, in which batches
policy_step.py    the same on the devices: the loss, and one training step
step_log.py       what a step writes down: metrics, and a line for every self-edit
external.py       self-edits that somebody else wrote, for further rows of the table
comparison.py     the final table on held-out problems: its arms
differences.py    means and paired differences of the arms, and how small a one can show
examples.py       the first questions, before and after
summary_text.py   the table as text, with what it can show
sweep.py          settings of the inner loop, tried by successive halving
sweep_report.py   what a sweep has found, as a table and a picture
"""
