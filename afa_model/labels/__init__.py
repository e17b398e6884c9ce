"""From image-level labels to pixel labels: class slots, CAMs, pseudo-labels, refinement. Knows no files."""
