"""Pictures from SD3 / SD3.5 weight files, with residual text streaming: the command line and `SD3Inferencer`.

python sd3_infer.py --prompt "a red circle left of a blue square" --model models/demo/demo.safetensors
"""

from __future__ import annotations

import sys

from sd3 import command

if __name__ == "__main__":
    command.begin(sys.argv[1:])  # a mistyped flag need not wait for torch

import ast
import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fire

from sd3 import png, streams, writing
from sd3.command import SelfCheckFailed, guarded, read_arguments
from sd3.device import choose_device, choose_dtype
from sd3.engine import Engine, _residual, _skip_layer, read_texts, residual_settings
from sd3.flags import DEFAULT_DENOISE, Flags
from sd3.models import SkipLayerConfig
from sd3.pixels import open_images
from sd3.readers import read_bool, read_device
from sd3.replay import Replay
from sd3.residual import ResidualConfig, build_residual_config
from sd3.run import MadeWith, run
from sd3.self_check import run as run_self_check
from sd3.serve import serve

__all__ = ["SD3Inferencer", "build_residual_config", "choose_device", "choose_dtype", "main"]


class SD3Inferencer(Engine):
    """Loads once, makes many pictures, under the names of the public reference; see `Engine`."""

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
        writing.check_writable(out_dir)
        folder = Path(out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        made_with = MadeWith(self, pictures[0], hashed=with_metadata)
        paths = []
        for number, settings, image in self.make(pictures, pad_batch):
            known = made_with.wait()
            paths.append(folder / f"{number:06d}.png")
            png.save_picture(paths[-1], image, settings, known if with_metadata else None)
        return paths


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
        if not run_self_check(flags):
            raise SelfCheckFailed
        return
    if flags and flags.serve_stdin:
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


@streams.command_line
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
    sys.exit(main())
