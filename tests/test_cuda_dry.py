"""The way of a request on a GPU, walked without one: the sizes of some models, tensors without data on another device, and launches that are
only written down. Two questions: does anything mix devices or wait for a number, and does serving need a kernel that the rehearsal lacked?"""
import contextlib, os, random, subprocess, sys, threading
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from simplellm import SamplingParams
from simplellm import memory, runner as runners
from simplellm.blocks import BlockPool
from simplellm.config import EngineConfig
from simplellm.cudagraph import Graphs
from simplellm.models import read_config, tensor_table, tiny_path
from simplellm.ops import choose_ops
from simplellm.scheduler import Request, Scheduler
from simplellm.synthetic import Synthetic
from simplellm.transformer import Transformer

triton = pytest.importorskip("triton")
GPU = torch.device("meta") # has shapes and strides, and nothing that could be looked at

class OneDevice(TorchDispatchMode):
    "Refuses operations on tensors of two devices, except copies from one to the other"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        places = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()}
        copies = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        assert len(places) < 2 or copies or self.allowed(func, args), f"{func} mixes {places}"
        return func(*args, **kwargs or {})

    def allowed(self, func, args): # indices may come from the host: they are copied
        return func.overloadpacket is torch.ops.aten.index and args[0].device == GPU

def specialized(value, plain=False):
    "What Triton compiles in of an argument"
    if isinstance(value, torch.Tensor): return value.dtype, value.storage_offset() * value.itemsize % 16 == 0
    if type(value) is not int or plain: return value if value is None else type(value)
    return 1 if value == 1 else ("int", value % 16 == 0, value < 2**31)

class Launches:
    "Stands in for Triton: notes which variant of which kernel is launched"
    def __init__(self): self.variants, self.parts = set(), 0

    def launch(self, kernel, *args, grid, warmup, **options):
        fixed = [n for n, a in kernel.fn.__annotations__.items() if "constexpr" in str(a)]
        plain = getattr(kernel, "kwargs", vars(kernel)).get("do_not_specialize") or ()
        named = dict(zip(kernel.arg_names, args)) | options
        where = {n: t.device for n, t in named.items() if isinstance(t, torch.Tensor)}
        assert set(where.values()) <= {GPU}, f"{kernel.__name__} gets {where}"
        assert all(0 < n < (2**31 if i == 0 else 2**16) for i, n in enumerate(grid)), f"{kernel.__name__}{grid}"
        known = {n: v if n in fixed or n not in kernel.arg_names else specialized(v, n in plain) for n, v in named.items()}
        if named.get("part_lse") is not None: self.parts = max(self.parts, named["parts"].nbytes + named["part_lse"].nbytes)
        self.variants.add((kernel.__name__, *sorted(known.items(), key=str)))

@pytest.fixture
def launches(monkeypatch):
    "Writes down launches, takes tokens and scores that never arrive as zeros, and leaves CUDA's counters at zero"
    from triton.runtime.interpreter import InterpretedFunction
    seen = Launches()
    for kind in InterpretedFunction, triton.JITFunction: monkeypatch.setattr(kind, "run", lambda self, *a, **kw: seen.launch(self, *a, **kw))
    monkeypatch.setattr(runners, "fetch", lambda ids: (torch.zeros(len(ids), dtype=torch.int64), None))
    def score(logits, tokens, ks, top_logprobs):
        top_logprobs(logits, torch.tensor(tokens, device=logits.device), max(ks))
        return [([0], [0.], 1)] * len(tokens)
    monkeypatch.setattr(runners, "score", score)
    for name in "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats": monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    return seen

QWEN_30B = dict( # Qwen3-30B-A3B
    model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, hidden_act="silu",
    rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=40960, tie_word_embeddings=False, use_sliding_window=False, torch_dtype="bfloat16")

MIXTRAL = dict( # Mixtral-8x7B
    model_type="mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    num_local_experts=8, num_experts_per_tok=2, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=1e6, max_position_embeddings=32768,
    sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16")

LLAMA_7B = dict( # Llama-2-7B, whose query heads share nothing
    model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    hidden_act="silu", rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=4096, tie_word_embeddings=False, torch_dtype="bfloat16")

def hollow(model):
    "The first two layers of a model, of the right shapes with no numbers in them"
    from simplellm.kernels.mxfp4 import Prepared
    c, weights = read_config(Synthetic(model, layers=2, device="cpu")), {}
    for row in tensor_table(c): weights.setdefault(row.ours, []).append(row)
    new = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device=GPU)
    def weight(rows):
        if not rows[0].packed:
            w = new(sum(r.shape[0] for r in rows), *rows[0].shape[1:])
            return w.unflatten(0, (rows[0].stack, -1)) if rows[0].stack else w
        E, N, G = rows[1].shape
        return Prepared(new(E, -(-N // 16), -(-G // 2), 128, dtype=torch.int32), new(E, -(-N // 16), -(-G // 4), 16, dtype=torch.int32), (E, N, 32 * G))
    return Transformer(c, {name: weight(rows) for name, rows in weights.items()}, choose_ops("cuda", torch.bfloat16, pdl=True))

def traffic(e, longest, count, luck):
    "Requests of all kinds"
    for i in range(count):
        n = luck.choice([luck.randint(1, 40), luck.randint(1, 1000), min(luck.randint(1, 9000), longest - 40), longest - 20])
        shared = [7] * luck.choice([0, 0, n - 1, luck.randrange(n)])
        wish = luck.choice([dict(), dict(temperature=0), dict(top_p=.9), dict(top_k=5), dict(min_p=.1), dict(repetition_penalty=1.2), dict(logprobs=2),
                            dict(logit_bias={3: 1.}), dict(prompt_logprobs=0), dict(bad_words=["x"]), dict(allowed_token_ids=[1, 2], temperature=0)])
        tokens = (shared + [luck.randrange(1000) for _ in range(n)])[:n]
        yield Request(str(i), tokens, SamplingParams(max_tokens=luck.randint(1, 9), ignore_eos=True, **wish), i, bad_words=((4,),) if "bad_words" in wish else ())

def serve(model, e, longest, graphs, count, seed):
    luck, pool = random.Random(seed), BlockPool(3 * longest // e.block_size, e.block_size)
    kv = model.new_cache(pool.num_blocks + 1, e.block_size)
    made = Graphs(model, kv, e.max_num_seqs, longest) if graphs else None
    s, runner = Scheduler(e, pool, longest), runners.Runner(model, kv, GPU, made)
    coming, steps = list(traffic(e, longest, count, luck)), 0
    while coming or s.waiting or s.running:
        while coming and luck.random() < .6: s.add(coming.pop())
        if luck.random() < .05 and s.running: s.cancel(luck.choice(s.running))
        step = s.schedule()
        if step: s.update(step, runner.run(step).ids)
        steps += step is not None
    return steps

SMALL = dict(max_num_seqs=64, max_num_batched_tokens=512)

@pytest.mark.parametrize("name, settings, longest, graphs", [
    ("gpt-oss-120b", dict(), 131072, True), ("gpt-oss-120b", SMALL, 1128, False), ("llama-3.2-1b", SMALL, 1128, True), (QWEN_30B, SMALL, 1128, False),
    (tiny_path(), dict(), 4096, True), (MIXTRAL, dict(max_num_seqs=16, max_num_batched_tokens=256), 8192, False), (LLAMA_7B, SMALL, 4096, False)],
    ids=["gpt-oss", "gpt-oss, small", "Llama", "Qwen3-MoE", "shipped", "Mixtral", "one head a key"])
def test_what_is_served_was_rehearsed(launches, name, settings, longest, graphs):
    model, e, luck = hollow(name), EngineConfig(**settings), random.Random(0)
    with OneDevice():
        memory.compile_kernels(model, e, longest, torch.bfloat16)
        early = set(launches.variants)
        memory.measure_step(model, e, longest, torch.bfloat16)
        before = set(launches.variants)
        room = memory.split_bytes(model.config, e.max_num_batched_tokens, e.max_num_seqs, longest)
        assert room / 3 < launches.parts <= room
        steps = serve(model, e, longest, graphs, 30, 0)
        runner = runners.Runner(model, model.new_cache(1), GPU)
        for n in [n for n in (*range(1, 35), 100, 200, 511) if n <= e.max_num_batched_tokens]:
            for past in {0, 7, 300, 600, 5000, 17000, longest - n}:
                others = min(luck.choice([0, 1, 30, 63]), e.max_num_batched_tokens - n, e.max_num_seqs - 1)
                if n + past <= longest: memory.rehearse(runner, [(n, past), *[(1, 3)] * others], prompt_logprobs=luck.choice([None, 1]))
    new = launches.variants - before
    print(len(before), "variants;", steps, "steps")
    assert steps > 20 and not new, "\n".join(map(str, new))
    assert not before - early and launches.parts <= room

@pytest.mark.parametrize("most", [40, 100, 2048])
def test_every_choice_by_a_number_of_tokens_is_rehearsed(most):
    "For any number of experts and any group of heads, not only those of the models above"
    from simplellm.kernels import attention, moe
    steps = memory.rehearsals(EngineConfig(max_num_seqs=1, max_num_batched_tokens=most), 4096)
    tokens, late = {sum(n for n, _ in rows) for rows in steps}, {rows[0][0] for rows in steps if rows[0][1]}
    for E, k in ((E, k) for E in (*range(1, 13), 40, 128) for k in (1, 2, 3, 4, 8) if k <= E):
        for sizes in lambda T: moe.tile_sizes(T * k, E, False, False), lambda T: moe.route_sizes(T, E, k):
            choice = lambda T: (T * k <= moe.FEW, *sizes(T).values())
            assert set(map(choice, range(1, most + 1))) == set(map(choice, tokens)), (E, k)
    for G in 1, 2, 3, 4, 8, 16:
        choice = lambda n: str(attention.tile_sizes(64, G, n, False))
        assert set(map(choice, range(1, most + 1))) == set(map(choice, late)), G

def scale(x, y, n, BLOCK: triton.language.constexpr):
    i = triton.language.arange(0, BLOCK)
    triton.language.store(y + i, triton.language.load(x + i, mask=i < n) * 2, mask=i < n)

@pytest.mark.skipif(not hasattr(triton, "AsyncCompileMode"), reason="this Triton compiles one kernel at a time")
def test_kernels_are_compiled_side_by_side_and_none_is_launched():
    "In a process of its own, whatever other tests have made of Triton in this one"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "test_alone"]
    done = subprocess.run(command, env=os.environ | dict(ALONE="1"), cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

@pytest.mark.skipif(not os.environ.get("ALONE"), reason="runs in a process of its own, begun by the test before")
def test_alone(monkeypatch, tmp_path):
    "By the real compiler, for a driver that only takes notes; what another thread launches meanwhile is launched"
    loaded, launched = [], []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    def launcher(src, metadata):
        loaded.append(metadata.name)
        return lambda *args: launched.append(args[:3])
    driver = SimpleNamespace(launcher_cls=launcher, get_current_device=lambda: 0, get_current_stream=lambda device: 0,
        get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32), utils=SimpleNamespace(
            load_binary=lambda *args: (1, 1, 0, 0, 1024), get_device_properties=lambda device: dict(max_shared_mem=2**17)))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    kernel, x = triton.JITFunction(scale), torch.ones(32)
    def launch(n, dtype=torch.float32): kernel[n,](x.to(dtype), torch.empty_like(x), n, BLOCK=32)
    with memory.compiling("cuda:0"):
        for n in 16, 32, 7, 5: launch(n)
        launch(7, torch.float16)
        other = threading.Thread(target=launch, args=(9,))
        other.start()
        other.join()
    assert launched == [(9, 1, 1)] and len(loaded) in (3, 4) # a multiple of 16, another number (in Triton 3.6 once for each thread), another type
    before = len(loaded)
    for n in 48, 11: launch(n)
    assert launched[1:] == [(48, 1, 1), (11, 1, 1)] and len(loaded) == before
