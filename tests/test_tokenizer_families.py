"Pipelines of the model families, with small vocabularies trained here: ids equal to those of the `tokenizers` library"
import json, random, sys, unicodedata
import pytest
from simplellm.tokenizer import (BYTE_NAMES, O200K_PATTERN, Inexpressible, LibraryTokenizer, Tokenizer, TokenizerError,
                                 library_form, load_tokenizer, read_vocabulary)

hf = pytest.importorskip("tokenizers")
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
NANOCHAT = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
NAMES = dict( # special tokens, then those that are merely added
    qwen=(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|box_start|>"], ["<tool_call>", "</tool_call>", "<think>", "<|fim_pad|>"]),
    llama3=(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|reserved_special_token_0|>"], []),
    gptoss=(["<|startoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"], []),
    nanochat=(["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>"], []),
    mixtral=(["<unk>", "<s>", "</s>"], []))
SCRIPTS = [(0x41, 0x5b), (0x61, 0x7b), (0xc0, 0x250), (0x370, 0x400), (0x400, 0x500), (0x5d0, 0x5eb), (0x620, 0x650), (0x900, 0x970),
           (0xe01, 0xe3b), (0x1100, 0x1200), (0x3040, 0x3100), (0x4e00, 0x4f00), (0xac00, 0xad00), (0x1f300, 0x1f650), (0x20000, 0x20100)]
ODD = ["👩‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈", "🇩🇪", "e\u0301", "a\u0323\u0302", "o\u0302\u0323", "\u1100\u1161\u11a8", "\u212b", "\u0958", "ﬁ", "İ", "ß", "'s", "'LL",
       "’re", "'ſ", "\u00a0", "\u3000", "\u2028", "\x85", "\x1c", "\ufeff", "\r\n", "\n\n\n", "\t", "     ", "▁", "▁▁", "٣٤", "२०२४", "Ⅷ", "½", "1234567",
       "3.14", "\x00", "\U0010ffff", "<0x41>", "<0xE3>", "<|", "|>", "<", "def f(x):\n    return x//2\n", "https://a.b/c?d=e&f#g", '{"k": [1]}']

def random_text(rng, names):
    "Words of one script after another, spaces of every kind, joiners and marks, and the names of special tokens"
    def piece():
        kind = rng.random()
        if kind < .25: return rng.choice(ODD)
        if kind < .32 and names: return rng.choice(names)
        if kind < .40: return rng.choice(" \n\t\r")*rng.randrange(1, 6)
        if kind < .45: return "".join(chr(c) for c in (rng.randrange(0x110000) for _ in range(3)) if not 0xd800 <= c < 0xe000)
        low, high = rng.choice(SCRIPTS)
        word = "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 7)))
        return " " + unicodedata.normalize(rng.choice(["NFD", "NFC"]), word) if kind < .9 else str(rng.randrange(10**6))
    return "".join(piece() for _ in range(rng.randrange(0, 25)))

def corpus(rng):
    "Text with some structure, so that there is something to merge"
    words = [rng.choice(["the", "cache", "keys", "naïve", "Straße", "привет", "日本語", "한국", "नमस्ते", "שלום", "and", "12", "👍"]) for _ in range(40)]
    lines = [" ".join(rng.choices(words, k=30)) + rng.choice(["\n\n", ".", "  ", "'s"]) for _ in range(60)]
    return [line.replace("<0x", "") for line in lines + [random_text(rng, []) for _ in range(100)]]

def all_splits(vocab, merges):
    "Merges as converters write them: every way to cut a token, token by token"
    return [[t[:i], t[i:]] for t in dict.fromkeys(a+b for a, b in merges) for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]

def added(content, id, special=True, normalized=False):
    return dict(id=id, content=content, special=special, normalized=normalized, single_word=False, lstrip=False, rstrip=False)

def template(bos, id):
    piece = [dict(SpecialToken=dict(id=bos, type_id=0)), dict(Sequence=dict(id="A", type_id=0))]
    return dict(type="TemplateProcessing", single=piece, pair=piece + [dict(Sequence=dict(id="B", type_id=1))],
                special_tokens={bos: dict(id=bos, ids=[id], tokens=[bos])})

BYTELEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
def cut(pattern, behavior="Isolated", invert=False):
    return dict(type="Split", pattern=dict(Regex=pattern) if isinstance(pattern, str) else pattern, behavior=behavior, invert=invert)

def byte_family(name, pattern, size=700, expand=False, post=BYTELEVEL, normalizer=None, **model):
    "tokenizer.json of a byte-level family, special tokens behind the vocabulary"
    pre = dict(type="Sequence", pretokenizers=[cut(pattern), BYTELEVEL])
    data = dict(version="1.0", truncation=None, padding=None, added_tokens=[], normalizer=normalizer, pre_tokenizer=pre, post_processor=None,
                decoder=BYTELEVEL, model=dict(type="BPE", vocab={}, merges=[]))
    tok = hf.Tokenizer.from_str(json.dumps(data))
    tok.train_from_iterator(corpus(random.Random(0)), hf.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    learned = json.loads(tok.to_str())["model"]
    merges = all_splits(learned["vocab"], learned["merges"]) if expand else learned["merges"]
    special, plain = NAMES[name]
    listed = [added(t, len(learned["vocab"]) + i, t in special) for i, t in enumerate(special + plain)]
    if post == "bos": post = dict(type="Sequence", processors=[BYTELEVEL, template(special[0], listed[0]["id"])])
    return data | dict(added_tokens=listed, post_processor=post, model=learned | dict(merges=merges) | model)

LEGACY = dict(type="Sequence", normalizers=[dict(type="Prepend", prepend="▁"), dict(type="Replace", pattern=dict(String=" "), content="▁")])
def metaspace(scheme, split): return dict(type="Metaspace", replacement="▁", prepend_scheme=scheme, split=split)
SPACED = [dict(type="Replace", pattern=dict(String="▁"), content=" "), dict(type="ByteFallback"), dict(type="Fuse")]
def decoder(strip): return dict(type="Sequence", decoders=SPACED + [dict(type="Strip", content=" ", start=1, stop=0)]*strip)

def character_family(normalizer=None, pre=None, expand=True, strip=True, **model):
    "tokenizer.json of SentencePiece's kind: special tokens, bytes, merged tokens, characters"
    tok = hf.Tokenizer(hf.models.BPE())
    tok.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    tok.train_from_iterator(corpus(random.Random(1)), hf.trainers.BpeTrainer(vocab_size=600, limit_alphabet=120, show_progress=False))
    learned, special = json.loads(tok.to_str())["model"], NAMES["mixtral"][0]
    chars = [t for t in learned["vocab"] if len(t) == 1]
    merged = list(dict.fromkeys(a+b for a, b in learned["merges"]))
    vocab = {t: i for i, t in enumerate([*special, *BYTE_NAMES, *merged, *chars])}
    merges = all_splits(vocab, learned["merges"]) if expand else learned["merges"]
    return dict(version="1.0", truncation=None, padding=None, added_tokens=[added(t, i) for i, t in enumerate(special)],
                normalizer=normalizer, pre_tokenizer=pre, post_processor=template("<s>", 1), decoder=decoder(strip),
                model=dict(type="BPE", dropout=None, unk_token="<unk>", continuing_subword_prefix=None, end_of_word_suffix=None,
                           fuse_unk=True, byte_fallback=True, ignore_merges=False, vocab=vocab, merges=merges) | model)

FAMILIES = {
    "qwen": lambda: byte_family("qwen", QWEN, normalizer=dict(type="NFC")),
    "llama3": lambda: byte_family("llama3", LLAMA3, expand=True, ignore_merges=True, post="bos"),
    "gpt-oss": lambda: byte_family("gptoss", O200K_PATTERN, expand=True, ignore_merges=True),
    "nanochat": lambda: byte_family("nanochat", NANOCHAT, post=None, byte_fallback=True),
    "mixtral": lambda: character_family(LEGACY),
    "mixtral, single merges": lambda: character_family(LEGACY, expand=False),
    "llama2, first": lambda: character_family(pre=metaspace("first", False)),
    "metaspace, split": lambda: character_family(pre=metaspace("always", True)),
    "metaspace, never": lambda: character_family(pre=metaspace("never", False), strip=False)}

def both(data):
    "Our tokenizer and the library's"
    return Tokenizer(read_vocabulary(data)), hf.Tokenizer.from_str(json.dumps(data))

def assert_same(ours, theirs, texts):
    "Same ids and text, with and without special tokens and the template"
    names = set(ours.special.values())
    for allow in (False, True):
        theirs.encode_special_tokens = not allow
        for text, want in zip(texts, theirs.encode_batch(texts, add_special_tokens=allow)):
            got = ours.encode(text, allow_special=allow, add_special_tokens=allow)
            assert got == want.ids, (text, allow, [ours.token_bytes(i) for i in got], want.tokens)
            assert allow or not names & {*got}
            assert ours.decode(got) == theirs.decode(got, skip_special_tokens=False), text
            assert ours.decode(got, True) == theirs.decode(got, skip_special_tokens=True), text
            streamed = b"".join(map(ours.token_bytes, got)).decode("utf-8", "replace")
            assert streamed.removeprefix(" " if ours.vocabulary.strip else "") == ours.decode(got)

@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_a_family(family):
    data, rng = FAMILIES[family](), random.Random(2)
    ours, theirs = both(data)
    assert ours.runs_on == "tiktoken" and ours.vocab_size == theirs.get_vocab_size()
    names = [t["content"] for t in data["added_tokens"]]
    texts = [random_text(rng, names) for _ in range(3000)] + ["", " ", "  a", "a  ", *names, "".join(names), "▁a", " ▁ a"]
    assert_same(ours, theirs, texts)

def test_marks_newer_than_the_library(monkeypatch):
    "Its ids where it is installed; elsewhere Python's tables, which reorder marks that the library does not know"
    data, marks = FAMILIES["qwen"](), "q\u0301\u08d3 e\u0301\u1df7\u0323 a\u08d3\u0301"
    ours, theirs = both(data)
    assert ours.encode(marks) == theirs.encode(marks).ids and ours.encode(marks + "\ud800") == ours.encode(marks + "\ufffd")
    seen = ours.decode(ours.encode(marks))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    library_form.cache_clear()
    alone = Tokenizer(read_vocabulary(data))
    read = alone.decode(alone.encode(marks))
    library_form.cache_clear() # others find it installed
    assert read == unicodedata.normalize("NFC", marks) != seen

def test_pieces_of_a_prompt():
    "After a special token no space is put in front, where the scheme is `first`"
    from simplellm.chat import Special, encode_pieces
    ours, theirs = both(FAMILIES["llama2, first"]())
    rng = random.Random(3)
    for text in (random_text(rng, []) for _ in range(300)):
        assert encode_pieces(ours, [Special("<s>"), text]) == theirs.encode("<s>" + text, add_special_tokens=False).ids

def test_a_raw_prompt_gets_what_the_template_says():
    from simplellm.async_engine import read_prompt
    ours, theirs = both(FAMILIES["llama3"]())
    assert read_prompt(ours, "Hello<|eot_id|>") == ("Hello<|eot_id|>", theirs.encode("Hello<|eot_id|>").ids)
    assert read_prompt(ours, "Hello")[1][0] == ours.special["<|begin_of_text|>"]

@pytest.mark.parametrize("family", ["qwen", "mixtral", "llama2, first"])
def test_added_tokens_found_after_normalization(family):
    "`normalized`: the name goes through normalization, like the text it is looked for in"
    data, rng = FAMILIES[family](), random.Random(4)
    names = ["Ame\u0301lie", "<late>", "\u212bng"]
    n = 1 + max([*data["model"]["vocab"].values(), *(t["id"] for t in data["added_tokens"])])
    data["added_tokens"] += [added(t, n + i, special=i == 2, normalized=True) for i, t in enumerate(names)]
    ours, theirs = both(data)
    texts = [random_text(rng, [*names, *("\u00c5ng", "Am\u00e9lie", "<s>", "<|im_end|>")]) for _ in range(500)]
    for allow in (False, True):
        theirs.encode_special_tokens = not allow
        for text in texts: assert ours.encode(text, allow_special=allow) == theirs.encode(text, add_special_tokens=False).ids, text

@pytest.mark.parametrize("behavior", ["Isolated", "Contiguous", "MergedWithPrevious", "MergedWithNext", "Removed"])
@pytest.mark.parametrize("invert", [False, True])
def test_splits(behavior, invert):
    "Every way to split, by every kind of pattern, or the library takes over"
    rng = random.Random(5)
    texts = ["".join(rng.choices("aab1,.  ", k=rng.randrange(1, 14))) for _ in range(300)]
    for pattern in [r"\d|,", r"[ab]+", r"\s+(?!\S)|a", dict(String=", "), dict(String="."), r"a|ab|b1?", r"(?:ab|a)[ ,]?"]:
        tok = hf.Tokenizer(hf.models.BPE())
        tok.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tok.train_from_iterator(texts, hf.trainers.BpeTrainer(vocab_size=450, show_progress=False,
                                                              initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()))
        data = json.loads(tok.to_str())
        data["pre_tokenizer"] = dict(type="Sequence", pretokenizers=[cut(pattern, behavior, invert), BYTELEVEL])
        if behavior == "Removed" and not invert:
            with pytest.raises(Inexpressible, match="Removed"): read_vocabulary(data)
            continue
        ours, theirs = both(data)
        for text in texts: assert ours.encode(text) == theirs.encode(text).ids, (pattern, text)

@pytest.mark.parametrize("individual", [False, True])
def test_digits(individual):
    data, rng = FAMILIES["gpt-oss"](), random.Random(6)
    data["pre_tokenizer"]["pretokenizers"][0] = dict(type="Digits", individual_digits=individual)
    assert_same(*both(data), [random_text(rng, []) for _ in range(300)])

def several_splits():
    data = FAMILIES["qwen"]()
    data["pre_tokenizer"]["pretokenizers"][:1] = [cut(r"\p{N}{1,3}"), cut("[一-龥぀-ヿ]+"), cut(QWEN)]
    return data

def swallowing():
    data = FAMILIES["mixtral"]()
    data["added_tokens"].append(added("<|end|>", len(data["model"]["vocab"])) | dict(rstrip=True))
    return data

def test_special_tokens_swallow_whitespace_in_a_chat(tmp_path):
    "`lstrip` and `rstrip` mean the same in the pieces of a prompt as in one text"
    from simplellm.chat import Special, encode_pieces, template_pieces
    data = swallowing()
    data["added_tokens"].append(added("<|start|>", len(data["model"]["vocab"]) + 1) | dict(lstrip=True))
    (tmp_path/"tokenizer.json").write_text(json.dumps(data))
    ours, theirs = load_tokenizer(tmp_path), hf.Tokenizer.from_str(json.dumps(data))
    start, end = Special("<|start|>"), Special("<|end|>")
    for text in ("", " ", "a", "  a ", "\n\u3000a\u00a0b\t", "\x1c a \x1c", " \x85\u2028", "\u200b a \u200b"):
        pieces = [text, start, text, end, text, start, end, text, end, start, text]
        assert encode_pieces(ours, pieces) == theirs.encode("".join(pieces), add_special_tokens=False).ids, text
        sly = template_pieces(ours, "<|start|>{{ messages[0].content }}<|end|>\n{{ messages[0].content }}", [dict(content=text + "<|end|>")])
        assert encode_pieces(ours, sly).count(ours.special["<|end|>"]) == 1
    assert encode_pieces(ours, [end, " \n b"]) == encode_pieces(ours, [end, "b"]) != encode_pieces(ours, [start, " \n b"])[1:]

def unigram():
    data = FAMILIES["metaspace, split"]()
    model = hf.models.Unigram([(t, -float(len(t) > 1)) for t in data["model"]["vocab"]], 0, True)
    return data | dict(model=json.loads(hf.Tokenizer(model).to_str())["model"])

def lowercase(): return FAMILIES["llama3"]() | dict(normalizer=dict(type="Lowercase"))

@pytest.mark.parametrize("make, why", [(several_splits, "pre_tokenizer"), (swallowing, "rstrip"), (unigram, "Unigram"), (lowercase, "Lowercase")])
def test_the_library_takes_over(make, why, tmp_path, monkeypatch):
    data, rng, file = make(), random.Random(7), tmp_path/"tokenizer.json"
    file.write_text(json.dumps(data))
    ours, theirs = load_tokenizer(tmp_path), hf.Tokenizer.from_str(json.dumps(data))
    assert isinstance(ours, LibraryTokenizer) and why in ours.why and ours.runs_on == "tokenizers"
    special = {t["content"]: t["id"] for t in data["added_tokens"] if t["special"]}
    assert ours.special == special and ours.vocab_size == theirs.get_vocab_size()
    for allow in (False, True):
        theirs.encode_special_tokens = not allow
        for text in (random_text(rng, list(special)) for _ in range(300)):
            want = theirs.encode(text, add_special_tokens=allow).ids
            if not allow and {*special.values()} & {*want} - {0}: # a model that spells them: refused
                with pytest.raises(TokenizerError, match="special token"): ours.encode(text)
                continue
            got = ours.encode(text, allow_special=allow, add_special_tokens=allow)
            assert got == want and ours.decode(got) == theirs.decode(got, skip_special_tokens=False), text
    assert ours.encode("a\ud800b") == ours.encode("a\ufffdb")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match=rf"tokenizer.json.*{why}.*pip install tokenizers"): load_tokenizer(tmp_path)

def test_info_says_which_library_runs(tmp_path):
    from types import SimpleNamespace
    from simplellm.cli import text_rows
    folder = SimpleNamespace(path=tmp_path)
    for make, runs in [(swallowing, "tokenizers  (added token"), (FAMILIES["mixtral"], "tiktoken  (")]:
        (tmp_path/"tokenizer.json").write_text(json.dumps(make()))
        assert text_rows(folder)["library"].startswith(runs)
    (tmp_path/"tokenizer.json").unlink()
    assert "expected a tokenizer.json" in text_rows(folder)["none"]

def test_merges_never_spell_a_special_token():
    "The library would; here the letters stay letters"
    data = FAMILIES["mixtral"]()
    vocab, n = data["model"]["vocab"], len(data["model"]["vocab"])
    vocab |= {t: n + i for i, t in enumerate(t for t in ["<", ">", "s", "s>"] if t not in vocab)}
    data["model"]["merges"] += [["s", ">"], ["<", "s>"]]
    ours, theirs = both(data)
    theirs.encode_special_tokens = True
    assert 1 in theirs.encode("a<s>b", add_special_tokens=False).ids
    assert 1 not in ours.encode("a<s>b") and 1 in ours.encode("a<s>b", allow_special=True)
    assert ours.decode(ours.encode("a<s>b")) == "a<s>b"

@pytest.mark.parametrize("change, message", [
    (lambda d: d["added_tokens"][0].update(id=10**12), "ids from 1 to 1000000000000"), (lambda d: d["model"].update(dropout=.1), "dropout"), (lambda d: d.update(decoder=None, normalizer=dict(type="Lowercase")), "decoder"),
    (lambda d: d["model"]["vocab"].update({"<0x41>": 1}), "share an id"), (lambda d: d["model"].update(merges=[["a"]]), "not a pair"),
    (lambda d: d["model"]["merges"].append(["日", "\ue000"]), "lacks"), (lambda d: d["post_processor"].update(special_tokens={}), "KeyError"),
    (lambda d: d["model"].update(type="WordPiece"), "library says"), (lambda d: d.update(pre_tokenizer=metaspace("first", False), normalizer=dict(type="Lowercase")), "first")])
def test_refused(change, message, tmp_path):
    data = FAMILIES["mixtral"]()
    change(data)
    (tmp_path/"tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(TokenizerError, match=message): load_tokenizer(tmp_path)
