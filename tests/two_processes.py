"""What each of two gloo processes computes; apart from the tests, so that they import little."""

import torch
import torch.distributed as dist
from torch import nn

from gld_zoo import GLDLoss, relation
from gld_zoo.distillation import relations
from gld_zoo.training.build.sync_batch_norm import synchronise_batch_norm

WORLD = 2


def example(batch=8, classes=6):
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, batch, 5, classes, dtype=torch.float64, generator=generator)
    target = torch.randint(classes, (batch,), generator=generator)
    return student, teacher, target


def wide(rank=None):
    """Return the relation to rows of another width, and its gradient, of all rows or of a part."""
    student, _, _ = example()
    generator = torch.Generator().manual_seed(6)
    teacher = torch.randn(8, 5, 11, dtype=torch.float64, generator=generator)
    if rank is not None:
        student, teacher = (side[rank::WORLD].clone() for side in (student, teacher))
    student.requires_grad_()
    value = relation(student.flatten(0, 1), teacher.flatten(0, 1), global_batch=rank is not None)
    value.backward()
    return value.item(), student.grad.tolist()


def work(rank, store, queue):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    for linear in (True, False):
        relations._linear_is_cheaper = lambda rows, classes, linear=linear: linear
        queue.put((linear, rank, *measure(rank), normalised(rank), wide(rank)))
    queue.close()
    queue.join_thread()
    dist.destroy_process_group()


def normalised(rank=None):
    """Return batch norm's output, gradient and statistics, of all images or of a process's own."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=generator)
    layer = nn.Sequential(nn.BatchNorm2d(3, dtype=torch.float64))
    if rank is not None:
        images, layer = images[rank::WORLD], synchronise_batch_norm(layer, torch.device("cpu"))
    images = images.clone().requires_grad_()
    output = layer(images)
    (output**3).sum().backward()
    state = (layer[0].running_mean, layer[0].running_var)
    return [value.tolist() for value in (output, images.grad, *state)]


def measure(rank):
    student, teacher, target = (value[rank::WORLD].clone() for value in example())
    student.requires_grad_()
    terms = GLDLoss(global_batch=True)(student, teacher, target)
    terms["loss"].backward()
    with torch.no_grad():
        alone = GLDLoss(global_batch=True)(student, teacher, target)["loss_relation"].item()
    try:
        relation(
            student.flatten(0, 1)[: 10 - rank],
            teacher.flatten(0, 1)[: 10 - rank],
            global_batch=True,
        )
        refusal = "none"
    except ValueError as error:
        refusal = str(error)
    values = {name: term.item() for name, term in terms.items()}
    return values, student.grad.tolist(), alone, refusal
