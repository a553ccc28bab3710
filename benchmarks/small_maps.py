"""Time a student's step on the labels with convolutions of small maps as they are and multiplied.

    python benchmarks/small_maps.py --size 64 --threads 1 --bf16 --out small_maps.json

A step is forward and backward in channels-last layout and a fused SGD step, on a batch of noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from measuring import interleave, ratio

from gld_zoo.training.build.small_maps import multiply_on_small_maps


class Step:
    """A step of a model on a batch that is there."""

    def __init__(self, name: str, size: int, batch: int, *, bf16: bool, multiplied: bool) -> None:
        torch.manual_seed(0)
        self.model = timm.create_model(name, num_classes=100).train()
        self.model.to(memory_format=torch.channels_last)
        if multiplied:
            multiply_on_small_maps(self.model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), 0.01, momentum=0.9, nesterov=True, fused=True
        )
        images = torch.randn(batch, 3, size, size)
        self.images = images.to(memory_format=torch.channels_last)
        self.target = torch.randint(100, (batch,))
        self.bf16 = bf16

    def __call__(self) -> None:
        """Train once on it."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = self.model(self.images)
        self.optimizer.zero_grad()
        F.cross_entropy(logits.float(), self.target).backward()
        self.optimizer.step()


def main() -> None:
    """Measure one model at one size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gld_resnet18", help="timm's name")
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--batch_size", type=int, default=64, help="images of a step")
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--bf16", action="store_true", help="in bfloat16 autocast")
    parser.add_argument("--out", type=Path, help="JSON of the result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = {
        name: Step(
            options.model,
            options.size,
            options.batch_size,
            bf16=options.bf16,
            multiplied=name == "multiplied",
        )
        for name in ("convolved", "multiplied")
    }
    times = interleave(steps, rounds=options.rounds)
    result = dict(model=options.model, size=options.size, bf16=options.bf16)
    result |= dict(threads=options.threads, batch_size=options.batch_size)
    result["ms"] = {name: round(statistics.median(ms), 1) for name, ms in times.items()}
    result["convolved / multiplied"] = ratio(times, "convolved", "multiplied")
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
