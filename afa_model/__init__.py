"""AFA in PyTorch: backbone, model, pseudo-labels, training, evaluation, prediction."""
