"Loading agrees with transformers on both file formats, and the parts of all ranks make the whole"
import os, subprocess, sys
import pytest, torch
from simplellm.checkpoint import Checkpoint, CheckpointError
from simplellm.models import FAMILIES, load_model, load_weights, read_config, tensor_table
from simplellm.mxfp4 import MXFP4, dequantize_mxfp4
from simplellm.parallel import SPLITS, Shard

def load(folder, dtype=torch.float32, **kw):
    c = Checkpoint(folder)
    return load_weights(c, read_config(c), dtype, **kw)

def by_our_names(state, n):
    "transformers' state dict of a dense gpt-oss under our names, written down independently of our table"
    w = {"embed": state["model.embed_tokens.weight"], "final_norm": state["model.norm.weight"], "lm_head": state["lm_head.weight"]}
    for i in range(n):
        g = lambda k: state[f"model.layers.{i}.{k}"]
        w |= {f"layers.{i}.{k}": v for k, v in {
            "attn_norm": g("input_layernorm.weight"), "mlp_norm": g("post_attention_layernorm.weight"), "sinks": g("self_attn.sinks"),
            "qkv_proj.weight": torch.cat([g(f"self_attn.{x}_proj.weight") for x in "qkv"]),
            "qkv_proj.bias": torch.cat([g(f"self_attn.{x}_proj.bias") for x in "qkv"]),
            "o_proj.weight": g("self_attn.o_proj.weight"), "o_proj.bias": g("self_attn.o_proj.bias"),
            "router.weight": g("mlp.router.weight"), "router.bias": g("mlp.router.bias"),
            "gate_up_proj": g("mlp.experts.gate_up_proj").transpose(1, 2), "gate_up_proj.bias": g("mlp.experts.gate_up_proj_bias"),
            "down_proj": g("mlp.experts.down_proj").transpose(1, 2), "down_proj.bias": g("mlp.experts.down_proj_bias")}.items()}
    return w

def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for k, w in ours.items(): assert torch.equal(w, theirs[k].to(w.dtype)) and w.is_contiguous(), k

@pytest.fixture(scope="module")
def transformers(): return pytest.importorskip("transformers", reason="the judge of these tests")

def small_config(transformers, **changes):
    d = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, sliding_window=8, max_position_embeddings=128,
             eos_token_id=[3, 4], pad_token_id=1, layer_types=["sliding_attention", "full_attention"],
             rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32, truncate=True))
    return transformers.GptOssConfig(**d | changes)

@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard", ["5GB", "30KB"])
def test_dense(transformers, tmp_path, dtype, shard):
    "What transformers' save_pretrained writes, in one file and in many"
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(small_config(transformers)).to(getattr(torch, dtype))
    for p in model.parameters(): p.data.normal_()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    c = read_config(tmp_path)
    assert (c.dtype, c.experts, c.eos_token_ids, c.windows, c.rope.kind, c.rope.truncate) == (dtype, "dense", (3, 4), (8, None), "yarn", True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard == "5GB"
    same(load(tmp_path, None), by_our_names(model.state_dict(), 2))

def test_config_without_model(transformers, write_gpt_oss, tmp_path):
    "A config.json written alone has no architectures: model_type decides"
    small_config(transformers).save_pretrained(tmp_path)
    assert read_config(tmp_path).family == "gpt_oss"

def test_mxfp4(transformers, write_gpt_oss):
    "transformers dequantizes openai's format to the same numbers, and both read the same config.json"
    folder = write_gpt_oss()
    model = transformers.GptOssForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    same(load(folder, torch.bfloat16), by_our_names(model.state_dict(), 2))
    c, t = read_config(folder), model.config
    assert (c.rope.theta, c.rope.factor, c.rope.truncate) == tuple(t.rope_parameters[k] for k in ("rope_theta", "factor", "truncate"))
    assert c.eos_token_ids == (3, 4, 5) and c.pad_token_id == 1 and c.experts == "mxfp4" and c.dtype == "bfloat16"

def test_packed(write_gpt_oss):
    "Packed experts are the file's bytes, and dequantize to the dense ones"
    folder = write_gpt_oss(shards=3)
    packed, dense, t = load(folder, dequantize=False), load(folder), write_gpt_oss.tensors(write_gpt_oss.json())
    for k, w in packed.items():
        if not isinstance(w, MXFP4): continue
        assert torch.equal(dequantize_mxfp4(*w, torch.float32), dense[k])
        assert torch.equal(w.blocks, t[f"model.{k.replace('.gate', '.mlp.experts.gate').replace('.down', '.mlp.experts.down')}_blocks"])
    assert sum(isinstance(w, MXFP4) for w in packed.values()) == 4

def test_too_large_for_float16(write_gpt_oss):
    "What a wider type can hold and float16 cannot is refused under its name, not turned into infinity"
    d = write_gpt_oss.json()
    for value, ok in ((6e4, True), (1e5, False), (-1e5, False)):
        tensors = write_gpt_oss.tensors(d)
        tensors["model.norm.weight"][3] = value
        folder = write_gpt_oss(d, tensors)
        assert load(folder, torch.bfloat16)["final_norm"][3].isfinite()
        if ok: load(folder, torch.float16)
        else:
            with pytest.raises(CheckpointError, match="model.safetensors.*model.norm.weight.*float16"): load(folder, torch.float16)

def test_nothing_shared(write_gpt_oss):
    "Loaded weights are copies: overwriting the file afterwards changes nothing"
    folder = write_gpt_oss()
    for kw in dict(dtype=torch.bfloat16, dequantize=False), dict(dtype=torch.bfloat16):
        weights = load(folder, **kw)
        before = {k: tuple(x.clone() for x in w) if isinstance(w, MXFP4) else w.clone() for k, w in weights.items()}
        with open(folder/"model.safetensors", "r+b") as f:
            f.seek(-1000, os.SEEK_END); f.write(bytes(900))
        for k, w in weights.items():
            assert all(torch.equal(a, b) for a, b in zip(w, before[k])) if isinstance(w, MXFP4) else torch.equal(w, before[k])
        write_gpt_oss()

def joined(c, parts, k):
    "The whole of a weight from all ranks' parts"
    rows = [r for r in tensor_table(c) if r.ours == k]
    rule = rows[0].rule
    if rule is None:
        assert all(torch.equal(p, parts[0]) for p in parts)
        return parts[0]
    if rule == "once": return sum(parts)
    if len(rows) == 3: # q, k and v
        pieces = [p.split([r.shape[0]//len(parts) for r in rows]) for p in parts]
        return torch.cat([torch.cat(same_kind) for same_kind in zip(*pieces)])
    return torch.cat(parts, SPLITS[rule])

@pytest.mark.parametrize("experts", ["mxfp4", "dense", "packed"])
@pytest.mark.parametrize("size", [2, 4])
def test_shards(transformers, write_gpt_oss, tmp_path, experts, size):
    "Concatenating the parts of all ranks gives the whole, for every tensor"
    changes = dict(num_key_value_heads=4, num_attention_heads=8, intermediate_size=128)
    if experts == "dense":
        model = transformers.GptOssForCausalLM(small_config(transformers, **changes))
        for p in model.parameters(): p.data.normal_()
        model.save_pretrained(folder := tmp_path/"dense")
    else:
        d = write_gpt_oss.json(**changes)
        folder = write_gpt_oss(d, write_gpt_oss.tensors(d))
    kw = dict(dequantize=experts != "packed")
    whole, c = load(folder, **kw), read_config(folder)
    parts = [load(folder, shard=Shard(r, size), **kw) for r in range(size)]
    for k, w in whole.items():
        if isinstance(w, MXFP4): assert all(torch.equal(joined(c, [p[k][i] for p in parts], k), w[i]) for i in range(2)), k
        else: assert torch.equal(joined(c, [p[k] for p in parts], k), w), k
    assert all(p["layers.0.qkv_proj.weight"].shape[0]*size == whole["layers.0.qkv_proj.weight"].shape[0] for p in parts)

@pytest.mark.parametrize("changes,name", [(dict(num_key_value_heads=1), "k_proj"), (dict(vocab_size=97), "embed_tokens"),
    (dict(intermediate_size=96), "down_proj_blocks"), (dict(num_attention_heads=6), "")])
def test_shards_refused(write_gpt_oss, changes, name):
    "A model that two ranks cannot share is refused by the tensor that does not divide"
    d = write_gpt_oss.json(**changes)
    folder = write_gpt_oss(d, write_gpt_oss.tensors(d))
    if not name: return load(folder, shard=Shard(0, 2)) and None # six heads in groups of three: one group each
    with pytest.raises(ValueError, match=name): load(folder, shard=Shard(0, 2))

def test_load_model(write_gpt_oss):
    "dtype and device are the caller's, and a bad one is named"
    folder = write_gpt_oss()
    assert load_model(folder, device="cpu").dtype == torch.float32
    assert load_model(folder, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert load_model(str(folder), dtype=torch.float16, device="cpu").dtype == torch.float16
    for bad in "int8", torch.int8, "double", None, 16:
        with pytest.raises(ValueError, match="dtype"): load_model(folder, dtype=bad, device="cpu")
    with pytest.raises(CheckpointError, match="no-such-model"): load_model("no-such-model")

def test_families():
    "Tables are well formed: one left-hand name per shape rule, no tensor twice"
    assert set(FAMILIES) >= {"gpt_oss"}
    for f in FAMILIES.values(): assert f.architecture.endswith("ForCausalLM") and set(f.mlp) <= {"mxfp4", "dense"}

REDUCE = """
import sys, torch, torch.distributed as dist
from simplellm.parallel import all_reduce
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
assert all_reduce(torch.arange(3.) + rank).tolist() == [1., 3., 5.]
dist.destroy_process_group()
"""

@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_all_reduce(tmp_path):
    "Two real processes"
    ranks = [subprocess.Popen([sys.executable, "-c", REDUCE, str(r), tmp_path/"store"]) for r in range(2)]
    assert [r.wait(timeout=120) for r in ranks] == [0, 0]
