"""A program that uses every public name as a typed one does. It is not run but checked: by mypy, in strict mode.

`assert_type` says what comes out; a line with an ignored error is one that mypy has to find wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import assert_type

import afa_kernels
import afa_model
from afa_model.config import Config
from afa_model.data.datasets import EvaluationSet


def refinement(images: Tensor, masks: Tensor, present: Tensor) -> None:
    assert_type(afa_kernels.par(images, masks), Tensor)
    assert_type(afa_kernels.par(images, masks, [1, 2], 3, w3=0.0, class_mask=present, backend="native"), Tensor)
    assert_type(afa_kernels.par(images, [masks, masks], class_mask=[present, None]), list[Tensor])
    assert_type(afa_kernels.par(images, (masks, masks), (1, 2, 4)), list[Tensor])
    assert_type(afa_kernels.par_weights(images, (1, 2), w1=0.3), Tensor)
    assert_type(afa_kernels.pamr(images, masks, (1,), 1, resize="image"), Tensor)
    assert_type(afa_kernels.pamr(images, [masks]), list[Tensor])
    assert_type(afa_kernels.pamr_weights(images), Tensor)
    assert_type(afa_kernels.PAR([1, 2], 10).forward(images, masks), Tensor | list[Tensor])
    assert_type(afa_kernels.PAMR(num_iter=10, dilations=(1, 2)).num_iter, int)
    assert_type(afa_kernels.diffuse(images, masks, [(0, 1), (1, 0)], 2, "zero", present), Tensor)
    afa_kernels.par(images, masks, dilations=1)  # type: ignore[call-overload]
    afa_kernels.PAR(10, [1, 2])  # type: ignore[arg-type]
    afa_kernels.par(images, masks, iterations=10)  # type: ignore[call-overload]


def affinities(tokens: Tensor, weight: Tensor, window: Tensor, labels: Tensor, cams: Tensor) -> None:
    three = tuple[Tensor, Tensor, Tensor]
    assert_type(afa_kernels.window_affinity(tokens, tokens, weight, weight, 20, 20, radius=8), Tensor)
    assert_type(afa_kernels.affinity_from_maps(tokens, weight, weight, 20, 20, 8), Tensor)
    assert_type(afa_kernels.affinity_loss(window, labels, 8, ignore_index=255), three)
    assert_type(afa_kernels.attention_affinity_loss(tokens, tokens, weight, weight, labels, 8), three)
    assert_type(afa_kernels.attention_affinity_loss(tokens, tokens, weight, weight, labels, 8, recompute=True), three)
    assert_type(afa_kernels.window_to_dense(window, 8), Tensor)
    assert_type(afa_kernels.dense_to_window(window, 20, 20, 8), Tensor)
    assert_type(afa_kernels.random_walk(window, cams, 8, power=2, num_steps=2), Tensor)
    assert_type(afa_kernels.random_walk_with_background(window, cams, labels, (0.35, 0.55), 8), Tensor)
    assert_type(afa_kernels.sinkhorn(window, 8, symmetric=True), Tensor)
    assert_type(afa_kernels.feature_affinity(tokens, 4, "cos"), Tensor)
    assert_type(afa_kernels.path_affinity(cams, radius=5), Tensor)
    assert_type(afa_kernels.propagate_to_edge(cams, cams, exp_times=4), Tensor)
    assert_type(afa_kernels.pcm(cams, tokens), Tensor)
    afa_kernels.random_walk(window, cams, radius="8")  # type: ignore[arg-type]


def fields(images: Tensor, probs: Tensor, image: NDArray[np.uint8], scores: NDArray[np.float32]) -> None:
    assert_type(afa_kernels.bilateral_filter(images, probs, None, 3, "exact"), Tensor)
    assert_type(afa_kernels.dense_crf(images, probs, 10, bi_w=4), Tensor)
    assert_type(afa_kernels.dense_crf(images, probs, convergence=True), tuple[Tensor, Tensor])
    assert_type(afa_kernels.DenseEnergyLoss(1e-7, method="lattice").forward(images, probs, probs, probs), Tensor)
    crf = afa_kernels.DenseCRF(10, 3, 3, 4, 64, 5)
    assert_type(crf(image, scores), NDArray[Any])
    assert_type(crf(images, probs), Tensor)
    assert_type(afa_kernels.crf_inference(image, probs, t=5), Tensor)
    assert_type(afa_kernels.crf_inference(image, scores, labels=21), NDArray[Any])
    assert_type(afa_kernels.crf_inference_label(image, probs, n_labels=21), Tensor)
    afa_kernels.dense_crf(images)  # type: ignore[call-overload]
    afa_kernels.crf_inference(image, "scores")  # type: ignore[type-var]


def what_runs() -> None:
    for row in afa_kernels.backends():
        assert_type(row.available, bool)
    checked = afa_kernels.self_check("cpu", operators=["par"], dtypes=[torch.float32])
    assert_type(checked, afa_kernels.CheckTable)
    for found in checked:
        assert_type(found, afa_kernels.CheckRow)
    assert_type(afa_kernels.build_info(), dict[str, Any])
    with afa_kernels.use_backend("reference"):
        pass
    afa_kernels.use_backend(0)  # type: ignore[arg-type]


def a_model(path: Path, dataset: EvaluationSet, images: Tensor) -> None:
    restored = afa_model.load_model(path, device="cpu")
    afa_model.evaluate(restored.model, dataset)
    for prediction in afa_model.predict(restored.model, ["photo.jpg", path], "out", ["cat", "dog"]):
        assert_type(prediction.label, "Path | None")
    model = afa_model.AFA("mit_b0", num_classes=3)
    assert_type(model.forward(images).cls_logits, Tensor)
    assert_type(model.affinity(model.forward(images)), Tensor)
    afa_model.train(Config(), until=10)
    afa_model.train("voc")  # type: ignore[arg-type]
    afa_model.AFA(num_classes="3")  # type: ignore[call-arg, arg-type]
