"""To the hub and back, through real huggingface_hub and a stand-in for its server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import gld_zoo
from gld_zoo.hub import save_pretrained
from helpers import BUNDLED
from hub_server import serve

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
for number, name in enumerate(sys.argv[2:]):
    model = timm.create_model(name, pretrained=True).eval()
    save_file(dict(model.state_dict()), f"{sys.argv[1]}-{number}.safetensors")
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


REFUSED = """
import sys, timm, gld_zoo
for name in sys.argv[1:]:
    try:
        timm.create_model(name, pretrained=True)
    except Exception as error:
        print(type(error).__name__, error)
"""
PUSH_DATASET = f"""
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("someone/images", repo_type="dataset")
api.upload_folder(repo_id="someone/images", repo_type="dataset", folder_path={str(BUNDLED)!r})
"""
PULL_DATASET = """
import sys
from gld_zoo.training.data.sources import ImageSource
for streaming in (False, True):
    source = ImageSource("someone/images", streaming=streaming)
    row = next(iter(source.train.table))
    image = source.train.read(row[source.train.image_column], "here")
    print(len(source.train), len(source.test), len(source.label_names), image.size)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with serve() as (server, address):
        printed = run(PUSH, tmp_path_factory.mktemp("pusher"), address)
        yield server, address, printed.strip().rpartition("/")[2]


@pytest.mark.slow
def test_what_is_pushed_is_safe_and_complete(hub):
    server, _, commit = hub
    files = server.files["someone/mine"][commit]
    assert set(files) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert json.loads(files["config.json"])["architecture"] == "gld_wrn16_1"
    assert sum("/commit/" in path for path in server.requests) == 1


@pytest.mark.slow
def test_what_is_pulled_into_an_empty_cache_is_what_was_pushed(hub, tmp_path):
    _, address, commit = hub
    names = ["hf-hub:someone/mine", f"hf-hub:someone/mine@{commit}"]
    nowhere = "http://127.0.0.1:9"
    run(PULL, tmp_path / "home", address, tmp_path / "pulled", *names)
    run(PULL, tmp_path / "home", nowhere, tmp_path / "again", *names)  # without a network
    original = timm.create_model(NAME, pretrained=True).state_dict()
    for number in range(len(names)):
        files = [tmp_path / f"{name}-{number}.safetensors" for name in ("pulled", "again")]
        pulled = load_file(files[0])
        assert pulled.keys() == original.keys()
        assert all(torch.equal(pulled[key], original[key]) for key in pulled)
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_what_is_not_there_is_named(hub, tmp_path):
    _, address, _ = hub
    names = ["hf-hub:someone/other", "hf-hub:someone/mine@v9"]
    found = run(REFUSED, tmp_path, address, *names)
    for words in ("RepositoryNotFoundError", "someone/other", "RevisionNotFoundError", "v9"):
        assert words in found


@pytest.mark.slow
def test_a_broken_download_is_never_used(hub, tmp_path):
    server, address, _ = hub
    server.corrupt = True
    try:
        run(PULL, tmp_path / "home", address, tmp_path / "x", "hf-hub:someone/mine", fails=True)
    finally:
        server.corrupt = False
    assert not (tmp_path / "x-0.safetensors").exists()
    assert not list((tmp_path / "home").rglob("snapshots/*/model.safetensors"))
    run(PULL, tmp_path / "home", address, tmp_path / "x", "hf-hub:someone/mine")
    assert (tmp_path / "x-0.safetensors").exists()


@pytest.mark.slow
def test_a_finished_run_goes_to_the_hub_and_comes_back(hub, student_run, tmp_path):
    server, address, _ = hub
    code = """
import sys
from gld_zoo.training.commands.export import cli
cli(sys.argv[1:])
"""
    folder = tmp_path / "out"
    arguments = [student_run, folder, "--push", "someone/run", "--license", "mit"]
    printed = run(code, tmp_path / "home", address, *arguments)
    assert f"{address}/someone/run/commit/" in printed
    files = server.files["someone/run"]["main"]
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == {".gitattributes": b"", **written}
    run(PULL, tmp_path / "home", address, tmp_path / "pulled", "hf-hub:someone/run")
    pulled, last = (
        load_file(path)
        for path in (tmp_path / "pulled-0.safetensors", student_run / "last" / "model.safetensors")
    )
    assert all(torch.equal(pulled[key], last[key]) for key in last.keys() | pulled.keys())
    # an address where nobody answers: the folder stays, and the error says how to go on
    arguments = [student_run, tmp_path / "other", "--push", "someone/run"]
    nowhere = "http://127.0.0.1:9"
    error = run(code, tmp_path / "home", nowhere, *arguments, fails=True)
    assert error.startswith("error: ")
    assert "is written but not pushed: [Errno 111]" in error
    assert f"hf upload someone/run {tmp_path / 'other'}" in error
    assert (tmp_path / "other" / "model.safetensors").is_file()


@pytest.mark.slow
def test_datasets_come_by_hub_id_copied_and_streamed(hub, tmp_path):
    _, address, _ = hub
    run(PUSH_DATASET, tmp_path / "pusher", address)
    printed = run(PULL_DATASET, tmp_path / "home", address)
    assert printed.splitlines() == 2 * ["2000 1000 100 (32, 32)"]


PUSH_UNMEASURED = """
import sys, timm, gld_zoo
model = timm.create_model("gld_wrn16_1", pretrained=True)
for repo in sys.argv[1:]:
    gld_zoo.hub.push_to_hub(model, repo, label_names=list(map(str, range(100))))
"""


@pytest.mark.slow
def test_a_model_of_which_nothing_was_measured_says_so_and_keeps_a_card_that_is_there(
    hub, tmp_path
):
    server, address, _ = hub
    server.files["someone/told"] = {}
    server.commit("someone/told", {"README.md": b"mine"})
    run(PUSH_UNMEASURED, tmp_path, address, "someone/untold", "someone/told")
    card = server.files["someone/untold"]["main"]["README.md"].decode()
    assert "**Results.** Nothing was measured." in card
    assert "model-index" not in card
    assert "{" not in card.partition("```bibtex")[0]
    told = server.files["someone/told"]["main"]
    assert told["README.md"] == b"mine"
    assert "model.safetensors" in told


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
