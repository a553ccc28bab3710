"""ONNX files of a model: written, quantised to 8 bits, and run by onnxruntime."""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from gld_zoo.training.common.errors import ModelError

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TOLERANCE = 1e-4  # relative, and absolute in logits, to the model in torch


def check_packages() -> None:
    """Refuse before any work if a package is missing.

    Raises:
        ModelError: If one is.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"ONNX needs {', '.join(missing)}; pip install {' '.join(missing)}")


@torch.no_grad()
def write_onnx(
    model: nn.Module, path: Path, config: dict[str, Any], label_names: list[str]
) -> None:
    """Write a model as ONNX: `images` `[batch, 3, H, W]`, normalised, to `logits` `[batch, K]`.

    The file's metadata holds as JSON what preprocessing the images need and the class names.

    Args:
        model: A model in eval mode, on the CPU.
        path: The file.
        config: timm's data config of the model.
        label_names: Class names in order.

    Raises:
        ModelError: If onnxruntime's logits differ from torch's by more than 1e-4.
    """
    import onnx

    images = torch.randn(3, *config["input_size"])
    torch.onnx.export(
        model,
        (images,),
        path,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    written = onnx.load(path)
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    about = dict({key: config[key] for key in keys if key in config}, label_names=label_names)
    onnx.helper.set_model_props(written, {key: json.dumps(value) for key, value in about.items()})
    onnx.save(written, path)
    session = OnnxModel(path)
    for batch in (images[:1], images):
        expected, got = model(batch), session(batch)
        if not torch.allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE):
            difference = (got - expected).abs().max().item()
            raise ModelError(f"{path.name} gives logits that differ from torch's by {difference:g}")


def quantize(source: Path, target: Path, batches: Iterable[torch.Tensor]) -> None:
    """Quantise an ONNX file's weights, channel by channel, and activations to 8 bits.

    Args:
        source: A file that `write_onnx` wrote.
        target: The file to write.
        batches: Normalised images that the activations' ranges are taken from.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self, images: Iterator[torch.Tensor]) -> None:
            self.images = images

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.images, None)
            return None if batch is None else dict(images=batch.contiguous().numpy())

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of each batch norm, which has no channels to tell
    try:
        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "prepared.onnx"
            quant_pre_process(source, prepared)
            quantize_static(
                prepared,
                target,
                Reader(iter(batches)),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
            )
    finally:
        logger.setLevel(level)


class OnnxModel:
    """Images `[B, 3, H, W]` to logits `[B, K]` by onnxruntime, on the CPU."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Run a batch."""
        (logits,) = self.session.run(["logits"], dict(images=images.contiguous().numpy()))
        return torch.from_numpy(logits)
