"""Write models as timm, transformers and the Hugging Face hub read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.nn as nn
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    label_names: list[str] | None = None,
    data_config: dict[str, Any] | None = None,
) -> Path:
    """Write `model.safetensors` and `config.json`, which `local-dir:FOLDER` loads in timm.

    Args:
        model: A timm model.
        folder: Made if it is not there.
        label_names: Class names in order; transformers shows them.
        data_config: What preprocessing the weights expect where it differs from the model's cfg:
            `input_size`, `mean`, `std`, `crop_pct`, `interpolation`.

    Returns:
        The folder.

    Raises:
        ValueError: If the number of names is not the model's number of classes.
    """
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(
            f"{len(label_names)} label_names for a model of {model.num_classes} classes"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses the channels-last layout
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model_config = dict(label_names=label_names) if label_names else None
    config_path = folder / "config.json"
    save_config_for_hf(model, str(config_path), model_config=model_config, data_config=data_config)
    config = json.loads(config_path.read_text(encoding="utf-8"))
    # timm 1.0.31 repeats num_classes there, and transformers then passes it twice and fails
    config.get("model_args", {}).pop("num_classes", None)
    # the tag names the weights that the model began with or could have, not these
    config.get("pretrained_cfg", {}).pop("tag", None)
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder
