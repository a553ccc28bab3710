"""The training loop's step from inside: nothing that waits for a device, one loss for all."""

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from distiller import Distiller
from gld_zoo import GlobalLocal
from gld_zoo.heads import classifiers
from gld_zoo.hub import save_pretrained
from models import GlobalOnly, create_student, set_training_mode
from recipe import Recipe
from run_folder import RunFolder

READS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select"}
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


def test_without_a_teacher_the_loss_is_cross_entropy(tiny_dataset, tmp_path):
    trainer = build(tiny_dataset, tmp_path)
    images, target = next(trainer.data.train.epoch(0))
    terms, others = trainer.forward(images, target)
    assert torch.equal(terms["loss"], F.cross_entropy(trainer.network(images), target))
    assert others.keys() == {"train_top1", "train_top5"}


def test_both_classifiers_of_a_model_are_trained_alone(tmp_path):
    save_pretrained(timm.create_model("efficientformerv2_s0", num_classes=4), tmp_path)
    student = create_student(f"local-dir:{tmp_path}", 4, torch.device("cpu"), finetune="classifier")
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
