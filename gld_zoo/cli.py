"""The command `gld-zoo`: what the zoo holds, what a model sees in images, and where.

gld-zoo list
gld-zoo info gld_wrn16_1
gld-zoo predict cat.jpg photos/ 'more/*.png' --top 3
gld-zoo explain cat.jpg -o cat.png
"""

from __future__ import annotations

import argparse
import glob
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import get_pretrained_cfg

from gld_zoo.explain import explain, seen_part
from gld_zoo.heads import global_local_logits
from gld_zoo.hub import create_model, describe_changes
from gld_zoo.images import to_rgb
from gld_zoo.output import end, printing

PACKAGE = Path(__file__).parent
MODEL = "gld_wrn16_1"
BATCH = 32  # images a forward pass


class CommandError(ValueError):
    """What was asked cannot be done; the message names it and the remedy."""


def list_models() -> str:
    """Return the zoo's models as a table: parameters, image size, weights and their top-1."""
    weights = _results()["weights"]
    lines = [
        f"{'model':<16}{'parameters':>12}  {'pixels':<7}"
        "weights (top-1 on CIFAR-100), the default first"
    ]
    for name in timm.list_models("gld_*"):
        with torch.device("meta"):
            model = timm.create_model(name)
        parameters = sum(weight.numel() for weight in model.parameters())
        tags = [
            f"{tag.partition('.')[2]} ({weights[tag]['runs'][0]['top1']:.2f} %)"
            for tag in _default_first(weights, name)
        ]
        size = model.pretrained_cfg["input_size"][-1]
        lines.append(f"{name:<16}{parameters:>12,}  {size:<7}{', '.join(tags) or '-'}")
    return "\n".join(lines)


def describe(name: str) -> str:
    """Return what is known of a model of the zoo and of each of its weights.

    Raises:
        CommandError: If the zoo does not hold it.
    """
    results = _results()
    architecture, _, tag = name.partition(".")
    names = timm.list_models("gld_*")
    if architecture not in names:
        raise CommandError(f"{name!r} is not a model of this zoo; it holds {', '.join(names)}")
    trained = results["weights"] | (results["runs"] if tag else {})
    tags = _default_first(trained, architecture)
    lines = [name]
    if not tag or name in timm.list_models(f"{architecture}.*", include_tags=True):
        cfg = get_pretrained_cfg(name)
        paper = cfg.paper_ids or "-"
        lines.append(f"  licence {cfg.license}, paper {paper}, pixels {cfg.input_size}")
    elif name not in tags:
        raise CommandError(
            f"{name!r} is not on record; {architecture} has {', '.join(tags) or 'no weights'}"
        )
    chosen = [key for key in tags if not tag or key == name]
    for key in chosen:
        entry = trained[key]
        run = entry["runs"][0]
        teacher = entry["teacher"]
        if isinstance(teacher, dict):
            teacher = teacher["name"]
        lines += [
            f"  {key}: top-1 {run['top1']:.2f} %, top-5 {run['top5']:.2f} % on "
            f"{entry.get('dataset', 'cifar100')}, epoch {entry['epochs']}",
            f"    teacher {teacher or 'none'}",
            f"    recipe {entry['recipe']}, changes {describe_changes(entry)}",
            f"    seed {run['seed']}, on {entry['hardware']}, {entry['precision']}",
            f"    {entry['file'] or 'its weights do not ship'}, sha256 {entry['sha256']}",
        ]
    return "\n".join(lines if chosen else [*lines, "  no weights ship; train it by its recipe"])


class Predictor:
    """A pretrained model with its preprocessing and class names.

    Args:
        name: timm name, hf-hub:ORG/NAME or local-dir:PATH.

    Raises:
        CommandError: If it cannot be created with weights.
    """

    def __init__(self, name: str) -> None:
        try:
            self.model = create_model(name, pretrained=True).eval()
        except ValueError as error:
            raise CommandError(f"--model {name!r} cannot be created: {error}") from error
        self.config = resolve_model_data_config(self.model)
        channels = self.config["input_size"][0]
        if self.model.num_classes < 1 or channels != 3:
            raise CommandError(
                f"--model {name!r} has {self.model.num_classes} classes and takes images of "
                f"{channels} channels; name a classifier of colour images"
            )
        self.transform = create_transform(**self.config)
        self.names = class_names(self.model)

    @torch.no_grad()
    def predict(self, images: Sequence[Image.Image], top: int) -> list[list[tuple[str, float]]]:
        """Return, for each image, the `top` most probable classes and their probabilities."""
        batch = torch.stack([self.transform(image) for image in images])
        best = self.model(batch).softmax(1).topk(min(top, len(self.names)))
        return [
            [(self.names[i], p) for i, p in zip(indices, values, strict=True)]
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    @torch.no_grad()
    def explain(self, image: Image.Image, grid: int) -> Image.Image:
        """Draw what each cell of an image is taken for, and the activation map.

        Raises:
            CommandError: If the model has no local logits.
        """
        batch = self.transform(image)[None]
        try:
            rows = global_local_logits(self.model, batch, grid)[0].softmax(1)
        except ValueError as error:
            raise CommandError(str(error)) from error
        activation = self.model.forward_features(batch)[0].amax(0)
        best = rows.max(1)
        labels = [
            f"{self.names[i]} {p:.0%}"
            for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        return explain(seen_part(image, self.config), labels, activation)


def class_names(model: Any) -> list[str]:
    """Return a model's class names: its cfg's, or numbers."""
    names = model.pretrained_cfg.get("label_names") or ()
    if len(names) == model.num_classes:
        return list(names)
    return [f"class {i}" for i in range(model.num_classes)]


def find_images(patterns: Sequence[str]) -> Iterator[Path]:
    """Yield files: those named, those in folders by suffix, those that patterns match."""
    suffixes = {
        suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN
    }
    for pattern in patterns:
        literal = os.path.lexists(pattern)
        for path in map(Path, [pattern] if literal else _matches(pattern)):
            if os.path.isdir(path):  # false for a name that is too long, where pathlib raises
                files = sorted(file for file in path.rglob("*") if file.is_file())
                yield from (file for file in files if file.suffix.lower() in suffixes)
            else:
                yield path


def _matches(pattern: str) -> list[str]:
    """Return what a pattern matches, or itself if nothing, to be named as not there."""
    return sorted(glob.glob(pattern, recursive=True)) or [pattern]


def read_image(path: Path) -> Image.Image:
    """Read an image as RGB; a damaged one may raise anything, by its format."""
    with Image.open(path) as image:
        return to_rgb(image)


def read_images(patterns: Sequence[str], failed: list[Path]) -> Iterator[tuple[Path, Image.Image]]:
    """Yield images that can be read; name the others on standard error and collect them."""
    for path in find_images(patterns):
        try:
            yield path, read_image(path)
        except Exception as error:
            print(f"{path}: skipped, {error}", file=sys.stderr)
            failed.append(path)


def predict(options: argparse.Namespace) -> int:
    """Print the classes of images; return 1 if one was skipped.

    Raises:
        CommandError: If none was found, or the model cannot be had.
    """
    failed: list[Path] = []
    predictor, count = Predictor(options.model), 0
    images_found = read_images(options.images, failed)
    while group := list(islice(images_found, BATCH)):
        paths, images = zip(*group, strict=True)
        for path, classes in zip(paths, predictor.predict(images, options.top), strict=True):
            count += 1
            if options.json:
                found = [dict(label=name, probability=round(p, 6)) for name, p in classes]
                print(json.dumps(dict(image=str(path), classes=found)))
            else:
                print(f"{path}: " + ", ".join(f"{name} {p:.1%}" for name, p in classes))
    if not count and not failed:
        raise CommandError(f"no image in {' '.join(options.images)}")
    return int(bool(failed))


def explain_image(options: argparse.Namespace) -> int:
    """Write the drawing of one image.

    Raises:
        CommandError: If the image cannot be read, the model cannot be had or does not suit, or the
            drawing cannot be written.
    """
    try:
        image = read_image(Path(options.image))
    except Exception as error:
        raise CommandError(f"{options.image}: {error}") from error
    drawing = Predictor(options.model).explain(image, options.grid)
    try:
        drawing.save(options.output)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot write {options.output}: {error}") from error
    print(f"{options.output}: {drawing.width} x {drawing.height} pixels")
    return 0


def _default_first(trained: dict[str, Any], architecture: str) -> list[str]:
    """Return the names of an architecture's weights, first those that `pretrained=True` gives."""
    found = [name for name in trained if name.split(".")[0] == architecture]
    default = get_pretrained_cfg(architecture).tag
    return sorted(found, key=lambda name: name != f"{architecture}.{default}")


def _results() -> dict[str, Any]:
    return json.loads((PACKAGE / "results.json").read_text(encoding="utf-8"))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="gld-zoo", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    model: dict[str, Any] = dict(default=MODEL, help="timm name, hf-hub:ORG/NAME or local-dir:PATH")

    command = commands.add_parser("list", help="the zoo's models and weights")
    command.set_defaults(run=lambda _: print(list_models()))
    command = commands.add_parser("info", help="a model and its weights")
    command.add_argument("name", metavar="NAME", help="model, or model.tag")
    command.set_defaults(run=lambda options: print(describe(options.name)))
    command = commands.add_parser("predict", help="the most probable classes of images")
    command.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or pattern")
    command.add_argument("--model", **model)
    command.add_argument("--top", type=_positive, default=5, help="classes an image")
    command.add_argument("--json", action="store_true", help="a line of JSON an image")
    command.set_defaults(run=predict)
    command = commands.add_parser("explain", help="draw the class and confidence of each cell")
    command.add_argument("image", metavar="IMAGE", help="file")
    command.add_argument("-o", "--output", required=True, help="picture to write")
    command.add_argument("--model", **model)
    command.add_argument("--grid", type=_positive, default=2, help="cells along each side")
    command.set_defaults(run=explain_image)
    # its options are the trainer's, which reads them
    commands.add_parser("data", help="what a run would read of a dataset", add_help=False)
    return parser


def show_data(arguments: Sequence[str]) -> None:
    """Run the trainer's `data.py`, which a clone has beside the package.

    Raises:
        CommandError: If it is not there, or what it needs is not installed.
    """
    folder = PACKAGE.parent / "train"
    if not (folder / "data.py").is_file():
        raise CommandError(
            "gld-zoo data is part of the trainer, which a clone of the repository has; clone it, "
            'and there pip install -e ".[train]"'
        )
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("data")
    except ImportError as error:
        raise CommandError(
            f'gld-zoo data needs {error.name}; pip install -e ".[train,detection,segmentation]"'
        ) from error
    finally:
        sys.path.remove(str(folder))
    module.cli(list(arguments))


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exit with 1 if an image was skipped or what was asked cannot be done."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with printing(failed=end):
        try:
            if arguments[:1] == ["data"]:
                show_data(arguments[1:])
                return
            options = build_parser().parse_args(arguments)
            status = options.run(options) or 0
        except CommandError as error:
            sys.exit(f"error: {error}")
    sys.exit(status)


if __name__ == "__main__":
    main()
