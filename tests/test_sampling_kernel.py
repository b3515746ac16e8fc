"The sampling kernels against the reference: the same tokens for the same seeds"
import math, os
from types import SimpleNamespace
import pytest
import torch
from simplellm.sampling import SamplingParams, make_sampling, sample as reference

pytest.importorskip("triton")
device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda" # conftest.py interprets where there is no GPU

def row(seed, length=1, **params):
    "What the sampler sees of a request"
    return SimpleNamespace(tokens=[2] * length, num_prompt=1, num_output=length - 1, seed=seed, stop_ids=(0, 1), bad_words=(), params=SamplingParams(**params))

def logits_of(V, n, kind):
    "Logits of some kind"
    g = torch.Generator().manual_seed(V)
    x = torch.randn(n, V, generator=g) * 3
    if kind == "ties": x = x.round()
    if kind == "negative": x = -x.abs() - 50
    if kind == "banned": x[:, ::2] = -math.inf
    if kind == "zeros": x = torch.where(x.abs() < 3, torch.where(x > 0, 0.0, -0.0), x)
    return x.to(device)

WISHES = [dict(), dict(temperature=0), dict(top_k=2), dict(top_p=0.3), dict(top_k=6, top_p=0.9), dict(min_p=0.3, top_p=0.8), dict(top_k=8, top_p=0.6, temperature=3.0),
          dict(top_k=300, top_p=0.5, min_p=0.001), dict(top_k=1, top_p=1e-3), dict(temperature=1e-3), dict(top_k=2**32 + 1)]

@pytest.mark.parametrize("V,kind,tile", [(1, "plain", 16), (17, "ties", 16), (100, "banned", 32), (33, "negative", 32), (64, "zeros", 64), (130, "ties", 64)])
def test_the_same_tokens(V, kind, tile):
    from simplellm.kernels.sampling import sample
    logits = logits_of(V, len(WISHES), kind)
    sb = make_sampling([row(-5 * 2**40 - V + i, 1 + i, **w) for i, w in enumerate(WISHES)], device)
    assert sample(logits, sb, tile).tolist() == reference(logits, sb).tolist()

def test_greedy_and_strided_rows():
    from simplellm.kernels.sampling import sample
    logits = logits_of(200, 3, "ties")
    sb = make_sampling([row(i, temperature=0) for i in range(3)], device)
    assert sample(logits[:, 50:150], sb, 32).tolist() == [int((r == r.max()).nonzero()[0]) for r in logits[:, 50:150]]
    sb = make_sampling([row(7), row(8)], device)
    assert sample(logits[::2, :99], sb, 32).tolist() == reference(logits[::2, :99], sb).tolist()

def test_edits():
    from simplellm.kernels.sampling import sample
    logits = logits_of(40, 4, "plain")
    sb = make_sampling([row(1, 3, allowed_token_ids=[4, 9, 30], top_k=5, top_p=0.9), row(2, min_tokens=2), row(3, 5, presence_penalty=2.0), row(4, logit_bias={7: 100.0})], device)
    got = sample(logits, sb, 32).tolist()
    assert got == reference(logits, sb).tolist() and got[0] in (4, 9, 30) and got[3] == 7

def test_what_is_refused_and_no_rows():
    from simplellm.kernels.sampling import sample
    sb = make_sampling([row(1)], device)
    with pytest.raises(ValueError, match="^logits="): sample(logits_of(8, 8, "plain").T, sb)
    with pytest.raises(ValueError, match="^sb=1"): sample(logits_of(8, 2, "plain"), sb)
    assert sample(logits_of(8, 2, "plain")[:0], make_sampling([row(1, temperature=0)], device)).shape == (0,)

def test_infinite_logits_end():
    from simplellm.kernels.sampling import sample
    logits = logits_of(40, 2, "plain")
    logits[0, 5] = math.inf
    logits[1] = math.nan
    assert all(0 <= i < 40 for i in sample(logits, make_sampling([row(1, top_k=3, top_p=0.5)] * 2, device), 32).tolist())
