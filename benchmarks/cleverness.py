"""What each cleverness of the block loop is worth: a step without it over the same step with it, SD3 Medium's size.

    python benchmarks/cleverness.py                      512 x 512, eager
    python benchmarks/cleverness.py --size 256
    python benchmarks/cleverness.py --compiled           what concerns compiled blocks

Random weights from the manifest, both halves of guidance, 154 text tokens, bfloat16. Every step without runs between
two with; a ratio is its time over their mean. The row A/A does the same with nothing switched off: what it differs from
1 by is noise. A cleverness earns its place where its ratio is above 1.01 by more than that.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import fire
import torch
from step import TOKENS, seconds, table, weights_file
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import mmditx
from mmditx import MMDiT, ModelCall, ResidualStream
from sd3.layers import PackedLinear, StoredLinear
from sd3.residual import ResidualConfig, residual_stream
from sd3.rotations import Rotations
from sd3_impls import Conditioning, Denoiser, seeded_noise
from sd3_infer import SD3Inferencer

TARGETS = tuple(range(2, 23))
MODES = {mode: ResidualConfig(0, TARGETS, "each:0.1", mode=mode) for mode in ("add", "anchored", "aligned")}
DTYPE = torch.bfloat16
Run = Callable[[], object]


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """An attribute is `value` inside."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


def inside(run: Run, *changes: tuple[object, str, object]) -> Run:
    """A run with attributes replaced: (owner, name, value) each."""

    def changed() -> None:
        if not changes:
            run()
            return
        with replaced(*changes[0]):
            inside(run, *changes[1:])()

    return changed


def after(prepare: Run, run: Run) -> Run:
    """A run, and what comes before it."""
    return lambda: (prepare(), run())


class Steps:
    """One MMDiT and the steps of it."""

    def __init__(self, size: int, file: Path):
        engine = SD3Inferencer().load(str(file), load_tokenizers=False, device="cpu", dtype="bfloat16")
        engine.quiet = True
        self.model: MMDiT = engine.get_mmdit()
        self.config = config = engine.config
        draw = lambda seed, *shape: seeded_noise(seed, shape).to(DTYPE)  # noqa: E731
        self.texts = [
            Conditioning(draw(i, 1, TOKENS, config.context_width), draw(9 + i, 1, config.pooled_width)) for i in (0, 1)
        ]
        self.x = seeded_noise(5, (1, config.latent_channels, size // 8, size // 8))
        turns = torch.eye(config.width).roll(1, 0).expand(1, len(TARGETS), -1, -1)
        self.rotations = Rotations(0, TARGETS, turns)

    def denoiser(self, mode: str = "", as_function: bool = False) -> Denoiser:
        """A run, under residual text streaming of a mode or none; `as_function`: see `Function`."""
        stream = residual_stream(MODES[mode], self.rotations) if mode else None
        hook = Function(stream) if as_function else stream
        return Denoiser(self.model, *self.texts, 5.0, 10_000, hooks=[hook] if mode else [])

    def step(self, mode: str = "", as_function: bool = False) -> Run:
        """One step of a run."""
        denoiser = self.denoiser(mode, as_function)
        return lambda: denoiser(self.x, 0.7)

    def plain_layers(self) -> list[tuple[object, str, object]]:
        """The packed layers as plain ones, each (owner, name, layer); memory is that of the blocks again."""
        out = []
        for owner in list(self.model.joint_blocks.modules()):
            for name, layer in owner.named_children():
                if isinstance(layer, PackedLinear):
                    weight = torch.randn(layer.out_features, layer.in_features).mul_(layer.in_features**-0.5).to(DTYPE)
                    plain = Plain(weight, layer.bias, layer.activation)
                    out.append((owner._modules, name, plain))
        return out


class Function:
    """A stream of which the blocks know nothing but that it is called before them."""

    def __init__(self, stream: ResidualStream):
        self.stream = stream

    def begin(self, at: ModelCall) -> Function | None:
        """Passes it on."""
        return None if self.stream.begin(at) is None else self

    def __call__(self, i: int, context: Tensor) -> Tensor:
        """Passes it on."""
        return self.stream(i, context)


class Plain(nn.Module):
    """What a packed layer does, in torch's public calls."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: str):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), bias
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.activation = partial(nn.functional.gelu, approximate="tanh") if activation else lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(nn.functional.linear(x, self.weight, self.bias))


@contextmanager
def layers(changes: list[tuple[dict, str, nn.Module]]) -> Iterator[None]:
    """Modules are replaced inside."""
    before = [(modules, name, modules[name]) for modules, name, _ in changes]
    for modules, name, module in changes:
        modules[name] = module
    try:
        yield
    finally:
        for modules, name, module in before:
            modules[name] = module


def with_layers(run: Run, changes: list[tuple[dict, str, nn.Module]]) -> Run:
    """A run with modules replaced."""

    def changed() -> None:
        with layers(changes):
            run()

    return changed


def eager_rows(steps: Steps) -> dict[str, tuple[Run, Run]]:
    """(without, with) by name."""
    model, step = steps.model, steps.step()
    joined = model.modulators
    rows = {"A/A": (step, step)}

    separate = []  # every block's modulation a packed product of its own
    for block in model.joint_blocks:
        for half in (block.context_block, block.x_block):
            linear = half.adaLN_modulation[1]
            packed = PackedLinear(nn.Linear(linear.in_features, linear.out_features, device="meta"))
            packed.store("weight", linear.weight.data)
            packed.store("bias", linear.bias.data)
            separate.append((half.adaLN_modulation._modules, "1", packed))
    unjoined = inside(step, (model, "modulators", None))
    rows["joint modulations"] = (with_layers(unjoined, separate), step)

    late = lambda x, shift, scale: torch.addcmul(shift, x, 1 + scale)  # noqa: E731
    plain = lambda active: nn.functional.linear(active, joined.weight, joined.bias).split(joined.widths, -1)  # noqa: E731
    rows["1 added to the scale beforehand"] = (
        inside(step, (mmditx, "modulate", late), (model, "modulators", plain)),
        step,
    )

    rows["position crop kept"] = (after(lambda: setattr(model, "_crop", None), step), step)

    denoiser = steps.denoiser()
    embeds = after(denoiser._embedded.clear, lambda: denoiser(steps.x, 0.7))
    rows["embedded text kept"] = (embeds, step)

    attn = model.joint_blocks[-1].context_block.attn
    whole = PackedLinear(nn.Linear(attn.qkv.in_features, 3 * attn.qkv.in_features, device="meta"))
    whole.store("weight", torch.randn(3 * whole.in_features, whole.in_features).mul_(0.02).to(DTYPE))
    whole.store("bias", torch.zeros(3 * whole.in_features, dtype=DTYPE))
    half = lambda x: whole(x)[..., whole.in_features :]  # noqa: E731
    rows["last block without the text's query"] = (inside(step, (attn, "_without_q", half)), step)

    rows["packed weights"] = (with_layers(step, steps.plain_layers()), step)

    for mode in ("anchored", "aligned"):
        denoiser = steps.denoiser(mode)
        run = lambda denoiser=denoiser: denoiser(steps.x, 0.7)  # noqa: E731
        rows[f"{mode}: origin 0 prepared once"] = (after(denoiser.hooks[0].forget, run), run)
    return rows


def compiled_rows(steps: Steps) -> dict[str, tuple[Run, Run]]:
    """(without, with) by name, of compiled blocks."""
    steps.model.compile_blocks()
    step = steps.step()
    rows = {"A/A": (step, step)}
    for mode in ("add", "anchored"):
        rows[f"{mode}: mixed inside the compiled block"] = (steps.step(mode, as_function=True), steps.step(mode))
    rows["packed weights"] = (with_layers(step, steps.plain_layers()), step)
    return rows


def measure(rows: dict[str, tuple[Run, Run]], rounds: int) -> dict[str, list[float]]:
    """Ratios of the first over the second, which runs before and after; neighbours share a run where they can."""
    for pair in rows.values():
        for run in dict.fromkeys(pair):
            run()
    ratios: dict[str, list[float]] = {name: [] for name in rows}
    last: tuple[Run | None, float] = (None, 0.0)
    with tqdm(total=rounds * len(rows), desc="measuring", unit="pair", leave=False) as bar:
        for _ in range(rounds):
            for name, (without, with_) in rows.items():
                before = last[1] if last[0] is with_ else seconds(with_)
                own = seconds(without)
                last = with_, seconds(with_)
                ratios[name].append(own / ((before + last[1]) / 2))
                bar.update()
    return ratios


@torch.no_grad()
def main(size: int = 512, rounds: int = 3, compiled: bool = False, only: str = "", folder: str = "") -> None:
    """Prints a row each; only: rows whose names contain this, and A/A."""
    with tempfile.TemporaryDirectory() as place:
        steps = Steps(size, weights_file("sd3_medium", folder or place))
    assert any(isinstance(m, StoredLinear) for m in steps.model.modules()), "this CPU does without packing"
    rows = (compiled_rows if compiled else eager_rows)(steps)
    rows = {name: pair for name, pair in rows.items() if name == "A/A" or only in name}
    how = "compiled" if compiled else "eager"
    threads = torch.get_num_threads()
    print(f"SD3 Medium's size, {size} x {size}, 2 x {TOKENS} text tokens, bfloat16, {how}, {threads} threads")
    table(measure(rows, rounds), "step without / step with")


if __name__ == "__main__":
    fire.Fire(main)
