"""The relations among all rows of logits, in two exact forms, over one process's batch or all's.

Kim et al., "Distilling Global and Local Logits with Densely Connected Relations", ICCV 2021. The
linear form is ours: the inner products of distance rows are polynomials in moments of the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

Reduction = Callable[[torch.Tensor], torch.Tensor]  # a sum over processes, or nothing

# The plain form works on this many entries of a distance matrix at a time: 16 MiB of float32 a
# matrix.
_BLOCK_ENTRIES = 1 << 22


def relation(
    student: torch.Tensor, teacher: torch.Tensor, *, global_batch: bool = False
) -> torch.Tensor:
    """Compare the relations among all rows of logits: `1/N² sum (D(teacher) - D(student))²`.

    D holds the squared Euclidean distances between all rows, each of its rows divided by that row's
    L2 norm. Two exact forms, chosen by shape: a linear-time one over moments of the batch, O(N K²),
    and the plain one in blocks of rows, O(N² K), that never holds a matrix of N x N. If all rows of
    one side are identical its D is zero and each row counts 1, if those of both sides are, 0; the
    gradient is zero there.

    Args:
        student: Logits `[N, K]`, global and local rows of all images alike.
        teacher: Logits `[N, K]`; receives no gradient.
        global_batch: Take the rows of all processes of the default process group together. Each
            process then holds the same value and, times the process count, its share of the
            gradient, so that data-parallel averaging gives exactly one process's gradient.

    Returns:
        A scalar in float32, or in float64 for float64 input.

    Raises:
        ValueError: If the shapes differ, or with `global_batch` the processes' row counts do.
    """
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"relation takes two [N, K] tensors of one shape, got {list(student.shape)} and "
            f"{list(teacher.shape)}"
        )
    reduce = _all_reduce if global_batch and _is_distributed() else _identity
    world_size = dist.get_world_size() if reduce is _all_reduce else 1
    if world_size > 1:
        _check_equal_rows(student)
    rows = student.shape[0] * world_size
    dtype = working_dtype(student)
    with torch.autocast(student.device.type, enabled=False):
        student_rows, student_flat = _centre(student, rows, dtype, reduce)
        teacher_rows, teacher_flat = _centre(teacher.detach(), rows, dtype, reduce)
        if student_rows.dtype == torch.float64 and _linear_is_cheaper(rows, student.shape[1]):
            return _relation_linear(
                student_rows, teacher_rows, student_flat, teacher_flat, rows, reduce
            ).to(dtype)
        student_rows, teacher_rows = student_rows.to(dtype), teacher_rows.to(dtype)
        if world_size > 1:
            student_rows, teacher_rows = _gather_rows(student_rows), _gather_rows(teacher_rows)
        return _RelationBlocks.apply(student_rows, teacher_rows)


def working_dtype(logits: torch.Tensor) -> torch.dtype:
    """Return float64 for float64 logits, float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _linear_is_cheaper(rows: int, classes: int) -> bool:
    return rows > 8 * classes  # measured on two CPU cores, 100 and 1000 classes


def _centre(
    logits: torch.Tensor, rows: int, dtype: torch.dtype, reduce: Reduction
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return centred rows scaled to a largest entry of 1, and whether all were identical.

    Distances do not change under a shift, and the relation not under a scale, so the scale needs no
    gradient; both keep the arithmetic that follows far from cancellation, overflow and underflow.
    """
    wide = dtype if logits.device.type == "mps" else torch.float64  # MPS has no float64
    info = torch.finfo(dtype)
    logits = logits.to(wide)
    centred = logits - reduce(logits.sum(0)) / rows
    spread, size = centred.detach().abs().amax(), logits.detach().abs().amax()
    if reduce is _all_reduce:
        extremes = torch.stack([spread, size])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        spread, size = extremes.unbind()
    flat = spread <= 16 * info.eps * size + info.tiny**0.5
    return torch.where(flat, 0.0, centred / torch.where(flat, 1.0, spread)), flat


def _relation_linear(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_flat: torch.Tensor,
    teacher_flat: torch.Tensor,
    rows: int,
    reduce: Reduction,
) -> torch.Tensor:
    """Evaluate `2/N² sum_r (1 - cos_r)`, cos_r between distance rows, from moments of rows.

    In float64 throughout: 1 - cos cancels.
    """
    student_sq, teacher_sq = student.square().sum(1), teacher.square().sum(1)
    pairs = (
        (student, student_sq, student, student_sq),
        (teacher, teacher_sq, teacher, teacher_sq),
        (teacher, teacher_sq, student, student_sq),
    )
    moments = reduce(torch.stack([_moments(*pair) for pair in pairs]))
    ss, tt, ts = (
        _row_products(*pair, moment, rows) for pair, moment in zip(pairs, moments, strict=True)
    )
    either = student_flat | teacher_flat
    cosine = ts / torch.where(either, 1.0, ss * tt).sqrt()
    cosine = torch.where(either, torch.where(student_flat & teacher_flat, 1.0, 0.5), cosine)
    return reduce((1 - cosine.clamp(max=1)).sum()) * (2 / rows**2)


def _moments(x: torch.Tensor, a: torch.Tensor, y: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pack the sums over rows that `_row_products` needs: sum a, sum b, sum ab, xᵀb, yᵀa, xᵀy."""
    scalars = torch.stack([a.sum(), b.sum(), a @ b])
    return torch.cat([scalars, b @ x, a @ y, (x.T @ y).flatten()])


def _row_products(
    x: torch.Tensor,
    a: torch.Tensor,
    y: torch.Tensor,
    b: torch.Tensor,
    moments: torch.Tensor,
    rows: int,
) -> torch.Tensor:
    """Return, for each row r, the sum over c of |x_r - x_c|² |y_r - y_c|² (a = |x|², b = |y|²).

    The rows are centred, so the terms with sums of x or y vanish, and their gradient with them.
    """
    k = x.shape[1]
    scalars, xb, ya, xy = moments.split([3, k, k, k * k])
    sum_a, sum_b, sum_ab = scalars.unbind()
    quadratic = ((x @ xy.view(k, k)) * y).sum(1)
    return (
        rows * a * b + a * sum_b + b * sum_a + sum_ab - 2 * (x @ xb) - 2 * (y @ ya) + 4 * quadratic
    )


class _RelationBlocks(torch.autograd.Function):
    """The plain form; value and gradient are worked out together, so nothing N x N is kept."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        rows = student.shape[0]
        student_sq, teacher_sq = student.square().sum(1), teacher.square().sum(1)
        total = student.new_zeros(())
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        with _ieee_matmul():
            for block in torch.arange(rows).split(max(1, _BLOCK_ENTRIES // rows)):
                part = slice(int(block[0]), int(block[-1]) + 1)
                unit, norm = _unit_distances(student, student_sq, part)
                difference = unit - _unit_distances(teacher, teacher_sq, part)[0]
                total += difference.square().sum()
                if gradient is None:
                    continue
                # through the division by the row norm, then through |x_r - x_c|², rows and columns
                weight = (difference - unit * (difference * unit).sum(1, keepdim=True)).div_(norm)
                gradient += student * weight.sum(0)[:, None] - weight.T @ student[part]
                gradient[part] += student[part] * weight.sum(1)[:, None] - weight @ student
        if gradient is not None:
            ctx.save_for_backward(gradient * (4 / rows**2))
        return total / rows**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None


@contextlib.contextmanager
def _ieee_matmul() -> Iterator[None]:
    """Multiply float32 matrices in float32: autocast off turns neither TF32 nor bfloat16 off."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9
        backends = [getattr(torch.backends, name).matmul for name in ("cuda", "mkldnn")]
        before = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
    else:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def _unit_distances(
    x: torch.Tensor, squares: torch.Tensor, part: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows `part` of the squared distances over their norms, and the norms (1 for 0)."""
    distances = torch.addmm(squares, x[part], x.T, alpha=-2).add_(squares[part, None]).clamp_(min=0)
    distances.diagonal(part.start).zero_()
    norm = distances.norm(dim=1, keepdim=True)
    norm = torch.where(norm > 0, norm, 1.0)
    return distances.div_(norm), norm


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class _AllReduce(torch.autograd.Function):
    """Sum over processes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        grad_output = grad_output.contiguous().clone()
        dist.all_reduce(grad_output)
        return grad_output


def _all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    return _AllReduce.apply(tensor)


def _gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Concatenate the rows `[N, K]` of all processes in rank order, with gradient."""
    count = rows.shape[0]
    padded = rows.new_zeros((count * dist.get_world_size(), rows.shape[1]))
    start = count * dist.get_rank()
    padded = torch.cat([padded[:start], rows, padded[start + count :]])
    return _all_reduce(padded)


def _check_equal_rows(student: torch.Tensor) -> None:
    counts = torch.tensor([student.shape[0], -student.shape[0]], device=student.device)
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    largest, smallest = counts[0].item(), -counts[1].item()
    if largest != smallest:
        raise ValueError(
            f"processes hold from {smallest} to {largest} rows of logits; the relation over the "
            "global batch needs the same number on each: drop the incomplete last batch"
        )
