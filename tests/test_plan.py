"The plan against real tensors and against a floor computed apart"
from dataclasses import replace
import pytest, torch
from simplellm.async_engine import LLM
from simplellm.checkpoint import Checkpoint
from simplellm.config import EngineConfig
from simplellm.cudagraph import Graphs, bucket_sizes
from simplellm.flash import LONG, MANY
from simplellm.models import load_model, load_weights, read_config, tiny_path
from simplellm.mxfp4 import MXFP4
from simplellm.memory import (LAYER, budget, cache_blocks, check_memory, concurrency, fixed_bytes, flags_that_fit, gpu_memory, graph_bytes,
                              held_bytes, measure_step, refuse_too_large, rehearsals, smallest_memory, spread, weight_bytes)
from simplellm.plan import ceiling, distinct_experts, plan, step_bytes
from simplellm.synthetic import CONFIGS, Synthetic, write_checkpoint

def config_of(name): return read_config(Synthetic(name, device="cpu"))

def test_shipped_model_weighs_what_its_files_hold():
    files, size = Checkpoint(tiny_path()), weight_bytes(read_config(tiny_path()))
    assert sum(size.values()) == sum(e.stop - e.start for e in files.entries.values())
    weights = load_weights(files, read_config(files), dequantize=False)
    nbytes = lambda w: sum(x.nbytes for x in w) if isinstance(w, MXFP4) else w.nbytes
    assert size["embedding"] == nbytes(weights["embed"])
    assert size["experts"] == sum(nbytes(w) for k, w in weights.items() if "gate_up_proj" in k or "down_proj" in k)

def test_weights_in_the_kernels_order_weigh_what_is_planned(write_gpt_oss):
    pytest.importorskip("triton")
    from simplellm.kernels.mxfp4 import Prepared, prepare
    nbytes = lambda w: w.words.nbytes + w.scales.nbytes if isinstance(w, Prepared) else w.nbytes
    for H, I in (64, 64), (96, 160): # two groups of 32 in a row are padded to four scales; three and five also to pairs
        d = write_gpt_oss.json(hidden_size=H, intermediate_size=I)
        files = Checkpoint(write_gpt_oss(d, write_gpt_oss.tensors(d), name=f"x{H}"))
        weights = load_weights(files, read_config(files), dequantize=False, prepare=prepare)
        assert held_bytes(read_config(files)) == sum(map(nbytes, weights.values())) > weight_bytes(read_config(files)).total()
    big = config_of("gpt-oss-120b")
    assert held_bytes(big) - weight_bytes(big).total() == 36 * 128 * (5760 + 2880) * 2 and budget(big, EngineConfig(), 80e9)["weights"] == held_bytes(big)

def test_written_checkpoint_weighs_as_planned(tmp_path):
    source = Synthetic(tiny_path(), layers=3, seed=1, device="cpu")
    folder = write_checkpoint(source, tmp_path/"x", progress=False)
    written = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert 0 < written - sum(weight_bytes(read_config(folder)).values()) < 20_000  # the headers

@pytest.mark.parametrize("batch, experts, gb, speed", [(1, 4, 5.03, 855), (8, 28.7, 17.0, 2023), (64, 111, 57.9, 4752), (256, 128, 71.3, 15400)])
def test_floor(batch, experts, gb, speed):
    c = config_of("gpt-oss-120b")
    assert distinct_experts(c, batch) == pytest.approx(experts, rel=3e-3)
    assert sum(step_bytes(c, batch, 640).values()) / 1e9 == pytest.approx(gb, rel=2e-3)
    assert ceiling(c, batch, 640, 4.3e12) == pytest.approx(speed, rel=3e-3)

def test_dense_parts():
    for name, gb in ("gpt-oss-120b", 3.10), ("gpt-oss-20b", 2.44): assert weight_bytes(config_of(name))["dense"] / 1e9 == pytest.approx(gb, abs=.005)
    c = config_of("gpt-oss-120b")
    assert weight_bytes(c)["experts"] / 36 / 128 == pytest.approx(13.24e6, rel=1e-3)

def test_a_configuration_as_a_dict():
    assert plan(CONFIGS["gpt-oss-20b"])["Weights"] == plan("gpt-oss-20b")["Weights"]

def test_cache_is_the_engines():
    "As many bytes as the cache that a model makes"
    model, e = load_model(device="cpu"), EngineConfig(kv_cache_dtype="float32")
    c = model.config
    left = budget(c, e, 80e9)["cache"]
    n = concurrency(c, e, 80e9, e.block_size)  # requests of one block
    size = model.new_cache(3, e.block_size).nbytes / 3
    assert n * size <= left < (n + 1) * size

@pytest.mark.parametrize("name, memory", [("gpt-oss-120b", 80e9), ("gpt-oss-120b", 72e9), ("gpt-oss-20b", 18e9), ("gpt-oss-20b", 24e9), ("gpt-oss-120b", 141e9)])
@pytest.mark.parametrize("length", [None, 1128, 20000])
def test_recommended_flags_fit(name, memory, length):
    c, e = config_of(name), EngineConfig(max_model_len=length)
    longest = length or c.max_position
    for flags in flags_that_fit(c, e, memory):
        new = replace(e, **flags)
        assert concurrency(c, new, memory, new.max_model_len or c.max_position) >= 1, flags
    least = smallest_memory(c, e)
    assert concurrency(c, e, least + 10, longest) == 1 and concurrency(c, e, least - 1e3, longest) == 0
    titles = " ".join(plan(name, memory, max_model_len=length))
    assert ("do not fit" in titles) == (memory < least)

def test_eighty_gigabytes_hold_what_is_promised():
    e = EngineConfig(max_model_len=1128, max_num_seqs=64, max_num_batched_tokens=1024, gpu_memory_utilization=.95)
    assert concurrency(config_of("gpt-oss-120b"), e, 80e9, 1128) >= 64

def test_fixed_tensors_of_graphs_are_counted_exactly():
    model = load_model(device="cpu")
    for rows, longest, size in (3, 100, 16), (1, 128, 32), (70, 33, 16):
        graphs = Graphs(model, model.new_cache(2, size), rows, longest)
        tensors = [*vars(graphs.batch).values(), *vars(graphs.wishes).values(), graphs.logits]
        assert fixed_bytes(model.config, EngineConfig(max_num_seqs=rows, max_model_len=longest, block_size=size)) == sum(x.nbytes for x in tensors if torch.is_tensor(x))

def test_graphs_cost_by_their_number_and_nothing_without_them():
    c, e = config_of("gpt-oss-120b"), EngineConfig(max_model_len=1128)
    assert budget(c, replace(e, enforce_eager=True), 80e9)["graphs"] == 0
    assert budget(c, e, 80e9)["graphs"] == graph_bytes(c, e) > len(bucket_sizes(256)) * c.num_layers * LAYER
    assert graph_bytes(c, replace(e, max_num_seqs=64)) < graph_bytes(c, e)
    with pytest.raises(ValueError, match=r" 0\.00 GB graphs \+ 1\.00 GB CUDA"): check_memory(c, replace(e, enforce_eager=True), 48e9)

def test_command_line(capsys, tmp_path):
    from simplellm.cli import app
    for args, expected in ((["plan", "gpt-oss-120b", "--memory", "80"], ["855 tok/s", "65.25 GB", "on a GPU 65.33 GB", "weights 65.33 GB exact", "73,728 bytes", "do not fit", "max_model_len="]),
                           (["plan", "--memory", "24", "--max-model-len", "512"], ["512 tokens each"]),
                           (["plan", "--length", "100", "--length", "2000", "--batch", "3", "--batch", "1000"], ["100 tokens each", "2,000 tokens each", "batch 3 ", "batch 1,000"]),
                           (["plan", "gpt-oss-20b", "--kv-cache-dtype", "float32", "--block-size", "32", "--enforce-eager"], ["98,304 bytes", "per block of 32", "graphs 0.00 GB"]),
                           (["synth", str(tiny_path()), str(tmp_path/"x"), "--layers", "1", "--seed", "2"], [])):
        app(args, standalone_mode=False)
        out = " ".join(capsys.readouterr().out.split())
        for text in expected: assert text in out
        if "--length" in args: assert "1,128" not in out and "batch 64" not in out
    assert read_config(tmp_path/"x").num_layers == 1
    with pytest.raises(ValueError, match="max_position"): app(["plan", "--max-model-len", "99999"], standalone_mode=False)
    with pytest.raises(ValueError, match="length=5000"): app(["plan", "--length", "5000"], standalone_mode=False)
    with pytest.raises(ValueError, match="a folder with config.json"): app(["plan", "Qwen/Qwen2.5-0.5B"], standalone_mode=False)

def test_a_wider_cache_lowers_the_ceiling():
    floor = lambda **settings: [rows["batch 64"][2] for title, rows in plan("gpt-oss-20b", context=8000, batches=[64], **settings).items() if "Floor" in title]
    assert floor() == floor(kv_cache_dtype="bfloat16") != floor(kv_cache_dtype="float32")

# --- what the engine asks of the same numbers

def test_a_model_that_does_not_fit_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(79e9), int(80e9)))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    with pytest.raises(ValueError, match=r"65\.33 GB weights .* max_model_len=32768.* a GPU with 8\d GB"): LLM("synthetic:gpt-oss-120b", device="cuda")
    with pytest.raises(ValueError, match="layers=12"): check_memory(config_of("gpt-oss-120b"), EngineConfig(max_model_len=512), 29e9)
    def half(device): # PyTorch's takes a number, or None for the current device, and no "cuda"
        assert device is None or type(device) is int
        return .5
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", half)
    assert gpu_memory() == (int(40e9), int(40e9))
    with pytest.raises(ValueError, match=r"of 40\.00 GB"): LLM("synthetic:gpt-oss-120b", device="cuda")

def test_what_an_engine_has_left_is_no_reason_to_refuse_the_next(monkeypatch):
    "PyTorch keeps freed memory in reserve, and gives it back when asked"
    held = [int(70e9)]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(79e9) - held[0], int(80e9)))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held[0])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.clear() or held.append(0))
    refuse_too_large(EngineConfig(max_model_len=1024), config_of("gpt-oss-120b"), torch.bfloat16, "cuda")

def test_what_is_taken_counts():
    c, e = config_of("gpt-oss-120b"), EngineConfig(max_model_len=1128, max_num_seqs=64, max_num_batched_tokens=1024, gpu_memory_utilization=.95)
    check_memory(c, e, 80e9, int(5e9))
    with pytest.raises(ValueError, match="20.00 GB of them taken"): check_memory(c, e, 80e9, int(20e9))
    with pytest.raises(ValueError, match="cache"): check_memory(c, replace(e, num_blocks=10**5), 80e9)

@pytest.mark.parametrize("free, total, utilization, peak, graphs, block, blocks", [
    (15, 80, .9, 2, 1, 1, 4), (80, 80, 1, 0, 0, 7, 11), (8, 80, .9, 0, 0, 1, 0), (2, 80, .9, 0, 0, 1, 0), (70, 80, .5, 10, 5, 2, 7)])
def test_cache_blocks(free, total, utilization, peak, graphs, block, blocks):
    assert cache_blocks(free, total, utilization, peak, graphs, block) == blocks
    assert (total - free) + peak + graphs + blocks * block <= total * utilization or blocks == 0

def test_the_largest_step_is_measured_on_top_of_what_is_there(monkeypatch):
    "With counters in the place of CUDA's: what the model takes for a moment, not what was there before"
    model, e, used, sizes = load_model(device="cpu"), EngineConfig(max_num_seqs=3, max_num_batched_tokens=8), dict(now=1000, peak=10**9), []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: used["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: used["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: used.update(peak=used["now"]))
    class Watched:
        def __getattr__(self, name): return getattr(model, name)
        def states(self, batch, kv):
            sizes.append((len(batch.seq_lens), len(batch)))
            used["peak"] = max(used["peak"], 1000 + len(batch))
            return model.states(batch, kv)
    assert measure_step(Watched(), e, 128, torch.float32) == 8 and sizes[-4:] == [(3, 8)] * 4 # as many tokens and rows as may be, for each kind of wish
    assert len(sizes) == 4 + len(rehearsals(e, 128)) and (1, 8) in sizes

@pytest.mark.parametrize("e, longest", [(EngineConfig(), 131072), (EngineConfig(max_num_seqs=64, max_num_batched_tokens=1024), 1128), (EngineConfig(max_num_batched_tokens=1, max_num_seqs=1), 7), (EngineConfig(max_num_seqs=1024), 4096),
                                        (EngineConfig(max_num_seqs=1024, max_num_batched_tokens=700), 4096)])
def test_rehearsals_are_steps_that_may_be(e, longest):
    steps = rehearsals(e, longest)
    assert all(new >= 1 and past >= 0 and new + past <= longest for rows in steps for new, past in rows)
    assert all(sum(new for new, _ in rows) <= e.max_num_batched_tokens for rows in steps)
    flash = [rows for rows in steps if max(new for new, _ in rows) >= LONG and len(rows) > MANY] # another variant of flash-attn
    assert bool(flash) == (e.max_num_seqs > MANY and e.max_num_batched_tokens >= LONG + MANY)
    assert max(len(rows) for rows in steps) == min(e.max_num_seqs, e.max_num_batched_tokens) and max(past for rows in steps for _, past in rows) == longest - 1
    assert spread(2048, 2, 1128) == [(1024, 0)] * 2 and spread(32, 1, 20) == [(20, 0)] # no sequence is longer than the longest
