"""The commands of `afa`: each file parses, calls and prints."""
