"""What detectors and segmenters share: timm backbones by stride, and folders to keep a model in."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import resolve_model_input_args

from gld_zoo.hub import create_model, replacing_files, resolve_name, save_weights

FACTORIES = dict(
    create_ssd300="gld_zoo.downstream.detection",
    create_deeplabv3plus="gld_zoo.downstream.segmentation",
)


def create_backbone(
    name: str, strides: tuple[int, ...], *, pretrained: bool, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Build a timm model that returns its feature maps at some strides.

    Args:
        name: timm name, hf-hub:ORG/NAME, local-dir:PATH or a run folder.
        strides: Of the maps in pixels, ascending, before an `output_stride` limits them.
        pretrained: Load the name's weights.
        **options: As for `timm.create_model`; with `output_stride`, the stride of the deepest map,
            the last stages are dilated instead.

    Returns:
        timm's feature model: images `[B, 3, H, W]` to a list of maps, with `feature_info`. And the
        `backbone` and `backbone_options` that make it again, with the same normalisation.

    Raises:
        ValueError: If the name, or its weights, cannot be had, or a stride is not among its maps'.
    """
    try:
        name = resolve_name(name)
        with torch.device("meta"):
            known = create_model(name, features_only=True).feature_info.reduction()
    except ValueError as error:
        raise ValueError(f"backbone={name!r} cannot be created: {error}") from error
    missing = [stride for stride in strides if stride not in known]
    if missing:
        raise ValueError(
            f"backbone={name!r} has maps at strides {known}, not at {missing}; take one for larger "
            "images, such as gld_resnet18"
        )
    indices = tuple(known.index(stride) for stride in strides)
    try:
        if pretrained:
            create_model(name, pretrained=True)  # whole, as timm checks no weights of a part
        body = create_model(
            name, pretrained=pretrained, features_only=True, out_indices=indices, **options
        )
    except TypeError as error:  # an architecture that does not know an option
        named = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ValueError(f"backbone={name!r} does not take {named}: {error}") from error
    except ValueError as error:
        remedy = "; pass pretrained_backbone=False for random weights" if pretrained else ""
        raise ValueError(f"backbone={name!r} cannot be created: {error}{remedy}") from error
    cfg = body.pretrained_cfg
    again = dict(resolve_model_input_args(name).get("pretrained_model_args", {}))  # a hub folder's
    again.update((key, value) for key, value in options.items() if key != "output_stride")
    again.update(pretrained_cfg_overlay={key: list(cfg[key]) for key in ("mean", "std")})
    return body, dict(backbone=cfg["architecture"], backbone_options=again)


def save_downstream(
    model: nn.Module, folder: str | Path, *, label_names: list[str], image_size: int | None = None
) -> Path:
    """Write a detector or segmenter as `model.safetensors` and `config.json`.

    Each file takes the place of an earlier one whole, and only once both are written.

    Args:
        model: From `create_ssd300` or `create_deeplabv3plus`.
        folder: Made if it is not there.
        label_names: Class names in order, a detector's without the background.
        image_size: Longer side in pixels at which a segmenter was measured.

    Returns:
        The folder.

    Raises:
        ValueError: If the number of names is not that of the classes; nothing is written.
    """
    config = dict(cast(Any, model).config, label_names=label_names, image_size=image_size)
    classes = config["num_classes"] - (config["factory"] == "create_ssd300")
    if len(label_names) != classes:
        raise ValueError(
            f"{len(label_names)} label_names for a model of {classes} classes; a detector's are "
            "without the background"
        )
    with replacing_files(Path(folder)) as partial:
        save_weights(model, partial)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def load_downstream(folder: str | Path) -> Any:
    """Load what `save_downstream` wrote, in eval mode; `config` is that file's content.

    Raises:
        ValueError: If the folder does not hold such a model, or it is damaged.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        arguments = dict(config)
        del arguments["label_names"], arguments["image_size"]
        factory = arguments.pop("factory")
        create = getattr(importlib.import_module(FACTORIES[factory]), factory)
        tensors = load_file(folder / "model.safetensors")
        model = create(**arguments, pretrained_backbone=False)
        model.load_state_dict(tensors)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{folder} holds no whole detector or segmenter ({reason}); name a folder that "
            "save_downstream or the trainer wrote"
        ) from error
    model.config = config
    return model.eval()
