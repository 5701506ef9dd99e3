"""The machines that a run has: processes, memory, signals, files and the console.

start_jax.py   before JAX is used: its cache, other processes, lost devices
group.py       how the processes of a run find each other
exchange.py    what they say to each other
failure.py     one fails, and the others end too
preemption.py  SIGTERM
folder_lock.py one run at a time in a folder
memory.py      how many bytes each device has
endpoint.py    requests to an OpenAI-compatible endpoint
json_text.py   how text and JSON are read
outputs.py     what could not be written, said before the work
files.py       JSON and lines of JSON
replacing.py   files and folders that are whole or absent
manifest.py    what a run has written, with checksums
console.py     lines and progress, from the first process
"""
