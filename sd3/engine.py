"""The engine: one model, opened once, and the images that are made with it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import sd3_impls
from mmditx import ContextHook, Stream
from sd3.device import choose_device, choose_threads, computing_on
from sd3.effects import executed_steps, needs_uncond
from sd3.files import contents, lora_in
from sd3.find import Fit, models_folder
from sd3.flags import FLAGS
from sd3.loading import Loader
from sd3.memory import explained
from sd3.mistakes import Mistake, Where, flag_name, renaming
from sd3.models import fetch_model, model_path
from sd3.network import Network
from sd3.patches import PATCHES, patched
from sd3.pixels import Pixels, check_finite, open_images, to_image
from sd3.planning import batches, usual_settings
from sd3.prompt_tokens import Key
from sd3.residual import RESIDUAL_FLAGS
from sd3.settings import FILE_SETTINGS, Flags, Settings, Setup, paths_of
from sd3.telling import SILENT, Reporter, Terminal
from sd3.text import TextEncoders, in_groups
from sd3.unchanged import Unchanged
from sd3.weights import ModelTensors
from sd3_impls import Conditioning

LOADED_FILES = tuple(name for name in FILE_SETTINGS if FLAGS[name].scope == "load" and name != "model")
Opened = Mapping[tuple, Image.Image]  # opened images, see `open_images`


class NotLoaded(AttributeError, ValueError):
    """A model, or the part of it that was asked for, is not loaded."""


class Busy(RuntimeError):
    """Another thread is using this engine."""


class Owner:
    """A reentrant lock that records which thread uses an engine."""

    def __init__(self) -> None:
        self.thread: int | None = None
        self.entries = 0
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Holds the lock; may be released by another thread, as when a generator is closed there. Raises Busy."""
        with self.lock:
            if self.thread not in (None, threading.get_ident()):
                raise Busy("another thread is using this engine; use one engine per thread, or a queue")
            self.thread = threading.get_ident()
            self.entries += 1
        try:
            yield
        finally:
            with self.lock:
                self.entries -= 1
                if not self.entries:
                    self.thread = None


class Engine:
    """Makes images with one model. The constructor reads headers and checks everything. Weights are read on first use:
    text encoders while prompts are encoded, then the MMDiT and the autoencoder, which stay in memory.

    One thread at a time: a second thread gets `Busy`, also while a generator of the first one is suspended. Use one
    engine per thread, or a queue.
    """

    def __init__(self, setup: Setup, tell: Reporter = SILENT, load_tokenizers: bool = True):
        """tell: receives notes and progress; load_tokenizers: whether to open text encoders and tokenizers.

        Raises Mistake that names a file and what is wrong with it.
        """
        self.setup, self.tell = setup, tell
        self.loader = Loader(tell)
        self.files, self.stages = self.loader.files, self.loader.stages
        self.device = choose_device(setup.device)
        same = setup.text_encoder_device == "auto"
        self.encoder_device = self.device if same else choose_device(setup.text_encoder_device, "text_encoder_device")
        model = model_path(setup.model)
        self.model_file = self.loader.open("model", model, fetch_model(model))
        self.network = Network(setup, self.model_file, self.device, self.loader)
        self.config, self.dtype = self.network.config, self.network.dtype
        self.pixels = Pixels(setup.vae, self.model_file, self.network, self.loader)
        self.threads = choose_threads(setup.threads, self.network.parameters)
        if self.threads > (cores := os.cpu_count() or self.threads):
            tell.note(f"note: `threads` {self.threads}: this machine has {cores} CPUs")
        self._text = self._open_text() if load_tokenizers else None
        self._patch(setup)
        self._damage: str | None = None  # see `damage`
        self._owner = Owner()

    def _open_text(self) -> TextEncoders:
        file, given = self.model_file, self.setup.model_folder
        folders = [models_folder(given)] if given else [file.path if file.folder else file.path.parent, Path("models")]
        return TextEncoders(
            self.setup,
            file,
            list(dict.fromkeys(folders)),
            Fit(self.config.pooled_width, self.config.context_width),
            device=self.device,
            dtype=self.dtype,
            runs_on=self.encoder_device,
            threads=self.threads,
            files=self.files,
            tell=self.tell,
            stages=self.stages,
        )

    def _patch(self, setup: Setup) -> None:
        """Adds the changes of weights that flags ask for, in place of those added before. Raises Mistake, and has
        changed nothing then.
        """
        stamps = {where: at for where, at in self.files.stamps.items() if where.field not in PATCHES}
        files = Unchanged(stamps)
        for field in LOADED_FILES:  # those that no part opened, such as a patch's
            if all(where.field != field for where in stamps):
                paths = map(Path, paths_of(getattr(setup, field)))
                for own in (own for path in paths if not path.is_dir() or lora_in(path) for own in contents(path)):
                    files.add(Where(field, own), own)
        parts = patched({role: replace(part, patches=()) for role, part in self.parts.items()}, setup)
        self.network.repatch(parts["mmdit"])
        self.setup, self.files.stamps = setup, files.stamps
        self.pixels.part = parts["vae"]
        if self.network.control:
            self.network.control.part = parts["controlnet"]
        if self._text:
            self._text.repatch(parts)
        for line in (line for part in parts.values() for patch in part.patches for line in patch.notes):
            self.tell.note(line)

    def set_lora(self, lora: Any) -> None:
        """Changes the LoRAs, see `Pipeline.set_lora`. Raises Mistake, and has changed nothing then."""
        with self.owned():
            if self._owner.entries > 1:
                raise Busy("this engine is making images; finish or close them before its LoRAs change")
            self._patch(replace(self.setup, lora=FLAGS["lora"].read("lora", lora)))

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Encloses every use of the models: locks the engine and sets its number of CPU threads. Raises Busy while
        another thread uses it.
        """
        with self._owner.present(), computing_on(self.threads):
            yield

    @property
    def text(self) -> TextEncoders:
        """The text encoders; raises NotLoaded if the model was loaded without them."""
        if self._text is None:
            raise NotLoaded("this model was loaded without text encoders (load_tokenizers=False)")
        return self._text

    # -- what is loaded --

    @property
    def parts(self) -> dict[str, ModelTensors]:
        """The models in use, by role."""
        parts = {"mmdit": self.network.part, "vae": self.pixels.part}
        if self.network.control:
            parts["controlnet"] = self.network.control.part
        return parts | (self._text.parts if self._text else {})

    @property
    def defaults(self) -> dict[str, Any]:
        """The usual settings of the model: shift, steps, cfg, sampler, width and height."""
        return usual_settings(str(self.model_file.path), self.model_file.metadata, self.network.large_controlnet)

    def loaded_settings(self) -> dict[str, Any]:
        """The settings of an image that are fixed by loading."""
        control = self.network.control
        return self.setup.seen_in_images() | {
            "model": str(self.model_file.path),
            "vae": str(self.pixels.part.file.path) if self.pixels.part.file is not self.model_file else None,
            "controlnet_ckpt": str(control.part.file.path) if control else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "text_encoder_device": str(self.encoder_device),
        }

    def damage(self) -> str:
        """A line about the first NaN or infinite weight in a file; empty if there is none: then the dtype is to blame.
        Reads all files, once.
        """
        if self._damage is None:
            self._damage = ""
            for part in self.parts.values():
                if name := part.not_finite():
                    field, path = part.file.where
                    self._damage = f"`{field}` {path}: {name} holds NaN or infinity: download the file again"
                    break
        return self._damage

    # -- checks --

    def check_settings(self, s: Settings) -> None:
        """Raises Mistake for settings that do not fit the loaded model."""
        cell = self.pixels.config.downscale * self.config.patch
        for field, size in (("width", s.width), ("height", s.height)):
            if size % cell:
                raise Mistake(field, size, f"must be a multiple of {cell} for this model")
            if size > cell * self.config.grid:
                raise Mistake(field, size, f"is beyond this model's position grid; at most {cell * self.config.grid}")
        with renaming(RESIDUAL_FLAGS):
            self.network.residual_stream(s.residual)
        self.network.check_layers(s)
        if _strong(s.lora) != _strong(self.setup.lora):
            raise Mistake("lora", "", "was changed since these images were planned")
        if s.prompt_mode == "whole":
            self.text.keys(s)
        if self.network.control is None:
            if s.controlnet_ckpt:
                raise Mistake("controlnet_ckpt", "", "no ControlNet is loaded")
            if s.controlnet_cond_image:
                why = "no ControlNet is loaded; load one with `controlnet_ckpt`"
                raise Mistake("controlnet_cond_image", s.controlnet_cond_image, why)

    # -- images --

    def make(
        self,
        pictures: Sequence[Settings],
        pad_batch: bool = False,
        on_step: sd3_impls.OnStep | None = None,
        decode: bool = True,
    ) -> Iterator[tuple[int, Settings, Image.Image | Tensor]]:
        """Makes the images; yields (number, settings, image) as each is finished, or with `decode` False its latent
        (16, h, w) in VAE space. on_step is called after every step; if it returns False, the run ends.

        The batch_size in the settings it yields is the number of rows that ran together. pad_batch: fills a partial
        batch up to batch_size, so that the last bits of an image do not depend on how many were made with it.
        Prompts are encoded in groups that fit the cache, each before its images. Raises Mistake for settings that do
        not fit the model, before any weights load, and for a latent that becomes NaN or infinite.
        """
        for s in pictures:
            self.check_settings(s)
        images, make = open_images(pictures), self.make_batch if decode else self.make_latents
        with self._owner.present(), contextlib.suppress(sd3_impls.StopSampling):
            for batch in self.encoded(pictures):
                with self.owned():  # before sampling, so that loading is not counted as sampling
                    _ = self.network.mmdit, self.network.controlnet
                numbers, settings = zip(*batch, strict=True)
                more = f" and {len(batch) - 1} more" if len(batch) > 1 else ""
                what = f"image {numbers[0] + 1}/{len(pictures)}{more}"
                of_batch = make(settings, images, what, pad_batch, on_step)
                for number, (made, result) in zip(numbers, of_batch, strict=True):
                    if isinstance(result, Mistake):
                        with self.files.watch():  # weights overwritten by another program also give NaN
                            raise result
                    yield number, made, result

    def encoded(self, pictures: Sequence[Settings]) -> Iterator[list[tuple[int, Settings]]]:
        """The batches of images (see `batches`), their prompts encoded in groups that fit the cache."""
        texts = lambda batch: [text for _, s in batch for text in self.texts(s)]  # noqa: E731
        for group in in_groups(batches(pictures, self.text.shape), texts, self.text.most, self.text.cost):
            self.encode([text for batch in group for text in texts(batch)])
            yield from group

    def encode(self, texts: Sequence[Key]) -> None:
        """See `TextEncoders.encode`."""
        with self.owned():
            self.text.encode(texts)

    def load(self) -> None:
        """Loads the weights of the network and the autoencoder, unless they are in memory."""
        with self.owned():
            _ = self.network.mmdit, self.network.controlnet, self.pixels.vae

    def texts(self, s: Settings) -> list[Key]:
        """The texts to encode for an image, see `TextEncoders.keys`."""
        return list(self.text.keys(s)[: 2 if needs_uncond(s) else 1])

    def make_batch(
        self,
        batch: Sequence[Settings],
        images: Opened | None = None,
        what: str = "",
        pad_batch: bool = False,
        on_step: sd3_impls.OnStep | None = None,
    ) -> Iterator[tuple[Settings, Image.Image | Mistake]]:
        """The images of one batch (see `batches`), or a Mistake in place of an image that became NaN or infinite.

        images, what: see `sample`; pad_batch, on_step: see `make`. Raises StopSampling if on_step returns False.
        """
        for s, latent in self.make_latents(batch, images, what, pad_batch, on_step):
            if isinstance(latent, Mistake):
                yield s, latent
                continue
            try:
                decoding = explained("decoding", "a smaller `vae_tile`, `width` or `height`")
                with self.stages.timed("decoding"), decoding:
                    image = self.decode(latent[None], s.vae_tile)
            except Mistake as mistake:
                yield s, mistake
            else:
                yield s, image

    def make_latents(
        self,
        batch: Sequence[Settings],
        images: Opened | None = None,
        what: str = "",
        pad_batch: bool = False,
        on_step: sd3_impls.OnStep | None = None,
    ) -> Iterator[tuple[Settings, Tensor | Mistake]]:
        """As `make_batch`, latents (16, h, w) in VAE space."""
        rows = batch[0].batch_size if pad_batch else len(batch)
        turn = "a smaller `width` or `height`" if rows == 1 else "a smaller `batch_size`, `width` or `height`"
        with explained("sampling", turn):
            latents = self.sample([*batch, *[batch[-1]] * (rows - len(batch))], images, what, on_step=on_step)
        for s, latent in zip(batch, latents[: len(batch)], strict=True):
            s = s.changed(batch_size=rows)
            try:
                check_finite(latent, "the latent", self.dtype, self.damage, bool(_strong(self.setup.lora)))
            except Mistake as mistake:
                yield s, mistake
            else:
                yield s, latent

    def decode(self, latent: Tensor, tile: int = 0) -> Image.Image:
        """The first latent of (B, 16, h, w), in VAE space, as an image; tile: see `Pixels.encode`."""
        with self.owned():
            pixels = self.pixels.decode(latent[:1], tile)
            check_finite(pixels, "the decoded image", self.pixels.dtype, self.damage)
            return to_image(pixels[0])

    def sample(
        self,
        batch: Sequence[Settings],
        images: Opened | None = None,
        what: str = "",
        streams: Sequence[Stream | ContextHook] = (),
        on_step: sd3_impls.OnStep | None = None,
    ) -> Tensor:
        """Latents (B, 16, h, w) in VAE space of images that can share a run (see `batches`).

        images: opened ones by (flag, path, width, height); what: the progress bar's name; streams and on_step: see
        `Network.sample`.
        """
        images, s, seeds = images or {}, batch[0], [b.seed for b in batch]
        cell, control, network = self.pixels.config.downscale, None, self.network
        start = torch.zeros(len(batch), self.config.latent_channels, s.height // cell, s.width // cell)
        with self.owned():
            cond, uncond = self._encoded(batch)
            if s.init_image:
                image = images["init_image", s.init_image, s.width, s.height]
                start = sd3_impls.latent_in(self.pixels.encode(image, seeds, s.vae_tile))
            if s.controlnet_cond_image:
                image = images["controlnet_cond_image", s.controlnet_cond_image, s.width, s.height]
                control = sd3_impls.latent_in(self.pixels.encode(image, seeds, s.vae_tile, network.control))
            with self.tell.progress(executed_steps(s), what, "step") as update, self.stages.timed("sampling"):

                def tick(*state: Any) -> bool | None:
                    update(1)
                    return on_step(*state) if on_step else None

                denoise = s.denoise if s.init_image else 1.0
                return network.sample(s, start, seeds, cond, uncond, control, denoise, streams, tick)

    def _encoded(self, batch: Sequence[Settings]) -> tuple[Conditioning, Conditioning | None]:
        """The encoded prompts of a batch, and the negative prompt if a pass needs it."""
        halves = zip(*(self.texts(s) for s in batch), strict=True)
        cond, *uncond = (self._conditioning(keys) for keys in halves)
        return cond, uncond[0].row(0) if uncond else None

    def _conditioning(self, keys: Sequence[Key]) -> Conditioning:
        texts = [self.text.get(key) for key in keys]
        context, pooled = (torch.cat(parts) for parts in zip(*texts, strict=True))
        return Conditioning(context, pooled, sd3_impls.stack_kinds([self.text.kinds(key) for key in keys]))


def _strong(lora: Any) -> list[Any]:
    """LoRAs that have an effect."""
    return [file for file in lora or () if file.strength]


def load_for(flags: Flags, tell: Reporter | None = None) -> Engine:
    """The engine of a command, for its flags; raises as `Engine` does. tell: receives notes; None for the terminal."""
    tell = tell or Terminal(flag_name)
    engine = Engine(Setup.of(flags), tell)
    for line in about(engine) if flags.verbose else ():
        tell.say(line)
    return engine


def about(engine: Engine) -> list[str]:
    """Lines about what is loaded."""
    where = f"device {engine.device}, text encoders on {engine.encoder_device}, {engine.dtype}"
    return [f"{engine.model_file.path}: {engine.config}", where]
