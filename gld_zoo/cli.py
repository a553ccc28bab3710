"""The command `gld-zoo`: what the zoo holds, what a model sees in images, and all of training.

gld-zoo list
gld-zoo info gld_wrn16_1
gld-zoo predict cat.jpg photos/ 'more/*.png' --top 3
gld-zoo explain cat.jpg -o cat.png
gld-zoo demo
gld-zoo distill --config quickstart
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from gld_zoo.output import CommandError, end, printing

MODEL = "gld_wrn16_1"
BATCH = 32  # images a forward pass


class TrainingCommand(NamedTuple):
    """A command of the trainer, a module of `gld_zoo.training.commands` that reads its options."""

    help: str
    extra: str


TRAINING_COMMANDS = dict(
    distill=TrainingCommand("train a student by a teacher, or on labels alone", "train"),
    detect=TrainingCommand("train SSD300 on a backbone", "detection"),
    segment=TrainingCommand("train DeepLabV3+ on a backbone", "segmentation"),
    evaluate=TrainingCommand("measure a model on a dataset", "train"),
    compare=TrainingCommand("measure several models on a dataset, side by side", "train"),
    probe=TrainingCommand("measure a linear classifier on a model's features", "train"),
    draw=TrainingCommand("draw what a detector or a segmenter finds in images", "train"),
    export=TrainingCommand("make a folder for the hub of a finished run, and push it", "train"),
    data=TrainingCommand("what a run would read of a dataset", "train"),
    store=TrainingCommand("keep what a teacher answers: build, verify, info", "train"),
)


def list_zoo(_: argparse.Namespace) -> None:
    """Print the zoo's models, their weights, and the recipes."""
    from gld_zoo.catalogue import list_models, list_recipes

    print(list_models(), list_recipes(), sep="\n\n")


def show(options: argparse.Namespace) -> None:
    """Print what is known of a model or a recipe.

    Raises:
        CommandError: If the zoo does not hold it.
    """
    from gld_zoo.catalogue import describe

    print(describe(options.name))


def predict(options: argparse.Namespace) -> int:
    """Print the classes of images; return 1 if one was skipped.

    Raises:
        CommandError: If none was found, or the model cannot be had.
    """
    from gld_zoo.images import read_images
    from gld_zoo.predictor import create_predictor

    failed: list[Path] = []
    predictor, count = create_predictor(options.model), 0
    images_found = read_images(options.images, failed)
    while group := list(islice(images_found, BATCH)):
        paths, images = zip(*group, strict=True)
        for path, classes in zip(paths, predictor.classify(images, options.top), strict=True):
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
            drawing cannot be written, or would take the image's place.
    """
    from gld_zoo.images import read_image
    from gld_zoo.predictor import create_predictor

    try:
        image = read_image(Path(options.image))
    except Exception as error:
        raise CommandError(f"{options.image}: {error}") from error
    if os.path.exists(options.output) and os.path.samefile(options.image, options.output):
        raise CommandError(f"--output {options.output} is the image itself; name another file")
    drawing = create_predictor(options.model).explain(image, options.grid)
    try:
        drawing.save(options.output)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot write {options.output}: {error}") from error
    print(
        f"{options.output}: {drawing.width} x {drawing.height} pixels; {options.image} as "
        f"{options.model} sees it"
    )
    return 0


def show_page(options: argparse.Namespace) -> None:
    """Serve the page that compares models, until Ctrl-C.

    Raises:
        CommandError: If its extra is not installed, a model cannot be had or the port is not free.
    """
    print("starting the page, which takes some seconds", flush=True)
    try:
        demo = importlib.import_module("gld_zoo.demo")
    except ModuleNotFoundError as error:
        raise CommandError(_missing("demo", error, "demo")) from error
    demo.serve(
        options.model,
        options.teacher,
        examples=options.examples,
        port=options.port,
        in_browser=options.open,
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="gld-zoo", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    model: dict[str, Any] = dict(
        default=MODEL,
        help=f"timm name, hf-hub:ORG/NAME, local-dir:PATH or run folder; without it {MODEL}",
    )

    command = commands.add_parser("list", help="the zoo's models, weights and recipes")
    command.set_defaults(run=list_zoo)
    command = commands.add_parser("info", help="a model and its weights, or a recipe")
    command.add_argument("name", metavar="NAME", help="model, model.tag or recipe")
    command.set_defaults(run=show)
    command = commands.add_parser("predict", help="the most probable classes of images")
    command.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or pattern")
    command.add_argument("--model", **model)
    command.add_argument(
        "--top", type=_positive, default=5, help="how many classes to show of each image"
    )
    command.add_argument("--json", action="store_true", help="a line of JSON an image")
    command.set_defaults(run=predict)
    command = commands.add_parser("explain", help="draw the class and confidence of each cell")
    command.add_argument("image", metavar="IMAGE", help="file")
    command.add_argument("-o", "--output", required=True, help="picture to write")
    command.add_argument("--model", **model)
    command.add_argument("--grid", type=_positive, default=2, help="cells along each side")
    command.set_defaults(run=explain_image)
    command = commands.add_parser("demo", help="a page in the browser that compares two models")
    command.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="NAME",
        help="models to offer first, of which the first is shown",
    )
    command.add_argument(
        "--teacher", metavar="NAME", help="model shown beside it; without, its own if known"
    )
    command.add_argument(
        "--examples", nargs="+", default=[], metavar="IMAGE", help="to offer: file, folder, pattern"
    )
    command.add_argument(
        "--port", type=_port, help="without: the first free one from 7860 on; 0: any"
    )
    command.add_argument("--open", action="store_true", help="open it in the browser")
    command.set_defaults(run=show_page)
    for name, command_ in TRAINING_COMMANDS.items():  # whose modules read their options
        commands.add_parser(name, help=command_.help, add_help=False)
    return parser


def start(name: str, arguments: Sequence[str] | None = None) -> None:
    """Run a command of the trainer, which is imported only now.

    Where what it needs is not installed, that ends the program with one line that names it.

    Args:
        name: One of `TRAINING_COMMANDS`.
        arguments: None takes the program's own.
    """
    try:
        module = importlib.import_module(f"gld_zoo.training.commands.{name}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {_missing(name, error, TRAINING_COMMANDS[name].extra)}")
    module.cli(sys.argv[1:] if arguments is None else list(arguments), prog=f"gld-zoo {name}")


def _missing(command: str, error: ModuleNotFoundError, extra: str) -> str:
    """Return what brings a package that is not there; a module of our own is a fault of ours."""
    if (error.name or "gld_zoo").partition(".")[0] == "gld_zoo":
        raise error
    return (
        f"gld-zoo {command} needs {error.name}, which comes with an extra: "
        f'pip install "gld-zoo[{extra}]"'
    )


def _port(text: str) -> int:
    if not 0 <= (value := int(text)) <= 65535:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to 65535")
    return value


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exit with 1 if an image was skipped or what was asked cannot be done."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in TRAINING_COMMANDS:
        start(arguments[0], arguments[1:])
        return
    with printing(failed=end):
        try:
            options = build_parser().parse_args(arguments)
            status = options.run(options) or 0
        except CommandError as error:
            sys.exit(f"error: {error}")
    sys.exit(status)


if __name__ == "__main__":
    main()
