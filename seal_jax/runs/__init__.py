"""What a run leaves on disk: checkpoints, adapters, and what other libraries read.

train_state.py       the outer loop's state: what a checkpoint holds, and where a run goes on
checkpoint.py        how it is saved and restored, with hashes
checkpoint_items.py  what Orbax writes and reads of one checkpoint or adapter
leaf_records.py      what a checkpoint notes of every array
adapters.py          the adapters of a run
kept_adapters.py     which of them stay
folder.py            a run's folder as a model
verify.py            reads everything and names what is damaged
peft.py              PEFT adapters in and out
peft_config.py       what an adapter_config.json asks for
"""
