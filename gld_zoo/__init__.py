"""GLD students and teachers as timm models, the GLD loss, and local logits for any timm model.

Importing this package registers the `gld_*` models with timm and does nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gld_zoo.distillation.heads import GlobalLocal, global_local_logits
from gld_zoo.distillation.losses import GLDLoss, logit_kl
from gld_zoo.distillation.maps import global_local_features
from gld_zoo.distillation.relations import relation
from gld_zoo.models import cifar_resnet, cifar_wrn, gld_resnet  # noqa: F401  registers the models
from gld_zoo.version import __version__

__all__ = [
    "GLDLoss",
    "GLDTask",
    "GlobalLocal",
    "__version__",
    "create_deeplabv3plus",
    "create_ssd300",
    "global_local_features",
    "global_local_logits",
    "logit_kl",
    "relation",
]


if TYPE_CHECKING:
    from gld_zoo.distillation.task import GLDTask
    from gld_zoo.downstream.detection import create_ssd300
    from gld_zoo.downstream.segmentation import create_deeplabv3plus

# torchvision's and timm's training code is for those who ask for it
LAZY = dict(
    GLDTask="gld_zoo.distillation.task",
    create_deeplabv3plus="gld_zoo.downstream.segmentation",
    create_ssd300="gld_zoo.downstream.detection",
)
MODULES = ("downstream", "hub", "recipes", "results")


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(importlib.import_module(LAZY[name]), name)
    if name in MODULES:
        return importlib.import_module(f"gld_zoo.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY, *MODULES})
