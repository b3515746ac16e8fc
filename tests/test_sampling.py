"""The sampler against a second implementation that shares no code with it: one row at a time, in Python numbers."""
import math
from types import SimpleNamespace
from hypothesis import given, reject, settings, strategies as st
import pytest
import torch
from simplellm.sampling import (SamplingParams, as_uniform, bad_word_ids, banned_ids, check_vocab, draw,
                                make_sampling, philox, sample, top_logprobs)

V = 24

def row(prompt=(1,), output=(), seed=0, stop_ids=(), bad_words=(), **params):
    "What the sampler sees of a request"
    if bad_words: params["bad_words"] = ["some"]
    return SimpleNamespace(tokens=[*prompt, *output], num_prompt=len(prompt), num_output=len(output), seed=seed,
                           stop_ids=frozenset(stop_ids), bad_words=bad_words, params=SamplingParams(**params))

def py_philox(counter, key):
    "Philox4x32-10 as its paper writes it"
    c, (k0, k1) = counter, key
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k0, b % 2**32, (a >> 32) ^ c[3] ^ k1, a % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c

def py_uniform(word): return min((word + 0.5) / 2**32, 1 - 2**-24)

def py_scramble(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)): x = (x ^ x >> shift) * factor % 2**32
    return x ^ x >> 16

def py_times(seed, position, n):
    "How long each of n tokens waits"
    a, b = py_philox([position, 0, 0, 0], [seed % 2**32, (seed >> 32) % 2**32])[:2]
    return [-math.log1p(-py_uniform(py_scramble(py_scramble((i + a) % 2**32) ^ b))) for i in range(n)]

def py_edit(logits, r):
    "Every wish about single tokens, in vLLM's order"
    p, x, output = r.params, list(logits), r.tokens[r.num_prompt:]
    if p.allowed_token_ids: x = [v if i in p.allowed_token_ids else -math.inf for i, v in enumerate(x)]
    for word in r.bad_words:
        before = len(output) - len(word) + 1
        if before >= 0 and output[before:] == list(word[:-1]): x[word[-1]] = -math.inf
    if len(output) < p.min_tokens:
        for i in r.stop_ids: x[i] = -math.inf
    for i, v in (p.logit_bias or {}).items(): x[i] += v
    for i in set(r.tokens): x[i] = x[i] / p.repetition_penalty if x[i] > 0 else x[i] * p.repetition_penalty
    for i in set(output): x[i] -= p.presence_penalty + p.frequency_penalty * output.count(i)
    return x

def py_weights(x, p):
    "The weights of the tokens that survive temperature and filters"
    best = max(x)
    w = [math.exp((v - best) / p.temperature) for v in x]
    order = sorted((i for i in range(len(w)) if w[i] > 0 and w[i] >= p.min_p * (1 - 1e-6)), key=lambda i: (-x[i], i))
    order = order[:p.top_k] if p.top_k > 0 else order
    total, mass, kept = sum(w[i] for i in order), 0.0, []
    for i in order:
        if p.top_p < 1 and mass >= p.top_p * total: break
        if p.top_p < 1 and abs(mass - p.top_p * total) < 1e-5 * total: reject() # rounding would decide
        mass += w[i]
        kept.append(i)
    return [v if i in kept else 0.0 for i, v in enumerate(w)]

def py_sample(logits, r):
    "The token, by hand"
    x = py_edit(logits, r)
    if r.params.greedy: return x.index(max(x))
    w = py_weights(x, r.params)
    arrivals = sorted((t / v, i) for i, (t, v) in enumerate(zip(py_times(r.seed, len(r.tokens), len(w)), w)) if v)
    if len(arrivals) > 1 and arrivals[1][0] - arrivals[0][0] < 1e-4 * arrivals[1][0]: reject()
    return arrivals[0][1]

ids = st.lists(st.integers(0, V - 1), min_size=1, max_size=6, unique=True)
wishes = st.fixed_dictionaries({}, optional=dict(
    temperature=st.sampled_from([0.0, 0.3, 0.8, 2.0]), top_k=st.integers(-1, V + 5),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.99]), min_p=st.sampled_from([0.03, 0.4, 1.0]),
    repetition_penalty=st.sampled_from([0.7, 1.3, 2.0]),
    presence_penalty=st.sampled_from([-1.0, 0.5, 2.0]), frequency_penalty=st.sampled_from([-0.5, 0.3]),
    min_tokens=st.integers(0, 4), allowed_token_ids=ids.filter(lambda x: len(x) > 4),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=3)))
rows = st.builds(lambda kw, **r: row(**r, **kw), wishes, seed=st.integers(-2**63, 2**63 - 1), prompt=ids,
                 output=ids | st.just([]), stop_ids=st.just((0, 1)),
                 bad_words=st.sampled_from([(), ((2,),), ((3, 4), (5, 6, 7))]))

def logits_of(seed, n=1): return torch.randn(n, V, generator=torch.Generator().manual_seed(seed)) * 3

@settings(max_examples=300, deadline=None)
@given(rows, st.integers(0, 10**6))
def test_against_the_dull_one(r, seed):
    logits = logits_of(seed)
    assert sample(logits, make_sampling([r])).tolist() == [py_sample(logits[0].tolist(), r)]

@settings(max_examples=60, deadline=None)
@given(st.lists(rows, min_size=2, max_size=12), st.integers(0, 10**6), st.randoms())
def test_neighbours_do_not_matter(batch, seed, rng):
    logits = logits_of(seed, len(batch))
    alone = [int(sample(logits[i:i + 1], make_sampling([r]))) for i, r in enumerate(batch)]
    order = list(range(len(batch)))
    rng.shuffle(order)
    assert sample(logits[order], make_sampling([batch[i] for i in order])).tolist() == [alone[i] for i in order]

@settings(max_examples=100, deadline=None)
@given(st.integers(-2**63, 2**63 - 1), st.integers(0, 2**31 - 1),
       st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_philox(seed, position, words):
    bits, expected = draw(torch.tensor([seed]), torch.tensor([position])), py_philox([position, 0, 0, 0], [seed % 2**32, (seed >> 32) % 2**32])
    assert [int(x) for x in bits] == expected[:2]
    assert float(as_uniform(bits[0])) == pytest.approx(py_uniform(expected[0]), rel=1e-6)
    assert [int(x) for x in philox(*[[torch.tensor(w) for w in part] for part in (words[:4], words[4:])])] == \
           py_philox(words[:4], words[4:])

def test_frequencies():
    "20,000 draws from a filtered distribution; with 3 degrees of freedom 16.3 is exceeded once in a thousand times"
    logits, N = logits_of(5), 20000
    r = row(temperature=1.5, top_k=8, top_p=0.93)
    w = py_weights(logits[0].tolist(), r.params)
    batch = [row(seed=s, temperature=1.5, top_k=8, top_p=0.93) for s in range(N)]
    drawn = sample(logits.repeat(N, 1), make_sampling(batch)).bincount(minlength=V)
    expected = torch.tensor(w) / sum(w) * N
    kept = expected > 0
    assert drawn[~kept].sum() == 0 and kept.sum() == 4
    assert ((drawn - expected)[kept]**2 / expected[kept]).sum() < 16.3

def test_fast_path_and_dtypes():
    "Greedy without wishes builds no tensors; low precision and ties are fine"
    batch = [row(temperature=0), row(temperature=1e-6)]
    sb = make_sampling(batch)
    assert sb.greedy and sb.plain and sb.knobs is None
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    assert sample(logits, sb).tolist() == [1, 0]
    assert sample(logits, make_sampling([row(top_k=1), row(top_k=1)])).tolist() == [1, 0]

def test_logprobs_are_of_the_raw_logits():
    logits = logits_of(3, 4)
    ids = torch.tensor([0, 5, int(logits[2].argmax()), 7])
    got_ids, got, rank = top_logprobs(logits, ids, 3)
    expected = logits.log_softmax(-1)
    assert torch.equal(got_ids[:, 0], ids) and torch.allclose(got, expected.gather(1, got_ids))
    assert rank.tolist() == [1 + sum(v > expected[i, t] for v in expected[i]) for i, t in enumerate(ids)]
    assert rank[2] == 1 and got_ids[2, 1] == ids[2]
    assert [top_logprobs(logits, ids, k)[0].shape[1] for k in (-1, 0, 99)] == [1 + V, 1, 1 + V]

def test_defaults_are_vllms():
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p, p.max_tokens, p.min_tokens) == (1, 1.0, 1.0, 0, 0.0, 16, 0)
    assert (p.repetition_penalty, p.presence_penalty, p.frequency_penalty, p.ignore_eos) == (1.0, 0.0, 0.0, False)
    assert p.skip_special_tokens and not p.include_stop_str_in_output and p.plain and not p.greedy

WRONG = dict(n=[0, 1.0, 10**9], temperature=[-0.1, math.inf, "1", None, 1e39, 10**400], top_p=[0, 1.01, 1e-46], top_k=[-2, 2.5, 2**63], min_p=[-0.1, 1.1],
             repetition_penalty=[0, 1e-40], presence_penalty=[2.1], frequency_penalty=[-2.1], seed=[2**63, 1.5],
             max_tokens=[0], min_tokens=[-1, 17], stop=["", ["a", ""], 5], stop_token_ids=[[-1], ["a"]],
             bad_words=[[""], "x"],
             logprobs=[-2, True], prompt_logprobs=[1.5], allowed_token_ids=[[], 3], ignore_eos=[1],
             logit_bias=[{1: 101}, {1: math.nan}, {-1: 1.0}, [1]], skip_special_tokens=[None],
             include_stop_str_in_output=["yes"])

@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG.items() for value in values])
def test_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}="): SamplingParams(**{name: value})

def test_refused_by_vocabulary():
    for wish in (dict(stop_token_ids=[V]), dict(allowed_token_ids=[V]), dict(logit_bias={V: 1.0})):
        with pytest.raises(ValueError, match=next(iter(wish))): check_vocab(SamplingParams(**wish), V)
    nothing_left = SamplingParams(allowed_token_ids=[3])
    with pytest.raises(ValueError, match="allowed_token_ids"): check_vocab(nothing_left, V, bad_words=((3,),))
    with pytest.raises(ValueError, match="allowed_token_ids"): check_vocab(nothing_left, V, bad_words=((3, 3),)) # at the second token
    check_vocab(SamplingParams(stop_token_ids=[V - 1], allowed_token_ids=[3, 4]), V, bad_words=((3,),))
    check_vocab(nothing_left, V, bad_words=((4, 3),)) # never comes to that

def test_bad_words_in_both_spellings():
    spellings = bad_word_ids(["no", " no", "yes"], lambda text: [ord(c) for c in text])
    assert spellings == tuple(tuple(map(ord, s)) for s in ("no", " no", "yes", " yes"))
    assert bad_word_ids(None, None) == ()
    r = row(prompt=[3], output=[4, 3], bad_words=((3, 9), (4, 3, 8), (5, 3, 7), (3, 4, 3, 6)))
    assert banned_ids(r) == [9, 8] # the last one would need the prompt
