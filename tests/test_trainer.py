"""The training loop's step from inside: nothing that waits for a device, one loss for all."""

import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import write_dataset
from datasets import ClassLabel, Features, Image
from torch.utils._python_dispatch import TorchDispatchMode

from distiller import Distiller
from gld_zoo import GlobalLocal, global_local_logits, logit_kl, relation
from gld_zoo.heads import classifiers
from gld_zoo.hub import save_pretrained
from models import GlobalOnly, Teacher, create_student, set_training_mode
from recipe import Recipe
from run_folder import RunFolder

READS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select"}
NEVER = SimpleNamespace(due=lambda step, last: (False, False))  # an Interruption
METHODS = {"cpu", "tolist", "numpy", "item"}  # which do nothing to be seen on a CPU


class Operations(TorchDispatchMode):
    """Collect the names of the operations that run, and of `watch`ed methods."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def watch(self, monkeypatch):
        for name in METHODS:
            method = getattr(torch.Tensor, name)

            def watched(*args, _name=name, _method=method, **kwargs):
                self.names.add(_name)
                return _method(*args, **kwargs)

            monkeypatch.setattr(torch.Tensor, name, watched)
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def build(tiny_dataset, tmp_path, **options):
    options = dict(dict(student="gld_wrn16_1", dataset=str(tiny_dataset), batch_size=16), **options)
    recipe = Recipe(**options)
    trainer = Distiller(recipe, RunFolder(tmp_path / "run", recipe, resume=False), Accelerator())
    trainer.network.train()
    return trainer


@pytest.mark.parametrize("distilled", [True, False])
def test_steps_read_nothing_from_the_device(
    tiny_dataset, teacher_run, tmp_path, distilled, monkeypatch
):
    teacher = f"local-dir:{teacher_run}/last" if distilled else None
    trainer = build(tiny_dataset, tmp_path, teacher=teacher)
    batches = trainer.data.train.epoch(0)
    next(batches)  # an epoch's order and augmentation are drawn on the CPU, once
    with Operations().watch(monkeypatch) as operations:
        for images, target in batches:
            trainer.totals.add(*trainer.step(images, target))
    assert {"convolution", "_fused_sgd_"} <= operations.names
    assert not operations.names & (READS | METHODS)
    with operations:
        trainer.totals.check(3, 0)  # which reads, is seen
    assert {"cpu", "tolist", "nonzero"} & operations.names
    assert trainer.totals.means()["loss"] > 0


def test_two_steps_are_those_of_sgd_written_out(tiny_dataset, tmp_path):
    options = dict(lr=0.05, momentum=0.8, weight_decay=0.01)
    trainer = build(tiny_dataset, tmp_path, **options)
    network, theirs = copy.deepcopy(trainer.network), []
    for images, target in itertools.islice(trainer.data.train.epoch(0), 2):
        network.zero_grad()
        F.cross_entropy(network(images), target).backward()
        with torch.no_grad():
            theirs = [
                (theirs[i] * 0.8 if theirs else 0) + weight.grad + 0.01 * weight
                for i, weight in enumerate(network.parameters())
            ]
            for weight, momentum in zip(network.parameters(), theirs, strict=True):
                weight -= 0.05 * momentum
        trainer.set_learning_rate(0)
        trainer.step(images, target)
    for ours, expected in zip(trainer.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_the_recipes_weights_and_grid_are_those_of_the_loss(tiny_dataset, teacher_run, tmp_path):
    teacher = f"local-dir:{teacher_run}/last"
    options = dict(alpha=0.25, beta=30.0, local_weight=2.5, grid=3)
    trainer = build(tiny_dataset, tmp_path, teacher=teacher, **options)
    images, target = next(trainer.data.train.epoch(0))
    terms, _ = trainer.forward(images, target)
    student, taught = trainer.network(images), trainer.teacher(images)
    assert student.shape[1] == 1 + 9
    divergence = logit_kl(student, taught).mean(0)
    expected = dict(
        loss_ce=0.75 * F.cross_entropy(student[:, 0], target),
        loss_global=0.25 * divergence[0],
        loss_local=2.5 * divergence[1:].sum(),
        loss_relation=30 * relation(student.flatten(0, 1), taught.flatten(0, 1)),
    )
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-7)


def test_without_a_teacher_the_loss_is_cross_entropy(tiny_dataset, tmp_path):
    trainer = build(tiny_dataset, tmp_path)
    images, target = next(trainer.data.train.epoch(0))
    terms, others = trainer.forward(images, target)
    assert torch.equal(terms["loss"], F.cross_entropy(trainer.network(images), target))
    assert others.keys() == {"train_top1", "train_top5"}


def test_both_classifiers_of_a_model_are_trained_alone(tmp_path):
    save_pretrained(timm.create_model("efficientformerv2_s0", num_classes=4), tmp_path)
    student = create_student(
        f"local-dir:{tmp_path}", list("abcd"), torch.device("cpu"), finetune="classifier"
    )
    trained = {name.split(".")[0] for name, p in student.named_parameters() if p.requires_grad}
    assert trained == {"head", "head_dist"}
    set_training_mode(student, "classifier")
    assert [part.training for part in classifiers(student)] == [True, True]
    assert not student.stem.training


@torch.no_grad()
def test_a_model_of_several_branches_is_trained_on_labels_alone():
    model = timm.create_model("crossvit_9_240", num_classes=3).eval()
    images = torch.randn(1, 3, 240, 240)
    assert torch.equal(GlobalOnly(model)(images), model(images))
    with pytest.raises(ValueError, match="forward_features gives list for images"):
        GlobalLocal(model)(images)


def test_every_step_has_its_seed_and_rate(tiny_dataset, tmp_path):
    trainer, seen = build(tiny_dataset, tmp_path, epochs=2, lr=0.8, schedule="linear"), []

    def step(*batch):
        seen.append((torch.rand(1).item(), trainer.optimizer.param_groups[0]["lr"]))
        return dict(loss=torch.tensor(1.0)), {}

    trainer.step = step
    for epoch in range(2):
        trainer.train_one_epoch(epoch, NEVER)
    draws, rates = zip(*seen, strict=True)
    assert len(set(draws)) == 8
    assert rates == pytest.approx([0.8 * (1 - i / 8) for i in range(8)])


def test_an_epoch_whose_steps_were_done_keeps_its_last_rate(tiny_dataset, tmp_path):
    trainer = build(tiny_dataset, tmp_path, epochs=2, lr=0.8, schedule="linear")
    trainer.position = (0, 4)
    trainer.train_one_epoch(0, NEVER)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.8 * (1 - 3 / 8))


def test_held_out_images_select_and_the_test_split_is_measured_last(tiny_dataset, tmp_path):
    trainer = build(tiny_dataset, tmp_path, val_fraction=0.25)
    measured, exported, scores = [], [], iter([10.0, 30.0, 30.0, 20.0, 5.0])

    def measure(model, batches):
        measured.append(batches)
        return dict(loss=1.0, top1=next(scores), top5=50.0)

    trainer.measure = measure
    trainer.export = lambda name: exported.append((name, len(measured)))
    for epoch in range(4):
        trainer.totals.add(dict(loss=torch.tensor(1.0)), dict(train_top1=torch.tensor(1.0)))
        trainer.totals.check(1, epoch)
        trainer.close_epoch(epoch)
    summary = trainer.finish()
    assert [batches is trainer.data.val for batches in measured] == [True] * 4 + [False]
    assert exported == [("best", 1), ("best", 2), ("last", 5)]
    assert (summary["top1"], summary["best_epoch"]) == (5.0, 2)


def test_training_accuracy_is_of_the_global_rows(tiny_dataset, teacher_run, tmp_path):
    trainer = build(tiny_dataset, tmp_path, teacher=f"local-dir:{teacher_run}/last")
    rows = torch.eye(4)[[0, 1, 1, 1, 1]].expand(16, 5, 4).clone().requires_grad_()
    trainer.network = lambda images: rows
    images, _ = next(trainer.data.train.epoch(0))
    _, others = trainer.forward(images, torch.zeros(16, dtype=torch.int64))
    assert others["train_top1"] == 100
    assert trainer.criterion.global_batch


def test_class_names_are_saved_in_the_datasets_order(rows, tmp_path):
    names = ["pear", "fig", "apple", "kiwi"]
    features = Features(img=Image(), fine_label=ClassLabel(names=names))
    trainer = build(write_dataset(tmp_path / "data", rows, features), tmp_path)
    trainer.export("last")
    config = json.loads((tmp_path / "run" / "last" / "config.json").read_text())
    assert config["label_names"] == names


@torch.no_grad()
def test_a_teacher_of_another_normalisation_sees_the_same_pixels():
    model = timm.create_model("gld_wrn16_2", pretrained=True).eval()
    pixels, cfg = torch.rand(2, 3, 32, 32), model.pretrained_cfg
    mean, std = (torch.tensor(cfg[name])[:, None, None] for name in ("mean", "std"))
    expected = global_local_logits(model, (pixels - mean) / std)
    teacher, given = Teacher(model, 2, (0.5,) * 3, (0.25,) * 3), (pixels - 0.5) / 0.25
    torch.testing.assert_close(teacher(given), expected, rtol=1e-3, atol=1e-3)  # float32, folded
    torch.testing.assert_close(teacher.classify(given), expected[:, 0], rtol=1e-3, atol=1e-3)
    assert not any(module.training for module in teacher.train().modules())
