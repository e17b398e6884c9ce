"""Every operator once, forward and backward, on small inputs: what the tests of threads run many times at once."""

from __future__ import annotations

import sys

import torch

import afa_kernels
from support.common import DEVICE


def everything(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Results and gradients of every operator that is native on DEVICE, on this seed's inputs."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    height, width, radius, heads = 9, 14, 2, 3
    images, masks, weights = leaf(2, 3, height, width).detach(), leaf(2, 5, height, width), leaf(2, 8, height, width)
    query, key = leaf(2, heads, height * width, 8), leaf(2, heads, height * width, 8)
    maps, head = leaf(2, heads, height * width, height * width), (leaf(heads), leaf(1))
    window, features = leaf(2, (2 * radius + 1) ** 2, height, width), leaf(2, 19, height, width)
    labels = torch.randint(3, (2, height, width), generator=generator).to(DEVICE)
    grid = height, width, radius
    results = [
        afa_kernels.diffuse(weights.detach(), masks, [(dy, dx) for dy in (-1, 1) for dx in (-2, 0, 1, 3)], 3, "zero"),
        afa_kernels.par(images, masks, (1, 3), 3),
        afa_kernels.pamr(images, masks, (1,), 2),
        afa_kernels.par_weights(images, (1, 2)),
        afa_kernels.window_affinity(query, key, *head, *grid),
        afa_kernels.affinity_from_maps(maps, *head, *grid),
        afa_kernels.attention_affinity_loss(query, key, *head, labels, radius)[0],
        afa_kernels.attention_affinity_loss(query, key, *head, labels, radius, recompute=True)[0],
        afa_kernels.affinity_loss(window, labels, radius)[0],
        afa_kernels.random_walk(window, masks, radius, num_steps=2),
        afa_kernels.path_affinity(masks[:, :1], 3),
        afa_kernels.propagate_to_edge(masks, masks[:, 1:2], 3, 4, 1),
        *(afa_kernels.feature_affinity(masks, radius, kind) for kind in ("cos", "exp_l1", "relu_dot")),
        afa_kernels.pcm(masks[:, :, ::2, ::2], features),
        afa_kernels.sinkhorn(window, radius, 2, symmetric=True),
    ]
    colours, probs = (255 * images).float(), masks.softmax(1)
    results += [
        afa_kernels.bilateral_filter(colours, masks, 60, 4),
        afa_kernels.bilateral_filter(colours, masks, None, 2),
        afa_kernels.bilateral_filter(colours, masks, 60, 4, "lattice"),
        afa_kernels.dense_crf(colours, probs, 2, bi_xy_std=8, bi_rgb_std=60),
    ]
    sum(result.float().square().sum() for result in results if result.requires_grad).backward()
    gradients = [tensor.grad for tensor in (masks, query, key, maps, *head, window, features)]
    return [*(result.detach() for result in results), *gradients]


def smallest() -> None:
    """Sizes, strides and counts of 1, forward and backward: Triton compiles them into its kernels."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=DEVICE).requires_grad_()

    images, masks = leaf(1, 3, 1, 1).detach(), leaf(1, 1, 1, 1)
    afa_kernels.par(images, masks, [1], 1).sum().backward()
    afa_kernels.pamr(images, masks, [1], 1).sum().backward()
    afa_kernels.diffuse(leaf(1, 1, 1, 1).detach(), masks, [(0, 0)], 1).sum().backward()
    for method in ("exact", "lattice"):
        afa_kernels.bilateral_filter(images, masks, 15, 100, method).sum().backward()
        afa_kernels.dense_crf(images, masks, 2, method=method).sum().backward()
    afa_kernels.bilateral_filter(images, masks, None, 100).sum().backward()
    scores, head = leaf(1, 1, 1, 1), leaf(1)
    afa_kernels.pcm(masks, scores).sum().backward()
    labels = torch.zeros(1, 1, 1, dtype=torch.long, device=DEVICE)
    for radius in (0, 1):
        window = leaf(1, (2 * radius + 1) ** 2, 1, 1)
        afa_kernels.random_walk(window, masks, radius).sum().backward()
        afa_kernels.path_affinity(masks, radius + 1).sum().backward()
        afa_kernels.sinkhorn(window, radius, 1, 0.1).sum().backward()
        afa_kernels.affinity_loss(window, labels, radius)[0].backward()
        afa_kernels.attention_affinity_loss(scores, scores, head, head, labels, radius)[0].backward()
        afa_kernels.window_affinity(scores, scores, head, head, 1, 1, radius).sum().backward()
        afa_kernels.affinity_from_maps(scores, head, head, 1, 1, radius).sum().backward()
        for kind in ("cos", "exp_l1", "relu_dot"):
            afa_kernels.feature_affinity(scores, radius, kind).sum().backward()


class Everything(torch.utils.data.Dataset):
    """Runs the operators where a data loader's workers run."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return everything(index)


def fault() -> None:
    """A kernel that writes behind its tensor: what watches the device's memory must say so."""
    import triton
    import triton.language as tl

    @triton.jit
    def write_past(target, n: tl.constexpr):
        tl.store(target + n, 1.0)

    target = torch.zeros(1024, device=DEVICE)
    write_past[(1,)](target, 1024)
    torch.cuda.synchronize()


def main(arguments: list[str]) -> None:
    """All of them on DEVICE, for tools that watch a process; with --fault the fault and nothing else."""
    if arguments == ["--fault"]:
        return fault()
    smallest()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        results = everything(0, dtype)
        print(f"{dtype}: {len(results)} results, {sum(int(result.isfinite().all()) for result in results)} finite")


if __name__ == "__main__":
    main(sys.argv[1:])
