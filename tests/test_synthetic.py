"A synthetic checkpoint is the same bits in files, on devices and in pieces, and transformers runs it"
import json, math
import pytest, torch
from safetensors.torch import load_file
from simplellm import LLM
from simplellm.batch import make_batch
from simplellm.checkpoint import INDEX, Checkpoint
from simplellm.models import load_model, load_weights, read_config
from simplellm.mxfp4 import MXFP4
from simplellm.synthetic import CONFIGS, Synthetic, first_layers, is_synthetic, open_synthetic, piece, synthetic_tensor, write_checkpoint

SMALL = dict(hidden_size=64, intermediate_size=96, head_dim=16, num_attention_heads=4, num_key_value_heads=2, num_local_experts=8,
             vocab_size=200, num_hidden_layers=4, eos_token_id=2, pad_token_id=1, max_position_embeddings=512)

@pytest.fixture(scope="module")
def config(): return first_layers(CONFIGS["gpt-oss-120b"], 4) | SMALL

@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    return write_checkpoint(Synthetic(config, seed=5, device="cpu", limit=60_000), tmp_path_factory.mktemp("synthetic")/"x", progress=False)

def test_file_is_computation(config, folder):
    source, written = Synthetic(config, seed=5, device="cpu"), Checkpoint(folder)
    assert sorted(source.names) == sorted(written.names) and len({e.file for e in written.entries.values()}) > 2
    for name in source.names:
        assert written.dtype(name) == source.dtype(name) and written.get(name).equal(source.get(name)), name
    assert read_config(written) == read_config(source)
    a, b = (load_weights(c, read_config(c), dequantize=False) for c in (source, written))
    for k in a: assert all(map(torch.equal, a[k], b[k])) if isinstance(a[k], MXFP4) else a[k].equal(b[k]), k

def test_index_is_hugging_faces(folder):
    "Read without our code: every tensor where the index says, and their bytes in all"
    index = json.loads((folder/INDEX).read_text())
    found = {}
    for file in sorted(folder.glob("*.safetensors")): found |= {k: (file.name, v) for k, v in load_file(file).items()}
    assert {k: f for k, (f, _) in found.items()} == index["weight_map"]
    assert sum(v.nbytes for _, v in found.values()) == index["metadata"]["total_size"]

@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_pieces_make_the_whole(config, size):
    source = Synthetic(config, seed=3, device="cpu")
    for row in list(source.rows.values())[:22]:
        whole = synthetic_tensor(row, 3)
        n = min(whole.numel(), 40 * size)
        parts = [piece(row, 3, i, min(i + size, n)) for i in range(0, n, size)]
        assert torch.cat(parts).equal(whole.flatten()[:n]), row.theirs
        assert whole.equal(synthetic_tensor(row, 3, size=1001)), row.theirs

def test_tensors_differ(config):
    a, b = (Synthetic(config, seed=s, device="cpu") for s in (0, 1))
    big = [n for n in a.names if math.prod(a.shape(n)) > 500]
    assert not any(a.get(n).equal(b.get(n)) for n in big)
    q = [a.get(f"model.layers.{i}.self_attn.q_proj.weight") for i in range(4)]
    assert len({x.view(torch.int16).sum().item() for x in q}) == 4

@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_values_are_exact_and_of_their_size(config, dtype):
    "The same numbers in every type, with the spread that the rules ask for"
    source, exact = Synthetic(config | dict(torch_dtype=dtype), device="cpu"), Synthetic(config | dict(torch_dtype="float32"), device="cpu")
    for name in source.names:
        x = source.get(name)
        assert x.dtype == (torch.uint8 if name.endswith(("_blocks", "_scales")) else getattr(torch, dtype))
        assert x.float().equal(exact.get(name).float())
    q = source.get("model.layers.0.self_attn.q_proj.weight").float()
    assert abs(math.log2(q.std() * 64**.5)) < .6
    assert source.get("model.layers.0.mlp.experts.down_proj_scales").max() <= 128

def test_dense_experts(config):
    "A config.json without quantization gets dense experts, transposed as transformers keeps them"
    d = {k: v for k, v in config.items() if k != "quantization_config"}
    source = Synthetic(d, layers=1, device="cpu")
    assert source.shape("model.layers.0.mlp.experts.gate_up_proj") == (8, 64, 192)
    assert abs(math.log2(source.get("model.layers.0.mlp.experts.gate_up_proj").float().std() * 64**.5)) < .6

def test_fewer_layers_have_fewer_dense_ones():
    d = dict(num_hidden_layers=4, layer_types=list("abcd"), mlp_only_layers=[1, 3])
    assert first_layers(d, 2) == dict(num_hidden_layers=2, layer_types=["a", "b"], mlp_only_layers=[1])

def test_transformers_gives_our_logits(folder):
    transformers = pytest.importorskip("transformers")
    judge = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(3, 200, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): theirs = judge(ids).logits[0]
    model = load_model(folder, device="cpu")
    kv = model.new_cache(10)
    ours = model(make_batch([(ids[0].tolist(), 0, list(range(10)), "all")], kv.block_size), kv)
    assert theirs.std() > .5 and (ours - theirs).abs().max() < 1e-3

def test_llm_from_a_name(config, folder, tmp_path):
    "The same tokens from files and from nothing; a name with options"
    (tmp_path/"config.json").write_text(json.dumps(config))
    name = f"synthetic:{tmp_path}/config.json?seed=5"
    assert is_synthetic(name) and not is_synthetic(str(folder))
    ask = dict(max_tokens=12, temperature=0.0, ignore_eos=True)
    with LLM(name, device="cpu", max_model_len=64) as a, LLM(str(folder), device="cpu", max_model_len=64, skip_tokenizer_init=True) as b:
        assert a.tokenizer is None
        x, y = (llm.generate([[3, 4, 5], [99] * 20], use_tqdm=False, **ask).result() for llm in (a, b))
        assert [o.outputs[0].token_ids for o in x] == [o.outputs[0].token_ids for o in y] and len(x[0].outputs[0].token_ids) == 12

@pytest.mark.parametrize("bad", ["synthetic:gpt-oss-1b", "synthetic:gpt-oss-20b?layer=1", "synthetic:gpt-oss-20b?layers=99", "synthetic:gpt-oss-20b?seed=-1"])
def test_names_that_are_refused(bad):
    with pytest.raises(ValueError): open_synthetic(bad, "cpu")

def test_folder_is_not_overwritten(config, folder):
    with pytest.raises(ValueError, match="without safetensors"): write_checkpoint(Synthetic(config, device="cpu"), folder, progress=False)

@pytest.mark.parametrize("name, layers, experts, gb", [("gpt-oss-120b", 36, 128, 65.25), ("gpt-oss-20b", 24, 32, 13.76)])
def test_published_models(name, layers, experts, gb):
    "Sizes of the published checkpoints, without computing a tensor"
    source = Synthetic(name, device="cpu")
    c = read_config(source)
    assert (c.num_layers, c.num_experts, c.top_k, c.windows[:2], c.dtype) == (layers, experts, 4, (128, None), "bfloat16")
    assert c.eos_token_ids == (200002, 199999, 200012) and c.rope.factor == 32 and not c.rope.truncate
    assert abs(sum(e.stop - e.start for e in source.entries.values()) / 1e9 - gb) < .01

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same_bits(config):
    a, b = (Synthetic(config, device=d) for d in ("cpu", "cuda"))
    for name in a.names: assert b.get(name).cpu().equal(a.get(name)), name
