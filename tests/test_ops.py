"Who is told what: early starts, and the same bits in any batch"
import os
import pytest
import torch
from simplellm.moe import swiglu
from simplellm.ops import choose_ops, describe_ops, triton_ops

triton = pytest.importorskip("triton")
device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
KERNELS = "rms_norm", "rope_store", "attention", "linear", "route", "moe", "sample" # of a decode step

def told(ops, name): return getattr(getattr(ops, name), "keywords", {})

@pytest.mark.parametrize("capability, early", [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_kernels_start_early_where_the_gpu_can(monkeypatch, capability, early):
    assert choose_ops("cuda", torch.bfloat16, pdl=True).options == dict(pdl=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    ops = choose_ops("cuda", torch.float32) # of which flash-attn has none
    assert ops.options == (dict(pdl=True) if early else {}) and all(told(ops, n) == ops.options for n in KERNELS)
    assert {where for name, where, _ in describe_ops(ops) if name == "moe"} == {"simplellm.kernels.moe.moe"}
    off = choose_ops("cuda", torch.float32, pdl=False)
    assert off.options == {} and all(getattr(off, n) == f for n, f in triton_ops().items())
    assert choose_ops("cpu", torch.float32).options == {}

def test_the_same_bits_are_asked_of_everybody_who_could_give_others():
    ops = choose_ops("cuda", torch.bfloat16, batch_invariant=True, pdl=False)
    assert told(ops, "attention") == told(ops, "moe") == dict(batch_invariant=True) and told(ops, "linear") == dict(few=2**31)
    assert ops.attention.__module__ == "simplellm.kernels.attention" # not flash-attn, which promises nothing
    assert not ops.fused and choose_ops("cuda", torch.bfloat16, pdl=True).fused["norm_route"].keywords == dict(pdl=True) # whose squares are summed in another order
    with pytest.raises(ValueError, match="batch_invariant=True: kernels need a GPU"): choose_ops("cpu", torch.float32, True)

def test_alone_and_together_are_the_same_bits():
    linear, g = triton_ops(batch_invariant=True, few=2**31)["linear"], torch.Generator().manual_seed(0)
    x, w = torch.randn(70, 300, generator=g).to(device, torch.float16), torch.randn(40, 300, generator=g).to(device, torch.float16)
    whole = linear(x, w)
    for T in 1, 9, 33: assert linear(x[:T], w).equal(whole[:T])

def test_experts_keep_to_one_instruction(monkeypatch):
    "Tiles of 64 and 128 tokens are multiplied by groups of four warps, smaller ones by single warps, which may round otherwise"
    import simplellm.kernels.moe as m
    seen, sizes = [], m.tile_sizes
    def watched(A, *rest):
        seen.append(sizes(A, *rest))
        return sizes(A, *rest)
    monkeypatch.setattr(m, "tile_sizes", watched)
    new = lambda *shape: torch.zeros(shape, dtype=torch.float16, device=device)
    for invariant in False, True:
        moe = triton_ops(batch_invariant=invariant)["moe"]
        moe(new(70, 32), new(70, 1).float(), torch.zeros(70, 1, dtype=torch.int64, device=device), new(1, 64, 32), None, new(1, 32, 32), None, swiglu)
    assert [s["num_warps"] >= 4 for s in seen] == [True, True, False, False]

def test_an_engine_passes_the_wish_on():
    from simplellm import LLM
    with pytest.raises(ValueError, match="batch_invariant=True: kernels need a GPU"): LLM(device="cpu", batch_invariant=True)
    with pytest.raises(ValueError, match="batch_invariant"): LLM(device="cpu", batch_invariant="yes")
