"""torch.hub on a checkout: from another folder, with the entry points alone."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

CHECKOUT = Path(__file__).parent.parent


def test_hub_lists_exactly_the_architectures():
    scope = {}
    exec((CHECKOUT / "hubconf.py").read_text(), scope)
    entries = {
        name for name, value in scope.items() if callable(value) and not name.startswith("_")
    }
    assert entries == set(timm.list_models("gld_*"))


def test_hub_loads_from_another_folder(tmp_path):
    code = (
        "import torch\n"
        f"path = {str(CHECKOUT)!r}\n"
        "model = torch.hub.load(path, 'gld_resnet20', source='local', num_classes=7)\n"
        "assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


@pytest.mark.parametrize("name", ["gld_resnet20", "gld_resnet18", "gld_wrn16_1"])
def test_hub_model_is_timms(name):
    model = torch.hub.load(str(CHECKOUT), name, source="local")
    assert model.state_dict().keys() == timm.create_model(name).state_dict().keys()
