"The attention kernel against the reference: odd shapes, mixed batches, splits, and what it refuses"
import os
import numpy as np
import pytest
import torch

pytest.importorskip("triton")
device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda" # conftest.py interprets where there is no GPU
STEP = {torch.float32: 3e-6, torch.float16: 2**-9}

def example(rows, heads, kv_heads, D, block_size, dtype=torch.float32):
    "Rows (new tokens, all tokens) over shuffled blocks; what no row owns is NaN"
    g, (new, lengths) = torch.Generator().manual_seed(heads), zip(*rows)
    held = [-(-n // block_size) for n in lengths]
    order = iter((torch.randperm(sum(held), generator=g) + 1).tolist())
    tables = torch.zeros(len(rows), max(held) + 2, dtype=torch.int32) # padded with a block that is nobody's
    for r, n in enumerate(held): tables[r, :n] = torch.tensor([next(order) for _ in range(n)])
    random = lambda *shape: torch.randn(shape, generator=g).to(device, dtype)
    q, sinks = random(sum(new), heads + 2 * kv_heads, D)[:, :heads], random(heads)
    caches = [random(sum(held) + 1, block_size, kv_heads, D) for _ in "kv"]
    ints = [t.to(device) for t in (tables, torch.tensor(lengths, dtype=torch.int32), torch.tensor((0,) + new).cumsum(0).int())]
    owned = torch.zeros(caches[0].shape[:2], dtype=torch.bool, device=device)
    for r, n in enumerate(lengths):
        i = torch.arange(n)
        owned[tables[r, i // block_size].long(), i % block_size] = True
    clean = [c.masked_fill(~owned[..., None, None], 0) for c in caches]
    dirty = [c.masked_fill(~owned[..., None, None], torch.nan) for c in caches]
    return (q, *dirty, *ints, max(new), max(lengths), D**-0.5), clean, sinks

@pytest.mark.parametrize("rows,heads,kv_heads,D,block_size,window,dtype", [
    ([(1, 1)], 1, 1, 16, 16, None, torch.float32), ([(1, 17), (1, 16), (1, 1)], 6, 2, 32, 16, None, torch.float16),
    ([(1, 530), (1, 31)], 2, 1, 16, 8, None, torch.float32), ([(1, 65), (1, 200)], 5, 5, 16, 64, 33, torch.float32),
    ([(9, 9), (1, 3)], 4, 2, 32, 16, None, torch.float32), ([(2, 40), (33, 70), (1, 40)], 7, 1, 16, 5, 8, torch.float32),
    ([(1, 2), (4, 520)], 2, 2, 16, 16, None, torch.float16), ([(3, 30)], 2, 1, 128, 512, 1, torch.float32),
    ([(1, 2600), (1, 1), (1, 257)], 2, 1, 32, 16, None, torch.float32), # many splits
    ([(1, 131072), (1, 100001), (1, 127), (1, 129)], 2, 1, 16, 16, 128, torch.float32), # a window at the end of long contexts
    ([(3, 131071), (200, 65537)], 1, 1, 16, 16, 128, torch.float32), # chunks behind a long prefix
    ([(5, 1300), (1, 900), (7, 7)], 3, 1, 64, 16, None, torch.float32), ([(2, 270), (19, 19)], 4, 4, 128, 16, 128, torch.float16),
    ([(1, 90), (3, 20)], 4, 1, 64, 16, None, torch.float16), ([(1, 300), (2, 5)], 4, 1, 128, 16, None, torch.float16),
    ([(1 + r % 2, 1 + r) for r in range(140)], 1, 1, 16, 16, None, torch.float32)]) # more rows than are searched at once
def test_as_the_reference(rows, heads, kv_heads, D, block_size, window, dtype):
    from simplellm.attention import paged_attention as reference
    from simplellm.kernels.attention import paged_attention
    from simplellm.kernels.linear import counters
    args, clean, sinks = example(rows, heads, kv_heads, D, block_size, dtype)
    got = paged_attention(*args, window=window, sinks=sinks, return_lse=True)
    want = reference(args[0], *clean, *args[3:], window=window, sinks=sinks, return_lse=True)
    for a, b in zip(got, want): torch.testing.assert_close(a, b, atol=STEP[dtype], rtol=STEP[dtype])
    assert not counters(args[0].device).any()

@pytest.mark.parametrize("rows,D,window,dtype", [
    ([(1, 70), (1, 9)], 64, 20, torch.float16), ([(1, 530), (6, 40)], 16, 33, torch.float32), ([(1, 40), (3, 70)], 128, None, torch.float16),
    ([(1, 90)], 128, 17, torch.float32), ([(1, 530), (5, 9)], 64, None, torch.float32), ([(2, 50), (1, 3)], 32, 9, torch.float16)])
def test_without_sinks(rows, D, window, dtype):
    from simplellm.attention import paged_attention as reference
    from simplellm.kernels.attention import paged_attention
    args, clean, _ = example(rows, 4, 2, D, 16, dtype)
    want = reference(args[0], *clean, *args[3:], window=window)
    torch.testing.assert_close(paged_attention(*args, window=window), want, atol=STEP[dtype], rtol=STEP[dtype])

def test_all_of_131072_keys(monkeypatch):
    "In as many splits as there may be, but in tiles of keys as long as the interpreter likes"
    from simplellm.kernels import attention
    sizes = attention.tile_sizes
    monkeypatch.setattr(attention, "tile_sizes", lambda *args: sizes(*args) | (dict(BN=512) if device == "cpu" else {}))
    test_as_the_reference([(1, 131072), (1, 5)], 1, 1, 16, 16, None, torch.float32)

def test_larger_limits_and_padding_rows_change_nothing():
    from simplellm.kernels.attention import paged_attention
    args, _, sinks = example([(1, 20), (1, 300), (1, 7)], 4, 2, 16, 16)
    q, k, v, tables, lengths, cu, *_ = args
    want = paged_attention(*args, sinks=sinks)
    lengths = torch.cat([lengths, lengths.new_zeros(2)])
    cu = torch.cat([cu, cu[-1:] + 1, cu[-1:] + 2])
    for longest in 4096, 131072:
        padded = paged_attention(torch.cat([q, q[:2]]), k, v, torch.cat([tables, tables[:2]]), lengths, cu, 1, longest, 0.25, sinks=sinks)
        torch.testing.assert_close(padded[:3], want, atol=1e-6, rtol=1e-6)
        assert not padded[3:].any()

def test_caches_of_more_than_2_to_the_31_elements():
    "Stored into the last block and read from there, as into and from a small cache"
    from simplellm.config import RopeConfig
    from simplellm.kernels.attention import paged_attention
    from simplellm.kernels.rope import rope_store
    from simplellm.rope import rope_table
    shape, blocks, g = (16, 2, 32), 2**21 + 2, torch.Generator().manual_seed(0)
    base = torch.empty(blocks + 1, *shape, dtype=torch.float16, device=device) # on a CPU, pages that nobody touches take no memory
    large, small = (base[:-1], base[1:]), [torch.zeros(1, *shape, dtype=torch.float16, device=device) for _ in "kv"]
    assert large[0][-1].data_ptr() - base.data_ptr() > 2 * 2**31
    qkv, table, outs = torch.randn(3, 8 * 32, generator=g).to(device, torch.float16), rope_table(RopeConfig(), 32, 8, device), []
    positions, ints = torch.arange(3, device=device), dict(dtype=torch.int32, device=device)
    for caches, block in (large, blocks - 1), (small, 0):
        q = rope_store(qkv.clone(), positions, table, *caches, positions + block * 16)
        tables, length, cu = torch.tensor([[block]], **ints), torch.tensor([3], **ints), torch.tensor([0, 3], **ints)
        outs.append(paged_attention(q, *caches, tables, length, cu, 3, 3, 32**-0.5))
    assert outs[0].equal(outs[1]) and all(a[-1, :3].equal(b[0, :3]) for a, b in zip(large, small))

@pytest.mark.parametrize("past,window", [(20, 9), (500, None)]) # the second is cut into parts
def test_batch_invariance_over_chunks(past, window, monkeypatch):
    from simplellm.kernels.attention import paged_attention
    monkeypatch.setattr(np, "matmul", lambda a, b, **kw: np.einsum("ik,kj->ij", a, b)) # the interpreter's may round by a row's place in the matrix
    (q, k, v, tables, lengths, cu, *_), _, _ = example([(30, past + 30), (1, 20)], 4, 2, 16, 16)
    attend = lambda q, tables, lengths, cu, n, m: paged_attention(q, k, v, tables, lengths, cu, n, m, 0.25, window=window, batch_invariant=True)
    run = lambda q, r, n, m: attend(q, tables[r:r + 1], lengths.new_tensor([m]), cu.new_tensor([0, n]), n, m)
    parts = [run(q[:7], 0, 7, past + 7), run(q[7:29], 0, 22, past + 29), run(q[29:30], 0, 1, past + 30), run(q[30:], 1, 1, 20)]
    assert torch.cat(parts).equal(attend(q, tables, lengths, cu, 30, past + 30))

def test_what_is_refused():
    from simplellm.kernels.attention import paged_attention
    args, _, _ = example([(1, 5)], 4, 2, 32, 16)
    with pytest.raises(ValueError, match="head_dim=24"): paged_attention(args[0][..., :24], *args[1:])
    with pytest.raises(ValueError, match="^q="): paged_attention(args[0][:, :3], *args[1:])
    with pytest.raises(ValueError, match="^window=0"): paged_attention(*args, window=0)
    with pytest.raises(ValueError, match="^scale="): paged_attention(*args[:-1], 0.0)
