"""Device, dtype and memory: decided here, arguments everywhere else. The only module that names a backend."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sd3.mistakes import Mistake
from sd3.readers import read_device

# Environment variables that select instruction sets. torch reports the effect of the first only.
DECIDING = (
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "TORCH_BLAS_PREFER_CUBLASLT",
)  # fmt: skip


def choose_device(name: str | torch.device = "auto", flag: str = "device") -> torch.device:
    """The device for `auto`, cpu, cuda, cuda:N or mps; raises Mistake if it is not available."""
    if isinstance(name, torch.device):
        return name
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    device = torch.device(read_device(flag, name))
    count = torch.cuda.device_count() if cuda else 0
    available = ["cpu", *(f"cuda:{i}" for i in range(count)), *(["mps"] if mps else [])]
    if (device.type == "cuda" and (not cuda or (device.index or 0) >= count)) or (device.type == "mps" and not mps):
        raise Mistake(flag, name, f"not available; available devices: {', '.join(available)}")
    return device


def choose_dtype(name: str, device: torch.device, stored: str = "F16") -> torch.dtype:
    """The compute dtype. auto: on a GPU the file's own (`stored`, as its header spells it; bfloat16 for float8), on
    a CPU bfloat16 if the CPU supports it, else float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.bfloat16 if "bf16" in _cpuinfo() else torch.float32
    own = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return own.get(stored, torch.bfloat16)


SMALL_MODEL = 100_000_000  # parameters; below, threads wait for each other longer than they compute


def choose_threads(given: int | None, parameters: int) -> int:
    """Number of CPU threads to compute on: the given number, else one for a small model and the process's setting for
    a larger one.
    """
    return given or (1 if parameters < SMALL_MODEL else _process.threads())


class _Process:
    """The number of threads set for this process by its user. Engines change torch's setting while they compute, and
    a new Python thread starts with the number set last by any thread, so the user's number is kept here.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.computing = 0  # number of engines computing now
        self.number: int | None = None

    def threads(self) -> int:
        """The number; read anew in the main thread while no engine computes."""
        with self.lock:
            in_main = threading.current_thread() is threading.main_thread()
            if self.number is None or (in_main and not self.computing):
                self.number = torch.get_num_threads()
            return self.number


_process = _Process()


@contextlib.contextmanager
def computing_on(threads: int) -> Iterator[None]:
    """Sets the number of CPU threads inside; restores the process's own number afterwards."""
    own, before = _process.threads(), torch.get_num_threads()
    with _process.lock:
        _process.computing += 1
    try:
        if threads != before:
            torch.set_num_threads(threads)
        yield
    finally:
        with _process.lock:
            _process.computing -= 1
            nested = _process.computing
        after = before if nested else own
        if torch.get_num_threads() != after:
            torch.set_num_threads(after)


def device_record(device: torch.device, threads: int) -> dict[str, Any]:
    """The device's name, and for a CPU the number of threads, the instruction set and the environment variables that
    select it: all of these can change the last bits of an image.
    """
    environment = " ".join(f"{name}={value}" for name in DECIDING if (value := os.environ.get(name)))
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "environment": environment}
    if device.type != "cpu":
        return {"device": device.type, "environment": environment}
    named = re.search(r"model name\s*: (.*)", _cpuinfo())
    return {
        "device": named[1].strip() if named else platform.machine(),
        "threads": threads,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "environment": environment,
    }


def device_memory(device: torch.device) -> int:
    """Total memory of a device in bytes, used or not; 8 GB if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(os.sysconf_names):
        return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), container_memory())
    return 8 * 10**9


CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2 and 1


def container_memory(limits: Sequence[str | Path] = CONTAINER_LIMITS) -> float:
    """Memory limit of this process's container in bytes (Linux control groups, the files `limits`); inf without a
    limit.
    """
    for path in limits:
        try:
            return int(Path(path).read_text(encoding="ascii"))
        except (OSError, ValueError):  # no such file, or the word max
            continue
    return math.inf


def memory_peak(device: torch.device) -> int:
    """Peak memory so far in bytes: allocated on a CUDA device, else resident in this process; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(errors="ignore")
    except OSError:
        return ""


def encoder_dtype(dtype: torch.dtype) -> torch.dtype:
    """Text encoders run in float32 if the MMDiT runs in float16, in which T5 overflows."""
    return torch.float32 if dtype == torch.float16 else dtype


def missing_devices(settings: Mapping[str, Any]) -> dict[str, str]:
    """`auto` for each recorded device that this machine lacks; invalid names stay, so that they are reported."""
    out = {}
    for name in ("device", "text_encoder_device"):
        try:
            device = read_device(name, settings.get(name, "auto"))
        except Mistake:
            continue
        try:
            choose_device(device, name)
        except (Mistake, RuntimeError):
            out[name] = "auto"
    return out
