"""The run directory: records, checkpoints, environment, resume, locks, processes."""
