"""Make a hub folder of a finished run: safetensors, config, card, log; ONNX and a push if asked.

    gld-zoo export runs/mine-0 exported/mine
    gld-zoo export runs/mine-0 exported/mine --float16 --onnx --int8 --push ORG/NAME

The scores in the card are those of the very file: a file that is not the run's own bits is measured
on the dataset's test split.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jsonargparse import ArgumentParser

from gld_zoo.output import end, printing
from gld_zoo.training.common.errors import TrainingError
from gld_zoo.training.publish.hub_folder import Contents, push, write_hub_folder


def build_parser(prog: str | None) -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("run", type=str, help="finished run folder")
    parser.add_argument("folder", type=str, help="folder to write")
    parser.add_argument(
        "--weights", type=Literal["last", "best"], default="last", help="which to export"
    )
    parser.add_argument(
        "--float16", action="store_true", help="tensors of two or more dimensions in float16"
    )
    parser.add_argument("--onnx", action="store_true", help="model.onnx too")
    parser.add_argument("--int8", action="store_true", help="model.int8.onnx too")
    parser.add_argument("--dataset", type=str | None, help="null: where the run found it")
    parser.add_argument("--license", type=str | None, help="of the weights, as the hub names it")
    parser.add_argument("--push", type=str | None, metavar="ORG/NAME", help="to the hub")
    parser.add_argument("--private", type=bool | None, help="whether a new repository is")
    return parser


@printing(failed=end)
def cli(arguments: list[str], prog: str | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    options = build_parser(prog).parse_args(arguments)
    try:
        if options.push:
            validate_repo_id(options.push)
        contents = Contents(
            weights=options.weights,
            float16=options.float16,
            onnx=options.onnx,
            int8=options.int8,
            license=options.license,
        )
        top1 = write_hub_folder(
            Path(options.run),
            Path(options.folder),
            contents,
            dataset=options.dataset,
            repo_id=options.push or "ORG/NAME",
        )
        scores = ", ".join(f"{name} {score:.2f} %" for name, score in top1.items())
        print(f"{options.folder}: weights, configuration and card (README.md); top-1 {scores}")
        if not options.license:
            print("its card states no licence; --license NAME does, as the hub names them")
        if options.push:
            print(f"pushed: {push(Path(options.folder), options.push, private=options.private)}")
            print(
                "it loads by import timm, gld_zoo; "
                f"timm.create_model('hf-hub:{options.push}', pretrained=True)"
            )
        else:
            print(
                "it loads by import timm, gld_zoo; "
                f"timm.create_model('local-dir:{options.folder}', pretrained=True), "
                "and an export with --push ORG/NAME, which the card then names, publishes it"
            )
    except (HFValidationError, TrainingError) as error:
        sys.exit(f"error: {error}")
