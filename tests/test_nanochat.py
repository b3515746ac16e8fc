"nanochat's own folders against transformers, tiktoken and its way to render conversations; and everything in them that is refused"
import importlib.util, io, json, pickle, random, struct
from pathlib import Path
import pytest, tiktoken, torch

transformers = pytest.importorskip("transformers", reason="the judge of this file")
from simplellm import LLM
from simplellm.batch import make_batch
from simplellm.chat import ChatError, encode_chat
from simplellm.checkpoint import CheckpointError
from simplellm.config import EngineConfig
from simplellm.engine import Engine
from simplellm.models import load_model, read_config
from simplellm.nanochat import CHAT, NanoChat, is_nanochat, open_folder, read_pickle
from simplellm.plan import plan
from simplellm.synthetic import Synthetic
from simplellm.tokenizer import TokenizerError

_spec = importlib.util.spec_from_file_location("families", Path(__file__).with_name("test_families.py"))
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)

SPECIAL = [f"<|{n}|>" for n in ("bos", "user_start", "user_end", "assistant_start", "assistant_end", "python_start", "python_end",
                                "output_start", "output_end")]
PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
MERGES = "he ll hell o, wo rl worl th the in ing 12 \n\n".split(" ")
RANKS = {bytes([b]): b for b in range(256)} | {t.encode(): 256 + i for i, t in enumerate(MERGES)}
ENCODING = tiktoken.Encoding("rustbpe", pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens={t: len(RANKS) + i for i, t in enumerate(SPECIAL)})
WORDS = ENCODING.n_vocab

def judge(seed, **changes):
    "transformers' model with the constants of nanochat's code, and sizes of our choice"
    rng = random.Random(seed)
    kv_heads = rng.choice([1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 4])
    H = heads * rng.choice([8, 16])
    config = transformers.NanoChatConfig(**dict(
        vocab_size=rng.choice([WORDS, 128, 201]), hidden_size=H, intermediate_size=4*H, num_hidden_layers=rng.choice([1, 2, 3]),
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=256, rms_norm_eps=torch.finfo(torch.float32).eps,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0), eos_token_id=None, bos_token_id=None, pad_token_id=None,
        attn_implementation="eager") | changes)
    torch.manual_seed(seed)
    model = transformers.NanoChatForCausalLM(config).eval()
    for p in model.parameters(): p.data = torch.randn_like(p) * p.shape[-1] ** -.5
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.bfloat16().float()
    return model

def upstream(model, prefix="_orig_mod.", padded=True):
    "Its weights and sizes in nanochat's words"
    names = {"model.embed_tokens.weight": "transformer.wte.weight", "lm_head.weight": "lm_head.weight"}
    for i in range(model.config.num_hidden_layers):
        for a, b in {"self_attn.q_proj": "attn.c_q", "self_attn.k_proj": "attn.c_k", "self_attn.v_proj": "attn.c_v", "self_attn.o_proj": "attn.c_proj",
                     "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}.items():
            names[f"model.layers.{i}.{a}.weight"] = f"transformer.h.{i}.{b}.weight"
    state, c = {prefix + names[k]: v.clone() for k, v in model.state_dict().items()}, model.config
    for k in state:
        if padded and ("wte" in k or "lm_head" in k): state[k] = torch.nn.functional.pad(state[k], (0, 0, 0, -len(state[k]) % 64), value=9.)
        if "wte" in k: state[k] = state[k].bfloat16()
    return state, dict(sequence_len=256, vocab_size=c.vocab_size, n_layer=c.num_hidden_layers, n_head=c.num_attention_heads,
                       n_kv_head=c.num_key_value_heads, n_embd=c.hidden_size)

def write(folder, state, sizes, encoding=None, step=700, where=""):
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(state, bytes): (folder/f"model_{step:06d}.pt").write_bytes(state)
    else: torch.save(state, folder/f"model_{step:06d}.pt")
    (folder/f"meta_{step:06d}.json").write_text(json.dumps(dict(step=step, val_bpb=.8, model_config=sizes, user_config=dict(depth=2))))
    if encoding:
        (folder/where).mkdir(parents=True, exist_ok=True)
        (folder/where/"tokenizer.pkl").write_bytes(encoding if isinstance(encoding, bytes) else pickle.dumps(encoding))
    return folder

@pytest.mark.parametrize("seed", range(10))
def test_both_layouts(tmp_path, seed):
    "The same weights in both layouts, the logits of transformers, and the greedy tokens alone and in company"
    model, rng = judge(seed), random.Random(seed)
    theirs = write(tmp_path/"own", *upstream(model, prefix="_orig_mod." if seed % 2 else "", padded=seed % 3 > 0))
    model.save_pretrained(tmp_path/"hf")
    assert is_nanochat(theirs) and not is_nanochat(tmp_path/"hf")
    ours, hf = load_model(NanoChat(theirs), "float32", "cpu"), load_model(tmp_path/"hf", "float32", "cpu")
    assert ours.table.equal(hf.table) and ours.lm_head.equal(hf.lm_head) and ours.rope.equal(hf.rope) and ours.config.rms_eps == hf.config.rms_eps
    for mine, other in zip(ours.layers, hf.layers):
        for a, b in zip(mine, other): assert all(v is w is None or v.equal(w) for v, w in zip(vars(a).values(), vars(b).values()))
    first, second = ([rng.randrange(model.config.vocab_size) for _ in range(families.PROMPT)] for _ in range(2))
    prompts = [first, first[:24] + second[24:], second]
    engine = Engine(ours, EngineConfig(max_num_batched_tokens=16, max_num_seqs=3, max_model_len=128, num_blocks=64, block_size=8))
    alone, together = families.generate(engine, [first]), families.generate(engine, prompts)
    assert together[0].outputs[0].token_ids == alone[0].outputs[0].token_ids and together[1].num_cached_tokens > 0
    tokens = [p + o.outputs[0].token_ids for p, o in zip(prompts, together)]
    with torch.inference_mode(): want = model(torch.tensor(tokens)).logits.float()
    assert want.std() > .3
    for w, t in zip(want, tokens): assert w[families.PROMPT - 1:-1].argmax(-1).tolist() == t[families.PROMPT:]
    families.close_scores(together, want)
    families.parity.close(families.parity.in_steps(ours, tokens, rng.choice([1, 5, 16]), lambda i, left: rng.randint(1, min(left, 25)), rng), want)

def test_kernels(tmp_path):
    "Our kernels, where Triton can interpret them"
    pytest.importorskip("triton")
    from simplellm.ops import Ops, triton_ops
    from simplellm.transformer import Transformer
    model = judge(3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, intermediate_size=256)
    checkpoint = NanoChat(write(tmp_path, *upstream(model)))
    plain, tokens = load_model(checkpoint, "float32", "cpu"), [5 * i % 100 for i in range(12)]
    from simplellm.models import load_weights
    fast = Transformer(plain.config, load_weights(checkpoint, plain.config, torch.float32), Ops(**triton_ops()))
    run = lambda m: m(make_batch([(tokens, 0, [1], "all")], 16), m.new_cache(2))
    families.parity.close([run(fast)], [run(plain)])

@pytest.fixture(scope="module")
def small(): return upstream(judge(1, vocab_size=WORDS))

def test_folder(tmp_path, small):
    "The last step counts; the tokenizer is beside the model, below it, or where nanochat keeps it"
    state, sizes = small
    for i, where in enumerate(("", "tokenizer", "../../tokenizer")):
        folder = write(tmp_path/str(i)/"base"/"d2", state, sizes, ENCODING, where=where)
        write(folder, b"broken", dict(sizes, n_layer=9), step=65)
        found = NanoChat(folder)
        ends = [ENCODING.encode_single_token(t) for t in ("<|assistant_end|>", "<|bos|>")]
        assert found.tokenizer.vocab_size == WORDS and load_model(found, device="cpu").config.eos_token_ids == tuple(ends)
    assert NanoChat(write(tmp_path/"bare", state, sizes)).tokenizer is None

def test_other_doors(tmp_path, small):
    "plan and synthetic checkpoints need the sizes alone; load_model says what opens the folder"
    folder = write(tmp_path, *small)
    assert read_config(Synthetic(folder, device="cpu")) == read_config(NanoChat(folder)) == read_config(open_folder(folder))
    with pytest.raises(CheckpointError, match=r"nanochat's layout, which nanochat.open_folder\(path\) opens"): load_model(folder, device="cpu")
    (folder/"model_000700.pt").write_bytes(b"")
    assert "256 tokens each" in plan(folder)["Requests that the cache holds"]

def rendered(talk):
    "nanochat's rendering, told again"
    one, ids = ENCODING.encode_single_token, []
    if talk[0]["role"] == "system": talk = [talk[1] | dict(content=talk[0]["content"] + "\n\n" + talk[1]["content"])] + talk[2:]
    for m in talk:
        parts = [dict(type="text", text=m["content"])] if isinstance(m["content"], str) else m["content"]
        ids.append(one(f"<|{m['role']}_start|>"))
        for p in parts:
            tag = dict(python="python", python_output="output").get(p["type"])
            body = ENCODING.encode_ordinary(p["text"])
            ids += [one(f"<|{tag}_start|>"), *body, one(f"<|{tag}_end|>")] if tag else body
        ids.append(one(f"<|{m['role']}_end|>"))
    return [one("<|bos|>"), *ids, one("<|assistant_start|>")]

def test_chat(tmp_path, small):
    "A conversation is rendered as nanochat does, what users write is never special, and LLM answers"
    state, sizes = small
    folder, rng = write(tmp_path, state, sizes, ENCODING, where="tokenizer"), random.Random(0)
    tok = NanoChat(folder).tokenizer
    def words(): return " ".join(rng.choice(["hello,", "  world", "12345", "\n\n", "naïve", "日本", "<|bos|>", "<|user_end|>", "it's", "{{ x }}"]) for _ in range(6))
    def reply(): return words() if rng.random() < .5 else [dict(type=t, text=words()) for t in ("text", "python", "python_output", "text")]
    for n in range(60):
        talk = [dict(role="system", content=words())] * (n % 2) + [dict(role="user", content=words())]
        for _ in range(n % 3): talk += [dict(role="assistant", content=reply()), dict(role="user", content=words())]
        assert encode_chat(tok, talk, template=CHAT) == rendered(talk)
    for bad in ([], [dict(role="system", content="a")], [dict(role="assistant", content="a")], [dict(role="user", content="a")] * 2,
                [dict(role="user", content=[dict(type="image", text="a")])], [dict(role="tool", content="a")]):
        with pytest.raises(ChatError): encode_chat(tok, bad, template=CHAT)
    with pytest.raises(ChatError, match="functions"): encode_chat(tok, [dict(role="user", content="a")], [dict(name="f")], template=CHAT)
    with LLM(folder, device="cpu", num_blocks=32) as llm:
        out = llm.chat([dict(role="user", content="hello <|bos|>")], max_tokens=5, temperature=0, ignore_eos=True)[0]
        assert out.prompt_token_ids == rendered([dict(role="user", content="hello <|bos|>")]) and len(out.outputs[0].token_ids) == 5
        hello = ENCODING.encode_ordinary("hello")
        assert llm.generate("hello", max_tokens=3, ignore_eos=True)[0].prompt_token_ids[-len(hello):] == hello
        assert tok.encode("hello", add_special_tokens=True) == [tok.special["<|bos|>"], *hello]  # as every document in training began

def test_tokenizer(tmp_path):
    "The ids of the encoding that was pickled, on any text and by any protocol"
    rng = random.Random(1)
    alphabet = ["hello,", " ", "\n", "the", "12", "<|bos|>", "e\u0301", "\u200d", "👩‍🚀", "ß", "\t"] + [chr(rng.randrange(32, 0xD7FF)) for _ in range(60)]
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1): # older ones need a function to make bytes
        (tmp_path/"tokenizer.pkl").write_bytes(pickle.dumps(ENCODING, protocol))
        tok = read_pickle(tmp_path/"tokenizer.pkl")
        for _ in range(200):
            text = "".join(rng.choices(alphabet, k=rng.randrange(20)))
            assert tok.encode(text) == ENCODING.encode_ordinary(text) and tok.encode(text, allow_special=True) == ENCODING.encode(text, allowed_special="all")
            assert tok.decode(tok.encode(text)) == text

class Call:
    def __init__(self, f, *args): self.what = f, args
    def __reduce__(self): return self.what

def changed(**state):
    "The encoding with another state"
    e = tiktoken.Encoding("x", pat_str=".", mergeable_ranks=RANKS, special_tokens={})
    e.__class__ = type("Encoding", (), dict(__module__="tiktoken.core", __qualname__="Encoding"))
    real = dict(name="x", pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens={}) | state
    name = b"ctiktoken.core\nEncoding\n)\x81"
    return b"\x80\x04" + name + pickle.dumps({k: v for k, v in real.items() if v != "gone"}, 4)[2:-1] + b"b."

def hostile(touch):
    "Pickles of strangers; `touch` is a file that some of them try to make"
    whole = pickle.dumps(ENCODING)
    yield from ((f"call {p}", pickle.dumps(Call(open, touch, "w"), p)) for p in range(6))
    yield "in the state", whole[:2] + b"(" + pickle.dumps(Call(open, touch, "w"), 4)[2:-1] + b"1" + whole[2:]
    yield "instance", f"(S'{touch}'\nS'w'\nibuiltins\nopen\n.".encode()
    yield "object", f"(cbuiltins\nopen\nS'{touch}'\nS'w'\no.".encode()
    yield "getattr", b"cbuiltins\ngetattr\n(ctiktoken.core\nEncoding\nS'__init__'\ntR."
    yield "dotted", b"\x80\x04\x8c\x0dtiktoken.core\x8c\x11Encoding.__init__\x93."
    yield "other of tiktoken", b"ctiktoken.registry\nget_encoding\n(S'gpt2'\ntR."
    yield "by reference", b"\x80\x04ctiktoken.core\nEncoding\n)\x81\x8c\x04gpt2b."
    yield "with arguments", b"ctiktoken.core\nEncoding\n(S'gpt2'\ntR."
    yield "the class", b"ctiktoken.core\nEncoding\n."
    yield "the class changed", b"ctiktoken.core\nEncoding\n(N}S'state'\nI1\nstb."
    yield "extension", b"\x80\x02\x82\x01."
    yield "persistent", b"Pabc\n."
    yield "far memo", b"\x80\x04Nr\xff\xff\xff\xff."
    yield "huge array", b"\x80\x05\x96" + struct.pack("<Q", 2**38) + b"."
    yield "huge bytes", b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"."
    yield "deep", b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b"."
    yield from ((f"cut at {n}", whole[:n]) for n in (0, 1, 10, len(whole) // 2, len(whole) - 1))
    yield "text", b"not a pickle at all"
    yield "list", pickle.dumps([1, 2])
    yield "dict", pickle.dumps(dict(pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens={}))
    for k, v in dict(pat_str="gone", mergeable_ranks="gone", special_tokens="gone").items(): yield f"without {k}", changed(**{k: v})
    yield from (("pattern", changed(pat_str="(")), ("number", changed(pat_str=3)), ("missing byte", changed(mergeable_ranks={b"a": 0})),
                ("text for bytes", changed(mergeable_ranks=RANKS | {"a": 3})), ("negative", changed(mergeable_ranks=RANKS | {b"zz": -1})),
                ("huge id", changed(special_tokens={"<|a|>": 2**60})), ("fraction", changed(special_tokens={"<|a|>": 1.5})),
                ("one id twice", changed(mergeable_ranks=RANKS | {b"zz": 5})))

def test_hostile_pickles(tmp_path):
    "Nothing that a pickle asks for happens, and all of them are refused by the name of the file"
    file, touch = tmp_path/"tokenizer.pkl", str(tmp_path/"made")
    file.write_bytes(changed())
    assert read_pickle(file).vocab_size == len(RANKS)  # the state alone is not what is refused
    for name, data in hostile(touch):
        file.write_bytes(data)
        with pytest.raises(TokenizerError, match="tokenizer.pkl"): pytest.fail(f"{name}: {read_pickle(file)}")
        assert not Path(touch).exists(), name
    file.write_bytes(pickle.dumps(ENCODING))
    assert read_pickle(file).vocab_size == WORDS

def test_vocabulary_must_fit(tmp_path, small):
    state, sizes = small
    other = tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens={"<|bos|>": len(RANKS)})
    with pytest.raises(CheckpointError, match=f"tokenizer.pkl: {len(RANKS) + 1} tokens, expected vocab_size {WORDS}"): NanoChat(write(tmp_path, state, sizes, other))

LATER = dict(resid_lambdas="residual", x0_lambdas="embedding mixed", smear_lambda="smearing", backout_lambda="backout") | {
    "smear_gate.weight": "smearing", "value_embeds.1.weight": "value embeddings", "transformer.h.1.attn.ve_gate.weight": "value embeddings"}

@pytest.mark.parametrize("name", LATER)
def test_later_versions(tmp_path, small, name):
    state, sizes = small
    folder = write(tmp_path, state | {"_orig_mod." + name: torch.ones(2)}, dict(sizes, window_pattern="L"))
    with pytest.raises(CheckpointError, match=f"(?s)model_000700.pt: tensor '{name}'.*{LATER[name]}"): NanoChat(folder)

@pytest.mark.parametrize("change, words", [
    (dict(window_pattern="SSSL"), "window_pattern 'SSSL'"), (dict(window_pattern=""), "window_pattern"), (dict(n_expert=4), "n_expert"),
    (dict(n_layer="2"), "n_layer '2'"), (dict(n_layer=0), "n_layer 0"), (dict(n_embd="gone"), "n_embd None"), (dict(n_kv_head=True), "n_kv_head"),
    (dict(n_head=10**9), "multiple of n_head"), (dict(n_layer=10**9), "num_hidden_layers"), (dict(vocab_size=10**15), "wte"), (dict(sequence_len=-1), "sequence_len"),
    (dict(n_kv_head=3), "^meta_000700.json, read as config.json: field 'num_key_value_heads'")])
def test_sizes(tmp_path, small, change, words):
    state, sizes = small
    sizes = {k: v for k, v in (sizes | change).items() if v != "gone"}
    with pytest.raises(CheckpointError, match=words): load_model(NanoChat(write(tmp_path, state, sizes)), device="cpu")
    for text in ("[]", "{", '{"model_config": 3}', '{"model_config": {}, "model_config": {}}'):
        (tmp_path/"meta_000700.json").write_text(text)
        with pytest.raises(CheckpointError, match="meta_000700.json"): NanoChat(tmp_path)
    (tmp_path/"meta_000700.json").unlink()
    with pytest.raises(CheckpointError, match="meta_000700.json"): NanoChat(tmp_path)

O = "transformer.h.0.attn.c_proj.weight"
DAMAGED = dict(
    missing=(lambda s: s.pop(O), f"tensor '{O}': missing"), surplus=(lambda s: s.update(extra=torch.ones(1)), "'extra': surplus"),
    shape=(lambda s: s.update({O: s[O][:-1]}), f"'{O}': shape"), rank=(lambda s: s.update({O: s[O][0]}), f"'{O}': shape"),
    double=(lambda s: s.update({O: s[O].double()}), "float64"), half=(lambda s: s.update({O: s[O].half()}), "float16"),
    integers=(lambda s: s.update({O: s[O].int()}), "int32"), nan=(lambda s: s[O].fill_(torch.nan), "nan at"), inf=(lambda s: s[O][1, 2].fill_(torch.inf), "inf at"),
    twice=(lambda s: s.update({"_orig_mod." + O: s[O]}), "twice"), number=(lambda s: s.update({O: 3}), "is a int"),
    key=(lambda s: s.update({3: s[O]}), "^model_000700.pt: 3"), sparse=(lambda s: s.update({O: s[O].to_sparse()}), "plain tensors"),
    spread=(lambda s: s.update({O: torch.zeros(1, 1).expand(s[O].shape)}), "plain tensors"),
    nowhere=(lambda s: s.update({O: s[O].to("meta")}), "plain tensors"), call=(lambda s: s.update({O: Call(print, "run")}), "asks for (builtins.)?print"),
    nested=(lambda s: s.update({O: dict(a=s[O])}), "is a dict"))

@pytest.mark.parametrize("name", DAMAGED)
def test_damaged(tmp_path, small, name):
    change, words = DAMAGED[name]
    state = {k.removeprefix("_orig_mod."): v.clone() for k, v in small[0].items()}
    change(state)
    folder = write(tmp_path, state, small[1])
    with pytest.raises(CheckpointError, match=words): load_model(NanoChat(folder), device="cpu")

def test_damaged_files(tmp_path, small):
    "No zip, an old kind of file, parts of one, and something else inside"
    state, sizes = small
    buffer, old = io.BytesIO(), io.BytesIO()
    torch.save(state, buffer)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    whole = buffer.getvalue()
    for data in (b"", b"model", old.getvalue(), pickle.dumps(Call(print, 1)), *(whole[:n] for n in (10, 1000, len(whole) // 2, len(whole) - 30))):
        with pytest.raises(CheckpointError, match="model_000700.pt: cannot be read|asks for"): NanoChat(write(tmp_path, data, sizes))
    with pytest.raises(CheckpointError, match="list, expected a dict"): NanoChat(write(tmp_path, [1, 2], sizes))
    with pytest.raises(CheckpointError, match="expected a folder with model"): NanoChat(tmp_path/"nowhere")
