"""How linear layers hold their weights: packed for a CPU, or in 8 bits."""

from __future__ import annotations

import pytest
import torch
from helpers import mmdit_config, randomise, relative

from mmditx import MMDiT
from sd3.layers import StoredLinear, can_pack, quantise, replace_linears
from sd3.weights import on_meta

CONFIG = mmdit_config(depth=3, dual_layers=frozenset({0}), qk_norm=True)
PLAIN = randomise(MMDiT(CONFIG), 3).to(torch.bfloat16)
DRAW = torch.Generator().manual_seed(4)
INPUTS = (
    torch.randn(2, 16, 8, 6, generator=DRAW).bfloat16(),
    torch.tensor([700.0, 700.0]),
    torch.randn(2, CONFIG.pooled_width, generator=DRAW).bfloat16(),
    torch.randn(2, 11, CONFIG.context_width, generator=DRAW).bfloat16(),
)
packs = pytest.mark.skipif(not can_pack("cpu", torch.bfloat16), reason="this CPU has no bfloat16 products")


def stored_model(kind: str, source: MMDiT = PLAIN) -> MMDiT:
    """The model with its weights stored as `kind` says, loaded the way a file is."""
    model = on_meta(lambda: MMDiT(CONFIG))
    replace_linears(model.joint_blocks, kind)
    for name, tensor in source.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if hasattr(module, "store"):
            module.store(leaf, tensor)
        else:
            module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    return model.eval()


@torch.no_grad()
def run(model: MMDiT) -> torch.Tensor:
    return model(*(i if i.dtype == torch.float32 else i.to(model.pos_embed.dtype) for i in INPUTS))


@packs
def test_packed_weights_change_nothing_but_rounding():
    exact = run(randomise(MMDiT(CONFIG), 3))
    plain, packed = relative(run(PLAIN).float(), exact), relative(run(stored_model("packed")).float(), exact)
    assert packed < 1.2 * plain
    assert any(isinstance(m, StoredLinear) for m in stored_model("packed").modules())


@packs
def test_packed_weights_give_the_same_under_torch_compile():
    model = stored_model("packed")
    layer = model.joint_blocks[0].x_block.mlp
    x = torch.randn(2, 5, CONFIG.width).bfloat16()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.02), ("fp8", 0.06)])
def test_8_bit_weights_are_near(kind, error):
    exact = randomise(MMDiT(CONFIG), 3)
    got = relative(run(stored_model(kind, source=exact)), run(exact))
    assert 1e-4 < got < error
    stored = sum(b.nbytes for n, b in stored_model(kind).named_buffers() if n.endswith("stored"))
    blocks = sum(p.numel() for n, p in PLAIN.joint_blocks.named_parameters() if n.endswith("weight") and p.ndim == 2)
    assert blocks == stored  # a byte each


def test_float8_weights_of_a_file_are_kept():
    weight = torch.randn(6, 32).to(torch.float8_e4m3fn).to(torch.bfloat16)
    stored, scale = quantise(weight, "fp8")
    assert torch.equal(stored.to(torch.bfloat16) * scale, weight)


def test_a_row_of_zeros_stays_zero():
    for kind in ("int8", "fp8"):
        stored, scale = quantise(torch.zeros(2, 4), kind)
        assert torch.equal(stored.float() * scale, torch.zeros(2, 4))
