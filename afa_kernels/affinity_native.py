"""The native kernels of the affinity, called: what `affinity` registers as its ``native`` backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ._native_module import native, view, workspace

UNWANTED = (0, 0, (1, 1, 1, 1), (1, 1, 1, 1))  # the view of a gradient nobody asked for


def _head(head_weight: Tensor, head_bias: Tensor) -> list[float]:
    return [*head_weight.tolist(), *head_bias.tolist()]


def _loss(sums: tuple[float, float, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    same, different, same_count, different_count = sums
    loss = 0.5 * same / (same_count + 1) + 0.5 * different / (different_count + 1)
    return (
        torch.tensor(loss, dtype=torch.float32),
        torch.tensor(same_count + 1),
        torch.tensor(different_count + 1),
    )


def _slopes(grad: Tensor, pos_count: Tensor, neg_count: Tensor) -> tuple[float, float]:
    """dL/dA for pairs with the same label and with different labels."""
    return -0.5 * grad.item() / pos_count.item(), 0.5 * grad.item() / neg_count.item()


def _like(tensor: Tensor, wanted: bool) -> tuple[Tensor, tuple]:
    """An output of a tensor's shape and its view, or an empty one."""
    out = torch.empty_like(tensor) if wanted else tensor.new_empty(0)
    return out, view(out) if wanted else UNWANTED


def window_affinity(
    query: Tensor, key: Tensor, head_weight: Tensor, head_bias: Tensor, height: int, width: int, radius: int
) -> Tensor:
    out = query.new_empty(query.shape[0], (2 * radius + 1) ** 2, height, width)
    threads = torch.get_num_threads()
    common = view(query), view(key), _head(head_weight, head_bias), (height, width, radius)
    scratch = workspace(native.attention_cpu_workspace(*common, threads), query.device)
    native.window_affinity_cpu(*common, view(out), scratch.data_ptr(), threads)
    return out


def window_affinity_backward(
    query: Tensor,
    key: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    window: Tensor,
    grad: Tensor,
    radius: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    common = view(query), view(key), _head(head_weight, head_bias), (*window.shape[2:], radius)
    threads = torch.get_num_threads()
    scratch = workspace(native.attention_backward_cpu_workspace(*common, threads), query.device)
    grad_query, query_view = _like(query, wanted[0])
    grad_key, key_view = _like(key, wanted[1])
    places = query_view, key_view, scratch.data_ptr(), threads
    head = native.window_affinity_backward_cpu(*common, view(window), view(grad), *places)
    return grad_query, grad_key, head_weight.new_tensor(head[:-1]), head_bias.new_tensor(head[-1:])


def attention_affinity_loss(
    query: Tensor, key: Tensor, head_weight: Tensor, head_bias: Tensor, labels: Tensor, radius: int
) -> tuple[Tensor, Tensor, Tensor]:
    common = view(query), view(key), _head(head_weight, head_bias), (*labels.shape[1:], radius)
    threads = torch.get_num_threads()
    scratch = workspace(native.attention_cpu_workspace(*common, threads), query.device)
    return _loss(native.attention_affinity_loss_cpu(*common, labels.data_ptr(), scratch.data_ptr(), threads))


def attention_affinity_loss_backward(
    query: Tensor,
    key: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    labels: Tensor,
    grad: Tensor,
    pos_count: Tensor,
    neg_count: Tensor,
    radius: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    common = view(query), view(key), _head(head_weight, head_bias), (*labels.shape[1:], radius)
    threads = torch.get_num_threads()
    scratch = workspace(native.attention_backward_cpu_workspace(*common, threads), query.device)
    grad_query, query_view = _like(query, wanted[0])
    grad_key, key_view = _like(key, wanted[1])
    places = query_view, key_view, scratch.data_ptr(), threads
    slopes = _slopes(grad, pos_count, neg_count)
    head = native.attention_affinity_loss_backward_cpu(*common, labels.data_ptr(), *slopes, *places)
    return grad_query, grad_key, head_weight.new_tensor(head[:-1]), head_bias.new_tensor(head[-1:])


def affinity_from_maps(
    maps: Tensor, head_weight: Tensor, head_bias: Tensor, height: int, width: int, radius: int
) -> Tensor:
    out = maps.new_empty(maps.shape[0], (2 * radius + 1) ** 2, height, width)
    threads = torch.get_num_threads()
    common = view(maps), _head(head_weight, head_bias), (height, width, radius)
    scratch = workspace(native.affinity_from_maps_cpu_workspace(*common, threads), maps.device)
    native.affinity_from_maps_cpu(*common, view(out), scratch.data_ptr(), threads)
    return out


def affinity_from_maps_backward(
    maps: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    window: Tensor,
    grad: Tensor,
    radius: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    common = view(maps), _head(head_weight, head_bias), (*window.shape[2:], radius)
    threads = torch.get_num_threads()
    scratch = workspace(native.affinity_from_maps_backward_cpu_workspace(*common, threads), maps.device)
    grad_maps, maps_view = _like(maps, wanted[0])
    places = maps_view, scratch.data_ptr(), threads
    head = native.affinity_from_maps_backward_cpu(*common, view(window), view(grad), *places)
    return grad_maps, head_weight.new_tensor(head[:-1]), head_bias.new_tensor(head[-1:])


def affinity_loss(affinity: Tensor, labels: Tensor, radius: int) -> tuple[Tensor, Tensor, Tensor]:
    return _loss(native.affinity_loss_cpu(view(affinity), labels.data_ptr(), radius, torch.get_num_threads()))


def affinity_loss_backward(
    affinity: Tensor, labels: Tensor, grad: Tensor, pos_count: Tensor, neg_count: Tensor, radius: int
) -> Tensor:
    out = torch.empty_like(affinity)
    slopes = _slopes(grad, pos_count, neg_count)
    native.affinity_loss_backward_cpu(view(out), labels.data_ptr(), radius, *slopes, torch.get_num_threads())
    return out
