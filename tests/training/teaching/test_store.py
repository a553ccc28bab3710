"""A teacher's store on the disk: whole views or none, hashes, parts, and whose it is."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from gld_zoo.training.common.disk import replacing
from gld_zoo.training.common.errors import DiskError, HeldError, StoreError
from gld_zoo.training.teaching import store as teaching_store
from gld_zoo.training.teaching.key import key_of
from gld_zoo.training.teaching.store import DamagedStoreError, Store

COUNT, SHAPE = 10, (4, 3)


def info(**made_of):
    kept = dict(what="logits", dtype="float16", shape=list(SHAPE))
    made_of = dict(dict(views=2, teacher="abc", count=COUNT, kept=kept), **made_of)
    return dict(key=key_of(made_of), made_of=made_of)


@pytest.fixture
def store(tmp_path):
    opened = Store.open(tmp_path / "store", info())
    assert opened.begin_writing() is None
    return opened


def rows(view=0):
    return torch.arange(COUNT * 12).reshape(COUNT, *SHAPE).half() + 100 * view


def fill(store, view=0):
    for part in torch.arange(COUNT).split(4):
        store.write_part(view, part, rows(view)[part])
    store.join(view, torch.float16)


def test_a_view_is_complete_once_it_is_joined(store):
    assert store.complete() == []
    store.write_part(0, torch.tensor([3, 1]), rows()[[3, 1]], seconds=1.5)
    assert store.missing(0).tolist() == [0, 2, 4, 5, 6, 7, 8, 9]
    assert store.missing(1).tolist() == list(range(COUNT))
    assert store.complete() == []
    rest = store.missing(0)
    store.write_part(0, rest, rows()[rest], seconds=2.5)
    store.join(0, torch.float16, processes=2)
    assert store.complete() == [0]
    record = store.record(0)
    assert (record["seconds"], record["head"], record["processes"]) == (4.0, None, 2)
    assert torch.equal(store.rows(0), rows())
    assert not list((store.folder / "parts").iterdir())
    store.check(0)
    again = Store.read(store.folder)
    assert torch.equal(again.rows(0), rows())


def test_the_newest_part_counts(store):
    store.write_part(0, torch.arange(COUNT), rows(1))
    (path,) = (store.folder / "parts").iterdir()
    os.utime(path, (1, 1))
    store.write_part(0, torch.tensor([2]), rows()[[2]])
    store.join(0, torch.float16)
    assert torch.equal(store.rows(0)[2], rows()[2])
    assert torch.equal(store.rows(0)[3], rows(1)[3])


def test_a_view_of_which_a_part_is_lost_is_not_complete(store):
    store.write_part(0, torch.arange(4), rows()[:4])
    with pytest.raises(StoreError, match="lacks 6 rows of view 0"):
        store.join(0, torch.float16)
    assert store.complete() == []


def test_parts_of_another_head_are_as_if_they_were_not_there(store):
    store.write_part(0, torch.arange(4), rows()[:4])
    store.head = "x"
    assert len(store.missing(0)) == COUNT
    fill(store)
    assert store.record(0)["head"] == "x"


@pytest.mark.parametrize("fault", ["flipped", "cut", "empty", "no parts"])
def test_a_part_that_is_damaged_is_as_if_it_were_not_there(store, fault):
    store.write_part(0, torch.arange(4), rows()[:4])
    (path,) = (store.folder / "parts").iterdir()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    changed = dict(flipped=bytes(content), cut=bytes(content[:-5]), empty=b"")
    if fault == "no parts":
        path.unlink()
    else:
        path.write_bytes(changed[fault])
    assert len(store.missing(0)) == COUNT


def test_every_flipped_bit_of_a_view_is_found(store):
    fill(store)
    path = store.path(0)
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(StoreError, match="is damaged"):
            store.check(0)
    path.write_bytes(content)
    store.check(0)


@pytest.mark.parametrize("lost", ["view-000.json", "view-000.safetensors"])
def test_half_a_view_is_none(store, lost):
    fill(store)
    (store.folder / lost).unlink()
    assert (store.complete(), store.half_complete()) == ([], [0])
    fill(store)  # and it can be made anew
    assert store.complete() == [0]


def test_a_view_whose_record_is_cut_is_none(store):
    fill(store)
    path = store.path(0).with_suffix(".json")
    path.write_text(path.read_text()[:20])
    assert store.complete() == []


def test_a_damaged_view_is_set_aside(store):
    fill(store)
    store.forget(0)
    assert store.complete() == []
    assert store.path(0).with_suffix(".damaged").is_file()
    fill(store)
    assert not store.path(0).with_suffix(".damaged").is_file()


def test_a_view_of_other_rows_under_its_name_is_refused(store):
    fill(store)
    record = json.loads(store.path(0).with_suffix(".json").read_text())
    other = Store(store.folder, info(count=COUNT + 1))
    assert other.record(0) == record
    with pytest.raises(StoreError, match="not those of 11 images"):
        other.rows(0)


def test_a_store_of_other_rows_is_refused_with_what_differs(store):
    with pytest.raises(StoreError, match=r"other rows.*teacher: abc there, xyz here.*or auto"):
        Store.open(store.folder, info(teacher="xyz"))


@pytest.mark.parametrize("is_held", [False, True])
def test_of_two_stores_begun_at_once_in_a_folder_the_second_is_refused(
    tmp_path, monkeypatch, is_held
):
    first, second = (Store.open(tmp_path / "store", info(seed=seed)) for seed in (0, 1))
    assert first.begin_writing() is None
    fill(first)
    if is_held:

        def held(path):
            raise HeldError("process 1 on there")

        monkeypatch.setattr(teaching_store, "lock", held)
        assert second.begin_writing() == "process 1 on there is writing it"
    else:
        with pytest.raises(StoreError, match=r"holds other rows than this run's .*seed"):
            second.begin_writing()
    with pytest.raises(StoreError, match=r"holds other rows than this run's .*seed"):
        second.check_own()
    first.check_own()
    assert Store.read(tmp_path / "store").info == info(seed=0)


def test_a_view_that_the_disk_does_not_give_is_not_called_damaged(store, monkeypatch):
    fill(store)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(teaching_store, "sha256", refuse)
    with pytest.raises(DiskError, match=r"view-000\.safetensors cannot be read: Permission denied"):
        store.check(0)
    assert store.complete() == [0]


def test_rows_can_be_read_by_whom_the_umask_lets(store):
    store.write_part(1, torch.arange(2), rows()[:2])
    fill(store)
    (store.folder / "plain").touch()
    mode = (store.folder / "plain").stat().st_mode
    written = list(store.folder.rglob("*.safetensors"))
    assert len(written) == 2
    assert all(path.stat().st_mode == mode for path in written)


def test_what_a_kill_leaves_of_files_being_written_is_removed(store):
    fill(store)
    left = [store.folder / ".tmpAbC123", store.folder / "parts" / ".tmpXyZ789"]
    for path in left:
        path.write_text("half a view")
    assert Store.read(store.folder).begin_writing() is None
    assert not any(path.exists() for path in left)
    assert store.complete() == [0]


def test_a_file_whose_writing_is_interrupted_is_as_before(tmp_path):
    path = tmp_path / "view.json"
    path.write_text("whole")

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [each.name for each in tmp_path.iterdir()] == ["view.json"]
    assert path.read_text() == "whole"


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="no teacher's store and not empty"):
        Store.open(tmp_path, info())
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", ".store.json.partial"], ["parts"]])
def test_what_a_kill_leaves_before_a_store_is_described_is_no_store(tmp_path, left):
    for name in left:
        path = tmp_path / name
        path.mkdir() if name == "parts" else path.write_text("x")
    opened = Store.open(tmp_path, info())
    assert opened.begin_writing() is None
    fill(opened)
    assert Store.read(tmp_path).complete() == [0]


def test_a_number_changed_in_the_description_is_found(store):
    changed = json.loads((store.folder / "store.json").read_text())
    changed["made_of"]["count"] += 1
    (store.folder / "store.json").write_text(json.dumps(changed))
    with pytest.raises(DamagedStoreError, match="changed since it was written"):
        Store.read(store.folder)


def test_a_description_that_cannot_be_read_is_not_called_damaged(store, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(DiskError, match="cannot be read: Permission denied"):
        Store.read(store.folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"made_of": {}, "key": "x"}'])
def test_a_damaged_description_is_named_and_nothing_is_read(store, content):
    (store.folder / "store.json").write_text(content)
    for read in (lambda: Store.read(store.folder), lambda: Store.open(store.folder, info())):
        with pytest.raises(StoreError, match=r"store.json is damaged"):
            read()


def test_a_folder_without_a_store_is_told_of(tmp_path):
    with pytest.raises(StoreError, match="gld-zoo store build makes one"):
        Store.read(tmp_path)


def test_rows_are_read_from_the_disk_as_they_are_used(store):
    fill(store)
    whole = load_file(store.path(0))["rows"]
    assert torch.equal(store.rows(0)[[7, 2]], whole[[7, 2]])
