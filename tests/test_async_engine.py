"What a chat format is told, what a checkpoint recommends, and streams that a coroutine reads with little patience"
import asyncio, json, queue, threading
from types import SimpleNamespace
import pytest
from simplellm.async_engine import LLM, Stream, default_params, read_chat
from simplellm.chat import ChatError, Template
from simplellm.checkpoint import CheckpointError
from simplellm.engine import Chunk
from simplellm.sampling import SamplingParams
from simplellm.tokenizer import Added, O200K_PATTERN, Tokenizer, Vocabulary

HI = [dict(role="user", content="hi")]
PLAIN = Tokenizer(Vocabulary({bytes([b]): b for b in range(256)}, O200K_PATTERN, (Added("</s>", 256),)))
VARIABLES = "".join("|{{ %s | default('-') }}" % name for name in ("reasoning_effort", "date", "enable_thinking"))
TOLD = Template(dict(default="{{ messages[0].content }}" + VARIABLES + "|{{ tools is none }}"), {})

# ---- what a chat format is told

@pytest.fixture(scope="module")
def llm():
    "The shipped model, which speaks harmony"
    with LLM(device="cpu") as llm: yield llm

@pytest.mark.parametrize("options, want", [
    ({}, "hi|-|-|-|True"), (dict(reasoning_effort="low", date="2026-11-21", tools=[]), "hi|low|2026-11-21|-|False"),
    (dict(chat_template_kwargs={}), "hi|-|-|-|True"), (dict(chat_template_kwargs=dict(enable_thinking=False)), "hi|-|-|False|True"),
    (dict(reasoning_effort="low", chat_template_kwargs=dict(reasoning_effort="high")), "hi|high|-|-|True")])
def test_a_template_is_told_what_was_given(llm, monkeypatch, options, want):
    monkeypatch.setattr(llm, "template", TOLD)
    assert llm.chat(HI, max_tokens=1, **options)[0].prompt == want
    assert llm.chat_stream(HI, max_tokens=1, **options).result(60).prompt == want

@pytest.mark.parametrize("given", [dict(messages=[]), dict(tools=[]), dict(template="x"), dict(tokenizer=1), {1: 2}, "x", [1]])
def test_variables_that_are_none(llm, monkeypatch, given):
    monkeypatch.setattr(llm, "template", TOLD)
    with pytest.raises(ValueError, match="chat_template_kwargs"): llm.chat(HI, chat_template_kwargs=given)

def test_harmony_has_its_own_options(llm):
    for effort, date in ((None, None), ("low", "2026-11-21")):
        prompt = llm.chat(HI, max_tokens=1, reasoning_effort=effort, date=date, chat_template_kwargs={})[0].prompt
        assert f"Reasoning: {effort or 'medium'}\n" in prompt and ("Current date: 2026-11-21" in prompt) == (date is not None)
    for ask in (llm.chat, llm.chat_stream):
        with pytest.raises(ValueError, match="chat_template_kwargs=.*harmony"): ask(HI, chat_template_kwargs=dict(enable_thinking=True))
        with pytest.raises(ChatError, match="reasoning_effort"): ask(HI, reasoning_effort="extreme")

def test_no_format_at_all():
    plain = SimpleNamespace(tokenizer=PLAIN, template=None)
    for options in ({}, dict(reasoning_effort="low"), dict(chat_template_kwargs=dict(a=1))):
        with pytest.raises(ChatError, match="this checkpoint brings no chat template"): read_chat(plain, HI, options)

# ---- what a checkpoint recommends

def test_generation_config(tmp_path):
    def read(source="auto", **config):
        (tmp_path/"generation_config.json").write_text(json.dumps(config))
        return default_params(tmp_path, source)
    for bad in (dict(temperature=-1), dict(top_p="much"), dict(max_new_tokens=0), dict(top_k=1.5), dict(repetition_penalty=0)):
        with pytest.raises(CheckpointError, match="generation_config.json: "): read(**bad)
        assert read("vllm", **bad) == SamplingParams()
    assert read(temperature=.7, do_sample=False).temperature == 0 and read(temperature=.7, do_sample=True).temperature == .7

# ---- streams

def test_a_coroutine_runs_out_of_patience_and_comes_back():
    worker = SimpleNamespace(lock=threading.RLock(), refusal=None, pending={}, inbox=queue.SimpleQueue(), engine=SimpleNamespace(add=None))
    stream = Stream(SimpleNamespace(worker=worker), SimpleNamespace(id="r"), timeout=0.1)
    writer = worker.pending["r"]
    async def read():
        for text in "ab":
            for _ in range(2):
                with pytest.raises(TimeoutError): await anext(stream)
            writer.put(Chunk(0, text, [7]))
            assert (await anext(stream)).text == text
        writer.put(Chunk(0, "c", [7]))
        writer.put("the whole")
        return [chunk.text async for chunk in stream]
    assert asyncio.run(read()) == ["c"] and stream.result() == "the whole"

def test_a_patient_coroutine_waits():
    worker = SimpleNamespace(lock=threading.RLock(), refusal=None, pending={}, inbox=queue.SimpleQueue(), engine=SimpleNamespace(add=None))
    stream = Stream(SimpleNamespace(worker=worker), SimpleNamespace(id="r"))
    threading.Timer(0.05, worker.pending["r"].put, [Chunk(0, "late", [7])]).start()
    async def read(): return await anext(stream)
    assert asyncio.run(read()).text == "late"
