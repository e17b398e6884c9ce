"""Processes, sums over them, phases, progress bars. Knows no AFA."""
