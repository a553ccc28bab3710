"""Any teacher, asked once: what is kept of its answers never changes what a student learns."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from datasets import Features, Image, load_dataset
from torchvision.transforms import v2

from gld_zoo.distillation.teacher import Teacher
from gld_zoo.hub import save_pretrained
from gld_zoo.predictor import create_predictor
from gld_zoo.training.build.create import create_frozen
from gld_zoo.training.commands import store as store_command
from gld_zoo.training.common import disk
from gld_zoo.training.common.errors import DiskError
from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.data.batches import Share
from gld_zoo.training.engine.trainer import Trainer
from gld_zoo.training.runs.run_folder import RunFolder
from gld_zoo.training.tasks import relations
from gld_zoo.training.tasks.distiller import Distiller
from gld_zoo.training.teaching import asking, taught, together
from gld_zoo.training.teaching import store as teaching_store
from gld_zoo.training.teaching.store import Store
from helpers import CHECKOUT, SMALL_RUN, launch, write_dataset


@pytest.fixture
def options(teacher_run, tiny_dataset):
    """A student of `teacher_run` on two views, batches that leave 16 of 64 images out."""
    teacher = f"local-dir:{teacher_run}/last"
    small = [*SMALL_RUN, "--teacher", teacher, "--dataset", tiny_dataset, "--views", 2]
    return [*small, "--epochs", 4, "--batch_size", 24, "--store_dtype", "float32"]


def weights(run):
    return (run / "last" / "model.safetensors").read_bytes()


def trainer_of(folder, **values):
    recipe = Recipe(student="gld_wrn16_1", epochs=2, batch_size=24, lr=0.05, threads=1, **values)
    trainer = Trainer(
        Distiller(recipe, Accelerator(cpu=True)), RunFolder(folder, recipe, resume=False)
    )
    folder.mkdir()
    trainer.task.prepare(folder)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_store_gives_the_rows_and_the_losses_of_the_living_teacher(
    teacher_run, tiny_dataset, tmp_path, in_memory
):
    """To the bit in float32, in batches of the same images; in float16 within its rounding."""
    values = dict(teacher=f"local-dir:{teacher_run}/last", dataset=str(tiny_dataset), views=2)
    values |= dict(workers=0, in_memory=None if in_memory else False)
    losses, rows = {}, {}
    for name, kept in (
        ("living", {}),
        ("asked", dict(teacher_store=str(tmp_path / "store"), store_dtype="float32")),
        ("read", dict(teacher_store=str(tmp_path / "store"), store_dtype="float32")),
        ("halves", dict(teacher_store=str(tmp_path / "halves"))),
    ):
        trainer = trainer_of(tmp_path / name, **values, **kept)
        losses[name], rows[name] = [], []
        for epoch in range(10):  # of two steps
            trainer.task.begin_epoch(epoch)
            trainer.task.network.train()
            for images, target, *numbers in trainer.data.train.epoch(epoch):
                rows[name].append(trainer.task.taught_by.rows(images, *(numbers or [None])))
                terms, _ = trainer.step(images, target, *numbers)
                losses[name].append(terms["loss"].item())
            trainer.task.end_epoch(epoch)
    assert len(losses["living"]) == 20
    assert losses["asked"] == losses["read"]
    same_batches = slice(0, 4)  # the first pass; then rows were asked for beside other images
    assert losses["asked"][same_batches] == losses["living"][same_batches]
    for ours, theirs in zip(rows["read"], rows["living"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    assert losses["read"] == pytest.approx(losses["living"], rel=1e-4)
    for ours, theirs in zip(rows["halves"], rows["living"], strict=True):  # 11 bits
        torch.testing.assert_close(
            ours, theirs, rtol=2**-10, atol=2**-10 * theirs.abs().max().item()
        )
    assert losses["halves"][:5] == pytest.approx(losses["living"][:5], rel=1e-2)


@pytest.mark.slow
def test_a_store_changes_no_bit_of_its_own_and_holds_the_images_that_batches_leave_out(
    options, tmp_path, distill
):
    folder = tmp_path / "store"
    kept = [*options, "--teacher_store", folder]
    first = distill(*kept, "--run", tmp_path / "first")
    assert "0 of 2 views complete" in first
    assert f"view 2 of 2 is kept in {folder}" in first
    second = distill(*kept, "--run", tmp_path / "second")
    assert "2 of 2 views complete" in second
    assert "is kept in" not in second
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    store_command.cli(["verify", str(folder), "--sample", "64"])  # all images, the 16 too


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", ["null", "false"])
def test_a_time_limit_within_a_view_changes_no_bit(options, tmp_path, distill, in_memory):
    reading = ["--in_memory", in_memory, "--workers", 0]
    kept = [*options, *reading, "--teacher_store"]
    distill(*kept, tmp_path / "whole", "--run", tmp_path / "unbroken")
    run, folder = ["--run", tmp_path / "run"], tmp_path / "store"
    output = distill(*kept, folder, *run, "--max_minutes", 0)
    assert "at step 1 of epoch 1" in output
    assert len(list((folder / "parts").glob("*.safetensors"))) == 1
    distill(*run, "--resume", "--max_minutes", 0)
    distill(*run, "--resume", "--max_minutes", "null")
    assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")
    assert torch.equal(Store.read(folder).rows(0), Store.read(tmp_path / "whole").rows(0))


@pytest.mark.slow
def test_a_kill_within_a_view_changes_no_bit(options, tmp_path, distill):
    kept = [*options, "--epochs", 6, "--checkpoint_minutes", 0, "--teacher_store"]
    distill(*kept, tmp_path / "whole", "--run", tmp_path / "unbroken")
    folder, run = tmp_path / "store", tmp_path / "run"
    command = [sys.executable, CHECKOUT / "train" / "distill.py", *kept, folder, "--run", run]
    environment = dict(os.environ, PYTHONPATH=str(CHECKOUT))
    process = subprocess.Popen([*map(str, command)], env=environment, stdout=subprocess.DEVNULL)
    while not list(folder.glob("parts/view-001-*.safetensors")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    distill("--run", run, "--resume")
    assert weights(run) == weights(tmp_path / "unbroken")
    store_command.cli(["verify", str(folder)])


@pytest.mark.slow
def test_two_processes_fill_and_read_the_store_of_one(options, tmp_path, distill):
    alone, two = tmp_path / "alone", tmp_path / "two"
    distill(*options, "--teacher_store", alone, "--run", tmp_path / "run1")
    output = launch(*options, "--teacher_store", two, "--run", tmp_path / "run2", processes=2)
    assert "view 2 of 2 is kept" in output
    stores = [Store.read(folder) for folder in (alone, two)]
    assert stores[0].info["key"] == stores[1].info["key"]
    for view in range(2):
        ours, theirs = (store.rows(view) for store in stores)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    output = launch(*options, "--teacher_store", alone, "--run", tmp_path / "run3", processes=2)
    assert "2 of 2 views complete" in output


def refuse_writing(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at once", "at a part", "at the join"])
def test_a_disk_that_refuses_costs_the_store_and_no_bit(
    options, tmp_path, distill, monkeypatch, when
):
    distill(*options, "--teacher_store", tmp_path / "good", "--run", tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        if when == "at once":
            patch.setattr(teaching_store, "lock", refuse_writing)
        else:
            save = teaching_store.save_tensors

            def full(tensors, *others, **named):
                if when == "at a part" or set(tensors) == {"rows"}:
                    refuse_writing()
                save(tensors, *others, **named)

            patch.setattr(teaching_store, "save_tensors", full)
        kept = ["--teacher_store", tmp_path / "full", "--run", tmp_path / "run"]
        output = distill(*options, *kept)
    assert output.count("it is left as it is") == 1
    assert os.strerror(errno.ENOSPC) in output
    assert "0 of 2 views complete" in output
    assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")
    output = distill(*options, "--teacher_store", tmp_path / "full", "--run", tmp_path / "again")
    assert "view 2 of 2 is kept" in output
    assert weights(tmp_path / "again") == weights(tmp_path / "unbroken")


def test_a_disk_that_refuses_the_head_costs_the_store(tiny_dataset, tmp_path, distill, monkeypatch):
    teacher = vision_transformer(tmp_path / "teacher", 7)
    fit = [*SMALL_RUN, "--teacher", teacher, "--dataset", tiny_dataset, "--teacher_head", "fit"]
    fit += ["--views", 2, "--teacher_store", tmp_path / "store"]
    save = taught.save_head

    def full(head, place):
        if place.parent == tmp_path / "store":
            raise DiskError("No space left on device")
        save(head, place)

    monkeypatch.setattr(taught, "save_head", full)
    output = distill(*fit, "--run", tmp_path / "run")
    assert "it is left as it is (No space left on device)" in output
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_a_complete_store_on_a_disk_that_cannot_be_written_is_read(
    options, tmp_path, distill, monkeypatch
):
    kept = [*options, "--teacher_store", tmp_path / "store"]
    distill(*kept, "--run", tmp_path / "first")

    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(teaching_store, "lock", read_only)
    monkeypatch.setattr(asking.AskedOnce, "ask", None)  # nobody does
    output = distill(*kept, "--run", tmp_path / "second")
    assert "2 of 2 views complete" in output
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    monkeypatch.undo()
    monkeypatch.setattr(teaching_store, "lock", read_only)
    store_command.cli(["build", *map(str, kept)])  # there is nothing to write


@pytest.mark.slow
def test_a_store_that_another_run_writes_is_left_to_it(options, tmp_path, distill):
    distill(*options, "--teacher_store", tmp_path / "good", "--run", tmp_path / "unbroken")
    folder = tmp_path / "store"
    folder.mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path\n"
            "from gld_zoo.training.common.disk import lock\n"
            f"held = lock(Path({str(folder / '.lock')!r}))\n"
            "print('held', flush=True); time.sleep(99)",
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(CHECKOUT)),
    )
    assert holder.stdout.readline() == "held\n"
    output = distill(*options, "--teacher_store", folder, "--run", tmp_path / "run")
    holder.kill()
    holder.wait()
    assert f"process {holder.pid}" in output
    assert "is writing it" in output
    assert [path.name for path in folder.iterdir()] == [".lock"]
    assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")


@pytest.mark.slow
def test_a_damaged_view_is_named_and_made_anew(options, tmp_path, distill):
    folder = tmp_path / "store"
    distill(*options, "--teacher_store", folder, "--run", tmp_path / "first")
    path = folder / "view-001.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)
    output = distill(*options, "--teacher_store", folder, "--run", tmp_path / "second")
    assert f"{path} is damaged: it is not what was written; the teacher is asked" in output
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    store_command.cli(["verify", str(folder)])


@pytest.mark.slow
def test_a_view_that_cannot_be_read_for_once_is_asked_for_and_kept(
    options, tmp_path, distill, monkeypatch
):
    folder = tmp_path / "store"
    distill(*options, "--teacher_store", folder, "--run", tmp_path / "first")
    content = (folder / "view-001.safetensors").read_bytes()
    read = teaching_store.sha256

    def fails_once(path):
        if path.name == "view-001.safetensors":
            monkeypatch.setattr(teaching_store, "sha256", read)
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(teaching_store, "sha256", fails_once)
    monkeypatch.setattr(Store, "forget", lambda *_: pytest.fail("a view is given up"))
    output = distill(*options, "--teacher_store", folder, "--run", tmp_path / "second")
    assert "view-001.safetensors cannot be read: Input/output error; the teacher is asked" in output
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    assert (folder / "view-001.safetensors").read_bytes() == content
    store_command.cli(["verify", str(folder)])


@pytest.mark.slow
def test_a_description_that_cannot_be_read_for_once_costs_no_run(
    options, tmp_path, distill, monkeypatch, capsys
):
    folder = tmp_path / "store"
    distill(*options, "--teacher_store", folder, "--run", tmp_path / "first")
    read, count = Store.read.__func__, 0

    def fails_once(cls, place):
        nonlocal count
        count += 1
        if count == 4:  # at the start of an epoch
            raise DiskError(f"{place}/store.json cannot be read: Input/output error")
        return read(cls, place)

    monkeypatch.setattr(Store, "read", classmethod(fails_once))
    output = distill(*options, "--teacher_store", folder, "--run", tmp_path / "second")
    assert "store.json cannot be read: Input/output error; the teacher is asked" in output
    assert weights(tmp_path / "first") == weights(tmp_path / "second")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(teaching_store, "sha256", refuse)
    with pytest.raises(SystemExit) as stop:
        store_command.cli(["verify", str(folder)])
    assert "the disk does not give all views" in str(stop.value.code)
    assert "cannot be read: Permission denied" in capsys.readouterr().out


def test_verify_finds_one_flipped_bit(options, tmp_path, distill, capsys):
    folder = tmp_path / "store"
    distill(*options, "--teacher_store", folder, "--run", tmp_path / "run")
    path = folder / "view-000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        store_command.cli(["verify", str(folder)])
    assert "not what was written" in str(stop.value.code)
    printed = capsys.readouterr().out
    assert f"view 1 of 2: {path} is damaged" in printed
    assert "view 2 of 2: whole" in printed
    record = path.with_suffix(".json")
    record.write_text(record.read_text().replace("sha256", "sha257"))
    with pytest.raises(SystemExit):
        store_command.cli(["verify", str(folder)])
    assert "view 1 of 2: damaged" in capsys.readouterr().out


def test_verify_tells_rows_of_another_teacher(options, tmp_path, distill, capsys):
    folder = tmp_path / "store"
    distill(*options, "--teacher_store", folder, "--run", tmp_path / "run")
    store = Store.read(folder)
    assert store.begin_writing() is None
    store.write_part(1, torch.arange(64), store.rows(1) + 1)
    store.join(1, torch.float32)
    with pytest.raises(SystemExit) as stop:
        store_command.cli(["verify", str(folder)])
    assert f"not this teacher's; delete {folder}" in str(stop.value.code)
    printed = capsys.readouterr().out
    assert "view 1 of 2: as the teacher answers now" in printed
    assert "view 2 of 2: not what the teacher answers" in printed
    with pytest.raises(SystemExit) as stop:
        store_command.cli(["verify", str(folder), "--teacher", "gld_wrn16_2.ce_cifar100"])
    assert stop.value.code != 0


@pytest.mark.slow
def test_build_then_runs_of_any_seed_share_a_store(options, tmp_path, distill, capsys):
    folder = tmp_path / "store"
    kept = [*options, "--teacher_store", folder, "--augment_seed", 7]
    store_command.cli(["build", *map(str, kept)])
    assert "2 of 2 complete" in capsys.readouterr().out
    for seed in (0, 1):
        output = distill(*kept, "--seed", seed, "--run", tmp_path / str(seed))
        assert "2 of 2 views complete" in output
    other = [*options, "--teacher_store", folder, "--augment_seed", 8, "--run", tmp_path / "other"]
    assert "augment_seed: 7 there, 8 here" in distill(*other, fails=True)
    store_command.cli(["info", str(folder), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["made_of"]["augment_seed"] == 7
    assert facts["images"] == 64


@pytest.mark.slow
def test_auto_is_a_folder_for_the_key_and_a_damaged_one_is_set_aside(
    options, tmp_path, distill, monkeypatch
):
    monkeypatch.setenv("GLD_ZOO_CACHE", str(tmp_path / "cache"))
    kept = [*options, "--teacher_store", "auto"]
    distill(*kept, "--run", tmp_path / "first")
    (folder,) = (tmp_path / "cache" / "teacher_stores").iterdir()
    assert Store.read(folder).info["key"].startswith(folder.name)
    for name in ("second", "third"):
        (folder / "store.json").write_text("{")
        output = distill(*kept, "--run", tmp_path / name)
        assert "store.json is damaged" in output
        assert "set aside" in output
        assert weights(tmp_path / "first") == weights(tmp_path / name)
        assert Store.read(folder).complete() == [0, 1]


def test_a_run_does_not_go_on_with_other_rounding(options, tmp_path, distill):
    kept = [*options, "--teacher_store", tmp_path / "store", "--run", tmp_path / "run"]
    distill(*kept, "--max_minutes", 0)
    moved = tmp_path / "moved"
    (tmp_path / "store").rename(moved)
    output = distill(*kept, "--resume", "--teacher_store", "null", "--max_minutes", 0, fails=True)
    assert "begun with kept_answers float32 and finds None now" in output
    distill(*kept, "--resume", "--teacher_store", moved, "--max_minutes", "null")


def vision_transformer(folder, classes):
    """Save a small transformer that classifies its class token; its weights are random."""
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=classes, depth=2)
    save_pretrained(model, folder)
    return f"local-dir:{folder}"


@pytest.mark.slow
def test_a_head_is_fitted_once_and_kept_in_the_run_and_in_the_store(
    tiny_dataset, tmp_path, distill, monkeypatch
):
    """A transformer of other classes and another size, whose class token has no cells."""
    teacher = vision_transformer(tmp_path / "teacher", 7)
    base = [*SMALL_RUN, "--teacher", teacher, "--dataset", tiny_dataset]
    output = distill(*base, "--run", tmp_path / "refused", fails=True)
    assert "has 7 classes and the dataset 4" in output
    fit = [*base, "--teacher_head", "fit", "--teacher_size", "own", "--image_size", 24]
    fit += ["--views", 2, "--teacher_store", tmp_path / "store"]
    output = distill(*fit, "--run", tmp_path / "run", "--max_minutes", 0)
    assert "fitting a linear head to what" in output
    assert "its head fitted to 64 training images (L2 " in output
    assert "of its cells alone" in output
    facts = json.loads((tmp_path / "run" / "teacher_head.json").read_text())
    assert facts["images"] == 64
    assert f"top-1 {facts['top1']:.2f} %" in output
    assert len(facts["cells"]) == 4
    assert (tmp_path / "store" / "teacher_head.safetensors").is_file()
    monkeypatch.setattr(taught, "fit_head", None)  # not again
    distill("--run", tmp_path / "run", "--resume", "--max_minutes", "null")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["teacher"]["head"]["penalty"] == facts["penalty"]
    assert len(summary["teacher"]["head"]["cells"]) == 4
    distill(*fit, "--run", tmp_path / "second")
    heads = [
        (tmp_path / name / "teacher_head.safetensors").read_bytes() for name in ("run", "second")
    ]
    assert heads[0] == heads[1]
    teacher = create_predictor(str(tmp_path / "run" / "teacher_head.safetensors"))
    test = load_dataset(str(tiny_dataset), split="test")
    batch = torch.stack([teacher.transform(image.convert("RGB")) for image in test["img"]])
    guesses = teacher.rows(batch, 2).argmax(-1)
    right = (guesses == torch.tensor(test["fine_label"])[:, None]).double().mean(0) * 100
    assert right.tolist() == pytest.approx([facts["top1"], *facts["cells"]])
    assert torch.equal(teacher.logits(batch), teacher.rows(batch, 2)[:, 0])


def test_a_store_of_another_heads_logits_is_refused(tiny_dataset, tmp_path, distill):
    teacher = vision_transformer(tmp_path / "teacher", 7)
    fit = [*SMALL_RUN, "--teacher", teacher, "--dataset", tiny_dataset, "--teacher_head", "fit"]
    fit += ["--views", 1, "--teacher_store", tmp_path / "store", "--run"]
    distill(*fit, tmp_path / "first")
    fit += [tmp_path / "run"]
    distill(*fit, "--max_minutes", 0)
    for name in ("safetensors", "json"):
        path = tmp_path / "run" / f"teacher_head.{name}"
        if name == "safetensors":
            tensors = teaching_store.load_file(path)
            teaching_store.save_tensors(dict(tensors, bias=tensors["bias"] + 1), path)
        else:
            facts = dict(
                json.loads(path.read_text()), sha256=disk.sha256(path.with_suffix(".safetensors"))
            )
            path.write_text(json.dumps(facts))
    output = distill(*fit, "--resume", "--max_minutes", "null", fails=True)
    assert "holds the answers of another head" in output


def test_a_teacher_sees_the_pixels_resized_without_aliases(teacher_run):
    model = create_frozen(f"local-dir:{teacher_run}/last", torch.device("cpu"))
    teacher = Teacher(model, 2, (0.5,) * 3, (0.25,) * 3, size=20)
    pixels = torch.rand(2, 3, 32, 32)
    seen = teacher.prepare((pixels - 0.5) / 0.25)
    mode = v2.InterpolationMode(teacher.filter)
    small = v2.functional.resize(pixels, [20, 20], mode, antialias=True)
    mean, std = (
        torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std")
    )
    torch.testing.assert_close(seen, (small - mean) / std, rtol=1e-4, atol=1e-4)
    assert teacher(torch.randn(2, 3, 32, 32)).shape == (2, 5, 4)


@pytest.mark.parametrize(
    "kind",
    [
        "labelled",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("a column less", "a flat folder")
        ),
    ],
)
def test_relations_alone_teach_with_labels_or_without(rows, tmp_path, distill, kind):
    teacher = vision_transformer(tmp_path / "teacher", 7)
    folder = tmp_path / "data"
    if kind == "labelled":
        write_dataset(folder, rows)
    elif kind == "a column less":
        images = {split: dict(img=part["img"]) for split, part in rows.items()}
        write_dataset(folder, images, Features(img=Image()))
    else:
        for split, part in rows.items():
            (folder / split).mkdir(parents=True)
            for number, image in enumerate(part["img"][:40]):
                (folder / split / f"{number}.png").write_bytes(image["bytes"])
    options = [*SMALL_RUN, "--teacher", teacher, "--dataset", folder, "--teacher_head", "none"]
    options += ["--views", 2, "--teacher_store", tmp_path / "store"]
    output = distill(*options, "--run", tmp_path / "run")
    assert "the relations of its features teach" in output
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'last'}", pretrained=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    terms = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    if kind == "labelled":
        assert (model.num_classes, "loss_ce" in terms) == (4, True)
        assert summary["top1"] > 0
    else:
        assert (model.num_classes, "loss_ce" in terms) == (0, False)
        assert 0 <= summary["agreement"] <= 100
        assert "nearest neighbours as the teacher's" in output
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 64)


def test_unlabelled_images_are_an_error_where_classes_are_learnt(tmp_path, distill):
    (tmp_path / "data").mkdir()
    v2.functional.to_pil_image(torch.rand(3, 8, 8)).save(tmp_path / "data" / "0.png")
    output = distill(
        *SMALL_RUN, "--dataset", tmp_path / "data", "--run", tmp_path / "run", fails=True
    )
    assert "lies beside the class folders" in output


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(teacher_store="x"), "teacher_store=x keeps.*set views too"),
        (dict(teacher_store="x", views=2, mixup=0.2), "mixup=0.2 .*teacher_store=x"),
        (dict(teacher_store="x", views=2, cutmix=1.0), "cutmix=1.0 .*teacher_store=x"),
        (dict(views=3, flip="alternate"), "flip=alternate.*views=3"),
        (dict(views=0), "views=0 is out of range"),
        (dict(views=2, streaming=True), "views=2 needs the images' numbers"),
        (dict(teacher_head="fit", streaming=True), "teacher_head=fit reads the training images"),
        (dict(teacher_head="none", local_weight=2.0), "local_weight=2.0 has no effect"),
        (dict(teacher_size=0), "teacher_size=0 is out of range"),
    ],
)
def test_options_that_contradict_each_other_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Recipe(student="gld_wrn16_1", teacher="gld_wrn16_2", **values)


def test_without_a_teacher_its_options_decide_nothing():
    recipe = Recipe(student="gld_wrn16_1", teacher_store="auto", teacher_head="none", mixup=0.2)
    assert not recipe.keeps_answers
    assert recipe.needs_labels


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_features_of_all_processes_are_those_of_one_in_order(monkeypatch, world_size):
    monkeypatch.setattr(together, "REDUCED", 4)
    images = torch.arange(11.0)[:, None]
    reduced = []
    for rank in range(world_size):
        machine = SimpleNamespace(
            process_index=rank,
            num_processes=world_size,
            device=torch.device("cpu"),
            reduce=lambda block: block,
        )
        own = Share(rank, world_size).of(torch.arange(11))
        repeated = torch.cat([own, own[:1].expand(3)])  # what fills a last batch
        batches = [(images[part],) for part in repeated.split(2)]
        reduced.append(together.of_all_processes(lambda shown: 2 * shown, batches, 11, machine))
    assert torch.equal(sum(reduced), 2 * images)


@torch.no_grad()
def test_neighbours_are_the_nearest_other_rows(monkeypatch):
    rows = torch.randn(7, 3)
    distances = (rows[:, None] - rows[None]).norm(dim=2).fill_diagonal_(9)
    assert torch.equal(relations.nearest(rows), distances.argmin(1))
    monkeypatch.setattr(relations, "BLOCK", 3)
    assert torch.equal(relations.nearest(rows), distances.argmin(1))
