"""A finished run's student as a folder for the hub, and the push of it."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config

from gld_zoo.hub import model_card, push_folder, save_pretrained
from gld_zoo.model_card import OWN_RECIPE
from gld_zoo.training.build.create import create_frozen, tagged
from gld_zoo.training.common.disk import replace_folder, sha256, writing
from gld_zoo.training.common.errors import RunError
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.data.sources import ImageSource, open_source
from gld_zoo.training.measure.evaluation import evaluate
from gld_zoo.training.measure.inputs import Measured, build_measured, measuring_batches
from gld_zoo.training.measure.scores import collect
from gld_zoo.training.publish.onnx_files import OnnxModel, check_packages, quantize, write_onnx
from gld_zoo.training.runs.finished_run import FinishedRun

CPU = torch.device("cpu")
CALIBRATION = 512  # training images whose activations give the ranges of 8 bits
INT8 = "model.int8.onnx"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a hub folder is to hold.

    Args:
        weights: 'last', or 'best' of a run that held images out.
        float16: Store tensors of two or more dimensions in float16.
        onnx: Write `model.onnx` too, in float32.
        int8: Write `model.int8.onnx` too, calibrated on training images.
        license: Of the weights, as the hub names it; None states none.
    """

    weights: str = "last"
    float16: bool = False
    onnx: bool = False
    int8: bool = False
    license: str | None = None

    @property
    def as_trained(self) -> bool:
        """Whether the weights are those that the run's summary tells of, to the bit."""
        return self.weights == "last" and not self.float16


def write_hub_folder(
    run: Path,
    folder: Path,
    contents: Contents,
    *,
    dataset: str | None = None,
    repo_id: str = "ORG/NAME",
) -> dict[str, float]:
    """Write a finished run's student as hub folder, whole or not at all.

    Args:
        run: A finished run folder.
        folder: To write; must not be there, or be empty.
        contents: What it holds.
        dataset: Where the run's dataset is; None takes it from where the run did.
        repo_id: ORG/NAME, where the card says the model is.

    Returns:
        Top-1 in % of each file that was measured.

    Raises:
        DataError: If the dataset is needed and does not fit.
        DiskError: If the folder cannot be written.
        ModelError: If the weights cannot be loaded or a package is missing.
        RunError: If the run is not finished, or the folder is in use.
    """
    finished = FinishedRun.load(run)
    folder = _free(folder)
    if contents.onnx or contents.int8:
        check_packages()
    model: Any = create_frozen(f"local-dir:{run / contents.weights}", CPU)
    needs_images = contents.int8 or not contents.as_trained
    source = _open_source(finished, dataset) if needs_images else None
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as temporary:
            partial = Path(temporary) / folder.name
            scores = _write_weights(model, partial, finished, contents, source)
            top1 = {"model.safetensors": scores["top1"]}
            if contents.onnx or contents.int8:
                top1 |= _write_onnx_files(partial, contents, source)
            entry = _describe(finished, scores, partial, contents, top1)
            entry["parameters"] = sum(weight.numel() for weight in model.parameters())
            model_card(model, entry, repo_id).save(partial / "README.md")
            replace_folder(partial, folder)
    return top1


def _free(folder: Path) -> Path:
    """Return a folder's whole path, if it can be made there."""
    folder = folder.resolve()
    if folder == Path.cwd():
        raise RunError(f"{folder} is the current folder; name another, which is made")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise RunError(f"{folder} is already there; name another, or delete it")
    return folder


def _write_weights(
    model: Any, folder: Path, finished: FinishedRun, contents: Contents, source: ImageSource | None
) -> dict[str, Any]:
    """Write weights, config, log and recipe; return the scores of that very file."""
    save_pretrained(
        model,
        folder,
        label_names=model.pretrained_cfg["label_names"],
        data_config=resolve_model_data_config(model),
        float16=contents.float16,
    )
    shutil.copyfile(finished.path / "metrics.jsonl", folder / "metrics.jsonl")
    recipe = finished.portable().to_yaml()
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    scores = finished.scores()
    if source is not None and not contents.as_trained:
        measured = evaluate(f"local-dir:{folder}", source, grid=0, device=CPU)
        scores.update(top1=measured["top1"], top5=measured["top5"])
    return scores


def _write_onnx_files(
    folder: Path, contents: Contents, source: ImageSource | None
) -> dict[str, float]:
    """Write what is asked for of ONNX; return the top-1 in % of the file of 8 bits, if any."""
    written = build_measured(f"local-dir:{folder}", CPU)
    names = written.model.pretrained_cfg["label_names"]
    write_onnx(written.model, folder / "model.onnx", written.config, names)
    if source is None or not contents.int8:
        return {}
    top1 = _write_int8(folder, written, source)
    if not contents.onnx:
        (folder / "model.onnx").unlink()
    return {INT8: top1}


def _describe(
    finished: FinishedRun,
    scores: dict[str, Any],
    folder: Path,
    contents: Contents,
    top1: dict[str, float],
) -> dict[str, Any]:
    """Return what the card tells of a run and of the files made of it."""
    recipe = finished.portable()
    return dict(
        finished.description(),
        teacher=finished.teacher(),
        finetuned_from=tagged(recipe.student) if recipe.finetune else None,
        recipe=OWN_RECIPE,
        changes={},
        test_split=finished.summary.get("test_split", "test"),  # older runs do not tell
        runs=[scores],
        selected=contents.weights == "best",
        sha256=sha256(folder / "model.safetensors"),
        license=contents.license,
        files=[_describe_file(path, top1) for path in sorted(folder.glob("*.onnx"))],
    )


def _open_source(finished: FinishedRun, dataset: str | None) -> ImageSource:
    """Find a run's dataset, as a whole also where the run read a stream."""
    place = dataset or finished.summary["dataset"]
    of_a_stream: dict[str, Any] = {
        field.name: field.default
        for field in Recipe.fields()
        if field.name in ("streaming", "train_images", "shuffle_buffer")
    }
    return open_source(replace(finished.recipe, dataset=place, **of_a_stream))


def _write_int8(folder: Path, written: Measured, source: ImageSource) -> float:
    """Quantise the ONNX file of a folder; return the top-1 in % of what was written."""
    order = torch.randperm(len(source.train), generator=torch.Generator().manual_seed(0))
    rows = source.train.select(order[:CALIBRATION].sort().values)
    calibration = measuring_batches(rows, written, CPU, batch_size=64)
    target = folder / INT8
    quantize(folder / "model.onnx", target, (images for images, _ in calibration))
    test = measuring_batches(source.test, written, CPU)
    return collect(OnnxModel(target), test, 0).top(1)


def _describe_file(path: Path, top1: dict[str, float]) -> str:
    """Return a card's line about an ONNX file; what is not in `top1` is in float32."""
    size = path.stat().st_size / 2**20
    shared = "`images` [batch, 3, H, W], normalised, to `logits`; preprocessing in its metadata"
    if path.name in top1:
        return f"`{path.name}` ({size:.1f} MiB): 8 bits, top-1 {top1[path.name]:.2f} %; {shared}."
    return f"`{path.name}` ({size:.1f} MiB): float32, equal to the model to 1e-4; {shared}."


def push(folder: Path, repo_id: str, *, private: bool | None) -> str:
    """Push a folder that `write_hub_folder` wrote; return the address of the commit.

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
