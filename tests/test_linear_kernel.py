"The product of few tokens, interpreted on shapes that its notebook does not use"
import os
import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")
from simplellm.kernels.linear import FEW, FUSED, count_splits, counters, linear, linear_add, norm_linear, tile_sizes
from simplellm.norm import rms_norm

device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
STEP = {torch.float32: 3e-6, torch.float16: 2**-9} # float16 stands for bfloat16, whose products the interpreter gets wrong
FUSED_TYPES = [t for t in STEP if device == "cpu" or t != torch.float32] # on a GPU the fused products leave float32 to others

def noise(g, *shape, dtype=torch.float32): return torch.randn(shape, generator=g).to(device, dtype)

SHAPES = [(1, 1, 1), (1, 16, 256), (1, 15, 257), (2, 40, 96), (3, 7, 1030), (8, 128, 640), (9, 130, 64), (16, 5, 513), (17, 64, 48), (31, 2, 2000), (33, 65, 100), (70, 20, 600), (0, 4, 4)]

@pytest.mark.parametrize("dtype", STEP, ids=str)
@pytest.mark.parametrize("T,N,K", SHAPES)
def test_linear(T, N, K, dtype):
    g = torch.Generator().manual_seed(N)
    x, w, b = noise(g, T, 3 * K, dtype=dtype)[:, K:2 * K], noise(g, N, K, dtype=dtype) / K**0.5, noise(g, N, dtype=dtype)
    for bias in None, b:
        torch.testing.assert_close(linear(x, w, bias, few=2**31), F.linear(x, w, bias), atol=STEP[dtype], rtol=STEP[dtype])
    assert not counters(x.device).any()

def test_bfloat16_and_more_dimensions():
    g = torch.Generator().manual_seed(0)
    x, w = noise(g, 2, 3, 64, dtype=torch.bfloat16), noise(g, 12, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(linear(x, w), F.linear(x, w), atol=0.25, rtol=2**-6)  # the interpreter cuts where a GPU rounds

def test_many_tokens_are_left_to_pytorch():
    g = torch.Generator().manual_seed(0)
    x, w = noise(g, FEW + 1, 64), noise(g, 12, 64)
    assert linear(x, w).equal(F.linear(x, w))

@pytest.mark.parametrize("N,K", [(1, 1), (128, 2880), (16, 256 * 40), (2880, 4096), (5120, 2880), (300, 513)])
def test_splits_cover_every_column_once(N, K):
    splits, per = count_splits(N, K)
    assert splits * per * 256 >= K > (splits - 1) * per * 256 and splits >= 1

def test_programs_that_share_a_tile_finish_it_once():
    g = torch.Generator().manual_seed(0)
    x, w = noise(g, 40, 2000), noise(g, 10, 2000)
    assert count_splits(10, 2000)[0] > 1 < triton.cdiv(40, tile_sizes(40, 10)["BT"])
    for _ in range(3): torch.testing.assert_close(linear(x, w, few=64), x @ w.T, atol=3e-4, rtol=1e-5)

@pytest.mark.parametrize("change,name", [(dict(x=torch.zeros(2, 5)), "weight"), (dict(weight=torch.zeros(3, 4).half()), "weight"), (dict(bias=torch.zeros(4)), "bias")])
def test_what_does_not_fit_is_named(change, name):
    args = dict(x=torch.zeros(2, 4), weight=torch.zeros(3, 4), bias=None) | change
    with pytest.raises(ValueError, match=name): linear(**{k: v if v is None else v.to(device) for k, v in args.items()})

@pytest.mark.parametrize("dtype", FUSED_TYPES, ids=str)
@pytest.mark.parametrize("T,N,H,K,gain,bias", [(1, 17, 40, 300, True, True), (3, 5, 513, 33, False, True), (8, 33, 100, 64, True, False), (16, 20, 300, 48, True, True)])
def test_a_sum_after_and_a_norm_before(T, N, H, K, gain, bias, dtype):
    g = torch.Generator().manual_seed(T)
    h, x, w, b = noise(g, T, 2 * K, dtype=dtype)[:, K:], noise(g, T, H, dtype=dtype), noise(g, H, K, dtype=dtype) / K**0.5, noise(g, H, dtype=dtype) if bias else None
    before, got = x.clone(), linear_add(h, w, b, x)
    torch.testing.assert_close(got, x + F.linear(h, w, b), atol=STEP[dtype], rtol=STEP[dtype])
    torch.testing.assert_close(got.squares.sum(1), got.float().square().sum(1), rtol=1e-5, atol=1e-6)
    v, norm, b = noise(g, N, H, dtype=dtype) / H**0.5, noise(g, H, dtype=dtype) if gain else None, noise(g, N, dtype=dtype) if bias else None
    torch.testing.assert_close(norm_linear(got, norm, 1e-6, v, b), F.linear(rms_norm(got, norm, 1e-6), v, b), atol=4 * STEP[dtype], rtol=STEP[dtype])
    assert x.equal(before) and not counters(x.device).any()

def test_what_is_not_fused_says_so():
    g = torch.Generator().manual_seed(0)
    many, x, w = noise(g, FUSED + 1, 64), noise(g, 2, 64), noise(g, 64, 64)
    assert linear_add(many, w, None, many) is None and linear_add(x[:0], w, None, x[:0]) is None and linear_add(x, w.T, None, x) is None
    assert norm_linear(x, None, 1e-5, w, None) is None # nobody has left its squares
