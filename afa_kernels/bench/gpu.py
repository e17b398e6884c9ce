"""What a time on a GPU depends on beside the kernels: TF32, and the host that launches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

WARM_UP = 3  # calls before a capture: what is set up at a first call must not be in the graph


@contextmanager
def precision(tf32: bool = False) -> Iterator[None]:
    """float32 means float32 inside, in products and in cuDNN's convolutions, or TF32 in both; then as it was before.

    PyTorch allows TF32 in convolutions unless told otherwise: what a float32 reference takes then is no float32 time.
    """
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")  # sets torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def capture(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call as a CUDA graph: what comes back replays it, on the same inputs, and gives the tensors it writes to.

    Raises what the capture raised when the call cannot be captured, because it waits for the device, say.
    """
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    here.wait_stream(side)
    graph, cause = torch.cuda.CUDAGraph(), None
    try:
        # torch.cuda.graph leaves its own stream the current one when a capture fails.
        with torch.cuda.stream(here), torch.cuda.graph(graph):
            try:
                result = call()
            except Exception as error:
                cause = error
                raise
    except Exception as error:  # the end of a capture that failed has an error of its own, which says less
        raise cause or error from None

    def replay() -> Any:
        graph.replay()
        return result

    return replay
