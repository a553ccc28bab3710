"""Train 20 steps and write losses and gradients: one process or several, in float64.

    torchrun --nproc_per_node 2 tests/global_batch.py DATASET TEACHER OUT MODE...

A mode is `eval` (batch norm in eval mode), `sync` (synchronised), `mixed` (as `sync`, with mixed
images and labels), `float32` (as `sync`, but in float32), or `local` (as `eval`, but with the
relation of each process's own batch: another result, on purpose).
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from gld_zoo.training.config.recipe import Recipe
from gld_zoo.training.engine.trainer import Trainer
from gld_zoo.training.runs.run_folder import RunFolder
from gld_zoo.training.tasks.distiller import Distiller


def main(dataset, teacher, out, *modes):
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    for mode in modes:
        torch.set_default_dtype(torch.float32 if mode == "float32" else torch.float64)
        train(accelerator, dataset, teacher, f"{out}-{mode}", mode)
    accelerator.end_training()


def train(accelerator, dataset, teacher, out, mode):
    recipe = Recipe(
        student="gld_wrn16_1",
        teacher=f"local-dir:{teacher}",
        dataset=dataset,
        batch_size=16,
        image_size=16,  # float64 convolutions are slow
        lr=0.01,
        sync_batch_norm=mode in ("sync", "mixed", "float32"),
        **(dict(mixup=0.8, cutmix=1.0, label_smoothing=0.1) if mode == "mixed" else {}),
    )
    trainer = Trainer(Distiller(recipe, accelerator), RunFolder(Path(out), recipe, resume=False))
    trainer.task.criterion.global_batch = mode != "local"
    trainer.task.network.train()
    if not recipe.sync_batch_norm:
        for module in trainer.task.student.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    losses, gradients = [], []
    for epoch in range(5):
        for images, target in trainer.data.train.epoch(epoch):
            terms, _ = trainer.task.forward(images, target)
            accelerator.backward(terms["loss"])
            means = accelerator.reduce(torch.stack(list(terms.values())).detach(), "mean")
            losses.append(means)
            gradients.append(
                torch.cat([p.grad.flatten() for p in trainer.task.student.parameters()])
            )
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
    assert len(losses) == 20
    if accelerator.is_main_process:
        save_file(
            dict(losses=torch.stack(losses), gradients=torch.stack(gradients)), out + ".safetensors"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
