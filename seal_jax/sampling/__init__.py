"""The policy writes, adapted models answer: many rows at once, each with its own adapter.

self_edits.py   what the policy wrote: as text, as a rollout, and where it stops
generate.py     the loop: waiting rows enter, write and leave
decode.py       the device's part: read prompts, write tokens, move rows
draw.py         one token from its logits: temperature, top_k, top_p, min_p, penalty
call_shapes.py  the shapes of a call, and whether they fit into memory
"""
