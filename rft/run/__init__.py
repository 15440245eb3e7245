"""A run is a folder and the folder is the truth: its state, its lock, its checkpoints, what it is a run of."""
