"Damaged checkpoints: every one is refused with the file and the tensor it is about, and nothing worse than that happens"
import json, os, shutil, struct, subprocess, sys
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from simplellm.checkpoint import INDEX, SINGLE, Checkpoint, CheckpointError, read_header
from simplellm.models import load_weights, read_config

Q = "model.layers.1.self_attn.q_proj.weight"
SCALES = "model.layers.0.mlp.experts.gate_up_proj_scales"
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

def load(folder):
    "All that happens before a model runs"
    c = Checkpoint(folder)
    return load_weights(c, read_config(c))

def refusal(folder):
    "The error's text"
    with pytest.raises(CheckpointError) as e: load(folder)
    return str(e.value)

def rewrite(path, change=lambda h: h, data=lambda d: d, text=lambda t: t):
    "Damage the header, the data or the header's bytes of a safetensors file"
    raw = path.read_bytes()
    n, = struct.unpack("<Q", raw[:8])
    h = json.loads(raw[8:8+n])
    change(h)
    header = text(json.dumps(h).encode())
    path.write_bytes(struct.pack("<Q", len(header)) + header + data(raw[8+n:]))

def first(h): return min((k for k in h if k != "__metadata__"), key=lambda k: h[k]["data_offsets"][0])
def second(h): return sorted((k for k in h if k != "__metadata__"), key=lambda k: h[k]["data_offsets"][0])[1]
def shift(name, a, b):
    def change(h):
        o = h[name(h)]["data_offsets"]
        h[name(h)]["data_offsets"] = [o[0] + a, o[1] + b]
    return change
def put(name, key, value): return lambda h: h[name].__setitem__(key, value)

def test_undamaged(write_gpt_oss):
    "One file and three shards give the same weights, and rewriting changes nothing"
    one, three = load(write_gpt_oss()), load(write_gpt_oss(shards=3, name="three"))
    assert one.keys() == three.keys() and all(torch.equal(one[k], three[k]) for k in one)
    folder = write_gpt_oss(name="again")
    rewrite(folder/SINGLE)
    assert all(torch.equal(one[k], w) for k, w in load(folder).items())

LIES = dict(
    truncated=(dict(data=lambda d: d[:-1]), "truncated"),
    half=(dict(data=lambda d: d[:len(d)//2]), "truncated"),
    appended=(dict(data=lambda d: d + b"\0"), "belong to no tensor"),
    overlap=(dict(change=shift(second, -2, -2)), "overlap"),
    hole=(dict(change=shift(second, 2, 2)), "expected"),
    span=(dict(change=shift(second, 0, 2)), "expected"),
    beyond=(dict(change=shift(second, 2**62, 2**62)), "the file has"),
    backwards=(dict(change=put(Q, "data_offsets", [100, 0])), Q),
    shape=(dict(change=put(Q, "shape", [64, 65])), Q),
    negative=(dict(change=put(Q, "shape", [-64, -64])), Q),
    fraction=(dict(change=put(Q, "shape", [64.5, 64])), Q),
    no_list=(dict(change=put(Q, "shape", 4096)), Q),
    dtype=(dict(change=put(Q, "dtype", "F4_QUARTER")), Q),
    dtype_list=(dict(change=put(Q, "dtype", ["BF16"])), Q),
    wider=(dict(change=put(Q, "dtype", "F32")), Q),
    offsets=(dict(change=put(Q, "data_offsets", [0])), Q),
    text_offsets=(dict(change=put(Q, "data_offsets", ["0", "8192"])), Q),
    entry=(dict(change=lambda h: h.__setitem__(Q, [])), Q),
    lost_key=(dict(change=lambda h: h[Q].pop("dtype")), Q),
    dropped=(dict(change=lambda h: h.pop(Q)), "expected"),
    twin=(dict(change=lambda h: h.update(twin=h[Q])), "overlap"),
    no_json=(dict(text=lambda t: b"x" + t[1:]), "JSON"),
    no_utf8=(dict(text=lambda t: b"\xff" + t[1:]), "JSON"),
    cut_json=(dict(text=lambda t: t[:-1]), "JSON"),
    a_list=(dict(text=lambda t: b"[]"), "JSON"),
    notes=(dict(change=lambda h: h.__setitem__("__metadata__", dict(format=1))), "__metadata__"),
    newer_dtype=(dict(change=put(Q, "dtype", "F8_E8M0")), Q),
    deep=(dict(text=lambda t: b"["*100_000), "JSON"),
    duplicate=(dict(text=lambda t: t[:-1] + b"," + t[1:]), "twice"))

@pytest.mark.parametrize("lie", LIES)
def test_header_lies(write_gpt_oss, lie):
    "Every lie of a header names the file, and the tensor where there is one"
    damage, expected = LIES[lie]
    for shards, file in (1, SINGLE), (2, "model-00002-of-00002.safetensors"):
        folder = write_gpt_oss(shards=shards, name=str(shards))
        rewrite(folder/file, **damage)
        message = refusal(folder)
        assert message.startswith(file + ": ") and expected in message

@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100])
def test_truncated_early(write_gpt_oss, size):
    "A file that ends inside its header"
    folder = write_gpt_oss()
    os.truncate(folder/SINGLE, size)
    assert refusal(folder).startswith(SINGLE)

@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_absurd_length(write_gpt_oss, length):
    "A length that cannot be true is refused without allocating it"
    folder = write_gpt_oss()
    raw = (folder/SINGLE).read_bytes()
    (folder/SINGLE).write_bytes(struct.pack("<Q", length) + raw[8:])
    assert refusal(folder).startswith(SINGLE)

def damaged(write, change, d=None):
    "The refusal of a checkpoint whose tensors were changed before writing"
    t = write.tensors(write.json())
    change(t)
    return refusal(write(d, t))

@pytest.mark.parametrize("name", [Q, SCALES, "lm_head.weight", "model.norm.weight",
    "model.layers.0.self_attn.sinks", "model.layers.1.mlp.experts.down_proj_bias"])
def test_tensors(write_gpt_oss, name):
    "Missing, renamed, reshaped and retyped tensors"
    def rename(t): t[name + "2"] = t.pop(name)
    def grow(t): t[name] = torch.cat([t[name], t[name][:1]])
    def flatten(t): t[name] = t[name][None]
    def retype(to): return lambda t: t.__setitem__(name, t[name].to(to))
    for change in (lambda t: t.pop(name), rename): assert f"{SINGLE}: tensor {name!r}: missing" in damaged(write_gpt_oss, change)
    for change in (grow, flatten):
        message = damaged(write_gpt_oss, change)
        assert f"{SINGLE}: tensor {name!r}: shape" in message and "expected" in message
    for to in (torch.float64, torch.float16, torch.int8, torch.int32):
        message = damaged(write_gpt_oss, retype(to))
        assert f"{SINGLE}: tensor {name!r}: dtype" in message and "expected" in message

def test_embedding_type(write_gpt_oss):
    "config.json does not state a type, and still it is the odd tensor that is named"
    for name in ("model.embed_tokens.weight", Q):
        message = damaged(write_gpt_oss, lambda t: t.__setitem__(name, t[name].float()))
        assert name in message and "float32" in message and "bfloat16" in message

def test_surplus(write_gpt_oss):
    assert "tensor 'model.extra': surplus" in damaged(write_gpt_oss, lambda t: t.update({"model.extra": torch.zeros(2)}))

@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(write_gpt_oss, value):
    "One bad number anywhere in any dense tensor"
    for name, x in write_gpt_oss.tensors(write_gpt_oss.json()).items():
        if x.dtype == torch.uint8: continue
        message = damaged(write_gpt_oss, lambda t: t[name].view(-1).__setitem__(x.numel()//2, value))
        assert f"tensor {name!r}" in message and str(value) in message

def test_scale_255(write_gpt_oss):
    for name in (SCALES, "model.layers.1.mlp.experts.down_proj_scales"):
        message = damaged(write_gpt_oss, lambda t: t[name].view(-1).__setitem__(-1, 255))
        assert name in message and "255" in message

def test_scale_overflow(write_gpt_oss):
    "254 is a legal scale, but six times 2^127 is no float32"
    def change(t):
        t[SCALES][2, 3, 1] = 254
        t[SCALES.replace("scales", "blocks")][2, 3, 1, 0] = 0x77
    assert "inf at [2, 3, 32]" in damaged(write_gpt_oss, change)

CONFIG = dict(
    architecture=(dict(architectures=["MambaForCausalLM"]), "MambaForCausalLM"), no_architecture=(dict(architectures=5), "architectures"),
    model_type=(dict(model_type="llama"), "model_type"), nameless=(dict(architectures="gone", model_type="gone"), "architectures"),
    gptq=(dict(quantization_config=dict(quant_method="gptq")), "gptq"), fp8=(dict(quantization_config=dict(quant_method="fp8")), "fp8"),
    odd_quantization=(dict(quantization_config="mxfp4!"), "quantization"),
    rope_type=(dict(rope_scaling=dict(rope_type="longrope", factor=2.0, original_max_position_embeddings=32)), "longrope"),
    rope_key=(dict(rope_scaling=dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=32, mscale=1.0)), "mscale"),
    rope_list=(dict(rope_scaling=[1]), "rope_scaling"), rope_type_list=(dict(rope_scaling=dict(rope_type=[1])), "rope_type"),
    layer_kind=(dict(layer_types=["sliding_attention", "linear_attention"]), "layer_types"), act=(dict(hidden_act="gelu"), "hidden_act"),
    layer_count=(dict(layer_types=["full_attention"]), "layer_types"), negative=(dict(sliding_window=-1), "sliding_window -1"),
    text=(dict(vocab_size="96"), "vocab_size"), fraction=(dict(head_dim=16.5), "head_dim"), zero=(dict(hidden_size=0), "hidden_size"),
    heads=(dict(num_key_value_heads=3), "num_key_value_heads"), top_k=(dict(num_experts_per_tok=5, experts_per_token=5), "num_experts_per_tok"),
    two_values=(dict(experts_per_token=3), "experts_per_token"), eos=(dict(eos_token_id=96), "eos_token_id"),
    eos_type=(dict(eos_token_id={"a": 1}), "eos_token_id"), dtype=(dict(dtype="int8"), "dtype"), bias=(dict(attention_bias="yes"), "bias"),
    far=(dict(max_position_embeddings=10**12), "max_position_embeddings"), window=(dict(sliding_window=2**70), "windows"), no_dtype=(dict(dtype=""), "dtype"),
    overflow=(dict(rope_scaling=dict(rope_type="yarn", factor=1e308, original_max_position_embeddings=10**300)), "factor"),
    reach=(dict(rope_scaling=dict(rope_type="yarn", factor=64.0, original_max_position_embeddings=2**23)), "max_position"),
    two_thetas=(dict(rope_scaling=dict(rope_type="linear", factor=2.0, rope_theta=10000.0)), "rope_theta 150000 contradicts rope_theta 10000.0"),
    mlp_layers=(dict(mlp_only_layers=["0"]), "mlp_only_layers"), far_layer=(dict(mlp_only_layers=[2]), "mlp_only_layers"),
    bitsandbytes=(dict(quantization_config=dict(quant_method="bitsandbytes")), "bitsandbytes"), dense=(dict(quantization_config=dict(quant_method="dense")), "'dense'"),
    nested=(dict(layer_types=[["full_attention"], "full_attention"]), "layer_types"), negative_eos=(dict(eos_token_id=-1), "eos_token_id"))

@pytest.mark.parametrize("case", CONFIG)
def test_config(write_gpt_oss, case):
    "config.json that cannot be right says so"
    changes, expected = CONFIG[case]
    message = refusal(write_gpt_oss(write_gpt_oss.json(**changes)))
    assert message.startswith("config.json: ") and expected in message

@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "max_position_embeddings", "rms_norm_eps", "num_local_experts", "swiglu_limit", "layer_types",
    "sliding_window", "rope_theta", "rope_scaling"])
def test_missing_field(write_gpt_oss, field):
    for value in "gone", None:
        message = refusal(write_gpt_oss(write_gpt_oss.json(**{field: value})))
        assert message.startswith("config.json: missing field") and field in message

def test_missing_top_k(write_gpt_oss):
    assert "num_experts_per_tok" in refusal(write_gpt_oss(write_gpt_oss.json(num_experts_per_tok="gone", experts_per_token="gone")))

@pytest.mark.parametrize("changes", [dict(vocab_size=95), dict(hidden_size=32), dict(head_dim=32), dict(intermediate_size=32), dict(num_local_experts=8),
    dict(num_attention_heads=2), dict(num_key_value_heads=4), dict(num_hidden_layers=3, layer_types=["full_attention"]*3),
    dict(num_hidden_layers=1, layer_types=["full_attention"]), dict(quantization_config=None), dict(attention_bias=False),
    dict(dtype="float32"), dict(torch_dtype="float16"), dict(tie_word_embeddings=True, quantization_config=None)])
def test_contradiction(write_gpt_oss, changes):
    "A config.json that describes another model than the tensors"
    message = refusal(write_gpt_oss(write_gpt_oss.json(**changes)))
    assert message.startswith(SINGLE + ": tensor 'model.") or message.startswith(SINGLE + ": tensor 'lm_head")

@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1, "a": 2}', "\ufeff{}", '{"vocab_size": ' + "9"*5000 + "}"])
def test_config_text(write_gpt_oss, text):
    folder = write_gpt_oss()
    (folder/"config.json").write_text(text, encoding="utf-8")
    assert refusal(folder).startswith("config.json")

def test_missing_files(write_gpt_oss, tmp_path):
    for gone in ("config.json", SINGLE):
        folder = write_gpt_oss(name=gone)
        (folder/gone).unlink()
        assert gone in refusal(folder)
    assert "nowhere" in refusal(tmp_path/"nowhere")

def test_index(write_gpt_oss):
    "An index and shards that disagree"
    a, b = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    def case(change, shard=lambda folder: None):
        folder = write_gpt_oss(shards=2, name=f"index{case.n}"); case.n += 1
        index = json.loads((folder/INDEX).read_text())
        change(index)
        (folder/INDEX).write_text(json.dumps(index))
        shard(folder)
        return refusal(folder)
    case.n = 0
    nothing = lambda i: None
    assert b in case(nothing, lambda f: (f/b).unlink())
    def both(f):
        t = load_file(f/b)
        name, x = next(iter(load_file(f/a).items()))
        save_file(t | {name: x}, f/b)
    assert "also in" in case(nothing, both) and "one shard" in case(nothing, both)
    assert "surplus" in case(lambda i: i["weight_map"].pop(Q)) and Q in case(lambda i: i["weight_map"].pop(Q))
    message = case(lambda i: i["weight_map"].update(ghost=a))
    assert message.startswith(a) and "'ghost'" in message and "missing" in message
    assert Q in case(lambda i: i["weight_map"].__setitem__(Q, a if i["weight_map"][Q] == b else b))
    for escape in (f"../{a}", "/etc/passwd", "..", "", 5, None, "sub/" + a):
        assert case(lambda i: i["weight_map"].__setitem__(Q, escape)).startswith(f"{INDEX}: tensor {Q!r}")
    for value in ({}, [], None, "x"): assert "weight_map" in case(lambda i: i.__setitem__("weight_map", value))

def test_links(write_gpt_oss, tmp_path):
    "Links are followed, as Hugging Face's cache needs it; what is no file is refused under the name of the shard"
    folder, a = write_gpt_oss(shards=2), "model-00001-of-00002.safetensors"
    (folder/a).rename(tmp_path/"blob")
    for target in "nowhere", a:
        (folder/a).symlink_to(target)
        assert refusal(folder).startswith(f"{a}: ")
        (folder/a).unlink()
    (folder/a).symlink_to(tmp_path/"blob")
    load(folder)
    (folder/a).unlink()
    (folder/a).mkdir()
    assert refusal(folder).startswith(f"{a}: ")

def test_generation_config(write_gpt_oss):
    "The other file that names end tokens"
    folder = write_gpt_oss()
    for text, words in ('{"eos_token_id": [3, 96]}', "generation_config.json"), ("[3]", "generation_config.json"), ('{"eos_token_id": "3"}', "generation_config.json: eos_token_id '3'"):
        (folder/"generation_config.json").write_text(text)
        assert words in refusal(folder)

def agrees(path):
    "We accept a file only if the library does, and never fail in another way"
    try: entries = read_header(path)
    except CheckpointError as e: return str(e).startswith(path.name)
    with safe_open(path, framework="pt") as f:
        assert sorted(f.keys()) == sorted(entries)
        for k, e in entries.items(): assert tuple(f.get_slice(k).get_shape()) == e.shape
    return True

small = dict(a=torch.arange(6, dtype=torch.bfloat16).view(2, 3), b=torch.zeros(3), c=torch.tensor([1, 2, 3], dtype=torch.uint8))

@fuzz
@given(st.data())
def test_fuzzed_bytes(tmp_path, data):
    "Random bytes written anywhere, and random cuts"
    path = tmp_path/"fuzzed.safetensors"
    save_file(small, path)
    raw = bytearray(path.read_bytes())
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(raw)-1), st.integers(0, 255)), max_size=4)): raw[at] = byte
    path.write_bytes(raw[:data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))])
    assert agrees(path)

values = st.recursive(st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=3) | st.sampled_from(["BF16", "U8"]),
                      lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=2), x, max_size=2), max_leaves=4)

@fuzz
@given(name=st.sampled_from("abc"), key=st.sampled_from(["dtype", "shape", "data_offsets", None, "more"]), value=values)
def test_fuzzed_header(tmp_path, name, key, value):
    "Any JSON anywhere in the header"
    path = tmp_path/"fuzzed.safetensors"
    save_file(small, path)
    rewrite(path, lambda h: h.__setitem__(name, value) if key is None else h[name].__setitem__(key, value))
    assert agrees(path)

@fuzz
@given(st.data())
def test_fuzzed_config(write_gpt_oss, data):
    "Any JSON in any field of config.json: a ModelConfig or a CheckpointError, nothing else"
    d = write_gpt_oss.json()
    field = data.draw(st.sampled_from([*d, "rope_parameters", "dtype", "bos_token_id"]))
    folder = write_gpt_oss(d) if data.draw(st.booleans()) else write_gpt_oss(d, {})
    if field == "rope_scaling" and data.draw(st.booleans()): d[field][data.draw(st.sampled_from(list(d[field])))] = data.draw(values)
    else: d[field] = data.draw(values)
    (folder/"config.json").write_text(json.dumps(d))
    try: read_config(folder)
    except CheckpointError as e: assert str(e).startswith("config.json")

MEMORY = """
import sys, torch
from simplellm.checkpoint import Checkpoint
from simplellm.models import load_weights, read_config
def peak(): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))/1024
torch.cat([torch.zeros(100).bfloat16().to("meta")]).float(); torch.zeros(100).bfloat16().aminmax() # imports what it needs
c = Checkpoint(sys.argv[1])
before = peak()
load_weights(c, read_config(c), device="meta", dequantize=False)
print(peak() - before)
"""

@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's own peak from /proc")
def test_memory(write_gpt_oss):
    "Loading for another device needs about one shard of host memory, not the sum of them"
    d = write_gpt_oss.json(vocab_size=20_000, hidden_size=256, intermediate_size=512, num_local_experts=64,
                           num_hidden_layers=5, layer_types=["full_attention"]*5)
    folder = write_gpt_oss(d, write_gpt_oss.tensors(d), shards=6)
    sizes = [f.stat().st_size/2**20 for f in folder.glob("*.safetensors")]
    out = subprocess.run([sys.executable, "-c", MEMORY, folder], capture_output=True, text=True, check=True)
    assert float(out.stdout) < max(sizes) + 8, (out.stdout, sizes)
    assert max(sizes) < sum(sizes)/2
    shutil.rmtree(folder)

def test_empty_tensors(tmp_path):
    "Tensors without elements take no bytes and overlap nothing"
    t = dict(a=torch.zeros(0, 3), b=torch.ones(2), c=torch.zeros(2, 0), scalar=torch.tensor(5.0))
    save_file(t, tmp_path/SINGLE)
    c = Checkpoint(tmp_path)
    assert all(torch.equal(c.get(k), x) for k, x in t.items())
