"""The device of a run or a measurement: what it is set to, and what it cannot do."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend

from gld_zoo.training.common.errors import RunError


def forbid_tf32() -> None:
    """Let float32 be float32 on a GPU too; bf16 is the fast precision."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def measuring_device() -> torch.device:
    """Return the GPU, without TF32, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    forbid_tf32()
    return torch.device("cuda")


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuse what Accelerate can be configured to and this loop cannot do."""
    steps = accelerator.gradient_accumulation_steps
    if steps != 1:
        raise RunError(
            f"gradient accumulation over {steps} steps is set, but the relation spans a whole "
            "batch and does not add up over parts; set it to 1 and choose batch_size instead"
        )
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
    ):
        raise RunError(
            f"distributed type {accelerator.distributed_type.value} is not supported; use plain "
            "data parallelism (accelerate config)"
        )
    if accelerator.mixed_precision == "fp8":
        raise RunError("mixed precision fp8 is not supported; set bf16, fp16 or no")
    backend = accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:
        raise RunError(
            f"Accelerate is set to compile by {backend.value}; unset it (accelerate config) and "
            "use --compile true, which compiles what can be and repeats its results"
        )
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise RunError(  # Accelerate would train in float32, and say fp16
            "mixed precision fp16 is for GPUs; on a CPU set bf16 or no (--mixed_precision)"
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise RunError(
            f"{started} processes were started, and Accelerate joins {accelerator.num_processes} "
            f"on {accelerator.device.type}; start one, or name the device (accelerate config)"
        )


def set_up_device(accelerator: Accelerator, threads: int | None) -> None:
    """Use the machine's cores, and on a GPU only kernels that repeat their results."""
    if accelerator.device.type == "cpu":
        # launchers count physical cores or allow one thread, so their choice is not taken over
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(threads or max(1, cores // here))
        if accelerator.mixed_precision == "bf16" and emulates_bf16():
            accelerator.print(
                "this CPU has no instructions for bf16, which makes it many times slower than "
                "float32; leave --mixed_precision bf16 out"
            )
    elif accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        forbid_tf32()


def emulates_bf16() -> bool:
    """Tell whether torch's convolutions compute bf16 on this CPU without its instructions."""
    return torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
