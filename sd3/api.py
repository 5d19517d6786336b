"""The Python interface: `sd3.load` gives a `Pipeline`, which makes images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from sd3 import png, writing
from sd3.engine import Engine
from sd3.flags import FLAGS, names, places, read_values
from sd3.help import default
from sd3.mistakes import Mistake, check_parameters, spell
from sd3.models import SkipLayerConfig, read_skip_layer_config
from sd3.planning import plan_for, unknown_words, words_read
from sd3.prompts import read_texts
from sd3.residual import ResidualConfig, read_residual
from sd3.run import Picture, Provenance, make_pictures
from sd3.settings import Flags, Settings, Setup
from sd3.telling import Reporter, Warnings
from sd3_impls import OnStep

OUTPUTS = ("pil", "latent")
# Parameters of a call other than settings.
OPTIONS = ("prompt", "output", "out_dir", "metadata", "on_step", "residual", "skip_layer")
PLACES = places(load="sd3.load", picture="the call of the pipeline")


class Made(NamedTuple):
    """One image, its settings, and where it was saved."""

    image: Image.Image
    settings: Settings
    path: Path | None


@dataclass(frozen=True)
class Output:
    """The results of a call, in the order of the prompts."""

    images: list[Image.Image]
    settings: list[Settings]  # of each
    paths: list[Path]  # where `out_dir` was given
    latents: Tensor | None = None  # (N, 16, H/8, W/8) in VAE space, float32, in place of images


class Pipeline:
    """A loaded model. Call it with a prompt or a list of prompts, and with settings named like the flags."""

    def __init__(self, engine: Engine, shift: float | None = None):
        """shift: the default for images; None: the model's usual one."""
        self.engine, self.shift = engine, shift

    def __repr__(self) -> str:
        """The model, its size, and where and how it runs."""
        config, set_up, loaded = self.engine.config, self.engine.setup, self.engine.loaded_settings()
        lora = f", lora={set_up.lora!r}" if set_up.lora else ""
        return (
            f"<sd3.Pipeline {loaded['model']}: {config.depth} blocks of width {config.width}, "
            f"{loaded['dtype']} on {loaded['device']}{lora}>"
        )

    def set_lora(self, lora: Any = None) -> None:
        """Changes the LoRAs: files, folders or pairs (file, strength), as the flag `lora` takes them; None for none.

        Of weights that are in memory, those that the old or the new LoRAs change are read from the model's file again,
        and no others: taking a difference away from a rounded weight would not give the weight back. Text encoders are
        read for each set of prompts anyway; encoded prompts are forgotten where a LoRA changes an encoder. Raises
        Mistake, and has changed nothing then.
        """
        self.engine.set_lora(lora)

    def __call__(self, prompt: str | Sequence[str], *, output: str = "pil", **options: Any) -> Output:
        """Makes an image (or `num_images`) of every prompt.

        output: `pil` for images or `latent` for latents; options: see `stream`.
        """
        if output not in OUTPUTS:
            raise Mistake("output", output, f"must be {' or '.join(OUTPUTS)}")
        if output == "latent" and options.get("out_dir") is not None:
            raise Mistake("out_dir", options["out_dir"], "cannot be used with latents: only images are saved")
        made = list(self._make(prompt, output == "pil", **options))
        settings = [m.settings for m in made]
        if output == "latent":
            return Output([], settings, [], torch.stack([m.image.cpu() for m in made]) if made else None)
        return Output([m.image for m in made], settings, [m.path for m in made if m.path])

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        out_dir: str | Path | None = None,
        metadata: bool = True,
        on_step: OnStep | None = None,
        residual: ResidualConfig | None = None,
        skip_layer: SkipLayerConfig | None = None,
        **settings: Any,
    ) -> Iterator[Made]:
        """Yields the images one at a time, for runs that do not fit into memory. Checks all settings when called.

        out_dir: the folder for 000000.png, 000001.png ..., with their settings unless `metadata` is False;
        on_step(step, x, sigma, denoised): called after every step; if it returns False, the call ends with the images
        finished so far; residual: replaces the residual_* settings; skip_layer: replaces the model's own; settings:
        seed, steps, cfg, width, residual_target_layers and all other flags of an image (`docs/flags.md`). Defaults are
        the model's usual settings and a random seed. Raises Mistake for a bad value before any weights load, TypeError
        for a setting that does not exist.
        """
        options = {"out_dir": out_dir, "metadata": metadata, "on_step": on_step}
        return self._make(prompt, True, residual=residual, skip_layer=skip_layer, **options, **settings)

    def _make(
        self,
        prompt: str | Sequence[str],
        decode: bool,
        *,
        out_dir: str | Path | None = None,
        metadata: bool = True,
        on_step: OnStep | None = None,
        residual: ResidualConfig | None = None,
        skip_layer: SkipLayerConfig | None = None,
        **settings: Any,
    ) -> Iterator[Made]:
        """As `stream`; with `decode` False yields latents (16, h, w) and saves nothing."""
        flags, pictures = self._plan(prompt, residual, read_skip_layer_config(skip_layer), settings)
        folder = None if out_dir is None else writing.open_folder(FLAGS["out_dir"].read("out_dir", out_dir))
        provenance = Provenance(self.engine, pictures[0], hashed=metadata and folder is not None)

        def save(picture: Picture) -> Made:
            path = folder and folder / f"{picture.number:06d}.png"
            if path:
                png.save_picture(path, picture.image, picture.settings, picture.record if metadata else None)
            return Made(picture.image, picture.settings, path)

        making = self.engine.make(pictures, flags.pad_batch, on_step, decode)
        return (made for _, made in make_pictures(making, provenance, save))

    def _plan(
        self,
        prompt: str | Sequence[str],
        residual: ResidualConfig | None,
        skip_layer: SkipLayerConfig | None,
        settings: dict[str, Any],
    ) -> tuple[Flags, list[Settings]]:
        """The flags of a call, and the settings of its images."""
        if "lora" in settings:
            raise TypeError("Pipeline() has no parameter lora; load() and set_lora() take it")
        check_parameters("Pipeline", settings, names("picture"), {name: name for name in OPTIONS}, PLACES)
        given = [name for name in settings if name.startswith("residual_")]
        if residual is not None and given:
            raise Mistake(given[0], settings[given[0]], "cannot be combined with `residual`, which already sets it")
        loaded, prompts = self.engine.loaded_settings(), read_texts(prompt)
        own = {"model": loaded["model"]}
        if settings.get("controlnet_cond_image") is not None:  # a loaded ControlNet without an image is not used
            own["controlnet_ckpt"] = loaded["controlnet_ckpt"]
        flags = Flags.read({"shift": self.shift} | settings | own)
        seeds = flags.seeds(len(prompts))
        plan = plan_for(
            self.engine,
            flags,
            prompts,
            seeds,
            skip_layer,
            read_residual(residual, "residual") if residual is not None else None,
        )
        texts = [] if self.engine.setup.lora else words_read(plan.pictures[0], prompts)  # a LoRA may teach words
        for note in (*plan.notes, *unknown_words(self.engine.model_file.metadata, texts)):
            self.engine.tell.note(note)
        return flags, plan.pictures


def load(model: str | Path = FLAGS["model"].default, *, tell: Reporter | None = None, **settings: Any) -> Pipeline:
    """Opens a model: reads headers and checks that all files exist and fit each other. Weights are read on first use.

    model: a file, a folder in diffusers layout, or `demo`, the small model that ships. settings: the flags that decide
    what is loaded (`docs/flags.md`): device, dtype, vae, controlnet_ckpt, weights ..., and `shift`, the default for
    images. tell: receives notes and progress, such as `sd3.Terminal()`, or `sd3.Reporter()` to drop them; by default
    notes are warnings of class `sd3.Note`, and there is no progress. Raises Mistake, which names the file and the
    problem.
    """
    check_parameters("load", settings, ("shift", *names("load")), {"tell": "tell"}, PLACES)
    shift = read_values({"shift": settings.pop("shift", None)}).get("shift")
    given = {name: value for name, value in settings.items() if value is not None}
    return Pipeline(Engine(Setup(model=model, **given), tell or Warnings()), shift)


TYPES = {"whole": int, "number": float, "switch": bool, "choice": str, "text": str, "size": int, "device": str}


def _with_settings(function: Callable, settings: Sequence[str], like: Callable | None = None) -> None:
    """Adds settings to the signature and the docstring of a function that takes `**settings`.

    like: a function whose keywords it takes too.
    """
    own = inspect.signature(function).parameters
    more = inspect.signature(like).parameters if like else {}
    keywords = {n: p for n, p in (own | more).items() if p.kind is not p.VAR_KEYWORD}
    lines = [inspect.cleandoc(function.__doc__ or ""), "", "Settings:"]
    for name in settings:
        row = FLAGS[name]
        kind = TYPES[row.read.kind] | None if row.read.kind in TYPES else Any
        keywords[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        lines.append(f"  {name}: {spell(row.help + default(row))}")
    function.__signature__ = inspect.Signature(
        list(keywords.values()), return_annotation=function.__annotations__["return"]
    )
    function.__doc__ = "\n".join(lines)


CALL_SETTINGS = [name for name in names("picture") if name not in OPTIONS]
_with_settings(Pipeline.stream, CALL_SETTINGS)
_with_settings(Pipeline.__call__, CALL_SETTINGS, like=Pipeline.stream)
_with_settings(load, [name for name in ("shift", *names("load")) if name != "model"])
