"""GLD students and teachers as timm models, the GLD loss, and local logits for any timm CNN.

Importing this package registers the `gld_*` models with timm and does nothing else.
"""

from gld_zoo import cifar_resnet, cifar_wrn, gld_resnet  # noqa: F401  registers the models
from gld_zoo.heads import GlobalLocal, global_local_logits
from gld_zoo.losses import GLDLoss, logit_kl
from gld_zoo.relations import relation
from gld_zoo.version import __version__

__all__ = [
    "GLDLoss",
    "GlobalLocal",
    "__version__",
    "global_local_logits",
    "logit_kl",
    "relation",
]
