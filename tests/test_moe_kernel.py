"MXFP4 and mixture-of-experts kernels, interpreted on shapes that their notebooks do not use"
import os
from functools import partial
import pytest
import torch

triton = pytest.importorskip("triton")
from simplellm import mxfp4, moe as plain
from simplellm.kernels import moe as ours
from simplellm.kernels.mxfp4 import dequantize_mxfp4, prepare, quantize_mxfp4
from simplellm.norm import rms_norm

device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
STEP = {torch.float32: 2e-5, torch.float16: 2**-7} # float16 stands for bfloat16, whose products the interpreter gets wrong
FUSED_TYPES = [t for t in STEP if device == "cpu" or t != torch.float32] # on a GPU the fused products leave float32 to others
clamped = partial(plain.clamped_swiglu, alpha=1.3, limit=2.5)

def noise(g, *shape, dtype=torch.float32): return torch.randn(shape, generator=g).to(device, dtype)

@pytest.mark.parametrize("shape", [(1, 32), (3, 5, 64), (130, 96)], ids=str)
def test_mxfp4_bit_by_bit(shape):
    g = torch.Generator().manual_seed(1)
    w = noise(g, *shape) * 2.0 ** torch.randint(-140, 20, shape[:-1] + (1,), generator=g).to(device)
    w[0] = 0
    got, want = quantize_mxfp4(w), mxfp4.quantize_mxfp4(w)
    assert got.blocks.equal(want.blocks) and got.scales.equal(want.scales)
    assert dequantize_mxfp4(*got).view(torch.int32).equal(mxfp4.dequantize_mxfp4(*want).view(torch.int32))

def test_a_scale_that_the_kernels_cannot_express_is_refused_by_name():
    w = mxfp4.MXFP4(torch.zeros(1, 16, 2, 16, dtype=torch.uint8), torch.full((1, 16, 2), 129, dtype=torch.uint8))
    with pytest.raises(ValueError, match="layers.7.gate_up_proj: scale byte 129"): prepare(w, "layers.7.gate_up_proj")

def experts(g, H, I, E, packed, dtype, bias=True):
    "Weights for the reference, and the same for the kernels"
    w = [noise(g, E, 2 * I, H) / H**0.5, noise(g, E, H, I) / I**0.5]
    b = [noise(g, E, 2 * I, dtype=dtype), noise(g, E, H, dtype=dtype)] if bias else [None, None]
    theirs = [mxfp4.quantize_mxfp4(v) for v in w] if packed else [v.to(dtype) for v in w]
    return [[w[0], b[0], w[1], b[1]] for w in (theirs, [prepare(v) for v in theirs] if packed else theirs)]

CASES = [ # T, H, I, E, k, packed, activation, dtype, bias
    (1, 32, 32, 2, 1, True, clamped, torch.float32, True), (2, 224, 96, 4, 3, True, clamped, torch.float16, False),
    (9, 64, 160, 3, 2, True, clamped, torch.float16, True), (1, 96, 16, 5, 5, False, plain.swiglu, torch.float32, False),
    (4, 40, 24, 6, 2, False, clamped, torch.float16, True), (33, 32, 32, 7, 2, True, plain.swiglu, torch.float16, True),
    (65, 64, 32, 1, 1, False, clamped, torch.float32, True), (22, 96, 64, 2, 3, True, clamped, torch.float32, False)]

@pytest.mark.parametrize("T,H,I,E,k,packed,activation,dtype,bias", [c for c in CASES if c[4] <= c[3]],
                         ids=lambda v: "swiglu" if v is plain.swiglu else "clamped" if v is clamped else str(v)) # addresses differ between processes
def test_moe(T, H, I, E, k, packed, activation, dtype, bias):
    g = torch.Generator().manual_seed(T)
    theirs, mine = experts(g, H, I, E, packed, dtype, bias)
    x, logits = noise(g, T, 2 * H, dtype=dtype)[:, H:], noise(g, T, E)
    weights, ids = ours.route(logits, k)
    torch.testing.assert_close((weights, ids), plain.route(logits, k), atol=1e-6, rtol=1e-6)
    got, want = ours.moe(x, weights, ids, *mine, activation), plain.moe(x, weights, ids, *theirs, activation)
    torch.testing.assert_close(got, want, atol=STEP[dtype], rtol=STEP[dtype])

@pytest.mark.parametrize("T", [6, 50])
def test_everybody_wants_one_expert(T):
    g = torch.Generator().manual_seed(T)
    theirs, mine = experts(g, 64, 32, 4, True, torch.float32)
    x, weights = noise(g, T, 64), torch.rand(T, 2, generator=g).to(device)
    ids = torch.tensor([[3, 1]], device=device).expand(T, 2)
    torch.testing.assert_close(ours.moe(x, weights, ids, *mine, clamped), plain.moe(x, weights, ids, *theirs, clamped), atol=2e-5, rtol=2e-5)

@pytest.mark.parametrize("T", [3, 40])
def test_only_padding(T):
    g = torch.Generator().manual_seed(T)
    _, mine = experts(g, 32, 32, 3, False, torch.float32)
    weights, ids = ours.route(noise(g, T, 3), 2, active=torch.tensor(0, device=device))
    assert (ids == -1).all() and not weights.any()
    assert not ours.moe(noise(g, T, 32) * torch.nan, weights, ids, *mine, clamped).any()

@pytest.mark.parametrize("T,E,k,active", [(33, 5, 2, None), (70, 128, 1, 68), (17, 9, 4, 0), (40, 16, 7, 40), (26, 40, 5, 1),
                                          (300, 4, 3, 299), (515, 33, 4, None), (1025, 2, 2, 1000), (400, 513, 6, 7)]) # up to several chunks
def test_routing_lists_assignments_by_expert(T, E, k, active):
    g = torch.Generator().manual_seed(T)
    logits = noise(g, T, E)
    weights, ids = ours.route(logits, k, active=None if active is None else torch.tensor(active, dtype=torch.int32, device=device))
    order, offsets = ids.groups
    flat = ids.flatten()[:k * (T if active is None else active)]
    assert (ids.flatten()[len(flat):] == -1).all() and not ours.counters(ids.device).any()
    assert order[:len(flat)].equal(flat.argsort(stable=True).int())
    assert offsets.tolist() == [0, *flat.bincount(minlength=E).cumsum(0).tolist()]
    assert (weights == 0).sum() == T * k - len(flat)
    other = ours.group(ids, E) # what ids from elsewhere get
    assert other[0][:len(flat)].equal(order[:len(flat)]) and other[1].equal(offsets)

def test_few_assignments_are_not_listed():
    assert not hasattr(ours.route(noise(torch.Generator(), 32, 3), 2)[1], "groups")

def test_logits_that_are_no_numbers_still_name_experts():
    logits = noise(torch.Generator(), 40, 5)
    logits[3], logits[7, 2], logits[9] = torch.nan, torch.nan, -torch.inf
    _, ids = ours.route(logits, 3)
    assert ((0 <= ids) & (ids < 5)).all() and ids.groups[1][-1] == 120

def test_many_experts_whose_weights_pass_2_to_the_31_elements():
    E, H, I = 2**20 + 3, 32, 32
    gate_up, down = (torch.empty(E, *shape, dtype=torch.float16, device=device) for shape in ((2 * I, H), (H, I))) # pages nobody touches take no memory on a CPU
    assert gate_up.numel() > 2**31
    g, last = torch.Generator().manual_seed(0), torch.tensor([[E - 1, E - 2]], device=device)
    for w in gate_up, down: w[-2:] = noise(g, *w[-2:].shape, dtype=torch.float16) / 32**0.5
    x, weights = noise(g, 1, H, dtype=torch.float16), torch.tensor([[0.5, 0.25]], device=device)
    got = ours.moe(x, weights, last, gate_up, None, down, None, clamped)
    want = plain.moe(x, weights, last - E + 2, gate_up[-2:], None, down[-2:], None, clamped)
    torch.testing.assert_close(got, want, atol=2**-7, rtol=2**-7)

def test_weights_that_do_not_sum_to_one():
    logits = noise(torch.Generator().manual_seed(2), 5, 13)
    torch.testing.assert_close(ours.route(logits, 4, normalize=False), plain.route(logits, 4, normalize=False), atol=1e-6, rtol=1e-6)

def test_no_tokens():
    g = torch.Generator().manual_seed(0)
    _, mine = experts(g, 32, 32, 3, False, torch.float32)
    assert ours.moe(noise(g, 0, 32), *ours.route(noise(g, 0, 3), 2), *mine, clamped).shape == (0, 32)

@pytest.mark.parametrize("dtype", FUSED_TYPES, ids=str)
@pytest.mark.parametrize("T,H,E,k,gain,bias,normalize,active", [(1, 300, 20, 3, True, True, True, None), (5, 64, 128, 4, True, False, False, 3), (16, 544, 4, 2, False, True, True, 16)])
def test_norm_router_routing_and_the_sum_after(T, H, E, k, gain, bias, normalize, active, dtype):
    g = torch.Generator().manual_seed(T)
    x, w, router, b = noise(g, T, H, dtype=dtype), noise(g, H, dtype=dtype) if gain else None, noise(g, E, H, dtype=dtype) / H**0.5, noise(g, E, dtype=dtype) if bias else None
    x.squares = torch.stack([part.float().square().sum(1) for part in x.split(32, 1)], 1)
    some = None if active is None else torch.tensor(active, device=device)
    h, weights, ids = ours.norm_route(x, w, 1e-5, router, b, k, normalize=normalize, active=some)
    torch.testing.assert_close(h, rms_norm(x, w, 1e-5), atol=STEP[dtype], rtol=STEP[dtype])
    want, best = plain.route(torch.nn.functional.linear(h, router, b), k, normalize)
    n = T if active is None else active
    torch.testing.assert_close((weights[:n], ids[:n]), (want[:n], best[:n]), atol=4 * STEP[dtype], rtol=STEP[dtype])
    assert (ids[n:] == -1).all() and not weights[n:].any() and not ours.counters(h.device).any()

@pytest.mark.parametrize("T,k,padding", [(1, 3, 0), (5, 2, 2), (16, 4, 0)])
def test_experts_add_to_the_stream(T, k, padding):
    g = torch.Generator().manual_seed(T)
    _, mine = experts(g, 96, 32, 4, True, torch.float32)
    h, x, (weights, ids) = noise(g, T, 96), noise(g, T, 96), ours.route(noise(g, T, 4), k, active=torch.tensor(T - padding, device=device))
    got, apart = ours.moe_add(h, weights, ids, *mine, clamped, x), ours.moe(h, weights, ids, *mine, clamped)
    assert got.equal(x + apart) and got[T - padding:].equal(x[T - padding:]) and not ours.counters(h.device).any()
    torch.testing.assert_close(got.squares.sum(1), got.square().sum(1), rtol=1e-5, atol=1e-6)

def test_what_is_not_fused_says_so():
    x = noise(torch.Generator(), 17, 64)
    assert ours.norm_route(x[:3], None, 1e-5, x, None, 2) is None # nobody has left its squares
    x.squares = x.square()
    assert ours.norm_route(x, None, 1e-5, x, None, 2) is None and ours.moe_add(x, *ours.route(x, 2), None, None, None, None, clamped, x) is None
