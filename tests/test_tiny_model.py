"The shipped model in transformers, and what it can do"
import json, random
from pathlib import Path
import pytest, torch
from simplellm import LLM, tiny_tasks
from simplellm.models import tiny_path
from simplellm.tiny_model import exam, tiny_config
from simplellm.tokenizer import load_tokenizer

PROMPTS = [("add", "high"), ("subtract", "medium"), ("reverse", "high"), ("tool", "high"), ("json", "low"), ("about", "medium")]

def prompt(task, effort, seed):
    "A conversation up to where the model speaks"
    sample = tiny_tasks.sample(random.Random(seed), task, "test", effort)
    return "".join(text for text, learnt in tiny_tasks.harmony(sample) if not learnt)

@pytest.fixture(scope="module")
def llm():
    with LLM(dtype="float32", max_model_len=1024) as llm: yield llm

@pytest.fixture(scope="module")
def theirs():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    return AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(tiny_path())

def test_size():
    files = [f for f in Path(tiny_path()).iterdir()]
    assert sum(f.stat().st_size for f in files) < 8e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
            "chat_template.jinja", "generation_config.json"} <= {f.name for f in files}

def test_config_is_the_notebooks(llm):
    made = tiny_config()
    for field in ("family", "vocab_size", "hidden_size", "num_layers", "intermediate_size", "rope", "windows", "num_experts", "top_k", "sinks"):
        assert getattr(llm.config, field) == getattr(made, field), field

@pytest.mark.parametrize("task,effort", PROMPTS)
def test_transformers_continues_alike(llm, theirs, task, effort):
    "Greedily, token for token"
    model, tokenizer = theirs
    text = prompt(task, effort, 5)
    ids = llm.tokenizer.encode(text, allow_special=True)
    assert tokenizer(text)["input_ids"] == ids
    with torch.no_grad(): want = model.generate(torch.tensor([ids]), max_new_tokens=120, do_sample=False)[0, len(ids):].tolist()
    got = list(llm.generate([ids], temperature=0, max_tokens=120)[0].outputs[0].token_ids)
    stops = set(llm.config.eos_token_ids)
    strip = lambda t: t[:-1] if t and t[-1] in stops else t
    assert strip(got) == strip(want)

def test_chat_template_is_harmony(theirs):
    "The template renders what `render_harmony` renders"
    from simplellm.chat import render_harmony
    _, tokenizer = theirs
    rng = random.Random(2)
    for i in range(56):
        s = tiny_tasks.sample(rng, tiny_tasks.TASKS[i % 14])
        messages = ([dict(role="developer", content=s.instructions)] if s.instructions else []) + s.messages[:-1]
        got = tokenizer.apply_chat_template(messages, tools=s.tools or None, add_generation_prompt=True, tokenize=False,
                                            reasoning_effort=s.effort, current_date=s.date or "")
        assert got == "".join(render_harmony(messages, s.tools, reasoning_effort=s.effort, date=s.date))

def test_it_works(llm):
    "A small exam; the large one is in the notebook"
    rng = random.Random(99)
    records = exam(llm, [tiny_tasks.sample(rng, task, "test", effort) for task in tiny_tasks.TASKS for effort in ("high", "medium", "high")])
    assert sum(r["parsed"] for r in records) >= len(records) - 1
    assert sum(r["right"] for r in records) >= .85*len(records)
