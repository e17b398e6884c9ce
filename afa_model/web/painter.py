"""A photograph to paint on: a canvas that sends its strokes, as lines and not as pixels, after each one."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from .masks import OBJECTS, brush_colors
from .quiet_gradio import gr

ERASER = -1

_CSS = """
.afa-painter { display: flex; flex-direction: column; gap: 6px; }
.afa-tools { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 6px; font-size: .85rem; }
.afa-tools button { display: inline-flex; align-items: center; gap: .35em; padding: 2px 8px; border-radius: 5px;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-primary);
  color: var(--body-text-color); cursor: pointer; }
.afa-tools button[aria-pressed="true"] { border-color: var(--color-accent); box-shadow: 0 0 0 1px var(--color-accent); }
.afa-tools i { width: 1em; height: 1em; border-radius: 3px; border: 1px solid #8888; }
.afa-tools label { display: inline-flex; align-items: center; gap: .4em; }
.afa-tools input { width: 7em; }
canvas { display: block; width: 100%; border-radius: 4px; background: var(--background-fill-secondary);
  cursor: crosshair; touch-action: none; }
"""

_JS = """
const canvas = element.querySelector('canvas'), context = canvas.getContext('2d');
const brush = element.querySelector('input'), choices = [...element.querySelectorAll('button[data-class]')];
let photo = null, on = null, strokes = [], current = null, chosen = choices[0];
function choose(button) {
  chosen = button;
  choices.forEach(each => each.setAttribute('aria-pressed', each === button));
}
function draw() {
  context.globalAlpha = 1;
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (photo) context.drawImage(photo, 0, 0, canvas.width, canvas.height);
  context.lineCap = context.lineJoin = 'round';
  for (const stroke of strokes) {
    const erases = stroke.k < 0;
    context.globalAlpha = erases ? 0.9 : 0.75;
    context.strokeStyle = choices.find(each => Number(each.dataset.class) === stroke.k).dataset.color;
    context.setLineDash(erases ? [4, 6] : []);
    context.lineWidth = erases ? 2 : 2 * stroke.r;
    context.beginPath();
    stroke.p.forEach(([x, y], i) => i ? context.lineTo(x, y) : context.moveTo(x, y));
    const [x, y] = stroke.p[stroke.p.length - 1];
    context.lineTo(x + 0.01, y);
    context.stroke();
  }
  context.setLineDash([]);
}
function place(event) {
  const box = canvas.getBoundingClientRect();
  return [Math.round((event.clientX - box.left) * canvas.width / box.width),
          Math.round((event.clientY - box.top) * canvas.height / box.height)];
}
function tell() { draw(); trigger('input', {strokes, on}); }
function load() {
  strokes = []; current = null;
  if (!props.value || !props.value.image) return;
  on = props.value.on;
  const next = new Image();
  next.onload = () => { photo = next; canvas.width = props.value.width; canvas.height = props.value.height;
                        brush.value = Math.max(2, Math.round(canvas.width / 45)); draw(); };
  next.src = props.value.image;
}
canvas.addEventListener('pointerdown', event => {
  if (!photo || event.button) return;
  canvas.setPointerCapture(event.pointerId);
  current = {k: Number(chosen.dataset.class), r: Number(brush.value), p: [place(event)]};
  strokes.push(current);
  draw();
});
canvas.addEventListener('pointermove', event => { if (current) { current.p.push(place(event)); draw(); } });
for (const end of ['pointerup', 'pointercancel'])
  canvas.addEventListener(end, () => { if (current) { current = null; tell(); } });
choices.forEach(each => each.addEventListener('click', () => choose(each)));
element.querySelector('[data-do="undo"]').addEventListener('click', () => { if (strokes.pop()) tell(); });
element.querySelector('[data-do="clear"]').addEventListener('click', () => { strokes = []; draw(); trigger('clear'); });
choose(chosen);
watch('value', load);
load();
"""


def painter(names: Sequence[str], elem_id: str) -> gr.HTML:
    """The canvas. Its value is :func:`canvas_of`'s; ``input`` brings ``strokes`` and the number ``on`` of the
    picture that they were drawn on, ``clear`` that the mask is to go.

    names: of the background and of OBJECTS classes.
    """
    return gr.HTML(
        None,
        html_template=_html(names),
        css_template=_CSS,
        js_on_load=_JS,
        apply_default_css=False,
        elem_id=elem_id,
        scale=1,
        min_width=235,
        container=True,
        padding=True,
    )


def _html(names: Sequence[str]) -> str:
    classes = [*range(1, OBJECTS + 1), 0]
    chips = "".join(
        f'<button type="button" data-class="{number}" data-color="{color}">'
        f'<i style="background:{color}"></i>{escape(names[number])}</button>'
        for number, color in zip(classes, brush_colors())
    )
    return (
        f'<div class="afa-painter"><div class="afa-tools">{chips}'
        f'<button type="button" data-class="{ERASER}" data-color="#fff">erase</button>'
        '<label>brush <input type="range" min="1" max="60" value="8" aria-label="size of the brush"></label>'
        '<button type="button" data-do="undo">undo</button><button type="button" data-do="clear">start anew</button>'
        '</div><canvas width="640" height="480" aria-label="the photograph, to paint on"></canvas></div>'
    )


def canvas_of(pixels: np.ndarray, on: int) -> Mapping[str, Any]:
    """The value that shows a picture uint8 [H, W, 3] and forgets all strokes.

    on: a number that no other has: the browser takes no notice of a value that it shows already.
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    height, width = pixels.shape[:2]
    address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"image": address, "width": width, "height": height, "on": on}
