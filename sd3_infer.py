"""Makes images from SD3 and SD3.5 weight files with residual text streaming: the command line and `SD3Inferencer`.

python sd3_infer.py --prompt "a red circle left of a blue square" --model models/demo/demo.safetensors
"""

from __future__ import annotations

import sys

from sd3 import command, help, info

if __name__ == "__main__":
    # --help, --info and mistakes in the flags exit here, before torch is imported.
    request = command.begin(
        command.read_infer_flags, help.text, lambda request: info.answer(request.values), help.short
    )

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sd3 import self_check, streams
from sd3.api import Pipeline
from sd3.device import choose_device, choose_dtype, missing_devices
from sd3.effects import needs_uncond
from sd3.engine import Engine, NotLoaded, about
from sd3.flags import DEFAULT_DENOISE, DEFAULT_SEED, FLAGS, names, places, read_values
from sd3.mistakes import Mistake, check_parameters
from sd3.models import SkipLayerConfig, read_skip_layer_config
from sd3.planning import residual_settings
from sd3.readers import read_bool, read_tile
from sd3.replay import Replay
from sd3.residual import ResidualConfig, build_residual_config, read_residual
from sd3.run import run
from sd3.serve import serve
from sd3.settings import Flags, Settings, Setup, read_row_seeds
from sd3.telling import Terminal

__all__ = ["SD3Inferencer", "build_residual_config", "choose_device", "choose_dtype", "main"]


class SD3Inferencer:
    """A loaded model that makes images, with the method names of the public reference."""

    def __init__(self) -> None:
        self.tell = Terminal()  # notes and progress go to stderr; `tell.quiet = True` drops them
        self.shift: float | None = None
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The engine; raises NotLoaded before `load`, and after a `load` that failed."""
        if self._engine is None:
            raise NotLoaded("no model is loaded; call SD3Inferencer.load first")
        return self._engine

    # -- loading --

    def load(
        self,
        model: str = FLAGS["model"].default,
        vae: str | None = None,
        shift: float | None = None,
        controlnet_ckpt: str | None = None,
        model_folder: str | None = None,
        text_encoder_device: str | torch.device = "auto",
        verbose: bool = False,
        load_tokenizers: bool = True,
        **others: Any,
    ) -> SD3Inferencer:
        """Reads headers, checks that no file is missing and that all fit each other, and chooses device and dtype.

        others: other flags of loading (`docs/flags.md`): device, dtype, no_t5, weights, ... Raises Mistake with the
        file and the reason.
        """
        self._engine = None  # release the previous model first, even if this load fails
        flags = others | {
            "model": model, "vae": vae, "controlnet_ckpt": controlnet_ckpt, "model_folder": model_folder,
            "text_encoder_device": text_encoder_device,
        }  # fmt: skip
        check_parameters("load", others, (*names("load"), "shift", "verbose"), elsewhere=PLACES)
        read = read_values({"shift": shift, "verbose": verbose})
        setup = Setup(**{name: value for name, value in flags.items() if value is not None})
        engine = Engine(setup, self.tell, load_tokenizers)
        self.shift = read.get("shift", engine.defaults["shift"])
        for line in about(engine) if read.get("verbose") else ():
            self.tell.say(line)
        self._engine = engine
        return self

    # -- prompts and images as inputs of the model --

    def get_cond(self, prompt: str, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Text tokens (1, L, T5 width) and pooled text (1, CLIP-L + CLIP-G widths) of a prompt.

        length: number of T5 tokens to pad to (None: the usual minimum).
        """
        with self.engine.owned():
            return self.engine.text.get_cond(prompt, length)

    def vae_encode(
        self, image: Image.Image, seed: int | Sequence[int] = DEFAULT_SEED, control: bool = False, tile: int = 0
    ) -> Tensor:
        """Encodes an RGB image to latents (number of seeds, 16, H/8, W/8) in VAE space.

        The encoding noise is a separate series of each seed, not the start noise. control: the image is for the
        ControlNet, whose kind determines the pixel range; tile: side of a tile in pixels, 0 for no tiles.
        """
        seeds, tile = read_row_seeds(seed), read_tile("vae_tile", tile) or 0
        if not isinstance(image, Image.Image):
            raise Mistake("image", image, "must be a PIL image")
        if control and self.engine.network.control is None:
            raise Mistake("control", "", "no ControlNet is loaded; load one with `controlnet_ckpt`")
        with self.engine.owned():
            return self.engine.pixels.encode(image, seeds, tile, self.engine.network.control if control else None)

    # -- sampling --

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
        skip_layer_config: SkipLayerConfig | Mapping[str, Any] | None = None,
        residual_config: ResidualConfig | None = None,
        *,
        streams: Sequence[Any] = (),
        on_step: Any = None,
        **others: Any,
    ) -> Tensor:
        """Samples latents (B, 16, h, w) in VAE space, float32.

        latent: start (B, 16, h, w) in model space, zeros for text to image; seed: one per row (a number for one row);
        conditioning, neg_cond: (text tokens (1 or B, T, X), pooled (1 or B, Y)); neg_cond is not used if cfg_scale is
        1; controlnet_cond: latents of the control image in model space; denoise: fraction of the schedule that runs;
        streams, on_step: see `Network.sample`; others: other flags of sampling (`SAMPLING`). Raises Mistake, and
        StopSampling if on_step returns False.
        """
        check_parameters("do_sampling", others, SAMPLING, {"cfg": "cfg_scale"}, PLACES | RESIDUAL)
        seeds = read_row_seeds(seed)
        if not isinstance(latent, Tensor) or latent.ndim != 4:
            raise Mistake("latent", "", "must be a tensor (B, channels, height, width)")
        if len(seeds) != latent.shape[0]:
            raise Mistake("seed", "", f"{len(seeds)} given for {latent.shape[0]} rows of the latent; give one for each")
        values = {"steps": steps, "cfg": cfg_scale, "sampler": sampler, "denoise": denoise}
        values |= {"shift": self.shift} | {name: value for name, value in others.items() if value is not None}
        values |= {"skip_layer": read_skip_layer_config(skip_layer_config)}
        values |= residual_settings(read_residual(residual_config))
        settings = Settings(prompt="", model=str(self.engine.model_file.path), **values)
        if controlnet_cond is not None and self.engine.network.control is None:
            raise Mistake("controlnet_cond", "", "no ControlNet is loaded; load one with `controlnet_ckpt`")
        if not needs_uncond(settings):
            neg_cond = None
        elif neg_cond is None:
            why = "needs neg_cond, the text of the unconditional pass; a cfg of 1 goes without"
            raise Mistake("cfg", f"{settings.cfg:g}", why)
        texts = conditioning, neg_cond
        with self.engine.owned():
            sample = self.engine.network.sample
            return sample(settings, latent, seeds, *texts, controlnet_cond, settings.denoise, streams, on_step)

    # -- decoding --

    def vae_decode(self, latent: Tensor, tile: int = 0) -> Image.Image:
        """Decodes the first latent of (B, 16, h, w), in VAE space, to a PIL image; tile: see `vae_encode`."""
        return self.engine.decode(latent, tile)

    # -- complete runs --

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
        with_metadata: bool = True,
        **others: Any,
    ) -> list[Path]:
        """Makes one image (or `num_images`) per prompt and saves them as out_dir/000000.png, 000001.png and so on.

        seed, seed_type: as on the command line; without both, seeds are random; with seed alone, it is the first seed
        of every prompt. others: other flags of an image (`docs/flags.md`): negative_prompt, num_images, batch_size,
        cache, ... Settings that are None use the defaults of the loaded model. Returns the paths. Raises Mistake,
        before any weights load, if settings do not fit.
        """
        allowed = [name for name in names("picture") if name not in REFERENCE_NAMES.keys() | RESIDUAL.keys()]
        check_parameters("gen_image", others, allowed, REFERENCE_NAMES, PLACES | RESIDUAL)
        flags = others | {
            "width": width, "height": height, "steps": steps, "cfg": cfg_scale, "sampler": sampler, "seed": seed,
            "seed_type": seed_type, "controlnet_cond_image": controlnet_cond_image, "init_image": init_image,
            "denoise": denoise,
        }  # fmt: skip
        making = Pipeline(self.engine, self.shift).stream(
            prompts,
            residual=read_residual(residual_config),
            skip_layer=read_skip_layer_config(skip_layer_config),
            metadata=read_bool("with_metadata", with_metadata),
            out_dir=FLAGS["out_dir"].default if out_dir is None else out_dir,
            **flags,
        )
        return [made.path for made in making]


# Parameters of `gen_image` that are not flags of an image.
OWN = ("out_dir", "skip_layer_config", "residual_config", "with_metadata")
# Names of parameters by flag, if the reference names them differently, and these parameters.
REFERENCE_NAMES = {"cfg": "cfg_scale", "prompt": "prompts"} | {name: name for name in OWN}
# Which function takes a flag, for messages about misplaced ones.
PLACES = places(load="SD3Inferencer.load", picture="gen_image")
RESIDUAL = dict.fromkeys(names("picture", group=FLAGS["residual_weights"].group), "belongs to residual_config")
# Flags that `do_sampling` takes by name, besides its parameters with the reference's names.
SAMPLING = {"shift", "controlnet_strength", "cache", *names("picture", group=FLAGS["sampler"].group, field="")}
SAMPLING -= REFERENCE_NAMES.keys()


# ---- the command line ----------------------------------------------------------------------------


def infer(request: command.Request) -> None:
    """Runs what the flags ask for: images, a replay, a self-check, a served session or the list of models."""
    values, words, flags = request.values, request.words, request.flags
    if flags is None:
        if values.keys() & {"serve_stdin", "self_check"}:
            raise Mistake("replay", "", "goes with neither `serve_stdin` nor `self_check`")
        picture = Replay.read(values)
        run(Flags.read(picture.flags(missing_devices(picture.record["settings"]))), words, picture)
    elif flags.self_check:
        if not self_check.run(flags):
            raise command.Failed
    elif flags.serve_stdin:
        serve(flags, values, words=words)
    else:
        run(flags, words)


def execute(request: command.Request) -> int:
    """Runs `infer`; returns the exit status, see `command.execute`."""
    return command.execute(lambda: infer(request), "--width, --height or --batch_size", request.words)


@streams.command_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, see `command.execute`."""
    words = sys.argv[1:] if arguments is None else arguments
    answer = lambda request: info.answer(request.values)  # noqa: E731
    status, request = command.answer_early(words, command.read_infer_flags, help.text, answer, short_help=help.short)
    return execute(request) if status is None else status


if __name__ == "__main__":
    sys.exit(streams.command_line(execute)(request))
