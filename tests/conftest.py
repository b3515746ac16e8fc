"A small random gpt-oss in openai's file format, written without any code of ours, for whichever test wants one"
import json, os
from pathlib import Path
import pytest

if not Path("/dev/nvidiactl").exists(): os.environ.setdefault("TRITON_INTERPRET", "1") # before anything imports triton

def gpt_oss_json(**changes):
    "config.json with the fields of openai/gpt-oss-20b; a change to the string 'gone' removes a field"
    d = dict(architectures=["GptOssForCausalLM"], attention_bias=True, attention_dropout=0.0, eos_token_id=3,
        experts_per_token=2, head_dim=16, hidden_act="silu", hidden_size=64, initial_context_length=32,
        initializer_range=0.02, intermediate_size=64, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=128, model_type="gpt_oss", num_attention_heads=4, num_experts_per_tok=2,
        num_hidden_layers=2, num_key_value_heads=2, num_local_experts=4, output_router_logits=False, pad_token_id=1,
        quantization_config=dict(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn",
            "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]),
        rms_norm_eps=1e-5, rope_scaling=dict(beta_fast=32.0, beta_slow=1.0, factor=4.0, rope_type="yarn",
            original_max_position_embeddings=32, truncate=False), rope_theta=150000, router_aux_loss_coef=0.9,
        sliding_window=8, swiglu_limit=7.0, tie_word_embeddings=False, use_cache=True, vocab_size=96)
    return {k: v for k, v in (d | changes).items() if v != "gone"}

def gpt_oss_tensors(d, seed=0):
    "Random tensors that fit it"
    import torch
    g = torch.Generator().manual_seed(seed)
    V, H, I, E = d["vocab_size"], d["hidden_size"], d["intermediate_size"], d["num_local_experts"]
    q, kv = (d[k]*d["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    dense = lambda *s: (torch.randn(s, generator=g)*s[-1]**-0.5).bfloat16()
    packed = lambda *s: torch.randint(0, 256, s, dtype=torch.uint8, generator=g)
    scale = lambda *s: torch.randint(118, 124, s, dtype=torch.uint8, generator=g)
    t = {"model.embed_tokens.weight": dense(V, H), "model.norm.weight": dense(H) + 1, "lm_head.weight": dense(V, H)}
    for i in range(d["num_hidden_layers"]):
        t |= {f"model.layers.{i}.{k}": v for k, v in {
            "input_layernorm.weight": dense(H) + 1, "post_attention_layernorm.weight": dense(H) + 1,
            "self_attn.q_proj.weight": dense(q, H), "self_attn.k_proj.weight": dense(kv, H), "self_attn.v_proj.weight": dense(kv, H),
            "self_attn.q_proj.bias": dense(q), "self_attn.k_proj.bias": dense(kv), "self_attn.v_proj.bias": dense(kv),
            "self_attn.o_proj.weight": dense(H, q), "self_attn.o_proj.bias": dense(H), "self_attn.sinks": dense(d["num_attention_heads"]),
            "mlp.router.weight": dense(E, H), "mlp.router.bias": dense(E),
            "mlp.experts.gate_up_proj_blocks": packed(E, 2*I, H//32, 16), "mlp.experts.gate_up_proj_scales": scale(E, 2*I, H//32),
            "mlp.experts.gate_up_proj_bias": dense(E, 2*I), "mlp.experts.down_proj_blocks": packed(E, H, I//32, 16),
            "mlp.experts.down_proj_scales": scale(E, H, I//32), "mlp.experts.down_proj_bias": dense(E, H)}.items()}
    return t

@pytest.fixture
def write_gpt_oss(tmp_path):
    "write(config.json, tensors, shards=1) -> folder"
    from safetensors.torch import save_file
    def write(d=None, tensors=None, shards=1, name="checkpoint"):
        d = gpt_oss_json() if d is None else d
        tensors = gpt_oss_tensors(gpt_oss_json()) if tensors is None else tensors
        folder = tmp_path/name
        folder.mkdir(exist_ok=True)
        files = [f"model-{i+1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors" for i in range(shards)]
        where = {k: files[i*shards//len(tensors)] for i, k in enumerate(tensors)}
        for f in files: save_file({k: v for k, v in tensors.items() if where[k] == f}, folder/f, metadata=dict(format="pt"))
        if shards > 1: (folder/"model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))
        (folder/"config.json").write_text(json.dumps(d))
        (folder/"generation_config.json").write_text(json.dumps(dict(eos_token_id=[3, 4, 5])))
        return folder
    write.json, write.tensors = gpt_oss_json, gpt_oss_tensors
    return write
