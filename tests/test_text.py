"""Text encoders: streamed layer by layer, told to a reporter, checked when they are made."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from helpers import CLIP_G, T5_SMALL, modules

from other_impls import CLIP, T5
from sd3.files import ENCODER_PREFIX, WeightFile
from sd3.find import Fit
from sd3.mistakes import Mistake
from sd3.settings import Setup
from sd3.telling import Reporter, Terminal
from sd3.text import StreamedEncoder, TextEncoders
from sd3.unchanged import Unchanged
from sd3.weights import ModelTensors, on_meta

CPU = torch.device("cpu")


def streamed(small_model, role: str, resident: bool = False) -> StreamedEncoder:
    part = ModelTensors(WeightFile(small_model), ENCODER_PREFIX.format(role))
    model = on_meta(lambda: T5(T5_SMALL) if role == "t5xxl" else CLIP(CLIP_G))
    return StreamedEncoder(model, part, CPU, torch.float32, resident)


def texts(width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, length, width, generator=generator) for length in (16, 16, 16)]


def in_memory(encoder: StreamedEncoder) -> list[int]:
    """Numbers of the layers of which any parameter is loaded."""
    return [i for i, layer in enumerate(encoder.model.layers) if not all(p.is_meta for p in layer.parameters())]


@torch.no_grad()
@pytest.mark.parametrize("role", ["clip_g", "t5xxl"])
def test_one_layer_at_a_time_is_in_memory_unless_they_stay(small_model, role):
    whole = modules()[ENCODER_PREFIX.format(role)]
    ids = [[torch.randint(0, 64, (1, 16)) for _ in range(3)]] if role == "clip_g" else []
    own = texts(T5_SMALL.width if role == "t5xxl" else CLIP_G.width)
    wanted = whole.encode(own, *ids, whole.layers)
    encoder, seen = streamed(small_model, role), []
    for layer in encoder.model.layers:
        layer.register_forward_hook(lambda *_: seen.append(in_memory(encoder)))
    got = encoder.run(own, *ids)
    depth = len(encoder.model.layers)
    assert seen == [[i] for i in range(depth) for _ in own]  # each layer runs on all texts before the next one is read
    assert in_memory(encoder) == []
    staying = streamed(small_model, role, resident=True)
    for again in (got, staying.run(own, *ids), staying.run(own, *ids)):
        for a, b in zip(again, wanted, strict=True):
            for one, other in zip(*((a, b) if role == "clip_g" else ([a], [b])), strict=True):
                # a matrix times one row, as the projection is, may depend on where in memory the matrix lies
                assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
    assert in_memory(staying) == list(range(depth))
    assert (encoder.opened, staying.opened) == (1, 1)


@torch.no_grad()
@pytest.mark.parametrize("resident", [True, False])
def test_a_run_that_fails_leaves_no_layer_behind(small_model, resident):
    encoder = streamed(small_model, "t5xxl", resident)
    hook = encoder.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder.run(texts(T5_SMALL.width))
    assert in_memory(encoder) == []
    hook.remove()
    wanted = streamed(small_model, "t5xxl").run(texts(T5_SMALL.width))
    assert all(map(torch.equal, encoder.run(texts(T5_SMALL.width)), wanted))


class Heard(Reporter):
    """Remembers what is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done: dict[str, list[int]] = {}

    def note(self, text: str) -> None:
        self.lines.append(text)

    @contextlib.contextmanager
    def progress(self, total: int, what: str, unit: str = "step"):
        self.done[what] = [0, total]

        def update(done: int) -> None:
            self.done[what][0] += done

        yield update


def text_encoders(small_model, **options) -> TextEncoders:
    setup = Setup(model=str(small_model), **{n: options.pop(n) for n in ("no_t5", "t5xxl") if n in options})
    places = {"device": CPU, "dtype": torch.float32, "runs_on": CPU, "threads": 1, "files": Unchanged()}
    fit = options.pop("fit", Fit(128, 160))
    return TextEncoders(setup, WeightFile(small_model), [small_model.parent], fit, **places, **options)


def test_encoding_prints_nothing_and_tells_its_reporter(small_model, small_engine, capsys):
    heard = Heard()
    text = text_encoders(small_model, tell=heard)
    long = "a `red` circle and " * 20
    got = text.get_cond(long)
    assert all(map(torch.equal, got, small_engine.get_cond(long)))
    assert [line.split("is cut: ")[1][:4] for line in heard.lines] == ["CLIP"]
    assert heard.done == {"encoding clip_l": [2, 2], "encoding clip_g": [2, 2], "encoding t5xxl": [3, 3]}
    assert all(seconds > 0 for seconds in text.stages.values())
    text_encoders(small_model).get_cond(long)  # by default nothing is told
    assert capsys.readouterr() == ("", "")
    text_encoders(small_model, no_t5=True, t5xxl="x.safetensors", tell=heard)
    assert heard.lines[-1] == "note: `t5xxl` is not used: `no_t5`"


@pytest.mark.parametrize(("fit", "why"), [(Fit(129, 160), "have widths"), (Fit(128, 161), "has width 160")])
def test_encoders_of_other_widths_are_refused_when_they_are_opened(small_model, fit, why):
    with pytest.raises(Mistake, match=why):
        text_encoders(small_model, fit=fit)


def test_a_terminal_says_a_note_once_and_spells_its_fields(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    terminal = Terminal("--{}".format)
    for _ in range(2):
        terminal.note("note: `no_t5` and a ``quoted`` word")
        terminal.say("a line")
    assert shown.getvalue() == "note: --no_t5 and a `quoted` word\na line\na line\n"
    terminal.quiet = True
    terminal.say("another")
    with terminal.progress(3, "work") as update:
        update(3)
    assert shown.getvalue().endswith("a line\n")
