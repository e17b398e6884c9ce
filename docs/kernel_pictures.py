"""Draws docs/images/kernels/*.svg, what lives where in each kernel: python docs/kernel_pictures.py

Every picture has the same parts: the image with a block's tile and halo on the left; beside it what the block keeps,
from registers down to memory. The numbers are those of the notes at the head of the sources in csrc/.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "images" / "kernels"
WIDTH, HEIGHT = 860, 330
TILE, HALO, GRID, INK = "#f2a03d", "#fbe3c2", "#c9d3de", "#1b2733"
LAYERS = {"registers": "#d9ead3", "shared memory": "#cfe2f3", "L2": "#ead1dc", "memory": "#eeeeee", "cache": "#cfe2f3"}


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{INK}"{weight}>{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, line: str = INK) -> str:
    place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    return f'<rect {place} fill="{fill}" stroke="{line}" stroke-width="1"/>'


def arrow(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" stroke="{INK}" marker-end="url(#tip)"/>'


def image(rows: int, columns: int, cell: int = 14, x: int = 20, y: int = 50) -> list[str]:
    """The image as a grid of cells."""
    return [box(x + cell * i, y + cell * j, cell, cell, "white", GRID) for j in range(rows) for i in range(columns)]


def cells(places: list[tuple[int, int]], fill: str, cell: int = 14, x: int = 20, y: int = 50) -> list[str]:
    """Some cells (column, row) of it, filled."""
    return [box(x + cell * i, y + cell * j, cell, cell, fill, "white") for i, j in places]


def area(i: int, j: int, columns: int, rows: int, fill: str, cell: int = 14, x: int = 20, y: int = 50) -> str:
    """Some columns and rows of it, from (i, j) on."""
    return box(x + cell * i, y + cell * j, cell * columns, cell * rows, fill)


def layers(rows: list[tuple[str, ...]], x: int = 330, y: int = 50) -> list[str]:
    """What lies where, one box for each layer: its name, and lines of words."""
    made, height = [], 240 // len(rows) - 10
    for number, (layer, *lines) in enumerate(rows):
        top = y + number * (height + 10)
        made += [box(x, top, 510, height, LAYERS[layer]), text(x + 10, top + 18, layer, 13, bold=True)]
        made += [text(x + 140, top + 18 + 17 * k, line, 12) for k, line in enumerate(lines)]
    return made


def drawing(title: str, parts: list[str], under: str) -> str:
    tip = (
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>'
    )
    lines = [text(20, 26, title, 16, bold=True), *parts, text(20, HEIGHT - 10, under, 12)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    return "\n".join([head, tip, *lines, "</svg>", ""])


# --- the kernels ------------------------------------------------------------------------------------------------------


def resident() -> str:
    grid = [*image(16, 20), area(4, 3, 12, 10, HALO), area(7, 6, 6, 4, TILE)]
    far = [(x, y) for x in (5, 9, 13) for y in (4, 7, 10) if (x, y) != (9, 7)]
    parts = [
        *grid,
        *cells(far, "#9a5b00"),
        *cells([(9, 7)], INK),
        text(20, 298, "tile, halo, a pixel and taps of one dilation", 12),
    ]
    parts += layers(
        [
            ("registers", "where it helps, weights of 16 taps of 2 pixels a thread;", "the sums of up to 4 channels"),
            (
                "shared memory",
                "weights of the other taps, [taps][pixels], for all iterations;",
                "masks of the tile and its halo, 4 channels",
            ),
            (
                "L2",
                "two buffers of masks, through which blocks see",
                "each other's tiles; a barrier of the grid between",
            ),
            ("memory", "image and masks, read once; the result, written once"),
        ]
    )
    return drawing(
        "Diffusion and PAR, resident: one cooperative launch for all iterations", parts, "csrc/diffusion/resident.cuh"
    )


def stream() -> str:
    parts = [*image(16, 20), area(0, 6, 20, 1, HALO), area(4, 6, 1, 1, TILE)]
    parts += [
        *cells([(2, 4), (4, 4), (6, 4), (2, 8), (4, 8), (6, 8), (2, 6), (6, 6)], "#9a5b00"),
        text(20, 298, "a thread: a pixel; a warp: 32 of a row", 12),
    ]
    parts += layers(
        [
            ("registers", "weights and neighbours of 4 or 6 taps at a time;", "the sums of up to 7 channels"),
            (
                "L2",
                "masks: a tap's neighbours are read through the caches,",
                "float32 rows in two buffers that take turns",
            ),
            ("memory", "weights, taps x 4 (2) bytes a pixel,", "read again in every iteration: this is the floor"),
        ]
    )
    return drawing("Diffusion, streamed: a launch for each iteration", parts, "csrc/diffusion/stream.cu")


def par_weights() -> str:
    parts = [
        *image(16, 20),
        area(2, 2, 16, 12, HALO),
        area(6, 6, 8, 4, TILE),
        text(20, 298, "tile of 32 x 16 pixels, halo as wide as the farthest tap", 12),
    ]
    parts += layers(
        [
            ("registers", "kappa of the 48 taps of a pixel, through the softmax"),
            (
                "shared memory",
                "3 colours of tile and halo, float32, the border resolved;",
                "read twice: for the deviations, and for kappa",
            ),
            (
                "memory",
                "weights, one line of 128 bytes per warp and tap;",
                "where the diffusion is resident they stay with it",
            ),
        ]
    )
    return drawing("PAR's weights", parts, "csrc/par/par.cu")


def affinity() -> str:
    parts = [*image(16, 20), area(8, 4, 4, 4, TILE)]
    for i, j in ((12, 4), (4, 8), (8, 8), (12, 8)):
        parts.append(area(i, j, 4, 4, HALO))
    parts += [text(20, 298, "a tile of 8 x 8, and its neighbours right and below", 12)]
    parts += layers(
        [
            (
                "registers",
                "64 x 64 scores of one pair of tiles, 16 a thread,",
                "summed over all heads, both orders at once",
            ),
            (
                "shared memory",
                "a chunk of channels of the four operands",
                "(q and k of both tiles) while the next is on its way",
            ),
            ("L2", "queries and keys: a tile is read", "(reach + 1)(2 reach + 1) times"),
            (
                "memory",
                "out: the window's taps and their mirror images, or",
                "the pair's share of the loss and its derivatives, or G",
            ),
        ]
    )
    return drawing(
        "Affinity from attention: a block for each pair of tiles in the band",
        parts,
        "csrc/affinity/affinity.cu, affinity.cuh",
    )


def random_walk() -> str:
    parts = [*image(16, 20), area(2, 2, 16, 12, HALO), area(6, 6, 8, 4, TILE)]
    parts += [arrow(80, 90, 152, 152), arrow(230, 90, 165, 150), arrow(80, 210, 152, 160), arrow(230, 210, 165, 160)]
    parts += [text(20, 298, "4 x 8 pixels, or 1 x 8; what points at them is added up", 12)]
    parts += layers(
        [
            (
                "registers",
                "8 or 32 threads share a pixel's taps, 10 under way;",
                "then the sums of up to 3 channels",
            ),
            (
                "shared memory",
                "T = A^p / D of the block's pixels, which stays;",
                "then the maps that the tile reaches",
            ),
            (
                "L2",
                "with several steps: the maps, that the blocks read",
                "of one another; a barrier of the grid between",
            ),
            ("memory", "A read twice, the second time from L2;", "the maps, read and written once"),
        ]
    )
    return drawing("Random walk: normalised, weighed and stepped in one launch", parts, "csrc/random_walk/fused.cu")


def exact() -> str:
    parts = [*image(16, 20), *cells([(3, 4), (4, 4), (3, 5), (4, 5), (5, 5), (4, 6), (5, 6), (3, 6)], TILE)]
    near = [(8, 3), (9, 3), (9, 4), (10, 4), (8, 4), (6, 10), (7, 10), (7, 11), (6, 11), (5, 10)]
    away = [(15, 10), (16, 10), (16, 11), (15, 11), (17, 10), (14, 13), (15, 13), (15, 14), (14, 14)]
    parts += [*cells(near, HALO), *cells(away, GRID), arrow(100, 120, 150, 108), arrow(90, 145, 110, 190)]
    parts += [text(20, 298, "tiles compact in place and colour; grey: too far to matter", 12)]
    parts += layers(
        [
            (
                "registers",
                "weights of pairs as tensor cores want them, in two halves;",
                "sums of 128 pixels x up to 48 channels",
            ),
            (
                "shared memory",
                "features of the other tile, in a frame of the pixels' own;",
                "the next tile's on their way; boxes, bins of what is left out",
            ),
            (
                "memory",
                "pixels sorted by a key of (x, y, r, g, b);",
                "values packed as fragments, a factor beside each",
            ),
        ]
    )
    return drawing(
        "Bilateral filter, exact: tiles of 64 meet all tiles near enough",
        parts,
        "csrc/bilateral/exact.cu, exact_tiles.cu",
    )


def lattice() -> str:
    steps = [("points", 40), ("corners", 130), ("blurred", 220)]
    parts = [text(x, 64, name, 12, "middle") for name, x in steps]
    for k in range(5):
        parts += [box(30, 80 + 40 * k, 20, 16, TILE)]
        parts += [arrow(50, 88 + 40 * k, 118, 88 + 40 * j) for j in (max(k - 1, 0), k)]
    parts += [
        f'<circle cx="{x}" cy="{88 + 40 * k}" r="9" fill="{HALO}" stroke="{INK}"/>'
        for k in range(5)
        for x in (130, 220)
    ]
    parts += [arrow(139, 88 + 40 * k, 210, 88 + 40 * j) for k in range(5) for j in range(max(k - 1, 0), min(k + 2, 5))]
    parts += [text(20, 298, "splat to d + 1 corners, blur along d + 1 axes, slice back", 12)]
    parts += layers(
        [
            ("registers", "4 channels of a row to a thread"),
            (
                "shared memory",
                "a point's row: unary, matrix of classes and softmax",
                "of a CRF's iteration happen there",
            ),
            (
                "L2",
                "rows of vertices: fewer than pixels in photographs,",
                "so that splat, blur and slice stay in a large cache",
            ),
            (
                "memory",
                "lists of each vertex's points, in order, cut into chunks;",
                "each vertex's neighbours along the axes",
            ),
        ]
    )
    return drawing(
        "Bilateral filter, lattice, and the dense CRF", parts, "csrc/bilateral/lattice_build.cu, lattice_filter.cu"
    )


def path_affinity() -> str:
    parts = [*image(16, 20), area(2, 2, 16, 12, HALO), area(6, 6, 8, 4, TILE)]
    parts += [
        *cells([(9, 8), (10, 8), (10, 9), (11, 9), (12, 9), (12, 10), (13, 10)], "#9a5b00"),
        *cells([(9, 8), (13, 10)], INK),
    ]
    parts += [text(20, 298, "a path, one of its half plane; halo as wide as a path", 12)]
    parts += layers(
        [
            ("registers", "the maximum so far of a path, for two pixels a thread"),
            (
                "shared memory",
                "the edge as keys: whole numbers in its order,",
                "of a tile of 32 x 16 pixels and its halo",
            ),
            (
                "memory",
                "two taps of the window a path: at its pixel, and the",
                "opposite one at the pixel that it leads to",
            ),
        ]
    )
    return drawing("Path affinity", parts, "csrc/path_affinity/path_affinity.cu")


def feature_affinity() -> str:
    parts = [
        *image(16, 20),
        area(6, 3, 12, 7, HALO),
        area(6, 3, 8, 4, TILE),
        text(20, 298, "tile of 4 x 32 pixels against 4 rows below, a run of 9 dx", 12),
    ]
    parts += layers(
        [
            ("registers", "36 sums: 4 pixels of a thread with 9 taps of one dy"),
            (
                "shared memory",
                "8 channels at a time of the tile and of the rows",
                "and columns it reaches; the next 8 are on their way",
            ),
            ("memory", "the tap and its mirror image: only one half", "of the window is summed"),
        ]
    )
    return drawing("Feature affinity", parts, "csrc/feature_affinity/feature_affinity.cu, feature_tiles.cuh")


def pcm() -> str:
    parts = [*image(16, 16), area(4, 0, 3, 16, HALO), area(4, 5, 3, 3, TILE)]
    parts += [text(20, 298, "all pairs: a block has 64 columns and a share of the rows", 12)]
    parts += layers(
        [
            ("registers", "64 x 64 products of features, 32 a thread"),
            (
                "shared memory",
                "panels of 16 channels in two buffers; the table",
                "max(f_i . f_j, 0); the block's sums, each thread its own",
            ),
            ("cache", "rows of cams, the table's factor"),
            ("memory", "features and cams, packed once; shares of sums,", "added up in order. The matrix is nowhere."),
        ]
    )
    return drawing("Pixel correlation: N x N products, a tile at a time", parts, "csrc/pcm/pcm.cu")


def sinkhorn() -> str:
    parts = [
        *image(16, 20),
        area(3, 3, 13, 9, HALO),
        area(9, 7, 2, 1, TILE),
        text(20, 298, "8 pixels, 32 threads each; a launch for each half step", 12),
    ]
    parts += layers(
        [
            ("registers", "a 32nd of a pixel's products A c or A r, ten loads", "of each under way, sums in double"),
            ("shared memory", "the parts of each sum, added in a fixed order"),
            ("L2", "the window, read 2 num_iter + 1 times if it has a few MB"),
            (
                "memory",
                "the factors r and c, in place of the result until the end;",
                "then the window r_i A_ij c_j, written once",
            ),
        ]
    )
    return drawing("Sinkhorn: factors are renewed, the window is written once", parts, "csrc/sinkhorn/sinkhorn.cu")


PICTURES = (
    resident,
    stream,
    par_weights,
    affinity,
    random_walk,
    exact,
    lattice,
    path_affinity,
    feature_affinity,
    pcm,
    sinkhorn,
)


def main(folder: Path = FOLDER) -> None:
    """Write all pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for each in PICTURES:
        (folder / f"{each.__name__}.svg").write_text(each(), encoding="utf-8")


if __name__ == "__main__":
    main()
