"""Data sets: files, classes, image labels, checks, order, transforms, generated pictures."""
