"""The training loop's step from inside: nothing that waits for a device, one loss for all."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from distiller import Distiller
from recipe import Recipe
from run_folder import RunFolder

READS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select"}


class Operations(TorchDispatchMode):
    """Collect the names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

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
def test_steps_read_nothing_from_the_device(tiny_dataset, teacher_run, tmp_path, distilled):
    teacher = f"local-dir:{teacher_run}/last" if distilled else None
    trainer = build(tiny_dataset, tmp_path, teacher=teacher)
    batches = trainer.data.train.epoch(0)
    next(batches)  # an epoch's order and augmentation are drawn on the CPU, once
    with Operations() as operations:
        for images, target in batches:
            trainer.totals.add(*trainer.step(images, target))
    assert {"convolution", "_fused_sgd_"} <= operations.names
    assert not operations.names & READS
    with operations:
        trainer.totals.check(3, 0)
    assert trainer.totals.means()["loss"] > 0


def test_without_a_teacher_the_loss_is_cross_entropy(tiny_dataset, tmp_path):
    trainer = build(tiny_dataset, tmp_path)
    images, target = next(trainer.data.train.epoch(0))
    terms, others = trainer.forward(images, target)
    assert torch.equal(terms["loss"], F.cross_entropy(trainer.network(images), target))
    assert others.keys() == {"train_top1", "train_top5"}
