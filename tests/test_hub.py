"""What `save_pretrained` writes is what timm reads, and no more."""

import json
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from gld_zoo import hub
from gld_zoo.downstream.saving import create_backbone
from gld_zoo.hub import create_model, is_run, save_pretrained


@pytest.mark.parametrize("name", ["gld_resnet20", "gld_wrn16_1", "resnet18"])
@torch.no_grad()
def test_round_trip_keeps_every_bit(tmp_path, name):
    model = timm.create_model(name, num_classes=5).eval().to(memory_format=torch.channels_last)
    folder = save_pretrained(model, tmp_path / "hub", label_names=list("abcde"))
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json"}
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(images), model.to(memory_format=torch.contiguous_format)(images))
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_config_holds_preprocessing_and_names_and_no_second_num_classes(tmp_path):
    model = timm.create_model("gld_resnet20", num_classes=2, in_chans=1)
    data_config = dict(input_size=(1, 48, 48), mean=(0.5,), std=(0.25,), crop_pct=0.9)
    save_pretrained(model, tmp_path, label_names=["cat", "dog"], data_config=data_config)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["label_names"] == ["cat", "dog"]
    assert config["num_classes"] == 2
    assert "num_classes" not in config.get("model_args", {})  # transformers would pass it twice
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    resolved = timm.data.resolve_model_data_config(loaded)
    assert tuple(resolved["input_size"]) == (1, 48, 48)
    assert tuple(resolved["mean"]) == (0.5,)
    assert resolved["crop_pct"] == 0.9


def test_weights_do_not_go_by_the_tag_of_those_that_ship(tmp_path):
    save_pretrained(timm.create_model("gld_wrn16_1"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "gld_wrn16_1"
    assert "tag" not in config["pretrained_cfg"]


def test_wrong_number_of_names_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="3 label_names for a model of 5 classes"):
        save_pretrained(
            timm.create_model("gld_resnet20", num_classes=5),
            tmp_path / "hub",
            label_names=list("abc"),
        )
    assert not (tmp_path / "hub").exists()


def drop(file):
    tensors = load_file(file)
    del tensors["fc.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def reshape(file):
    save_file(dict(load_file(file), **{"fc.weight": torch.zeros(8, 3)}), file)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (drop, r'Missing key\(s\) in state_dict: "fc.weight"'),
        (reshape, r"size mismatch for fc.weight.*\[8, 3\].*\[5, 64\]"),
        (cut, r"file of weights is damaged \(.*\); download or export it again"),
        (Path.unlink, "No suitable checkpoints found in"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(tmp_path, spoil, reason):
    save_pretrained(timm.create_model("gld_resnet20", num_classes=5), tmp_path)
    spoil(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        create_model(f"local-dir:{tmp_path}", pretrained=True)


def rename(file):
    tensors = {f"model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_backbone_of_other_weights_is_refused(tmp_path):
    save_pretrained(timm.create_model("gld_resnet20", num_classes=5), tmp_path)
    rename(tmp_path / "model.safetensors")
    name = f"local-dir:{tmp_path}"
    with pytest.raises(ValueError, match="Missing key"):
        create_backbone(name, (4,), pretrained=True)
    create_backbone(name, (4,), pretrained=False)


def test_a_run_folder_is_a_backbone(tmp_path, monkeypatch):
    run = tmp_path / "run"
    save_pretrained(timm.create_model("gld_resnet18", num_classes=5), run / "last")
    (run / "recipe.yaml").write_text("student: gld_resnet18\n")
    monkeypatch.chdir(tmp_path)
    for name in ("run", str(run), f"local-dir:{run}/last"):
        body, again = create_backbone(name, (8, 16), pretrained=True)
        assert again["backbone"] == "gld_resnet18"
        assert len(body(torch.zeros(1, 3, 64, 64))) == 2


def test_names_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown model .*; near it are .*gld_resnet20"):
        create_model("gld_resnet21")
    with pytest.raises(ValueError, match=r"tag \(none\).*; there are .*gld_wrn16_1\.ce_cifar100"):
        create_model("gld_wrn16_1.none", pretrained=True)
    with pytest.raises(ValueError, match="cannot find the requested files in the local cache"):
        create_model("hf-hub:someone/none", pretrained=True)  # the tests are offline


def test_a_name_that_timm_knows_is_meant_whatever_lies_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pretrained(timm.create_model("gld_resnet20", num_classes=5), "gld_resnet20")
    assert create_model("gld_resnet20").num_classes == 100
    assert create_model("./gld_resnet20", pretrained=True).num_classes == 5
    save_pretrained(timm.create_model("gld_resnet20", num_classes=5), "gld_resnet20.mine-0/last")
    for name in ("gld_resnet20", "gld_resnet20.mine-0"):
        (tmp_path / name / "recipe.yaml").write_text("student: gld_resnet20\n")
    assert create_model("gld_resnet20.mine-0", pretrained=True).num_classes == 5
    assert [is_run("gld_resnet20"), is_run("gld_resnet20.mine-0")] == [False, True]


def test_a_model_that_is_not_timms_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Linear is not a timm model"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def entry(**changes):
    run = dict(seed=0, commit=None, top1=1.0, top5=2.0, best_epoch=1, best_epoch_top1=1.0)
    results = dict(teacher=None, parameters=1, recipe="r", changes={}, precision="no")
    results.update(hardware="cpu", sha256="x", dataset="pets", runs=[run])
    return dict(results, **changes)


@pytest.mark.parametrize(
    ("dataset", "hub_id", "kind"),
    [
        ("cifar100", "uoft-cs/cifar100", "uoft-cs/cifar100"),
        ("someone/pets", "someone/pets", "someone/pets"),
        ("my pets", None, "my-pets"),
        ("my pets/ü", None, "my-pets-"),
    ],
)
def test_a_card_links_to_datasets_of_the_hub_alone(dataset, hub_id, kind):
    card = hub.model_card(timm.create_model("gld_resnet20"), entry(dataset=dataset), "org/name")
    assert card.data.datasets == ([hub_id] if hub_id else None)
    assert {result.dataset_type for result in card.data.eval_results} == {kind}


@pytest.mark.parametrize("licence", [None, "cc-by-nc-4.0"])
def test_card_and_config_state_the_same_licence(tmp_path, licence):
    model = timm.create_model("gld_resnet20", num_classes=5)
    save_pretrained(model, tmp_path, results=entry(license=licence))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_cfg"].get("license") == licence
    assert ModelCard.load(tmp_path / "README.md").data.license == licence


def test_a_card_names_what_the_model_began_with_and_its_teacher():
    start, teacher = "hf-hub:org/start@v2", "hf_hub:org/teacher"
    model = timm.create_model("gld_resnet20")
    results = entry(finetuned_from=start, teacher=teacher)
    card = hub.model_card(model, results, "org/name")
    assert card.data.base_model == ["org/start", "org/teacher"]
    assert f"fine-tuned from `{start}`, distilled by GLD from `{teacher}`" in card.text
    assert hub.model_card(model, entry(teacher="resnet18"), "org/name").data.base_model is None


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("gld_resnet20", "import timm, gld_zoo  # gld_zoo registers the architecture"),
        ("resnet10t", "import timm"),
    ],
)
def test_a_card_imports_what_registers_the_architecture(name, line):
    names = ["ant", *(f"class{number}" for number in range(24))]
    model = timm.create_model(name, num_classes=25)
    card = hub.model_card(model, None, "org/name", names)
    assert f"```python\n{line}\n\n" in card.text
    assert "It knows 25 classes: ant, class0, " in card.text
    assert "class18 and 5 others." in card.text


def test_a_card_tells_on_which_split_it_was_measured():
    model = timm.create_model("gld_resnet20")
    card = hub.model_card(model, entry(test_split="validation"), "org/name")
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}
    assert "pets, validation images, in" in card.text
    assert "best one on the validation images" in card.text


def test_a_card_of_results_that_lack_something_names_it(tmp_path):
    model = timm.create_model("gld_resnet20")
    with pytest.raises(ValueError, match=r"has no dataset, .*sha256, runs, runs\[0\].seed"):
        save_pretrained(model, tmp_path / "hub", results=dict(top1=90.0))
    assert not (tmp_path / "hub").exists()


def test_class_names_are_those_that_are_given(tmp_path):
    """A model of a hundred classes need not be of CIFAR-100's."""
    model = timm.create_model("gld_wrn16_1", pretrained=True)
    save_pretrained(model, tmp_path)
    assert "worm" not in (tmp_path / "config.json").read_text()
    save_pretrained(model, tmp_path, label_names=list(model.pretrained_cfg["label_names"]))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.pretrained_cfg["label_names"][99] == "worm"


def test_files_take_an_earlier_ones_place_whole(tmp_path, monkeypatch):
    save_pretrained(timm.create_model("gld_resnet20", num_classes=5), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(hub, "save_config_for_hf", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pretrained(timm.create_model("gld_resnet20", num_classes=9), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_is_written_can_be_read_by_whom_the_umask_lets(tmp_path):
    save_pretrained(timm.create_model("gld_resnet20"), tmp_path)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_the_saved_model_is_left_as_it_was(tmp_path):
    model = timm.create_model("gld_resnet20").to(memory_format=torch.channels_last).train()
    save_pretrained(model, tmp_path)
    assert model.training
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
