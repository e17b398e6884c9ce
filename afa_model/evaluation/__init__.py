"""Scores of a model against masks, and prediction for photographs."""
