"Workloads that are what they say, figures that anybody can compute again, and the command"
import json, math, subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from simplellm.async_engine import open_model
from simplellm.bench import (OWED, PARTS, Case, ablations, bench, comparison, equal_rows, figures, fit_model, kernel_rows,
                             kernel_table, launch_bytes, launched, make_cases, medians, micro, owed_commands, pick_ops,
                             plot, read_lines, run_owed, serve, share_of_floor, stage_kinds, tables, with_peak)
from simplellm.config import EngineConfig
from simplellm.cudagraph import padding_wishes
from simplellm.engine import Engine
from simplellm.memory import check_memory, concurrency
from simplellm.models import load_model, load_weights, read_config, tiny_path
from simplellm.ops import choose_ops
from simplellm.plan import step_bytes
from simplellm.sampling import SamplingParams
from simplellm.transformer import Transformer
from simplellm.workloads import SHAPES, due_times, find_shape, make_workload

PARAMS = SamplingParams(temperature=1, ignore_eos=True)
AGENTS = find_shape("agent-session", sessions=2, turns=2, output=3)

WEIGHTS = (tiny_path()/"model.safetensors").stat().st_size

@pytest.fixture(scope="module")
def model(): return load_model(device="cpu")

@pytest.fixture(scope="module")
def lines():
    cases = [Case("agents", AGENTS), Case("forgetful", AGENTS, engine=dict(enable_prefix_caching=False))]
    return list(bench(None, cases, runs=1, progress=False, command="simplellm bench"))

# workloads

@pytest.mark.parametrize("workload", SHAPES)
@pytest.mark.parametrize("preset", ["short", "mid", "long"])
def test_workload_has_the_stated_shape(workload, preset):
    shape = find_shape(workload, preset)
    work = make_workload(shape, 5000, seed=3)
    assert len(work) == shape.sessions and {len(s) for s in work} == {shape.turns}
    assert len({s[0].tokens[:shape.shared] for s in work}) == 1  # the same beginning, if there is one
    own, later = [len(s[0].tokens) - shape.shared for s in work], [len(t.tokens) for s in work for t in s[1:]]
    answers = [t.output for s in work for t in s]
    for lengths, mean in ((own, shape.first), (later, shape.further), (answers, shape.output)):
        if not lengths: continue
        assert all(mean // 4 <= n <= mean * 4 for n in lengths)
        if not shape.spread: assert set(lengths) == {mean}
        elif len(lengths) >= 100: assert np.mean(lengths) == pytest.approx(mean, rel=.3) and len(set(lengths)) > 8
    assert all(0 <= i < 5000 for s in work for t in s for i in t.tokens)

def test_what_the_names_promise():
    assert find_shape("alpaca").sessions == 512 and find_shape("alpaca").turns == 1
    assert find_shape("agent-session").shared > 0 and find_shape("chat-serving").turns > 1 and find_shape("uniform").spread == 0
    for presets in SHAPES.values():  # each preset asks for more
        sizes = [s.sessions * s.turns * (s.shared + s.first + s.output) for s in presets.values()]
        assert sizes == sorted(sizes)

def test_seed_decides_lengths_and_run_decides_ids():
    shape = find_shape("chat-serving")
    lengths = lambda work: [[(len(t.tokens), t.output) for t in s] for s in work]
    one = make_workload(shape, 700, seed=1)
    assert one == make_workload(shape, 700, seed=1) and one != make_workload(shape, 700, seed=1, run=1)
    assert lengths(one) == lengths(make_workload(shape, 700, seed=1, run=1)) != lengths(make_workload(shape, 700, seed=2))
    assert one[0][0].tokens[:6] == (212, 216, 548, 391, 611, 217)  # everywhere and always

def test_tokens_of_a_prompt_are_distinct_where_they_can_be():
    for n, vocab in ((1024, 1024), (128, 201088)):
        for session in make_workload(find_shape("uniform", sessions=3, first=n), vocab): assert len(set(session[0].tokens)) == n
    turn, = make_workload(find_shape("uniform", sessions=1, first=1025), 1024)[0]
    assert len(turn.tokens) == 1025 and len(set(turn.tokens)) < 800 # with replacement: 1 - 1/e of them on average

def test_arrivals():
    assert due_times("burst", 3) == [0, 0, 0] and due_times("closed:2", 4) == [0, 0, math.inf, math.inf]
    at = due_times("poisson:5", 5000, seed=1)
    gaps = np.diff([0] + at)
    assert at == due_times("poisson:5", 5000, seed=1) != due_times("poisson:5", 5000, seed=2)
    assert gaps.min() > 0 and gaps.mean() == pytest.approx(.2, rel=.05) and gaps.std() == pytest.approx(.2, rel=.08)

@pytest.mark.parametrize("wrong", ["", "poisson", "poisson:0", "poisson:inf", "poisson:nan", "closed:0", "closed:1.5", "burst:1", "later"])
def test_wrong_arrivals(wrong):
    with pytest.raises(ValueError, match="arrival=.*closed:N"): due_times(wrong, 3)

def test_wrong_workloads():
    with pytest.raises(ValueError, match="workload='x'.*chat-serving"): find_shape("x")
    with pytest.raises(ValueError, match="preset='x'.*mid"): find_shape("uniform", "x")
    with pytest.raises(ValueError, match="output=0"): find_shape("uniform", output=0)

# serving

def test_sessions_share_what_they_hold(lines):
    agents, forgetful = lines
    assert agents["figures"]["prefix_hit_rate"] > .3 and forgetful["figures"]["prefix_hit_rate"] == 0
    later = [r for r in agents["requests"] if r["turn"]]
    assert all(r["cached"] >= AGENTS.shared for r in later)
    work = make_workload(AGENTS, 729, seed=0)
    for r in agents["requests"]:  # a prompt is all that the session held, and what is new
        before = work[r["session"]][:r["turn"]]
        assert r["prompt"] == sum(len(t.tokens) + t.output for t in before) + len(work[r["session"]][r["turn"]].tokens)
        assert len(r["times"]) == work[r["session"]][r["turn"]].output
    for line in lines: assert sum(n for *_, n, _ in line["steps"]) == sum(r["prompt"] - r["cached"] + len(r["times"]) - 1 for r in line["requests"])

def test_a_turn_follows_the_answer_before(lines):
    for r in lines[0]["requests"]:
        assert 0 <= r["sent"] < r["times"][0] and r["times"] == sorted(r["times"])
        before = [q for q in lines[0]["requests"] if (q["session"], q["turn"] + 1) == (r["session"], r["turn"])]
        assert all(r["sent"] == q["times"][-1] for q in before)

def test_closed_keeps_a_number_busy(model):
    work = make_workload(find_shape("uniform", sessions=4, first=8, output=3), 729)
    requests, steps = serve(Engine(model), work, due_times("closed:2", 4), PARAMS)
    assert max(rows for *_, rows in steps) == 2 and len(requests) == 4
    ends = sorted(r["times"][-1] for r in requests)
    assert [r["sent"] for r in requests[2:]] == ends[:2]

def test_poisson_waits_for_arrivals(model):
    work, due = make_workload(find_shape("uniform", sessions=2, first=8, output=2), 729), [0.0, .8]
    requests, _ = serve(Engine(model), work, due, PARAMS)
    assert [r["sent"] for r in requests] == due and requests[1]["times"][0] > .8

def test_preemptions_are_counted(model):
    work = make_workload(find_shape("uniform", sessions=2, first=16, output=20), 729)
    engine = Engine(model, EngineConfig(num_blocks=4, enable_prefix_caching=False))
    requests, steps = serve(engine, work, [0.0, 0.0], PARAMS)
    assert figures(requests, steps)["preemptions"] == sum(r["preempted"] for r in requests) > 0
    assert [len(r["times"]) for r in requests] == [20, 20]

def test_failure_leaves_the_engine_whole(model):
    engine = Engine(model)
    with pytest.raises(ValueError, match="max_model_len|leaves no room|need"): serve(engine, make_workload(find_shape("uniform", sessions=1, first=5000), 729), [0.0], PARAMS)
    assert "update" not in vars(engine.scheduler)

# figures

def test_figures_from_the_file_alone(lines, tmp_path):
    file = tmp_path/"a.jsonl"
    file.write_text("".join(json.dumps(l) + "\n" for l in lines))
    for line in read_lines([file]):
        requests, f = line["requests"], line["figures"]
        assert figures(requests, line["steps"]).items() <= f.items()
        seconds = max(t for r in requests for t in r["times"])  # a burst begins at 0
        tokens, prompt = sum(len(r["times"]) for r in requests), sum(r["prompt"] for r in requests)
        assert f["requests_per_s"] == pytest.approx(len(requests) / seconds) and f["output_tok_per_s"] == pytest.approx(tokens / seconds)
        assert f["total_tok_per_s"] == pytest.approx((tokens + prompt) / seconds)
        first = sorted(1000 * (r["times"][0] - r["sent"]) for r in requests)
        assert f["ttft_ms_mean"] == pytest.approx(np.mean(first)) and f["ttft_ms_p50"] == pytest.approx(np.median(first)) and f["ttft_ms_p99"] <= first[-1]
        gaps = [1000 * (b - a) for r in requests for a, b in zip(r["times"], r["times"][1:])]
        assert f["itl_ms_mean"] == pytest.approx(np.mean(gaps)) and f["itl_ms_p95"] == pytest.approx(np.percentile(gaps, 95))
        assert f["turn_ms_mean"] == pytest.approx(np.mean([1000 * (r["times"][-1] - r["sent"]) for r in requests]))
        decode = [(e - b, n) for b, e, n, rows in line["steps"] if n == rows]
        assert f["decode_tok_per_s"] == pytest.approx(sum(n for _, n in decode) / sum(t for t, _ in decode))

def test_line_says_what_it_belongs_to(lines):
    line = lines[0]
    assert line["command"] == "simplellm bench" and line["run"] == 0 and line["settings"]["engine"]["block_size"] == 16
    assert {"torch", "simplellm", "python"} <= line["machine"]["versions"].keys() and {"device", "cores", "load"} <= line["machine"].keys()
    assert line["ops"]["attention"] == "simplellm.attention.paged_attention" and line["settings"]["shape"]["turns"] == 2
    assert line["experts"]["rows"] == 2 and 2 <= line["experts"]["experts"] <= 4 and line["bandwidth"] > 0
    f = line["figures"]
    assert f["ready_s"] > f["load_s"] > 0 and f["load_gb_per_s"] * f["load_s"] == pytest.approx(WEIGHTS/1e9, rel=.01)
    assert comparison(lines)["read_bandwidth_gb_per_s"][0] != "-" and [n for n, _ in line["roof"]] == [2**i for i in range(9)]

def test_floor(model, lines):
    "By hand, from what the plan counts"
    c, line = model.config, lines[1]
    context = np.average([r["prompt"] + (len(r["times"]) - 1) / 2 for r in line["requests"]], weights=[len(r["times"]) for r in line["requests"]])
    decode = [(e - b, rows) for b, e, n, rows in line["steps"] if n == rows]
    def nbytes(rows):
        parts = step_bytes(c, rows, float(context), 4)
        return parts["dense"] + parts["cache"] + parts["experts"] * line["experts"]["experts"] / line["experts"]["uniform"]
    share = sum(nbytes(rows) for _, rows in decode) / line["bandwidth"] / sum(t for t, _ in decode)
    assert line["figures"]["share_of_floor"] == pytest.approx(share) and 0 < share < 1
    assert share_of_floor(c, line["requests"], [(0, 1, 9, 2)], 1e9, 4) is None  # nothing but prompts

def test_one_token_has_no_gaps():
    f = figures([dict(sent=0.0, prompt=4, cached=0, preempted=0, times=[.5])], [(0, .5, 4, 1)])
    assert "itl_ms_p50" not in f and f["decode_tok_per_s"] is None and f["prefill_tok_per_s"] == 8 and json.dumps(f, allow_nan=False)

# cases

def test_operations_by_stage():
    assert stage_kinds("", "cpu") == {} and set(stage_kinds("reference", "cpu").values()) == {"reference"}
    kinds = stage_kinds("triton,decode=reference,prefill=flash", "cuda")
    assert (kinds.pop("decode"), kinds.pop("prefill")) == ("reference", "flash") and set(kinds.values()) == {"triton"} and "moe" in kinds
    assert stage_kinds("flash", "cuda") == stage_kinds("prefill=flash", "cuda") == {"prefill": "flash"}
    assert stage_kinds("triton,flash", "cuda") == stage_kinds("triton,prefill=flash", "cuda")
    for wrong in ("decode=flash", "=flash", "x=triton", "decode=", "triton,,x"):
        with pytest.raises(ValueError, match="ops="): stage_kinds(wrong, "cuda")

def test_flash_that_is_missing_is_named():
    for text in ("flash", "prefill=flash"):
        with pytest.raises(ValueError, match=f"ops='{text}': expected flash-attn, but"): pick_ops(text, "cpu", torch.float32)

def test_what_is_not_asked_for_stays():
    plain, some = choose_ops("cpu", torch.float32), pick_ops("norm=triton", "cpu", torch.float32)
    changed = {f for f in vars(plain) if getattr(plain, f) is not getattr(some, f)} - {"options", "why", "fused"}
    assert changed == {"rms_norm"} and some.rms_norm.__module__ == "simplellm.kernels.norm" and some.why["rms_norm"] == "asked for: norm=triton"

def test_kernels_need_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"): stage_kinds("norm=triton", "cpu")

def test_stage_runs_what_it_names(model, monkeypatch):
    "Prompts and decodes meet the attention that was asked for"
    import simplellm.bench as b
    seen, greedy = Counter(), SamplingParams(temperature=0, ignore_eos=True)
    plain = b.Ops().attention
    def noted(*args, **options): seen["decode" if args[6] == 1 else "prefill"] += 1; return plain(*args, **options)
    monkeypatch.setattr(b, "triton_ops", lambda: vars(b.Ops()) | dict(attention=noted))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    work, n = make_workload(find_shape("uniform", sessions=1, first=4, output=3), 729), model.config.num_layers
    try:
        for text, expected in (("decode=triton", {"decode": 2*n}), ("prefill=triton", {"prefill": n}), ("triton", {"prefill": n, "decode": 2*n})):
            seen.clear()
            serve(Engine(fit_model(model, None, text)), work, [0.0], greedy)
            assert seen == expected, text
    finally: fit_model(model, None, "")

def test_ablations():
    case = Case("x", AGENTS, engine=dict(enable_prefix_caching=False))
    assert [c.label for c in ablations(case, "cpu")] == ["x", "x, no continuous batching", "x, no fused QKV"]
    names = [c.label.removeprefix("x, no ") for c in ablations(Case("x", AGENTS), "cuda")[1:]]
    assert names[:4] == ["CUDA graphs", "overlap", "prefix cache", "continuous batching"]
    assert {"split-KV", "fused kernels", "fused QKV, nor norm in it", "norm kernel", "rope kernel", "prefill kernel", "decode kernel nor graphs"} <= set(names[4:])
    assert "x, no fused kernels" not in [c.label for c in ablations(Case("x", AGENTS, ops="mlp=reference,moe=reference"), "cuda")]
    last = next(c for c in ablations(Case("x", AGENTS), "cuda") if "moe" in c.label)
    assert stage_kinds(last.ops, "cuda") == {"moe": "reference"} and last.engine == {}

@pytest.mark.parametrize("text, fused", [
    ("", {*PARTS}), ("triton", {*PARTS}), ("fused=off", set()), ("reference", set()), ("decode=reference", {*PARTS}),
    ("norm=reference", {"linear_add", "moe_add"}), ("mlp=reference", {"moe_add"}), ("moe=reference", {"norm_linear", "linear_add"})])
def test_a_stage_takes_along_only_the_fused_kernels_it_is_part_of(text, fused):
    assert pick_ops(text, "cuda", torch.bfloat16).fused.keys() == fused

@pytest.mark.parametrize("stage, gone", [("norm", {"_rms_norm", "_norm_route"}), ("mlp", {"_linear", "_norm_route"}), ("moe", {"_few", "_norm_route"})])
def test_without_a_stage_the_others_stay(model, monkeypatch, stage, gone):
    "The same logits, from all kernels but those of one stage"
    triton = pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run, ops = InterpretedFunction.run, pick_ops(f"triton,{stage}=reference", "cpu", torch.float32)
    weights = load_weights(open_model(None, "cpu"), model.config, torch.float32, torch.device("cpu"), prepare=ops.prepare)
    seen = set()
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, **options: seen.add(self.fn.__name__) or run(self, *args, **options))
    layers = replace(model.config, num_layers=2, windows=model.config.windows[:2])
    batch, kv = equal_rows(model, 2, 1, 5)
    kv.k.normal_(), kv.v.normal_()
    ours, theirs = (Transformer(layers, w, o)(replace(batch, memo={}), kv) for w, o in ((weights, ops), (load_weights(open_model(None, "cpu"), model.config, torch.float32), pick_ops("", "cpu", torch.float32))))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    assert not gone & seen and {"_rope_store", "_attend", "_linear", "_few", "_rms_norm"} - gone <= seen

def test_early_starts_can_be_switched_off(monkeypatch):
    monkeypatch.setattr("simplellm.ops.starts_early", lambda device: True)
    assert [pick_ops(text, "cuda", torch.bfloat16).options for text in ("", "triton", "triton,pdl=off", "pdl=off")] == [dict(pdl=True)] * 2 + [{}] * 2
    assert pick_ops("norm=triton", "cuda", torch.bfloat16).rms_norm.keywords == dict(pdl=True)
    last = next(c for c in ablations(Case("x", AGENTS), "cuda") if c.label == "x, no PDL")
    assert pick_ops("pdl=off,splits=off", "cuda", torch.bfloat16).attention.keywords == dict(split=False)
    assert stage_kinds(last.ops, "cuda") == {} and not pick_ops(last.ops, "cuda", torch.bfloat16).options

def test_every_combination():
    cases = make_cases("uniform", "long", "closed:4", [1, 8], [128, 1024], 1000, ["", "reference"], ["max_num_seqs=8", "enforce_eager=true", "scheduling=static"])
    assert len({c.label for c in cases}) == 8 and {(c.shape.sessions, c.shape.first) for c in cases} == {(1, 128), (1, 1024), (8, 128), (8, 1024)}
    assert EngineConfig(**cases[0].engine) == EngineConfig(max_num_seqs=8, enforce_eager=True, scheduling="static")
    with pytest.raises(ValueError, match="engine='max_seqs=8'"): make_cases("uniform", "short", "burst", [None], [None], None, [""], ["max_seqs=8"])

def test_too_long_for_the_model():
    with pytest.raises(ValueError, match="big='sessions of .* tokens'.*max_model_len=4096"): next(bench(None, [Case("big", find_shape("agent-session", "long"))], progress=False))

# kernels

@pytest.fixture
def launches(monkeypatch):
    "Notes which kernels are launched, with what, and computes nothing"
    triton = pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction
    seen = []
    for kind in InterpretedFunction, triton.JITFunction:
        monkeypatch.setattr(kind, "run", lambda self, *args, **_: seen.append((self.fn.__name__, dict(zip(self.arg_names, args)))))
    return seen

@pytest.mark.parametrize("rows, few", [(1, 64), (9, 64), (9, 8), (20, 64), (40, 64)]) # few: assignments that need no lists
def test_every_kernel_of_a_step_has_bytes(model, launches, monkeypatch, rows, few):
    "gpt-oss launches what the table expects, in its order, and nothing else"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("simplellm.kernels.moe.FEW", few)
    c, ops, held = model.config, pick_ops("triton", "cpu", torch.float32), 99
    weights = load_weights(open_model(None, "cpu"), c, torch.float32, torch.device("cpu"), prepare=ops.prepare)
    m = Transformer(c, weights, ops)
    batch, kv = equal_rows(m, rows, 1, held)
    logits = m(batch, kv)
    ops.sample(logits, padding_wishes(rows, "cpu"))
    counts = Counter(name for name, _ in launches)
    known = launch_bytes(m, rows, held + 1, 4, counts=counts)
    assert {"_attend", "_rope_store", "_rms_norm", "_look", "_choose"} <= counts.keys() <= known.keys()
    assert ("_norm_route" in counts) == (rows <= 16 and 2 * rows <= few) and ("_linear" in counts) == (rows <= 32)
    for name, n in counts.items(): assert n == len(known[name]), name
    table = kernel_rows({name: [1.] * n for name, n in counts.items()}, known, 1)
    assert all(size > 0 for *_, size in table.values()) and {"_rope_store", "_attend all keys"} <= table.keys()
    told = kernel_table_of(m, kv, {name: [2.] * n for name, n in counts.items()} | {"copy": [1.]}, rows, monkeypatch)
    assert all(len(row) == 4 for row in told.values()) and {name for name, row in told.items() if "unknown" in row} == {"copy"}
    share, all_bytes = float(told["_few down" if rows < 33 and 2 * rows <= few else "_many down"][2]), float(told["all of these"][2])
    assert 0 < share < all_bytes and told["not explained"][1] == f"{499 - 2 * sum(counts.values()):,.1f}"
    nbytes = lambda args, *names: sum(args[n].nbytes for n in names if args[n] is not None)
    touched = dict(_linear=("x", "w", "out"), _norm_route=("x", "w"), _rms_norm=("x", "weight", "residual", "y", "total"))
    for name, moved in touched.items():
        sizes = [nbytes(args, *moved) for n, args in launches if n == name]
        assert sizes == pytest.approx([size for _, size in known.get(name, [])][:len(sizes)], rel=.05), name

def kernel_table_of(m, kv, found, rows, monkeypatch):
    "The table that a GPU would print if it launched these"
    monkeypatch.setattr("simplellm.bench.profile_steps", lambda *_: (found, 500.))
    m.device = torch.device("cuda")
    engine = SimpleNamespace(model=m, config=EngineConfig(), runner=SimpleNamespace(kv=kv))
    return kernel_table(engine, [[SimpleNamespace(tokens=[0] * 100)]] * rows, PARAMS, 1)

def test_launches_in_their_order():
    def event(name, start, end, kind="CUDA"):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=SimpleNamespace(name=kind), self_cpu_time_total=1)
    events = [event("_few", 4, 7), event("nvjet_hsh_64x8", 3, 5), event("aten::mm", 1, 2, "CPU"), event("_few", 2, 3), event("splitKreduce", 6, 8)]
    profile = SimpleNamespace(events=lambda: events)
    assert launched(profile, True) == {"_few": [1, 2], "cuBLAS": [2, 1]} and launched(profile, False) == {"aten::mm": [1]}

# memory

@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_each_case_has_its_own_peak():
    large, small, again = (with_peak(call, False)[1] for call in (lambda: torch.ones(2**26).sum(), lambda: None, lambda: torch.ones(2**25).sum()))
    assert large - small > 2e8 and 1e8 < again - small < 2e8

def test_a_system_that_does_not_tell(monkeypatch):
    def refuse(*_): raise PermissionError
    monkeypatch.setattr(Path, "write_text", refuse)
    assert with_peak(lambda: 3, False) == (3, None)

def test_peak_of_a_gpu_begins_anew(monkeypatch):
    used = dict(now=7, peak=99)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: used.update(peak=used["now"]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: used["peak"])
    assert with_peak(lambda: used.update(peak=8), True) == (None, 8) and with_peak(lambda: 3, True) == (3, 7)

# what is owed

@pytest.fixture
def asked(monkeypatch):
    "What the commands of the list would measure, as on a GPU: label -> (model, cases, kernels?)"
    from simplellm import cli
    found = {}
    monkeypatch.setattr("simplellm.bench.bench", lambda name, cases, *_, kernels, **about: found.update({label: (name, cases, kernels)}) or [])
    monkeypatch.setattr(cli, "write_checkpoint", lambda source, folder: found.update({label: (source.path, folder)}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for label, args in owed_commands().items(): cli.app(args, standalone_mode=False)
    return found

def test_the_list_measures_what_is_owed(asked):
    sizes = lambda label: {(c.shape.sessions, c.shape.first, c.shape.output) for c in asked[label][1]}
    assert sizes("gpt-oss-120b") == {(n, p, 1000) for n in (1, 8, 64, 256) for p in (128, 1024)} and asked["gpt-oss-120b"][2]
    assert sizes("prefill") == {(16, 3500, 1)} and sizes("80GB") == {(64, 128, 1000)}
    assert sizes("gpt-oss-20b") == {(n, 128, 1000) for n in (1, 8, 64)} and str(asked["folder"][1]) == asked["gpt-oss-20b"][0]
    assert {n for n, *_ in sizes("llama-3.2-1b")} == {1, 64, 256} and [c.ops for c in asked["qwen2.5-0.5b"][1]] == ["reference", "triton"]
    for n in 1, 64: # with and without each optimisation at both sizes
        labels = [c.label for c in asked["ablations"][1] if c.shape.sessions == n]
        assert len(labels) > 10 and any("no fused kernels" in l for l in labels) and any("no mlp kernel" in l for l in labels)

def test_the_list_fits_an_h200(asked):
    for label, (name, cases, *_) in asked.items():
        if label == "folder": continue
        c = read_config(open_model(name if name.startswith("synthetic:") else "synthetic:gpt-oss-20b", "cpu"))
        for case in cases:
            e, shape = EngineConfig(**case.engine), case.shape
            check_memory(c, e, 150e9)
            assert shape.first + shape.output <= e.max_model_len and concurrency(c, e, 150e9, shape.first + shape.output) >= shape.sessions, case.label
    assert EngineConfig(**asked["80GB"][1][0].engine).gpu_memory_utilization * 150e9 < 80e9

def test_the_list_is_printed(capsys):
    from simplellm.cli import app
    app(["bench", "--owed", "--dry-run", "--json", "h.jsonl", "--plot", "out/h.png"], standalone_mode=False)
    out = capsys.readouterr().out.splitlines()
    assert out[::2] == [f"# {label}" for label in OWED] and all(line.startswith("simplellm ") for line in out[1::2])
    assert out[1].endswith(" --kernels --json h.jsonl --plot out/h-gpt-oss-120b.png") and "'synthetic:gpt-oss-120b?layers=4'" in out[7]
    assert out[9] == "simplellm synth gpt-oss-20b gpt-oss-20b-synthetic"

def test_the_list_needs_a_gpu(monkeypatch):
    from simplellm.cli import app
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(subprocess, "run", lambda *_: pytest.fail("it began"))
    for args, expected in ((["--owed"], "a GPU"), (["--dry-run"], "only with --owed"), (["--owed", "model"], "no model"), (["--owed", "--dry-run", "model"], "no model")):
        with pytest.raises(ValueError, match=f"owed=.*{expected}"): app(["bench", *args], standalone_mode=False)

def test_one_failure_does_not_end_the_list(monkeypatch, tmp_path, capfd):
    "Processes of their own, one file, and the names of those that failed"
    small, file = f"synthetic:{tiny_path()}?layers=1 --sessions 1 --prompt 8 --output 2 --runs 1", tmp_path/"a.jsonl"
    monkeypatch.setattr("simplellm.bench.OWED", {"lost": "bench synthetic:no-such-model", "fine": f"bench {small}"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="^failed: lost$"): run_owed(file)
    line, = read_lines([file])
    assert line["command"].startswith("simplellm bench") and line["command"].endswith(f"--json {file}")
    out, err = capfd.readouterr()
    assert out.index("# lost") < out.index("# fine") < out.index("output_tok_per_s") and "no-such-model: expected" in err

def test_a_folder_that_is_there_is_not_written_again(monkeypatch, tmp_path):
    began = []
    monkeypatch.setattr("simplellm.bench.OWED", {"folder": f"synth gpt-oss-20b {tmp_path}"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(subprocess, "run", lambda args: began.append(args) or SimpleNamespace(returncode=0))
    run_owed()
    (tmp_path/"config.json").touch()
    run_owed()
    assert [args[3:] for args in began] == [["synth", "gpt-oss-20b", str(tmp_path)]]

# side by side

def test_comparison(lines):
    again = [l | dict(figures=l["figures"] | dict(output_tok_per_s=v)) for l, v in ((lines[0], 10.0), (lines[0], 30.0), (lines[0], 20.0), (lines[1], 5.0))]
    assert medians(again)["agents"]["output_tok_per_s"] == 20
    table = comparison(again)
    assert table[""] == ("agents", "forgetful") and table["output, against the first"] == ("1.00x", "0.25x") and table["prefix_hit_rate"][1] == "0"
    assert {len(row) for row in table.values()} == {2}

def test_only_equal_runs_share_a_median(lines):
    "Another model, type or setting under the same label is another case, and the label says which"
    one = lines[0]
    other = [one | dict(model="b"), one | dict(dtype="torch.bfloat16"),
             one | dict(settings=one["settings"] | dict(engine=one["settings"]["engine"] | dict(max_num_seqs=7)))]
    for line, word in zip(other, ("model=b", "dtype=torch.bfloat16", "engine.max_num_seqs=7")):
        labels = list(medians([one, one, line]))
        assert len(labels) == 2 and labels[0].startswith("agents, ") and labels[1] == f"agents, {word}"
    assert len(medians([one, *other])) == 4 and list(medians([one, one])) == ["agents"]
    assert list(medians([dict(label="x", figures=dict(requests=n)) for n in (1, 2)])) == ["x"]

def test_files_of_one_name(lines, tmp_path):
    for folder in "ab":
        (tmp_path/folder).mkdir()
        (tmp_path/folder/"run.jsonl").write_text(json.dumps(lines[0]) + "\n")
    files = [tmp_path/folder/"run.jsonl" for folder in "ab"]
    assert list(medians(read_lines(files))) == [f"{file}: agents" for file in files]

def test_parts_alone(lines):
    "A line and a row for each, within the length that was asked for, and apart from workloads"
    alone = [json.loads(json.dumps(l)) for l in micro(None, max_model_len=40, device="cpu", command="simplellm bench")]
    assert [l["label"] for l in alone] == ["prefill: 1 x 40 after 0", *(f"decode: {n} x 1 after 39" for n in (1, 8, 32)), "attention: 8 x 1 after 39"]
    assert [l["figures"]["tokens"] for l in alone] == [40, 1, 8, 32, 8] and all(l["settings"]["max_model_len"] == 40 for l in alone)
    for l in alone:
        f = l["figures"]
        assert f["ms"] > 0 and f["tok_per_s"] == pytest.approx(1000 * f["tokens"] / f["ms"])
        assert l["command"] == "simplellm bench" and l.keys() >= {"model", "dtype", "time", "machine", "ops", "run"}
    found = tables(lines + alone)
    assert list(found) == ["Medians of all runs", "Alone"] and list(found["Alone"]) == ["", *(l["label"] for l in alone)]
    assert list(tables(alone)) == ["Alone"] and list(tables(lines)) == ["Medians of all runs"]

def test_plot(lines, tmp_path):
    pytest.importorskip("matplotlib")
    old = [{k: v for k, v in l.items() if k != "roof"} for l in lines] # as written before there was one
    fig = plot(lines)
    assert [len(f.axes[-1].lines) for f in (fig, plot(old))] == [6, 4] # for each case a line and a dot, and for the legend
    assert [t.get_text() for t in fig.axes[-1].get_legend().texts] == ["memory allows", "reached"]
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in fig.axes)
    fig.savefig(tmp_path/"a.png")
    assert (tmp_path/"a.png").read_bytes().startswith(b"\x89PNG")

def test_files_that_are_none(tmp_path):
    for text in ("x\n", "[]\n", '{"label": 1}\n'):
        (tmp_path/"a.jsonl").write_text(text)
        with pytest.raises(ValueError, match="a.jsonl.*simplellm bench"): read_lines([tmp_path/"a.jsonl"])

def test_command_line(tmp_path, capsys):
    from simplellm.cli import app
    def run(*args): app(["bench", *map(str, args)], standalone_mode=False); return capsys.readouterr().out
    file, small = tmp_path/"a.jsonl", ["--sessions", 2, "--prompt", 8, "--output", 2, "--runs", 1]
    out = run(f"synthetic:{tiny_path()}?layers=1", *small, "--engine", "max_num_seqs=4", "--json", file, "--kernels")
    assert "output_tok_per_s" in out and "no GPU" in out and "aten::" in out
    assert "no GPU" in run("--compare", file) and "'per step'" not in run("--compare", file)
    line, = read_lines([file])
    assert line["settings"]["engine"]["max_num_seqs"] == 4 and len(line["requests"]) == 2 and line["command"].startswith("simplellm")
    (tmp_path/"b.jsonl").write_text(file.read_text())
    assert "1.00x" in run("--compare", file, tmp_path/"b.jsonl", "--plot", tmp_path/"a.png") and (tmp_path/"a.png").exists()
    out = run("--micro", "--engine", "max_model_len=32", "--json", tmp_path/"c.jsonl")
    assert "prefill: 1 x 32" in out and "tok/s" in out and len(read_lines([tmp_path/"c.jsonl"])) == 5
    assert "attention: 8 x 1" in run("--compare", tmp_path/"c.jsonl")
    with pytest.raises(ValueError, match="--compare"): run("one", "two")
    with pytest.raises(ValueError, match="workload='x'"): run("--workload", "x")
