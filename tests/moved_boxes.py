"""`gld-zoo detect` with detections that are the objects, each moved by a few pixels of its own.

An untrained detector finds so little that two measurements of it agree whatever they count.
"""

import sys

import torch

from gld_zoo.training.commands.detect import cli
from gld_zoo.training.tasks import detector


def losses_and_detections(model, images, targets):
    """Return losses and detections that depend on an image alone."""
    losses = torch.stack([image.mean() for image in images])
    found = []
    for target in targets:
        boxes = target["boxes"]
        moved = boxes.sum(1) % 9
        scores = 1 / (1 + moved)
        found.append(dict(boxes=boxes + moved[:, None], labels=target["labels"], scores=scores))
    return losses, found


if __name__ == "__main__":
    detector.losses_and_detections = losses_and_detections
    cli(sys.argv[1:])
