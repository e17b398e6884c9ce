"""Pictures of what a model sees: overlays, panels, head weights."""
