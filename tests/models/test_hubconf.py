"""torch.hub on a checkout: from another folder, with the entry points alone."""

import os
import subprocess
import sys

import pytest
import timm
import torch

from helpers import CHECKOUT


def test_hub_lists_exactly_the_architectures():
    scope = {}
    exec((CHECKOUT / "hubconf.py").read_text(), scope)
    entries = {
        name for name, value in scope.items() if callable(value) and not name.startswith("_")
    }
    assert entries == set(timm.list_models("gld_*"))


@pytest.mark.slow
def test_hub_loads_from_another_folder(tmp_path):
    code = (
        "import torch\n"
        f"path = {str(CHECKOUT)!r}\n"
        "model = torch.hub.load(path, 'gld_resnet20', source='local', num_classes=7)\n"
        "assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


@pytest.mark.slow
def test_hub_lists_helps_and_loads_what_it_has_fetched(tmp_path):
    """torch.hub's own list and help take no local path: the checkout stands where it unpacks."""
    cache = tmp_path / "hub" / "someone_gld_zoo_main"
    cache.parent.mkdir()
    cache.symlink_to(CHECKOUT)
    code = (
        "import torch, sys\n"
        "hub = dict(github='someone/gld_zoo:main', trust_repo=True)\n"
        "print(*torch.hub.list(**hub))\n"
        "print(torch.hub.help(model='gld_wrn16_1', **hub))\n"
        "model = torch.hub.load('someone/gld_zoo:main', 'gld_wrn16_1', pretrained=True,\n"
        "                       trust_repo=True)\n"
        "print(model.num_classes)\n"
    )
    environment = dict(os.environ, TORCH_HOME=str(tmp_path))
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    listed, *text, classes = result.stdout.splitlines()
    assert set(listed.split()) == set(timm.list_models("gld_*"))
    assert "pretrained" in "\n".join(text)
    assert classes == "100"


@pytest.mark.parametrize("name", ["gld_resnet20", "gld_resnet18", "gld_wrn16_1"])
def test_hub_model_is_timms(name):
    model = torch.hub.load(str(CHECKOUT), name, source="local")
    assert model.state_dict().keys() == timm.create_model(name).state_dict().keys()
