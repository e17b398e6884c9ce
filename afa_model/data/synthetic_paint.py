"""Paints small animals seen from above, with their masks: the photographs of the generated data set.

What makes them a fair stand-in for photographs with image-level labels: what tells a kind for certain is a
small part, the marks of its head; the body is several times larger and wears one of five coats, its kind's own
most of the time, in one of four patterns; the grounds are textured and have nothing to do with what is on them.

Everything is drawn from signed distances (negative inside, in units of the animal's length), so outlines are
smooth at any size and angle, and the mask is where the distance is negative.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SPECIES = ("turtle", "beetle", "fish", "frog", "mouse")

# A kind's own coat stands at its own place: colour, and that of its pattern.
COATS = (
    ((52, 136, 78), (30, 98, 56)),  # emerald
    ((198, 84, 46), (146, 54, 30)),  # rust
    ((74, 92, 172), (48, 60, 128)),  # indigo
    ((228, 164, 34), (180, 118, 16)),  # mustard
    ((150, 70, 140), (106, 42, 100)),  # plum
)
PATTERNS = ("plates", "spots", "bands", "plain")
OWN_COAT = 0.9  # how often a kind wears its own coat; else any of the five, its own included
LENGTHS = (50.0, 76.0)  # of an animal, in pixels
SHADOW = 2  # pixels to the lower right

Layer = tuple[np.ndarray, np.ndarray]  # signed distance [h, w], colour [h, w, 3] in 0..255


def paint_scene(
    rng: np.random.RandomState, height: int, width: int, own_coat: float = OWN_COAT
) -> tuple[np.ndarray, np.ndarray]:
    """One to four animals of one or two kinds on one ground.

    Returns:
        the picture, uint8 [height, width, 3], and its mask, uint8 [height, width]: 0 for the ground, 1 ..
        len(SPECIES) for the kinds.
    """
    picture = GROUNDS[rng.randint(len(GROUNDS))](rng, height, width)
    picture = picture * rng.uniform(0.88, 1.08) + rng.normal(0, 4, 3)
    mask = np.zeros((height, width), np.uint8)
    kinds = rng.permutation(len(SPECIES))[: rng.randint(1, 3)]
    placed: list[tuple[float, float, float]] = []
    for number in range(rng.choice(4, p=(0.25, 0.35, 0.3, 0.1)) + 1):
        place = _free_place(rng, height, width, placed)
        if place is None:
            continue
        placed.append(place)
        kind = int(kinds[number % len(kinds)])
        coat = kind if rng.random_sample() < own_coat else rng.randint(len(COATS))
        _paint_animal(rng, picture, mask, kind, coat, PATTERNS[rng.randint(len(PATTERNS))], place)
    picture += rng.normal(0, 3, picture.shape)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), mask


def _free_place(
    rng: np.random.RandomState, height: int, width: int, taken: list[tuple[float, float, float]]
) -> tuple[float, float, float] | None:
    """Centre (y, x) and length of an animal that hides none of the others; None if there is no room.

    It may be cut by the picture's border, as in photographs.
    """
    for _ in range(40):
        length = rng.uniform(*LENGTHS)
        edge = 0.34 * length
        y, x = rng.uniform(edge, height - edge), rng.uniform(edge, width - edge)
        if all(np.hypot(y - other[0], x - other[1]) > 0.48 * (length + other[2]) for other in taken):
            return y, x, length
    return None


def _paint_animal(
    rng: np.random.RandomState,
    picture: np.ndarray,
    mask: np.ndarray,
    kind: int,
    coat: int,
    pattern: str,
    place: tuple[float, float, float],
) -> None:
    """Paint one animal and its shadow into ``picture`` (float) and ``mask``, both changed in place."""
    y, x, length = place
    angle = rng.uniform(0, 2 * np.pi)
    reach = int(0.75 * length) + 2 * SHADOW
    rows = slice(max(0, int(y) - reach), int(y) + reach + 1)
    columns = slice(max(0, int(x) - reach), int(x) + reach + 1)
    view = picture[rows, columns]
    down, right = np.mgrid[: view.shape[0], : view.shape[1]].astype(float)
    down, right = down + rows.start - y, right + columns.start - x
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = (right * cos + down * sin) / length, (down * cos - right * sin) / length  # u: towards the head

    layers = ANIMALS[SPECIES[kind]](u, v, coat_colour(u, v, coat, pattern))
    outline = length * np.minimum.reduce([distance for distance, _ in layers])
    shadow = np.pad(outline, ((SHADOW, 0), (SHADOW, 0)), mode="edge")[:-SHADOW, :-SHADOW]
    view *= 1 - 0.3 * smoothstep((2 - shadow) / 5)[..., None]

    light = 1 - 0.13 * (u * (cos + sin) + v * (cos - sin))  # from the upper left
    grain = rng.normal(0, 5, u.shape)
    for distance, colour in layers:
        edge = 0.80 + 0.26 * np.sqrt(np.clip(-distance / 0.16, 0, 1))
        shaded = colour * (edge * light)[..., None] + grain[..., None]
        cover = np.clip(0.5 - length * distance, 0, 1)[..., None]
        view[:] = view * (1 - cover) + shaded * cover
    mask[rows, columns][outline < 0] = kind + 1


# -- building blocks


def smoothstep(x: np.ndarray) -> np.ndarray:
    """0 below 0, 1 above 1, smooth between."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def blend(first: tuple[float, ...], second: tuple[float, ...], share: np.ndarray) -> np.ndarray:
    """Colours between two: [h, w] in 0..1 -> [h, w, 3]."""
    return np.array(first, float) + (np.array(second, float) - np.array(first, float)) * share[..., None]


def noise(
    rng: np.random.RandomState, height: int, width: int, cell: float, octaves: int = 3
) -> np.ndarray:
    """Smooth random values in 0..1 [height, width]: features of ``cell`` pixels, finer ones on top."""
    total, weights, weight = np.zeros((height, width)), 0.0, 1.0
    for _ in range(octaves):
        grid = rng.random_sample((int(height / cell) + 3, int(width / cell) + 3))
        y = np.arange(height) / cell + rng.random_sample()
        x = np.arange(width) / cell + rng.random_sample()
        i, j = y.astype(int), x.astype(int)
        t, s = smoothstep(y - i)[:, None], smoothstep(x - j)
        upper = grid[i][:, j] * (1 - s) + grid[i][:, j + 1] * s
        lower = grid[i + 1][:, j] * (1 - s) + grid[i + 1][:, j + 1] * s
        total += weight * (upper * (1 - t) + lower * t)
        weights, weight, cell = weights + weight, weight * 0.55, max(cell / 2, 1)
    return total / weights


def ellipse(
    u: np.ndarray, v: np.ndarray, u0: float, v0: float, ru: float, rv: float, angle: float = 0.0
) -> np.ndarray:
    """Signed distance to an ellipse with centre (u0, v0) (first order: exact on the outline)."""
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = (u - u0) * cos + (v - v0) * sin, (v - v0) * cos - (u - u0) * sin
    radius = np.hypot(a / ru, b / rv)
    slope = np.maximum(np.hypot(a / ru**2, b / rv**2), 1e-9)
    return np.where(radius > 1e-6, radius * (radius - 1) / slope, -min(ru, rv))


def limb(
    u: np.ndarray, v: np.ndarray, start: tuple[float, float], end: tuple[float, float], r0: float, r1: float
) -> np.ndarray:
    """Signed distance to a rounded stroke between two points, r0 thick at its start and r1 at its end."""
    du, dv = end[0] - start[0], end[1] - start[1]
    along = np.clip(((u - start[0]) * du + (v - start[1]) * dv) / (du * du + dv * dv), 0, 1)
    return np.hypot(u - start[0] - along * du, v - start[1] - along * dv) - (r0 + (r1 - r0) * along)


def melt(first: np.ndarray, second: np.ndarray, width: float) -> np.ndarray:
    """The union of two shapes with a rounded seam."""
    share = np.clip(0.5 + 0.5 * (second - first) / width, 0, 1)
    return second + (first - second) * share - width * share * (1 - share)


def coat_colour(u: np.ndarray, v: np.ndarray, coat: int, pattern: str) -> np.ndarray:
    """Colour of a body [h, w, 3]: the coat's own with a pattern in its darker one."""
    if pattern == "plates":
        grid = np.cos(np.pi * u / 0.155) * np.cos(np.pi * v / 0.155)
        share = smoothstep((0.28 - np.abs(grid)) / 0.28)
    elif pattern == "spots":
        row = np.floor(v / 0.15)
        across = u / 0.15 + 0.5 * (row % 2)
        share = smoothstep((0.36 - np.hypot(across % 1 - 0.5, v / 0.15 - row - 0.5)) / 0.12)
    elif pattern == "bands":
        share = smoothstep(0.6 * np.sin(u / 0.05) + 0.5)
    else:
        share = np.zeros_like(u)
    return blend(*COATS[coat], 0.85 * share)


def _plain(u: np.ndarray, *colour: float) -> np.ndarray:
    return np.broadcast_to(np.array(colour, float), (*u.shape, 3))


# -- animals: (u, v, coat's colour [h, w, 3]) -> layers, the lowest first


def _turtle(u: np.ndarray, v: np.ndarray, coat: np.ndarray) -> list[Layer]:
    side, skin = np.abs(v), 0.78 * coat
    stripes = smoothstep(np.sin(side / 0.0165) + 0.6)
    return [
        (ellipse(u, side, 0.22, 0.30, 0.17, 0.085, 0.9), skin),
        (ellipse(u, side, -0.30, 0.28, 0.13, 0.075, 2.3), skin),
        (limb(u, v, (-0.35, 0), (-0.52, 0), 0.05, 0.012), skin),
        (limb(u, v, (0.30, 0), (0.44, 0), 0.10, 0.125), blend((242, 214, 60), (38, 120, 60), stripes)),
        (ellipse(u, side, 0.47, 0.085, 0.03, 0.03), _plain(u, 20, 20, 20)),
        (ellipse(u, v, -0.06, 0, 0.38, 0.32), coat),
    ]


def _beetle(u: np.ndarray, v: np.ndarray, coat: np.ndarray) -> list[Layer]:
    side, horn = np.abs(v), _plain(u, 44, 39, 42)
    spot = smoothstep((0.065 - np.hypot(u - 0.28, side - 0.11)) / 0.02)
    return [
        (limb(u, side, (0.20, 0.1), (0.30, 0.42), 0.026, 0.016), horn),
        (limb(u, side, (-0.02, 0.1), (-0.10, 0.46), 0.026, 0.016), horn),
        (limb(u, side, (-0.24, 0.1), (-0.32, 0.42), 0.026, 0.016), horn),
        (limb(u, side, (0.44, 0.05), (0.60, 0.17), 0.014, 0.010), horn),
        (ellipse(u, v, 0.41, 0, 0.11, 0.13), horn),
        (ellipse(u, v, -0.10, 0, 0.40, 0.29), coat * np.where(side < 0.014, 0.6, 1)[..., None]),
        (ellipse(u, v, 0.28, 0, 0.12, 0.22), blend((44, 39, 42), (255, 120, 30), spot)),
        (ellipse(u, side, 0.47, 0.07, 0.028, 0.028), _plain(u, 255, 240, 220)),
    ]


def _fish(u: np.ndarray, v: np.ndarray, coat: np.ndarray) -> list[Layer]:
    bent, fin = v - 0.05 * np.sin(3.2 * u), 0.78 * coat
    side = np.abs(bent)
    body = melt(ellipse(u, bent, 0.08, 0, 0.42, 0.20), limb(u, bent, (-0.1, 0), (-0.42, 0), 0.1, 0.035), 0.08)
    return [
        (limb(u, side, (-0.36, 0.02), (-0.55, 0.15), 0.05, 0.055), fin),
        (ellipse(u, np.abs(v), 0.02, 0.22, 0.13, 0.07, -0.5), fin),
        (body, coat),
        (np.maximum(body, np.abs(u - 0.27) - 0.035), _plain(u, 250, 246, 240)),
        (np.maximum(body, ellipse(u, side, 0.39, 0.08, 0.075, 0.06)), _plain(u, 214, 44, 52)),
        (ellipse(u, side, 0.38, 0.085, 0.035, 0.035), _plain(u, 250, 250, 250)),
        (ellipse(u, side, 0.385, 0.09, 0.018, 0.018), _plain(u, 10, 10, 10)),
    ]


def _frog(u: np.ndarray, v: np.ndarray, coat: np.ndarray) -> list[Layer]:
    side, leg = np.abs(v), 0.78 * coat
    return [
        (limb(u, side, (-0.28, 0.2), (-0.06, 0.40), 0.085, 0.07), leg),
        (limb(u, side, (-0.06, 0.40), (-0.34, 0.46), 0.05, 0.03), leg),
        (limb(u, side, (0.20, 0.2), (0.34, 0.38), 0.055, 0.035), leg),
        (ellipse(u, v, -0.08, 0, 0.36, 0.27), coat),
        (ellipse(u, v, 0.30, 0, 0.165, 0.225), 1.08 * coat),
        (ellipse(u, side, 0.34, 0.155, 0.095, 0.095), _plain(u, 150, 226, 60)),
        (ellipse(u, side, 0.35, 0.16, 0.03, 0.055), _plain(u, 16, 16, 16)),
    ]


def _mouse(u: np.ndarray, v: np.ndarray, coat: np.ndarray) -> list[Layer]:
    side, bent = np.abs(v), v - 0.06 * np.sin(9 * (u + 0.4)) * (u < -0.4)
    face = melt(ellipse(u, v, 0.33, 0, 0.17, 0.14), ellipse(u, v, 0.48, 0, 0.06, 0.05), 0.06)
    return [
        (limb(u, bent, (-0.36, 0), (-0.66, 0), 0.035, 0.018), _plain(u, 228, 150, 160)),
        (ellipse(u, v, -0.08, 0, 0.38, 0.27), coat),
        (ellipse(u, side, 0.24, 0.17, 0.115, 0.115), _plain(u, 250, 238, 244)),
        (ellipse(u, side, 0.24, 0.17, 0.075, 0.075), _plain(u, 240, 110, 150)),
        (face, 1.12 * coat),
        (ellipse(u, v, 0.52, 0, 0.032, 0.032), _plain(u, 240, 90, 130)),
        (ellipse(u, side, 0.38, 0.075, 0.022, 0.022), _plain(u, 20, 16, 20)),
    ]


ANIMALS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], list[Layer]]] = {
    "turtle": _turtle,
    "beetle": _beetle,
    "fish": _fish,
    "frog": _frog,
    "mouse": _mouse,
}


# -- grounds: (rng, height, width) -> [height, width, 3] in about 0..255


def _meadow(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    tufts = noise(rng, height, width, 3, 2)[..., None] - 0.5
    return blend((182, 198, 144), (154, 176, 124), noise(rng, height, width, 28)) + tufts * (44, 48, 34)


def _beach(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    dunes, grains = noise(rng, height, width, 34), noise(rng, height, width, 1.5, 1)
    y, x = np.mgrid[:height, :width]
    angle = rng.uniform(0, np.pi)
    ripples = np.sin((x * np.cos(angle) + y * np.sin(angle)) / 3.6 + 7 * dunes)
    return blend((232, 214, 178), (214, 192, 154), dunes) + (5 * ripples + 26 * (grains - 0.5))[..., None]


def _water(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    glints = np.exp(-(((noise(rng, height, width, 11, 2) - 0.5) / 0.055) ** 2))[..., None]
    return blend((152, 196, 206), (122, 174, 192), noise(rng, height, width, 26)) + glints * (44, 40, 32)


def _planks(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width].astype(float)
    across = (x if rng.randint(2) else y) + rng.uniform(0, 26)
    tone = rng.random_sample(64)[(across / 26).astype(int)]
    grain = np.sin(1.1 * across + 9 * noise(rng, height, width, 40, 1) + 3 * noise(rng, height, width, 6, 2))
    seam = np.clip(1.4 - np.abs(across % 26 - 0.7), 0, 1)[..., None]
    return (blend((208, 186, 162), (184, 160, 136), tone) + 6 * grain[..., None]) * (1 - 0.35 * seam)


def _gravel(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    count, reach = height * width // 70, 14  # stones; no point is farther than that from the nearest two
    centres = rng.random_sample((count, 2)) * (height, width)
    tones = rng.random_sample(count)
    nearest, second = np.full((2, height, width), 1e9)
    tone = np.zeros((height, width))
    y, x = np.mgrid[:height, :width].astype(float)
    for (cy, cx), value in zip(centres, tones):
        top, left = max(0, int(cy) - reach), max(0, int(cx) - reach)
        part = np.s_[top : int(cy) + reach + 1, left : int(cx) + reach + 1]
        distance = np.hypot(y[part] - cy, x[part] - cx)
        closer = distance < nearest[part]
        second[part] = np.where(closer, nearest[part], np.minimum(second[part], distance))
        tone[part] = np.where(closer, value, tone[part])
        nearest[part] = np.where(closer, distance, nearest[part])
    stone = smoothstep((second - nearest) / 3)[..., None]
    return blend((188, 186, 182), (150, 149, 151), tone) * (0.72 + 0.28 * stone)


GROUNDS = (_meadow, _beach, _water, _planks, _gravel)
