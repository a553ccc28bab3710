"""Write models as timm, transformers and the Hugging Face hub read them, and push them there."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch.nn as nn
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    label_names: list[str] | None = None,
    data_config: dict[str, Any] | None = None,
    results: dict[str, Any] | None = None,
    repo_id: str = "ORG/NAME",
) -> Path:
    """Write `model.safetensors` and `config.json`, which `local-dir:FOLDER` loads in timm.

    Args:
        model: A timm model.
        folder: Made if it is not there.
        label_names: Class names in order; transformers shows them.
        data_config: What preprocessing the weights expect where it differs from the model's cfg:
            `input_size`, `mean`, `std`, `crop_pct`, `interpolation`.
        results: What was measured, an entry of this package's results.json; a model card
            (`README.md`) is written with it.
        repo_id: Where the card says the model is.

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
    if results is not None:
        model_card(model, results, repo_id).save(folder / "README.md")
    return folder


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    results: dict[str, Any],
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Add model",
    **options: Any,
) -> str:
    """Push a model with its card to the hub; timm loads it as `hf-hub:REPO_ID`.

    Args:
        model: A timm model.
        repo_id: ORG/NAME, made if it is not there.
        results: What was measured, an entry of this package's results.json.
        private: Of a new repository; None leaves it to the organisation.
        token: Of the hub; None takes the one logged in with.
        revision: Branch to commit to; None is the default one.
        commit_message: Of the one commit that holds all files.
        **options: `label_names` and `data_config`, as for `save_pretrained`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: As `save_pretrained`; nothing is pushed.
        huggingface_hub.errors.HfHubHTTPError: If the hub refuses.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, results=results, repo_id=repo_id, **options)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    return commit.commit_url


def model_card(model: Any, results: dict[str, Any], repo_id: str) -> ModelCard:
    """Return a card: what was measured, how to use and repeat it, terms and citation.

    The scores are in the hub's own metadata too, where its leaderboards and searches look.

    Args:
        model: A timm model.
        results: An entry of this package's results.json.
        repo_id: ORG/NAME, where the model will be.
    """
    run, teacher = results["runs"][0], results["teacher"]
    teacher = teacher["name"] if isinstance(teacher, dict) else teacher
    measured: dict[str, Any] = dict(
        task_type="image-classification",
        dataset_type="uoft-cs/cifar100",
        dataset_name="CIFAR-100",
        dataset_split="test",
    )
    data = ModelCardData(
        model_name=repo_id.split("/")[1],
        license="apache-2.0",
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["timm", "image-classification", "knowledge-distillation"],
        datasets=[measured["dataset_type"]],
        base_model=teacher.removeprefix("hf-hub:") if "hf-hub:" in str(teacher) else None,
        eval_results=[
            EvalResult(metric_type="accuracy", metric_name=name, metric_value=run[key], **measured)
            for name, key in (("Top-1", "top1"), ("Top-5", "top5"))
        ],
    )
    text = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    changes = ", ".join(f"{name} {value}" for name, value in results["changes"].items())
    filled = text.format(
        repo_id=repo_id,
        architecture=model.pretrained_cfg["architecture"],
        origin=f"distilled by GLD from `{teacher}`" if teacher else "trained on the labels alone",
        changes=changes or "none",
        run=run,
        results=results,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{filled}")
