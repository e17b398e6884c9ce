"""A training run around its steps: trainer, loop, checkpoints, logs, what ends it early."""
