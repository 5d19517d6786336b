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

# Variables by which torch and its libraries choose how they multiply. torch tells of the first one's effect only.
DECIDING = (
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "TORCH_BLAS_PREFER_CUBLASLT",
)  # fmt: skip


def choose_device(name: str | torch.device = "auto", flag: str = "device") -> torch.device:
    """The device for `auto`, cpu, cuda, cuda:N or mps; raises Mistake where it is not there."""
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
    a CPU bfloat16 where it has instructions for it, else float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.bfloat16 if "bf16" in _cpuinfo() else torch.float32
    own = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return own.get(stored, torch.bfloat16)


SMALL_MODEL = 100_000_000  # parameters; threads that share a busy core wait for each other longer than they compute


def choose_threads(given: int | None, parameters: int) -> int:
    """How many threads of the CPU compute: the number given, else one for a model of few parameters and as many as
    this process is set to for a larger one.
    """
    return given or (1 if parameters < SMALL_MODEL else _process.threads())


class _Process:
    """The number of threads that this process is set to by its user, while engines compute on numbers of their own: a
    new Python thread starts with whatever number was set last, by whichever thread.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.computing = 0  # engines at the moment
        self.number: int | None = None

    def threads(self) -> int:
        """The number; read anew where nothing computes, in the main thread."""
        with self.lock:
            in_main = threading.current_thread() is threading.main_thread()
            if self.number is None or (in_main and not self.computing):
                self.number = torch.get_num_threads()
            return self.number


_process = _Process()


@contextlib.contextmanager
def computing_on(threads: int) -> Iterator[None]:
    """Computes on so many threads inside; afterwards this thread has the process's own number again."""
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
    """What a device is called, and on a CPU how many threads compute, with which instructions, and what in the
    environment decides that: all of it can change the last bits of an image.
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
    """Bytes of memory that a device has in all, whoever uses them now; without a way to know, 8 GB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(os.sysconf_names):
        return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), container_memory())
    return 8 * 10**9


CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2 and 1


def container_memory(limits: Sequence[str | Path] = CONTAINER_LIMITS) -> float:
    """Bytes of main memory that the container of this process may use (Linux control groups, the files `limits`);
    without a limit, inf.
    """
    for path in limits:
        try:
            return int(Path(path).read_text(encoding="ascii"))
        except (OSError, ValueError):  # no such group, or the word max
            continue
    return math.inf


def memory_peak(device: torch.device) -> int:
    """Most bytes that were in use so far: on a CUDA device there, else resident in this process; 0 where unknown."""
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
    """Text encoders run in float32 where the MMDiT runs in float16: T5 overflows there."""
    return torch.float32 if dtype == torch.float16 else dtype


def available_devices(settings: Mapping[str, Any]) -> dict[str, str]:
    """`auto` for each device that an image was made on and that is not here; other words stay, to be named."""
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
