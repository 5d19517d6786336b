"""Images from SD3 / SD3.5 weight files, with residual text streaming: the command line and `SD3Inferencer`.

python sd3_infer.py --prompt "a red circle left of a blue square" --model models/demo/demo.safetensors
"""

from __future__ import annotations

import sys

from sd3 import command, help

if __name__ == "__main__":
    words = command.begin(command.read_infer_flags, help.text)  # --help and mistakes end here: no torch is needed

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import fire
import torch

from sd3 import png, self_check, streams, writing
from sd3.device import available_devices, choose_device, choose_dtype
from sd3.engine import Engine, plan_for, read_residual, read_skip_layer_config, read_texts
from sd3.flags import DEFAULT_DENOISE, FLAGS, names, read_values
from sd3.mistakes import Mistake, nearest
from sd3.models import SkipLayerConfig
from sd3.readers import read_bool
from sd3.record import Picture
from sd3.replay import Replay
from sd3.residual import ResidualConfig, build_residual_config
from sd3.run import MadeWith, make_pictures, run
from sd3.serve import serve
from sd3.settings import Flags, Setup

__all__ = ["SD3Inferencer", "build_residual_config", "choose_device", "choose_dtype", "main"]


class SD3Inferencer(Engine):
    """Loads once, makes many images, under the names of the public reference; see `Engine`."""

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
        """Reads headers, checks that all files are there and fit each other, decides device and dtype.

        others: further flags that decide what is loaded (`docs/flags.md`): device, dtype, no_t5, weights, ...
        Raises Mistake that names the file and what is wrong with it.
        """
        self._forget()  # what was loaded before, also where this fails
        given = others | {
            "model": model, "vae": vae, "controlnet_ckpt": controlnet_ckpt, "model_folder": model_folder,
            "text_encoder_device": text_encoder_device,
        }  # fmt: skip
        check_parameters("load", others, names("load"))
        run_flags = read_values({"shift": shift, "verbose": verbose})
        setup = Setup(**{name: value for name, value in given.items() if value is not None})
        self.open(setup, run_flags.get("shift"), run_flags.get("verbose", False), load_tokenizers)
        return self

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
        """Makes an image (or `num_images`) for every prompt and saves them as out_dir/000000.png and on.

        seed, seed_type: as on the command line: without both, seeds are drawn; a seed alone is where every prompt
        starts. others: further flags of an image (`docs/flags.md`): negative_prompt, num_images, batch_size, cache, ...
        Returns the paths. Settings left out (None) are the loaded model's usual ones. Raises Mistake before any weights
        load for settings that do not fit.
        """
        elsewhere = ("prompt", "cfg", *names("picture", group=FLAGS["residual_weights"].group))  # under other names
        check_parameters("gen_image", others, [name for name in names("picture") if name not in elsewhere])
        prompts, residual = read_texts(prompts), read_residual(residual_config)
        skip_layer = read_skip_layer_config(skip_layer_config)
        flags = Flags.read(
            others
            | {
                "model": str(self.model_file.path), "shift": others.get("shift", self.shift), "width": width,
                "height": height, "steps": steps, "cfg": cfg_scale, "sampler": sampler, "seed": seed,
                "seed_type": seed_type, "out_dir": out_dir, "controlnet_cond_image": controlnet_cond_image,
                "controlnet_ckpt": None if self.controlnet_part is None else str(self.controlnet_part.file.path),
                "init_image": init_image, "denoise": denoise,
            }
        )  # fmt: skip
        with_metadata = read_bool("with_metadata", with_metadata)
        pictures = plan_for(self, flags, prompts, flags.seeds(len(prompts)), skip_layer, residual)
        writing.check_writable(flags.out_dir)
        folder = Path(flags.out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        made_with = MadeWith(self, pictures[0], hashed=with_metadata)

        def save(picture: Picture) -> Path:
            path = folder / f"{picture.number:06d}.png"
            png.save_picture(path, picture.image, picture.settings, picture.record if with_metadata else None)
            return path

        return [path for _, path in make_pictures(self.make(pictures, flags.pad_batch), made_with, save)]


def check_parameters(function: str, given: Iterable[str], names: Iterable[str]) -> None:
    """Raises TypeError, as Python does, for a parameter that a function does not have."""
    if unknown := sorted(set(given) - set(names)):
        raise TypeError(f"{function}() has no parameter {unknown[0]}{nearest(unknown[0], names)}")


# ---- the command line ----------------------------------------------------------------------------


@fire.decorators.SetParseFn(str)
def infer(**given: str) -> None:
    """Does what the flags say: images, a replay, a self-check, a served session, the list of models."""
    typed = [f"--{name}={value}" for name, value in given.items()]
    if "replay" in given:
        if given.keys() & {"serve_stdin", "self_check"}:
            raise Mistake("replay", "", "goes with neither `serve_stdin` nor `self_check`")
        picture = Replay.read(given)
        run(Flags.read(picture.flags(available_devices(picture.record["settings"]))), typed, picture)
        return
    flags = Flags.read(given)
    if flags.self_check:
        if not self_check.run(flags):
            raise command.Failed
    elif flags.serve_stdin:
        serve(flags, given)
    else:
        run(flags, typed)


infer.__signature__ = command.signature(FLAGS)


def execute(values: command.Values) -> int:
    """Runs `infer` with words that were read; returns the exit status."""
    call = [f"--{name}={value}" for name, value in values.items()]
    work = lambda: fire.Fire(infer, command=call, name="sd3_infer.py")  # noqa: E731
    return command.execute(work, "--width, --height or --batch_size", call)


@streams.command_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, see `command.execute`."""
    words = sys.argv[1:] if arguments is None else arguments
    status, values = command.answer_early(words, command.read_infer_flags, help.text)
    return execute(values) if status is None else status


if __name__ == "__main__":
    sys.exit(streams.command_line(execute)(words))
