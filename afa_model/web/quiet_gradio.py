"""Gradio, told before it is imported that it is to report to nobody."""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_SHARE"] = "False"

import gradio as gr

__all__ = ["gr"]
