"""The native kernels of the affinity, called: the ``native`` backend of `functional` and `losses`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core import native_module
from ...core.native_module import integer_view, native, view, workspace

UNWANTED = (0, 0, (1, 1, 1, 1), (1, 1, 1, 1))  # the view of a tensor nobody asked for
TILE = 8  # the side of the tiles of pixels that a GPU pairs
MOST_KEPT = 1024  # numbers for each pixel that a loss keeps whatever its queries and keys have


def _head(head_weight: Tensor, head_bias: Tensor) -> list[float]:
    """The affinity head as the CPU's kernels take it."""
    return [*head_weight.tolist(), *head_bias.tolist()]


def _like(tensor: Tensor, wanted: bool) -> tuple[Tensor, tuple]:
    """An output of a tensor's shape and its view, or an empty one."""
    out = torch.empty_like(tensor) if wanted else tensor.new_empty(0)
    return out, view(out) if wanted else UNWANTED


# --- losses -----------------------------------------------------------------------------------------------------------


def _loss(sums: tuple[float, float, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    same, different, same_count, different_count = sums
    loss = 0.5 * same / (same_count + 1) + 0.5 * different / (different_count + 1)
    with torch.device("cpu"):  # whatever the default is
        return torch.tensor(loss, dtype=torch.float32), torch.tensor(same_count + 1), torch.tensor(different_count + 1)


def _device_head(head_weight: Tensor, head_bias: Tensor) -> tuple[Tensor, Tensor]:
    """And as those of a GPU do, where they lie: the host must not wait for their values. There they are no float64."""
    if head_weight.dtype == torch.float64:
        head_weight = head_weight.float()
    return head_weight, head_bias.float() if head_bias.dtype == torch.float64 else head_bias


def _cast(grad: Tensor, like: Tensor) -> Tensor:
    return grad if grad.dtype == like.dtype else grad.to(like.dtype)


def _results(like: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, ...]]:
    """Where a GPU writes a loss and its counts, and their addresses."""
    device = like.device
    # Of the calls that allocate, the one whose arguments PyTorch reads fastest.
    loss = torch.empty_strided((), (), dtype=torch.float32, device=device)
    pos_count = torch.empty_strided((), (), dtype=torch.int64, device=device)
    neg_count = torch.empty_strided((), (), dtype=torch.int64, device=device)
    return (loss, pos_count, neg_count), (loss.data_ptr(), pos_count.data_ptr(), neg_count.data_ptr())


def _slopes(grad: Tensor, pos_count: Tensor, neg_count: Tensor) -> tuple[float, float]:
    """dL/dA for pairs with the same label and with different labels."""
    return -0.5 * grad.item() / pos_count.item(), 0.5 * grad.item() / neg_count.item()


# --- from queries and keys --------------------------------------------------------------------------------------------


def window_affinity(
    query: Tensor, key: Tensor, head_weight: Tensor, head_bias: Tensor, height: int, width: int, radius: int
) -> Tensor:
    out = query.new_empty(query.shape[0], (2 * radius + 1) ** 2, height, width)
    grid = height, width, radius
    if native_module.on_cuda(query):
        weight, bias = _device_head(head_weight, head_bias)
        places = view(weight), view(bias), grid, view(out), *native_module.cuda_stream(query.device)
        native.window_affinity_cuda(view(query), view(key), *places)
        return out
    threads = torch.get_num_threads()
    common = view(query), view(key), _head(head_weight, head_bias), grid
    scratch = workspace(native.attention_cpu_workspace(*common, threads), query.device)
    native.window_affinity_cpu(*common, view(out), scratch.data_ptr(), threads)
    return out


def _least(one: int, other: int) -> int:
    """Their minimum. Of a graph for any grid they are symbols, which must not be asked which of them is smaller."""
    return min(one, other) if type(one) is int and type(other) is int else torch.sym_min(one, other)


def _neighbours(count: int, reach: int) -> int:
    """Pairs of two of so many tiles side by side, at most ``reach`` apart."""
    rising = _least(count, reach + 1)
    return rising * (rising - 1) // 2 + (count - rising) * reach


def _pays(query: Tensor, radius: int) -> bool:
    """Whether keeping does: of a wide window and few channels the scores are computed again in less time than they are
    kept, and the memory grows with the square of the radius. Of a grid smaller than the window less would be kept than
    is said here; but then a graph for any grid would have to ask which it is.
    """
    side, tile = (-(-radius // TILE), TILE**2) if native_module.on_cuda(query) else (radius, 1)
    return tile * (side + 1) * (2 * side + 1) <= max(MOST_KEPT, 4 * query.shape[1] * query.shape[3])


def empty_derivatives(query: Tensor, labels: Tensor, radius: int, keep: bool) -> Tensor:
    """Where a loss writes what its backward needs: [B, N, r + 1, 2r + 1] with r cut to the grid, on a GPU [B, pairs of
    tiles, 64, 64]. See csrc/affinity/affinity.h. Empty if it is not to, or if that does not pay.
    """
    if not keep or not _pays(query, radius):
        return torch.empty_strided((0,), (1,), dtype=torch.float32, device=query.device)
    batch, height, width = labels.shape
    dtype = torch.float32
    radius = _least(radius, -_least(-height, -width))  # the longer side at most
    if native_module.on_cuda(query):
        rows, columns, reach = -(-height // TILE), -(-width // TILE), -(-radius // TILE)  # of tiles
        # A tile meets itself, those to its right, and below those on both sides.
        right, below = _neighbours(columns, reach), _neighbours(rows, reach)
        pairs, tall, wide = rows * (columns + right) + below * (columns + 2 * right), TILE**2, TILE**2
        dtype = torch.float32 if query.dtype == torch.float32 else torch.float16
    else:
        pairs, tall, wide = height * width, radius + 1, 2 * radius + 1
    strides = pairs * tall * wide, tall * wide, wide, 1
    return torch.empty_strided((batch, pairs, tall, wide), strides, dtype=dtype, device=query.device)


def _kept_view(kept: Tensor) -> tuple:
    return view(kept) if kept.dim() == 4 else UNWANTED


def attention_affinity_loss(
    query: Tensor,
    key: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    labels: Tensor,
    radius: int,
    ignore_index: int,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes into ``kept`` if it is not empty."""
    grid = (*labels.shape[1:], radius)
    if native_module.on_cuda(query):
        device, tensors = query.device, (view(query), view(key))
        weight, bias = _device_head(head_weight, head_bias)
        scratch = workspace(native.attention_cuda_workspace(*tensors, grid), device)
        results, addresses = _results(query)
        options = integer_view(labels), ignore_index, addresses, _kept_view(kept), scratch.data_ptr()
        options = *options, *native_module.cuda_stream(device)
        native.attention_affinity_loss_cuda(*tensors, view(weight), view(bias), grid, *options)
        return results
    common = view(query), view(key), _head(head_weight, head_bias), grid
    threads = torch.get_num_threads()
    scratch = workspace(native.attention_cpu_workspace(*common, threads), query.device)
    options = labels.data_ptr(), _kept_view(kept), scratch.data_ptr(), threads
    return _loss(native.attention_affinity_loss_cpu(*common, *options))


def _attention_backward(
    operator: str,
    query: Tensor,
    key: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    grid: tuple[int, ...],
    source: tuple,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward of ``operator``; source says where the gradient of the affinities comes from."""
    grad_query, query_view = _like(query, wanted[0])
    grad_key, key_view = _like(key, wanted[1])
    if native_module.on_cuda(query):
        place, tensors = native_module.cuda_stream(query.device), (view(query), view(key))
        weight, bias = _device_head(head_weight, head_bias)
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
        scratch = workspace(native.attention_backward_cuda_workspace(*tensors, grid, place[0]), query.device)
        places = query_view, key_view, view(grad_weight), view(grad_bias), scratch.data_ptr(), *place
        run = getattr(native, f"{operator}_backward_cuda")
        run(*tensors, view(weight), view(bias), grid, *source, *places)
        return grad_query, grad_key, _cast(grad_weight, head_weight), _cast(grad_bias, head_bias)
    common = view(query), view(key), _head(head_weight, head_bias), grid
    threads = torch.get_num_threads()
    scratch = workspace(native.attention_backward_cpu_workspace(*common, threads), query.device)
    run = getattr(native, f"{operator}_backward_cpu")
    head = run(*common, *source, query_view, key_view, scratch.data_ptr(), threads)
    return grad_query, grad_key, head_weight.new_tensor(head[:-1]), head_bias.new_tensor(head[-1:])


def window_affinity_backward(
    query: Tensor,
    key: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    grad: Tensor,
    radius: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grid = (*grad.shape[2:], radius)
    inputs = query, key, head_weight, head_bias, grid, (view(grad),), wanted
    return _attention_backward("window_affinity", *inputs)


def attention_affinity_loss_backward(
    query: Tensor,
    key: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    labels: Tensor,
    grad: Tensor,
    pos_count: Tensor,
    neg_count: Tensor,
    kept: Tensor,
    radius: int,
    ignore_index: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = grad.float()
    kept = kept if kept.is_contiguous() else kept.contiguous()  # as hooks of saved tensors may give it back
    if native_module.on_cuda(query):
        addresses = grad.data_ptr(), pos_count.data_ptr(), neg_count.data_ptr()
        source = integer_view(labels), ignore_index, addresses, _kept_view(kept)
    else:
        slopes = _slopes(grad, pos_count, neg_count)
        # A derivative that is 0 may be of a pair that counts, and then no number times it must be none.
        places = _kept_view(kept) if all(map(math.isfinite, slopes)) else UNWANTED
        source = labels.data_ptr(), *slopes, places
    inputs = query, key, head_weight, head_bias, (*labels.shape[1:], radius), source, wanted
    return _attention_backward("attention_affinity_loss", *inputs)


# --- from maps --------------------------------------------------------------------------------------------------------


def affinity_from_maps(
    maps: Tensor, head_weight: Tensor, head_bias: Tensor, height: int, width: int, radius: int
) -> Tensor:
    out = maps.new_empty(maps.shape[0], (2 * radius + 1) ** 2, height, width)
    grid = height, width, radius
    if native_module.on_cuda(maps):
        weight, bias = _device_head(head_weight, head_bias)
        places = view(weight), view(bias), grid, view(out), *native_module.cuda_stream(maps.device)
        native.affinity_from_maps_cuda(view(maps), *places)
        return out
    threads = torch.get_num_threads()
    common = view(maps), _head(head_weight, head_bias), grid
    scratch = workspace(native.affinity_from_maps_cpu_workspace(*common, threads), maps.device)
    native.affinity_from_maps_cpu(*common, view(out), scratch.data_ptr(), threads)
    return out


def affinity_from_maps_backward(
    maps: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    grad: Tensor,
    radius: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grid = (*grad.shape[2:], radius)
    grad_maps, maps_view = _like(maps, wanted[0])
    if native_module.on_cuda(maps):
        weight, bias = _device_head(head_weight, head_bias)
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
        grad_maps.zero_()  # the kernel writes what lies in the window
        scratch = workspace(native.affinity_from_maps_backward_cuda_workspace(view(maps), grid), maps.device)
        places = maps_view, view(grad_weight), view(grad_bias), scratch.data_ptr()
        inputs = view(maps), view(weight), view(bias), grid, view(grad)
        native.affinity_from_maps_backward_cuda(*inputs, *places, *native_module.cuda_stream(maps.device))
        return grad_maps, _cast(grad_weight, head_weight), _cast(grad_bias, head_bias)
    common = view(maps), _head(head_weight, head_bias), grid
    threads = torch.get_num_threads()
    scratch = workspace(native.affinity_from_maps_backward_cpu_workspace(*common, threads), maps.device)
    places = maps_view, scratch.data_ptr(), threads
    head = native.affinity_from_maps_backward_cpu(*common, view(grad), *places)
    return grad_maps, head_weight.new_tensor(head[:-1]), head_bias.new_tensor(head[-1:])


# --- the loss of a window ---------------------------------------------------------------------------------------------


def affinity_loss(
    affinity: Tensor, labels: Tensor, radius: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    if native_module.on_cuda(affinity):
        place = native_module.cuda_stream(affinity.device)
        scratch = workspace(native.affinity_loss_cuda_workspace(view(affinity)), affinity.device)
        results, addresses = _results(affinity)
        options = integer_view(labels), ignore_index, radius, addresses, scratch.data_ptr()
        native.affinity_loss_cuda(view(affinity), *options, *place)
        return results
    return _loss(native.affinity_loss_cpu(view(affinity), labels.data_ptr(), radius, torch.get_num_threads()))


def affinity_loss_backward(
    affinity: Tensor,
    labels: Tensor,
    grad: Tensor,
    pos_count: Tensor,
    neg_count: Tensor,
    radius: int,
    ignore_index: int,
) -> Tensor:
    out, grad = torch.empty_like(affinity), grad.float()
    if native_module.on_cuda(affinity):
        slopes = grad.data_ptr(), pos_count.data_ptr(), neg_count.data_ptr()
        place = native_module.cuda_stream(affinity.device)
        native.affinity_loss_backward_cuda(view(out), integer_view(labels), ignore_index, radius, slopes, *place)
        return out
    slopes = _slopes(grad, pos_count, neg_count)
    native.affinity_loss_backward_cpu(view(out), labels.data_ptr(), radius, *slopes, torch.get_num_threads())
    return out
