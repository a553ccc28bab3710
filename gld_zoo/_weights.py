"""Where the weights that ship with the package lie."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def embedded(weights: str) -> dict[str, str]:
    """Return the timm pretrained cfg entry for the file of `weights` (arch.tag), if any."""
    return dict(file=str(WEIGHTS / f"{weights}.safetensors")) if weights else {}
