"""The optimiser that a recipe names, and its state: all of it, or none of the optimiser."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from timm.utils import dispatch_clip_grad

from gld_zoo.distillation.heads import classifiers
from gld_zoo.training.common.errors import ModelError
from gld_zoo.training.config.options import Options

GROUP = "group/"  # before the number of a group; no parameter has a slash in its name
TRIAL_STEPS = 3  # before and after the trial's checkpoint
Tensors = dict[str, torch.Tensor]
Plain = dict[str, Any]  # what JSON holds


def build_optimizer(recipe: Options, model: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
    """Return the recipe's optimiser of a model's parameters that are not frozen.

    Args:
        recipe: The run's options.
        model: What is trained.
        fused: Whether to take torch's fused step, where the optimiser has one.

    Raises:
        ModelError: If timm has no such optimiser, it has not what the recipe sets, or its state
            does not come back from a checkpoint to the same bits.
    """
    optimizer = _create(recipe, model, fused=fused)
    if recipe.opt != "sgd":
        _check_comes_back(recipe)
    return optimizer


def _create(recipe: Options, model: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
    name = recipe.opt.lower().removeprefix("lookahead_")
    options = _options_of(recipe, name)
    if "fused" in _arguments_of(recipe, name):
        options["fused"] = fused
    plain = "momentum" if name == "sgd" and not recipe.nesterov else name
    # timm makes groups only of a whole model
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    grouped = recipe.layer_decay is not None or not recipe.decay_norm
    try:
        optimizer = create_optimizer_v2(
            model if grouped else weights,
            recipe.opt.lower().removesuffix(name) + plain,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            filter_bias_and_bn=not recipe.decay_norm,
            layer_decay=recipe.layer_decay,
            **options,
        )
    except (TypeError, ValueError) as error:  # as of Nesterov's momentum without a momentum
        raise ModelError(f"opt={recipe.opt!r} refuses what it is given: {error}") from error
    scales = {group.get("lr_scale", 1.0) for group in optimizer.param_groups}
    if recipe.layer_decay not in (None, 1.0) and len(scales) == 1:
        raise ModelError(
            f"layer_decay={recipe.layer_decay} finds no layers in this model; leave it out"
        )
    return optimizer


def check_optimizer(recipe: Options) -> None:
    """Refuse an optimiser that is not there, or options that it does not take.

    Raises:
        ModelError: If it is so; the message names the option.
    """
    _options_of(recipe, recipe.opt.lower().removeprefix("lookahead_"))


def _arguments_of(recipe: Options, name: str) -> Mapping[str, inspect.Parameter]:
    """Return what an optimiser of timm takes, by name."""
    if name not in list_optimizers():
        raise ModelError(
            f"opt={recipe.opt!r} is not an optimiser of timm; it has {', '.join(list_optimizers())}"
        )
    try:
        return inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters
    except (AssertionError, ImportError, RuntimeError) as error:  # of a package or a GPU
        raise ModelError(f"opt={recipe.opt!r} cannot be used here: {error}") from error


def _options_of(recipe: Options, name: str) -> dict[str, Any]:
    """Return the options that a recipe gives its optimiser beside those of all."""
    takes, info = _arguments_of(recipe, name), get_optimizer_info(name)
    if info.second_order:
        raise ModelError(
            f"opt={recipe.opt!r} needs second derivatives, which the trainer does not take"
        )
    if not info.has_momentum:
        _refuse_given(recipe, "momentum")
    if "nesterov" not in takes:
        _refuse_given(recipe, "nesterov")
    options: dict[str, Any] = {}
    if "nesterov" in takes and (recipe.nesterov or not name.startswith("n")):
        # of many it is timm's default; nesterov, nlars and the like say it by their name
        options["nesterov"] = recipe.nesterov
    if recipe.betas is not None:
        if not info.has_betas or len(recipe.betas) != info.num_betas:
            count = info.num_betas if info.has_betas else "none"
            raise ModelError(f"betas={recipe.betas}: opt={recipe.opt!r} has {count}; set as many")
        options["betas"] = tuple(recipe.betas)
    return options


def clip_gradients(recipe: Options, model: nn.Module) -> None:
    """Clip a model's gradients as the recipe says; nothing here waits for a device."""
    spared: set[int] = set()
    if recipe.clip_mode == "agc" and hasattr(model, "get_classifier"):
        parts = classifiers(model)  # which agc leaves alone
        spared = {id(weight) for part in parts for weight in part.parameters()}
    weights = [weight for weight in model.parameters() if id(weight) not in spared]
    dispatch_clip_grad(weights, recipe.clip_grad, mode=recipe.clip_mode)


def _refuse_given(recipe: Options, option: str) -> None:
    try:
        recipe.refuse(f"is not for opt={recipe.opt!r}, which has none; leave it out", option)
    except ValueError as error:
        raise ModelError(str(error)) from error


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[Tensors, dict[str, Plain]]:
    """Return an optimiser's tensors, by `<parameter>.<name>`, and its plain numbers.

    The numbers are `state`, of each parameter, and `groups`, of each group of parameters, whose
    tensors are named `group/<number>.<name>`.
    """
    state = optimizer.state_dict()["state"]
    tensors: Tensors = {}
    plain: dict[str, Any] = dict(state={}, groups=[])
    for index, (name, _) in enumerate(_named(optimizer, model)):
        for key, value in state.get(index, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}.{key}"] = value
            elif _is_plain(value):
                plain["state"].setdefault(name, {})[key] = value
    for number, group in enumerate(optimizer.param_groups):
        plain["groups"].append({})
        for key, value in group.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{GROUP}{number}.{key}"] = value
            elif _is_plain(value):  # what is not is a constant, or the trial finds it missing
                plain["groups"][number][key] = value
    return tensors, plain


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: Tensors,
    plain: dict[str, Any] | None,
) -> None:
    """Undo `optimizer_state`; each tensor takes its parameter's layout, as fused steps expect.

    Args:
        optimizer: Of the same recipe.
        model: The same one.
        tensors: What was saved of them.
        plain: What was saved beside them; None if it was by an earlier version, which saved SGD
            alone and its tensors by the number of their parameter.
    """
    named = list(_named(optimizer, model))
    numbers = {name: index for index, (name, _) in enumerate(named)}
    groups = optimizer.state_dict()["param_groups"]
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition(".")
        if name.startswith(GROUP):
            groups[int(name.removeprefix(GROUP))][entry] = value
            continue
        index = int(name) if plain is None else numbers[name]
        parameter = named[index][1]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)
        state.setdefault(index, {})[entry] = value
    if plain is not None:
        for name, values in plain["state"].items():
            state.setdefault(numbers[name], {}).update(values)
        for group, saved in zip(groups, plain["groups"], strict=True):
            group.update(saved)
    optimizer.load_state_dict(dict(state=state, param_groups=groups))


def _named(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters by name, in the order in which the optimiser numbers them."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    for group in optimizer.param_groups:
        for weight in group["params"]:
            yield names[id(weight)], weight


def _check_comes_back(recipe: Options) -> None:
    """Refuse an optimiser that steps otherwise once its state was saved and loaded."""
    with torch.random.fork_rng([]):
        unbroken, resumed = _Trial(recipe), _Trial(recipe)
        try:
            for step in range(TRIAL_STEPS):
                unbroken.step(step)
            resumed.load(unbroken)
            for step in range(TRIAL_STEPS, 2 * TRIAL_STEPS):
                unbroken.step(step)
                resumed.step(step)
            same = all(map(torch.equal, unbroken.weights(), resumed.weights()))
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise ModelError(_lost(recipe, f" ({type(error).__name__}: {error})")) from error
    if not same:
        raise ModelError(_lost(recipe, ""))


def _lost(recipe: Options, reason: str) -> str:
    return (
        f"opt={recipe.opt!r} does not come back from a checkpoint to the same bits{reason}; "
        "choose another, such as sgd, adamw, lamb or muon"
    )


class _Trial:
    """A few weights of each kind, trained by a recipe's optimiser on gradients that are given."""

    def __init__(self, recipe: Options) -> None:
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 6))
        model.pretrained_cfg = dict(classifier="2")  # by which timm finds layers
        self.model: nn.Module = model
        self.optimizer = _create(recipe, self.model, fused=True)

    def weights(self) -> list[torch.Tensor]:
        return list(self.model.parameters())

    def step(self, number: int) -> None:
        torch.manual_seed(1 + number)  # as the trainer does
        for weight in self.weights():
            weight.grad = torch.randn_like(weight)
        self.optimizer.step()

    def load(self, other: _Trial) -> None:
        tensors, plain = optimizer_state(other.optimizer, other.model)
        copies = {name: value.clone() for name, value in tensors.items()}
        load_optimizer_state(self.optimizer, self.model, copies, json.loads(json.dumps(plain)))
        self.model.load_state_dict(other.model.state_dict())
