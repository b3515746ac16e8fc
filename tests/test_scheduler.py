"""Random traces of arrivals, lengths, shared prefixes, cancels, pool sizes and budgets through the scheduler.

A strict toy model stands in for the transformer: what it writes into the slot of a token depends on every token before,
as keys and values do, and its next token is read from the last slot through the block table. A wrong table, a block
shared by mistake or a token left out would change everything that follows."""
from dataclasses import replace
from itertools import count
from hypothesis import given, settings, strategies as st
import pytest
from simplellm.blocks import BlockPool, blocks_for, check_pool
from simplellm.config import EngineConfig
from simplellm.sampling import SamplingParams
from simplellm.scheduler import Request, Scheduler

VOCAB, EOS, MAX_LEN = 30, (0, 1), 60

class Clash(int):
    "A token whose hash says nothing: the prefix cache has to compare"
    def __hash__(self): return 1

def mix(state, token): return (state * 6364136223846793005 + int(token) * 1442695040888963407 + 12345) % 2**61

def truth(prompt, params, cap=MAX_LEN):
    "The whole answer of the toy when nobody disturbs it, and why it ends"
    tokens, state = list(prompt), 0
    for t in tokens: state = mix(state, t)
    limit = min(cap, len(prompt) + (params.max_tokens or cap))
    while True:
        token = (state >> 20) % VOCAB
        tokens.append(token)
        stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else set(EOS))
        if token in map(int, stops) and len(tokens) - len(prompt) >= params.min_tokens: return tokens, "stop"
        if len(tokens) >= limit: return tokens, "length"
        state = mix(state, token)

class Toy:
    "Writes and reads a simulated paged cache, and watches that it is used as it should be"
    def __init__(self, pool, kind=int): self.pool, self.kind, self.cache, self.frontier = pool, kind, {}, {}
    def slot(self, r, i): return r.block_table[i // self.pool.block_size], i % self.pool.block_size

    def run(self, step):
        written = set()
        for r, n in zip(step.requests, step.num_new):
            start, (done, times) = r.num_computed, self.frontier.get(r, (0, None))
            assert n > 0 and start + n <= r.num_tokens
            assert len(r.block_table) == blocks_for(r.num_tokens, self.pool.block_size)
            if times == r.num_preempted: assert start == done # nothing is left out, nothing computed twice
            else: assert start % self.pool.block_size == 0 # it begins, or again, behind whole cached blocks
            for i in range(start, start + n):
                slot = self.slot(r, i)
                assert slot not in written and self.pool.refs[slot[0]] == 1
                written.add(slot)
                self.cache[slot] = mix(self.cache[self.slot(r, i - 1)] if i else 0, r.tokens[i])
            self.frontier[r] = start + n, r.num_preempted
        return [self.kind((self.cache[self.slot(r, r.num_tokens - 1)] >> 20) % VOCAB) for r in step.sampling]

@st.composite
def wishes(draw):
    "One request: when it comes, what it shares, how long it is, when it is cancelled; few different tokens"
    return dict(when=draw(st.integers(0, 30)), shared=draw(st.integers(0, 2)), shared_len=draw(st.integers(0, 20)),
                own=draw(st.lists(st.integers(2, 4), max_size=25)), n=draw(st.sampled_from([1, 1, 1, 2, 3])),
                cancel=draw(st.none() | st.integers(0, 25)), during=draw(st.booleans()),
                max_tokens=draw(st.none() | st.integers(1, 30)), min_tokens=draw(st.sampled_from([0, 0, 1])),
                ignore_eos=draw(st.booleans()), stop_token_ids=draw(st.sampled_from([None, [5], [5, 6]])),
                prompt_logprobs=draw(st.sampled_from([None, None, 1])))

traces = st.fixed_dictionaries(dict(
    block_size=st.sampled_from([1, 2, 4, 16, MAX_LEN]), num_blocks=st.integers(1, 40), caching=st.booleans(),
    budget=st.sampled_from([1, 3, 7, 16, 500]), max_seqs=st.sampled_from([1, 2, 5, 100]),
    static=st.booleans(), clash=st.booleans(), requests=st.lists(wishes(), min_size=1, max_size=10)))

def make_requests(w, i, kind):
    "The requests of one wish: `n` of them, the later ones children of the first"
    names = "max_tokens", "min_tokens", "ignore_eos", "stop_token_ids", "prompt_logprobs"
    params, eos = SamplingParams(**{name: w[name] for name in names}), tuple(map(kind, EOS))
    if params.stop_token_ids: params = replace(params, stop_token_ids=[kind(t) for t in params.stop_token_ids])
    prompt = [kind(t) for t in [2 + w["shared"]] * w["shared_len"] + w["own"]]
    first = Request(f"{i}", list(prompt), params, eos_ids=eos)
    return [first] + [Request(f"{i}.{k}", list(prompt), params, eos_ids=eos, parent=first) for k in range(1, w["n"])]

def submit(scheduler, w, i, kind, pool):
    "Add the requests of one wish; what is refused must really be too big"
    group = make_requests(w, i, kind)
    r = group[0]
    most = min(MAX_LEN, r.num_prompt + (w["max_tokens"] or MAX_LEN))
    if 0 < r.num_prompt < MAX_LEN and blocks_for(most - 1, pool.block_size) <= pool.num_blocks:
        for r in group: scheduler.add(r)
        return group
    with pytest.raises(ValueError): scheduler.add(r)
    return []

def check_queues(scheduler, step, config, alive):
    "Order, budget and progress"
    line = [r.arrival for r in [*scheduler.running, *scheduler.waiting]]
    assert line == sorted(line) and {r.arrival for r in alive} == set(line)
    assert 0 < sum(step.num_new) <= config.max_num_batched_tokens and len(scheduler.running) <= config.max_num_seqs
    assert step.requests[0] is min(alive, key=lambda r: r.arrival) # the oldest moves on in every step: nobody starves
    short = [n for r, n in zip(step.requests, step.num_new) if r not in step.sampling]
    assert len(short) <= 1 # only the last of the budget is a part
    assert [r for r in step.requests if r in step.sampling] == list(step.sampling)

def play(trace):
    "Run one trace to its end with every invariant checked at every step; returns the requests"
    kind = Clash if trace["clash"] else int
    pool = BlockPool(trace["num_blocks"], trace["block_size"], trace["caching"])
    if trace["clash"]: pool.index.ids = map(Clash, count(1))
    config = EngineConfig(max_num_batched_tokens=trace["budget"], max_num_seqs=trace["max_seqs"],
                          scheduling="static" if trace["static"] else "continuous")
    scheduler, toy = Scheduler(config, pool, MAX_LEN), Toy(pool, kind)
    pending = sorted(enumerate(trace["requests"]), key=lambda p: p[1]["when"])
    everyone, began, cancels, now = [], [], {}, 0
    while True:
        while pending and pending[0][1]["when"] <= now:
            i, w = pending.pop(0)
            group = submit(scheduler, w, i, kind, pool)
            if w["cancel"] is not None and group: cancels[group[0]] = now + w["cancel"], w["during"]
            everyone += group
        leaving = [r for r, (when, _) in cancels.items() if when == now and r.status != "finished"]
        for r in leaving:
            if not cancels[r][1]: scheduler.cancel(r)
        step = scheduler.schedule()
        alive = [r for r in everyone if r.status != "finished"]
        assert bool(step) == bool(alive)
        if step:
            check_queues(scheduler, step, config, alive)
            check_pool(pool, [r.block_table for r in scheduler.running])
            began += [r for r in step.requests if r not in began]
            ids = toy.run(step)
            for r in leaving: scheduler.cancel(r)
            ended = scheduler.update(step, ids)
            assert all(r.status == "finished" and r.finish_reason in ("stop", "length") for r in ended)
            check_pool(pool, [r.block_table for r in scheduler.running])
        elif not pending: break
        now += 1
    assert pool.num_free == pool.num_blocks and not scheduler.running and not scheduler.waiting
    assert [r.arrival for r in began] == sorted(r.arrival for r in began) # first come, first served
    for r in everyone:
        expected, why = truth(r.tokens[:r.num_prompt], r.params)
        assert r.status == "finished" and r.finish_reason in (why, "abort")
        assert r.tokens == (expected if r.finish_reason == why else expected[:r.num_tokens])
    return everyone

@settings(max_examples=400, deadline=None)
@given(traces)
def test_random_traces(trace): play(trace)

@settings(max_examples=100, deadline=None)
@given(traces, st.integers(1, 20))
def test_starved_cache(trace, spare):
    "As little memory as the biggest request can live with, so that preemption is the rule"
    size = trace["block_size"]
    play({**trace, "num_blocks": blocks_for(MAX_LEN, size) + spare // size})

def test_traces_do_what_they_are_for():
    "The fixed trace has preemptions, prefix hits and children; otherwise the properties above would be cheap"
    w = dict(when=0, shared=0, shared_len=12, own=[3], n=1, cancel=None, during=False, max_tokens=20, min_tokens=0,
             ignore_eos=True, stop_token_ids=None, prompt_logprobs=None)
    trace = dict(block_size=4, num_blocks=20, caching=True, budget=32, max_seqs=100, static=False, clash=False,
                 requests=[{**w, "own": [3 + i], "when": i, "n": 1 + i % 2} for i in range(8)])
    done = play(trace)
    assert sum(r.num_preempted for r in done) > 2 and sum(r.num_cached for r in done) > 30
    alone = {r.id: r.tokens for r in play({**trace, "num_blocks": 1000, "max_seqs": 1})}
    assert {r.id: r.tokens for r in done} == alone

def test_ended_requests():
    "finish and cancel may come at any time and more than once"
    pool = BlockPool(10, 4)
    scheduler, toy = Scheduler(EngineConfig(), pool, 30), Toy(pool)
    a, b, c = (Request(name, [2, 3, 4], SamplingParams(max_tokens=9, ignore_eos=True)) for name in "abc")
    scheduler.cancel(c) # never added
    for r in (a, b): scheduler.add(r)
    step = scheduler.schedule()
    ids = toy.run(step)
    scheduler.finish(a, "stop", "###")
    scheduler.cancel(a)
    assert scheduler.update(step, ids) == [] and (a.finish_reason, a.stop_reason, a.num_output) == ("stop", "###", 0)
    assert b.num_output == 1 and c.finish_reason == "abort"
    scheduler.cancel(b)
    assert scheduler.schedule() is None and pool.num_free == 10

def test_same_step_again():
    "While everybody writes and nobody comes or goes, the step is the same object"
    pool = BlockPool(100, 16)
    scheduler = Scheduler(EngineConfig(max_num_seqs=2), pool, 200)
    for name in "ab": scheduler.add(Request(name, [2] * 20, SamplingParams(max_tokens=100)))
    def step(): s = scheduler.schedule(); scheduler.update(s, [5] * len(s.sampling)); return s
    first, second = step(), step()
    assert first.num_new == [20, 20] and second.num_new == [1, 1] and second.sampling is second.requests
    assert all(step() is second for _ in range(40))
    scheduler.add(Request("c", [2], SamplingParams())) # has to wait: two may run
    assert step() is second
    scheduler.cancel(second.requests[0])
    assert [r.id for r in step().requests] == ["b", "c"]

def test_prompt_logprobs_computes_all():
    pool = BlockPool(100, 4)
    scheduler, toy = Scheduler(EngineConfig(), pool, 100), Toy(pool)
    for k in (None, None, 2):
        r = Request("r", list(range(2, 22)), SamplingParams(max_tokens=2, prompt_logprobs=k, ignore_eos=True))
        scheduler.add(r)
        hits = []
        while step := scheduler.schedule():
            hits.append(step.num_new[0])
            scheduler.update(step, toy.run(step))
        last = r.num_cached, hits[0]
    assert last == (0, 20)

@pytest.mark.parametrize("prompt, most, words", [(0, 5, "empty"), (50, 5, "50 tokens"),
                                                 (20, 29, "12 blocks of 4, the cache has 10")])
def test_refused_with_the_numbers(prompt, most, words):
    scheduler = Scheduler(EngineConfig(), BlockPool(10, 4), 50)
    too_big = Request("x", [2] * prompt, SamplingParams(max_tokens=most))
    with pytest.raises(ValueError, match=words): scheduler.add(too_big)
    assert scheduler.schedule() is None
    scheduler.add(Request("y", [2] * 20, SamplingParams(max_tokens=21))) # 40 computed tokens just fit
    assert scheduler.schedule().num_new == [20]
