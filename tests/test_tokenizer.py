"Ids equal to those of the `tokenizers` library and of tiktoken, on trained, permuted and full-size vocabularies"
import base64, json, os, random, time
from pathlib import Path
import pytest
import simplellm
from simplellm.tokenizer import (GPT2_PATTERN, HARMONY_SPECIAL, O200K_PATTERN, TokenizerError, load_tokenizer,
                                 read_vocabulary, Tokenizer)

hf = pytest.importorskip("tokenizers")
BASE = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
O200K = Path(BASE or "/nowhere")/"o200k_base.tiktoken"
needs_o200k = pytest.mark.skipif(not O200K.is_file(), reason="TIKTOKEN_ENCODINGS_BASE holds no o200k_base.tiktoken")
DIGITS = O200K_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
# Scripts, whitespace of every kind, digits, combining marks, emoji with joiners and skin tones, contractions
SPECIAL = ["'s", "'LL", "’re", "'ſ", "\u200d", "👩‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈", "e\u0301", "\u0300", "\u00a0", "\u3000", "\u2028", "\x85",
           "\x1c", "\ufeff", "\r\n", "\n\n\n", "\t", "    ", "١٢٣", "२०२४", "Ⅷ", "½", "İ", "ß", "ǅ", "ﬁ", "日本語", "한국어", "ไทย",
           "<|end|>", "<|start|>", "<tool>", "def f(x):\n    return x//2\n", "https://a.b/c?d=e&f#g", '{"k": [1, 2.50]}',
           "0123456789", "\x00", "\U0010ffff"]

def random_text(rng):
    "A string of up to 40 pieces drawn from every plane"
    def piece():
        kind = rng.random()
        if kind < .3: return rng.choice(SPECIAL)
        if kind < .6: return "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(1, 8)))
        if kind < .7: return rng.choice(" \n\t\r")*rng.randrange(1, 6)
        top = rng.choice([0x250, 0x3000, 0xd800, 0x20000, 0x110000])
        codes = (rng.randrange(top) for _ in range(rng.randrange(1, 5)))
        return "".join(chr(c) for c in codes if not 0xd800 <= c < 0xe000)
    return "".join(piece() for _ in range(rng.randrange(1, 40)))

def assert_same(ours, theirs, texts):
    "Same ids on every text, with special-token text as ordinary text and as tokens; and a lossless round trip"
    for special in (False, True):
        theirs.encode_special_tokens = not special
        for text, want in zip(texts, theirs.encode_batch(texts, add_special_tokens=False)):
            got = ours.encode(text, allow_special=special)
            assert got == want.ids, (text, special, ours.decode(got), theirs.decode(want.ids))
            assert ours.decode(got) == text or ours.vocabulary.steps or ours.vocabulary.prefix_space == "always"

def trained(pre, seed=0, size=600, **model):
    "A byte-level BPE trained on random text"
    rng = random.Random(seed)
    tok = hf.Tokenizer(hf.models.BPE(**model))
    tok.pre_tokenizer = pre
    trainer = hf.trainers.BpeTrainer(vocab_size=size, initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
                                     special_tokens=["<|start|>", "<|end|>", "<|endoftext|>"], show_progress=False)
    words = [rng.choice("abcdeé日")*rng.randrange(1, 3) + rng.choice(["the", "ing", "12", " ", "xxxxx"]) for _ in range(40)]
    lines = [" ".join(rng.choices(words, k=30)) for _ in range(50)]
    # without names of special tokens: merges that spell one are dropped, the library would follow them
    tok.train_from_iterator(lines + [random_text(rng).replace("|>", "") for _ in range(50)], trainer)
    tok.add_tokens([hf.AddedToken("<tool>", normalized=False), "<tool_call>"])
    return tok

def byte_level(**kw): return hf.pre_tokenizers.ByteLevel(add_prefix_space=kw.pop("add_prefix_space", False), **kw)
def split(pattern):
    return hf.pre_tokenizers.Sequence([hf.pre_tokenizers.Split(hf.Regex(pattern), behavior="isolated"),
                                       byte_level(use_regex=False)])

@pytest.mark.parametrize("pre", [byte_level(), byte_level(use_regex=False), byte_level(add_prefix_space=True),
                                 split(O200K_PATTERN), split(DIGITS), split(r"\p{L}+|\d")],
                         ids=["gpt2", "whole", "prefix", "o200k", "digits", "gaps"])
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_trained_vocabularies(pre, ignore_merges):
    theirs = trained(pre)
    data = json.loads(theirs.to_str())
    data["model"]["ignore_merges"] = ignore_merges
    theirs = hf.Tokenizer.from_str(json.dumps(data))
    rng = random.Random(1)
    assert_same(Tokenizer(read_vocabulary(data)), theirs, [random_text(rng) for _ in range(1000)])

def test_permuted_ids():
    "Ids that are not ranks: every token of a trained vocabulary renumbered at random"
    data = json.loads(trained(split(O200K_PATTERN), size=700).to_str())
    vocab, rng = data["model"]["vocab"], random.Random(3)
    names = [t["content"] for t in data["added_tokens"]]
    ids = rng.sample(range(2000), len({*vocab, *names}))
    numbered = dict(zip({**vocab, **dict.fromkeys(names)}, ids))
    data["model"]["vocab"] = {token: numbered[token] for token in vocab}
    for t in data["added_tokens"]: data["model"]["vocab"][t["content"]] = t["id"] = numbered[t["content"]]
    data["added_tokens"].sort(key=lambda t: t["id"])
    theirs = hf.Tokenizer.from_str(json.dumps(data))
    ours = Tokenizer(read_vocabulary(data))
    assert ours._ids is not None
    assert_same(ours, theirs, [random_text(rng) for _ in range(500)])

@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_normal_forms(form):
    theirs = trained(byte_level())
    theirs.normalizer = getattr(hf.normalizers, form)()
    rng = random.Random(4)
    # with two marks that Python's Unicode tables know and the library's do not
    texts = ["".join(rng.choices("eéE\u08d3\u1df7\u0301\u0300ﬁÅ日 x½\u1100\u1161가", k=30)) for _ in range(500)]
    assert_same(Tokenizer(read_vocabulary(json.loads(theirs.to_str()))), theirs, texts)

def random_merges(rng):
    "A vocabulary by chance, most of which no training would give"
    symbols, merges = list("abc"), []
    for _ in range(rng.randrange(1, 12)):
        pair = rng.choice(symbols), rng.choice(symbols)
        if pair in merges or len("".join(pair)) > 6: continue
        merges.append(pair)
        if "".join(pair) not in symbols: symbols.append("".join(pair))
    return merges

def test_merges_by_chance_agree_or_are_refused():
    "Whatever the merges, either the ids are those of the library or the file is refused"
    rng, outcome = random.Random(5), {"same": 0, "refused": 0}
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    for _ in range(600):
        merges, ignore = random_merges(rng), rng.random() < .5
        vocab = {token: i for i, token in enumerate(dict.fromkeys([*alphabet, *(a+b for a, b in merges)]))}
        theirs = hf.Tokenizer(hf.models.BPE(vocab, merges, ignore_merges=ignore))
        theirs.pre_tokenizer = byte_level(use_regex=False)
        try: ours = Tokenizer(read_vocabulary(json.loads(theirs.to_str())))
        except TokenizerError: outcome["refused"] += 1; continue
        outcome["same"] += 1
        for text in ("".join(rng.choices("abc", k=rng.randrange(1, 12))) for _ in range(60)):
            assert ours.encode(text) == theirs.encode(text).ids, (merges, text)
    assert min(outcome.values()) > 50, outcome

@pytest.fixture(scope="module")
def o200k(tmp_path_factory):
    "The o200k vocabulary as a tokenizer.json, the way transformers writes it"
    from transformers.convert_slow_tokenizer import TikTokenConverter
    path = tmp_path_factory.mktemp("o200k")/"tokenizer.json"
    special = list(HARMONY_SPECIAL)[:21]
    TikTokenConverter(str(O200K), pattern=O200K_PATTERN, extra_special_tokens=special).converted().save(str(path))
    return path

@needs_o200k
def test_o200k_json(o200k):
    def seconds(f): start = time.process_time(); return f(), time.process_time() - start
    ours, took = seconds(lambda: load_tokenizer(o200k.parent))
    assert took < 12 * seconds(lambda: json.loads(o200k.read_text()))[1] # measured 4, on whatever machine; more would be worse than linear
    assert ours.special == {k: v for k, v in HARMONY_SPECIAL.items() if v <= 200018} and ours.vocab_size == 200019
    theirs, rng = hf.Tokenizer.from_file(str(o200k)), random.Random(6)
    assert_same(ours, theirs, [random_text(rng) for _ in range(10_000)] + [Path(__file__).read_text()])
    ours2 = load_tokenizer(O200K)
    assert all(ours.token_bytes(i) == ours2.token_bytes(i) for i in range(ours.vocab_size))

@needs_o200k
def test_o200k_ranks():
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    ours = load_tokenizer(O200K)
    ref = tiktoken.Encoding("o200k", pat_str=O200K_PATTERN, mergeable_ranks=load_tiktoken_bpe(str(O200K)),
                            special_tokens=HARMONY_SPECIAL)
    rng = random.Random(7)
    for text in (random_text(rng) for _ in range(3000)):
        assert ours.encode(text) == ref.encode_ordinary(text)
        assert ours.encode(text, allow_special=True) == ref.encode(text, allowed_special="all")
    assert ours.vocab_size == 201088

@needs_o200k
def test_single_merges_of_o200k():
    "The other way to write the same vocabulary: one merge a token, found by merging with all earlier ranks"
    import base64
    from simplellm.tokenizer import spell
    ranks = dict(sorted(((base64.b64decode(t), int(r)) for t, r in map(bytes.split, O200K.read_bytes().splitlines())),
                        key=lambda tr: tr[1])[:6000])
    def last_merge(token):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            rank, i = min((ranks.get(a+b, 1 << 30), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
            parts[i:i+2] = [parts[i] + parts[i+1]]
        return [spell(p) for p in parts]
    merges = [last_merge(token) for token in ranks if len(token) > 1]
    model = dict(type="BPE", vocab={spell(t): r for t, r in ranks.items()}, merges=merges)
    data = json.loads(trained(split(O200K_PATTERN)).to_str()) | dict(model=model, added_tokens=[])
    ours, theirs, rng = Tokenizer(read_vocabulary(data)), hf.Tokenizer.from_str(json.dumps(data)), random.Random(8)
    assert_same(ours, theirs, [random_text(rng) for _ in range(1000)])

def test_shipped_tokenizer():
    "The vocabulary that comes with the package"
    folder = Path(simplellm.__file__).parent/"tiny"
    if not (folder/"tokenizer.json").is_file(): pytest.skip("the package holds no tiny model")
    theirs, rng = hf.Tokenizer.from_file(str(folder/"tokenizer.json")), random.Random(9)
    assert_same(load_tokenizer(folder), theirs, [random_text(rng) for _ in range(10_000)])

EVERY = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))

def test_errors_name_the_file(tmp_path):
    with pytest.raises(TokenizerError, match="expected a tokenizer.json"): load_tokenizer(tmp_path)
    file = tmp_path/"tokenizer.json"
    for text in ["{", "[]", "{}", '{"model": 3}', '{"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}}']:
        file.write_text(text)
        with pytest.raises(TokenizerError, match="tokenizer.json"): load_tokenizer(tmp_path)
    ranks = tmp_path/"x.tiktoken"
    for text in [b"!!! 1", b"YQ== x", b"YQ== 1", b"YQ==", EVERY + b"Y*W*I= 300", EVERY + b"YQ== 300"]:
        ranks.write_bytes(text)
        with pytest.raises(TokenizerError, match="x.tiktoken"): load_tokenizer(ranks, pattern=GPT2_PATTERN)

def test_unusual_input():
    "Ids out of range and lone surrogates do not raise"
    ours = Tokenizer(read_vocabulary(json.loads(trained(byte_level()).to_str())))
    assert ours.decode([-1, 10**9]) == "" and ours.token_bytes(-1) == b""
    assert ours.decode(ours.encode("a\ud800b")) == "a\ufffdb"
    assert ours.encode("") == []
