"""Trains the small model's MMDiT and text encoders together: module, optimisers, states and the training loop."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from demo.data import CLASSES, FACTS, SIDES, Data, count_sets, load, save
from demo.optim import Average, Muon
from demo.text import Batches, Captions, TextRows, right_parts, said_of
from mmditx import MMDiT, MMDiTConfig
from other_impls import CLIP, T5, CLIPConfig, T5Config, join_text
from sd3.mistakes import Mistake

CONTEXT = 128  # width of a text token
CLIP_WIDTH = 64  # width of CLIP-L and of CLIP-G
ENCODERS = ("clip_l", "clip_g", "t5")
RESUME = Path(__file__).parent / "resume.safetensors"  # unfinished weights that a fresh checkout starts from
HISTORY = "training.jsonl"  # the thinned log in the same folder
LOG_EVERY = 25  # steps; states are saved at these steps only, so that a resumed run logs the same means
SAVE_EVERY = 150.0  # seconds
WARMUP = 200  # steps
PAUSE = 120.0  # seconds that a step counts at most: a longer one was paused from outside
BANDS = (0.5, 0.8, 0.9, 0.97)  # edges of the sigma bands whose losses are logged separately
AVERAGES = {"average": 0.999, "long_average": 0.9997}  # decay of each weight average
# Learning rates. Muon does not update the encoders' queries and keys, because its step does not shrink with the
# gradient: T5's attention scores are not scaled, and with a saturated softmax it does not learn word order.
RATES = {"muon": 0.01, "adamw": 1e-3, "attention": 1e-3}


class Flow(nn.Module):
    """MMDiT, text encoders, and three linear heads that are not shipped.

    `where` predicts the classes of each image token (`CLASSES`) from the image stream after `read_after` blocks.
    `clip_says` and `t5_says` predict from each text token what the caption says about that word's object (`FACTS`).
    """

    def __init__(self, captions: Captions, width: int = 128, depth: int = 8, read_after: int | None = None):
        super().__init__()
        clip = {"width": CLIP_WIDTH, "depth": 3, "mlp_width": 4 * CLIP_WIDTH, "vocabulary": captions.clip_vocabulary}
        clip["positions"] = captions.positions
        self.clip_l = CLIP(CLIPConfig(projection=False, activation="quick_gelu", **clip))
        self.clip_g = CLIP(CLIPConfig(projection=True, activation="gelu", **clip))
        pieces = captions.t5_vocabulary
        self.t5 = T5(T5Config(CONTEXT, 3, heads=4, inner=CONTEXT, mlp_width=256, buckets=32, vocabulary=pieces))
        config = MMDiTConfig(
            latent_channels=16,
            patch=2,
            width=width,
            depth=depth,
            context_width=CONTEXT,
            pooled_width=2 * CLIP_WIDTH,
            mlp_width=4 * width,
            grid=16,
            qk_norm=True,
        )
        self.mmdit = MMDiT(config)
        self.where = nn.Linear(width, len(CLASSES))
        self.clip_says = nn.Linear(2 * CLIP_WIDTH, len(FACTS))
        self.t5_says = nn.Linear(CONTEXT, len(FACTS))
        self.read_after = read_after or depth // 2
        self.middle: Tensor | None = None
        self.mmdit.joint_blocks[self.read_after - 1].register_forward_hook(self._keep)
        self.init()

    def _keep(self, module: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        self.middle = output[1]

    def init(self) -> None:
        """Initialises the weights: Xavier for matrices, small embeddings, zero for modulations and the last layer. T5
        as in the T5 paper's code (mesh-tensorflow), because its attention scores are not scaled.
        """
        for name, p in self.named_parameters():
            if p.ndim < 2:
                if name.endswith("bias"):
                    nn.init.zeros_(p)
            elif "embedding" in name or "embed_tokens" in name:
                nn.init.normal_(p, std=0.3 if "position" in name else 0.5)
            else:
                nn.init.xavier_uniform_(p.flatten(1))
            if "adaLN_modulation" in name or "final_layer.linear" in name:
                nn.init.zeros_(p)
        self.mmdit.pos_embed.data = sine_grid(self.mmdit.config.grid, self.mmdit.config.width)
        init_t5(self.t5)

    def text(self, ids: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Text tokens (B, positions + L, CONTEXT), CLIP's before T5's, and pooled text (B, 128)."""
        hidden_l, pooled_l = self.clip_l(ids["l"])
        hidden_g, pooled_g = self.clip_g(ids["g"])
        return join_text(hidden_l, hidden_g, self.t5(ids["t5"])), torch.cat([pooled_l, pooled_g], dim=-1)

    def text_loss(self, context: Tensor, spoken: Tensor, facts: Tensor) -> tuple[Tensor, dict[str, tuple[int, int]]]:
        """Cross-entropy of the text heads, summed over facts, and by encoder and part the (correct, counted) tokens for
        the side and the number of the objects.

        spoken: (B, LONGEST), zeros for a dropped caption; facts: (B, 3, facts).
        """
        clip, t5 = context.split([self.clip_l.config.positions, context.shape[1] - self.clip_l.config.positions], 1)
        total, right = context.new_zeros(()).float(), {}
        for name, head, tokens, offset in (("clip", self.clip_says, clip, 1), ("t5", self.t5_says, t5, 0)):
            who, target = said_of(spoken, facts, tokens.shape[1], offset)
            logits = head(tokens).float()
            loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            mask = who > 0
            if name == "clip":  # causal: the first object's tokens cannot see the relation
                loss = torch.cat([loss[..., : len(SIDES)] * (who > 1)[..., None], loss[..., len(SIDES) :]], dim=-1)
            total = total + (loss.sum(-1) * mask).sum() / mask.sum().clamp(min=1)
            parts = right_parts(logits, target, mask)
            if name == "clip":
                parts["sides"] = right_parts(logits, target, who > 1)["sides"]
            right |= {f"{name} {part}": counts for part, counts in parts.items()}
        return total, right


def init_t5(model: T5) -> None:
    """Initialises T5 as its authors' code does."""
    config = model.config
    head = config.inner // config.heads
    stds = {
        "SelfAttention.q": (config.width * head) ** -0.5,
        "SelfAttention.k": config.width**-0.5,
        "SelfAttention.v": config.width**-0.5,
        "SelfAttention.o": config.inner**-0.5,
        "DenseReluDense.wi": config.width**-0.5,
        "DenseReluDense.wo": config.mlp_width**-0.5,
        "relative_attention_bias": 0.5,  # our choice: word order matters from the start
        "embed_tokens": 1.0,
    }
    for name, p in model.named_parameters():
        for part, std in stds.items():
            if part in name:
                nn.init.normal_(p, std=std)


def sine_grid(side: int, width: int) -> Tensor:
    """Sine-cosine position grid (1, side * side, width): half of the features encode the column, half the row."""
    f = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * f  # (side, width / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)
    columns, rows = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, width)


def optimisers_of(model: Flow) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks; AdamW for the encoders' queries and keys, embeddings, modulations, norms,
    heads and the outer layers.
    """
    inside = ("joint_blocks.", "encoder.layers.", "encoder.block.")
    scores = ("q_proj.", "k_proj.", "SelfAttention.q.", "SelfAttention.k.")
    muon, attention, rest = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if any(s in name for s in scores):
            attention.append(p)
        elif p.ndim == 2 and any(i in name for i in inside) and "adaLN" not in name and "relative" not in name:
            muon.append(p)
        else:
            rest.append(p)
    groups = [{"params": rest, "lr": RATES["adamw"]}, {"params": attention, "lr": RATES["attention"]}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    optimisers = [Muon(muon, lr=RATES["muon"]), adamw]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["base"] = group["lr"]
    return optimisers


def set_rate(optimisers: list[torch.optim.Optimizer], factor: float) -> None:
    """Sets every learning rate to `factor` times its base."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = factor * group["base"]


def rate(step: int, fresh_from: int, decay_from: int | None, decay_to: int | None) -> float:
    """Learning-rate factor: warm-up after fresh_from, constant, and linear to 2 % between decay_from and decay_to."""
    warm = min(1.0, (step - fresh_from + 1) / WARMUP)
    if decay_from is None or decay_to is None or step < decay_from:
        return warm
    return warm * max(0.02, 1.0 - 0.98 * (step - decay_from) / (decay_to - decay_from))


def draws(seed: int, step: int) -> torch.Generator:
    """Random generator of a step. It depends only on seed and step, so a resumed run draws the same numbers."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def noise_levels(count: int, mean: float, spread: float, generator: torch.Generator) -> Tensor:
    """sigma = sigmoid(mean + spread * normal), (count,), stratified: one normal number from each 1/count quantile."""
    order = torch.randperm(count, generator=generator)
    u = (order + torch.rand(count, generator=generator)) / count
    return torch.sigmoid(mean + spread * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))


class Means:
    """Running means of the logged values since the last log line."""

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        """Adds `count` values that sum to `total`."""
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def take(self) -> dict[str, float]:
        """Returns the means and resets them."""
        out = {k: round(v / self.counts[k], 5) for k, v in self.sums.items() if self.counts[k]}
        self.__init__()
        return out


class Log:
    """A JSON-lines log. A run that resumes from `step` drops the lines of later steps."""

    def __init__(self, path: Path, step: int):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def write(self, line: dict) -> None:
        """Appends a line and prints it."""
        text = json.dumps(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        print(text, flush=True)


# ---- states --------------------------------------------------------------------------------------


def write_resume(state: dict, path: Path = RESUME) -> None:
    """Writes the averaged weights in bfloat16, including the heads, with the step and the sizes."""
    tensors = state["model"] | state["average"]
    metadata = {k: str(state[k]) for k in ("step", "spent", "width", "depth", "read_after")}
    partial = path.with_suffix(".partial")
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in tensors.items()}, partial, metadata)
    partial.replace(path)


def read_resume(path: Path = RESUME) -> dict | None:
    """Reads a file of `write_resume` as a state without optimisers; None if there is no file."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    model = {k: v.float() for k, v in load_file(path).items()}
    numbers = {k: int(metadata[k]) for k in ("step", "width", "depth", "read_after")}
    return {"model": model, "spent": float(metadata["spent"]), "fresh_from": numbers["step"], **numbers}


def write_history(log: Path, path: Path, every: int = 100) -> None:
    """Copies a log to `path`: all lines with scores, and one other line per `every` steps."""
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    kept = [line for line in lines if '"score"' in line or json.loads(line)["step"] % every == 0]
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def newest(work: Path, resume: Path | None = RESUME) -> dict | None:
    """The state of the work folder or of the repository, whichever has more steps."""
    local, shared = load(work / "flow.pt"), read_resume(resume) if resume else None
    if local is None or shared is None:
        return local or shared
    return local if local["step"] >= shared["step"] else shared


def grown(state: dict, depth: int, captions: Captions, copy: bool = False) -> dict:
    """A state with `depth` blocks, the new ones spread between the trained ones.

    The new blocks have zero gates, so that the function stays the same. copy: they are copies of the trained block
    before them instead, and all of these share its gates equally; the function changes, and has to be trained on.
    """
    old_depth = state["depth"]
    if depth < old_depth:
        raise Mistake("depth", depth, f"the state already has {old_depth} blocks")
    place = [round(i * (depth - 1) / max(1, old_depth - 1)) for i in range(old_depth)]
    place[-1] = depth - 1  # the last block is of another kind and stays last
    read_after = place[state["read_after"] - 1] + 1
    torch.manual_seed(depth)
    model = Flow(captions, state["width"], depth, read_after)
    stem = "mmdit.joint_blocks."

    def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, value in weights.items():
            if not name.startswith(stem):
                out[name] = value
                continue
            number, rest = name.removeprefix(stem).split(".", 1)
            first = place[int(number)]
            end = place[int(number) + 1] if copy and int(number) + 1 < old_depth else first + 1
            for new in range(first, end):
                out[f"{stem}{new}.{rest}"] = _gates_shared(rest, value, end - first)
        return out

    out = {k: state[k] for k in ("step", "spent", "width")} | {"fresh_from": state["step"]}
    out |= {"depth": depth, "read_after": read_after, "model": model.state_dict() | renamed(state["model"])}
    parameters = dict(model.named_parameters())
    for name in AVERAGES:
        if name in state:
            values = {k: out["model"][k] for k in parameters}
            out[name] = values | renamed(state[name])
            out[f"{name}_steps"] = state[f"{name}_steps"]
    return out


def _gates_shared(name: str, value: Tensor, count: int) -> Tensor:
    """A block's tensor, with its gates divided by `count` if it is a modulation of six parts (see `mmditx`)."""
    if count == 1 or "adaLN_modulation" not in name:
        return value.clone()
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = value.chunk(6)
    return torch.cat([shift, scale, gate / count, shift_mlp, scale_mlp, gate_mlp / count])


def pruned(state: dict, keep: list[int]) -> dict:
    """A state with the blocks `keep` alone, in their order; without optimisers."""
    if keep != sorted(set(keep)) or keep[-1] != state["depth"] - 1:
        raise Mistake("keep", keep, f"must be ascending and end with the last block, {state['depth'] - 1}")
    stem = "mmdit.joint_blocks."

    def kept(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, value in weights.items():
            if name.startswith(stem):
                number, rest = name.removeprefix(stem).split(".", 1)
                if int(number) not in keep:
                    continue
                name = f"{stem}{keep.index(int(number))}.{rest}"
            out[name] = value
        return out

    read_after = sum(number < state["read_after"] for number in keep)
    out = {k: state[k] for k in ("step", "spent", "width")} | {"fresh_from": state["step"]}
    out |= {"depth": len(keep), "read_after": read_after, "model": kept(state["model"])}
    return (
        out
        | {name: kept(state[name]) for name in AVERAGES if name in state}
        | {f"{name}_steps": state[f"{name}_steps"] for name in AVERAGES if name in state}
    )


# ---- training ------------------------------------------------------------------------------------


class Training:
    """A model with its optimisers, averages and progress."""

    def __init__(self, captions: Captions, state: dict | None, width: int, depth: int, seed: int):
        torch.manual_seed(seed)
        state = state or {}
        self.width, self.depth = state.get("width", width), state.get("depth", depth)
        self.model = Flow(captions, self.width, self.depth, state.get("read_after"))
        self.optimisers = optimisers_of(self.model)
        if "model" in state:
            self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state.get("optimisers", ()), strict=False):
            optimiser.load_state_dict(saved)
        self.averages = {name: Average(self.model, decay) for name, decay in AVERAGES.items()}
        for name, average in self.averages.items():
            if name in state:
                average.values, average.steps = state[name], state[f"{name}_steps"]
        self.step, self.spent = state.get("step", 0), state.get("spent", 0.0)
        self.fresh_from = state.get("fresh_from", 0)
        self.sets = state.get("sets", 0)

    def state(self) -> dict:
        """Everything needed to resume exactly."""
        out = {k: getattr(self, k) for k in ("step", "spent", "width", "depth", "fresh_from", "sets")}
        out |= {"read_after": self.model.read_after, "model": self.model.state_dict()}
        out["optimisers"] = [o.state_dict() for o in self.optimisers]
        for name, average in self.averages.items():
            out |= {name: average.values, f"{name}_steps": average.steps}
        return out

    def update(self, factor: float) -> None:
        """Steps all optimisers and averages once."""
        set_rate(self.optimisers, factor)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        for average in self.averages.values():
            average.update(self.model)


class Rows:
    """The training set with the token ids of its captions."""

    def __init__(self, captions: Captions, work: Path, sets: int, more: dict[str, float] | None):
        self.data = Data.read(work, sets)
        self.texts = TextRows(captions, self.data.captions)
        self.batches = Batches(self.texts.lengths, self.data.kinds, more)


def losses(
    model: Flow,
    rows: Rows,
    empty: TextRows,
    picked: Tensor,
    length: int,
    levels: tuple[float, float],
    bfloat16: bool,
    g: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
    """Losses of the scenes `picked`: the flow loss of each scene (B,), their noise levels (B,), the loss of the `where`
    head, the loss of the text heads, and the text heads' hits (see `Flow.text_loss`).

    A tenth of the captions is replaced by the empty caption. levels: mean and spread of the noise levels.
    """
    batch = len(picked)
    drop = torch.rand(batch, generator=g) < 0.1
    ids, no_ids = rows.texts.ids(picked, length), empty.ids(torch.zeros(batch, dtype=torch.long), length)
    ids = {k: torch.where(drop[:, None], no_ids[k], v) for k, v in ids.items()}
    latent = rows.data.latents[picked].float()
    noise = torch.randn(latent.shape, generator=g)
    sigma = noise_levels(batch, *levels, g)
    x = torch.lerp(latent, noise, sigma[:, None, None, None])
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        context, pooled = model.text(ids)
        v = model.mmdit(x, 1000 * sigma, pooled, context)
        where = model.where(model.middle)
        says, right = model.text_loss(context, rows.data.spoken[picked] * ~drop[:, None], rows.data.facts[picked])
    each = (v.float() - (noise - latent)).square().mean(dim=(1, 2, 3))
    target = rows.data.classes[picked].float() / 255
    seen = F.binary_cross_entropy_with_logits(where.float(), target, reduction="none").sum(-1).mean()
    return each, sigma, seen, says, right


def train(
    work: Path,
    captions: Captions,
    state: dict | None,
    *,
    minutes: float,
    steps: int,
    batch: int,
    width: int,
    depth: int,
    noise_mean: float,
    noise_spread: float,
    where_weight: float,
    text_weight: float,
    decay_from: int | None,
    decay_to: int | None,
    score_every: int,
    more: dict[str, float] | None,
    compile: bool,
    bfloat16: bool,
    seed: int,
    save_every: float = SAVE_EVERY,
    threads: int | None = None,
) -> None:
    """The training loop; arguments as in `demo.train.flow`."""
    run = begin(work, captions, state, width, depth, seed)
    model, rows = run.model, Rows(captions, work, run.sets, more)
    empty = TextRows(captions, [""])
    load_of = Load() if threads == 0 else None
    if threads:
        torch.set_num_threads(threads)
    eager = compiled(model) if compile else nullcontext
    log, means = Log(work / "log.jsonl", run.step), Means()
    saved = last = time.time()
    while run.spent < minutes * 60 and run.step < steps:
        g = draws(seed, run.step)
        length, picked = rows.batches.draw(batch, g)
        # Captions longer than CLIP's positions have many rare lengths: compiling each would cost more than it saves.
        with eager() if length > captions.positions else nullcontext():
            each, sigma, seen, says, right = losses(
                model, rows, empty, picked, length, (noise_mean, noise_spread), bfloat16, g
            )
        (each.mean() + where_weight * seen + text_weight * says).backward()
        run.update(rate(run.step, run.fresh_from, decay_from, decay_to))
        run.step += 1
        _note(means, each.detach(), sigma, seen.item(), says.item(), right)
        now = time.time()
        run.spent, last = run.spent + min(now - last, PAUSE), now
        if run.step % LOG_EVERY:
            continue
        line = {"step": run.step, "minutes": round(run.spent / 60, 2), "scenes": len(rows.data.captions)}
        if load_of:
            line["threads"] = load_of.choose()
        log.write(line | means.take())
        if run.step % score_every == 0 or now - saved > save_every:
            save(work / "flow.pt", run.state())
            if (sets := count_sets(work)) > run.sets:
                run.sets, rows = sets, Rows(captions, work, sets, more)
            if run.step % score_every == 0:
                log.write({"step": run.step, "minutes": round(run.spent / 60, 2), "score": watch(work)})
            saved = last = time.time()
    save(work / "flow.pt", run.state())


def begin(work: Path, captions: Captions, state: dict | None, width: int, depth: int, seed: int) -> Training:
    """A `Training` that continues from `state` with that state's number of scene sets (all sets if it has none)."""
    run = Training(captions, state, width, depth, seed)
    run.sets = run.sets or count_sets(work)
    if not run.sets:
        raise Mistake("work", work, "has no encoded scenes; run python -m demo.train encode first")
    return run


def compiled(model: Flow) -> Callable[[], AbstractContextManager]:
    """Compiles the blocks and the text encoders. Returns a function that makes a context in which they run eagerly."""
    torch._inductor.config.cpp.dynamic_threads = True
    for module in (*model.mmdit.joint_blocks, *(getattr(model, name) for name in ENCODERS)):
        module.compile(dynamic=False)
    return lambda: torch.compiler.set_stance("force_eager")


class Load:
    """Chooses one or two threads by the machine's load from processes of normal priority (Linux only)."""

    def __init__(self):
        self.last = self._times()

    @staticmethod
    def _times() -> list[int]:
        return [int(x) for x in Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]

    def choose(self) -> int:
        """Sets and returns torch's number of threads: one if processes of normal priority took more than 0.35 of the
        time since the last call, otherwise two.
        """
        now = self._times()
        spent = [b - a for a, b in zip(self.last, now, strict=True)]
        self.last = now
        threads = 1 if spent[0] + spent[2] > 0.35 * max(1, sum(spent)) else 2
        torch.set_num_threads(threads)
        return threads


def _note(means: Means, each: Tensor, sigma: Tensor, seen: float, says: float, right: dict) -> None:
    means.add("loss", float(each.mean()))
    means.add("where", seen)
    means.add("text", says)
    for low, high in zip((0.0, *BANDS), (*BANDS, 1.0), strict=True):
        band = each[(sigma >= low) & (sigma < high)]
        means.add(f"loss to {high}", float(band.sum()), len(band))
    for name, (hits, count) in right.items():
        means.add(name, hits, count)


def watch(work: Path) -> dict | None:
    """Scores the averaged weights in a subprocess, so that an error in it does not stop the training."""
    command = [sys.executable, "-m", "demo.train", "watch", "--work", str(work)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        print(f"watch failed: {error}", flush=True)
        return None


# ---- text encoders alone -------------------------------------------------------------------------


def train_text(
    model: Flow, captions: Captions, text: dict, steps: int, batch: int, seed: int = 5
) -> Iterator[tuple[int, dict[str, float]]]:
    """Trains the text encoders through the text heads alone, on a result of `demo.data.text_set`. Every `LOG_EVERY`
    steps it yields the step and the accuracies since the last one.
    """
    optimisers = optimisers_of(model)
    texts = TextRows(captions, text["captions"])
    batches, means = Batches(texts.lengths, text["kinds"]), Means()
    for step in range(steps):
        length, picked = batches.draw(batch, draws(seed, step))
        context, _ = model.text(texts.ids(picked, length))
        loss, right = model.text_loss(context, text["spoken"][picked], text["facts"][picked])
        loss.backward()
        set_rate(optimisers, min(1.0, (step + 1) / 20))
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        means.add("loss", loss.item())
        for name, (hits, count) in right.items():
            means.add(name, hits, count)
        if (step + 1) % LOG_EVERY == 0 or step == steps - 1:
            yield step + 1, means.take()


@torch.no_grad()
def read_text(model: Flow, captions: Captions, text: dict, batch: int = 256) -> dict[str, float]:
    """Accuracies of the text heads on a set of captions."""
    texts, means = TextRows(captions, text["captions"]), Means()
    for length in texts.lengths.unique().tolist():
        for picked in (texts.lengths == length).nonzero()[:, 0].split(batch):
            context, _ = model.text(texts.ids(picked, length))
            _, right = model.text_loss(context, text["spoken"][picked], text["facts"][picked])
            for name, (hits, count) in right.items():
                means.add(name, hits, count)
    return means.take()
