"""The relation over the global batch: two gloo processes give what one gives."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gld_zoo import GLDLoss, relation, relations

WORLD = 2


def example(batch=8, classes=6):
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, batch, 5, classes, dtype=torch.float64, generator=generator)
    target = torch.randint(classes, (batch,), generator=generator)
    return student, teacher, target


def work(rank, port, linear, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    relations._linear_is_cheaper = lambda rows, classes: linear
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
    queue.put(
        (
            rank,
            {name: term.item() for name, term in terms.items()},
            student.grad.tolist(),
            alone,
            refusal,
        )
    )
    queue.close()
    queue.join_thread()
    dist.destroy_process_group()


@pytest.fixture(params=[True, False], ids=["linear", "plain"], scope="module")
def results(request):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=work, args=(rank, port, request.param, queue))
        for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    try:
        collected = [queue.get(timeout=120) for _ in processes]
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    return sorted(collected, key=lambda result: result[0])


def test_relation_and_its_gradient_are_those_of_one_process(results):
    student, teacher, target = example()
    student.requires_grad_()
    terms = GLDLoss()(student, teacher, target)
    terms["loss"].backward()
    for rank, values, gradient, _, _ in results:
        assert values["loss_relation"] == pytest.approx(terms["loss_relation"].item(), rel=1e-12)
        # data parallelism averages over processes: each holds W times its share
        torch.testing.assert_close(
            torch.tensor(gradient, dtype=torch.float64) / WORLD,
            student.grad[rank::WORLD],
            rtol=1e-10,
            atol=1e-14,
        )
    for name, term in terms.items():
        mean = sum(values[name] for _, values, *_ in results) / WORLD
        assert mean == pytest.approx(term.item(), rel=1e-12), name


def test_relation_per_process_would_be_another_number(results):
    student, teacher, _ = example()
    whole = 500 * relation(student.flatten(0, 1), teacher.flatten(0, 1)).item()
    for _, values, _, alone, _ in results:
        assert values["loss_relation"] == pytest.approx(whole)
        assert alone > 1.5 * whole  # without gradients the relation is the local batch's


def test_unequal_row_counts_are_refused(results):
    for *_, refusal in results:
        assert "processes hold from 9 to 10 rows" in refusal
