"""Checkpoints: whole or absent, verified, the newest kept; an optimiser goes on exactly."""

import json

import pytest
import torch
from torch import nn

from gld_zoo.training.common.errors import CheckpointError, DiskError
from gld_zoo.training.engine.optimizers import load_optimizer_state, optimizer_state
from gld_zoo.training.runs import checkpoints
from gld_zoo.training.runs.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint


def save(folder, epoch, keep=2):
    tensors = dict(
        model=dict(weight=torch.full((3, 3), float(epoch))),
        optimizer={"0.momentum_buffer": torch.ones(2)},
    )
    save_checkpoint(folder, f"epoch-{epoch:05d}", tensors, dict(epoch=epoch), keep=keep)


def test_round_trip_keeps_tensors_and_state(tmp_path):
    save(tmp_path, 3)
    tensors, state = load_checkpoint(tmp_path / "epoch-00003")
    assert torch.equal(tensors["model"]["weight"], torch.full((3, 3), 3.0))
    assert tensors["optimizer"].keys() == {"0.momentum_buffer"}
    assert state == dict(epoch=3)


def test_only_the_newest_are_kept_and_a_name_can_be_written_again(tmp_path):
    for epoch in (1, 2, 3, 3):
        save(tmp_path, epoch)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["epoch-00002", "epoch-00003"]


def test_a_crash_while_writing_leaves_the_earlier_ones(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_tensors", full_disk)
    with pytest.raises(DiskError, match="No space left on device; what was written before is"):
        save(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["epoch-00001"]
    monkeypatch.undo()
    save(tmp_path, 2)
    assert load_checkpoint(tmp_path / "epoch-00002")[1] == dict(epoch=2)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "emptied"])
def test_damage_is_noticed(tmp_path, name, damage):
    save(tmp_path, 1)
    path = tmp_path / "epoch-00001" / name
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-10])
    elif damage == "flipped":
        middle = len(content) - 5 if name != "state.json" else content.index(b"sha256")
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="epoch-00001 is damaged"):
        load_checkpoint(tmp_path / "epoch-00001")


def test_a_disk_that_does_not_answer_is_no_damage(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def stale(*args, **kwargs):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(checkpoints, "sha256", stale)
    with pytest.raises(DiskError, match="epoch-00001: Stale file handle; nothing was changed"):
        load_checkpoint(tmp_path / "epoch-00001")


def test_a_crash_while_dropping_old_ones_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def crash(path, *args, **kwargs):
        if "epoch-00001" in str(path) and path.exists():
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoints.shutil, "rmtree", crash)
    with pytest.raises(DiskError, match="Input/output error"):
        save(tmp_path, 2, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["epoch-00002"]
    monkeypatch.undo()
    save(tmp_path, 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-00003"]


def test_no_folder_holds_no_checkpoint(tmp_path):
    assert list_checkpoints(tmp_path / "none") == []


def test_a_checkpoint_is_no_pickle(tmp_path):
    save(tmp_path, 1)
    files = {path.name for path in (tmp_path / "epoch-00001").iterdir()}
    assert files == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert set(json.loads((tmp_path / "epoch-00001" / "state.json").read_text())) == {
        "epoch",
        "sha256",
        "state_sha256",
    }


def test_no_bit_of_the_state_can_change_unnoticed(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "epoch-00001" / "state.json"
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="epoch-00001 is damaged"):
            load_checkpoint(tmp_path / "epoch-00001")


def test_optimizer_goes_on_exactly(tmp_path):
    def steps(model, optimizer, count):
        for step in range(count):
            optimizer.zero_grad()
            (model.weight * (step + 1)).square().sum().backward()
            optimizer.step()

    def build():
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)

    model, optimizer = build()
    steps(model, optimizer, 3)
    tensors = dict(model=model.state_dict(), optimizer=optimizer_state(optimizer, model)[0])
    save_checkpoint(tmp_path, "epoch-00001", tensors, {}, keep=1)
    steps(model, optimizer, 2)
    other, other_optimizer = build()
    loaded, _ = load_checkpoint(tmp_path / "epoch-00001")
    other.load_state_dict(loaded["model"])
    plain = optimizer_state(optimizer, model)[1]
    load_optimizer_state(other_optimizer, other, loaded["optimizer"], plain)
    steps(other, other_optimizer, 2)
    assert torch.equal(model.weight, other.weight)
