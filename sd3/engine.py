"""The engine: loads once, makes many images."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import sd3_impls
from dit_embedder import ControlNet, ControlNetConfig, control_pixels
from mmditx import ContextHook, MMDiT, MMDiTConfig, ResidualStream
from other_impls import (
    CLIP,
    CLIP_EMBEDDINGS,
    CLIP_LAYERS,
    T5,
    T5_EMBEDDING,
    CLIPConfig,
    CLIPEnd,
    CLIPLayer,
    T5Block,
    T5Config,
    T5Norm,
    join_text,
    t5_position_bias,
    table_rows,
    weighted_segments,
)
from sd3.device import (
    choose_device,
    choose_dtype,
    choose_threads,
    computing_on,
    device_memory,
    device_record,
    encoder_dtype,
)
from sd3.effects import executed_steps
from sd3.embed_cache import EmbedCache, file_identity
from sd3.files import ENCODERS, WeightFile
from sd3.find import TOKENIZER_FILES, Fit, find_encoders, find_tokenizer, models_folder
from sd3.flags import DEFAULT_SEED, FLAGS, read_values
from sd3.layers import can_pack, replace_linears
from sd3.memory import explained
from sd3.mistakes import Missing, Mistake, Where, flag_name, renaming, spell
from sd3.models import SkipLayerConfig, fetch_model, model_path, read_skip_layer
from sd3.offload import Offload
from sd3.patches import patched
from sd3.pixels import VAE_TILE, check_finite, open_images, to_image, unit_pixels
from sd3.readers import read_list, read_text, read_tile
from sd3.reading import reading
from sd3.residual import RESIDUAL_FLAGS, ResidualConfig, residual_stream
from sd3.rotations import Rotations, read_rotations
from sd3.settings import FILE_SETTINGS, Flags, Settings, Setup, effective, resolve
from sd3.streams import Once
from sd3.tokenizers import open_clip_tokenizer, open_t5_tokenizer
from sd3.unchanged import Stamp, Unchanged, stamp
from sd3.vae import VAE, VAEConfig
from sd3.versions import versions
from sd3.weights import ModelTensors, find_controlnet, find_mmdit, find_vae, has_vae, read_control_kind

TEXTS_AT_ONCE = 256  # encoded prompts that are held in memory: 1.3 MB each at SD3's size
LOADED_FILES = tuple(name for name in FILE_SETTINGS if FLAGS[name].scope == "load" and name != "model")
CLIP_ACTIVATIONS = {"clip_l": "quick_gelu", "clip_g": "gelu"}


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A module without storage, to be given its weights."""
    with torch.device("meta"):
        return make()


@contextlib.contextmanager
def byte_bar(what: str, total: int, quiet: bool) -> Iterator[Callable[[int], Any]]:
    """A progress bar over bytes."""
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=quiet, leave=False) as bar:
        yield bar.update


class NotLoaded(AttributeError, ValueError):
    """What was asked for needs a model, and none is loaded."""


def _whole(load: Callable[..., Engine]) -> Callable[..., Engine]:
    """Lets a load that fails leave nothing of its model behind."""

    @functools.wraps(load)
    def wrapped(engine: Engine, *args: Any, **values: Any) -> Engine:
        engine._forget()
        try:
            return load(engine, *args, **values)
        except BaseException:
            engine._forget()
            raise

    return wrapped


def _on_threads(work: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a method compute on the engine's own number of threads, whatever the process or another engine has."""

    @functools.wraps(work)
    def wrapped(engine: Engine, *args: Any, **values: Any) -> Any:
        with computing_on(engine.threads):
            return work(engine, *args, **values)

    return wrapped


class Engine:
    """Loads once, makes many images. `open` reads headers and checks files; weights are opened when needed: each
    text encoder while prompts are encoded, then the MMDiT, which stays.

    Using an engine before `open`, or after one that failed, raises `NotLoaded`, a ValueError.
    """

    def __init__(self, spelling: Callable[[str], str] = str) -> None:
        """spelling: how notes name a field, such as `flag_name`."""
        self.spelling = spelling
        self.quiet = sys.stderr is None  # as in programs without a console
        self._first = Once()
        self._forget()

    def __getattr__(self, name: str) -> Any:
        """Called for what is not there: everything that `open` sets, as long as nothing is loaded."""
        if name.startswith("__"):
            raise AttributeError(name)
        if "defaults" not in self.__dict__:
            raise NotLoaded("no model is loaded; call SD3Inferencer.load first")
        if name in ("positions", "encoder_parts", "encoder_configs") or "tokenizer" in name:
            raise NotLoaded("this model was loaded without text encoders (load_tokenizers=False)")
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def _forget(self) -> None:
        """Drops everything that belongs to a loaded model."""
        for name in set(vars(self)) - {"quiet", "spelling", "_first"}:
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
        if once and not self._first(text):
            return
        if not self.quiet:
            tqdm.write(text, file=sys.stderr)

    def note(self, text: str) -> None:
        """Adds a line to `notes`; names of fields stand between backquotes."""
        self.notes.append(spell(text, self.spelling))

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
    def open(
        self, setup: Setup, shift: float | None = None, verbose: bool = False, load_tokenizers: bool = True
    ) -> Engine:
        """Reads headers, checks that all files are there and fit each other, decides device and dtype.

        shift: of images that name none. Raises Mistake that names the file and what is wrong with it.
        """
        self.setup = setup
        model, vae, controlnet_ckpt = model_path(setup.model), setup.vae, setup.controlnet_ckpt
        early = {Path(path): stamp(path) for path in (model, *(getattr(setup, n) for n in LOADED_FILES)) if path}
        self.device = choose_device(setup.device)
        same = setup.text_encoder_device == "auto"
        self.encoder_device = self.device if same else choose_device(setup.text_encoder_device, "text_encoder_device")
        self.model_file = self._open("model", model, fetch_model(model))
        own = self.model_file.path if self.model_file.folder else self.model_file.path.parent
        self.folders = [models_folder(setup.model_folder)] if setup.model_folder else [own]
        if not setup.model_folder and self.folders != [Path("models")]:
            self.folders.append(Path("models"))
        self.mmdit_part = find_mmdit(self.model_file)
        self.config: MMDiTConfig = self.mmdit_part.config(MMDiTConfig.from_shapes, "an SD3 or SD3.5 model")
        network = self._check(self.mmdit_part, lambda: MMDiT(self.config))
        self.threads = choose_threads(setup.threads, sum(p.numel() for p in network.parameters()))
        if self.threads > (os.cpu_count() or self.threads):
            self.say(spell(f"note: `threads` {self.threads}: this machine has {os.cpu_count()} CPUs", self.spelling))
        self.dtype = choose_dtype(setup.dtype, self.device, self.mmdit_part.dtype_name())
        self._open_vae(vae)
        self.controlnet_part = self._open_controlnet(controlnet_ckpt) if controlnet_ckpt else None
        self.embed_cache = None
        if load_tokenizers:
            self._open_encoders({role: getattr(setup, role) for role in ENCODERS})
        self._patch()
        if load_tokenizers:
            self.embed_cache = self._open_embed_cache(setup.embed_cache) if setup.embed_cache else None
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
            raise Missing(flag, path, f"no such file{fetch}")
        return WeightFile(path, flag)

    @staticmethod
    def _check(part: ModelTensors, make: Callable[[], nn.Module]) -> nn.Module:
        """The module of a part's sizes, without storage; raises Mistake where the file does not fit it, or holds
        nothing.
        """
        with reading(part.file.where, "has sizes of no model"):
            model = on_meta(make)
        part.check(model)
        part.check_filled(some_may_be_empty=isinstance(model, ControlNet))
        return model

    def _open_vae(self, path: str | None) -> None:
        file = self._open("vae", path) if path else self.model_file
        self.vae_part = find_vae(file)
        if not path and not has_vae(file):
            raise Missing("model", file.path, "holds no VAE; give one with `vae` sd3_vae.safetensors")
        self.vae_config: VAEConfig = self.vae_part.config(VAEConfig.from_shapes, "a VAE")
        self._check(self.vae_part, lambda: VAE(self.vae_config))
        if self.vae_config.latent_channels != self.config.latent_channels:
            channels = self.vae_config.latent_channels, self.config.latent_channels
            raise Mistake("vae", file.path, "has {} latent channels, the model has {}".format(*channels))

    def _open_controlnet(self, path: str) -> ModelTensors:
        part = find_controlnet(self._open("controlnet_ckpt", path))
        config = part.config(ControlNetConfig.from_shapes, "an SD3 ControlNet")
        try:
            config.check_base(self.config)
        except ValueError as error:
            raise Mistake("controlnet_ckpt", path, str(error)) from None
        self.controlnet_chained = config.chained(self.config)
        self.controlnet_config = config
        self._check(part, lambda: ControlNet(config, self.controlnet_chained))
        read_control_kind(part)
        return part

    def _patch(self) -> None:
        """Adds the changes of weights that flags ask for, before any weights load."""
        encoders = self.__dict__.get("encoder_parts", {})
        parts = {"mmdit": self.mmdit_part, "vae": self.vae_part, "controlnet": self.controlnet_part, **encoders}
        parts = patched({name: part for name, part in parts.items() if part is not None}, self.setup)
        self.mmdit_part, self.vae_part = parts["mmdit"], parts["vae"]
        self.controlnet_part = parts.get("controlnet")
        encoders.update({role: parts[role] for role in encoders})

    @property
    def large_controlnet(self) -> bool:
        """Whether a ControlNet of the 8B kind is given: its usual settings then hold."""
        return self.controlnet_part is not None and self.controlnet_chained

    def _open_encoders(self, given: dict[str, str | None]) -> None:
        roles = ("clip_l", "clip_g") if self.setup.no_t5 else ENCODERS
        if self.setup.no_t5 and given["t5xxl"]:
            self.say(spell("note: `t5xxl` is not used: `no_t5`", self.spelling))
        fit = Fit(self.config.pooled_width, self.config.context_width)
        self.encoder_parts = find_encoders(roles, self.model_file, self.folders, given, fit)
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
            where, other = (self.encoder_parts[role].file.where for role in ("clip_l", "clip_g"))
            raise Mistake(
                where.field,
                f"{where.value} and {other.value}",
                f"have widths {clip_l.width} + {clip_g.width}, the model needs {self.config.pooled_width}: wrong text "
                "encoders",
            )
        if not self.setup.no_t5 and (width := self.encoder_configs["t5xxl"].width) != self.config.context_width:
            raise Mistake(
                *self.encoder_parts["t5xxl"].file.where,
                f"has width {width}, the model needs {self.config.context_width}: not this model's T5",
            )
        beside = [p.file.path.parent for p in self.encoder_parts.values()]
        folders = list(dict.fromkeys([*self.folders, *beside]))
        kinds = ("clip",) if self.setup.no_t5 else ("clip", "t5")
        self.tokenizer_folders = {kind: find_tokenizer(kind, folders) for kind in kinds}
        rows = min(clip_l.vocabulary, clip_g.vocabulary)
        self.clip_tokenizer = open_clip_tokenizer(self.tokenizer_folders["clip"], rows=rows)
        self.t5_tokenizer = None
        if not self.setup.no_t5:
            rows = self.encoder_configs["t5xxl"].vocabulary
            self.t5_tokenizer = open_t5_tokenizer(self.tokenizer_folders["t5"], rows=rows)
        self.positions = min(clip_l.positions, clip_g.positions)  # their tokens lie side by side

    def text_files(self) -> dict[str, set[Path]]:
        """The files that decide how text is encoded, by encoder and tokenizer."""
        files = {}
        for role, part in self.encoder_parts.items():
            files[role] = {e.path for name, e in part.file.entries.items() if name.startswith(part.prefix)}
        for kind, place in self.tokenizer_folders.items():
            names = {name for names in TOKENIZER_FILES[kind] for name in names}
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
                    files.add(Where(flag, path), path, early.get(path))
        for flag in LOADED_FILES:
            if flag not in parts and (path := getattr(self.setup, flag)):
                files.add(Where(flag, path), path, early.get(Path(path)))
        for role, paths in self.text_files().items() if text else ():
            for path in sorted(paths - own):
                files.add(Where("", f"{role} {path}"), path)
        return files

    def _open_embed_cache(self, folder: str) -> EmbedCache:
        files = self.text_files()
        dtype, positions, config = encoder_dtype(self.dtype), self.positions, self.config
        how = {
            "dtype": str(dtype),
            "device": [self.encoder_device.type, device_record(self.encoder_device, self.threads)],
            "no_t5": self.setup.no_t5,
            "prefixes": {role: part.prefix for role, part in self.encoder_parts.items()},
            "widths": [config.pooled_width, config.context_width, positions],
            "versions": {n: v for n, v in versions().items() if n in ("torch", "tokenizers")},
        }
        if any(part.patches for part in self.encoder_parts.values()):  # else keys are those of earlier versions
            how["patches"] = {role: [p.identity for p in part.patches] for role, part in self.encoder_parts.items()}

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
        """Raises Mistake for a size that the model's position grid or its cells do not allow."""
        cell = self.vae_config.downscale * self.config.patch
        for flag, size in (("width", width), ("height", height)):
            if size % cell:
                raise Mistake(flag, size, f"must be a multiple of {cell} for this model")
            if size > cell * self.config.grid:
                raise Mistake(flag, size, f"is beyond this model's position grid; at most {cell * self.config.grid}")

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
    @_on_threads
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
                    self.say(spell(f"note: `embed_cache`: {error.strerror or error}", self.spelling), once=True)
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
        if self.setup.no_t5:
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
    def _tables(part: ModelTensors, names: list[str]) -> list[Tensor]:
        """Embedding tables, mapped: only the rows that are used are read."""
        tables = dict(part.read(names, "cpu", None))
        return [tables[name] for name in names]

    def _layer(
        self,
        role: str,
        place: int | str,
        make: Callable[[], nn.Module],
        part: ModelTensors,
        stem: str,
        dtype: torch.dtype,
    ) -> nn.Module:
        """A layer of a text encoder with its weights, read from below `stem`; kept where encoders stay resident."""
        if (role, place) in self._resident:
            return self._resident[role, place]
        layer = on_meta(make)
        part.load_into(layer, self.encoder_device, dtype, stem=stem)
        if self.setup.t5_resident:
            self._resident[role, place] = layer
        return layer

    @_on_threads
    def _load(
        self, part: ModelTensors, model: nn.Module, what: str, device: torch.device, dtype: torch.dtype
    ) -> nn.Module:
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
                    field, path = part.file.where
                    self._damage = f"`{field}` {path}: {name} holds NaN or infinity: download the file again"
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
            if self.setup.weights != "full":
                replace_linears(model.joint_blocks, self.setup.weights)
            elif not self.setup.offload:
                model.join_modulations(self.device, self.dtype)
                if can_pack(self.device, self.dtype):
                    replace_linears(model.joint_blocks, "packed")
            if self.setup.offload:
                self._load(self.mmdit_part, model, "MMDiT", torch.device("cpu"), self.dtype)
                model.offload = Offload(model.joint_blocks, self.device)
                for module in model.children():
                    if module is not model.joint_blocks:
                        module.to(self.device)
                model.pos_embed = nn.Parameter(model.pos_embed.to(self.device), requires_grad=False)
            else:
                self._load(self.mmdit_part, model, "MMDiT", self.device, self.dtype)
            if self.setup.compile:
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
    @_on_threads
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
            raise Mistake("image", image, "must be a PIL image")
        if control and self.controlnet_part is None:
            raise Mistake("control", "", "no ControlNet is loaded; load one with `controlnet_ckpt`")
        pixels = unit_pixels(image)
        if control:
            kind = read_control_kind(self.controlnet_part)
            pixels = control_pixels(pixels, self.controlnet_chained, kind)
        else:
            pixels = pixels * 2 - 1
        vae = self.get_vae()
        mean, logvar = vae.moments(pixels.to(self.device, self.vae_dtype), tile)
        noise = sd3_impls.start_noise(seeds, mean.shape, "control image" if control else "initial image")
        return vae.sample(mean.float(), logvar.float(), noise.to(self.device))

    @torch.no_grad()
    @_on_threads
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
    @_on_threads
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
            raise Mistake("latent", "", "must be a tensor (B, channels, height, width)")
        if len(seeds) != latent.shape[0]:
            raise Mistake("seed", "", f"{len(seeds)} given for {latent.shape[0]} rows of the latent; give one for each")
        read = read_values(
            {
                "steps": steps, "cfg": cfg_scale, "sampler": sampler, "denoise": denoise, "shift": shift,
                "controlnet_strength": controlnet_strength, "cache": cache,
            }
        )  # fmt: skip
        for name in ("steps", "cfg"):
            if name not in read:
                raise Mistake(name, "", "is missing")
        steps, cfg_scale, shift, cache = read["steps"], read["cfg"], read.get("shift"), read.get("cache", 0.0)
        sampler, denoise = read.get("sampler", "dpmpp_2m"), read.get("denoise", 1.0)
        controlnet_strength = read.get("controlnet_strength", 1.0)
        if controlnet_cond is not None and self.controlnet_part is None:
            raise Mistake("controlnet_cond", "", "no ControlNet is loaded; load one with `controlnet_ckpt`")
        if cfg_scale != 1 and neg_cond is None:
            raise Mistake("cfg", f"{cfg_scale:g}", "needs neg_cond, the other half; a cfg of 1 goes without")
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
        stream = self.residual_stream(read_residual(residual_config))
        model = self.get_mmdit()
        sigmas = sd3_impls.flow_schedule(steps, self.shift if shift is None else shift)
        sigmas = sd3_impls.img2img_sigmas(sigmas, steps, denoise)
        denoiser = sd3_impls.Denoiser(
            model,
            self._rows(conditioning, len(seeds)),
            None if cfg_scale == 1 or neg_cond is None else self._rows(neg_cond, len(seeds)),
            cfg_scale,
            steps=steps,
            skip_layer=read_skip_layer_config(skip_layer_config),
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

    def residual_stream(self, config: ResidualConfig) -> ResidualStream | None:
        """The stream of a configuration, checked against this model, or None where nothing is mixed; raises Mistake."""
        config.check(self.config.depth)
        return residual_stream(config, self.get_rotations(config))

    def get_rotations(self, config: ResidualConfig) -> Rotations | None:
        """The rotations that a configuration needs, read and checked once; None where it needs none.

        Raises Mistake for a file that does not fit (see `rotations.read_rotations`).
        """
        if not config.aligned:
            return None
        config.check_rotations()
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
        Prompts are encoded `TEXTS_AT_ONCE` at a time, before the pictures of them. Raises Mistake before any weights
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
                    if isinstance(made[1], Mistake):
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
    ) -> Iterator[tuple[Settings, Image.Image | Mistake]]:
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
            except Mistake as mistake:
                yield s, mistake
            else:
                yield s, image

    def check_settings(self, s: Settings) -> None:
        """Raises Mistake where settings do not fit the loaded model."""
        self.check_size(s.width, s.height)
        with renaming(RESIDUAL_FLAGS):
            self.residual_stream(s.residual)
        if s.skip_layer and max(s.skip_layer.layers) >= self.config.depth:
            raise Mistake(
                "skip_layer_cfg", "", f"needs layers {s.skip_layer.layers}, this model has {self.config.depth}"
            )
        if s.controlnet_ckpt and self.controlnet_part is None:
            raise Mistake("controlnet_ckpt", "", "no ControlNet is loaded")
        if s.controlnet_cond_image and self.controlnet_part is None:
            why = "no ControlNet is loaded that could read it; load one with `controlnet_ckpt`"
            raise Mistake("controlnet_cond_image", s.controlnet_cond_image, why)

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
                s.residual,
                shift=s.shift,
                controlnet_strength=s.controlnet_strength,
                callback=lambda step: bar.update(),
                hooks=hooks,
                cache=s.cache,
            )

    def plan(
        self, prompts: Sequence[str], seeds: Sequence[int], *, recorded: bool = False, **values: Any
    ) -> list[Settings]:
        """Settings of every picture, prompt by prompt; seeds: as many per prompt as there are pictures of it.

        What has no effect is set to its default, see `settings.effective`; `notes` say so, `as_given` has it as it was.
        recorded: the values come from a picture, perhaps of an earlier version, which encoded a prompt at the length of
        its negative prompt at cfg 1 too: it is kept where it is the longer one. Raises Mistake for what does not
        fit.
        """
        prompts, seeds = read_texts(prompts), list(seeds)
        if not seeds or len(seeds) % len(prompts):
            raise Mistake("seed", "", f"{len(seeds)} given for {len(prompts)} prompts; give as many for each")
        shared = self.setup.seen_in_images() | {
            "model": str(self.model_file.path),
            "vae": None if self.vae_part.file is self.model_file else str(self.vae_part.file.path),
            "controlnet_ckpt": None if self.controlnet_part is None else str(self.controlnet_part.file.path),
            "shift": self.shift,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "text_encoder_device": str(self.encoder_device),
        }
        per_prompt = len(seeds) // len(prompts)
        first = Settings(prompt=prompts[0], seed=seeds[0], **(shared | values))
        shown, notes = effective(first)  # prompt and seed have no part in it
        kept = first.negative_prompt
        if (
            recorded
            and kept != shown.negative_prompt
            and any(self.pair_length(p, kept) > self.t5_length(p) for p in prompts)
        ):
            shown = dataclasses.replace(shown, negative_prompt=kept)
            notes = [note for note in notes if not note.startswith("note: `negative_prompt`")]
        self.notes = [spell(note, self.spelling) for note in notes]
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


def read_skip_layer_config(config: SkipLayerConfig | Mapping[str, Any] | None) -> SkipLayerConfig | None:
    """Accepts the public reference's dictionary {"scale", "start", "end", "layers", "cfg"} too; raises Mistake."""
    if config is None or isinstance(config, SkipLayerConfig):
        return config
    if not isinstance(config, Mapping):
        raise Mistake("skip_layer_config", config, "must be a SkipLayerConfig or a dictionary")
    if not config:
        return None
    return read_skip_layer({"start": 0.01, "end": 0.20, "cfg": 4.0} | dict(config))


def read_residual(config: ResidualConfig | None) -> ResidualConfig:
    """A residual configuration given in Python; None is off. Raises Mistake for anything else."""
    if config is None or isinstance(config, ResidualConfig):
        return config or ResidualConfig()
    raise Mistake("residual_config", config, "must be a ResidualConfig, as build_residual_config makes one")


def read_texts(prompts: Any) -> list[str]:
    """Prompts from one text or several; raises Mistake where there is none, or something else among them."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise Mistake("prompt", prompts, "must be a text, or a list of texts")
    texts = [read_text("prompt", prompt) for prompt in prompts]
    if not texts:
        raise Mistake("prompt", "", "no prompt is given")
    return texts


def read_row_seeds(seed: Any) -> list[int]:
    """The seeds of a batch's rows, from one for one row or a list; raises Mistake."""
    rows = read_list("seed", seed) if isinstance(seed, Iterable) else [seed]
    return [FLAGS["seed"].read("seed", one) for one in rows]


def residual_settings(config: ResidualConfig) -> dict[str, Any]:
    """A residual configuration as fields of `Settings`; rotations that no mode uses are left out."""
    values = {setting: getattr(config, name) for name, setting in RESIDUAL_FLAGS.items()}
    return values if config.mode == "aligned" else values | {"residual_rotations": None}


def residual_notes(flags: Flags, config: ResidualConfig) -> Iterator[str]:
    """Lines about residual flags that have no effect."""
    given = flags.residual()
    if (given or flags.residual_config) and not config.active:
        yield "note: `residual_target_layers` is empty, so residual text streaming is off"
    elif "rotations" in given and config.mode != "aligned":
        yield f"note: `residual_rotations` is not used: `residual_mode` is {config.mode}, not aligned"


def _described(files: Sequence[Path]) -> dict[str, Any]:
    """Name, bytes and identity of files that belong together."""
    identity = hashlib.sha256(json.dumps([file_identity(path) for path in files]).encode()).hexdigest()
    name = files[0].name if len(files) == 1 else files[0].parent.name
    return {"name": name, "bytes": sum(p.stat().st_size for p in files), "identity": identity[:16]}


def load_for(flags: Flags) -> Engine:
    """An engine with the files, the device and the dtype that flags name; raises as `Engine.open` does."""
    return Engine(flag_name).open(Setup.of(flags), flags.shift, flags.verbose)


def plan_for(
    engine: Engine,
    flags: Flags,
    prompts: Sequence[str],
    seeds: Sequence[int],
    skip_layer: SkipLayerConfig | None = None,
    residual: ResidualConfig | None = None,
    recorded: bool = False,
) -> list[Settings]:
    """Settings of every image that flags ask for, checked against the loaded model and the files they name.

    seeds: as many per prompt as there are images of it; skip_layer, residual: in place of the model's own and of the
    flags'; recorded: see `Engine.plan`. Raises Mistake.
    """
    values, usual = resolve(flags, engine.model_file.metadata, engine.large_controlnet)
    if skip_layer is not None and flags.cfg is None:
        values["cfg"] = skip_layer.cfg
    residual = residual or ResidualConfig.from_flags(flags.residual(), flags.residual_config)
    wanted = flags.for_image() | values | residual_settings(residual) | {"skip_layer": skip_layer or usual}
    if wanted["vae_tile"] is None:
        wanted["vae_tile"] = engine.vae_tile(values["width"], values["height"])
    pictures = engine.plan(prompts, seeds, recorded=recorded, **wanted)
    if flags.skip_layer_cfg and not wanted["skip_layer"]:
        unknown = f"no skip-layer settings are known for {Path(flags.model).name}"
        engine.note(f"note: {unknown}; `skip_layer_cfg` is off")
    for note in residual_notes(flags, residual):
        engine.note(note)
    if pictures:  # they differ in prompt and seed only; what has no effect is checked too
        given = dataclasses.replace(pictures[0], **engine.as_given)
        engine.check_settings(given)
        open_images([given])
    engine.say_notes()
    return pictures
