"""Write models as timm, transformers and the Hugging Face hub read them, and push them there."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from gld_zoo.model_card import model_card


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    label_names: list[str] | None = None,
    data_config: dict[str, Any] | None = None,
    float16: bool = False,
    results: dict[str, Any] | None = None,
    repo_id: str = "ORG/NAME",
) -> Path:
    """Write `model.safetensors` and `config.json`, which `local-dir:FOLDER` loads in timm.

    Each file takes the place of an earlier one whole, and only once all are written.

    Args:
        model: A timm model.
        folder: Made if it is not there.
        label_names: Class names in order; transformers shows them.
        data_config: What preprocessing the weights expect where it differs from the model's cfg:
            `input_size`, `mean`, `std`, `crop_pct`, `interpolation`.
        float16: Store tensors of two or more dimensions in half the bytes; timm loads them into
            float32.
        results: What was measured, as for `model_card`; a card (`README.md`) is written with it.
        repo_id: Where the card says the model is.

    Returns:
        The folder.

    Raises:
        ValueError: If the model is not timm's, the number of names not its number of classes, or
            something is missing in `results`; nothing is written.
    """
    if not hasattr(model, "pretrained_cfg"):
        raise ValueError(f"{type(model).__name__} is not a timm model: it has no pretrained_cfg")
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(
            f"{len(label_names)} label_names for a model of {model.num_classes} classes"
        )
    card = None if results is None else model_card(model, results, repo_id, label_names)
    with replacing_files(Path(folder)) as partial:
        save_weights(model, partial, float16=float16)
        licence = (results or {}).get("license")
        _write_config(model, partial / "config.json", label_names, data_config, licence)
        if card is not None:
            card.save(partial / "README.md")
    return Path(folder)


@contextlib.contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Give a folder to write files in; they take their place in `folder` once all are written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as name:
        partial = Path(name)
        yield partial
        for written in sorted(partial.iterdir()):
            os.replace(written, folder / written.name)


def save_weights(model: nn.Module, folder: Path, *, float16: bool = False) -> None:
    """Write `model.safetensors`, in float16 if asked as `to_float16` does."""
    tensors = model.state_dict()
    save_tensors(to_float16(tensors) if float16 else tensors, folder / "model.safetensors")


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors of any layout and device by safetensors, readable by whom the umask lets."""
    # safetensors refuses the channels-last layout
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata or {"format": "pt"})
    path.chmod(mode)  # safetensors makes its file for its owner alone


def to_float16(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Halve tensors of two or more dimensions; biases and batch norm keep their precision."""
    return {name: tensor.half() if tensor.ndim >= 2 else tensor for name, tensor in tensors.items()}


def _write_config(
    model: nn.Module,
    path: Path,
    label_names: list[str] | None,
    data_config: dict[str, Any] | None,
    licence: str | None,
) -> None:
    model_config = dict(label_names=label_names) if label_names else None
    save_config_for_hf(model, str(path), model_config=model_config, data_config=data_config)
    config = json.loads(path.read_text(encoding="utf-8"))
    # timm 1.0.31 repeats num_classes there, and transformers then passes it twice and fails
    config.get("model_args", {}).pop("num_classes", None)
    # these are of the weights that the model began with or could have, not of its own
    cfg = config.setdefault("pretrained_cfg", {})
    for name in ("tag", "license", "label_names"):
        cfg.pop(name, None)
    if licence:
        cfg["license"] = licence
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def create_model(name: str, **kwargs: Any) -> Any:
    """Create a model as timm does, with one kind of error for all that can be wrong with its name.

    Args:
        name: timm name, hf-hub:ORG/NAME[@REVISION], local-dir:PATH or a run folder.
        **kwargs: As for `timm.create_model`.

    Raises:
        ValueError: If timm does not know the name, the hub does not have it or cannot be reached,
            its run is not finished, or its weights are missing, damaged or not the architecture's
            (the last is noticed only with the weights' own number of classes, and not with
            `features_only`).
    """
    name = resolve_name(name)
    try:
        return timm.create_model(name, **kwargs)
    except SafetensorError as error:
        raise ValueError(
            f"its file of weights is damaged ({error}); download or export it again"
        ) from error
    except KeyError as error:
        reason = f"it has no {error}, so it is not the folder of a timm classifier"
        if not name.startswith("local-dir:"):
            reason = f"timm does not know {error}"
        raise ValueError(reason) from error
    except (RuntimeError, ValueError, OSError, HfHubHTTPError) as error:
        reason = str(error) or f"{type(error).__name__}: its file of weights is missing"
        if isinstance(error, LocalEntryNotFoundError):
            reason += (
                " Without one, name a model's folder instead; HF_HUB_OFFLINE=1 asks for what is "
                "there already, and does not wait"
            )
        raise ValueError(f"{reason}{_near(name)}") from error


def _near(name: str) -> str:
    """Return what to say of the names there are, where timm does not know a model or its tag."""
    if ":" in name:
        return ""
    model, _, tag = name.partition(".")
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=3)
        return f"; near it are {', '.join(near)}" if near else ""
    names = timm.list_pretrained(f"{model}.*")
    return f"; there are {', '.join(names)}" if tag and names and name not in names else ""


def resolve_name(name: str) -> str:
    """Return what timm loads: of a run folder its `last/`, of a model's folder that, else the name.

    A model that timm knows is meant by its name, whatever lies here; `./NAME` is the folder.

    Raises:
        ValueError: If a run folder holds no finished run, or a folder no model.
    """
    if is_of_timm(name):
        return name
    folder = Path(name)
    for place in (folder / "last", folder):
        if os.path.isfile(place / "config.json"):
            return f"local-dir:{place}"
    if is_run(name):
        raise ValueError(f"{name} holds no finished run; go on with it by --resume")
    if os.sep in name and ":" not in name:
        raise ValueError(
            f"there is no run and no model in the folder {name}; name one where there is, a timm "
            "model, or hf-hub:ORG/NAME"
        )
    return name


def is_of_timm(name: str) -> bool:
    """Tell whether timm knows a name of an architecture, or of one and its weights."""
    return timm.is_model_pretrained(name) if "." in name else timm.is_model(name)


def is_run(name: str) -> bool:
    """Tell whether a name is that of a run folder, finished or not, and of no model of timm."""
    return not is_of_timm(name) and os.path.isfile(os.path.join(name, "recipe.yaml"))


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    results: dict[str, Any] | None = None,
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
        results: What was measured, as for `model_card`; without it the card says that nothing was,
            and one that the repository has already is kept.
        private: Of a new repository; None leaves it to the organisation.
        token: Of the hub; None takes the one logged in with.
        revision: Branch to commit to; None is the default one.
        commit_message: Of the one commit that holds all files.
        **options: `label_names`, `data_config` and `float16`, as for `save_pretrained`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: As `save_pretrained`; nothing is pushed.
        huggingface_hub.errors.HfHubHTTPError: If the hub refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, results=results, repo_id=repo_id, **options)
        if results is None and not HfApi(token=token).file_exists(
            repo_id, "README.md", revision=revision
        ):
            names = options.get("label_names")
            model_card(model, None, repo_id, names).save(Path(folder) / "README.md")
        return push_folder(
            folder,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Add model",
) -> str:
    """Push all files of a folder in one commit; arguments, result and errors as `push_to_hub`'s."""
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
    )
    return commit.commit_url
