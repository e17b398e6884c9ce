"""What goes wrong in the user's hands."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type or makes no sense; the message names its key."""
