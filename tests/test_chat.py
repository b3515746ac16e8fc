"Harmony token for token as `openai-harmony` has it, a parser that never raises, and detokenizing by properties"
import json, os, random, time
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from simplellm.chat import (ChatError, Delta, Detokenizer, FLAGS, HarmonyParser, Header, Message, Special, encode_chat,
                            encode_pieces, final_text, parse_header, read_template, reasoning_text, render_harmony, render_message,
                            render_template, template_pieces, tool_calls, without_old_analysis)
from simplellm.checkpoint import CheckpointError
from simplellm.tokenizer import Added, HARMONY_SPECIAL, O200K_PATTERN, Tokenizer, Vocabulary, load_tokenizer

BASE = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
O200K = Path(BASE or "/nowhere")/"o200k_base.tiktoken"
needs_o200k = pytest.mark.skipif(not O200K.is_file(), reason="TIKTOKEN_ENCODINGS_BASE holds no o200k_base.tiktoken")
BYTES = Tokenizer(Vocabulary({bytes([b]): b for b in range(256)}, O200K_PATTERN,
                             tuple(Added(t, 256+i) for i, t in enumerate(list(HARMONY_SPECIAL)[:21]))))
WORDS = ["hello", "The answer is 42.", "<|end|>", "<|start|>assistant", " ", "\n\n", "é👍🏽", "日本語", "{\"a\": [1, 2]}", "x"*30,
         "// comment", "a\r\nb", "it's", "null", "\"quoted\"", "\\", "\t", "3.14", "…"]

@pytest.fixture(scope="module")
def tok(): return load_tokenizer(O200K)

@pytest.fixture(scope="module")
def oh():
    module = pytest.importorskip("openai_harmony")
    module.enc = module.load_harmony_encoding("HarmonyGptOss")
    return module

def text(rng, n=4): return "".join(rng.choice(WORDS) for _ in range(rng.randrange(n+1)))
def name(rng): return rng.choice(["add", "get_weather", "f", "search2", "lookup_user", "a.b"])

# ---- schemas

def value(rng, depth=2):
    kind = rng.randrange(9 if depth else 7)
    if kind == 7: return [value(rng, depth-1) for _ in range(rng.randrange(3))]
    if kind == 8: return {text(rng, 1): value(rng, depth-1) for _ in range(rng.randrange(3))}
    # short floats: openai-harmony's JSON reader is off by one in the 17th digit of some
    return [None, True, rng.randrange(-5, 10**6), round(rng.uniform(-1e3, 1e3), 3), text(rng),
            rng.choice([1e20, 1.5e-5, 2e-7, 1e16, .0001]), float(rng.randrange(9))][kind]

def schema(rng, depth=3):
    "Nested objects, arrays, enums, alternatives, optional and nullable properties, defaults, and nonsense"
    out, kind = {}, rng.choice(["string", "string", "number", "integer", "boolean", "array", "object", "object", "oneOf",
                                "list", "none", "odd"])
    if kind == "odd":
        return rng.choice([{}, {"type": "null"}, {"type": 3}, {"$ref": "#/x"}, {"type": []}, {"anyOf": [{"type": "string"}]}])
    if kind == "list": out["type"] = rng.sample(["string", "integer", "number", "null", "boolean"], rng.randrange(1, 4))
    elif kind == "oneOf" and depth: out["oneOf"] = [schema(rng, depth-1) for _ in range(rng.randrange(4))]
    elif kind != "none": out["type"] = kind if kind != "oneOf" else "string"
    if kind == "string" and rng.random() < .4:
        out["enum"] = [rng.choice([text(rng, 1), "C", 3]) for _ in range(rng.randrange(4))]
    if kind == "array" and depth and rng.random() < .8: out["items"] = schema(rng, depth-1)
    if kind == "object" and depth:
        out["properties"] = {f"{name(rng)}{i}": schema(rng, depth-1) for i in range(rng.randrange(4))}
        if rng.random() < .7: out["required"] = [k for k in out["properties"] if rng.random() < .5]
    for key, make in dict(description=text, title=text, default=value, nullable=lambda r: r.random() < .7,
                          examples=lambda r: [value(r) for _ in range(r.randrange(3))]).items():
        if rng.random() < .25: out[key] = make(rng)
    if out.get("oneOf") and rng.random() < .3: out["description"] = out["oneOf"][0].get("description", "same")
    return out

def tool(rng):
    params = rng.choice([None, schema(rng), {"type": "object", "properties": {f"p{i}": schema(rng) for i in range(3)}}])
    function = dict(name=name(rng), description=text(rng)) | ({} if params is None else dict(parameters=params))
    return dict(type="function", function=function) if rng.random() < .8 else function

# ---- rendering

def theirs(oh, m):
    "One of our messages as one of theirs"
    parts = [m.content] if isinstance(m.content, str) else m.content
    out = oh.Message(author=oh.Author(role=oh.Role(m.role), name=m.name), content=[oh.TextContent(text=t) for t in parts])
    out.channel, out.recipient, out.content_type = m.channel, m.recipient, m.content_type
    return out

def message(rng):
    role = rng.choice(["system", "developer", "user", "assistant", "assistant", "tool"])
    pick = lambda *options: rng.choice([None, None, *options])
    content = text(rng) if rng.random() < .8 else tuple(text(rng) for _ in range(rng.randrange(3)))
    return Message(role, content, pick("analysis", "commentary", "final", "final", "odd channel"),
                   pick("all", "functions.f", "assistant", "browser.search"),
                   pick("json", "<|constrain|>json", "<|constrain|>", "code"),
                   f"functions.{name(rng)}" if role == "tool" else pick("bob", "ann lee"))

@needs_o200k
def test_messages_of_every_shape(oh, tok):
    rng = random.Random(0)
    for _ in range(400):
        messages = [message(rng) for _ in range(rng.randrange(1, 7))]
        conversation = oh.Conversation.from_messages([theirs(oh, m) for m in messages])
        for drop in (True, False):
            want = oh.enc.render_conversation_for_completion(
                conversation, oh.Role.ASSISTANT, oh.RenderConversationConfig(auto_drop_analysis=drop))
            kept = without_old_analysis(messages) if drop else messages
            ours = [p for m in kept for p in render_message(m)] + [Special("<|start|>"), "assistant"]
            assert encode_pieces(tok, ours) == want, messages

def conversation(rng):
    "Dictionaries as for the OpenAI API"
    out = [dict(role=rng.choice(["system", "developer"]), content=text(rng))] if rng.random() < .6 else []
    for turn in range(rng.randrange(1, 4)):
        out.append(dict(role="user", content=text(rng)))
        for step in range(rng.randrange(3)):
            calls = [dict(id=f"call_{turn}_{step}_{i}", type="function", function=dict(
                name=rng.choice(["add", "get_weather"]), arguments=rng.choice([{"a": 1, "b": "é"}, '{"a":1}', {}])))
                for i in range(rng.randrange(1, 3))]
            out.append(dict(role="assistant", content=rng.choice([None, "", "Let me see."]), tool_calls=calls) |
                       (dict(thinking=text(rng)) if rng.random() < .6 else {}))
            for call in calls:
                by = rng.choice([dict(tool_call_id=call["id"]), dict(name=call["function"]["name"])])
                out.append(dict(role="tool", content=rng.choice(["7", '{"t": 20}', {"t": 20}]), **by))
        if rng.random() < .8:
            thinking = {"reasoning_content": text(rng)} if rng.random() < .5 else {}
            out.append(dict(role="assistant", content=text(rng)) | thinking)
    return out

def expected(oh, messages, tools, effort, date):
    "The same conversation, built with the official library"
    M, R = oh.Message, oh.Role
    system = oh.SystemContent.new().with_reasoning_effort(oh.ReasoningEffort(effort.capitalize()))
    if date: system = system.with_conversation_start_date(date)
    out, calls = [M.from_role_and_content(R.SYSTEM, system)], {}
    developer = oh.DeveloperContent.new()
    if messages[0]["role"] in ("system", "developer"): developer = developer.with_instructions(messages[0]["content"])
    if tools: developer = developer.with_function_tools([oh.ToolDescription.new(
        f["name"], f["description"], f.get("parameters")) for f in (t.get("function", t) for t in tools)])
    if tools or developer.instructions is not None: out.append(M.from_role_and_content(R.DEVELOPER, developer))
    for m in messages:
        if m["role"] == "user": out.append(M.from_role_and_content(R.USER, m["content"]))
        if m["role"] == "tool":
            body = m["content"] if isinstance(m["content"], str) else json.dumps(m["content"])
            author = oh.Author.new(R.TOOL, "functions." + (m.get("name") or calls[m["tool_call_id"]]))
            out.append(M.from_author_and_content(author, body).with_channel("commentary").with_recipient("assistant"))
        if m["role"] != "assistant": continue
        thinking = m.get("thinking") or m.get("reasoning_content")
        if thinking: out.append(M.from_role_and_content(R.ASSISTANT, thinking).with_channel("analysis"))
        if m["content"] or not m.get("tool_calls"):
            out.append(M.from_role_and_content(R.ASSISTANT, m["content"]).with_channel(
                "commentary" if m.get("tool_calls") else "final"))
        for call in m.get("tool_calls", []):
            f, arguments = call["function"], call["function"]["arguments"]
            calls[call["id"]] = f["name"]
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            out.append(M.from_role_and_content(R.ASSISTANT, arguments).with_channel("commentary").with_recipient(
                f"functions.{f['name']}").with_content_type("<|constrain|>json"))
    return oh.enc.render_conversation_for_completion(oh.Conversation.from_messages(out), R.ASSISTANT)

@needs_o200k
def test_conversations_with_tools(oh, tok):
    rng = random.Random(1)
    for _ in range(500):
        messages, tools = conversation(rng), [tool(rng) for _ in range(rng.randrange(4))]
        effort, date = rng.choice(["low", "medium", "high"]), rng.choice([None, "2026-11-20"])
        ours = encode_chat(tok, messages, tools or None, reasoning_effort=effort, date=date)
        want = expected(oh, messages, tools, effort, date)
        assert ours == want, (tok.decode(ours), tok.decode(want))

ODD_TOOLS = [dict(oneOf=3, description="d", default=5, type="string"), dict(oneOf=None, description="d", default=5), dict(oneOf=[], description="d"),
             dict(oneOf=[3, dict(description=""), dict(description="d", default="q", enum=["q"])], description="d"), dict(type="number", default=1.2345678901234568e-05),
             dict(type="number", default=1e-5), dict(default=[1e300]), dict(type="string", default="a", enum="a"), 3, dict(title=1, examples="x"),
             dict(type="array", items=dict(type="string", nullable=True)), dict(type=["null"], nullable=True), dict(type="string", nullable="yes")]

@needs_o200k
def test_tools_that_are_odd(oh, tok):
    "Fields of the wrong kind, defaults in every notation, line ends of every kind"
    tools = [dict(name="f", description=d, parameters=dict(type="object", properties={f"p{i}": s for i, s in enumerate(ODD_TOOLS)}))
             for d in ("", "\n", "a\r", "a\r\nb\r", "a\n\n", "a\r\r\nb")]
    user = [dict(role="user", content="hi")]
    assert encode_chat(tok, user, tools) == expected(oh, user, tools, "medium", None)

def test_what_cannot_be_rendered_is_named():
    user = dict(role="user", content="hi")
    for bad, why in [(dict(role="robot"), "message 1 .robot.*unknown role"), ("hi", "message 1 .str"),
                     (dict(role="user"), "no content"), (dict(role="assistant"), "needs content"),
                     (dict(role="tool", content="x"), "no name"), (dict(role="user", content=3), "int"),
                     (dict(role="user", content=[{"type": "image_url"}]), "image_url"),
                     (dict(role="tool", content="x", tool_call_id="zzz"), "zzz"),
                     (dict(role="assistant", tool_calls=[{}]), "function name"), (dict(role="assistant", thinking=3), "int"),
                     (dict(role="assistant", channel="commentary", content="I look.", tool_calls=[dict(function=dict(name="f"))]), "tool_calls beside channel"),
                     (dict(role="assistant", content_type="json", content="{}", thinking="so"), "thinking beside content_type"),
                     (dict(role="user", content=[dict(type="text", text=3)]), "type text without text"), (dict(role="tool", content="x", name=3), "tool")]:
        with pytest.raises(ChatError, match=why): render_harmony([user, bad])
    for tool in ({"type": "function", "function": {}}, {"function": "add"}, "add", None):
        with pytest.raises(ChatError, match="name"): render_harmony([user], tools=[tool])
    assert render_harmony([dict(role="assistant", content="a", channel=3)])[-4:] == ["a", "<|end|>", "<|start|>", "assistant"]

# ---- parsing

def answer(rng):
    "Messages a well-trained model may write, as pieces"
    out = []
    for _ in range(rng.randrange(1, 5)):
        m = Message("assistant", text(rng), rng.choice(["analysis", "commentary", "final"]))
        if rng.random() < .3:
            m = Message("assistant", '{"é": 1}', "commentary", "functions.f", rng.choice([None, "json", "<|constrain|>json"]))
        out += render_message(m)
    return out[2:] # the prompt ends after the first <|start|>assistant

def run(tokenizer, ids):
    parser = HarmonyParser(tokenizer)
    deltas = [d for d in [*map(parser.feed, ids), parser.finish()] if d is not None]
    return parser, deltas

def check(parser, deltas):
    "What holds for every answer"
    assert set(parser.flags) <= FLAGS.keys() and len(set(parser.flags)) == len(parser.flags)
    assert "".join(d.text for d in deltas) == "".join(m.text for m in parser.messages)
    assert all(isinstance(d, Delta) and d.text for d in deltas)
    final_text(parser.messages), reasoning_text(parser.messages), tool_calls(parser.messages)
    assert parser.finish() is None

@needs_o200k
def test_parser_agrees_with_the_official_one(oh, tok):
    rng = random.Random(2)
    for _ in range(500):
        ids = encode_pieces(tok, answer(rng))
        ids[-1] = tok.special["<|return|>"] if ids[-1] == tok.special["<|end|>"] else ids[-1]
        if rng.random() < .2: # tokens by chance in a body: bytes that are no text
            at = rng.randrange(len(ids))
            body = [i for i in range(len(ids)) if tok.special["<|message|>"] in ids[:i] and ids[i] < 199998]
            if body: ids[rng.choice(body):0] = [] if at % 2 else [rng.randrange(256) for _ in range(3)]
        official = oh.StreamableParser(oh.enc, role=oh.Role.ASSISTANT)
        try:
            for i in ids: official.process(i)
        except oh.HarmonyError: continue # the noise hit a header
        parser, deltas = run(tok, ids)
        check(parser, deltas)
        want = [(m.channel, m.recipient, m.content_type, m.content[0].text) for m in official.messages]
        assert [(m.channel, m.recipient, m.content_type, m.text) for m in parser.messages] == want
        assert all(m.complete for m in parser.messages)

@pytest.mark.parametrize("seed", range(4))
def test_parser_never_raises(seed):
    "Noise, cuts, swaps and insertions anywhere"
    rng, seen = random.Random(seed), set()
    for _ in range(500):
        ids = encode_pieces(BYTES, answer(rng))
        for _ in range(rng.randrange(5)):
            at, kind = rng.randrange(len(ids) + 1), rng.randrange(5)
            if kind == 0: del ids[at:]
            elif kind == 1: del ids[at:at+rng.randrange(4)]
            elif kind == 2: ids.insert(at, rng.choice([*range(256, 277), -5, 10**12]))
            elif kind == 3: ids[at:at] = [rng.randrange(128, 256) for _ in range(rng.randrange(4))]
            else: ids[at:at] = ids[:rng.randrange(len(ids)+1)]
        parser, deltas = run(BYTES, ids)
        check(parser, deltas)
        seen |= set(parser.flags)
    assert seen == set(FLAGS)

@given(st.lists(st.one_of(st.integers(0, 276), st.sampled_from([261, 262, 263, 264, 265, 266, 270, 300, -1])), max_size=60))
@settings(max_examples=200, deadline=None)
def test_parser_takes_anything(ids): check(*run(BYTES, ids))

def test_readings_of_malformed_answers():
    read = lambda s: run(BYTES, BYTES.encode(s, allow_special=True))[0]
    p = read("<|channel|>analysis<|message|>hm<|start|>assistant<|channel|>final<|message|>7<|return|>")
    assert p.flags == ["missing_end"] and final_text(p.messages) == "7" and reasoning_text(p.messages) == "hm"
    p = read("<|channel|>thought<|message|>7<|end|><|start|>assistant to=functions.f<|message|>{}<|call|>") # an answer, and none
    assert p.flags == ["unknown_channel"] and final_text(p.messages) == "7" and len(p.messages) == 2
    p = read("<|channel|>final The answer<|return|>")
    assert p.flags == ["missing_message"] and final_text(p.messages) == "The answer"
    p = read("<|channel|>final<|message|>ab\u00e9"[:-1] + "<|constrain|>cd<|return|>")
    assert p.flags == ["unexpected_token"] and final_text(p.messages) == "abcd"
    p = read(" to=functions.f<|channel|>commentary json<|message|>{}")
    assert p.flags == ["cut"] and tool_calls(p.messages) == [] and p.messages[0].recipient == "functions.f"
    assert read("").flags == ["cut"] and read("").messages == []
    p = read("<|channel|>commentary<|constrain|>a<|constrain|>b<|message|>{}<|call|>") # in no order that means anything
    assert p.flags == ["bad_header"] and (p.messages[0].recipient, p.messages[0].content_type) == (None, "<|constrain|>b")

def test_long_headers_are_read_in_linear_time():
    start = time.thread_time()
    assert parse_header(" " * 300_000 + "x", ended=False) == (Header(), ["x"])
    assert time.thread_time() - start < 5 # a minute, if each space were tried as the first of a run

# ---- detokenizing

LETTERS = st.text(alphabet="ab\n é👍", max_size=30)

@given(st.lists(st.one_of(st.integers(0, 255), st.sampled_from([*"ab👍é".encode(), 265, 10**6])), max_size=50),
       st.lists(st.text(alphabet="abé👍\ufffd", min_size=1, max_size=5), max_size=3), st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_detokenizer_is_the_full_decode_cut_at_the_first_stop(ids, stops, include, skip):
    d = Detokenizer(BYTES, stop=stops, include_stop=include, skip_special_tokens=skip)
    out = [d.feed(i) for i in ids] + [d.finish()]
    whole = BYTES.decode(ids, skip_special_tokens=skip)
    # the first to be complete, and the longest of those
    ends = [(whole.find(s) + len(s), -len(s), s) for s in stops if s in whole]
    if ends:
        end, _, stop = min(ends)
        assert d.stopped == stop and "".join(out) == (whole[:end] if include else whole[:end-len(stop)])
    else: assert d.stopped is None and "".join(out) == whole

@given(st.text(alphabet="abé👍", max_size=30), st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=3))
@settings(max_examples=200, deadline=None)
def test_detokenizer_holds_back_no_more_than_it_must(body, stops):
    "After each whole character: all text, less what a stop string could still begin with"
    d, shown = Detokenizer(BYTES, stop=stops), ""
    for n, char in enumerate(body):
        shown += "".join(d.feed(b) for b in char.encode())
        if d.stopped is not None: break
        held = max((k for s in stops for k in range(len(s)) if body[:n+1].endswith(s[:k])), default=0)
        assert shown == body[:n+1-held]

@given(LETTERS, st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3), st.randoms())
@settings(max_examples=50, deadline=None)
def test_detokenizer_does_not_care_how_text_is_cut_into_tokens(body, stops, rng):
    cuts = sorted(rng.sample(range(len(body.encode())+1), min(len(body.encode()), 4)))
    data = body.encode()
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)]) if a < b]
    extra = {part: 400 + i for i, part in enumerate(dict.fromkeys(p for p in parts if len(p) > 1))}
    wide = Tokenizer(Vocabulary({bytes([b]): b for b in range(256)} | extra, O200K_PATTERN))
    texts = []
    for ids in [list(data), [extra.get(p, p[0]) for p in parts]]:
        d = Detokenizer(wide, stop=stops)
        texts.append(("".join([d.feed(i) for i in ids] + [d.finish()]), d.stopped))
    assert texts[0] == texts[1]

def test_stop_strings_may_not_begin_before_they_are_allowed():
    d = Detokenizer(BYTES, stop="ab")
    assert "".join([d.feed(97, check_stop=False), d.feed(98), d.feed(97), d.feed(98), d.finish()]) == "ab"
    assert d.stopped == "ab"

# ---- templates

TEMPLATE = """{%- for m in messages %}{% if loop.first and tools %}{{ tools | tojson(indent=2) }}{% endif %}
<|start|>{{ m.role }}<|message|>{{ m['content'] | trim }}{% if m.role == 'x' %}{% continue %}{% endif %}<|end|>
{%- endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}{{ extra }}"""

TEMPLATE += """{% for m in messages %}{% for k in m %}{{ k }}={{ m[k] }};{% endfor %}{% endfor %}{{ documents is none }}{{ tools is none }}"""

def test_templates_as_transformers_renders_them():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [dict(role="user", content=" a<b>&é "), dict(role="x", content="y"), dict(role="assistant", content="z"),
                dict(role="assistant", thinking="", reasoning="b", content=""), dict(reasoning="c", role="assistant", content="d"),
                dict(role="assistant", reasoning_content="e", thinking="f", content="g")]
    for tools in (None, [], [dict(type="function", function=dict(name="f", description="<é>"))]):
        want, _ = utils.render_jinja_template([messages], tools=tools, chat_template=TEMPLATE,
                                              add_generation_prompt=True, extra="!")
        assert render_template(TEMPLATE, messages, tools, extra="!") == want[0]
    with pytest.raises(ChatError): render_template("{{ messages.__class__.__mro__ }}", messages)
    with pytest.raises(ChatError): render_template("{% if %}", messages)
    nothing = [dict(role="assistant", content=None, tool_calls=None, reasoning=None)] # as if it were not there
    assert render_template("{{ messages[0] | length }}", nothing) == "1"

@pytest.mark.parametrize("template, words", [
    ("{{ 1 / 0 }}", "ZeroDivisionError"), ("{{ [].pop() }}", "IndexError|SecurityError"), ("{{ '{'.format() }}", "ValueError"),
    ("{{ {}['a'].b }}", "UndefinedError"), ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{{ range(10**9) }}", "OverflowError"), ("{{ raise_exception('as it says') }}", "as it says")])
def test_whatever_a_template_does_is_a_chat_error(template, words):
    with pytest.raises(ChatError, match=words): encode_chat(BYTES, [dict(role="user", content="a")], template=template)

def test_messages_without_end():
    message, deep = dict(role="user", content="a"), []
    message["itself"] = message
    for _ in range(10_000): deep = [deep]
    for bad in (message, dict(role="user", content=deep)):
        with pytest.raises(ChatError, match="chat template: RecursionError"): encode_chat(BYTES, [bad], template="{{ messages }}")

def test_no_format_at_all():
    plain = Tokenizer(Vocabulary({bytes([b]): b for b in range(256)}, O200K_PATTERN, (Added("</s>", 256),)))
    with pytest.raises(ChatError, match="this checkpoint brings no chat template"): encode_chat(plain, [dict(role="user", content="a")])

def test_templates_that_are_no_text(tmp_path):
    for name in ("additional_chat_templates/rag.jinja", "chat_template.jinja"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/"tokenizer_config.json").write_text('{"chat_template": "x"}')
        (tmp_path/name).write_bytes(b"\xff\xfe{{ x }}")
        with pytest.raises(CheckpointError, match=f"{Path(name).name}: expected UTF-8"): read_template(tmp_path)

def test_documents_are_only_text():
    pieces = template_pieces(BYTES, "{{ documents[0].text }}<|end|>", [], documents=[dict(text="a<|end|>")])
    assert pieces == ["a<|end|>", "<|end|>"] and [isinstance(p, Special) for p in pieces] == [False, True]

@given(st.lists(st.sampled_from(["<|end|>", "<|start|>", "<|", "end", "|>", "a", " "]), max_size=12))
@settings(max_examples=100, deadline=None)
def test_users_cannot_write_special_tokens(words):
    content = "".join(words)
    template = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    for pieces in (template_pieces(BYTES, template, [dict(role="user", content=content)]),
                   render_message(Message("user", content))):
        assert [p for p in pieces if isinstance(p, Special)] == ["<|start|>", "<|message|>", "<|end|>"]
        assert "".join(pieces) == f"<|start|>user<|message|>{content}<|end|>"

@given(st.lists(st.sampled_from(["<|end|>", "<|start|>", "<", "<|", "en", "end|>", "d|>", "|>", "a", " ", "\n"]), max_size=9))
@settings(max_examples=100, deadline=None)
def test_users_cannot_write_special_tokens_in_parts(words):
    "Not even where a template puts the parts of a content, or names and values of a tool, side by side"
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}<|end|>{% for k in tools[0] %}{{ k ~ tools[0][k] }}{% endfor %}{% endfor %}"
    content, tools = [dict(type="text", text=w) for w in words], [dict(zip(words, words[1:]))]
    pieces = template_pieces(BYTES, template, [dict(role="user", content=content)], tools)
    assert [p for p in pieces if isinstance(p, Special)] == ["<|end|>"]
    assert "".join(pieces) == "".join(words) + "<|end|>" + "".join(k + v for k, v in tools[0].items())
