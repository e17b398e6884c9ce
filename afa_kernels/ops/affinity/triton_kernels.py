"""The Triton kernels of the affinity; `triton_impl` launches them.

The grid of pixels is cut into tiles of 8 x 8, and the band into pairs of tiles: a tile, and one of its neighbours
below or to the right. `_pairs` multiplies the 64 x 64 scores of one pair, both orders at once, and finishes them in
registers: into the window, into its share of the loss, or into the gradient of the scores, which `_product` then
multiplies with the keys and queries of all neighbours. Scores are summed head by head in float32, operands keep their
type. At r = 8 the tiles hold twice as many pairs as the band.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIDE = 8
WINDOW, LOSS, SCORE_GRADIENT, WINDOW_GRADIENT = (tl.constexpr(i) for i in range(4))


@triton.jit
def _tile(tile, tiles_x, height, width, SIDE: tl.constexpr):
    """Rows, columns and presence of a tile's pixels."""
    pixel = tl.arange(0, SIDE * SIDE)
    y = tile // tiles_x * SIDE + pixel // SIDE
    x = tile % tiles_x * SIDE + pixel % SIDE
    return y, x, (y < height) & (x < width)


@triton.jit
def _rows(base, pixels, inside, strides_n, strides_d, channel, depth, WIDE: tl.constexpr):
    """[64, CHANNELS] of one head, zeros beyond the image and the depth. WIDE: as float32, for the interpreter, whose
    products do not know bfloat16.
    """
    at = pixels.to(tl.int64)[:, None] * strides_n + channel[None, :] * strides_d
    rows = tl.load(base + at, mask=inside[:, None] & (channel < depth)[None, :], other=0.0)
    if WIDE:
        rows = rows.to(tl.float32)
    return rows


@triton.jit
def _finite(values):
    """0 for what is no finite number. The pairs that such a query or key counts in have a gradient of the score that is
    NaN, or 0 at the sigmoid's ends; times it, 0 would be NaN for pixels outside its window, or where its label is
    ignored.
    """
    return tl.where(tl.abs(values.to(tl.float32)) < float("inf"), values, 0.0)


@triton.jit
def _scores(
    query, key, maps, head, image, own, other, inside, key_inside, near,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d, maps_b, maps_h, maps_i, maps_j,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, SIDE: tl.constexpr, CHANNELS: tl.constexpr,
    FROM_MAPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """sum_h w_h (S_h,ij + S_h,ji) of the pixels ``own`` with the pixels ``other``, before the bias: [64, 64]."""
    scores = tl.zeros((SIDE * SIDE, SIDE * SIDE), dtype=tl.float32)
    for h in range(HEADS):
        if FROM_MAPS:
            here = maps + image * maps_b + h * maps_h
            rows, columns = own.to(tl.int64)[:, None], other.to(tl.int64)[None, :]
            both = tl.load(here + rows * maps_i + columns * maps_j, mask=near, other=0.0).to(tl.float32)
            both += tl.load(here + columns * maps_i + rows * maps_j, mask=near, other=0.0).to(tl.float32)
        else:
            both = tl.zeros((SIDE * SIDE, SIDE * SIDE), dtype=tl.float32)
            queries, keys = query + image * query_b + h * query_h, key + image * key_b + h * key_h
            for begin in range(0, DEPTH, CHANNELS):
                channel = begin + tl.arange(0, CHANNELS)
                own_query = _rows(queries, own, inside, query_n, query_d, channel, DEPTH, WIDE)
                other_key = _rows(keys, other, key_inside, key_n, key_d, channel, DEPTH, WIDE)
                both = tl.dot(own_query, tl.trans(other_key), both, input_precision="ieee")
                own_key = _rows(keys, own, inside, key_n, key_d, channel, DEPTH, WIDE)
                other_query = _rows(queries, other, key_inside, query_n, query_d, channel, DEPTH, WIDE)
                both = tl.dot(own_key, tl.trans(other_query), both, input_precision="ieee")
        scores += tl.load(head + h) * both
    return scores


@triton.jit
def _pairs(
    query, key, maps, head, labels, grad_window, slopes, out, partial, counts,
    height, width, radius, tiles_y, tiles_x,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d, maps_b, maps_h, maps_i, maps_j,
    grad_b, grad_t, grad_y, grad_x,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, REACH: tl.constexpr, SIDE: tl.constexpr, CHANNELS: tl.constexpr,
    FROM_MAPS: tl.constexpr, GOAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One pair of tiles. head [HEADS + 1]: weights, bias. slopes [2]: dL/dA of pairs with equal, with other labels."""
    tile, neighbour, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = neighbour + (2 * REACH + 1) * REACH + REACH  # among all neighbours; the tile itself is in their middle
    other_y = tile // tiles_x + place // (2 * REACH + 1) - REACH
    other_x = tile % tiles_x + place % (2 * REACH + 1) - REACH
    if (other_y < tiles_y) & (other_x >= 0) & (other_x < tiles_x):
        y, x, inside = _tile(tile, tiles_x, height, width, SIDE)
        key_y, key_x, key_inside = _tile(other_y * tiles_x + other_x, tiles_x, height, width, SIDE)
        own, other = y * width + x, key_y * width + key_x
        dy, dx = key_y[None, :] - y[:, None], key_x[None, :] - x[:, None]
        near = (dy <= radius) & (dx <= radius) & (dy >= -radius) & (dx >= -radius)
        near = near & inside[:, None] & key_inside[None, :]
        side = 2 * radius + 1
        tap, back = (dy + radius) * side + dx + radius, (radius - dy) * side + radius - dx
        scores = _scores(query, key, maps, head, image, own, other, inside, key_inside, near,
                         query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d,
                         maps_b, maps_h, maps_i, maps_j,
                         HEADS, DEPTH, SIDE, CHANNELS, FROM_MAPS, WIDE)  # fmt: skip
        scores += tl.load(head + HEADS)
        # 1 - A as the sigmoid of -z: the difference cancels where A is near 1.
        result, rest = tl.sigmoid(scores), tl.sigmoid(-scores)
        if GOAL == WINDOW:
            pixels = height * width
            taps = image * side * side
            tl.store(out + (taps + tap) * pixels + own[:, None], result, mask=near)
            if neighbour > 0:
                tl.store(out + (taps + back) * pixels + other[None, :], result, mask=near)
        else:
            program = (image * tl.num_programs(0) + tile) * tl.num_programs(1) + neighbour
            weight = tl.where(neighbour > 0, 2, 1)  # a pair of different tiles stands for both orders
            if GOAL != WINDOW_GRADIENT:
                own_label = tl.load(labels + image * height * width + own, mask=inside, other=-1)[:, None]
                other_label = tl.load(labels + image * height * width + other, mask=key_inside, other=-1)[None, :]
                counted = near & (own_label >= 0) & (other_label >= 0)
                same = counted & (own_label == other_label)
                different = counted & (own_label != other_label)
            if GOAL == LOSS:
                tl.store(partial + 2 * program, weight * tl.sum(tl.where(same, rest, 0.0)))
                tl.store(partial + 2 * program + 1, weight * tl.sum(tl.where(different, result, 0.0)))
                tl.store(counts + 2 * program, weight * tl.sum(same.to(tl.int32)))
                tl.store(counts + 2 * program + 1, weight * tl.sum(different.to(tl.int32)))
            else:
                if GOAL == SCORE_GRADIENT:
                    slope = tl.where(same, tl.load(slopes), tl.load(slopes + 1))
                    result = tl.where(counted, 2.0 * slope * result * rest, 0.0)
                else:
                    result = tl.where(near, result * rest, 0.0)  # before the loads, which take registers
                    at = grad_window + image * grad_b + tap.to(tl.int64) * grad_t + (y * grad_y + x * grad_x)[:, None]
                    grad = tl.load(at, mask=near, other=0.0).to(tl.float32)
                    at = grad_window + image * grad_b + back.to(tl.int64) * grad_t
                    at += (key_y * grad_y + key_x * grad_x)[None, :]
                    grad += tl.load(at, mask=near, other=0.0).to(tl.float32)
                    result *= grad
                pixel = tl.arange(0, SIDE * SIDE)
                at = pixel[:, None] * SIDE * SIDE + pixel[None, :]
                tl.store(out + program * SIDE * SIDE * SIDE * SIDE + at, result)
                tl.store(partial + 2 * program, weight * tl.sum(result))


@triton.jit
def _product(
    gradient, values, own_values, head, out, dots,
    height, width, tiles_y, tiles_x, depth,
    values_b, values_h, values_n, values_d, own_b, own_h, own_n, own_d, out_b, out_h, out_n, out_d,
    REACH: tl.constexpr, SIDE: tl.constexpr, CHANNELS: tl.constexpr, HALF: tl.constexpr, DOT: tl.constexpr,
    WRITE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out = w_h G values for one tile and channels of one head, and its product with own_values."""
    tile, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    blocks = tl.cdiv(depth, CHANNELS)
    h, channel = tl.program_id(1) // blocks, tl.program_id(1) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    tile_y, tile_x = tile // tiles_x, tile % tiles_x
    pixel = tl.arange(0, SIDE * SIDE)
    half = (2 * REACH + 1) * REACH + REACH
    base = values + image * values_b + h * values_h
    total = tl.zeros((SIDE * SIDE, CHANNELS), dtype=tl.float32)
    for place in range((2 * REACH + 1) * (2 * REACH + 1)):
        other_y, other_x = tile_y + place // (2 * REACH + 1) - REACH, tile_x + place % (2 * REACH + 1) - REACH
        if (other_y >= 0) & (other_y < tiles_y) & (other_x >= 0) & (other_x < tiles_x):
            other = other_y * tiles_x + other_x
            # A neighbour above or to the left holds the pair, the other way round.
            mirrored = place < half
            program = image * tiles_y * tiles_x + tl.where(mirrored, other, tile)
            program = program * (half + 1) + tl.where(mirrored, half - place, place - half)
            rows, columns = tl.where(mirrored, 1, SIDE * SIDE), tl.where(mirrored, SIDE * SIDE, 1)
            at = pixel[:, None] * rows + pixel[None, :] * columns
            pairs = tl.load(gradient + program * SIDE * SIDE * SIDE * SIDE + at)
            y, x, inside = _tile(other, tiles_x, height, width, SIDE)
            value = _finite(_rows(base, y * width + x, inside, values_n, values_d, channel, depth, WIDE))
            if HALF:
                # Gradients of a mean over many pairs lie below half precision's range: each tile is scaled to 1.
                largest = tl.max(tl.abs(pairs))
                scale = tl.where(largest > 0, largest, 1.0)
                total += scale * tl.dot((pairs / scale).to(value.dtype), value, input_precision="ieee")
            else:
                total = tl.dot(pairs, value, total, input_precision="ieee")
    y, x, inside = _tile(tile, tiles_x, height, width, SIDE)
    mask = inside[:, None] & (channel < depth)[None, :]
    if DOT:
        base = own_values + image * own_b + h * own_h
        own = _finite(_rows(base, y * width + x, inside, own_n, own_d, channel, depth, WIDE)).to(tl.float32)
        product = tl.sum(tl.where(mask, own * total, 0.0))
        tl.store(dots + (image * tl.num_programs(0) + tile) * tl.num_programs(1) + tl.program_id(1), product)
    if WRITE:
        at = out + image * out_b + h * out_h + (y * width + x).to(tl.int64)[:, None] * out_n + channel[None, :] * out_d
        tl.store(at, total * tl.load(head + h), mask=mask)


@triton.jit
def _maps_product(
    gradient, maps, head, out, dots,
    height, width, tiles_y, tiles_x,
    maps_b, maps_h, maps_i, maps_j, out_b, out_h, out_i, out_j,
    HEADS: tl.constexpr, REACH: tl.constexpr, SIDE: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """One pair of tiles: w_h G into the gradient of the maps, both orders, and sum G S_h for each head."""
    tile, neighbour, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = neighbour + (2 * REACH + 1) * REACH + REACH
    other_y = tile // tiles_x + place // (2 * REACH + 1) - REACH
    other_x = tile % tiles_x + place % (2 * REACH + 1) - REACH
    if (other_y < tiles_y) & (other_x >= 0) & (other_x < tiles_x):
        y, x, inside = _tile(tile, tiles_x, height, width, SIDE)
        key_y, key_x, key_inside = _tile(other_y * tiles_x + other_x, tiles_x, height, width, SIDE)
        i, j = (y * width + x).to(tl.int64)[:, None], (key_y * width + key_x).to(tl.int64)[None, :]
        mask = inside[:, None] & key_inside[None, :]
        pixel = tl.arange(0, SIDE * SIDE)
        program = (image * tl.num_programs(0) + tile) * tl.num_programs(1) + neighbour
        at = pixel[:, None] * SIDE * SIDE + pixel[None, :]
        pairs = tl.load(gradient + program * SIDE * SIDE * SIDE * SIDE + at)
        for h in range(HEADS):
            here, there = maps + image * maps_b + h * maps_h, out + image * out_b + h * out_h
            scores = tl.load(here + i * maps_i + j * maps_j, mask=mask & (pairs != 0), other=0.0).to(tl.float32)
            value = tl.load(head + h) * pairs
            if WRITE:
                tl.store(there + i * out_i + j * out_j, value, mask=mask)
            if neighbour > 0:
                scores += tl.load(here + j * maps_i + i * maps_j, mask=mask & (pairs != 0), other=0.0).to(tl.float32)
                if WRITE:
                    tl.store(there + j * out_i + i * out_j, value, mask=mask)
            tl.store(dots + program * HEADS + h, tl.sum(pairs * scores))


@triton.jit
def _window_loss(
    window, labels, slopes, out, partial, counts,
    height, width,
    window_b, window_t, window_y, window_x,
    RADIUS: tl.constexpr, PIXELS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """The loss of a window, or its gradient, for a run of pixels of one image."""
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y, x = pixel // width, pixel % width
    inside = y < height
    own = tl.load(labels + image * height * width + pixel, mask=inside, other=-1)
    same_sum, different_sum = tl.zeros((PIXELS,), dtype=tl.float32), tl.zeros((PIXELS,), dtype=tl.float32)
    same_count, different_count = tl.zeros((PIXELS,), dtype=tl.int32), tl.zeros((PIXELS,), dtype=tl.int32)
    plane = (out if BACKWARD else window) + image * window_b
    for tap in range((2 * RADIUS + 1) * (2 * RADIUS + 1)):
        key_y, key_x = y + tap // (2 * RADIUS + 1) - RADIUS, x + tap % (2 * RADIUS + 1) - RADIUS
        exists = inside & (key_y >= 0) & (key_y < height) & (key_x >= 0) & (key_x < width)
        other = tl.load(labels + image * height * width + key_y * width + key_x, mask=exists, other=-1)
        counted = (own >= 0) & (other >= 0)
        at = plane + y * window_y + x * window_x
        if BACKWARD:
            slope = tl.where(own == other, tl.load(slopes), tl.load(slopes + 1))
            tl.store(at, tl.where(counted, slope, 0.0), mask=inside)
        else:
            affinity = tl.load(at, mask=exists, other=0.0).to(tl.float32)
            same_sum += tl.where(counted & (own == other), 1.0 - affinity, 0.0)
            different_sum += tl.where(counted & (own != other), affinity, 0.0)
            same_count += (counted & (own == other)).to(tl.int32)
            different_count += (counted & (own != other)).to(tl.int32)
        plane += window_t  # a pointer, so that no index outgrows 32 bits
    if not BACKWARD:
        program = image * tl.num_programs(0) + tl.program_id(0)
        tl.store(partial + 2 * program, tl.sum(same_sum))
        tl.store(partial + 2 * program + 1, tl.sum(different_sum))
        tl.store(counts + 2 * program, tl.sum(same_count))
        tl.store(counts + 2 * program + 1, tl.sum(different_count))
