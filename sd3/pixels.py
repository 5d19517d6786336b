"""Images to latents in VAE space and back: reading files, encoding, decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dit_embedder import control_pixels
from sd3 import png
from sd3.device import device_memory
from sd3.files import WeightFile
from sd3.loading import Loader
from sd3.mistakes import Missing, Mistake, Where, display, verbatim
from sd3.network import ControlPart, Network
from sd3.reading import warn
from sd3.settings import Settings
from sd3.vae import VAE, VAEConfig
from sd3.weights import check_part, find_vae, has_vae, on_meta
from sd3_impls import start_noise

VAE_TILE = 576  # pixels, for images too large to decode whole: 1024 and 2048 divide well with the overlap


def open_image(field: str, path: str, width: int, height: int) -> Image.Image:
    """An image as viewers show it, in RGB, resized with Lanczos: rotated by its EXIF data, transparent pixels over
    white, the first frame of an animation. Raises Missing or Mistake, which names `field`.
    """
    where = Where(field, path)
    with png.open_picture(where, path) as image:
        opaque, transparent = as_shown(image)
        opaque = opaque.resize((width, height), Image.Resampling.LANCZOS)
    if transparent and where not in _TRANSPARENT:
        _TRANSPARENT.add(where)
        why = "is partly transparent; it is placed on white"
        warn(f"`{field}` {verbatim(display(path))}: {why}")
    return opaque


_TRANSPARENT: set[Where] = set()  # images already warned about: they are opened for every batch
_FEW_GREYS = {"L;2": 3, "L;4": 15}  # the highest value of a grey PNG with few bits, by Pillow's name for it


def as_shown(image: Image.Image) -> tuple[Image.Image, bool]:
    """An opened image as RGB, see `open_image`, and whether any of it was transparent.

    Raises ValueError for 32-bit grey values: the value of white is unknown.
    """
    levels = _FEW_GREYS.get(image.tile[0].args if image.format == "PNG" and image.tile else None)
    image = ImageOps.exif_transpose(image)
    key = image.info.get("transparency")
    if levels and isinstance(key, int):  # Pillow scales the values but not the transparent one
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
    """The initial and control images of settings: {(field, path, width, height): image}; raises as `open_image`."""
    wanted = {
        (field, path, s.width, s.height)
        for s in pictures
        for field, path in (("init_image", s.init_image), ("controlnet_cond_image", s.controlnet_cond_image))
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


def check_finite(
    x: Tensor, what: str, dtype: torch.dtype, cause: Callable[[], str] = str, patched: bool = False
) -> None:
    """Raises Mistake if `x` contains NaN or infinity: with the cause if it is known, else with what to try.

    patched: whether a LoRA is applied, which may be too strong.
    """
    if not torch.isfinite(x).all():
        if line := cause():
            raise Mistake("", "", f"{line}; it made {what} NaN or infinite; no image is saved")
        others = {torch.float16: "`dtype` bfloat16 or float32", torch.bfloat16: "`dtype` float32"}
        turns = [*(["a smaller strength of `lora`"] if patched else []), *([others[dtype]] if dtype in others else [])]
        advice = f"try {' or '.join(turns)}" if turns else "the model file may be damaged: download it again"
        name = str(dtype).removeprefix("torch.")
        raise Mistake("", "", f"{what} became NaN or infinite in {name}; no image is saved; {advice}")


class Pixels:
    """Converts between pixels and latents with the autoencoder. The constructor checks its header; weights are loaded
    on first use and stay loaded.
    """

    def __init__(self, path: str | None, model: WeightFile, network: Network, loader: Loader):
        """path: of a VAE file; None for the VAE in the model file. Raises Missing or Mistake."""
        file = loader.open("vae", path) if path else model
        self.part = find_vae(file)
        if not path and not has_vae(file):
            raise Missing("model", file.path, "holds no VAE; give one with `vae` sd3_vae.safetensors")
        self.config: VAEConfig = self.part.config(VAEConfig.from_shapes, "a VAE")
        check_part(self.part, lambda: VAE(self.config))
        channels = self.config.latent_channels, network.config.latent_channels
        if channels[0] != channels[1]:
            raise Mistake("vae", file.path, "has {} latent channels, the model has {}".format(*channels))
        self.device, self.loader = network.device, loader
        # bfloat16 would cause visible banding
        half = network.dtype == torch.float16 and self.device.type != "cpu"
        self.dtype = torch.float16 if half else torch.float32
        self._vae: VAE | None = None

    @property
    def vae(self) -> VAE:
        """The autoencoder, with its weights."""
        if self._vae is None:
            vae = self.loader.load(self.part, on_meta(lambda: VAE(self.config)), "VAE", self.device, self.dtype)
            self._vae = vae.to(memory_format=torch.channels_last)  # the fastest layout for convolutions
        return self._vae

    @torch.no_grad()
    def encode(
        self, image: Image.Image, seeds: Sequence[int], tile: int = 0, control: ControlPart | None = None
    ) -> Tensor:
        """Latents (one per seed, 16, H/8, W/8), in VAE space, of an RGB image.

        The encoding noise is drawn from a different stream of the seed than the start noise. control: the ControlNet
        that reads the image; its kind decides the pixel range; tile: side of a tile in pixels, 0 for no tiles.
        """
        pixels = unit_pixels(image)  # (1, 3, H, W)
        pixels = control_pixels(pixels, control.chained, control.kind) if control else pixels * 2 - 1
        mean, logvar = self.vae.moments(pixels.to(self.device, self.dtype), tile)  # (1, 16, H/8, W/8) each
        noise = start_noise(seeds, mean.shape, "control image" if control else "initial image")
        return self.vae.sample(mean.float(), logvar.float(), noise.to(self.device))

    @torch.no_grad()
    def decode(self, latent: Tensor, tile: int = 0) -> Tensor:
        """Pixels (B, 3, H, W), about [-1, 1], of latents in VAE space, decoded one at a time; tile: see `encode`."""
        rows = [self.vae.decode(row[None].to(self.device, self.dtype), tile) for row in latent]
        return torch.cat(rows)

    def tile_for(self, width: int, height: int) -> int:
        """Side in pixels of the tiles for decoding an image: 0 (no tiles) if decoding it whole takes less than a third
        of the device's memory.
        """
        needed = self.config.decoding_bytes(width, height, self.dtype)
        return 0 if needed <= device_memory(self.device) / 3 else VAE_TILE
