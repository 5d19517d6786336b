"""Names of flags in other programs, and the answer to each. Needs no torch.

An alias is refused with its answer, not accepted: a run's record, a sweep's axis and a served line then hold one name a
flag, and few aliases mean exactly the same (`n_samples`, `strength` of 1, `scale`).
"""

from __future__ import annotations

import re
from collections.abc import Collection

_SIZE = "give `width` and `height` in pixels"
_ONE_PROMPT = "all three text encoders read the same `prompt`"
_ONE_NEGATIVE = "all three text encoders read the same `negative_prompt`"
_SKIP_LAYER = "`skip_layer_cfg` turns on skip-layer guidance with the model's own layers, scale and interval"
_SECOND_PASS = (
    "there is no second pass; start from the finished image with `init_image`, `denoise`, `width` and `height`"
)
_NO_VARIATION = "seeds cannot be blended; an image has one `seed`"
_GRID = "no sheet of images is made; every image of `num_images` is a file of its own"
_IN_FILE = "is read from the model's file"
_LITTLE_MEMORY = "`offload` and `weights` int8 save GPU memory"
_PART_OF_STEPS = "only `denoise` with `init_image` runs a part of the steps"

# A flag's name ("is called X here"), or a sentence whose flags stand between backquotes.
ALIASES: dict[str, str] = {
    # diffusers
    "guidance_scale": "cfg",
    "num_inference_steps": "steps",
    "num_images_per_prompt": "num_images",
    "strength": "denoise",
    "image": "init_image",
    "control_image": "controlnet_cond_image",
    "controlnet_conditioning_scale": "controlnet_strength",
    "controlnet": "controlnet_ckpt",
    "generator": "seed",
    "torch_dtype": "dtype",
    "pretrained_model_name_or_path": "model",
    "pretrained_model": "model",
    "prompt_2": _ONE_PROMPT,
    "prompt_3": _ONE_PROMPT,
    "negative_prompt_2": _ONE_NEGATIVE,
    "negative_prompt_3": _ONE_NEGATIVE,
    "skip_guidance_layers": _SKIP_LAYER,
    "skip_layer_guidance_scale": _SKIP_LAYER,
    "skip_layer_guidance_start": _SKIP_LAYER,
    "skip_layer_guidance_stop": _SKIP_LAYER,
    "enable_model_cpu_offload": "offload",
    "enable_sequential_cpu_offload": "offload",
    "enable_vae_tiling": "vae_tile",
    "output_type": 'images are saved as PNG; in Python output="latent" returns latents',
    "callback_on_step_end": "steps are reported in Python only: on_step",
    # AUTOMATIC1111 and its kind
    "cfg_scale": "cfg",
    "sampler_name": "sampler",
    "sampling_method": "sampler",
    "sampling_steps": "steps",
    "schedule_type": "scheduler",
    "denoising_strength": "denoise",
    "init_images": "init_image",
    "batch_count": "num_images",
    "distilled_cfg_scale": "cfg",
    "seed_resize": _NO_VARIATION,
    "seed_resize_from_w": _NO_VARIATION,
    "seed_resize_from_h": _NO_VARIATION,
    "subseed": _NO_VARIATION,
    "subseed_strength": _NO_VARIATION,
    "enable_hr": _SECOND_PASS,
    "hr_scale": _SECOND_PASS,
    "hires_fix": _SECOND_PASS,
    "upscale": _SECOND_PASS,
    "refiner": "SD3 has no refiner",
    "clip_skip": "is fixed: SD3 reads the hidden states before CLIP's last layer",
    "restore_faces": "faces are not restored",
    "tiling": "no seamless textures are made; `vae_tile` is about memory",
    "lowvram": _LITTLE_MEMORY,
    "medvram": _LITTLE_MEMORY,
    "xformers": "attention is PyTorch's own; nothing has to be turned on",
    # ComfyUI
    "positive": "prompt",
    "negative": "negative_prompt",
    "ckpt_name": "model",
    "unet_name": "model",
    "vae_name": "vae",
    "vae_path": "vae",
    "unet": "model",
    "transformer": "model",
    "karras": "`scheduler` has no karras; it spaces noise levels as normal, simple or beta",
    "eta": "SD3 has no eta; of the samplers, `sampler` euler_ancestral adds noise",
    "noise_seed": "seed",
    "control_after_generate": "seed_type",
    "control_net_name": "controlnet_ckpt",
    "latent_image": "init_image",
    "filename_prefix": "folders are named after the prompt and `postfix`; `out` names the file of one image",
    "start_at_step": _PART_OF_STEPS,
    "end_at_step": _PART_OF_STEPS,
    # the CompVis scripts
    "scale": "cfg",
    "ddim_steps": "steps",
    "ddim_eta": "SD3 has no eta; of the samplers, `sampler` euler_ancestral adds noise",
    "plms": "`sampler` names the sampler",
    "dpm_solver": "`sampler` dpmpp_2m is a solver of this kind",
    "w": "width",
    "h": "height",
    "c": _IN_FILE,
    "f": _IN_FILE,
    "config": f"the architecture {_IN_FILE}",
    "n_iter": "num_images",
    "n_samples": "`num_images` is the number of images per prompt, `batch_size` how many are sampled at once",
    "n_rows": _GRID,
    "skip_grid": _GRID,
    "skip_save": "every image is saved; in Python images are saved only where `out_dir` is given",
    "fixed_code": "`seed_type` fixed starts every prompt at the same noise",
    "from_file": "`prompt` takes a .txt file with one prompt a line",
    "precision": "dtype",
    "ckpt": "model",
    "outdir": "out_dir",
    "init_img": "init_image",
    # the kind that people try
    "neg": "negative_prompt",
    "neg_prompt": "negative_prompt",
    "uncond_prompt": "negative_prompt",
    "output": "`out` names the file of one image, `out_dir` the folder of many",
    "output_path": "`out` names the file of one image, `out_dir` the folder of many",
    "save_path": "`out` names the file of one image, `out_dir` the folder of many",
    "output_dir": "out_dir",
    "output_folder": "out_dir",
    "checkpoint": "model",
    "model_path": "model",
    "model_dir": "model_folder",
    "prompts": "prompt",
    "prompt_file": "`prompt` takes a .txt file with one prompt a line",
    "text": "prompt",
    "seeds": "seed",
    "num_steps": "steps",
    "guidance": "cfg",
    "num_samples": "num_images",
    "num_outputs": "num_images",
    "batch": "batch_size",
    "size": _SIZE,
    "resolution": _SIZE,
    "aspect_ratio": _SIZE,
    "image_size": _SIZE,
    "t5": "t5xxl",
    "fp16": "`dtype` float16",
    "half": "`dtype` float16",
    "bf16": "`dtype` bfloat16",
    "cpu": "`device` cpu",
    "gpu": "`device` cuda",
    "load_in_8bit": "`weights` int8",
    "quantize": "`weights` int8",
    "low_vram": _LITTLE_MEMORY,
    "metadata": "images carry their settings unless `no_metadata` is given; `info` prints them",
    "loras": "lora",
    "lora_path": "lora",
    "lora_weights": "lora",
    "lora_name": "lora",
    "lora_scale": "`lora` takes a strength behind the file: a.safetensors:0.5",
    "strength_model": "`lora` takes a strength behind the file: a.safetensors:0.5",
    # the published files of residual text streaming
    "origin_layer": "residual_origin_layer",
    "target_layers": "residual_target_layers",
    "residual_layers": "residual_target_layers",
    "residual_weight": "residual_weights",
}


def answer(name: str, flags: Collection[str]) -> str:
    """The answer to another program's name, flags between backquotes; empty where there is none, or where it names a
    flag that is not among `flags`.
    """
    reply = ALIASES.get(name.lower().replace("-", "_"), "") if isinstance(name, str) else ""
    if reply and re.fullmatch(r"\w+", reply):
        reply = f"is called `{reply}` here"
    return reply if set(re.findall(r"`(\w+)`", reply)) <= set(flags) else ""
