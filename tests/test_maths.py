"Our reference maths against transformers, piece by piece"
import itertools
import pytest, torch
import torch.nn.functional as F

from simplellm.config import RopeConfig
from simplellm.layers import lay_out, sums_first
from simplellm.moe import clamped_swiglu, moe, moe_dense, moe_grouped, moe_naive, route, swiglu
from simplellm.mxfp4 import FP4_VALUES, dequantize_mxfp4, quantize_mxfp4
from simplellm.norm import rms_norm
from simplellm.rope import apply_rope, rope_frequencies, rope_table

transformers = pytest.importorskip("transformers")
from transformers.integrations import mxfp4 as hf_mxfp4
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_oss import modeling_gpt_oss as hf_gpt_oss
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

# MXFP4

def test_fp4_values(): assert list(FP4_VALUES) == hf_mxfp4.FP4_VALUES

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_every_byte_and_scale(dtype):
    "Every byte under every scale, bit for bit; NaN is never produced"
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 16)
    ours = dequantize_mxfp4(blocks, scales, dtype)
    theirs = hf_mxfp4.convert_moe_packed_tensors(blocks[:, None], scales[:, None], dtype=dtype)[..., 0]
    assert ours.equal(theirs) and ours.signbit().equal(theirs.signbit())

@pytest.mark.parametrize("shape", [(3, 64, 32), (2, 10, 96), (1, 1, 320)])
def test_dequantize_shapes(shape):
    "transformers returns [experts, in, out], we keep the checkpoint's [experts, out, in]"
    q = quantize_mxfp4(torch.randn(shape))
    assert q.blocks.shape == (*shape[:2], shape[2] // 32, 16) and q.scales.shape == q.blocks.shape[:-1]
    assert dequantize_mxfp4(*q).equal(hf_mxfp4.convert_moe_packed_tensors(*q, dtype=torch.float32).mT)

def test_quantize_is_the_nearest():
    "No other code under the same scale is nearer"
    w = torch.randn(50, 64) * torch.logspace(-20, 20, 50)[:, None]
    q = quantize_mxfp4(w)
    scale = torch.ldexp(torch.ones(q.scales.shape), q.scales.int() - 127).repeat_interleave(32, -1)
    every = torch.tensor(FP4_VALUES) * scale[..., None]
    nearest = (every - w[..., None]).abs().amin(-1)
    assert (dequantize_mxfp4(*q) - w).abs().equal(nearest)

def test_quantize_range():
    w = torch.tensor([2.0**-149, 2.0**-126, 1.0, 3.3e38]).view(4, 1).expand(4, 32)
    back = dequantize_mxfp4(*quantize_mxfp4(w))
    assert back.isfinite().all() and ((back - w).abs()[1:] <= w[1:] / 4).all()
    assert quantize_mxfp4(w.bfloat16()).scales.max() < 255

# RMSNorm

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype):
    norm = hf_gpt_oss.GptOssRMSNorm(96, eps=1e-5).to(dtype)
    norm.weight.data = torch.randn(96).to(dtype)
    x, residual = torch.randn(2, 7, 96).to(dtype)
    assert rms_norm(x, norm.weight, 1e-5).equal(norm(x))
    y, total = rms_norm(x, norm.weight, 1e-5, residual)
    assert y.equal(norm(x + residual)) and total.equal(x + residual)

def test_rms_norm_llama():
    "Llama rounds before it multiplies by the weight, which float32 does not notice"
    norm = LlamaRMSNorm(96, eps=1e-6)
    norm.weight.data = torch.randn(96)
    x = torch.randn(7, 96)
    torch.testing.assert_close(rms_norm(x, norm.weight, 1e-6), norm(x))

# RoPE

def hf_frequencies(rope, head_dim):
    "What transformers computes for the same numbers"
    params = dict(rope_type=rope.kind, rope_theta=rope.theta, factor=rope.factor, truncate=rope.truncate,
                  original_max_position_embeddings=rope.original_max_position, beta_fast=rope.beta_fast,
                  beta_slow=rope.beta_slow, low_freq_factor=rope.low_freq_factor,
                  high_freq_factor=rope.high_freq_factor)
    if rope.attention_factor is not None: params["attention_factor"] = rope.attention_factor
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim,
                         max_position_embeddings=int(rope.original_max_position * rope.factor), rope_parameters=params)
    if rope.kind == "default": return hf_gpt_oss.GptOssRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"))

kinds, thetas = ("default", "linear", "llama3", "yarn"), (10000.0, 150000.0, 500000.0)
ropes = [RopeConfig(theta=theta, kind=kind, factor=factor, original_max_position=length, truncate=truncate)
         for theta, kind, factor, length, truncate in itertools.product(thetas, kinds, (1.0, 2.5, 32.0), (256, 4096),
                                                                        (True, False))]

@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_frequencies(head_dim):
    "Bit for bit, over all kinds"
    for rope in ropes + [RopeConfig(kind="yarn", factor=4.0, attention_factor=1.2, beta_fast=16.0, beta_slow=2.0)]:
        (freq, mscale), (hf_freq, hf_mscale) = rope_frequencies(rope, head_dim), hf_frequencies(rope, head_dim)
        assert freq.equal(hf_freq) and mscale == hf_mscale, rope

def test_table_and_rotation():
    "Cosines, sines and turned vectors are those of gpt-oss"
    rope = RopeConfig(theta=150000.0, kind="yarn", factor=32.0, original_max_position=4096, truncate=False)
    config = GptOssConfig(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                          max_position_embeddings=131072,
                          rope_parameters=dict(rope_type="yarn", rope_theta=150000.0, factor=32.0, beta_fast=32.0,
                                               beta_slow=1.0, truncate=False, original_max_position_embeddings=4096))
    positions, x = torch.randint(0, 20000, (9,)), torch.randn(9, 4, 32)
    cos, sin = hf_gpt_oss.GptOssRotaryEmbedding(config)(x, positions[None])
    table = rope_table(rope, 32, 20000)
    assert table[positions].equal(torch.cat([cos[0], sin[0]], -1))
    theirs = hf_gpt_oss.apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)[0]
    assert apply_rope(x, positions, table).equal(theirs[0].transpose(0, 1))

# MoE

def test_route():
    config = GptOssConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=3)
    router = hf_gpt_oss.GptOssTopKRouter(config)
    router.weight.data, router.bias.data = torch.randn(8, 32), torch.randn(8)
    x = torch.randn(11, 32)
    logits, hf_weights, hf_ids = router(x)
    weights, ids = route(F.linear(x, router.weight, router.bias), 3)
    assert ids.equal(hf_ids) and weights.equal(hf_weights)

@pytest.mark.parametrize("tokens,experts,top_k", [(1, 4, 2), (9, 8, 2), (33, 4, 4), (5, 32, 4)])
def test_experts(tokens, experts, top_k):
    "All of our ways against gpt-oss's experts"
    hidden, inner = 64, 32
    config = GptOssConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=experts)
    layer = hf_gpt_oss.GptOssExperts(config)
    for p in layer.parameters(): p.data = torch.randn(p.shape) / 4
    x = torch.randn(tokens, hidden)
    weights, ids = route(torch.randn(tokens, experts), top_k)
    theirs = layer(x, ids, weights)
    args = (x, weights, ids, layer.gate_up_proj.mT, layer.gate_up_proj_bias, layer.down_proj.mT, layer.down_proj_bias,
            clamped_swiglu)
    for f in (moe, moe_naive, moe_grouped, moe_dense): torch.testing.assert_close(f(*args), theirs, atol=1e-5, rtol=1e-5)

def test_packed_experts():
    "MXFP4 experts give exactly what their dequantized weights give, however many are hit"
    gate_up, down = quantize_mxfp4(torch.randn(8, 128, 64) / 8), quantize_mxfp4(torch.randn(8, 64, 64) / 8)
    dense = [dequantize_mxfp4(*w) for w in (gate_up, down)]
    for tokens in (1, 4, 50):
        x, (weights, ids) = torch.randn(tokens, 64), route(torch.randn(tokens, 8), 2)
        packed = moe(x, weights, ids, gate_up, None, down, None, clamped_swiglu)
        assert packed.equal(moe_grouped(x, weights, ids, dense[0], None, dense[1], None, clamped_swiglu))

def test_only_hit_experts_are_unpacked(monkeypatch):
    import simplellm.moe as module
    unpacked = []
    def witness(blocks, *rest): unpacked.append(blocks.shape); return dequantize_mxfp4(blocks, *rest)
    monkeypatch.setattr(module, "dequantize_mxfp4", witness)
    w = quantize_mxfp4(torch.randn(16, 64, 32)), quantize_mxfp4(torch.randn(16, 32, 32))
    moe(torch.randn(3, 32), torch.ones(3, 1), torch.tensor([[2], [2], [9]]), w[0], None, w[1], None, clamped_swiglu)
    assert unpacked == [(64, 1, 16), (32, 1, 16)] * 2

def test_moe_rows_do_not_see_each_other():
    "A row's result does not depend on what else is in the batch"
    gate_up, down = torch.randn(8, 64, 32) / 6, torch.randn(8, 32, 32) / 6
    x, (weights, ids) = torch.randn(64, 32), route(torch.randn(64, 8), 2)
    together = moe(x, weights, ids, gate_up, None, down, None, clamped_swiglu)
    for rows in (slice(0, 1), slice(3, 5), slice(10, 30)):
        alone = moe(x[rows], weights[rows], ids[rows], gate_up, None, down, None, clamped_swiglu)
        torch.testing.assert_close(alone, together[rows], atol=1e-5, rtol=1e-5)

def test_swiglu():
    mlp = Qwen3MLP(Qwen3Config(hidden_size=32, intermediate_size=48))
    x = torch.randn(5, 32)
    gate_up = F.linear(x, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
    torch.testing.assert_close(F.linear(swiglu(gate_up), mlp.down_proj.weight), mlp(x))

# Where weights lie in memory

def test_lay_out():
    "Matrices are sorted by what is summed over; shapes and numbers stay, and so does what is looked up by row"
    shapes = {"embed": (40, 64), "layers.0.mlp_norm": (64,), "layers.0.qkv_proj.weight": (256, 64),
              "layers.0.gate_up_proj": (4, 96, 64), "layers.0.down_proj": (4, 64, 48), "layers.1.gate_up_proj.weight": (96, 64)}
    before = {k: torch.randn(s) for k, s in shapes.items()} | {"layers.0.gate_up_proj.bias": torch.randn(4, 96)}
    before["lm_head"] = before["embed"]
    weights = dict(before)
    lay_out(weights)
    assert weights.keys() == before.keys() and all(weights[k].equal(before[k]) for k in before)
    assert weights["lm_head"] is weights["embed"]
    assert all(weights[k] is before[k] for k in ("embed", "layers.0.mlp_norm", "layers.0.gate_up_proj.bias"))
    assert weights["layers.0.qkv_proj.weight"].stride() == (1, 256) and weights["layers.1.gate_up_proj.weight"].stride() == (1, 96)
    assert weights["layers.0.gate_up_proj"].flatten(0, 1).stride() == (1, 4 * 96)
    assert weights["layers.0.down_proj"].transpose(0, 1).flatten(1).stride() == (1, 64)  # neither is copied by `moe_dense`
    for w in (torch.randn(4, 4).bfloat16(), quantize_mxfp4(torch.randn(2, 4, 32))): assert sums_first("down_proj", w) is w

@pytest.mark.parametrize("tokens", [1, 16, 50])
def test_experts_laid_out(tokens):
    "Experts compute the same wherever their numbers lie"
    weights = {"embed": torch.randn(1, 1), "gate_up_proj": torch.randn(4, 64, 64) / 8, "down_proj": torch.randn(4, 64, 32) / 8}
    x, routed, biases = torch.randn(tokens, 64), route(torch.randn(tokens, 4), 2), (torch.randn(4, 64), torch.randn(4, 64))
    run = lambda f: f(x, *routed, weights["gate_up_proj"], biases[0], weights["down_proj"], biases[1], clamped_swiglu)
    want = [run(f) for f in (moe_naive, moe_dense, moe_grouped)]
    lay_out(weights)
    for f, y in zip((moe_naive, moe_dense, moe_grouped), want): torch.testing.assert_close(run(f), y, atol=1e-5, rtol=1e-5)
