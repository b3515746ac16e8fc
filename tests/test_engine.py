"The engine as a caller sees it: promises kept while requests share a model, are cancelled, break, or are dropped"
import asyncio, gc, random, subprocess, sys, threading, time
import pytest, torch
from simplellm.async_engine import LLM, EngineDead
from simplellm.blocks import BlockPool, check_pool
from simplellm.config import EngineConfig, ModelConfig, RopeConfig
from simplellm.cudagraph import move_on, new_blocks, padding_batch, padding_wishes, place
from simplellm.engine import Engine, make_job
from simplellm.runner import at_home
from simplellm.sampling import SamplingParams
from simplellm.scheduler import Request, Scheduler, Step
from simplellm.tokenizer import Added, HARMONY_SPECIAL, O200K_PATTERN, Tokenizer, Vocabulary
from simplellm.transformer import Transformer

HARMONY = list(HARMONY_SPECIAL)[:21]
TOKENIZER = Tokenizer(Vocabulary({bytes([b]): b for b in range(256)}, O200K_PATTERN, tuple(Added(t, 256 + i) for i, t in enumerate(HARMONY))))

def random_model(seed=0, **changes):
    "A gpt-oss with random weights, two layers of 32 numbers"
    c = ModelConfig(**dict(family="gpt_oss", vocab_size=277, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
                           intermediate_size=32, max_position=1024, rope=RopeConfig(theta=150000.), windows=(8, None), num_experts=4, top_k=2,
                           sinks=True, qkv_bias=True, o_bias=True, experts="dense") | changes)
    H, D, I, E, g = c.hidden_size, c.head_dim, c.intermediate_size, c.num_experts, torch.Generator().manual_seed(seed)
    qkv, o = (c.num_heads + 2 * c.num_kv_heads) * D, c.num_heads * D
    layer = {"attn_norm": (H,), "qkv_proj.weight": (qkv, H), "qkv_proj.bias": (qkv,), "o_proj.weight": (H, o), "o_proj.bias": (H,),
             "sinks": (c.num_heads,), "mlp_norm": (H,), "router.weight": (E, H), "router.bias": (E,), "gate_up_proj": (E, 2*I, H),
             "gate_up_proj.bias": (E, 2*I), "down_proj": (E, H, I), "down_proj.bias": (E, H)}
    shapes = {"embed": (c.vocab_size, H), "final_norm": (H,), "lm_head": (c.vocab_size, H)}
    shapes |= {f"layers.{i}.{k}": s for i in range(c.num_layers) for k, s in layer.items()}
    return Transformer(c, {k: torch.ones(s) if k.endswith("norm") else torch.randn(s, generator=g) * 2 * s[-1] ** -.5 for k, s in shapes.items()})

MODEL = random_model()

@pytest.fixture
def llm():
    "A fresh engine, whose blocks must all be free when a test is over"
    with LLM(MODEL, tokenizer=TOKENIZER) as llm: yield llm
    all_free(llm)

def all_free(llm):
    pool = llm.engine.scheduler.pool
    assert pool.num_free == pool.num_blocks and not llm.engine.jobs and not llm.engine.choices and not llm.worker.pending
    check_pool(pool, [])

LONG = dict(max_tokens=200, ignore_eos=True)

def watch_calls(owner, method):
    "What a method returns from now on"
    found, f = [], getattr(owner, method)
    def watched(*args):
        found.append(f(*args))
        return found[-1]
    setattr(owner, method, watched)
    return found

def script(llm, ids):
    "Make the model write these ids, whoever asks"
    run = llm.engine.runner.run
    def scripted(step):
        output = run(step)
        output.ids = [ids[min(r.num_output, len(ids) - 1)] for r in step.sampling]
        return output
    llm.engine.runner.run = scripted

# --- the snippets people know

def test_snippets(llm):
    engine, prompts = llm, ["Hello", "What is 2+2?"]
    assert isinstance(engine.generate(["What is the meaning of life?"], max_tokens=10).result()[0].text, str)
    assert isinstance(llm.generate(prompts, SamplingParams(temperature=0.7, max_tokens=10))[0].outputs[0].text, str)
    assert [type(o["text"]) for o in llm.generate(prompts, sampling_params=SamplingParams(top_k=50))] == [str, str]
    async def watch(): return [o async for o in engine.stream("Hello")]
    chunks = asyncio.run(watch())
    assert sum(len(c.token_ids) for c in chunks) == 16 and chunks[-1].finish_reason == "length"
    assert chunks[0]["text"] == chunks[0].outputs[0].text

def test_await_index_len_iterate(llm):
    async def ask(): return await llm.generate(["a", "b"], temperature=0, max_tokens=4)
    g = llm.generate(["a", [98]], temperature=0, max_tokens=4)
    assert len(g) == 2 and [o.outputs[0].token_ids for o in g] == [o.outputs[0].token_ids for o in asyncio.run(ask())]
    assert g[1] is g.result()[1] and g[-1] is g[1] and g[:1] == [g[0]] and g.done()
    assert [o.prompt for o in g] == ["a", None] and g[1].prompt_token_ids == [98]
    assert llm.generate([]).result() == []

def test_input_order(llm):
    prompts = [[i] * (1 + 7 * i % 30) for i in range(20)]
    outputs = llm.generate(prompts, [SamplingParams(max_tokens=1 + 13 * i % 17) for i in range(20)]).result()
    assert [o.prompt_token_ids for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1 + 13 * i % 17 for i in range(20)]

def test_stream_equals_generate(llm):
    params = SamplingParams(seed=3, max_tokens=30, logprobs=2)
    whole, stream = llm.generate("Hello", params)[0].outputs[0], llm.stream("Hello", params)
    chunks = list(stream)
    assert "".join(c.text for c in chunks) == whole.text and sum((c.token_ids for c in chunks), []) == whole.token_ids
    assert sum((c.logprobs for c in chunks), []) == whole.logprobs
    assert stream.result().outputs[0] == whole and list(stream) == []

def test_from_many_threads(llm):
    alone, found = [llm.generate([i, i], temperature=0)[0].outputs[0].token_ids for i in range(8)], [None] * 8
    def ask(i): found[i] = llm.generate([i, i], temperature=0)[0].outputs[0].token_ids
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert found == alone

def test_progress_bar(llm, capsys):
    llm.generate(["a", "b"], max_tokens=2, use_tqdm=True).result()
    time.sleep(0.1)
    assert "2/2" in capsys.readouterr().err
    llm.generate(["a", "b"], max_tokens=2).result()
    llm.generate(["a", "b"], max_tokens=2, use_tqdm=False).result()
    assert capsys.readouterr().err == ""

# --- at the door

@pytest.mark.parametrize("prompt, params, error, words", [
    ("", {}, ValueError, "empty"), ([[]], {}, ValueError, "empty"), ([5, 277], {}, ValueError, "277"), ([-1], {}, ValueError, "-1"),
    ([1.5], {}, TypeError, "1.5"), ([True], {}, TypeError, "True"), (7, {}, TypeError, "7"), ([None], {}, TypeError, "None"),
    ({"text": "a"}, {}, ValueError, "prompt_token_ids"), ({"prompt": "a", "cache_salt": "b"}, {}, ValueError, "cache_salt"), ("a", dict(temprature=1), TypeError, "temprature"),
    ("a", dict(temperature=-1), ValueError, "temperature"), ("a", dict(logit_bias={300: 1.0}), ValueError, "logit_bias"),
    ("a", dict(stop_token_ids=[300]), ValueError, "stop_token_ids"), ("a" * 1024, {}, ValueError, "1024"),
    ("a", dict(sampling_params=[SamplingParams()] * 3), ValueError, "sampling_params"),
    ("a", dict(sampling_params=dict(n=1)), (TypeError, ValueError), "sampling_params")])
def test_refused(llm, prompt, params, error, words):
    before = llm.generate("b", max_tokens=9, ignore_eos=True)
    with pytest.raises(error, match=words): llm.generate(prompt, **params)
    with pytest.raises(error, match=words): llm.generate(["fine", *(prompt if isinstance(prompt, list) and isinstance(prompt[0], list) else [prompt])], **params)
    assert before[0].outputs[0].finish_reason == "length" # the others never noticed

def test_settings_that_would_do_nothing():
    for wrong in (dict(batch_invariant=True), dict(tensor_parallel_size=8)):
        with pytest.raises(ValueError, match=next(iter(wrong))): Engine(MODEL, EngineConfig(**wrong))
    with pytest.raises(ValueError, match="dtype, device"): LLM(MODEL, dtype="float16")

def test_refused_with_the_numbers():
    with LLM(MODEL, num_blocks=4, block_size=8, max_model_len=100) as llm:
        with pytest.raises(ValueError, match="4"): llm.generate([1] * 30, max_tokens=30)
        with pytest.raises(ValueError, match="tokenizer"): llm.generate("text")
        with pytest.raises(ValueError, match="stop"): llm.generate([1], stop="x")
        assert len(llm.generate([1] * 20, max_tokens=12, ignore_eos=True)[0].outputs[0].token_ids) == 12
    with pytest.raises(ValueError, match="max_model_len"): LLM(MODEL, max_model_len=2000)
    with pytest.raises(TypeError, match="blok"): LLM(MODEL, blok_size=4)

# --- what a request may ask

def test_stop_strings(llm):
    script(llm, [*b"one two three four"])
    stopped = llm.generate("x", stop=["three", "never"], max_tokens=30)[0].outputs[0]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("one two ", "stop", "three")
    assert bytes(stopped.token_ids) == b"one two three"
    kept = llm.generate("x", stop="three", include_stop_str_in_output=True, max_tokens=30)[0].outputs[0]
    assert kept.text == "one two three"
    assert "".join(c.text for c in llm.stream("x", stop="two t", max_tokens=30)) == "one "
    assert llm.generate("x", stop="one", min_tokens=5, max_tokens=18)[0].outputs[0].finish_reason == "length"
    at_limit = llm.generate("x", stop="one", max_tokens=3)[0].outputs[0]
    assert (at_limit.finish_reason, at_limit.text) == ("stop", "")

def test_stop_tokens(llm):
    script(llm, [*b"abcdef"])
    out = llm.generate("x", stop_token_ids=[ord("d")], max_tokens=30)[0].outputs[0]
    assert (out.text, out.finish_reason, out.stop_reason, len(out.token_ids)) == ("abc", "stop", ord("d"), 4)
    out = llm.generate("x", stop_token_ids=[ord("d")], include_stop_str_in_output=True, max_tokens=30)[0].outputs[0]
    assert out.text == "abcd"

def test_what_the_sampler_cannot_digest_reaches_one_request_only(llm):
    wide = Tokenizer(Vocabulary({bytes([b]): b for b in range(256)} | {b"ab": 300}, O200K_PATTERN)) # the model has 277 words
    with LLM(MODEL, tokenizer=wide) as other, pytest.raises(ValueError, match="bad_words"): other.generate([1], bad_words=["ab"])
    text = llm.generate("x", bad_words=["\n", " "], seed=1, max_tokens=200, ignore_eos=True)[0].text
    assert text and not set(text) & set("\n ")
    assert len(llm.generate("x", n=3, temperature=1.0, seed=2**63 - 1, max_tokens=2)[0].outputs) == 3

def test_half_characters(llm):
    script(llm, [*"a👍é".encode()])
    assert [c.text for c in llm.stream("x", max_tokens=7) if c.text] == ["a", "👍", "é"]
    assert llm.generate("x", max_tokens=3)[0].text == "a\ufffd"

@pytest.mark.parametrize("caching", [True, False])
def test_n_shares_the_prompt(caching):
    with LLM(MODEL, block_size=4, enable_prefix_caching=caching) as llm:
        most, scheduler = [0], llm.engine.scheduler
        def watched(step, run=llm.engine.runner.run):
            tables = [r.block_table for r in step.requests]
            most[0] = max(most[0], sum(map(len, tables)) - len({b for t in tables for b in t}))
            return run(step)
        llm.engine.runner.run = watched
        prompt = list(range(40))
        outputs = llm.generate([prompt, prompt[::-1]], n=3, seed=5, max_tokens=8, ignore_eos=True).result()
        apart = [llm.generate(prompt, seed=5 + i, max_tokens=8, ignore_eos=True)[0].outputs[0].token_ids for i in range(3)]
        assert [c.token_ids for c in outputs[0].outputs] == apart and [c.index for c in outputs[0].outputs] == [0, 1, 2]
        assert most[0] >= 2 * 2 * 9 # two prompts, two children each, nine full blocks
    all_free(llm)

def test_n_of_one_token(llm):
    assert [len(c.token_ids) for c in llm.generate("x" * 40, n=4, max_tokens=1)[0].outputs] == [1] * 4

def full_scores(prompt):
    "Log-probabilities of everything that comes after each token, computed in one piece"
    from simplellm.batch import make_batch
    return MODEL(make_batch([(prompt, 0, list(range(8)), "all")], 32), MODEL.new_cache(8, 32)).log_softmax(-1)

def test_logprobs_with_and_without_a_warm_prefix():
    prompt = [i * 37 % 256 for i in range(70)]
    with LLM(MODEL, tokenizer=TOKENIZER, max_num_batched_tokens=16) as llm:
        cold, warm = (llm.generate(prompt, temperature=0, logprobs=3, prompt_logprobs=k, max_tokens=6, ignore_eos=True)[0] for k in (2, None))
        again = llm.generate(prompt, temperature=0, prompt_logprobs=2, max_tokens=6, ignore_eos=True)[0]
    assert cold.num_cached_tokens == again.num_cached_tokens == 0 and warm.num_cached_tokens == 64 and warm.prompt_logprobs is None
    tokens = prompt + cold.outputs[0].token_ids
    truth = full_scores(tokens)
    check = lambda found, p, k: close(found, truth[p - 1], tokens[p], k)
    assert cold.prompt_logprobs[0] is None and len(cold.prompt_logprobs) == len(again.prompt_logprobs) == 70
    for out in (cold, again):
        for p in range(1, 70): check(out.prompt_logprobs[p], p, 2)
    for out in (cold, warm):
        for i, found in enumerate(out.outputs[0].logprobs): check(found, 70 + i, 3)
    assert cold.outputs[0].cumulative_logprob == pytest.approx(sum(truth[69 + i, t].item() for i, t in enumerate(cold.outputs[0].token_ids)), abs=1e-4)

def close(found, truth, token, k):
    "One position against the truth: values, ranks, texts, and which tokens are there"
    assert list(found)[0] == token and set(found) == {token} | set(truth.topk(k).indices.tolist())
    for t, p in found.items():
        assert p.logprob == pytest.approx(truth[t].item(), abs=1e-4) and p.rank == int((truth > truth[t]).sum()) + 1
        assert p.decoded_token == TOKENIZER.decode([t])

# --- chat

REPLY = TOKENIZER.encode("<|channel|>analysis<|message|>2 and 2<|end|><|start|>assistant<|channel|>final<|message|>It is four.<|return|>", allow_special=True)
CALL = TOKENIZER.encode('<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 2}<|call|>', allow_special=True)
QUESTION = [dict(role="user", content="2+2?")]

def test_chat(llm):
    script(llm, REPLY)
    out = llm.chat(QUESTION)[0]
    assert (out.outputs[0].text, out.reasoning, out.tool_calls, out.outputs[0].finish_reason) == ("It is four.", "2 and 2", [], "stop")
    assert out.prompt.endswith("2+2?<|end|><|start|>assistant") and "Reasoning: medium" in out.prompt
    news = list(llm.chat_stream(QUESTION, reasoning_effort="high"))
    assert "".join(c.text for c in news if c.channel == "analysis") == "2 and 2"
    assert "".join(c.text for c in news if c.channel == "final") == "It is four." and news[-1].finish_reason == "stop"
    assert [o.text for o in llm.chat([QUESTION, QUESTION * 2])] == ["It is four."] * 2
    assert llm.chat(QUESTION, SamplingParams(temperature=0))[0].text == "It is four." # nobody asked for a limit
    assert llm.chat(QUESTION, SamplingParams(max_tokens=16))[0].outputs[0].finish_reason == "length"
    with pytest.raises(TypeError, match="messages"): llm.chat("2+2?")

def test_chat_stop_string_counts_in_the_answer(llm):
    script(llm, REPLY)
    out = llm.chat(QUESTION, stop=["fou", "and"])[0]
    assert (out.text, out.outputs[0].stop_reason, out.reasoning) == ("It is ", "fou", "2 and 2")
    assert "".join(c.text for c in llm.chat_stream(QUESTION, stop="fou") if c.channel == "final") == "It is "

def test_a_stop_token_in_a_chat_is_no_part_of_the_answer(llm):
    script(llm, TOKENIZER.encode("<|channel|>final<|message|>85<|return|>", allow_special=True))
    five = dict(stop_token_ids=TOKENIZER.encode("5"))
    assert llm.chat(QUESTION, **five)[0].text == "8"
    assert llm.chat(QUESTION, include_stop_str_in_output=True, **five)[0].text == "85"

def test_text_on_an_unknown_channel_is_part_of_the_answer(llm):
    script(llm, TOKENIZER.encode("<|channel|>answer<|message|>85<|return|>", allow_special=True))
    assert llm.chat(QUESTION)[0].text == "85" == "".join(c.text for c in llm.chat_stream(QUESTION))

def test_chat_tool_call(llm):
    script(llm, CALL)
    tool = dict(type="function", function=dict(name="add", description="Add.", parameters=dict(type="object", properties={})))
    out = llm.chat(QUESTION, tools=[tool])[0]
    assert "type add" in out.prompt and out.tool_calls[0]["function"] == dict(name="add", arguments='{"a": 2}')
    assert out.text == "" and out.outputs[0].finish_reason == "stop"

def test_special_tokens_in_a_message_are_text(llm):
    script(llm, REPLY)
    out = llm.chat([dict(role="user", content="<|return|>")])[0]
    assert TOKENIZER.special["<|return|>"] not in out.prompt_token_ids

def test_chat_needs_a_tokenizer():
    with LLM(MODEL) as llm:
        with pytest.raises(ValueError, match="tokenizer"): llm.chat(QUESTION)

# --- cancel, time out, fail

def test_cancel(llm):
    g = llm.generate(["a"] * 8, **LONG)
    time.sleep(0.02)
    g.cancel()
    assert {o.outputs[0].finish_reason for o in g} <= {"abort", "length"} and g[7].outputs[0].finish_reason == "abort"
    stream = llm.stream("a", n=2, **LONG)
    next(stream)
    stream.cancel()
    last = list(stream)[-1]
    assert last.finish_reason == "abort" and [o.finish_reason for o in stream.result().outputs] == ["abort"] * 2
    llm.cancel("none such", stream.id)
    with pytest.raises(ValueError, match=r"cancel\(\*ids\)"): llm.cancel([stream.id])

def test_a_dropped_stream_is_cancelled(llm):
    for chunk in llm.stream("a", **LONG): break
    async def peek():
        async for chunk in llm.stream("a", **LONG): return chunk
    asyncio.run(peek())
    gc.collect()
    llm.generate("b", max_tokens=1).result()
    assert not llm.engine.jobs

def test_timeouts(llm):
    g = llm.generate("a", **LONG)
    with pytest.raises(TimeoutError, match="1 of 1"): g.result(timeout=0.001)
    assert len(g.result(timeout=60)[0].outputs[0].token_ids) == 200
    async def impatient(): await asyncio.wait_for(llm.generate("a", **LONG), 0.01)
    with pytest.raises(TimeoutError): asyncio.run(impatient())
    stream = llm.stream("a", timeout=0.0001, **LONG)
    with pytest.raises(TimeoutError):
        for _ in stream: pass

def test_an_error_stays_in_its_request(llm):
    class Bad:
        def __init__(self, t): self.t = t
        def __getattr__(self, name): return getattr(self.t, name)
        def token_bytes(self, id): raise ZeroDivisionError("unreadable")
    good = llm.generate(["a", "b"], temperature=0, max_tokens=30, ignore_eos=True)
    llm.engine.tokenizer = Bad(TOKENIZER)
    bad, bad_stream = llm.generate("a", n=3, max_tokens=30), llm.stream("a", max_tokens=30)
    llm.engine.tokenizer = TOKENIZER
    with pytest.raises(ZeroDivisionError, match="unreadable") as e: bad.result()
    assert bad.ids[0] in e.value.__notes__[0]
    with pytest.raises(ZeroDivisionError): list(bad_stream)
    assert [len(o.outputs[0].token_ids) for o in good] == [30, 30]

def test_a_broken_model_reaches_everybody():
    llm = LLM(MODEL, tokenizer=TOKENIZER)
    run = llm.engine.runner.run
    def breaks(step):
        if len(step.requests) == 6: raise RuntimeError("out of memory")
        return run(step)
    llm.engine.runner.run = breaks
    waiting, stream = llm.generate(["a"] * 5, **LONG), llm.stream("b", **LONG)
    for wait in (waiting.result, lambda t: list(stream), lambda t: stream.result(t)):
        with pytest.raises(EngineDead, match="out of memory") as e: wait(30)
        assert isinstance(e.value.__cause__, RuntimeError)
    async def late(): await llm.generate("c")
    with pytest.raises(EngineDead, match="out of memory"): asyncio.run(late())
    with pytest.raises(EngineDead): llm.stream("c")
    waiting.cancel()
    llm.close()

# --- the end

def test_close_drains_or_aborts():
    llm = LLM(MODEL, tokenizer=TOKENIZER)
    g = llm.generate(["a"] * 3, **LONG)
    llm.close()
    assert [len(o.outputs[0].token_ids) for o in g] == [200] * 3 and not llm.worker.thread.is_alive()
    all_free(llm)
    with pytest.raises(EngineDead, match="closed"): llm.generate("a")
    llm.close()
    llm = LLM(MODEL, tokenizer=TOKENIZER)
    g = llm.generate(["a"] * 3, **LONG)
    llm.close(drain=False)
    assert [o.outputs[0].finish_reason for o in g] == ["abort"] * 3
    all_free(llm)

def test_with_aborts_on_an_error():
    with pytest.raises(KeyError):
        with LLM(MODEL) as llm:
            g = llm.generate([1], **LONG)
            raise KeyError
    assert g[0].outputs[0].finish_reason == "abort"

def test_a_temporary_llm_answers_and_then_ends():
    g = LLM(MODEL).generate([1, 2], max_tokens=50, ignore_eos=True)
    thread = g.llm.worker.thread
    assert len(g[0].outputs[0].token_ids) == 50
    del g
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()

def test_the_interpreter_ends_with_work_left():
    code = f"import sys; sys.path.insert(0, {str(__file__.rsplit('/', 1)[0])!r}); from test_engine import *; llm = LLM(MODEL); " \
           "g = llm.generate([[1]] * 50, **LONG); next(llm.stream([1], **LONG)); print('end')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")

def test_any_mix(llm):
    "Cancels, errors, lengths, streams and shared prompts at once; the fixture counts the blocks"
    gs = [llm.generate([i % 3] * (5 + i), n=1 + i % 3, max_tokens=1 + 5 * (i % 9), ignore_eos=True) for i in range(24)]
    streams = [llm.stream([7] * 40, **LONG) for _ in range(4)]
    for i, g in enumerate(gs):
        if i % 4 == 1: g.cancel()
    next(streams[0])
    del streams
    for g in gs: g.result(60)

# --- the same tokens, whatever happens around them

@pytest.mark.parametrize("options", [dict(scheduling="static"), dict(max_num_seqs=2), dict(block_size=1), dict(kv_cache_dtype="float32")])
def test_other_settings(options):
    luck, shared = random.Random(0), list(range(100, 132))
    prompts = [shared[:c] + [luck.randrange(277) for _ in range(n)] for c, n in ((0, 5), (16, 4), (16, 16), (32, 8), (20, 9), (0, 31))]
    def tokens(**o):
        with LLM(MODEL, **o) as llm: found = [r.outputs[0].token_ids for r in llm.generate(prompts, temperature=0, max_tokens=8)]
        all_free(llm)
        return found
    assert tokens(**options) == tokens()

# --- decode steps in standing buffers, launched before the last one's tokens are read

LATE = random_model(seed=0, num_layers=1, windows=(8,), max_position=256) # small, since this file runs it a lot

def wishes(luck, odd):
    "Something to ask for; an odd one may keep its step out of the buffers"
    p = dict(max_tokens=luck.randint(3, 24), seed=luck.randrange(10**9), temperature=luck.choice([0, .7, 1.5]), ignore_eos=luck.random() < .5)
    p |= luck.choice([{}, dict(top_p=.8), dict(top_k=7), dict(min_p=.1)])
    if luck.random() < .5: p["stop_token_ids"] = [luck.randrange(277) for _ in range(12)] # found late
    if odd and luck.random() < .25: p |= luck.choice([dict(logprobs=1), dict(repetition_penalty=1.3), dict(min_tokens=3), dict(prompt_logprobs=0)])
    if p["temperature"] and luck.random() < .2: p["n"] = 2
    return SamplingParams(**p)

def play(plan, options, overlap):
    "Jobs that arrive at given steps; what came of them, and how many steps were begun early"
    engine = Engine(LATE, EngineConfig(**options, async_scheduling=overlap))
    early, done, now = watch_calls(engine.scheduler, "repeat"), {}, 0
    plan = sorted(plan, key=lambda p: p[0])
    names = []
    while plan or engine.has_work:
        while plan and plan[0][0] <= now:
            _, prompt, params = plan.pop(0)
            job = make_job(engine, prompt, params)
            names.append(job.id)
            engine.add(job)
        done |= dict(engine.step())
        now += 1
    pool = engine.scheduler.pool
    assert pool.num_free == pool.num_blocks and not engine.flying
    check_pool(pool, [])
    return [done[i] for i in names], sum(step is not None for step in early)

def told(outputs):
    "What a caller sees"
    return [[(c.token_ids, c.finish_reason, c.stop_reason, c.logprobs and [*map(list, c.logprobs)]) for c in o.outputs] for o in outputs]

@pytest.mark.parametrize("options", [dict(), dict(block_size=1, num_blocks=70, max_num_seqs=5), dict(block_size=4, num_blocks=24, enable_prefix_caching=False),
                                     dict(block_size=4, max_num_batched_tokens=9, max_num_seqs=3), dict(scheduling="static", max_num_seqs=4)])
def test_overlap_changes_nothing(options):
    early = 0
    for seed in range(2):
        luck = random.Random(seed)
        shared = [luck.randrange(277) for _ in range(20)]
        plan = [(luck.randint(0, 40), shared[:luck.choice([0, 8, 20])] + [luck.randrange(277) for _ in range(luck.randint(1, 20))], wishes(luck, seed)) for _ in range(9)]
        (plain, none), (ahead, some) = play(plan, options, False), play(plan, options, True)
        assert told(ahead) == told(plain) and not none
        early += some
    assert early > 5

def test_a_stop_found_late_costs_one_token_and_its_blocks_come_back():
    plan = [(0, [5, 6, 7], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)), (0, [9, 9], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))]
    (first, second), _ = play(plan, {}, False)
    stop = first.outputs[0].token_ids[6]
    at = first.outputs[0].token_ids.index(stop)
    engine = Engine(LATE, EngineConfig(async_scheduling=True))
    a, b = (make_job(engine, p, SamplingParams(temperature=0, max_tokens=30, stop_token_ids=[stop] if p[0] == 5 else None, ignore_eos=True)) for _, p, _ in plan)
    for j in (a, b): engine.add(j)
    done, rows = {}, watch_calls(engine.runner, "launch")
    while engine.has_work: done |= dict(engine.step())
    assert done[a.id].outputs[0].token_ids == first.outputs[0].token_ids[:at + 1] and done[a.id].outputs[0].stop_reason == stop
    if stop not in second.outputs[0].token_ids: assert done[b.id].outputs[0].token_ids == second.outputs[0].token_ids
    computed = sum(a.choices[0].request in launched.step.requests for launched in rows)
    assert computed == at + (2 if at else 1) # one step more than tokens, unless the prompt's own step gave it

def test_repeat_only_what_is_certain():
    pool = BlockPool(4, 4)
    s = Scheduler(EngineConfig(max_num_seqs=2), pool, 13)
    r = Request("r", [1, 2], SamplingParams(max_tokens=11))
    s.add(r)
    assert s.repeat() is None # nothing is under way
    def update(step): s.update(step, [5])
    update(s.schedule())
    step = s.schedule() # 3 tokens; the third is being computed
    assert s.repeat() is step and len(r.block_table) == 1
    update(step) # 4 tokens: the block is full once the fourth is computed
    assert s.repeat() is step and len(r.block_table) == 2 # room for the fifth, before it is known
    s.add(Request("new", [3], SamplingParams()))
    assert s.repeat() is None # somebody waits for a place
    s.cancel(s.waiting[0])
    step = s.schedule()
    while len(r.tokens) < 12:
        assert s.repeat() is step
        update(step)
    assert len(r.tokens) == 12 and s.repeat() is None # the token under way is its last
    assert s.schedule() is step
    update(step)
    assert r.finish_reason == "length" and len(r.tokens) == 13 and pool.num_free == 4

def test_repeat_needs_blocks():
    pool = BlockPool(2, 4)
    s = Scheduler(EngineConfig(), pool, 8)
    for name in "ab": s.add(Request(name, [1, 2], SamplingParams(max_tokens=6)))
    for _ in range(2): s.update(step := s.schedule(), [5] * len(step.sampling))
    assert (step := s.schedule()).num_new == [1, 1] and s.repeat() is None and pool.num_free == 0

@pytest.mark.parametrize("scheduling", ["continuous", "static"])
def test_steady_while_the_queue_cannot_move(scheduling):
    "A request that lacks blocks, or a seat in a static batch, does not make the others' steps new ones"
    pool = BlockPool(6, 4)
    s = Scheduler(EngineConfig(max_num_seqs=3, scheduling=scheduling), pool, 24)
    first, second, third = (Request(str(t), [t] * n, SamplingParams(max_tokens=4)) for t, n in ((1, 5), (2, 5), (3, 20)))
    for r in (first, second, third): s.add(r)
    s.update(step := s.schedule(), [5] * len(step.sampling))
    step = s.schedule()
    assert step.requests == [first, second] and s.repeat() is step
    s.update(step, [5, 5])
    assert s.schedule() is step and s.repeat() is step
    s.cancel(second)
    now = s.schedule() # two blocks were given back, the third needs five and finds four
    assert now.requests == [first] and third.status == "waiting" and pool.num_free == 4
    s.update(now, [5])
    assert s.schedule() is now and s.repeat() is None # the token under way is its last
    s.update(now, [5])
    assert first.status == "finished" and s.schedule().requests == [third]

def test_buffers_move_on_by_themselves():
    b, w = padding_batch(4, 3, scratch=9, block_size=4, device="cpu"), padding_wishes(4, "cpu")
    b.block_tables[:2, :2], b.positions[:2], b.active[:] = torch.tensor([[3, 5], [7, 1]]), torch.tensor([2, 0]), 2
    for step in range(5):
        place(b, w, 4)
        assert b.seq_lens.tolist() == [3 + step, 1 + step, 1, 1] and w.positions.tolist() == b.seq_lens.tolist()
        assert b.slot_mapping.tolist() == [[3, 5][(2 + step) // 4] * 4 + (2 + step) % 4, [7, 1][step // 4] * 4 + step % 4, 36, 36]
        move_on(b, torch.tensor([step, 1, 2, 3]))
    assert b.token_ids[0] == 4 and b.positions.tolist() == [7, 5, 0, 0]
    assert new_blocks([[1, 2, 3], [4], [5, 6]], [1, 1, 1]) == [(0, 1, 2), (0, 2, 3), (2, 1, 6)]

def test_who_needs_the_host_between_two_tokens():
    def home(**p): rs = [Request("r", [1], SamplingParams(**p))]; return at_home(Step(rs, [1], rs))
    assert home() and home(top_k=3, top_p=.5, min_p=.1, seed=1) and home(temperature=0, stop="x")
    assert not any(home(**p) for p in (dict(logprobs=0), dict(prompt_logprobs=0), dict(min_tokens=2), dict(presence_penalty=.1), dict(logit_bias={1: 2.})))
    a, b = (Request(n, [1, 2], SamplingParams()) for n in "ab")
    assert not at_home(Step([a, b], [1, 2], [b]))

def test_the_asynchronous_engine_on_top():
    "Streams, cancels and late stop strings through threads"
    with LLM(MODEL, tokenizer=TOKENIZER, async_scheduling=True) as llm, LLM(MODEL, tokenizer=TOKENIZER) as plain:
        for params in (dict(temperature=0, max_tokens=40, ignore_eos=True), dict(seed=3, max_tokens=40, stop=["e", "a"])):
            assert [o.text for o in llm.generate(["abc", "hello"], **params)] == [o.text for o in plain.generate(["abc", "hello"], **params)]
        g, streams = llm.generate(["a"] * 4, max_tokens=200, ignore_eos=True), [llm.stream("b", max_tokens=200, ignore_eos=True) for _ in range(2)]
        next(streams[0])
        g.cancel()
        del streams
        assert len(llm.generate("c", max_tokens=20, ignore_eos=True)[0].outputs[0].token_ids) == 20
    all_free(llm)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
def test_recorded_steps_are_the_computed_ones():
    from simplellm.models import load_model
    model, prompts = load_model(device="cuda"), [[5 + i] * (3 + 7 * i) for i in range(5)]
    def tokens(**o):
        with LLM(model, tokenizer=None, skip_tokenizer_init=True, **o) as llm:
            return [r.outputs[0].token_ids for r in llm.generate(prompts, temperature=0, max_tokens=24, ignore_eos=True)]
    assert tokens(async_scheduling=True) == tokens(async_scheduling=False) # both recorded
