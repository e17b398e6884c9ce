"""How the page looks: fonts of the system, nothing fetched.

A place to drop files has no status of Gradio's: after a file too large that would lie over it and take the next one.
"""

from __future__ import annotations

from .quiet_gradio import gr

CSS = """
.gradio-container { max-width: 1760px !important; margin: 0 auto !important; }
.afa-head h1 { margin: 0 0 .1em 0; font-size: 1.35rem; }
.afa-head p { margin: 0; color: var(--body-text-color-subdued); }
.afa-note { font-size: .88rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.afa-error { font-size: .92rem; padding: .5em .7em; border-radius: 6px; border: 1px solid #c0392b;
  background: #c0392b1f; overflow-wrap: anywhere; }
.afa-legend { display: flex; flex-wrap: wrap; gap: .25em 1.1em; font-size: .92rem; min-height: 1.5em; }
.afa-key { display: inline-flex; align-items: center; white-space: nowrap; }
.afa-patch { display: inline-block; width: 1.1em; height: 1.1em; margin-right: .4em; border-radius: 3px;
  border: 1px solid #8888; }
.afa-drop .icon-wrap, .afa-drop .or { display: none; }
.afa-drop [data-testid="status-tracker"] { display: none; }
.afa-examples, .afa-examples .grid-wrap { height: auto !important; min-height: 0; max-height: none !important; }
.afa-examples .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important; padding-top: 1.4em;
  max-width: 30em; }
.afa-picture { padding-top: 1.75em !important; }
.afa-picture > label > span { display: none; }
.afa-picture .icon-button-wrapper { top: 0 !important; right: 0 !important; border-width: 0 0 1px 1px !important; }
.afa-picture .image-container, .afa-picture .image-frame { height: auto !important; position: static !important; }
.afa-picture .image-container > button, .afa-picture .image-frame { width: 100% !important; }
.afa-picture img { width: auto !important; height: auto !important; max-width: 100%; max-height: 75vh;
  margin: 0 auto; }
.afa-files { font-size: .85rem; }
"""


def theme() -> gr.themes.Base:
    """Gradio's plain theme with the fonts that the system has."""
    return gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        spacing_size="sm",
        radius_size="sm",
        text_size="md",
        font=["system-ui", "-apple-system", "Segoe UI", "DejaVu Sans", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "DejaVu Sans Mono", "monospace"],
    )
