"""What one training step computes: losses, phases, optimizer and schedule, acceleration."""
