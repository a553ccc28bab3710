"""The global batch: two gloo processes give what one gives."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import nn

from gld_zoo import GLDLoss, relation
from gld_zoo.training.build.sync_batch_norm import SyncBatchNorm2d, synchronise_batch_norm
from gld_zoo.training.common.errors import ModelError
from helpers import CHECKOUT, STANDALONE
from two_processes import WORLD, example, normalised, wide, work


@pytest.fixture(scope="module")
def both_forms(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=work, args=(rank, store, queue)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    try:
        collected = [queue.get(timeout=120) for _ in range(2 * WORLD)]
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    return collected


@pytest.fixture(params=[True, False], ids=["linear", "plain"])
def results(request, both_forms):
    chosen = (result[1:] for result in both_forms if result[0] == request.param)
    return sorted(chosen, key=lambda result: result[0])


@pytest.mark.slow
def test_relation_and_its_gradient_are_those_of_one_process(results):
    student, teacher, target = example()
    student.requires_grad_()
    terms = GLDLoss()(student, teacher, target)
    terms["loss"].backward()
    for rank, values, gradient, *_ in results:
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


@pytest.mark.slow
def test_relation_of_two_widths_is_that_of_one_process(results):
    value, gradient = wide()
    for rank, *_, (found, theirs) in results:
        assert found == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(
            torch.tensor(theirs, dtype=torch.float64) / WORLD,
            torch.tensor(gradient, dtype=torch.float64)[rank::WORLD],
            rtol=1e-10,
            atol=1e-14,
        )


@pytest.mark.slow
def test_relation_per_process_would_be_another_number(results):
    student, teacher, _ = example()
    whole = 500 * relation(student.flatten(0, 1), teacher.flatten(0, 1)).item()
    for _, values, _, alone, *_ in results:
        assert values["loss_relation"] == pytest.approx(whole)
        assert alone > 1.5 * whole  # without gradients the relation is the local batch's


@pytest.mark.slow
def test_unequal_row_counts_are_refused(results):
    for *_, refusal, _, _ in results:
        assert "processes hold from 9 to 10 rows" in refusal


@pytest.mark.slow
def test_synchronised_batch_norm_is_that_of_all_images(results):
    expected = [torch.tensor(value) for value in normalised()]
    for rank, *_, found, _ in results:
        for i, (ours, whole) in enumerate(zip(map(torch.tensor, found), expected, strict=True)):
            torch.testing.assert_close(ours, whole[rank::WORLD] if i < 2 else whole)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_dataset, teacher_run):
    """Losses and gradients of 20 steps, by mode and number of processes."""
    folder = tmp_path_factory.mktemp("global")
    shared = ["eval", "sync", "mixed", "float32"]
    modes = {1: shared, 2: [*shared, "local"]}
    results = {}
    for processes, names in modes.items():
        # `accelerate launch` starts one process on a CPU whatever it is told
        command = ["-m", "torch.distributed.run", *STANDALONE, "--nproc_per_node", processes]
        script = [CHECKOUT / "tests" / "global_batch.py", tiny_dataset, teacher_run / "last"]
        paths = str(CHECKOUT)
        subprocess.run(
            [sys.executable, *map(str, [*command, *script, folder / str(processes), *names])],
            check=True,
            timeout=240,
            env=dict(os.environ, PYTHONPATH=paths),
        )
        for name in names:
            results[name, processes] = load_file(folder / f"{processes}-{name}.safetensors")
    return results


def deviation(first, second):
    return max(
        ((first[name] - second[name]).abs().max() / first[name].abs().max()).item()
        for name in first
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "sync", "mixed"])
def test_two_processes_take_the_steps_of_one(trained, mode):
    # float64 sums in another order over 20 steps: measured 1e-13 to 1e-11
    assert deviation(trained[mode, 1], trained[mode, 2]) < 1e-7


@pytest.mark.slow
def test_two_processes_take_the_first_step_of_one_in_float32(trained):
    first, second = (trained["float32", count]["losses"][0] for count in (1, 2))
    assert first.dtype == torch.float32
    torch.testing.assert_close(second, first, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_a_relation_per_process_would_take_others(trained):
    assert deviation(trained["eval", 1], trained["local", 2]) > 1e-2


def test_synchronised_batch_norm_is_batch_norm(tmp_path):
    """In a group of one: values, gradients and statistics of torch's own layer."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        images = torch.randn(4, 3, 5, 5, dtype=torch.float64)
        theirs = nn.BatchNorm2d(3, dtype=torch.float64)
        ours = synchronise_batch_norm(
            nn.Sequential(nn.BatchNorm2d(3, dtype=torch.float64)), torch.device("cpu")
        )[0]
        assert type(ours) is SyncBatchNorm2d
        results = []
        for layer in (theirs, ours):
            nn.init.constant_(layer.weight, 1.5)
            leaf = images.clone().requires_grad_()
            for _ in range(2):
                output = layer(leaf)
            (output**3).sum().backward()
            state = [value.detach() for value in layer.state_dict().values()]
            results.append([output.detach(), leaf.grad, layer.weight.grad, *state])
            results[-1].append(layer.eval()(leaf).detach())
        for theirs_value, ours_value in zip(*results, strict=True):
            torch.testing.assert_close(ours_value, theirs_value)
    finally:
        dist.destroy_process_group()


def test_a_batch_norm_of_another_kind_is_refused_on_a_cpu():
    with pytest.raises(ModelError, match=r"knows nn\.BatchNorm2d only, 0 is BatchNorm1d"):
        synchronise_batch_norm(nn.Sequential(nn.BatchNorm1d(3)), torch.device("cpu"))
