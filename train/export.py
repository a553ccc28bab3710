"""Make a hub folder of a finished run: safetensors, config, card, log; ONNX and a push if asked.

    python train/export.py runs/mine-0 exported/mine
    python train/export.py runs/mine-0 exported/mine --float16 --onnx --int8 --push ORG/NAME

The scores in the card are those of the very file: a file that is not the run's own bits is measured
on the dataset's test split.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jsonargparse import ArgumentParser
from timm.data import resolve_model_data_config

from disk import DiskError, replace_folder, sha256, writing
from evaluate import evaluate, measuring_batches
from finished_run import FinishedRun
from gld_zoo.hub import model_card, push_folder, save_pretrained
from gld_zoo.output import end, printing
from models import ModelError, create_frozen
from onnx_files import OnnxModel, check_packages, quantize, write_onnx
from recipe import Recipe
from rows import DataError
from run_folder import RunError
from scores import predict
from sources import ImageSource, open_source

CPU = torch.device("cpu")
CALIBRATION = 512  # training images whose activations give the ranges of 8 bits


def export(
    run: Path,
    folder: Path,
    *,
    weights: str = "last",
    float16: bool = False,
    onnx: bool = False,
    int8: bool = False,
    dataset: str | None = None,
    repo_id: str = "ORG/NAME",
    license: str | None = None,
) -> dict[str, float]:
    """Write a finished run's student as hub folder, whole or not at all.

    Args:
        run: A finished run folder.
        folder: To write; must not be there, or be empty.
        weights: 'last', or 'best' of a run that held images out.
        float16: Store tensors of two or more dimensions in float16.
        onnx: Write `model.onnx` too, in float32.
        int8: Write `model.int8.onnx` too, calibrated on training images.
        dataset: Where the run's dataset is; None takes it from where the run did.
        repo_id: ORG/NAME, where the card says the model is.
        license: Of the weights, as the hub names it; None states none.

    Returns:
        Top-1 in % of each file that was measured.

    Raises:
        DataError: If the dataset is needed and does not fit.
        DiskError: If the folder cannot be written.
        ModelError: If the weights cannot be loaded or a package is missing.
        RunError: If the run is not finished, or the folder is in use.
    """
    finished = FinishedRun.load(run)
    folder = folder.resolve()
    if folder == Path.cwd():
        raise RunError(f"{folder} is the current folder; name another, which is made")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise RunError(f"{folder} is already there; name another, or delete it")
    if onnx or int8:
        check_packages()
    model: Any = create_frozen(f"local-dir:{run / weights}", CPU)
    config, names = resolve_model_data_config(model), model.pretrained_cfg["label_names"]
    as_trained = weights == "last" and not float16
    source = None if as_trained and not int8 else _open_source(finished, dataset)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as temporary:
            partial = save_pretrained(
                model,
                Path(temporary) / folder.name,
                label_names=names,
                data_config=config,
                float16=float16,
            )
            shutil.copyfile(run / "metrics.jsonl", partial / "metrics.jsonl")
            recipe = finished.portable().to_yaml()
            (partial / "recipe.yaml").write_text(recipe, encoding="utf-8")
            scores = finished.scores()
            if source and not as_trained:
                measured = evaluate(f"local-dir:{partial}", source, grid=0, device=CPU)
                scores.update(top1=measured["top1"], top5=measured["top5"])
            top1 = {"model.safetensors": scores["top1"]}
            if onnx or int8:
                written = create_frozen(f"local-dir:{partial}", CPU)
                write_onnx(written, partial / "model.onnx", config, names)
            if source and int8:
                top1["model.int8.onnx"] = _write_int8(partial, config, source)
                if not onnx:
                    (partial / "model.onnx").unlink()
            entry = dict(
                _describe_run(finished, scores),
                selected=weights == "best",
                parameters=sum(weight.numel() for weight in model.parameters()),
                sha256=sha256(partial / "model.safetensors"),
                license=license,
                files=[_describe_file(path, top1) for path in sorted(partial.glob("*.onnx"))],
            )
            model_card(model, entry, repo_id).save(partial / "README.md")
            replace_folder(partial, folder)
    return top1


def _open_source(finished: FinishedRun, dataset: str | None) -> ImageSource:
    """Find a run's dataset, as a whole also where the run read a stream."""
    place = dataset or finished.summary["dataset"]
    of_a_stream: dict[str, Any] = {
        field.name: field.default
        for field in Recipe.fields()
        if field.name in ("streaming", "train_images", "shuffle_buffer")
    }
    return open_source(replace(finished.recipe, dataset=place, **of_a_stream))


def _describe_run(finished: FinishedRun, scores: dict[str, Any]) -> dict[str, Any]:
    """Return what a card tells of a run."""
    recipe = finished.portable()
    return dict(
        finished.description(),
        teacher=recipe.teacher,
        finetuned_from=recipe.student if recipe.finetune else None,
        recipe="recipe.yaml",
        changes={},
        test_split=finished.summary.get("test_split", "test"),  # older runs do not tell
        runs=[scores],
    )


def _write_int8(folder: Path, config: dict[str, Any], source: ImageSource) -> float:
    """Quantise the ONNX file of a folder; return the top-1 in % of what was written."""
    size = config["input_size"][-1]
    order = torch.randperm(len(source.train), generator=torch.Generator().manual_seed(0))
    rows = source.train.select(order[:CALIBRATION].sort().values)
    calibration = measuring_batches(rows, config, size, CPU, batch_size=64)
    target = folder / "model.int8.onnx"
    quantize(folder / "model.onnx", target, (images for images, _ in calibration))
    test = measuring_batches(source.test, config, size, CPU)
    return predict(OnnxModel(target), test, 0).top(1)


def _describe_file(path: Path, top1: dict[str, float]) -> str:
    """Return a card's line about an ONNX file; what is not in `top1` is in float32."""
    size = path.stat().st_size / 2**20
    shared = "`images` [batch, 3, H, W], normalised, to `logits`; preprocessing in its metadata"
    if path.name in top1:
        return f"`{path.name}` ({size:.1f} MiB): 8 bits, top-1 {top1[path.name]:.2f} %; {shared}."
    return f"`{path.name}` ({size:.1f} MiB): float32, equal to the model to 1e-4; {shared}."


def push(folder: Path, repo_id: str, *, private: bool | None) -> str:
    """Push a folder that `export` wrote; return the address of the commit.

    Raises:
        RunError: If the hub refuses or cannot be reached; the folder stays.
    """
    try:
        return push_folder(folder, repo_id, private=private)
    except Exception as error:  # of huggingface_hub, or of the HTTP library below it
        raise RunError(
            f"{folder} is written but not pushed: {error}; push it again by "
            f"`hf upload {repo_id} {folder}`"
        ) from error


@printing(failed=end)
def cli(arguments: list[str] | None = None) -> None:
    """Run the command line; a mistake ends the program with one line that names it."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="finished run folder")
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--weights", type=Literal["last", "best"], default="last", help="which")
    parser.add_argument(
        "--float16", action="store_true", help="tensors of two or more dimensions in float16"
    )
    parser.add_argument("--onnx", action="store_true", help="model.onnx too")
    parser.add_argument("--int8", action="store_true", help="model.int8.onnx too")
    parser.add_argument("--dataset", type=str | None, help="null: where the run found it")
    parser.add_argument("--license", type=str | None, help="of the weights, as the hub names it")
    parser.add_argument("--push", type=str | None, metavar="ORG/NAME", help="to the hub")
    parser.add_argument("--private", type=bool | None, help="whether a new repository is")
    options = parser.parse_args(arguments)
    try:
        if options.push:
            validate_repo_id(options.push)
        top1 = export(
            options.run,
            options.folder,
            weights=options.weights,
            float16=options.float16,
            onnx=options.onnx,
            int8=options.int8,
            dataset=options.dataset,
            repo_id=options.push or "ORG/NAME",
            license=options.license,
        )
        scores = ", ".join(f"{name} {score:.2f} %" for name, score in top1.items())
        print(f"{options.folder}: top-1 {scores}")
        if options.push:
            print(push(options.folder, options.push, private=options.private))
    except (DataError, DiskError, HFValidationError, ModelError, RunError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
