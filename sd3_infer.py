"""Pictures from SD3 / SD3.5 weight files, with residual text streaming: the command line and `SD3Inferencer`.

python sd3_infer.py --prompt "a red circle left of a blue square" --model models/demo/demo.safetensors
"""

from __future__ import annotations

import os
import sys

import shell_streams

if __name__ == "__main__":
    shell_streams.begin()

from settings import Flags, read_arguments

# Large pages for torch's memory on a CPU, where the system grants them on request: most of the time that loading takes
# is for pages. torch reads this once, so it is set before torch is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

USER_ERRORS = (ValueError, FileNotFoundError, OSError)


def fail(error: BaseException) -> int:
    """One line on stderr for a mistake of the user's; returns the exit status."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__" and not {"--help", "-h"} & set(sys.argv[1:]):
    try:
        raw = read_arguments(sys.argv[1:])  # a mistyped flag need not wait for torch
        if "replay" not in raw:  # else they are checked together with the picture's own
            Flags.read(raw)
    except USER_ERRORS as early:
        with shell_streams.bearing():
            status = fail(early)
        sys.exit(status)

import ast  # noqa: E402
import contextlib  # noqa: E402
import dataclasses  # noqa: E402
import datetime  # noqa: E402
import errno  # noqa: E402
import functools  # noqa: E402
import hashlib  # noqa: E402
import inspect  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import platform  # noqa: E402
import re  # noqa: E402
import signal  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import IO, Any, TypeVar  # noqa: E402

import fire  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

import checkpoint  # noqa: E402
import saving  # noqa: E402
import sd3_impls  # noqa: E402
from checkpoint import Part, WeightFile, file_sha256  # noqa: E402
from dit_embedder import ControlNet, ControlNetConfig, control_kind, control_pixels, controlnet_part  # noqa: E402
from embed_cache import EmbedCache, file_identity  # noqa: E402
from foreign import Note, reading  # noqa: E402
from mmditx import ContextHook, MMDiT, MMDiTConfig  # noqa: E402
from offload import Offload  # noqa: E402
from other_impls import (  # noqa: E402
    CLIP,
    CLIP_EMBEDDINGS,
    CLIP_LAYERS,
    T5,
    T5_EMBEDDING,
    CLIPConfig,
    CLIPEnd,
    CLIPLayer,
    CLIPTokenizer,
    T5Block,
    T5Config,
    T5Norm,
    T5Tokenizer,
    join_text,
    t5_position_bias,
    table_rows,
    weighted_segments,
)
from replay import Replay  # noqa: E402
from residual import (  # noqa: E402
    RESIDUAL_FLAGS,
    ResidualConfig,
    Rotations,
    build_residual_config,
    read_rotations,
    residual_stream,
)
from settings import (  # noqa: E402
    DEFAULT_DENOISE,
    DEFAULT_SEED,
    FILE_SETTINGS,
    READERS,
    Settings,
    SkipLayerConfig,
    display,
    effective,
    executed_steps,
    folder_name,
    model_key,
    read_bool,
    read_device,
    read_list,
    read_prompts,
    read_skip_layer,
    read_text,
    read_tile,
    read_values,
    resolve,
)
from unchanged import Stamp, Unchanged, stamp  # noqa: E402
from vae import VAE, VAEConfig  # noqa: E402
from weights import can_pack, hold_linears  # noqa: E402

__all__ = ["SD3Inferencer", "build_residual_config", "choose_device", "choose_dtype", "main"]

TEXTS_AT_ONCE = 256  # encoded prompts that are held in memory: 1.3 MB each at SD3's size
MOST_SAID = 1000  # lines that are remembered, to be said once
RESIDUAL_FILE = "residual.json"  # in every run's folder, as --residual_config reads it
VAE_TILE = 576  # pixels, where a picture is too large to be decoded whole: 1024 and 2048 divide well with the overlap
# Variables by which torch and its libraries choose how they multiply. torch tells of the first one's effect only.
DECIDING = (
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "TORCH_BLAS_PREFER_CUBLASLT",
)  # fmt: skip
CLIP_ACTIVATIONS = {"clip_l": "quick_gelu", "clip_g": "gelu"}
FETCH = {
    "sd3_medium": "stabilityai/stable-diffusion-3-medium",
    "sd3.5_medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5_large": "stabilityai/stable-diffusion-3.5-large",
    "sd3.5_large_turbo": "stabilityai/stable-diffusion-3.5-large-turbo",
}


# ---- device and dtype: decided here, arguments everywhere else -----------------------------------


def choose_device(name: str | torch.device = "auto", flag: str = "device") -> torch.device:
    """The device for `auto`, cpu, cuda, cuda:N or mps; raises ValueError where it is not there."""
    if isinstance(name, torch.device):
        return name
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    device = torch.device(read_device(flag, name))
    count = torch.cuda.device_count() if cuda else 0
    there = ["cpu", *(f"cuda:{i}" for i in range(count)), *(["mps"] if mps else [])]
    if (device.type == "cuda" and (not cuda or (device.index or 0) >= count)) or (device.type == "mps" and not mps):
        raise ValueError(f"--{flag} {name}: is not available here; there is {', '.join(there)}")
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


def device_record(device: torch.device) -> dict[str, Any]:
    """What a device is called, and on a CPU how many threads compute, with which instructions, and what in the
    environment decides that: all of it can change the last bits of a picture.
    """
    environment = " ".join(f"{name}={value}" for name in DECIDING if (value := os.environ.get(name)))
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "environment": environment}
    if device.type != "cpu":
        return {"device": device.type, "environment": environment}
    named = re.search(r"model name\s*: (.*)", _cpuinfo())
    return {
        "device": named[1].strip() if named else platform.machine(),
        "threads": torch.get_num_threads(),
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


# ---- small helpers -------------------------------------------------------------------------------


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A module without storage, to be given its weights."""
    with torch.device("meta"):
        return make()


@contextlib.contextmanager
def byte_bar(what: str, total: int, quiet: bool) -> Iterator[Callable[[int], Any]]:
    """A progress bar over bytes."""
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=quiet, leave=False) as bar:
        yield bar.update


def open_image(flag: str, path: str, width: int, height: int) -> Image.Image:
    """An image as every viewer shows it, RGB, resized with Lanczos: turned as its EXIF says, what is transparent over
    white, of an animation the first frame. Raises FileNotFoundError or ValueError.
    """
    where = f"--{flag} {path}"
    with saving.open_picture(where, path) as image:
        shown, see_through = as_shown(image)
        shown = shown.resize((width, height), Image.Resampling.LANCZOS)
    if see_through and where not in _SEE_THROUGH:
        _SEE_THROUGH.add(where)
        warnings.warn(f"{where}: is transparent in places; white is taken for what lies behind", Note, stacklevel=2)
    return shown


_SEE_THROUGH: set[str] = set()  # pictures of which that was said: they are opened for every batch


_FEW_GREYS = {"L;2": 3, "L;4": 15}  # the highest value of a grey PNG of so few bits, by Pillow's name for it


def as_shown(image: Image.Image) -> tuple[Image.Image, bool]:
    """An opened image as RGB, see `open_image`, and whether anything of it was transparent.

    Raises ValueError for grey values of 32 bits: there is no telling which of them is white.
    """
    levels = _FEW_GREYS.get(image.tile[0].args if image.format == "PNG" and image.tile else None)
    image = ImageOps.exif_transpose(image)
    key = image.info.get("transparency")
    if levels and isinstance(key, int):  # Pillow widens the values and leaves the clear one as it stands in the file
        key = image.info["transparency"] = key * 255 // levels
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError("its grey values have 32 bits; save it with 8 or 16")
        grey = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))  # 65535 is white
        clear = values != key if isinstance(key, int) else np.ones(values.shape, bool)
        image = Image.merge("LA", (grey, Image.fromarray(clear.astype(np.uint8) * 255)))
    if not (image.has_transparency_data or image.mode in ("La", "RGBa")):
        return image.convert("RGB"), False
    image = image.convert("RGBA")
    if image.getextrema()[3][0] == 255:
        return image.convert("RGB"), False
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"), True


def open_images(pictures: Sequence[Settings]) -> dict[tuple[str, str, int, int], Image.Image]:
    """Pictures that settings start from or are guided by, by (flag, path, width, height); raises as `open_image`."""
    wanted = {
        (flag, path, s.width, s.height)
        for s in pictures
        for flag, path in (("init_image", s.init_image), ("controlnet_cond_image", s.controlnet_cond_image))
        if path
    }
    return {key: open_image(*key) for key in sorted(wanted)}


def unit_pixels(image: Image.Image) -> Tensor:
    """A PIL image -> (1, 3, H, W) float32 in [0, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in about [-1, 1] -> PIL: clamp((x + 1) / 2) * 255, truncated."""
    scaled = ((pixels.float() + 1) / 2).clamp(0, 1) * 255
    return Image.fromarray(scaled.to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def check_finite(x: Tensor, what: str, dtype: torch.dtype, cause: Callable[[], str] = str) -> None:
    """Raises ValueError where `x` holds NaN or infinity: with the cause, where that is known, else the dtype to try."""
    if not torch.isfinite(x).all():
        if line := cause():
            raise ValueError(f"{line}; {what} became NaN or infinite by it; no picture is saved")
        others = {torch.float16: "try --dtype bfloat16 or float32", torch.bfloat16: "try --dtype float32"}
        advice = others.get(dtype, "the model file may be damaged: download it again")
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"{what} became NaN or infinite in {name}; no picture is saved; {advice}")


# ---- what no flag is to blame for ----------------------------------------------------------------


class OutOfMemory(MemoryError):
    """Memory ran out; the text says while doing what, and which flags to turn down."""


NO_MEMORY = (
    "can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "std::bad_alloc",
    "failed to allocate",
)  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has a type for that on GPUs only."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    foreign = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
    return foreign and any(sign in str(error).lower() for sign in NO_MEMORY)


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]} ..."


@contextlib.contextmanager
def explained(doing: str, turn: str) -> Iterator[None]:
    """Turns what torch raises without saying what to do about it into one line.

    turn: the flags to turn down where memory runs out. Raises `OutOfMemory`, and ValueError where nothing can be
    compiled.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise OutOfMemory(f"out of memory while {doing}; try {turn} ({one_line(error)})") from None
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            why = lines[0] if lines else type(error).__name__
            raise ValueError(
                f"--compile: the blocks cannot be compiled here ({why[:300]}); leave it out, or install a compiler"
            ) from None
        raise


# ---- the engine ----------------------------------------------------------------------------------


class NotLoaded(AttributeError, ValueError):
    """What was asked for needs a model, and none is loaded."""


def _whole(load: Callable[..., SD3Inferencer]) -> Callable[..., SD3Inferencer]:
    """Lets a load that fails leave nothing of its model behind."""

    @functools.wraps(load)
    def wrapped(engine: SD3Inferencer, *args: Any, **values: Any) -> SD3Inferencer:
        engine._forget()
        try:
            return load(engine, *args, **values)
        except BaseException:
            engine._forget()
            raise

    return wrapped


class SD3Inferencer:
    """Loads once, makes many pictures. `load` reads headers and checks files; weights are opened when needed: each
    text encoder while prompts are encoded, then the MMDiT, which stays.

    What is asked of an engine before `load`, or after a load that failed, raises `NotLoaded`, a ValueError.
    """

    def __init__(self) -> None:
        self.quiet = sys.stderr is None  # as in programs without a console
        self._said: dict[str, None] = {}
        self._forget()

    def __getattr__(self, name: str) -> Any:
        """Called for what is not there: everything that `load` sets, as long as nothing is loaded."""
        if name.startswith("__"):
            raise AttributeError(name)
        if "defaults" not in self.__dict__:
            raise NotLoaded("no model is loaded; call SD3Inferencer.load first")
        if name in ("positions", "encoder_parts", "encoder_configs") or "tokenizer" in name:
            raise NotLoaded("this model was loaded without text encoders (load_tokenizers=False)")
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def _forget(self) -> None:
        """Drops everything that belongs to a loaded model."""
        for name in set(vars(self)) - {"quiet", "_said"}:
            delattr(self, name)
        self.mmdit: MMDiT | None = None
        self.vae: VAE | None = None
        self.controlnet: ControlNet | None = None
        self.encoders_opened = 0  # how often a text encoder was read from disk
        self.stages: dict[str, float] = {}  # seconds by stage
        self._resident: dict[tuple[str, int | str], nn.Module] = {}  # layers of text encoders that stay
        self._cond: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._rotations: tuple[tuple, Rotations] | None = None
        self.notes: list[str] = []  # of the last `plan`
        self.as_given: dict[str, Any] = {}  # fields of the last `plan` that had no effect, as they were given
        self._damage: str | None = None  # see `damage`
        self.files = Unchanged()  # all that this engine was loaded from

    def say(self, text: str, once: bool = False) -> None:
        """A line for the person at the shell, above any progress bar."""
        if once and text in self._said:
            return
        if once:
            while len(self._said) >= MOST_SAID:
                self._said.pop(next(iter(self._said)))
            self._said[text] = None
        if not self.quiet:
            tqdm.write(text, file=sys.stderr)

    def say_notes(self) -> None:
        """Says, once each, the notes of the last `plan`."""
        for note in self.notes:
            self.say(note, once=True)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time spent inside to `stages`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - start

    # -- loading --

    @_whole
    def load(
        self,
        model: str = "models/sd3_medium.safetensors",
        vae: str | None = None,
        shift: float | None = None,
        controlnet_ckpt: str | None = None,
        model_folder: str | None = None,
        text_encoder_device: str | torch.device = "auto",
        verbose: bool = False,
        load_tokenizers: bool = True,
        *,
        device: str | torch.device = "auto",
        dtype: str = "auto",
        no_t5: bool = False,
        t5_resident: bool = False,
        embed_cache: str | None = None,
        weights: str = "full",
        compile: bool = False,
        offload: bool = False,
        clip_l: str | None = None,
        clip_g: str | None = None,
        t5xxl: str | None = None,
    ) -> SD3Inferencer:
        """Reads headers, checks that all files are there and fit each other, decides device and dtype.

        model_folder: where text encoders and tokenizers lie (default: the model file's folder, then `models`);
        t5_resident: text encoders stay in memory; embed_cache: folder of encoded prompts; weights: full, int8 or fp8;
        compile: see `MMDiT.compile_blocks`; offload: blocks stay in main memory, see `offload`; clip_l, clip_g, t5xxl:
        files of text encoders, in place of those that the model file holds or that are found.
        Raises FileNotFoundError or ValueError that names the file and what is wrong with it.
        """
        chosen = {"device": device, "text_encoder_device": text_encoder_device}  # a device of torch's is read already
        given = {
            "model": model, "vae": vae, "shift": shift, "controlnet_ckpt": controlnet_ckpt,
            "model_folder": model_folder, "verbose": verbose, "dtype": dtype, "no_t5": no_t5,
            "t5_resident": t5_resident, "embed_cache": embed_cache, "weights": weights, "compile": compile,
            "offload": offload, "clip_l": clip_l, "clip_g": clip_g, "t5xxl": t5xxl,
        }  # fmt: skip
        read = Flags(**read_values(given | {n: v for n, v in chosen.items() if not isinstance(v, torch.device)}))
        model, vae, shift, controlnet_ckpt = read.model, read.vae, read.shift, read.controlnet_ckpt
        model_folder, embed_cache, verbose, dtype = read.model_folder, read.embed_cache, read.verbose, read.dtype
        no_t5, t5_resident, weights, compile = read.no_t5, read.t5_resident, read.weights, read.compile
        offload, clip_l, clip_g, t5xxl = read.offload, read.clip_l, read.clip_g, read.t5xxl
        device, text_encoder_device = (
            value if isinstance(value, torch.device) else getattr(read, name) for name, value in chosen.items()
        )
        early = {Path(path): stamp(path) for path in (model, vae, controlnet_ckpt) if path}
        self.device = choose_device(device)
        same = text_encoder_device == "auto"
        self.encoder_device = self.device if same else choose_device(text_encoder_device, "text_encoder_device")
        self.no_t5 = no_t5
        self.t5_resident = t5_resident
        self.weights, self.compile, self.offload = weights, compile, offload
        self.model_file = self._open("model", model, fetch_model(model))
        own = self.model_file.path if self.model_file.folder else self.model_file.path.parent
        self.folders = [models_folder(model_folder)] if model_folder else [own]
        if not model_folder and self.folders != [Path("models")]:
            self.folders.append(Path("models"))
        self.mmdit_part = checkpoint.mmdit_part(self.model_file)
        self.config: MMDiTConfig = self.mmdit_part.config(MMDiTConfig.from_shapes, "an SD3 or SD3.5 model")
        self._check(self.mmdit_part, lambda: MMDiT(self.config))
        self.dtype = choose_dtype(dtype, self.device, self.mmdit_part.dtype_name())
        self._open_vae(vae)
        self.controlnet_part = self._open_controlnet(controlnet_ckpt) if controlnet_ckpt else None
        self.embed_cache = None
        if load_tokenizers:
            self._open_encoders({"clip_l": clip_l, "clip_g": clip_g, "t5xxl": t5xxl})
            self.embed_cache = self._open_embed_cache(embed_cache) if embed_cache else None
        self.files = self._opened(early, load_tokenizers)
        self.defaults, _ = resolve(Flags(model=model, shift=shift), self.model_file.metadata, self.large_controlnet)
        self.shift = self.defaults["shift"]
        if verbose:
            self.say(f"{self.model_file.path}: {self.config}")
            self.say(f"device {self.device}, text encoders on {self.encoder_device}, {self.dtype}, shift {self.shift}")
        return self

    @staticmethod
    def _open(flag: str, path: str, fetch: str = "") -> WeightFile:
        if not os.path.exists(path):
            raise FileNotFoundError(f"--{flag} {path}: no such file{fetch}")
        return WeightFile(path, flag)

    @staticmethod
    def _check(part: Part, make: Callable[[], nn.Module]) -> None:
        """Raises ValueError where a part of a file does not fit the module of its sizes, or holds nothing."""
        with reading(part.file.where, "has sizes of no model"):
            model = on_meta(make)
        part.check(model)
        part.check_filled(some_may_be_empty=isinstance(model, ControlNet))

    def _open_vae(self, path: str | None) -> None:
        file = self._open("vae", path) if path else self.model_file
        self.vae_part = checkpoint.vae_part(file)
        if not path and not checkpoint.has_vae(file):
            raise FileNotFoundError(f"--model {file.path}: holds no VAE; give one with --vae sd3_vae.safetensors")
        self.vae_config: VAEConfig = self.vae_part.config(VAEConfig.from_shapes, "a VAE")
        self._check(self.vae_part, lambda: VAE(self.vae_config))
        if self.vae_config.latent_channels != self.config.latent_channels:
            raise ValueError(
                f"--vae {file.path}: has {self.vae_config.latent_channels} latent channels, "
                f"the model has {self.config.latent_channels}"
            )

    def _open_controlnet(self, path: str) -> Part:
        part = controlnet_part(self._open("controlnet_ckpt", path))
        config = part.config(ControlNetConfig.from_shapes, "an SD3 ControlNet")
        config.check_base(self.config, path)
        self.controlnet_chained = config.chained(self.config)
        self.controlnet_config = config
        self._check(part, lambda: ControlNet(config, self.controlnet_chained))
        control_kind(part)
        return part

    @property
    def large_controlnet(self) -> bool:
        """Whether a ControlNet of the 8B kind is given: its usual settings then hold."""
        return self.controlnet_part is not None and self.controlnet_chained

    def _open_encoders(self, given: dict[str, str | None]) -> None:
        roles = ("clip_l", "clip_g") if self.no_t5 else checkpoint.ENCODERS
        if self.no_t5 and given["t5xxl"]:
            self.say("note: --t5xxl is not used: --no_t5")
        fit = checkpoint.Fit(self.config.pooled_width, self.config.context_width)
        self.encoder_parts = checkpoint.find_encoders(roles, self.model_file, self.folders, given, fit)
        self.encoder_configs: dict[str, Any] = {}
        for role, part in self.encoder_parts.items():
            if role == "t5xxl":
                config = part.config(T5Config.from_shapes, "a T5 encoder")
                self._check(part, lambda c=config: T5(c))
            else:
                options = {"activation": CLIP_ACTIVATIONS[role], "projection": role == "clip_g"}
                config = part.config(lambda s, o=options: CLIPConfig.from_shapes(s, **o), "a CLIP text encoder")
                self._check(part, lambda c=config: CLIP(c))
            self.encoder_configs[role] = config
        clip_l, clip_g = self.encoder_configs["clip_l"], self.encoder_configs["clip_g"]
        if clip_l.width + clip_g.width != self.config.pooled_width:
            raise ValueError(
                f"{self.encoder_parts['clip_l'].file.where} and {self.encoder_parts['clip_g'].file.path}: have widths "
                f"{clip_l.width} + {clip_g.width}, the model needs {self.config.pooled_width}: wrong text encoders"
            )
        if not self.no_t5 and (width := self.encoder_configs["t5xxl"].width) != self.config.context_width:
            raise ValueError(
                f"{self.encoder_parts['t5xxl'].file.where}: has width {width}, "
                f"the model needs {self.config.context_width}: not this model's T5"
            )
        beside = [p.file.path.parent for p in self.encoder_parts.values()]
        folders = list(dict.fromkeys([*self.folders, *beside]))
        kinds = ("clip",) if self.no_t5 else ("clip", "t5")
        self.tokenizer_folders = {kind: checkpoint.find_tokenizer(kind, folders) for kind in kinds}
        rows = min(clip_l.vocabulary, clip_g.vocabulary)
        self.clip_tokenizer = CLIPTokenizer(self.tokenizer_folders["clip"], rows=rows)
        self.t5_tokenizer = None
        if not self.no_t5:
            rows = self.encoder_configs["t5xxl"].vocabulary
            self.t5_tokenizer = T5Tokenizer(self.tokenizer_folders["t5"], rows=rows)
        self.positions = min(clip_l.positions, clip_g.positions)  # their tokens lie side by side

    def text_files(self) -> dict[str, set[Path]]:
        """The files that decide how text is encoded, by encoder and tokenizer."""
        files = {}
        for role, part in self.encoder_parts.items():
            files[role] = {e.path for name, e in part.file.entries.items() if name.startswith(part.prefix)}
        for kind, place in self.tokenizer_folders.items():
            names = {name for names in checkpoint.TOKENIZER_FILES[kind] for name in names}
            files[f"{kind} tokenizer"] = {place / name for name in names if (place / name).is_file()}
        return files

    def _opened(self, early: Mapping[Path, Stamp | None], text: bool) -> Unchanged:
        """Everything that was opened; early: stamps from before that, by path."""
        files = Unchanged()
        parts = {"model": self.mmdit_part, "vae": self.vae_part, "controlnet_ckpt": self.controlnet_part}
        own = {entry.path for entry in self.model_file.entries.values()}
        for flag, part in parts.items():
            for path in sorted({e.path for e in part.file.entries.values()} if part else ()):
                if flag == "model" or path not in own:
                    files.add(f"--{flag} {path}", path, early.get(path))
        for role, paths in self.text_files().items() if text else ():
            for path in sorted(paths - own):
                files.add(f"{role} {path}", path)
        return files

    def _open_embed_cache(self, folder: str) -> EmbedCache:
        files = self.text_files()
        dtype, positions, config = encoder_dtype(self.dtype), self.positions, self.config
        how = {
            "dtype": str(dtype),
            "device": [self.encoder_device.type, device_record(self.encoder_device)],
            "no_t5": self.no_t5,
            "prefixes": {role: part.prefix for role, part in self.encoder_parts.items()},
            "widths": [config.pooled_width, config.context_width, positions],
            "versions": {n: v for n, v in saving.versions().items() if n in ("torch", "tokenizers")},
        }

        def fits(length: int, context: Tensor, pooled: Tensor) -> bool:
            shapes = (1, positions + length, config.context_width), (1, config.pooled_width)
            return (context.shape, pooled.shape) == shapes and {context.dtype, pooled.dtype} == {dtype}

        return EmbedCache(folder, files, how, fits)

    def encoder_files(self) -> dict[str, dict[str, Any]]:
        """Name, bytes and identity (see `file_identity`) of what encodes text and is not in the model file, by role."""
        own = {entry.path for entry in self.model_file.entries.values()}
        return {role: _described(files) for role, paths in self.text_files().items() if (files := sorted(paths - own))}

    def component_files(self) -> dict[str, dict[str, Any]]:
        """As `encoder_files`, of a model that is a folder: each of its components that is used. Its sha256 is of the
        transformer alone, and it is no file that could be looked at as a whole.
        """
        if not self.model_file.folder:
            return {}
        parts = {"transformer": self.mmdit_part, "vae": self.vae_part, **getattr(self, "encoder_parts", {})}
        out = {}
        for role, part in parts.items():
            files = {e.path for name, e in part.file.entries.items() if name.startswith(part.prefix)}
            if part.file is self.model_file:
                out[role] = _described(sorted(files))
        return out

    def check_size(self, width: int, height: int) -> None:
        """Raises ValueError for a size that the model's position grid or its cells do not allow."""
        cell = self.vae_config.downscale * self.config.patch
        for flag, size in (("width", width), ("height", height)):
            if size % cell:
                raise ValueError(f"--{flag} {size}: must be a multiple of {cell} for this model")
            if size > cell * self.config.grid:
                raise ValueError(
                    f"--{flag} {size}: is beyond this model's position grid; at most {cell * self.config.grid}"
                )

    # -- text --

    def t5_length(self, prompt: str) -> int:
        """How many T5 tokens a prompt is encoded at (at least as many as CLIP takes: 77)."""
        if self.t5_tokenizer is None:
            return self.positions
        return len(self.t5_tokenizer.tokenize(prompt, self.positions).ids)

    def pair_length(self, prompt: str, negative: str) -> int:
        """The T5 length at which both halves of a guided run are encoded."""
        return max(self.t5_length(prompt), self.t5_length(negative))

    def get_cond(self, prompt: str, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Text tokens (1, L, T5 width) and pooled text (1, CLIP-L + CLIP-G widths) of a prompt.

        length: T5 tokens to pad to (None: as few as usual).
        """
        key = (prompt, length or self.t5_length(prompt))
        if key not in self._cond:
            self.encode([key])
        return self._cond[key]

    def text_mask(self, prompt: str, length: int) -> Tensor:
        """Which of a prompt's text tokens, encoded at T5 length `length`, are no padding: (T,) bool on the CPU."""
        clip = self.clip_tokenizer.tokenize(prompt, self.positions)
        words = clip.ids.index(self.clip_tokenizer.end, 1) + 1  # start, words and end
        pieces = 0 if self.t5_tokenizer is None else len(self.t5_tokenizer.tokenize(prompt, 0).ids)
        rest = self.positions if self.t5_tokenizer is None else length
        return torch.cat([torch.arange(self.positions) < words, torch.arange(rest) < pieces])

    def know_text(self, text: Mapping[tuple[str, int], tuple[Tensor, Tensor]]) -> None:
        """Takes prompts that another engine of the same files encoded: by (prompt, T5 length), see `get_cond`."""
        for key, cond in text.items():
            self._cond[key] = tuple(part.to(self.device, self.dtype) for part in cond)

    @property
    def known_texts(self) -> int:
        """How many encoded prompts are held."""
        return len(self._cond)

    def forget_text(self) -> None:
        """Drops the prompts encoded so far; they are encoded again where they come again."""
        self._cond.clear()

    @torch.no_grad()
    def encode(self, wanted: Sequence[tuple[str, int]]) -> None:
        """Encodes every (prompt, T5 length) not known yet, each once and alone, so that no prompt's tokens depend on
        its neighbours. Each encoder is read, used for all and dropped before the next.
        """
        keys = [k for k in dict.fromkeys(wanted) if k not in self._cond]
        turn = "--text_encoder_device cpu, --no_t5 True, or fewer prompts at a time"
        with self.unchanged(), explained("encoding prompts", turn):
            self._encode(keys)

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Where what is inside fails because a file is another one by now, says that and not what came of it."""
        try:
            yield
        except Exception:
            self.files.check()
            raise

    def _encode(self, keys: list[tuple[str, int]]) -> None:
        if self.embed_cache is not None:
            known = {key: text for key in keys if (text := self.embed_cache.read(*key)) is not None}
            self.know_text(known)
            keys = [k for k in keys if k not in known]
        if not keys:
            return
        prompts = list(dict.fromkeys(p for p, _ in keys))
        dtype = encoder_dtype(self.dtype)
        clip = {}
        for role in ("clip_l", "clip_g"):
            with self.timed(f"loading and running {role}"):
                clip[role] = self._run_clip(role, prompts, dtype)
        with self.timed("loading and running t5xxl"):
            t5 = self._run_t5(keys, dtype)
        if self.embed_cache is not None:
            self.files.check()  # an entry says which files made it
        for key in keys:
            (hidden_l, pooled_l), (hidden_g, pooled_g) = clip["clip_l"][key[0]], clip["clip_g"][key[0]]
            context = join_text(hidden_l, hidden_g, t5[key])
            pooled = torch.cat([pooled_l, pooled_g], dim=-1)
            if self.embed_cache is not None:
                try:
                    self.embed_cache.write(*key, (context, pooled))
                except OSError as error:  # the prompt is encoded; it is only not kept
                    self.say(f"note: --embed_cache: {error.strerror or error}", once=True)
            self._cond[key] = tuple(t.to(self.device, self.dtype) for t in (context, pooled))

    def _run_clip(self, role: str, prompts: list[str], dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
        """CLIP layer by layer: each is read, run on all prompts and dropped, so the peak is one layer."""
        part, config, device = self.encoder_parts[role], self.encoder_configs[role], self.encoder_device
        self.encoders_opened += (role, 0) not in self._resident
        words, positions = self._tables(part, CLIP_EMBEDDINGS)
        positions = table_rows(positions, range(self.positions)).float()
        ids, states = {}, {}
        for prompt in prompts:
            pad = 0 if role == "clip_g" else None
            tokens = self.clip_tokenizer.tokenize(prompt, self.positions, pad)
            if tokens.cut:
                limit = self.positions
                self.say(f'note: "{_short(prompt)}" is cut: CLIP takes {limit} tokens (T5 reads on)', once=True)
            ids[prompt] = torch.tensor([tokens.ids], device=device)
            x = table_rows(words, tokens.ids).float() + positions
            states[prompt] = x.to(device, dtype)[None]
        del words
        hidden = {}
        for i in tqdm(range(config.depth), desc=f"encoding {role}", disable=self.quiet, leave=False):
            make = lambda: CLIPLayer(config)  # noqa: E731
            layer = self._layer(role, i, make, part, f"{CLIP_LAYERS}{i}.", dtype)
            for prompt, x in states.items():
                hidden[prompt], states[prompt] = x, layer(x)
        end = self._layer(role, "end", lambda: CLIPEnd(config), part, "", dtype)
        return {prompt: (hidden[prompt], end(x, ids[prompt])) for prompt, x in states.items()}

    def _run_t5(self, keys: list[tuple[str, int]], dtype: torch.dtype) -> dict[tuple[str, int], Tensor]:
        """T5 block by block, as `_run_clip`."""
        if self.no_t5:
            shape = (1, self.positions, self.config.context_width)
            return {key: torch.zeros(shape, dtype=dtype, device=self.encoder_device) for key in keys}
        part, config, device = self.encoder_parts["t5xxl"], self.encoder_configs["t5xxl"], self.encoder_device
        self.encoders_opened += ("t5xxl", 0) not in self._resident
        states = {}
        (table,) = self._tables(part, [T5_EMBEDDING])
        for prompt, length in keys:
            tokens = self.t5_tokenizer.tokenize(prompt, length)
            if tokens.cut:
                self.say(f'note: "{_short(prompt)}" is cut: T5 reads its first 226 characters', once=True)
            states[prompt, length] = table_rows(table, tokens.ids).to(device, torch.float32)[None]
        del table
        biases: dict[int, Tensor] = {}
        for i in tqdm(range(config.depth), desc="encoding t5xxl", disable=self.quiet, leave=False):
            make = lambda i=i: T5Block(config, bias=i == 0)  # noqa: E731
            block = self._layer("t5xxl", i, make, part, f"encoder.block.{i}.", dtype)
            if i == 0:
                bias_table = block.layer[0].SelfAttention.relative_attention_bias.weight
                lengths = {length for _, length in keys}
                biases = {length: t5_position_bias(bias_table, length) for length in lengths}
            for key, x in states.items():
                states[key] = block(x, biases[key[1]])
        norm = self._layer("t5xxl", "end", lambda: T5Norm(config.width), part, "encoder.final_layer_norm.", dtype)
        return {key: norm(x) for key, x in states.items()}

    @staticmethod
    def _tables(part: Part, names: list[str]) -> list[Tensor]:
        """Embedding tables, mapped: only the rows that are used are read."""
        tables = dict(part.read(names, "cpu", None))
        return [tables[name] for name in names]

    def _layer(
        self, role: str, place: int | str, make: Callable[[], nn.Module], part: Part, stem: str, dtype: torch.dtype
    ) -> nn.Module:
        """A layer of a text encoder with its weights, read from below `stem`; kept where encoders stay resident."""
        if (role, place) in self._resident:
            return self._resident[role, place]
        layer = on_meta(make)
        Part(part.file, part.prefix + stem).load_into(layer, self.encoder_device, dtype)
        if self.t5_resident:
            self._resident[role, place] = layer
        return layer

    def _load(self, part: Part, model: nn.Module, what: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        size = sum(p.numel() for p in model.parameters()) * torch.empty((), dtype=dtype).element_size()
        turn = "--weights int8, --dtype bfloat16 or, with a GPU, --offload True"
        bar = byte_bar(f"loading {what}", size, self.quiet)
        with self.unchanged(), explained(f"loading the {what}", turn), self.timed(f"loading {what}"), bar as progress:
            return part.load_into(model, device, dtype, progress)

    def damage(self) -> str:
        """A line about the first weight in a file that is NaN or infinite, or ``: then the dtype is to blame. Reads all
        files, once.
        """
        if self._damage is None:
            parts = [self.mmdit_part, self.vae_part, self.controlnet_part, *getattr(self, "encoder_parts", {}).values()]
            self._damage = ""
            for part in filter(None, parts):
                if name := part.not_finite():
                    self._damage = f"{part.file.where}: {name} holds NaN or infinity: download the file again"
                    break
        return self._damage

    # -- pictures to latents and back --

    @property
    def vae_dtype(self) -> torch.dtype:
        """float16 where the MMDiT runs in it on a GPU, else float32: bfloat16 would show as banding."""
        return torch.float16 if self.dtype == torch.float16 and self.device.type != "cpu" else torch.float32

    def get_vae(self) -> VAE:
        """The autoencoder, loaded on first use."""
        if self.vae is None:
            model = on_meta(lambda: VAE(self.vae_config))
            vae = self._load(self.vae_part, model, "VAE", self.device, self.vae_dtype)
            self.vae = vae.to(memory_format=torch.channels_last)  # the order that convolutions are fastest in
        return self.vae

    def get_mmdit(self) -> MMDiT:
        """The MMDiT, loaded on first use; it stays on its device."""
        if self.mmdit is None:
            model = on_meta(lambda: MMDiT(self.config))
            if self.weights != "full":
                hold_linears(model.joint_blocks, self.weights)
            elif not self.offload:
                model.join_modulations(self.device, self.dtype)
                if can_pack(self.device, self.dtype):
                    hold_linears(model.joint_blocks, "packed")
            if self.offload:
                self._load(self.mmdit_part, model, "MMDiT", torch.device("cpu"), self.dtype)
                model.offload = Offload(model.joint_blocks, self.device)
                for module in model.children():
                    if module is not model.joint_blocks:
                        module.to(self.device)
                model.pos_embed = nn.Parameter(model.pos_embed.to(self.device), requires_grad=False)
            else:
                self._load(self.mmdit_part, model, "MMDiT", self.device, self.dtype)
            if self.compile:
                model.compile_blocks()
            self.mmdit = model
        return self.mmdit

    def get_controlnet(self) -> ControlNet | None:
        """The ControlNet, loaded on first use, or None."""
        if self.controlnet is None and self.controlnet_part is not None:
            model = on_meta(lambda: ControlNet(self.controlnet_config, self.controlnet_chained))
            self.controlnet = self._load(self.controlnet_part, model, "ControlNet", self.device, self.dtype)
        return self.controlnet

    @torch.no_grad()
    def vae_encode(
        self, image: Image.Image, seed: int | Sequence[int] = DEFAULT_SEED, control: bool = False, tile: int = 0
    ) -> Tensor:
        """Latents (one per seed, 16, H/8, W/8), in VAE space, of an RGB image.

        The encoding noise is a stream of the seed apart from the start noise; control: the image is for the
        ControlNet, whose kind decides the pixel range; tile: side of a tile in pixels, 0 for none.
        """
        seeds = read_row_seeds(seed)
        tile = read_tile("vae_tile", tile) or 0
        if not isinstance(image, Image.Image):
            raise ValueError(f"vae_encode takes a picture of Pillow's, not {display(image)}")
        if control and self.controlnet_part is None:
            raise ValueError("no ControlNet is loaded that could read a control image; load one with controlnet_ckpt")
        pixels = unit_pixels(image)
        if control:
            kind = control_kind(self.controlnet_part)
            pixels = control_pixels(pixels, self.controlnet_chained, kind)
        else:
            pixels = pixels * 2 - 1
        vae = self.get_vae()
        mean, logvar = vae.moments(pixels.to(self.device, self.vae_dtype), tile)
        noise = sd3_impls.start_noise(seeds, mean.shape, "control image" if control else "initial image")
        return vae.sample(mean.float(), logvar.float(), noise.to(self.device))

    @torch.no_grad()
    def decode_pixels(self, latent: Tensor, tile: int = 0) -> Tensor:
        """Pixels (B, 3, H, W), about [-1, 1], of latents in VAE space, one at a time; tile: see `vae_encode`."""
        vae = self.get_vae()
        return torch.cat([vae.decode(row[None].to(self.vae_dtype), tile) for row in latent])

    def vae_tile(self, width: int, height: int) -> int:
        """Side in pixels of the tiles that a picture is decoded in: 0 (none) where what decoding it whole needs is
        less than a third of the device's memory.
        """
        needed = self.vae_config.decoding_bytes(width, height, self.vae_dtype)
        return 0 if needed <= device_memory(self.device) / 3 else VAE_TILE

    def vae_decode(self, latent: Tensor, tile: int = 0) -> Image.Image:
        """The first latent of (B, 16, h, w), in VAE space, as a PIL image; tile: see `vae_encode`."""
        pixels = self.decode_pixels(latent[:1].to(self.device), tile)
        check_finite(pixels, "the decoded picture", self.vae_dtype, self.damage)
        return to_image(pixels[0])

    # -- sampling --

    @torch.no_grad()
    def do_sampling(
        self,
        latent: Tensor,
        seed: int | Sequence[int],
        conditioning: tuple[Tensor, Tensor],
        neg_cond: tuple[Tensor, Tensor] | None,
        steps: int,
        cfg_scale: float,
        sampler: str = "dpmpp_2m",
        controlnet_cond: Tensor | None = None,
        denoise: float = 1.0,
        skip_layer_config: SkipLayerConfig | dict[str, Any] | None = None,
        residual_config: ResidualConfig | None = None,
        *,
        shift: float | None = None,
        controlnet_strength: float = 1.0,
        callback: Callable[[int], Any] | None = None,
        hooks: Sequence[ContextHook] = (),
        cache: float = 0.0,
    ) -> Tensor:
        """Latents (B, 16, h, w) in VAE space, float32.

        latent: start (B, 16, h, w) in model space, zeros for text to image; seed: one per row (a number for one row);
        conditioning and
        neg_cond: (text tokens (1 or B, T, X), pooled (1 or B, Y)), neg_cond unused where cfg_scale is 1;
        controlnet_cond: latents of the control image in model space; denoise: part of the schedule that runs;
        hooks: see the text tokens entering every block, after residual streaming; cache: see `mmditx.Reuse`, rows
        then run one by one.
        """
        seeds = read_row_seeds(seed)
        if not isinstance(latent, Tensor) or latent.ndim != 4:
            raise ValueError("latent: must be a tensor (B, channels, height, width)")
        if len(seeds) != latent.shape[0]:
            raise ValueError(f"--seed: {len(seeds)} given for {latent.shape[0]} rows of the latent; give one for each")
        read = read_values(
            {
                "steps": steps, "cfg": cfg_scale, "sampler": sampler, "denoise": denoise, "shift": shift,
                "controlnet_strength": controlnet_strength, "cache": cache,
            }
        )  # fmt: skip
        for name in ("steps", "cfg"):
            if name not in read:
                raise ValueError(f"--{name}: is missing")
        steps, cfg_scale, shift, cache = read["steps"], read["cfg"], read.get("shift"), read.get("cache", 0.0)
        sampler, denoise = read.get("sampler", "dpmpp_2m"), read.get("denoise", 1.0)
        controlnet_strength = read.get("controlnet_strength", 1.0)
        if controlnet_cond is not None and self.controlnet_part is None:
            raise ValueError("controlnet_cond is given and no ControlNet is loaded; load one with controlnet_ckpt")
        if cfg_scale != 1 and neg_cond is None:
            raise ValueError(f"--cfg {cfg_scale:g}: needs neg_cond, the other half; a cfg of 1 goes without")
        if cache and len(seeds) > 1:
            return self._one_by_one(
                latent,
                seeds,
                conditioning,
                neg_cond,
                controlnet_cond,
                steps=steps,
                cfg_scale=cfg_scale,
                sampler=sampler,
                denoise=denoise,
                skip_layer_config=skip_layer_config,
                residual_config=residual_config,
                shift=shift,
                controlnet_strength=controlnet_strength,
                callback=callback,
                hooks=hooks,
                cache=cache,
            )
        config = _residual(residual_config)
        config.check(self.config.depth)
        stream = residual_stream(config, self.get_rotations(config))
        model = self.get_mmdit()
        sigmas = sd3_impls.flow_schedule(steps, self.shift if shift is None else shift)
        sigmas = sd3_impls.remaining(sigmas, steps, denoise)
        denoiser = sd3_impls.Denoiser(
            model,
            self._rows(conditioning, len(seeds)),
            None if cfg_scale == 1 or neg_cond is None else self._rows(neg_cond, len(seeds)),
            cfg_scale,
            steps=steps,
            skip_layer=_skip_layer(skip_layer_config),
            controlnet=self.get_controlnet() if controlnet_cond is not None else None,
            control=controlnet_cond,
            control_strength=controlnet_strength,
            hooks=[*([stream] if stream else []), *hooks],
            steps_run=len(sigmas) - 1,
            cache=cache,
        )
        latent = latent.to(self.device)
        return sd3_impls.latent_out(sd3_impls.guided_sampling(denoiser, sampler, latent, seeds, sigmas, callback))

    def _one_by_one(
        self,
        latent: Tensor,
        seeds: Sequence[int],
        conditioning: tuple[Tensor, Tensor],
        neg_cond: tuple[Tensor, Tensor] | None,
        control: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """`do_sampling` row by row; what has one row serves for all."""

        def row(tensor: Tensor, i: int) -> Tensor:
            return tensor[i : i + 1] if tensor.shape[0] > 1 else tensor

        def text(cond: tuple[Tensor, Tensor] | None, i: int) -> tuple[Tensor, Tensor] | None:
            return None if cond is None else (row(cond[0], i), row(cond[1], i))

        out = []
        for i, seed in enumerate(seeds):
            own = None if control is None else row(control, i)
            out.append(
                self.do_sampling(
                    latent[i : i + 1],
                    [seed],
                    text(conditioning, i),
                    text(neg_cond, i),
                    controlnet_cond=own,
                    **options,
                )
            )
        return torch.cat(out)

    def get_rotations(self, config: ResidualConfig) -> Rotations | None:
        """The rotations that a configuration needs, read and checked once; None where it needs none.

        Raises FileNotFoundError, or ValueError for a file that does not fit (see `residual.read_rotations`).
        """
        if config.mode != "aligned" or not config.active or config.rotations is None:
            return None
        key = (config.rotations, config.origin, config.targets, stamp(config.rotations))
        if self._rotations is None or self._rotations[0] != key:
            self._rotations = (key, read_rotations(config.rotations, config, self.config.width))
        return self._rotations[1]

    def _rows(self, cond: tuple[Tensor, Tensor], rows: int) -> sd3_impls.Conditioning:
        context, pooled = (t.to(self.device, self.dtype) for t in cond)
        return sd3_impls.Conditioning(
            context.expand(rows, -1, -1) if context.shape[0] == 1 else context,
            pooled.expand(rows, -1) if pooled.shape[0] == 1 else pooled,
        )

    # -- whole pictures --

    def batches(self, pictures: Sequence[Settings]) -> Iterator[list[tuple[int, Settings]]]:
        """Pictures with their numbers, in order, in batches that can share a run: same but for prompt and seed."""
        batch: list[tuple[int, Settings]] = []
        for item in enumerate(pictures):
            if batch and (len(batch) >= item[1].batch_size or not self._together(batch[0][1], item[1])):
                yield batch
                batch = []
            batch.append(item)
        if batch:
            yield batch

    def _together(self, a: Settings, b: Settings) -> bool:
        shared = dataclasses.replace(b, prompt=a.prompt, seed=a.seed) == a
        lengths = {self.pair_length(s.prompt, s.negative_prompt) for s in (a, b)}
        return shared and len(lengths) == 1

    def make(
        self, pictures: Sequence[Settings], pad_batch: bool = False
    ) -> Iterator[tuple[int, Settings, Image.Image]]:
        """Makes every picture; yields (number, settings, image) as each is done.

        The settings' batch_size is then the number of rows that ran at once. pad_batch: fills a partial batch up to
        batch_size, so that a picture does not depend, in its last bits, on how many were made with it.
        Prompts are encoded `TEXTS_AT_ONCE` at a time, before the pictures of them. Raises ValueError before any weights
        load where a setting does not fit the model, and where a latent turns NaN or infinite.
        """
        for s in pictures:
            self.check_settings(s)
        images = open_images(pictures)
        texts = lambda batch: [text for _, s in batch for text in self.texts(s)]  # noqa: E731
        for group in in_groups(self.batches(pictures), texts, TEXTS_AT_ONCE):
            self.encode_only([text for batch in group for text in texts(batch)], TEXTS_AT_ONCE)
            self.get_mmdit()
            self.get_controlnet()
            for batch in group:
                numbers, settings = zip(*batch, strict=True)
                more = f" and {len(batch) - 1} more" if len(batch) > 1 else ""
                what = f"picture {numbers[0] + 1}/{len(pictures)}{more}"
                for number, made in zip(numbers, self.make_batch(settings, images, what, pad_batch), strict=True):
                    if isinstance(made[1], ValueError):
                        with self.unchanged():  # weights that another program overwrites become NaN, too
                            raise made[1]
                    yield number, *made

    def encode_only(self, wanted: Sequence[tuple[str, int]], most: int) -> None:
        """As `encode`; where more than `most` texts would be held then, drops those that are not wanted."""
        if len(self._cond.keys() | set(wanted)) > most:
            keep = set(wanted)
            self._cond = {key: text for key, text in self._cond.items() if key in keep}
        self.encode(wanted)

    def texts(self, s: Settings) -> list[tuple[str, int]]:
        """What has to be encoded for a picture: (prompt, T5 length), see `encode`."""
        length = self.pair_length(s.prompt, s.negative_prompt)
        return [(s.prompt, length)] + ([(s.negative_prompt, length)] if s.cfg != 1 else [])

    def make_batch(
        self,
        batch: Sequence[Settings],
        images: Mapping[tuple, Image.Image] | None = None,
        what: str = "",
        pad_batch: bool = False,
    ) -> Iterator[tuple[Settings, Image.Image | ValueError]]:
        """The pictures of one batch (see `batches`); in place of one that turned NaN or infinite its error.

        images: see `sample`; pad_batch: see `make`.
        """
        rows = batch[0].batch_size if pad_batch else len(batch)
        turn = "a smaller --width or --height" if rows == 1 else "a smaller --batch_size, --width or --height"
        with explained("sampling", turn):
            latents = self.sample([*batch, *[batch[-1]] * (rows - len(batch))], images, what)
        self.get_vae()
        for s, latent in zip(batch, latents[: len(batch)], strict=True):
            s = dataclasses.replace(s, batch_size=rows)
            try:
                check_finite(latent, "the latent", self.dtype, self.damage)
                with self.timed("decoding"), explained("decoding", "a smaller --vae_tile, --width or --height"):
                    image = self.vae_decode(latent[None], s.vae_tile)
            except ValueError as error:
                yield s, error
            else:
                yield s, image

    def check_settings(self, s: Settings) -> None:
        """Raises ValueError where settings do not fit the loaded model."""
        self.check_size(s.width, s.height)
        residual = residual_of(s)
        residual.check(self.config.depth)
        residual_stream(residual, self.get_rotations(residual))
        if s.skip_layer and max(s.skip_layer.layers) >= self.config.depth:
            raise ValueError(
                f"--skip_layer_cfg: needs layers {s.skip_layer.layers}, this model has {self.config.depth}"
            )
        if s.controlnet_ckpt and self.controlnet_part is None:
            raise ValueError("--controlnet_ckpt: no ControlNet is loaded")
        if s.controlnet_cond_image and self.controlnet_part is None:
            raise ValueError(
                f"--controlnet_cond_image {s.controlnet_cond_image}: no ControlNet is loaded that could read it; load "
                "one with --controlnet_ckpt"
            )

    def sample(
        self,
        batch: Sequence[Settings],
        images: Mapping[tuple, Image.Image] | None = None,
        what: str = "",
        hooks: Sequence[ContextHook] = (),
    ) -> Tensor:
        """Latents (B, 16, h, w) in VAE space of pictures that can share a run (see `batches`).

        images: opened ones by (flag, path, width, height); what: the progress bar's name; hooks: see `do_sampling`.
        """
        images = images or {}
        s = batch[0]
        length = self.pair_length(s.prompt, s.negative_prompt)
        seeds = [b.seed for b in batch]
        conds = [self.get_cond(b.prompt, length) for b in batch]
        cond = tuple(torch.cat(parts) for parts in zip(*conds, strict=True))
        cell = self.vae_config.downscale
        shape = (len(batch), self.config.latent_channels, s.height // cell, s.width // cell)
        start, control, denoise = torch.zeros(shape), None, 1.0
        if s.init_image:
            image = images["init_image", s.init_image, s.width, s.height]
            start, denoise = sd3_impls.latent_in(self.vae_encode(image, seeds, tile=s.vae_tile)), s.denoise
        if s.controlnet_cond_image:
            image = images["controlnet_cond_image", s.controlnet_cond_image, s.width, s.height]
            control = sd3_impls.latent_in(self.vae_encode(image, seeds, True, s.vae_tile))
        bar = tqdm(total=executed_steps(s), desc=what, unit="step", disable=self.quiet, leave=False)
        with bar, self.timed("sampling"):
            return self.do_sampling(
                start,
                seeds,
                cond,
                None if s.cfg == 1 else self.get_cond(s.negative_prompt, length),
                s.steps,
                s.cfg,
                s.sampler,
                control,
                denoise,
                s.skip_layer,
                residual_of(s),
                shift=s.shift,
                controlnet_strength=s.controlnet_strength,
                callback=lambda step: bar.update(),
                hooks=hooks,
                cache=s.cache,
            )

    def gen_image(
        self,
        prompts: Sequence[str] = ("",),
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        cfg_scale: float | None = None,
        sampler: str | None = None,
        seed: int | None = None,
        seed_type: str | None = None,
        out_dir: str | Path = "outputs",
        controlnet_cond_image: str | None = None,
        init_image: str | None = None,
        denoise: float = DEFAULT_DENOISE,
        skip_layer_config: SkipLayerConfig | dict[str, Any] | None = None,
        residual_config: ResidualConfig | None = None,
        *,
        negative_prompt: str = "",
        num_images: int = 1,
        batch_size: int = 1,
        pad_batch: bool = False,
        controlnet_strength: float = 1.0,
        cache: float = 0.0,
        vae_tile: int | None = None,
        with_metadata: bool = True,
    ) -> list[Path]:
        """Makes a picture (or `num_images`) for every prompt and saves them as out_dir/000000.png and on.

        seed, seed_type: as on the command line: without both, seeds are drawn; a seed alone is where every prompt
        starts. Returns the paths. Settings left out (None) are the loaded model's usual ones. Raises ValueError before
        any weights load for settings that do not fit.
        """
        usual = self.defaults
        prompts = read_texts(prompts)
        residual = _residual(residual_config)
        skip_layer = _skip_layer(skip_layer_config)
        flags = Flags.read(
            {
                "width": width, "height": height, "steps": steps, "cfg": cfg_scale, "sampler": sampler, "seed": seed,
                "seed_type": seed_type, "out_dir": out_dir, "controlnet_cond_image": controlnet_cond_image,
                "controlnet_ckpt": None if self.controlnet_part is None else str(self.controlnet_part.file.path),
                "init_image": init_image, "denoise": denoise, "negative_prompt": negative_prompt,
                "num_images": num_images, "batch_size": batch_size, "pad_batch": pad_batch,
                "controlnet_strength": controlnet_strength, "cache": cache, "vae_tile": vae_tile,
            }
        )  # fmt: skip
        with_metadata = read_bool("with_metadata", with_metadata)
        given = {name: getattr(flags, name) for name in ("width", "height", "steps", "cfg", "sampler")}
        values = {name: usual[name] if value is None else value for name, value in given.items()}
        if skip_layer and flags.cfg is None:
            values["cfg"] = skip_layer.cfg
        pictures = self.plan(
            prompts,
            flags.seeds(len(prompts)),
            negative_prompt=flags.negative_prompt,
            init_image=flags.init_image,
            denoise=flags.denoise,
            controlnet_cond_image=flags.controlnet_cond_image,
            controlnet_strength=flags.controlnet_strength,
            skip_layer=skip_layer,
            batch_size=flags.batch_size,
            cache=flags.cache,
            vae_tile=self.vae_tile(values["width"], values["height"]) if flags.vae_tile is None else flags.vae_tile,
            **values,
            **residual_settings(residual),
        )
        given = dataclasses.replace(pictures[0], **self.as_given)  # the others differ in prompt and seed only
        self.check_settings(given)
        open_images([given])
        self.say_notes()
        pad_batch, out_dir = flags.pad_batch, flags.out_dir
        saving.check_writable(out_dir)
        folder = Path(out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        made_with = MadeWith(self, pictures[0], hashed=with_metadata)
        paths = []
        for number, settings, image in self.make(pictures, pad_batch):
            known = made_with.wait()
            paths.append(folder / f"{number:06d}.png")
            saving.save_picture(paths[-1], image, settings, known if with_metadata else None)
        return paths

    def plan(
        self, prompts: Sequence[str], seeds: Sequence[int], *, recorded: bool = False, **values: Any
    ) -> list[Settings]:
        """Settings of every picture, prompt by prompt; seeds: as many per prompt as there are pictures of it.

        What has no effect is set to its default, see `settings.effective`; `notes` say so, `as_given` has it as it was.
        recorded: the values come from a picture, perhaps of an earlier version, which encoded a prompt at the length of
        its negative prompt at cfg 1 too: it is kept where it is the longer one. Raises ValueError for what does not
        fit.
        """
        prompts, seeds = read_texts(prompts), list(seeds)
        if not seeds or len(seeds) % len(prompts):
            raise ValueError(f"--seed: {len(seeds)} given for {len(prompts)} prompts; give as many for each")
        shared = {
            "model": str(self.model_file.path),
            "vae": None if self.vae_part.file is self.model_file else str(self.vae_part.file.path),
            "controlnet_ckpt": None if self.controlnet_part is None else str(self.controlnet_part.file.path),
            "shift": self.shift,
            "no_t5": self.no_t5,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "text_encoder_device": str(self.encoder_device),
            "weights": self.weights,
            "compile": self.compile,
            "offload": self.offload,
        }
        per_prompt = len(seeds) // len(prompts)
        first = Settings(prompt=prompts[0], seed=seeds[0], **(shared | values))
        shown, self.notes = effective(first)  # prompt and seed have no part in it
        kept = first.negative_prompt
        if (
            recorded
            and kept != shown.negative_prompt
            and any(self.pair_length(p, kept) > self.t5_length(p) for p in prompts)
        ):
            shown = dataclasses.replace(shown, negative_prompt=kept)
            self.notes = [note for note in self.notes if not note.startswith("note: --negative_prompt")]
        if weighted := next((p for p in prompts if any(weight != 1 for _, weight in weighted_segments(p))), None):
            self.notes.append(f'note: "{_short(weighted)}": weights of words have no effect, and brackets are left out')
        names = [field.name for field in dataclasses.fields(Settings)]
        self.as_given = {n: getattr(first, n) for n in names if getattr(first, n) != getattr(shown, n)}
        return [dataclasses.replace(shown, prompt=prompts[i // per_prompt], seed=seed) for i, seed in enumerate(seeds)]

    def unknown_words(self, prompts: Sequence[str]) -> str:
        """A line about words that a model with a short vocabulary (its file names it) never saw, or ``."""
        known = self.model_file.metadata.get("words", "").split()
        if not known:
            return ""
        words = (w for p in prompts for w in re.findall(r"\w+", p.lower()))
        unknown = [w for w in dict.fromkeys(words) if w not in known]
        if not unknown:
            return ""
        named = ", ".join(f'"{w}"' for w in unknown[:8])
        return f"note: this small model never saw {named}; it knows: {' '.join(known)}"


Batch = TypeVar("Batch")


def in_groups(
    batches: Iterable[Batch], texts: Callable[[Batch], Iterable[tuple[str, int]]], most: int
) -> Iterator[list[Batch]]:
    """Batches in order, in groups of as many as have at most `most` different texts, but at least one batch."""
    group: list[Batch] = []
    of_group: set[tuple[str, int]] = set()
    for batch in batches:
        own = set(texts(batch))
        if group and len(of_group | own) > most:
            yield group
            group, of_group = [], set()
        group.append(batch)
        of_group |= own
    if group:
        yield group


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else prompt[:37] + "..."


def _skip_layer(config: SkipLayerConfig | Mapping[str, Any] | None) -> SkipLayerConfig | None:
    """Accepts the public reference's dictionary {"scale", "start", "end", "layers", "cfg"} too; raises ValueError."""
    if config is None or isinstance(config, SkipLayerConfig):
        return config
    if not isinstance(config, Mapping):
        raise ValueError(f"skip_layer_config {display(config)}: must be a SkipLayerConfig or a dictionary")
    if not config:
        return None
    return read_skip_layer({"start": 0.01, "end": 0.20, "cfg": 4.0} | dict(config))


def _residual(config: ResidualConfig | None) -> ResidualConfig:
    if config is None or isinstance(config, ResidualConfig):
        return config or ResidualConfig()
    raise ValueError(f"residual_config {display(config)}: must be a ResidualConfig, as build_residual_config makes one")


def read_texts(prompts: Any) -> list[str]:
    """Prompts from one text or several; raises ValueError where there is none, or something else among them."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise ValueError(f"--prompt {display(prompts)}: must be a text, or a list of texts")
    texts = [read_text("prompt", prompt) for prompt in prompts]
    if not texts:
        raise ValueError("--prompt: no prompt is given")
    return texts


def read_row_seeds(seed: Any) -> list[int]:
    """The seeds of a batch's rows, from one for one row or a list; raises ValueError."""
    rows = read_list("seed", seed) if isinstance(seed, Iterable) else [seed]
    return [READERS["seed"]("seed", one) for one in rows]


def residual_of(s: Settings) -> ResidualConfig:
    """The residual configuration that a picture's settings hold."""
    return ResidualConfig(**{name: getattr(s, setting) for name, setting in RESIDUAL_FLAGS.items()})


def residual_settings(config: ResidualConfig) -> dict[str, Any]:
    """A residual configuration as fields of `Settings`; rotations that no mode uses are left out."""
    values = {setting: getattr(config, name) for name, setting in RESIDUAL_FLAGS.items()}
    return values if config.mode == "aligned" else values | {"residual_rotations": None}


def residual_notes(flags: Flags, config: ResidualConfig) -> Iterator[str]:
    """Lines about residual flags that have no effect."""
    given = flags.residual()
    if (given or flags.residual_config) and not config.active:
        yield "note: --residual_target_layers is empty, so residual text streaming is off"
    elif "rotations" in given and config.mode != "aligned":
        yield f"note: --residual_rotations is not used: --residual_mode is {config.mode}, not aligned"


def _described(files: Sequence[Path]) -> dict[str, Any]:
    """Name, bytes and identity of files that belong together."""
    identity = hashlib.sha256(json.dumps([file_identity(path) for path in files]).encode()).hexdigest()
    name = files[0].name if len(files) == 1 else files[0].parent.name
    return {"name": name, "bytes": sum(p.stat().st_size for p in files), "identity": identity[:16]}


def _sha256(path: Path) -> str:
    return file_sha256(*path.rglob("*.safetensors")) if path.is_dir() else file_sha256(path)


IMAGES_AND_ROTATIONS = ("init_image", "controlnet_cond_image", "residual_rotations")  # files that `load` does not open


class MadeWith:
    """What pictures are made with beside their settings: hashes of the files, text encoders and the device. The
    hashes are computed while the first picture is made.

    Made before the files that the settings name are read: one that changes after that is noticed.
    """

    def __init__(self, engine: SD3Inferencer, settings: Settings, hashed: bool = True):
        """hashed: whether there is to be a record at all; else files are only watched."""
        self.engine, self.settings = engine, settings
        self.value: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.files = Unchanged()
        for name in IMAGES_AND_ROTATIONS:
            if path := getattr(settings, name):
                self.files.add(f"--{name} {path}", path)
        self.thread = threading.Thread(target=self._run, daemon=True) if hashed else None
        if self.thread:
            self.thread.start()

    def _run(self) -> None:
        try:
            engine, s = self.engine, self.settings
            paths = {name: getattr(s, name) for name in FILE_SETTINGS if name != "model"}
            hardware = device_record(engine.device)
            if engine.encoder_device.type != engine.device.type:
                beside = device_record(engine.encoder_device)
                hardware |= {f"text_encoder_{name}": value for name, value in beside.items()}
            more = {
                "files": {name: _sha256(Path(path)) for name, path in paths.items() if path},
                "encoders": engine.encoder_files(),
                "components": engine.component_files(),
                "hardware": hardware,
            }
            self.value = {"model_sha256": engine.model_file.sha256, **{n: v for n, v in more.items() if v}}
        except BaseException as error:  # handed to whoever waits
            self.error = error

    def check(self) -> None:
        """Raises `Changed` where a file is not what it was when it was opened."""
        self.engine.files.check()
        self.files.check()

    def hashes(self) -> dict[str, str]:
        """sha256 of the files by the names of their flags, once they are there."""
        if self.thread:
            self.thread.join()
        return {"model": self.value["model_sha256"], **self.value.get("files", {})} if self.value else {}

    def wait(self) -> dict[str, Any]:
        """The record of a picture that is to be kept, once it is there; raises `Changed` as `check` does, and OSError
        where a file could not be read.
        """
        if self.thread:
            self.thread.join()
        self.check()  # after the hashes: they are then of what was opened
        if self.error is not None:
            raise self.error
        return self.value


# ---- what is where -------------------------------------------------------------------------------


def fetch_model(path: str) -> str:
    """How to get a released model, as the end of an error line, or ``."""
    name = Path(path).name
    repository = FETCH.get(name.removesuffix(".safetensors"))
    if repository is None:
        return "; --list_models shows what there is"
    return f"; get it with: hf download {repository} {name} --local-dir {Path(path).parent}"


def models_folder(folder: str) -> Path:
    """The folder that --model_folder names; raises FileNotFoundError, or ValueError where it is something else."""
    if os.path.isdir(folder):
        if not os.access(folder, os.R_OK | os.X_OK):
            raise ValueError(f"--model_folder {folder}: may not be read")
        return Path(folder)
    if os.path.lexists(folder):
        raise ValueError(f"--model_folder {folder}: is not a folder")
    raise FileNotFoundError(f"--model_folder {folder}: no such folder")


def list_models(folder: str) -> str:
    """What was found in a models folder, what is missing and the command that fetches it."""
    place = models_folder(folder)
    lines, seen = [f"{place}:"], set()
    for path in sorted(p.parent for p in place.glob("*/transformer") if p.is_dir()):
        try:
            file = WeightFile(path)
            size = sum(p.stat().st_size for p in {e.path for e in file.entries.values()}) / 2**20
            lines.append(f"  found    {path.relative_to(place)}/  a model in diffusers layout, {size:,.0f} MB")
            seen.add(f"{model_key(path)}.safetensors")
        except (ValueError, OSError) as error:
            lines.append(f"  damaged  {error}")
    held: set[str] = set()  # roles of text encoders that were found, whatever their files are called
    for path in sorted([*place.glob("*.safetensors"), *place.glob("*/*.safetensors")]):
        try:
            file = WeightFile(path, folder=False)
            size = path.stat().st_size / 2**20
            held |= checkpoint.roles_of(file)
            lines.append(f"  found    {path.relative_to(place)}  {file.looks_like()}, {size:,.0f} MB")
            seen.add(path.name)
        except (ValueError, OSError) as error:
            lines.append(f"  damaged  {error}")
    for name, repository in FETCH.items():
        if not any(s.startswith((name + ".safetensors", f"{name}_incl")) for s in seen):
            file = f"{name}.safetensors"
            lines.append(f"  missing  {file}  hf download {repository} {file} --local-dir {place}")
    for role, names in checkpoint.ENCODER_FILES.items():
        if role not in held and not seen & set(names):
            get = checkpoint.fetch_encoder(role, place).removeprefix("get it with: ")
            lines.append(f"  missing  {role}  {get}")
    for kind in checkpoint.TOKENIZER_FOLDERS:
        try:
            lines.append(f"  found    {kind} tokenizer in {checkpoint.find_tokenizer(kind, [place])}")
        except FileNotFoundError as error:
            lines.append(f"  missing  {kind} tokenizer  {str(error).split('get it with: ')[-1]}")
    return "\n".join(lines)


# ---- the command line ----------------------------------------------------------------------------


class Stopped(BaseException):
    """SIGTERM arrived."""


class SelfCheckFailed(Exception):
    """A device computes what it should not; what it is has been printed."""


def load_for(flags: Flags) -> SD3Inferencer:
    """An engine with the files, the device and the dtype that flags name; raises as `SD3Inferencer.load` does."""
    return SD3Inferencer().load(
        flags.model,
        flags.vae,
        flags.shift,
        flags.controlnet_ckpt,
        flags.model_folder,
        flags.text_encoder_device,
        flags.verbose,
        device=flags.device,
        dtype=flags.dtype,
        no_t5=flags.no_t5,
        t5_resident=flags.t5_resident,
        embed_cache=flags.embed_cache,
        weights=flags.weights,
        compile=flags.compile,
        offload=flags.offload,
        clip_l=flags.clip_l,
        clip_g=flags.clip_g,
        t5xxl=flags.t5xxl,
    )


def plan_for(
    engine: SD3Inferencer,
    flags: Flags,
    prompts: Sequence[str],
    seeds: Sequence[int],
    skip_layer: SkipLayerConfig | None = None,
    recorded: bool = False,
) -> list[Settings]:
    """Settings of every picture that flags ask for, checked against the loaded model and the files they name.

    seeds: as many per prompt as there are pictures of it; skip_layer: in place of the model's own; recorded: see
    `SD3Inferencer.plan`. Raises ValueError or FileNotFoundError.
    """
    values, known = resolve(flags, engine.model_file.metadata, engine.large_controlnet)
    residual = ResidualConfig.from_flags(flags.residual(), flags.residual_config)
    pictures = engine.plan(
        prompts,
        seeds,
        recorded=recorded,
        negative_prompt=flags.negative_prompt,
        init_image=flags.init_image,
        denoise=flags.denoise,
        controlnet_cond_image=flags.controlnet_cond_image,
        controlnet_strength=flags.controlnet_strength,
        skip_layer=skip_layer or known,
        batch_size=flags.batch_size,
        cache=flags.cache,
        vae_tile=engine.vae_tile(values["width"], values["height"]) if flags.vae_tile is None else flags.vae_tile,
        **values,
        **residual_settings(residual),
    )
    if flags.skip_layer_cfg and not (skip_layer or known):
        unknown = f"no skip-layer settings are known for {Path(flags.model).name}"
        engine.notes.append(f"note: {unknown}; --skip_layer_cfg is off")
    engine.notes += residual_notes(flags, residual)
    if pictures:  # they differ in prompt and seed only; what has no effect is checked too
        given = dataclasses.replace(pictures[0], **engine.as_given)
        engine.check_settings(given)
        open_images([given])
    engine.say_notes()
    return pictures


def run(flags: Flags, given: Sequence[str] = (), replay: Replay | None = None) -> Path | None:
    """Does what the flags say; returns the folder of the pictures. Raises ValueError or FileNotFoundError for what
    is wrong with them before any weights load.

    replay: the picture that is made again; the flags then hold its settings.
    """
    if flags.list_models:
        print(list_models(flags.model_folder or "models"))
        return None
    started = time.monotonic()
    if replay and "prompt" not in replay.given:
        prompts, name = [flags.prompt], folder_name(flags.prompt)
    else:
        prompts, name = read_prompts(flags.prompt)
    saving.check_writable(flags.out_dir)
    engine = load_for(flags)
    residual = ResidualConfig.from_flags(flags.residual(), flags.residual_config)
    skip_layer = replay.skip_layer() if replay else None
    pictures = plan_for(engine, flags, prompts, flags.seeds(len(prompts)), skip_layer, recorded=replay is not None)
    if line := engine.unknown_words([*prompts, flags.negative_prompt]):
        engine.say(line)
    folder = saving.make_folder(Path(flags.out_dir) / models_folder_name(flags), name, flags.postfix)
    if flags.kind_of_seeds == "rand":
        engine.say(drawn_seeds([s.seed for s in pictures]))
    record = RunRecord(folder, flags, given, len(pictures), engine)
    record.beside[RESIDUAL_FILE] = residual.as_file(folder)
    made_with = MadeWith(engine, pictures[0], hashed=bool(replay) or not flags.no_metadata)
    try:
        with record.kept():
            for number, settings, image in engine.make(pictures, flags.pad_batch):
                path = folder / f"{number:06d}.png"
                known = made_with.wait()
                with shell_streams.held():  # a picture that is there is in the record
                    saving.save_picture(path, image, settings, None if flags.no_metadata else known)
                    record.add(path, settings, known)
                tqdm.write(str(path))
                if replay and number == 0:
                    for line in replay.report(image, settings, known):
                        engine.say(line)
    except (KeyboardInterrupt, Stopped):
        engine.say(f"stopped: {record.count} of {len(pictures)} pictures are kept in {folder}")
        raise
    seconds = time.monotonic() - started
    if flags.verbose:
        engine.say(", ".join(f"{name} {spent:.1f} s" for name, spent in engine.stages.items()))
    engine.say(
        f"{len(pictures)} picture{'s' if len(pictures) > 1 else ''} in {seconds:.1f} s, "
        f"{seconds / len(pictures):.1f} s each, in {folder}"
    )
    return folder


def drawn_seeds(seeds: Sequence[int], most: int = 16) -> str:
    """A line with the seeds that were drawn, the first ones of many."""
    more = f" and {len(seeds) - most} more, in run.json" if len(seeds) > most else ""
    return f"seed{'s' if len(seeds) > 1 else ''} drawn: {', '.join(map(str, seeds[:most]))}{more}"


def models_folder_name(flags: Flags) -> str:
    """How the folder of a model's pictures is called."""
    names = [Path(path).name.removesuffix(".safetensors") for path in (flags.model, flags.controlnet_ckpt) if path]
    return "_".join(names)


class RunRecord:
    """`run.json`: the whole run. While it goes on, every picture is added to `pictures.jsonl` as soon as it is there,
    and run.json brought up to date now and then; in the end run.json has all, and the other one goes.
    """

    EVERY = 5.0  # seconds between writes, at least
    LINES = "pictures.jsonl"

    def __init__(self, folder: Path, flags: Flags, given: Sequence[str], total: int, engine: SD3Inferencer):
        self.folder = folder
        self.engine = engine
        self.status = "running"
        self.count = 0
        self.made_with: dict[str, Any] = {}
        self.beside: dict[str, Any] = {}  # further files by name, written with the first picture
        self.waiting: list[dict[str, Any]] = []  # pictures that could not be noted yet
        self.started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self.start = time.monotonic()
        self.written, self.cost = -math.inf, 0.0
        self.flags, self.given, self.total = flags, list(given), total

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Around the making of the pictures: writes the record in the end, however that comes about. A folder that
        holds no picture goes.
        """
        try:
            yield
            self.status = "finished"
        except BaseException as error:
            self.status = "stopped" if isinstance(error, (KeyboardInterrupt, Stopped)) else "failed"
            with shell_streams.held(), contextlib.suppress(OSError):  # the first error is the one to be told
                self.end()
            raise
        with shell_streams.held():
            self.end()

    def add(self, path: Path, settings: Settings, made_with: dict[str, Any]) -> None:
        """Notes a finished picture. A full disk is told when the next picture, or the last record, needs it."""
        self.made_with = made_with
        self.count += 1
        self.total = max(self.total, self.count)
        self.waiting.append({"file": path.name, "settings": settings.public()})
        with contextlib.suppress(OSError):
            self._note()
            if time.monotonic() - self.written > max(self.EVERY, 20 * self.cost):
                self.write()

    def _note(self) -> None:
        while self.waiting:
            saving.append_line(self.folder / self.LINES, self.waiting[0])
            self.waiting.pop(0)

    def write(self) -> None:
        """Writes run.json, and what belongs beside it; raises OSError naming what cannot be written."""
        start = time.monotonic()
        for name, value in self.beside.items():
            if not (self.folder / name).exists():
                saving.write_json(self.folder / name, value)
        record = {
            "status": self.status,
            "started": self.started,
            "seconds": round(time.monotonic() - self.start, 2),
            "stages": {name: round(spent, 2) for name, spent in self.engine.stages.items()},
            "device": str(self.engine.device),
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "arguments": self.given,
            "flags": self.flags,
            **self.made_with,
            "versions": saving.versions(),
            "planned": self.total,
        }
        head = saving.json_bytes(record, indent=1).removesuffix(b"\n}")
        saving.atomic_write(self.folder / "run.json", lambda f: self._write(f, head))
        self.written = time.monotonic()
        self.cost = self.written - start

    def _write(self, file: IO[bytes], head: bytes) -> None:
        """The record with its pictures, which are never all in memory: a server makes any number."""
        file.write(head + b',\n "pictures": [')
        between = b"\n  "
        for line in self._lines():
            file.write(between + line)
            between = b",\n  "
        file.write(b"\n ]\n}\n")

    def _lines(self) -> Iterator[bytes]:
        if (self.folder / self.LINES).exists():
            with open(self.folder / self.LINES, "rb") as f:
                yield from (line.rstrip(b"\n") for line in f if line.strip())
        yield from map(saving.json_bytes, self.waiting)

    def end(self) -> None:
        """Writes the whole record, or takes the folder away if it holds no picture."""
        if not self.count:
            self.discard()
            return
        self.write()
        with contextlib.suppress(OSError):
            (self.folder / self.LINES).unlink(missing_ok=True)

    def discard(self) -> None:
        """Takes a folder away that holds no picture."""
        with contextlib.suppress(OSError):
            for name in ("run.json", self.LINES, *self.beside):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()


@fire.decorators.SetParseFn(str)
def infer(
    prompt=None,
    model=None,
    out_dir=None,
    postfix=None,
    seed=None,
    seed_type=None,
    sampler=None,
    steps=None,
    cfg=None,
    shift=None,
    width=None,
    height=None,
    controlnet_ckpt=None,
    controlnet_cond_image=None,
    vae=None,
    init_image=None,
    denoise=None,
    skip_layer_cfg=None,
    verbose=None,
    model_folder=None,
    clip_l=None,
    clip_g=None,
    t5xxl=None,
    text_encoder_device=None,
    residual_origin_layer=None,
    residual_target_layers=None,
    residual_weights=None,
    residual_mode=None,
    residual_schedule=None,
    residual_start=None,
    residual_end=None,
    residual_branch=None,
    residual_rotations=None,
    residual_config=None,
    negative_prompt=None,
    num_images=None,
    batch_size=None,
    controlnet_strength=None,
    device=None,
    dtype=None,
    no_t5=None,
    pad_batch=None,
    t5_resident=None,
    embed_cache=None,
    compile=None,
    weights=None,
    offload=None,
    cache=None,
    vae_tile=None,
    no_metadata=None,
    replay=None,
    serve_stdin=None,
    self_check=None,
    list_models=None,
):
    """Makes pictures from an SD3 or SD3.5 weight file, with residual text streaming.

    Args:
        prompt: what the picture should show, or a .txt file with one prompt a line.
        model: the .safetensors file with the MMDiT, or a folder in diffusers layout (models/sd3_medium.safetensors).
        out_dir: pictures go to OUT_DIR/<model>/<prompt><postfix>/000000.png (outputs).
        postfix: end of the folder's name (the date and time).
        seed: first seed (23), for seed_type fixed and roll.
        seed_type: fixed (every prompt the same), roll (counts up) or rand (drawn, each once; printed and recorded).
            Without it: fixed where a seed is given, else rand.
        sampler: euler or dpmpp_2m (the model's usual one).
        steps: sampling steps (the model's usual number).
        cfg: classifier-free guidance scale (the model's usual one); 1 turns it off.
        shift: shift of the noise schedule, 0.001 to 1000 (the model's usual one).
        width: pixels, a multiple of 16 (1024, or what the file names).
        height: pixels, a multiple of 16 (1024, or what the file names).
        controlnet_ckpt: a ControlNet file.
        controlnet_cond_image: the picture that guides it.
        vae: a VAE file in place of the model's own.
        init_image: a picture to start from.
        denoise: how much of it is made anew, 0 to 1 (0.8).
        skip_layer_cfg: skip-layer guidance, with SD3.5 Medium's settings.
        verbose: says more.
        model_folder: where text encoders and tokenizers lie (the model's folder, then models).
        clip_l: the file of the text encoder CLIP-L (in the model file, or found in model_folder).
        clip_g: the file of the text encoder CLIP-G.
        t5xxl: the file of the text encoder T5.
        text_encoder_device: auto (as device), cpu, cuda, cuda:N or mps.
        residual_origin_layer: block whose incoming text tokens are kept (0).
        residual_target_layers: blocks they are mixed in before, such as 3,5,7 or 2-22 or 2-22:2; none: off.
        residual_weights: one weight per target, one for all, or a ramp linear:FIRST:LAST, within -1000 to 1000 (1.0).
        residual_mode: add, anchored (both normalised first) or aligned (and the origin rotated) (add).
        residual_schedule: factor on the weights by sigma: constant, linear, cosine or exp:ALPHA (constant).
        residual_start: first part of the steps that goes without, 0 to 1 (0).
        residual_end: part of the steps after which it stops, 0 to 1 (1).
        residual_branch: both, cond or uncond half of guidance (both).
        residual_rotations: the rotation file of mode aligned (sd3_probe.py calibrate makes one).
        residual_config: a file with all of these, such as residual.json in a run's folder; flags replace its fields.
        negative_prompt: what the picture should not show.
        num_images: pictures per prompt (1).
        batch_size: pictures sampled at once (1).
        controlnet_strength: scale of what the ControlNet adds (1.0).
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto, float32, bfloat16 or float16 (fp32, bf16, fp16).
        no_t5: zeros in place of T5's tokens; T5 need not be there.
        pad_batch: fills a partial batch up, so that no picture depends on how many are made with it.
        t5_resident: keeps the text encoders in memory once they ran, where there is room.
        embed_cache: a folder that keeps encoded prompts; a known prompt opens no text encoder.
        compile: compiles the MMDiT's blocks; the first step takes longer, the others less.
        weights: full (as the dtype says), or int8 or fp8: the blocks' weights in 8 bits, for small cards.
        offload: keeps the blocks in main memory and brings each to the device for its turn.
        cache: reuses all blocks but the first where that one changed by less than this part (0: never; try 0.1).
        vae_tile: auto, off, or the side in pixels of tiles that the VAE works on one at a time.
        no_metadata: pictures carry no settings.
        replay: a picture of ours that is made again; other flags replace single settings of it.
        serve_stdin: loads once, then makes a picture for every line of JSON that it reads, and answers with one.
        self_check: runs the small model on this device and compares it with stored results.
        list_models: shows what is in the models folder, what is missing and how to get it.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    if replay and (serve_stdin or self_check):
        raise ValueError("--replay: goes with neither --serve_stdin nor --self_check")
    flags = None if replay else Flags.read(given)
    if flags and flags.self_check:
        import self_check as check

        if not check.run(flags):
            raise SelfCheckFailed
        return
    if flags and flags.serve_stdin:
        from serve import serve

        serve(flags, given)
        return
    typed = [f"--{name}={value}" for name, value in given.items()]
    if flags:
        run(flags, typed)
    else:
        picture = Replay.read(given)
        run(Flags.read(picture.flags(available_devices(picture.record["settings"]))), typed, picture)


def available_devices(settings: Mapping[str, Any]) -> dict[str, str]:
    """`auto` for each device that a picture was made on and that is not here; what is no device stays, to be named."""
    out = {}
    for flag in ("device", "text_encoder_device"):
        try:
            name = read_device(flag, settings.get(flag, "auto"))
        except ValueError:
            continue
        try:
            choose_device(name, flag)
        except (ValueError, RuntimeError):
            out[flag] = "auto"
    return out


def _description() -> str:
    """`infer`'s docstring; from the source where Python runs without docstrings (-OO, PYTHONOPTIMIZE=2)."""
    if infer.__doc__:
        return inspect.getdoc(infer) or ""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == infer.__name__]
    return ast.get_docstring(found[0]) or ""


def help_text() -> str:
    """The flags, from `infer`'s docstring."""
    text = _description().replace("Args:", "flags (defaults in brackets):")
    flags = re.sub(r"^    (\w+): ", lambda m: f"  --{m[1]:<24}", text, flags=re.MULTILINE)
    wrapped = re.sub(r"^ {8}(?=\w)", " " * 28, flags, flags=re.MULTILINE)
    return f"usage: sd3_infer.py [--flag value ...]\n\n{wrapped}"


def _stop(*_: Any) -> None:
    raise Stopped


def _note_once() -> Callable[..., None]:
    """What shows warnings as notes, each once: files are opened more than once."""
    said: dict[str, None] = {}

    def show(message: Any, *_: Any, **__: Any) -> None:
        if str(message) not in said:
            while len(said) >= MOST_SAID:
                said.pop(next(iter(said)))
            said[str(message)] = None
            tqdm.write(f"note: {message}", file=sys.stderr)

    return show


def guarded(work: Callable[[], Any], smaller: str) -> int:
    """Does a command line's work; returns the exit status: 0, 2 for a mistake in flags or files, 1 where memory ran out
    (`smaller`: the flags to turn down), 130 and 143 if stopped.
    """
    previous = None
    if threading.current_thread() is threading.main_thread():
        shell_streams.imported()
        previous = signal.signal(signal.SIGTERM, _stop)
    try:
        with shell_streams.bearing(), warnings.catch_warnings():
            warnings.showwarning = _note_once()
            warnings.simplefilter("always", Note)  # whatever PYTHONWARNINGS says of warnings
            work()
        return 0
    except SelfCheckFailed:
        return 1
    except KeyboardInterrupt:
        return shell_streams.INTERRUPTED
    except Stopped:
        return shell_streams.TERMINATED
    except Exception as error:
        with shell_streams.bearing():
            if out_of_memory(error):
                told = f"out of memory; try a smaller {smaller} ({one_line(error)})"
                print(f"error: {error if isinstance(error, OutOfMemory) else told}", file=sys.stderr)
                return 1
            if isinstance(error, USER_ERRORS):
                return fail(error)
        raise
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


@shell_streams.command_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, see `guarded`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"--help", "-h"} & set(arguments):
        print(help_text())
        return 0

    def work() -> None:
        values = read_arguments(arguments)
        fire.Fire(infer, command=[f"--{n}={v}" for n, v in values.items()], name="sd3_infer.py")

    return guarded(work, "--width, --height or --batch_size")


if __name__ == "__main__":
    import sd3_infer  # under its own name, by which serve and self_check know it

    sys.exit(sd3_infer.main())
