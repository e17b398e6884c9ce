"""A run's settings: what there is (`config.py`), how it is read (`parser.py`), and the packaged YAML files."""

from .config import Config, check
from .parser import Parser, find_config, from_dict, packaged, parse, section, to_dict, to_yaml

__all__ = [
    "Config",
    "Parser",
    "check",
    "find_config",
    "from_dict",
    "packaged",
    "parse",
    "section",
    "to_dict",
    "to_yaml",
]
