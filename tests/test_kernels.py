"Kernels: compiled for GPUs that are not here, and interpreted on shapes that their notebooks do not use"
import os
import pytest
import torch

triton = pytest.importorskip("triton")
device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda" # conftest.py interprets where there is no GPU
STEP = {torch.float32: 3e-6, torch.float16: 2**-9} # float16 stands for bfloat16, whose rounding the interpreter gets wrong

def test_every_kernel_compiles_and_none_spills_on_hopper():
    from simplellm.compile import all_kernels, resources, table
    rows = resources()
    assert {r.target for r in rows} == {"sm_80", "sm_90a", "sm_100"}
    assert len(all_kernels()) >= 2
    assert not [r for r in rows if r.target == "sm_90a" and r.spills], table(rows)
    assert all(r.resident for r in rows), table(rows)

def test_every_launched_kernel_is_compiled_for_every_target():
    import importlib, inspect, re
    from simplellm.compile import TARGETS, all_kernels
    for name in all_kernels():
        module = importlib.import_module(name)
        made = {(case["fn"].fn.__name__, target) for case in module.AOT for target in case.get("targets", TARGETS)}
        launched = set(re.findall(r"\b(_[a-z_]+)\[", inspect.getsource(module)))
        assert launched and not {(kernel, target) for kernel in launched for target in TARGETS} - made, name

def noise(g, *shape, dtype=torch.float32): return torch.randn(shape, generator=g).to(device, dtype)

@pytest.mark.parametrize("dtype", STEP, ids=str)
@pytest.mark.parametrize("T,H,weight,residual", [(1, 7, True, False), (4, 130, False, True), (2, 1023, True, True), (3, 64, False, False)])
def test_rms_norm(T, H, weight, residual, dtype):
    from simplellm.kernels.norm import rms_norm
    from simplellm.norm import rms_norm as reference
    g = torch.Generator().manual_seed(H)
    x, w = noise(g, T, H, dtype=dtype), noise(g, H, dtype=dtype) if weight else None
    r = noise(g, T, 2 * H, dtype=dtype)[:, H:] if residual else None
    got, want = rms_norm(x, w, 1e-6, r), reference(x, w, 1e-6, r)
    torch.testing.assert_close(got, want, atol=STEP[dtype], rtol=STEP[dtype])

@pytest.mark.parametrize("dtype", STEP, ids=str)
@pytest.mark.parametrize("T,heads,kv_heads,D,norm", [(2, 3, 3, 64, False), (3, 7, 1, 128, True), (2, 10, 5, 32, True), (1, 1, 1, 256, False), (2, 9, 3, 16, True)])
def test_rope_store(T, heads, kv_heads, D, norm, dtype):
    from simplellm.attention import store_kv
    from simplellm.config import RopeConfig
    from simplellm.kernels.rope import rope_store
    from simplellm.norm import rms_norm
    from simplellm.rope import apply_rope, rope_table
    g = torch.Generator().manual_seed(D)
    table = rope_table(RopeConfig(), D, 300, device)
    positions = torch.randint(0, 300, (T,), generator=g).to(device)
    slots = torch.randperm(4 * 5, generator=g)[:T].to(device)
    qkv = noise(g, T, (heads + 2 * kv_heads) * D, dtype=dtype)
    caches = [noise(g, 4, 5, kv_heads, D, dtype=dtype) for _ in "kv"]
    want = [c.clone() for c in caches]
    norms = [noise(g, D, dtype=dtype) for _ in "qk"] if norm else []
    q, k, v = qkv.clone().view(T, -1, D).split([heads, kv_heads, kv_heads], 1)
    if norm: q, k = rms_norm(q, norms[0], 1e-6), rms_norm(k, norms[1], 1e-6)
    q, k = apply_rope(q, positions, table), apply_rope(k, positions, table)
    store_kv(k, v, *want, slots)
    got = rope_store(qkv, positions, table, *caches, slots, *norms, eps=1e-6)
    torch.testing.assert_close([got, *caches], [q, *want], atol=STEP[dtype], rtol=STEP[dtype])

def test_padding_rows_are_not_stored():
    from simplellm.config import RopeConfig
    from simplellm.kernels.rope import rope_store
    from simplellm.rope import rope_table
    g = torch.Generator().manual_seed(0)
    caches = [noise(g, 2, 2, 1, 32) for _ in "kv"]
    before = [c.clone() for c in caches]
    zeros = torch.zeros(3, dtype=torch.long, device=device)
    rope_store(noise(g, 3, 4 * 32), zeros, rope_table(RopeConfig(), 32, 4, device), *caches, zeros - 1)
    assert all(a.equal(b) for a, b in zip(caches, before))

def test_the_compiler_command_fails_on_a_spill(tmp_path):
    import subprocess, sys
    from simplellm import compile as ours
    source = '''import triton, triton.language as tl
@triton.jit
def _reverse(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i)
    tl.debug_barrier()
    tl.store(y + i, v / (1 + tl.sum(v, 0)))
AOT = [dict(fn=_reverse, label=str(b), signature=dict(x="*fp32", y="*fp32"), constexprs=dict(BLOCK=b), num_warps=1) for b in (128, 8192)]
'''
    (tmp_path / "k.py").write_text(source)
    small, large = ours.resources(str(tmp_path / "k.py"), targets=["sm_90a"])
    assert small.spills == 0 < large.spills and "LDG" in small.sass and ".target sm_90a" in small.ptx
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-m", "simplellm.compile", str(tmp_path / "k.py"), "--targets", "sm_90a"], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "8192" in done.stdout

def test_the_whole_model_with_kernels():
    "The shipped model, its experts in four bits: prefill, a chunk and decoding through all kernels at once, greedy and seeded"
    from types import SimpleNamespace
    from simplellm.batch import make_batch
    from simplellm.checkpoint import Checkpoint
    from simplellm.models import load_weights, read_config, tiny_path
    from simplellm.ops import Ops, triton_ops
    from simplellm.sampling import SamplingParams, make_sampling
    from simplellm.transformer import Transformer
    checkpoint, ops = Checkpoint(tiny_path()), Ops(**triton_ops())
    c = read_config(checkpoint)
    load = lambda ops, **how: Transformer(c, load_weights(checkpoint, c, torch.float32, device, **how), ops)
    plain, fast = load(Ops(), dequantize=True), load(ops, dequantize=False, prepare=ops.prepare)
    caches, g = (plain.new_cache(12), fast.new_cache(12)), torch.Generator().manual_seed(0)
    wishes, tables = [dict(temperature=0), {}, dict(top_k=30, top_p=0.95)], [[3, 1, 7, 9, 2], [0], [5, 4]]
    requests = [SimpleNamespace(tokens=[], num_prompt=0, num_output=0, seed=2**40 - i, stop_ids=(), bad_words=(), params=SamplingParams(**w))
                for i, w in enumerate(wishes)]
    for new in (66, 3, 1), (1, 2, 9), None: # the window is 64; in the end each goes on with its own token
        chunks = [torch.randint(0, c.vocab_size, (n,), generator=g).tolist() for n in new] if new else [[i] for i in ids]
        rows = [(chunk, len(r.tokens), table, "last") for chunk, r, table in zip(chunks, requests, tables)]
        a, b = (m(make_batch(rows, 16, device), cache) for m, cache in zip((plain, fast), caches))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        for r, chunk in zip(requests, chunks): r.tokens += chunk
        sb, greedy = make_sampling(requests, device), make_sampling(requests[:1], device)
        ids = plain.ops.sample(a, sb).tolist()
        assert fast.ops.sample(b, sb).tolist() == ids and fast.ops.sample(b[:1], greedy).tolist() == ids[:1]
