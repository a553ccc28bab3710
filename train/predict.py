"""Draw what a detector or a segmenter finds in images.

    python train/predict.py runs/mine-0/last photo.jpg photos/ --out drawn
    python train/predict.py runs/mine-0 'photos/*.png' --out drawn --threshold 0.5

Boxes carry their class and confidence; masks are coloured by class, their names beside the image.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from PIL import Image, ImageDraw
from timm.data import resolve_model_data_config
from torchvision.models.detection.ssd import SSD
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from batches import Normalize
from disk import DiskError, writing
from gld_zoo.cli import find_images, read_images
from gld_zoo.downstream import load_downstream
from gld_zoo.explain import drawable
from gld_zoo.output import end, printing
from segmentation_data import MeasuringTransform

CPU = torch.device("cpu")


@torch.no_grad()
def draw_boxes(model: Any, image: torch.Tensor, threshold: float) -> tuple[torch.Tensor, str]:
    """Draw the boxes of an image uint8 `[3, H, W]`; return it and a line that lists them."""
    (found,) = model([image / 255])
    keep = found["scores"] >= threshold
    labels, scores = found["labels"][keep].tolist(), found["scores"][keep].tolist()
    names = [
        f"{model.config['label_names'][label - 1]} {score:.0%}"
        for label, score in zip(labels, scores, strict=True)
    ]
    if not names:
        return image, "nothing"
    boxes, colors = found["boxes"][keep], [_color(label) for label in labels]
    picture = v2.functional.to_pil_image(draw_bounding_boxes(image, boxes, colors=colors, width=2))
    pen = ImageDraw.Draw(picture)
    # the surest last, over the others
    for name, color, (x, y, *_) in reversed(list(zip(names, colors, boxes.tolist(), strict=True))):
        name, font = drawable(name, 11)
        pen.rectangle(pen.textbbox((x + 3, y), name, font=font), fill=color)
        pen.text((x + 3, y), name, fill="white", font=font)
    return v2.functional.pil_to_tensor(picture), ", ".join(names)


@torch.no_grad()
def draw_mask(model: Any, image: torch.Tensor, size: int) -> tuple[torch.Tensor, str]:
    """Colour an image uint8 `[3, H, W]` by class; return it and the share of each class.

    Args:
        model: From `load_downstream`.
        image: The image.
        size: Longer side in pixels at which the model sees it.
    """
    config = resolve_model_data_config(model.backbone)
    normalize = Normalize(config["mean"], config["std"], CPU)
    small, _ = MeasuringTransform(size)(image, image)
    logits = model(normalize(small.permute(1, 2, 0)[None]))
    classes = F.interpolate(
        logits, size=image.shape[-2:], mode="bilinear", align_corners=False
    ).argmax(1)[0]
    names = model.config["label_names"]
    masks = torch.stack([classes == i for i in range(len(names))])
    colors = [_color(i) for i in range(len(names))]
    drawn = draw_segmentation_masks(image, masks, alpha=0.55, colors=colors)
    shares = masks.flatten(1).float().mean(1)
    order = [i for i in shares.argsort(descending=True).tolist() if shares[i] > 0]
    return _with_key(drawn, [(names[i], colors[i]) for i in order]), ", ".join(
        f"{names[i]} {shares[i]:.0%}" for i in order
    )


def _with_key(image: torch.Tensor, entries: list[tuple[str, tuple[int, ...]]]) -> torch.Tensor:
    """Put the classes' colours and names to the right of an image."""
    line = 16
    height = max(image.shape[1], line * len(entries) + 4)
    canvas = torch.full((3, height, image.shape[2] + 110), 255, dtype=torch.uint8)
    canvas[:, : image.shape[1], : image.shape[2]] = image
    picture = v2.functional.to_pil_image(canvas)
    pen, left = ImageDraw.Draw(picture), image.shape[2] + 6
    for i, (name, color) in enumerate(entries):
        top = 4 + i * line
        pen.rectangle((left, top, left + 10, top + 10), fill=color)
        name, font = drawable(name, 10)
        pen.text((left + 16, top - 2), name, fill="black", font=font)
    return v2.functional.pil_to_tensor(picture)


def _color(label: int) -> tuple[int, int, int]:
    """Return a class's colour: hues a golden angle apart, every other eight of them darker."""
    hue, value = int(255 * (label * 0.618034 % 1)), (235, 140)[label // 8 % 2]
    red, green, blue = Image.new("HSV", (1, 1), (hue, 200, value)).convert("RGB").tobytes()
    return red, green, blue


def build_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="run folder, or a folder such as its last/")
    parser.add_argument("images", type=str, nargs="+", help="file, folder or pattern")
    parser.add_argument("--out", type=Path, required=True, help="folder for the drawings")
    parser.add_argument(
        "--threshold", type=ClosedUnitInterval, default=0.4, help="least confidence of a box"
    )
    parser.add_argument(
        "--image_size",
        type=PositiveInt | None,
        help="longer side in pixels that a segmenter sees; null: as it was measured",
    )
    return parser


def cli(arguments: list[str] | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    with printing(failed=end):  # the help
        options = build_parser().parse_args(arguments)
    failed: list[Path] = []
    with printing(failed=go_on):
        try:
            for line in draw(options, failed):
                print(line)
        except (DiskError, ValueError) as error:
            sys.exit(f"error: {error}")
    sys.exit(int(bool(failed)))


def go_on(error: OSError) -> None:
    """Tell that images are drawn although nobody reads of it."""
    print(
        f"standard output takes no more ({error.strerror}); the drawings go on without messages",
        file=sys.stderr,
    )


def draw(options: Any, failed: list[Path]) -> Iterator[str]:
    """Write a drawing of each image and yield a line that lists what was found.

    Args:
        options: The command line's.
        failed: Takes the images that cannot be read.

    Raises:
        DiskError: If a drawing cannot be written.
        ValueError: If the folder holds no model, or drawings would go where the images are.
    """
    last = options.model / "last"
    model = load_downstream(last if os.path.isdir(last) else options.model)
    size = options.image_size or model.config["image_size"]
    if size is None and not isinstance(model, SSD):
        raise ValueError(
            f"{options.model} does not say how large its images were; set --image_size"
        )
    out, used = options.out, set()
    paths = list(find_images(options.images))
    if not paths:
        raise ValueError(f"no image in {' '.join(options.images)}")
    for path in paths:
        if path.resolve().parent == out.resolve():
            raise ValueError(
                f"--out {out} holds {path.name}, an image to draw; name another folder"
            )
    for path, image in read_images([str(path) for path in paths], failed):
        pixels = v2.functional.pil_to_tensor(image)
        if isinstance(model, SSD):
            drawn, found = draw_boxes(model, pixels, options.threshold)
        else:
            drawn, found = draw_mask(model, pixels, size)
        # photos of one name in two folders are two drawings
        names = itertools.chain([path.stem], (f"{path.stem}-{i}" for i in itertools.count(1)))
        name = next(name for name in names if name not in used)
        used.add(name)
        target = out / f"{name}.png"
        with writing(target):
            out.mkdir(parents=True, exist_ok=True)
            v2.functional.to_pil_image(drawn).save(target)
        yield f"{path}: {found}"


if __name__ == "__main__":
    cli()
