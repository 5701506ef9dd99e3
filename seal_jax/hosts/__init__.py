"""The machines that a run has: processes, memory, signals, files and the console."""
