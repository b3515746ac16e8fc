"The examples of the shipped model: the same for a seed, the harmony that openai-harmony writes, and judged exactly."
import hashlib, json, os
from dataclasses import replace
from pathlib import Path
from random import Random
import pytest
from simplellm.tiny_tasks import (ASK, TASKS, answer_pieces, check, cut_final, cut_thinking, expand, fill, harmony, held_out,
                                  parse, sample, some_list, think_add, think_mul, think_sort, think_sub)

BASE = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
needs_o200k = pytest.mark.skipif(not (BASE and (Path(BASE)/"o200k_base.tiktoken").is_file()),
                                 reason="TIKTOKEN_ENCODINGS_BASE holds no o200k_base.tiktoken")

def samples(n, seed=0, **kw):
    rng = Random(seed)
    return [sample(rng, TASKS[i % len(TASKS)], **kw) for i in range(n)]

def text(s): return "".join(piece for piece, _ in harmony(s))

def last_turn(s):
    m = s.messages[-1]
    return dict(thinking=m["thinking"], final=m["content"] or None, tool_call=next(iter(m["tool_calls"]), None))

def test_the_recipe_of_the_shipped_model():
    "The checkpoint was trained on exactly these samples; whoever changes them has to train again"
    rng = Random(0)
    seen = hashlib.sha256("\0".join(piece for _ in range(1000) for piece, _ in harmony(sample(rng))).encode()).hexdigest()
    assert seen[:16] == "90748b27b0daf013"

def test_everything_comes_from_the_generator_passed_in():
    a, b = Random(3), Random(3)
    for _ in range(200): assert sample(a) == sample(b)
    assert a.getstate() == b.getstate()

@pytest.mark.parametrize("split", ["train", "test"])
def test_own_answers_are_right_and_others_wrong(split):
    for s in samples(420, 1, split=split):
        good = last_turn(s)
        assert check(s, **good), s
        assert not check(s) and not check(s, final=(good["final"] or "") + "1")
        if good["tool_call"]:
            assert not check(s, tool_call=good["tool_call"] | dict(name="other")) and not check(s, final="done")
        else: assert not check(s, final=good["final"], tool_call=dict(name="f", arguments={}))

def test_json_is_compared_as_a_value():
    for s in samples(140, 2):
        if s.task != "json": continue
        final = s.messages[-1]["content"]
        assert check(s, final=json.dumps(json.loads(final), indent=1)) and not check(s, final=f"Here: {final}")

def test_the_working_ends_in_the_result():
    rng = Random(4)
    for _ in range(2000):
        a, b = rng.randrange(-9999, 10000), rng.randrange(-9999, 10000)
        assert int(think_add(a, b).split("\n")[-1]) == a + b and int(think_sub(a, b).split("\n")[-1]) == a - b
        a, b = rng.randrange(100), rng.randrange(100)
        assert int(think_mul(a, b).split("\n")[-1]) == a*b
        xs, down = some_list(rng, "any"), rng.random() < .5
        xs = list(dict.fromkeys(xs))
        order = [line[-1] for line in think_sort(xs, down).split("\n") if line[0] in "<>"]
        if isinstance(xs[0], int): assert [xs["abcdef".index(i)] for i in order] == sorted(xs, reverse=down)

def test_low_effort_answers_at_once_and_no_slot_stays_open():
    for s in samples(700, 5):
        if s.effort == "low": assert not any(m.get("thinking") for m in s.messages)
        words = " ".join(m["content"] for m in s.messages if m["role"] == "user")
        assert "{x}" not in words and "{o}" not in words and "{a}" not in words and "<|" not in words and words.strip()

def test_wordings_and_operands_of_the_test_split_are_unseen():
    train = {m["content"] for s in samples(2800, 6) for m in s.messages if m["role"] == "user"}
    test = {m["content"] for s in samples(280, 7, split="test") for m in s.messages[-2:] if m["role"] == "user"}
    assert len(train & test) <= 3 # a small sum followed by "again" may repeat
    for task, key in (("add", "add"), ("multiply", "mul")):
        for split in ("train", "test"):
            for c in (ASK[task](Random(i), split) for i in range(100)):
                a, b = c.args
                either = {held_out(f"{key}{x},{y}", 10) for x, y in ((a, b), (b, a))}
                if min(a, b) >= 0: assert (split == "test") in either

def test_pieces_only_cut_the_text():
    assert cut_final('a {"b": "cd e"}', '{"b": "cd e"}') == ["a ", '{"', "b", '": "', "c", "d", " e", '"}']
    assert cut_final("85", "") == ["85"] and cut_final("The result is ab.", " ab.") == ["The result is", " a", "b", "."]
    assert cut_thinking("reverse ab\n1a2b") == ["reverse", " a", "b", "\n", "1", "a", "2", "b"]
    assert cut_thinking("call f_g: x = ab, y = c") == ["call f_g: x =", " a", "b", ", y =", " c"]
    assert cut_thinking("cmp larger 1 2\nabout: KV cache") == ["cmp larger 1 2", "\n", "about: KV cache"]
    for s in samples(280, 9):
        last = s.messages[-1]
        for whole in filter(None, (last["thinking"], last["content"])): assert whole in "".join(answer_pieces(s))
    for s in samples(140, 8):
        pieces = harmony(s)
        assert not pieces[0][1] and all(learnt for _, learnt in pieces[1:]) and all(p for p, _ in pieces)
        assert pieces[0][0].endswith("<|start|>assistant") and pieces[-1][0].endswith(("<|return|>", "<|call|>"))

def test_templates():
    assert {expand(parse("a[b|c[d|]]e"), Random(i)) for i in range(60)} == {"abe", "acde", "ace"}
    assert fill("{a} and {a}, {unknown}", Random(0), a=3) == "3 and 3, {unknown}"

@needs_o200k
def test_the_text_is_what_openai_harmony_writes():
    oh = pytest.importorskip("openai_harmony")
    enc = oh.load_harmony_encoding(oh.HarmonyEncodingName.HARMONY_GPT_OSS)
    def of_role(role, content): return oh.Message.from_role_and_content(role, content)
    def head(s):
        system = oh.SystemContent.new().with_reasoning_effort(oh.ReasoningEffort[s.effort.upper()])
        yield of_role(oh.Role.SYSTEM, system.with_conversation_start_date(s.date) if s.date else system)
        dev = oh.DeveloperContent.new()
        if s.instructions: dev = dev.with_instructions(s.instructions)
        fs = [t["function"] for t in s.tools]
        new = oh.ToolDescription.new
        if fs: dev = dev.with_function_tools([new(f["name"], f["description"], parameters=f["parameters"]) for f in fs])
        if fs or s.instructions: yield of_role(oh.Role.DEVELOPER, dev)
    def said(m):
        if m["role"] == "user": yield of_role(oh.Role.USER, m["content"])
        elif m["role"] == "tool":
            author = oh.Author.new(oh.Role.TOOL, "functions." + m["name"])
            result = oh.Message.from_author_and_content(author, m["content"])
            yield result.with_recipient("assistant").with_channel("commentary")
        else:
            if m["thinking"]: yield of_role(oh.Role.ASSISTANT, m["thinking"]).with_channel("analysis")
            for call in m["tool_calls"]:
                args = of_role(oh.Role.ASSISTANT, json.dumps(call["arguments"], ensure_ascii=False))
                args = args.with_channel("commentary").with_content_type("<|constrain|>json")
                yield args.with_recipient("functions." + call["name"])
            if not m["tool_calls"]: yield of_role(oh.Role.ASSISTANT, m["content"]).with_channel("final")
    for s in samples(420, 9):
        s = replace(s, style="harmony")
        prompt = oh.Conversation.from_messages([*head(s), *(x for m in s.messages[:-1] for x in said(m))])
        want = enc.decode(enc.render_conversation_for_completion(prompt, oh.Role.ASSISTANT))
        want = want.removesuffix("<|start|>assistant")
        want += "".join(enc.decode(enc.render(x)) for x in said(s.messages[-1]))
        assert text(s).replace("<|return|>", "<|end|>") == want
