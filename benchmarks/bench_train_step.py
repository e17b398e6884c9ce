"""python benchmarks/bench_train_step.py [--device cpu|cuda] [--backbone mit_b1] [--crop 320] [--batch 2] [--json -]

One training step (all phases at work: CAM, pseudo-labels, three losses, backward, AdamW), as it was published
(``published_step.py``) and as `afa train` does it; ``train_step.py`` measures them. With --waiting (``waiting.py``):
how long the latter takes on the CPU by how OpenMP's threads wait, alone and beside others. With --profile
(``profile_step.py``): the kernels or operators that its time goes to, and the gaps between them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import as_the_command  # noqa: F401
import torch
from profile_step import measure_profile, show_profile
from train_step import measure, show
from waiting import measure_waiting, show_waiting


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a training step as published, and as `afa train` does it.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbone", default="mit_b1", help="mit_b0 .. mit_b5")
    parser.add_argument("--crop", type=int, default=320)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--classes", type=int, default=21, help="background included")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--amp", choices=("auto", "bf16", "off"), default="auto", help="fused: auto is bf16 on a GPU")
    parser.add_argument("--compile", action="store_true", help="fused: torch.compile of backbone and decoder")
    parser.add_argument("--cuda-graph", action="store_true", help="fused: pseudo-labels in a CUDA graph")
    parser.add_argument("--channels-last", action="store_true", help="fused: memory format of the weights")
    parser.add_argument("--shared-refinement", action="store_true", help="fused: one diffusion for both labels")
    told = "fused: with the dense energy loss, which the public scripts have switched off; the paper's weight is 0.01"
    parser.add_argument("--regularisation", type=float, default=0.0, help=told)
    parser.add_argument("--profile", action="store_true", help="fused: where its time goes, by torch.profiler")
    parser.add_argument("--waiting", action="store_true", help="by how OpenMP's threads wait, alone and beside others")
    parser.add_argument("--json", metavar="FILE", help="write the result to FILE; - prints it instead of the table")
    options = parser.parse_args()
    if options.amp == "auto":
        options.amp = "bf16" if options.device == "cuda" else "off"
    ways = {"waiting": (measure_waiting, show_waiting), "profile": (measure_profile, show_profile)}
    run, tell = next((way for name, way in ways.items() if getattr(options, name)), (measure, show))
    result = run(options)
    if options.json == "-":
        print(json.dumps(result))
        return
    tell(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
