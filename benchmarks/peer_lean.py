"""Makes one image with diffusers' StableDiffusion3Pipeline, with the least memory that its documentation shows for a
CPU: encode the prompt, delete the text encoders, then load the transformer and the VAE.

    python benchmarks/peer_lean.py FOLDER --size 512 --steps 1

Started by benchmarks/memory.py, which measures it.
"""

from __future__ import annotations

import gc
import time

import fire
import torch


@torch.no_grad()
def main(folder: str, size: int = 512, steps: int = 1, prompt: str = "a red circle left of a blue square") -> None:
    """Makes an image from a folder in diffusers layout. Prints the seconds to the first step and in total."""
    from diffusers import StableDiffusion3Pipeline

    started, first = time.time(), []
    text = StableDiffusion3Pipeline.from_pretrained(
        folder, transformer=None, vae=None, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeds = dict(zip(names, text.encode_prompt(prompt, None, None, device="cpu", max_sequence_length=77), strict=True))
    del text
    gc.collect()
    none = dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **none, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True)
    pipe.transformer.register_forward_pre_hook(lambda *_: first.append(time.time() - started))
    pipe(**embeds, width=size, height=size, num_inference_steps=steps, guidance_scale=5.0).images[0].save(
        "/dev/null", "PNG"
    )
    print(f"first step after {first[0]:.1f} s, all {time.time() - started:.1f} s")


if __name__ == "__main__":
    fire.Fire(main)
