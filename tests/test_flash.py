"flash-attn is not installed here: a stand-in with the signature and the demands of 4.0.0b36 says whether it would be asked the right question"
import inspect, os, sys, types
import pytest
import torch
from simplellm import flash
from simplellm.attention import attention_dense, paged_attention as reference
from simplellm.ops import choose_ops, describe_ops

class Computed(torch.autograd.Function):
    "As there, the work is done inside an autograd function that saves its inputs"
    @staticmethod
    def forward(ctx, run, *tensors):
        ctx.save_for_backward(*tensors)
        return run(*tensors)

def flash_attn_varlen_func(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
                           seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
                           window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
                           score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
                           return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
                           gather_bwd_recompute_p=False, gather_bwd_token_chunk=None):
    "What its interface asserts, then masks as its documentation words them: query i sees key j if i + m - n - left <= j <= i + m - n + right"
    R, (T, heads, D) = len(cu_seqlens_q) - 1, q.shape
    assert page_table.shape == (R, page_table.shape[1]) and page_table.dtype == torch.int32 and page_table.stride(-1) == 1 and cu_seqlens_k is None
    assert k.shape == v.shape and k.shape[3] == D and heads % k.shape[2] == 0 and D % 16 == 0 and q.stride(-1) == 1
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    for t in cu_seqlens_q, seqused_k: assert t.dtype == torch.int32 and t.stride(0) == 1
    assert seqused_k.shape == (R,) and seqused_k.min() > 0
    assert max_seqlen_q >= cu_seqlens_q.diff().max() and page_table.shape[1] * k.shape[1] >= max_seqlen_k >= seqused_k.max()
    if learnable_sink is not None: assert learnable_sink.shape == (heads,) and learnable_sink.dtype in (torch.float16, torch.bfloat16, torch.float32)
    left, right = window_size if not causal else (window_size[0], 0)

    def run(q, k, v):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for r in range(R):
            a, b, m = *cu_seqlens_q[r:r + 2].tolist(), int(seqused_k[r])
            keys, values = (c[page_table[r].long()].flatten(0, 1)[:m].float().repeat_interleave(heads // k.shape[2], 1) for c in (k, v))
            i, j = torch.arange(b - a)[:, None] + m - (b - a), torch.arange(m)
            seen = (j <= (i + right if right is not None else m)) & (j >= (i - left if left is not None else 0))
            s = (torch.einsum("nhd,mhd->hnm", q[a:b].float(), keys) * softmax_scale).masked_fill(~seen, -torch.inf)
            if learnable_sink is not None: s = torch.cat([s, learnable_sink.float()[:, None, None].expand(-1, b - a, 1)], -1)
            out[a:b] = torch.einsum("hnm,mhd->nhd", s.softmax(-1)[..., :m], values).to(q.dtype)
        return out
    return Computed.apply(run, q, k, v), None

@pytest.fixture
def gpu(monkeypatch):
    "A GPU with flash-attn, as far as anybody asks; capability(8, 0) makes it another"
    package, module = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    module.flash_attn_varlen_func, package.cute = flash_attn_varlen_func, module
    for m in package, module: monkeypatch.setitem(sys.modules, m.__name__, m)
    monkeypatch.setattr(flash, "version", lambda name: {"flash-attn-4": "4.0.0b36"}[name])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    def capability(*pair): monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: pair)
    capability(9, 0)
    return types.SimpleNamespace(capability=capability, package=module)

def example(rows, heads, kv_heads, D, block_size, dtype=torch.float16):
    "Rows (new tokens, all tokens) over shuffled blocks, the queries within a wider projection"
    g, (new, lengths) = torch.Generator().manual_seed(heads), zip(*rows)
    held = [-(-n // block_size) for n in lengths]
    order = (torch.randperm(sum(held), generator=g) + 1).int().split(held)
    tables = torch.zeros(len(rows), max(held) + 1, dtype=torch.int32)
    for row, blocks in zip(tables, order): row[:len(blocks)] = blocks
    random = lambda *shape: torch.randn(shape, generator=g).to(dtype)
    caches = [random(sum(held) + 1, block_size, kv_heads, D) for _ in "kv"]
    args = (random(sum(new), heads + 2 * kv_heads, D)[:, :heads], *caches, tables, torch.tensor(lengths, dtype=torch.int32),
            torch.tensor((0,) + new).cumsum(0).int(), max(new), max(lengths), D**-0.5)
    return args, random(heads)

def never(*args, **options): raise AssertionError("this was flash-attn's")

@pytest.mark.parametrize("rows,heads,kv_heads,D,block_size,window", [
    ([(600, 600)], 2, 2, 64, 16, None), ([(512, 700), (1, 90), (33, 40)], 4, 1, 64, 16, 128), ([(513, 513), (1, 1)], 3, 3, 128, 128, 1),
    ([(520, 1000), (511, 511)], 2, 1, 64, 1024, None), ([(515, 530)], 2, 1, 64, 5, 600)])
@pytest.mark.parametrize("sink", [False, True])
def test_asked_rightly_it_gives_the_same(gpu, rows, heads, kv_heads, D, block_size, window, sink):
    attention, _ = flash.with_flash(never, "cuda", torch.float16)
    args, sinks = example(rows, heads, kv_heads, D, block_size)
    with torch.inference_mode(): got = attention(*args, window, sinks if sink else None, memo={})
    torch.testing.assert_close(got, reference(*args, window, sinks if sink else None), atol=2e-3, rtol=2e-3)
    assert got.is_contiguous() and got.dtype == torch.float16

def test_our_kernel_gives_the_same():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1": pytest.skip("the stand-in computes on the CPU")
    from simplellm.kernels.attention import paged_attention
    args, sinks = example([(512, 530), (1, 40)], 2, 1, 64, 16)
    both = flash.by_length(flash_attn_varlen_func, never)(*args, 100, sinks), paged_attention(*args, 100, sinks)
    torch.testing.assert_close(*both, atol=2e-3, rtol=2e-3)

@pytest.mark.parametrize("change", [dict(rows=[(511, 800)]), dict(rows=[(1, 900)]), dict(D=32), dict(D=96), dict(cache=torch.float32),
                                    dict(options=dict(return_lse=True)), dict(options=dict(batch_invariant=True))])
def test_what_it_is_not_asked(gpu, change):
    attention, _ = flash.with_flash(lambda *args, **options: (args, options), "cuda", torch.float16)
    args, sinks = example(change.get("rows", [(512, 512)]), 2, 1, change.get("D", 64), 16)
    args = args[0], *(t.to(change.get("cache", t.dtype)) for t in args[1:3]), *args[3:]
    options = dict(memo={}) | change.get("options", {})
    passed, more = attention(*args, window=9, sinks=sinks, **options)
    assert all(a is b for a, b in zip(passed, (*args, 9, sinks), strict=True)) and more == options

def test_other_devices_and_types(gpu):
    from simplellm.kernels.attention import paged_attention
    chosen = lambda dtype=torch.bfloat16: flash.with_flash(paged_attention, "cuda", dtype)
    assert chosen()[1] == "flash-attn 4.0.0b36 where a row has 512 or more new tokens, else Triton kernel"
    assert chosen(torch.float32) == (paged_attention, "Triton kernel; flash-attn has no torch.float32")
    for pair in (8, 0), (8, 9), (12, 0):
        gpu.capability(*pair)
        assert chosen() == (paged_attention, f"Triton kernel; flash-attn reads no paged cache on sm_{pair[0]}{pair[1]}")
    for pair in (10, 0), (11, 0):
        gpu.capability(*pair)
        assert chosen()[0] is not paged_attention

def test_missing_or_broken_it_is_done_without(gpu, monkeypatch):
    pytest.importorskip("triton")
    del gpu.package.flash_attn_varlen_func # another flash_attn, or one of another time
    ops = choose_ops("cuda", torch.bfloat16)
    assert ops.attention.__module__ == "simplellm.kernels.attention"
    assert "no flash-attn: cannot import name" in dict((n, why) for n, _, why in describe_ops(ops))["attention"]
    monkeypatch.setitem(sys.modules, "flash_attn", None) # as if not installed
    monkeypatch.delitem(sys.modules, "flash_attn.cute")
    assert flash.find_flash("cuda", torch.bfloat16)[1].startswith("no flash-attn: ")

def test_the_operations_say_so(gpu):
    pytest.importorskip("triton")
    ops = choose_ops("cuda", torch.bfloat16)
    rows = {name: (where, why) for name, where, why in describe_ops(ops)}
    assert rows["attention"][0] == "simplellm.flash.attention" and "flash-attn 4.0.0b36" in rows["attention"][1] and not ops.asks_cpu
    assert rows["rms_norm"][1] == "Triton kernel"
    assert choose_ops("cpu", torch.bfloat16).attention is reference

def test_the_installed_package_has_the_arguments():
    cute = pytest.importorskip("flash_attn.cute")
    used = {"cu_seqlens_q", "max_seqlen_q", "max_seqlen_k", "seqused_k", "page_table", "softmax_scale", "causal", "learnable_sink", "window_size"}
    assert used <= inspect.signature(cute.flash_attn_varlen_func).parameters.keys()
    assert sys.modules["flash_attn.cute.interface"].BIN_BATCH_SEARCH_THRESH == flash.MANY
