"""The sweeps of the paper's supplement, and our numbers beside its own."""
