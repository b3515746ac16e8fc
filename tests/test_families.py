"Every family against transformers: random small checkpoints, their logits, and greedy tokens alone and in company"
import copy, importlib.util, json, math, random, threading
from pathlib import Path
import pytest, torch

transformers = pytest.importorskip("transformers", reason="the judge of this file")
from simplellm import LLM
from simplellm.batch import make_batch
from simplellm.chat import ChatError, encode_chat, read_template
from simplellm.checkpoint import Checkpoint, CheckpointError
from simplellm.config import EngineConfig
from simplellm.engine import Engine, RequestOutput, make_job
from simplellm.models import FAMILIES, load_model, load_weights, read_config, tensor_table
from simplellm.parallel import Shard
from simplellm.sampling import SamplingParams
from simplellm.synthetic import CONFIGS
from simplellm.tokenizer import load_tokenizer
from simplellm.transformer import Transformer

_spec = importlib.util.spec_from_file_location("parity", Path(__file__).with_name("test_parity.py"))
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

CASES, PROMPT, NEW = 10, 40, 64
ROPE = dict(default={}, linear=dict(factor=2.0), yarn=dict(factor=4.0, original_max_position_embeddings=32),
            llama3=dict(factor=8.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0))

def windows(rng, layers): return dict(use_sliding_window=rng.random() < .7, sliding_window=rng.choice([1, 7, 16, 33]),
                                      max_window_layers=rng.randint(0, layers - 1))
def experts(rng, n): return dict(num_local_experts=n, num_experts_per_tok=rng.randint(1, min(n, 3)))

OWN = dict( # what a family has beside the others
    llama=lambda rng, seed, layers: dict(head_dim=rng.choice([None, 16, 32]), attention_bias=seed % 3 == 1, mlp_bias=seed % 3 == 2),
    qwen2=lambda rng, seed, layers: windows(rng, layers),
    qwen3=lambda rng, seed, layers: dict(head_dim=rng.choice([8, 16, 32]), attention_bias=seed % 3 == 1) | windows(rng, layers),
    qwen3_moe=lambda rng, seed, layers: experts(rng, rng.choice([1, 4, 7])) | windows(rng, layers) | dict(
        head_dim=rng.choice([8, 16]), attention_bias=seed % 3 == 1, moe_intermediate_size=rng.choice([8, 24]), norm_topk_prob=seed % 2 == 0,
        mlp_only_layers=[0] if seed % 3 == 2 else [], decoder_sparse_step=2 if seed % 5 == 4 else 1),
    nanochat=lambda rng, seed, layers: dict(attention_bias=seed % 3 == 1, final_logit_softcapping=rng.choice([15.0, 3.0])),
    mixtral=lambda rng, seed, layers: experts(rng, rng.choice([2, 4, 7])) | dict(
        head_dim=rng.choice([None, 16][seed % 4 == 2:]), sliding_window=rng.choice([None, 5, 16])), # transformers' Mixtral has no YaRN without head_dim
    gpt_oss=lambda rng, seed, layers: experts(rng, rng.choice([1, 4, 7])) | dict(
        head_dim=rng.choice([16, 32]), sliding_window=rng.choice([1, 7, 16, 33]),
        layer_types=[rng.choice(["sliding_attention", "full_attention"]) for _ in range(layers)]))

def stored(seed):
    "The type of a checkpoint's tensors: each once in three or four seeds, and under several kinds of RoPE"
    return "bfloat16" if seed % 3 == 0 else "float16" if seed % 5 == 2 else "float32"

def random_config(family, seed, **changes):
    "A model that nobody would train, in transformers' words"
    rng = random.Random(f"{family} {seed}")
    kv_heads, layers, kind = rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), list(ROPE)[seed % 4]
    heads = kv_heads * rng.choice([1, 2, 4])
    d = dict(vocab_size=rng.choice([50, 96, 131]), hidden_size=heads * rng.choice([8, 16]), intermediate_size=rng.choice([24, 40]),
             num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=256,
             rms_norm_eps=rng.choice([1e-5, 1e-6]), tie_word_embeddings=seed % 2 == 1, eos_token_id=[3, 5], bos_token_id=None, pad_token_id=None,
             rope_parameters=dict(rope_type=kind, rope_theta=rng.choice([1e4, 5e5]), **ROPE[kind]), attn_implementation="eager")
    name = FAMILIES[family].architecture.removesuffix("ForCausalLM")
    return getattr(transformers, name + "Config")(**d | OWN[family](rng, seed, changes.get("num_hidden_layers", layers)) | changes)

def random_judge(family, seed, folder, **changes):
    "transformers' model, written to a folder as `stored` says; the judge has what was written, in float32"
    config = random_config(family, seed, **changes)
    torch.manual_seed(seed)
    model, dtype = getattr(transformers, FAMILIES[family].architecture)(config).eval(), getattr(torch, stored(seed))
    for name, p in model.named_parameters():
        centre, spread = (1, .2) if "norm" in name else (0, .2 if "bias" in name else p.shape[-1] ** -.5)
        p.data = (centre + spread * torch.randn_like(p)).to(dtype).float()
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    return model

def generate(engine, prompts):
    "Greedy tokens of prompts that are in the engine together, and how likely every token was"
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=-1)
    jobs, done = [make_job(engine, p, params) for p in prompts], {}
    for j in jobs: engine.add(j)
    while engine.has_work:
        for key, news in engine.step():
            if isinstance(news, Exception): raise news
            if isinstance(news, RequestOutput): done[key] = news
    return [done[j.id] for j in jobs]

def close_scores(outputs, want):
    "The log-probabilities that an engine reports, of every token at every position, and those of the judge's logits"
    for o, w in zip(outputs, want.log_softmax(-1)):
        got = torch.tensor([[scores[t].logprob for t in range(w.shape[-1])] for scores in o.outputs[0].logprobs])
        assert len(got) == NEW
        parity.close([got], [w[PROMPT - 1:-1]])

@pytest.mark.parametrize("seed", range(CASES))
@pytest.mark.parametrize("family", OWN)
def test_family(tmp_path, family, seed):
    "The same greedy tokens and log-probabilities alone, and in chunks with company and a found prefix; the same logits however they are computed"
    judge, rng = random_judge(family, seed, tmp_path), random.Random(seed)
    model = load_model(tmp_path, device="cpu")
    assert model.config.dtype == stored(seed) and model.dtype == torch.float32
    first, other = ([rng.randrange(model.config.vocab_size) for _ in range(PROMPT)] for _ in range(2))
    prompts = [first, first[:24] + other[24:], other]
    engine = Engine(model, EngineConfig(max_num_batched_tokens=16, max_num_seqs=3, max_model_len=128, num_blocks=64, block_size=8))
    alone, together = generate(engine, [first]), generate(engine, prompts)
    assert together[0].outputs[0].token_ids == alone[0].outputs[0].token_ids
    assert together[0].num_cached_tokens > 0 < together[1].num_cached_tokens
    tokens = [p + o.outputs[0].token_ids for p, o in zip(prompts, together)]
    with torch.inference_mode(): want = judge(torch.tensor(tokens)).logits.float()
    assert want.std() > .3, "logits of no natural size prove nothing"
    for w, t in zip(want, tokens): assert w[PROMPT - 1:-1].argmax(-1).tolist() == t[PROMPT:]  # what the judge would have continued with
    close_scores(together, want)
    parity.close(parity.in_steps(model, tokens, rng.choice([1, 5, 16]), lambda i, left: rng.randint(1, min(left, 25)), rng), want)

def test_cases_are_different():
    for family in OWN:
        configs = [random_config(family, s) for s in range(CASES)]
        assert {c.rope_parameters["rope_type"] for c in configs} == set(ROPE)
        assert len({c.num_attention_heads // c.num_key_value_heads for c in configs}) > 1 and len({c.num_hidden_layers for c in configs}) > 1
        if family not in ("llama", "nanochat"): assert len({c.sliding_window for c in configs}) > 2

@pytest.mark.parametrize("family", OWN)
def test_ranks_agree_with_one(tmp_path, family):
    "Two ranks with a part of each tensor"
    changes = dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=64, vocab_size=96, num_hidden_layers=2)
    judge, room, got = random_judge(family, 2, tmp_path, **changes), parity.Room(2), [None] * 2
    tokens, checkpoint, config = [7 * i % 96 for i in range(30)], Checkpoint(tmp_path), read_config(tmp_path)
    with torch.inference_mode(): want = judge(torch.tensor([tokens])).logits[0]
    def rank(r):
        shard = Shard(r, 2)
        model = Transformer(config, load_weights(checkpoint, config, torch.float32, "cpu", shard=shard), shard=shard,
                            all_reduce=lambda x: room.all_reduce(r, x))
        got[r] = model(make_batch([(tokens, 0, [1, 0], "all")], 16), model.new_cache(2))
    threads = [threading.Thread(target=rank, args=(r,), daemon=True) for r in range(2)]
    for t in threads: t.start()
    for t in threads: t.join(120)
    parity.close(got, [want] * 2)

def test_two_families_in_one_process(tmp_path, monkeypatch):
    "Two engines, each with its own thread, cache and family, write at once what each writes by itself"
    names, steps, rng = ("llama", "qwen3_moe"), [], random.Random(0)
    for name in names: random_judge(name, 1, tmp_path/name, vocab_size=96, num_hidden_layers=2)
    def open_one(name): return LLM(tmp_path/name, device="cpu", skip_tokenizer_init=True, num_blocks=64, max_num_seqs=6, max_num_batched_tokens=16)
    prompts = [[rng.randrange(96) for _ in range(rng.randint(1, 50))] for _ in range(12)]
    wishes = [SamplingParams(temperature=i % 2, seed=i, max_tokens=rng.randint(20, 60), ignore_eos=True) for i in range(12)]
    def tokens(generation): return [o.outputs[0].token_ids for o in generation]
    alone = {}
    for name in names:
        with open_one(name) as llm: alone[name] = tokens(llm.generate(prompts, wishes))
    assert not any(a == b for a, b in zip(*alone.values()))
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: steps.append(engine.model.config.family) or step(engine))
    with open_one(names[0]) as one, open_one(names[1]) as two:
        both = [llm.generate(prompts, wishes) for llm in (one, two)]
        assert dict(zip(names, map(tokens, both))) == alone
    assert sum(a != b for a, b in zip(steps, steps[1:])) > 10, "they took turns, or one waited for the other"

REFUSED = [
    ("llama", dict(hidden_act="gelu"), "hidden_act 'gelu'"), ("llama", dict(partial_rotary_factor=.5), "partial_rotary_factor"),
    ("llama", dict(rope_parameters=dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0])), "rope_type 'longrope'"),
    ("llama", dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=8.0, original_max_position_embeddings=64)), "low_freq_factor"),
    ("llama", dict(rope_parameters=dict(rope_type="yarn", type="linear", rope_theta=1e4, factor=2.0)), "contradicts"),
    ("llama", dict(num_hidden_layers=10**18), "num_hidden_layers"), ("llama", dict(mlp_bias="yes"), "mlp_bias"),
    ("llama", dict(quantization_config=dict(quant_method="mxfp4")), "quantization_config"), ("qwen3", dict(head_dim="gone"), "head_dim"),
    ("llama", dict(original_max_position_embeddings=64, rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=2.0,
        original_max_position_embeddings=32)), "original_max_position_embeddings 64 contradicts"),
    *[("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=n)), "rope_theta") for n in (1, 1e13, 10**400)],
    ("llama", dict(layer_types=["sliding_attention"], sliding_window=4), "layer_types"),
    ("qwen2", dict(use_sliding_window=True, sliding_window="gone"), "missing field 'sliding_window'"),
    ("qwen2", dict(use_sliding_window=False, sliding_window=4, layer_types=["sliding_attention"]), "use_sliding_window False contradicts layer_types"),
    ("qwen3_moe", dict(use_sliding_window=False, layer_types=["sliding_attention"]), "layer_types"),
    ("mixtral", dict(sliding_window=None, layer_types=["sliding_attention"]), "layer_types"),
    ("nanochat", dict(hidden_act="silu"), "hidden_act 'silu'"), ("nanochat", dict(final_logit_softcapping=None), "final_logit_softcapping"),
    ("nanochat", dict(final_logit_softcapping=-1), "final_logit_softcapping"), ("nanochat", dict(hidden_act="gone"), "hidden_act"),
    ("qwen2", dict(use_sliding_window="gone"), "use_sliding_window"), ("qwen2", dict(use_sliding_window="no"), "use_sliding_window"),
    ("qwen2", dict(use_sliding_window=True, sliding_window=8, layer_types="gone", max_window_layers="gone"), "max_window_layers"),
    ("qwen3_moe", dict(mlp_only_layers=3), "mlp_only_layers"), ("qwen3_moe", dict(decoder_sparse_step=0), "decoder_sparse_step"),
    ("qwen3_moe", dict(norm_topk_prob="gone"), "norm_topk_prob"), ("qwen3_moe", dict(norm_topk_prob="no"), "norm_topk_prob"),
    ("qwen3_moe", dict(moe_intermediate_size=0), "moe_intermediate_size"), ("mixtral", dict(num_local_experts=10**9), "num_local_experts"),
    *[("llama", dict(model_type="olmoe", architectures=["OlmoeForCausalLM"]), f.architecture) for f in FAMILIES.values()]]

@pytest.mark.parametrize("family, changes, words", REFUSED)
def test_refused(tmp_path, family, changes, words):
    "What we do not do is refused under its name"
    random_config(family, 0).save_pretrained(tmp_path)
    file = tmp_path/"config.json"
    assert read_config(tmp_path).family == family
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | changes).items() if v != "gone"}))
    with pytest.raises(CheckpointError, match=words): read_config(tmp_path)

def test_fields_that_stand_elsewhere(tmp_path):
    "Read as transformers reads them: Mixtral has no switch for its window, and a length may stand beside the other numbers of YaRN"
    def read(family, seed, **changes):
        random_config(family, seed).save_pretrained(tmp_path)
        file = tmp_path/"config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return read_config(tmp_path)
    assert {*read("mixtral", 0, sliding_window=5, use_sliding_window=False).windows} == {5}
    assert {*read("qwen3_moe", 0, sliding_window=5, use_sliding_window=False).windows} == {None}
    assert {*read("qwen3_moe", 0, sliding_window=None, use_sliding_window=True).windows} == {None}
    yarn = dict(rope_type="yarn", rope_theta=1e4, factor=2.0)
    assert read("llama", 0, rope_parameters=yarn, original_max_position_embeddings=32).rope.original_max_position == 32

HUB = dict( # config.json as published, shortened; the model's parameters
    llama=(CONFIGS["llama-3.2-1b"], 1_235_814_400), qwen2=(CONFIGS["qwen2.5-0.5b"], 494_032_768),
    qwen3=(dict(head_dim=128, hidden_size=1024, intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28, num_attention_heads=16,
        num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000, sliding_window=None,
        tie_word_embeddings=True, torch_dtype="bfloat16", use_sliding_window=False, vocab_size=151936, attention_bias=False), 596_049_920),
    qwen3_moe=(dict(decoder_sparse_step=1, head_dim=128, hidden_size=2048, intermediate_size=6144, max_position_embeddings=40960, mlp_only_layers=[],
        max_window_layers=48, moe_intermediate_size=768, norm_topk_prob=True, num_attention_heads=32, num_experts=128, num_experts_per_tok=8,
        num_hidden_layers=48, num_key_value_heads=4, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000.0, sliding_window=None,
        tie_word_embeddings=False, torch_dtype="bfloat16", use_sliding_window=False, vocab_size=151936, attention_bias=False), 30_532_122_624),
    nanochat=(dict(hidden_size=2048, intermediate_size=8192, max_position_embeddings=2048, num_attention_heads=16, num_hidden_layers=32,
        num_key_value_heads=16, rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=False, torch_dtype="bfloat16", vocab_size=65536,
        hidden_act="relu2", final_logit_softcapping=15.0), 1_879_048_192),
    mixtral=(dict(hidden_size=4096, intermediate_size=14336, max_position_embeddings=32768, num_attention_heads=32, num_experts_per_tok=2,
        num_hidden_layers=32, num_key_value_heads=8, num_local_experts=8, rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None,
        tie_word_embeddings=False, torch_dtype="bfloat16", vocab_size=32000), 46_702_792_704))

@pytest.mark.parametrize("family", HUB)
def test_published(tmp_path, family):
    "The published configurations, and as many parameters as their models have"
    d, parameters = HUB[family]
    (tmp_path/"config.json").write_text(json.dumps(dict(hidden_act="silu") | d | dict(architectures=[FAMILIES[family].architecture], model_type=family)))
    c = read_config(tmp_path)
    assert sum(math.prod(r.shape) for r in tensor_table(c)) == parameters
    assert set(c.windows) == {None} and c.activation == ("relu2" if family == "nanochat" else "swiglu") and c.norm_topk_prob

# --- chat templates and generation_config.json

BLOCK = """{%- macro call(c) %}<tool_call>
{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endmacro -%}
{%- if tools %}{{ '<|im_start|>system\\n' }}{{ messages[0].content if messages[0].role == 'system' else 'You help.' }}
{%- for t in tools %}{{ '\\n' ~ (t | tojson) }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' ~ messages[0].content ~ '<|im_end|>\\n' }}{% endif -%}
{%- for m in (messages[1:] if messages[0].role == 'system' else messages) -%}
    {%- if m.role == 'tool' -%}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}{{ '\\n<tool_response>' ~ m.content ~ '</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif -%}
    {%- else %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ (m.content or '') }}{% if m.reasoning_content is defined %}{{ 'why: ' ~ m.reasoning_content }}{% endif %}{% for c in m.tool_calls or [] %}{{ call(c) }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
HEADERS = """{{- bos_token }}{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif -%}
{%- set ns = namespace(text='', start=0) %}{% if messages[0]['role'] == 'system' %}{% set ns.text = messages[0]['content'] | trim %}{% set ns.start = 1 %}{% endif -%}
<|im_start|>system
Today: {{ date_string }}{{ ' no documents' if documents is none }}
{{ ns.text }}
{%- if tools is not none %}
{{ tools | tojson(indent=4) }}
{% endif %}<|im_end|>
{% for m in messages[ns.start:] %}
    {%- if m.role == 'skip' %}{% continue %}{% endif %}
    {%- if m.tool_calls is defined %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
        {%- set c = m.tool_calls[0].function %}{{ '{"name": "' + c.name + '", "parameters": ' }}{{ c.arguments | tojson }}{{ '}' }}{{ eos_token }}
    {%- elif m.role == 'assistant' %}{% generation %}{{ m.thinking if m.thinking is defined }}{{ m.name is defined }}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}
    {%- else %}<|im_start|>{{ m.role }}
{{ m.content | trim }}<|im_end|>
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CALL = dict(type="function", function=dict(name="add", description="Adds <two> numbers — é", parameters=dict(
    type="object", properties=dict(a=dict(type="number"), b=dict(type="string", enum=["x", "日"])), required=["a"])))

def talks(rng):
    "Conversations with and without instructions, functions, and what functions answered"
    words = lambda: " ".join(rng.choice(["hi", "  two", "日本", "\n", "{{ x }}", "é", "'quoted'", "<b>"]) for _ in range(4))
    for n in range(16):
        talk = [dict(role="system", content=words())] * (n % 2) + [dict(role="user", content=words())]
        calls = [dict(type="function", function=dict(name="add", arguments=dict(a=k, b=words()))) for k in range(n % 3)]
        if n & 4 and calls: talk += [dict(role="assistant", content=None, tool_calls=calls)] + [dict(role="tool", content=words()) for _ in calls]
        thoughts = rng.choice([{}, dict(reasoning=words()), dict(thinking=words(), reasoning=None), dict(reasoning_content=words(), thinking="old")])
        talk += [dict(role="assistant", content=words(), tool_calls=None) | thoughts, dict(role="user", content=words())] * (n % 4 == 3)
        if n % 8 == 5: talk.append(dict(role="assistant", content=None, name=None))
        yield talk, [CALL] * (n % 3) or ([] if n % 2 else None)

@pytest.fixture(scope="module")
def plain_tokenizer(tmp_path_factory):
    "A folder with a byte-level tokenizer.json"
    tokenizers = pytest.importorskip("tokenizers")
    folder, alphabet = tmp_path_factory.mktemp("words"), sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    t = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    t.pre_tokenizer, t.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    t.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|begin|>", "<|eos|>"])
    t.save(str(folder/"tokenizer.json"))
    return folder

TOKENS = dict(bos_token=dict(__type="AddedToken", content="<|begin|>", lstrip=False, rstrip=False, single_word=False, normalized=False, special=True), eos_token="<|eos|>", add_bos_token=True)
FORMS = dict(
    text=lambda folder: dict(chat_template=BLOCK), headers=lambda folder: dict(chat_template=HEADERS),
    named=lambda folder: dict(chat_template=[dict(name="default", template=HEADERS), dict(name="tool_use", template=BLOCK), dict(name="rag", template="no")]),
    only_default=lambda folder: dict(chat_template=[dict(name="rag", template="no"), dict(name="default", template=BLOCK)]),
    file=lambda folder: (folder/"chat_template.jinja").write_text(HEADERS, "utf-8") and dict(chat_template="not this one"))

@pytest.mark.parametrize("form", FORMS)
def test_chat_templates(tmp_path, plain_tokenizer, form):
    "Ids equal to transformers' apply_chat_template, wherever the template stands"
    (tmp_path/"tokenizer.json").write_bytes((plain_tokenizer/"tokenizer.json").read_bytes())
    config = TOKENS | FORMS[form](tmp_path) | dict(tokenizer_class="PreTrainedTokenizerFast")
    (tmp_path/"tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours, template = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path), read_template(tmp_path)
    compared = 0
    for talk, tools in talks(random.Random(form)):
        for more in (dict(add_generation_prompt=True), dict(add_generation_prompt=False, date_string="1 May")):
            try: want = theirs.apply_chat_template(talk, tools=tools, tokenize=False, **more)
            except Exception as e:
                with pytest.raises(ChatError, match=str(e)): encode_chat(ours, talk, tools, template=template, **more)
                continue
            got = encode_chat(ours, talk, tools, template=template, **more)
            assert ours.decode(got) == want and got == theirs(want, add_special_tokens=False).input_ids
            compared += 1
    assert compared > 20

@pytest.mark.parametrize("template, words", [
    (3, "chat_template 3"), ([dict(name="default")], "chat_template"), ([["default", "x"]], "chat_template"), ([], "expected one that is named default"),
    ([dict(name="rag", template="x")], "rag: expected one that is named default"), ("{% for %}", "chat template: "), ("{{ ''.__class__.__mro__ }}", "chat template: ")])
def test_chat_templates_refused(tmp_path, plain_tokenizer, template, words):
    (tmp_path/"tokenizer_config.json").write_text(json.dumps(dict(chat_template=template)))
    with pytest.raises((ChatError, CheckpointError), match=words): encode_chat(load_tokenizer(plain_tokenizer), [dict(role="user", content="a")], template=read_template(tmp_path))

def test_no_template(tmp_path):
    assert read_template(tmp_path) is None
    (tmp_path/"tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer_config.json"): read_template(tmp_path)

def test_generation_config(tmp_path):
    "The checkpoint's recommendations, or vLLM's own; what ends a reply holds either way"
    random_judge("llama", 1, tmp_path)
    (tmp_path/"generation_config.json").write_text(json.dumps(dict(temperature=.6, top_p=.9, top_k=20, repetition_penalty=1.1, max_new_tokens=33, do_sample=True, eos_token_id=[7, 9])))
    seen = {}
    for source in ("auto", "vllm"):
        with LLM(tmp_path, device="cpu", skip_tokenizer_init=True, generation_config=source, num_blocks=16) as llm:
            seen[source], ends = llm.defaults, llm.config.eos_token_ids
            assert {7, 9} <= set(ends) and len(llm.generate([1, 2, 3], max_tokens=4, seed=1, ignore_eos=True)[0].outputs[0].token_ids) == 4
    assert seen == dict(auto=SamplingParams(temperature=.6, top_p=.9, top_k=20, repetition_penalty=1.1, max_tokens=33), vllm=SamplingParams())
    with pytest.raises(ValueError, match="generation_config='elsewhere'"): LLM(tmp_path, device="cpu", skip_tokenizer_init=True, generation_config="elsewhere")
    (tmp_path/"generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="generation_config.json"): LLM(tmp_path, device="cpu", skip_tokenizer_init=True)

@pytest.mark.parametrize("rope, reach", [
    (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=256), 1024), (dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=64), 256),
    (dict(rope_type="yarn", factor=2.5, original_max_position_embeddings=1000), 2500), (dict(rope_type="linear", factor=4.0), 256),
    (dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=256, low_freq_factor=1.0, high_freq_factor=4.0), 256), (dict(rope_type="default"), 256)])
def test_stretched_positions(tmp_path, rope, reach):
    "YaRN reaches as far as it stretches, whatever max_position_embeddings says"
    random_config("qwen2", 0, rope_parameters=rope | dict(rope_theta=1e4)).save_pretrained(tmp_path)
    assert read_config(tmp_path).max_position == reach

@pytest.mark.parametrize("change", ["same", "other", "type", "shape"])
def test_tied_and_yet_there(tmp_path, change):
    "An output matrix beside config.json's word that it is the embedding: fine if it is, refused if it is not, for transformers would believe it"
    from safetensors.torch import load_file, save_file
    random_judge("llama", 1, tmp_path)
    tensors = load_file(tmp_path/"model.safetensors")
    embed = tensors["model.embed_tokens.weight"]
    heads = dict(same=embed.clone(), other=embed * 1.01, type=embed.bfloat16(), shape=embed[1:].clone())
    assert read_config(tmp_path).tie_embeddings
    save_file(tensors | {"lm_head.weight": heads[change]}, tmp_path/"model.safetensors")
    if change == "same": return load_model(tmp_path, device="cpu") and None
    with pytest.raises(CheckpointError, match="model.safetensors: tensor 'lm_head.weight': differs"): load_model(tmp_path, device="cpu")

def test_headers_are_parsed_once(tmp_path, monkeypatch):
    "Loading opens every shard once, however many tensors it has"
    import simplellm.checkpoint as module
    opened, real = [], module.safe_open
    monkeypatch.setattr(module, "safe_open", lambda file, **kw: opened.append(file) or real(file, **kw))
    model = random_judge("llama", 2, tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path/"model.safetensors").unlink(missing_ok=True)
    load_model(tmp_path, device="cpu")
    assert len(opened) == len(set(opened)) == len(list(tmp_path.glob("*.safetensors"))) > 1
