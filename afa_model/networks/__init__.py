"""Backbones, decoder and the AFA model."""
