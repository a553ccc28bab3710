"""What `save_pretrained` writes is what timm reads, and no more."""

import json

import pytest
import timm
import torch

from gld_zoo.hub import save_pretrained


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


def test_the_saved_model_is_left_as_it_was(tmp_path):
    model = timm.create_model("gld_resnet20").to(memory_format=torch.channels_last).train()
    save_pretrained(model, tmp_path)
    assert model.training
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
