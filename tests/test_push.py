"""To the hub and back, through real huggingface_hub and a stand-in for its server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_server import serve
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import gld_zoo
from gld_zoo.hub import save_pretrained

RESULTS = json.loads((Path(gld_zoo.__file__).parent / "results.json").read_text())["weights"]
NAME = "gld_wrn16_1.wrn16_2_cifar100"
PUSH = f"""
import json, sys, timm, gld_zoo
from pathlib import Path
from gld_zoo.hub import push_to_hub
results = json.loads((Path(gld_zoo.__file__).parent / "results.json").read_text())["weights"]
model = timm.create_model("{NAME}", pretrained=True)
print(push_to_hub(model, "someone/mine", results=results["{NAME}"]))
"""
PULL = """
import sys, timm, torch, gld_zoo
from safetensors.torch import save_file
model = timm.create_model(sys.argv[1], pretrained=True).eval()
save_file(dict(model.state_dict()), sys.argv[2])
"""


def run(code, home, address, *arguments, fails=False, **environment):
    settings = dict(
        HF_ENDPOINT=address,
        HF_HOME=str(home),
        HF_TOKEN="hf_none",
        HF_HUB_DISABLE_XET="1",
        HF_HUB_OFFLINE="0",
        **environment,
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **settings},
    )
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result.stderr if fails else result.stdout


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with serve() as (server, address):
        printed = run(PUSH, tmp_path_factory.mktemp("pusher"), address)
        yield server, address, printed.strip().rpartition("/")[2]


def test_what_is_pushed_is_safe_and_complete(hub):
    server, _, commit = hub
    files = server.files["someone/mine"][commit]
    assert set(files) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert json.loads(files["config.json"])["architecture"] == "gld_wrn16_1"
    assert sum("/commit/" in path for path in server.requests) == 1


@pytest.mark.slow
@pytest.mark.parametrize("pinned", [False, True])
def test_what_is_pulled_into_an_empty_cache_is_what_was_pushed(hub, tmp_path, pinned):
    _, address, commit = hub
    name = "hf-hub:someone/mine" + (f"@{commit}" if pinned else "")
    run(PULL, tmp_path / "home", address, name, tmp_path / "pulled.safetensors")
    pulled = load_file(tmp_path / "pulled.safetensors")
    original = timm.create_model(NAME, pretrained=True).state_dict()
    assert pulled.keys() == original.keys()
    assert all(torch.equal(pulled[key], original[key]) for key in pulled)
    # and again without a network
    nowhere = "http://127.0.0.1:9"
    run(PULL, tmp_path / "home", nowhere, name, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "pulled.safetensors"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:someone/other", "someone/other"),
        ("hf-hub:someone/mine@v9", "v9"),
    ],
)
def test_what_is_not_there_is_named(hub, tmp_path, name, message):
    _, address, _ = hub
    error = run(PULL, tmp_path, address, name, tmp_path / "x", fails=True)
    assert message in error
    assert "NotFoundError" in error


@pytest.mark.slow
def test_a_broken_download_is_never_used(hub, tmp_path):
    server, address, _ = hub
    server.corrupt = True
    try:
        run(PULL, tmp_path / "home", address, "hf-hub:someone/mine", tmp_path / "x", fails=True)
    finally:
        server.corrupt = False
    assert not (tmp_path / "x").exists()
    assert not list((tmp_path / "home").rglob("snapshots/*/model.safetensors"))
    run(PULL, tmp_path / "home", address, "hf-hub:someone/mine", tmp_path / "x")
    assert (tmp_path / "x").exists()


@pytest.mark.parametrize("name", sorted(RESULTS))
def test_cards_hold_the_scores_in_the_hubs_own_form(tmp_path, name):
    model = timm.create_model(name, pretrained=True)
    folder = save_pretrained(model, tmp_path, results=RESULTS[name], repo_id="org/name")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "timm"
    scores = {result.metric_name: result.metric_value for result in card.data.eval_results}
    run = RESULTS[name]["runs"][0]
    assert scores == {"Top-1": run["top1"], "Top-5": run["top5"]}
    assert all(result.dataset_type == "uoft-cs/cifar100" for result in card.data.eval_results)
    assert f"top-1 {run['top1']:.2f} %" in card.text
    assert "hf-hub:org/name" in card.text
    assert "{" not in card.text.partition("```bibtex")[0]
