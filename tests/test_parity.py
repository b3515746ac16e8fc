"Logits of our transformer against transformers' GptOss (eager attention, float32) on random small models"
import random, threading
import pytest, torch

pytest.importorskip("transformers", reason="the judge of this file")
from transformers import GptOssConfig, GptOssForCausalLM
from simplellm.batch import make_batch
from simplellm.kvcache import blocks_for
from simplellm.models import load_weights, read_config
from simplellm.checkpoint import Checkpoint
from simplellm.parallel import Shard
from simplellm.transformer import Transformer

TOLERANCE, CASES = 1e-4, 24

def random_config(rng):
    "A gpt-oss that nobody would train"
    kv_heads, experts, layers = rng.choice([1, 2, 4]), rng.choice([1, 2, 4, 7]), rng.choice([1, 2, 3, 4])
    rope = dict(rope_type="yarn", rope_theta=rng.choice([1e4, 150000.0]), factor=rng.choice([1.0, 2.0, 4.0, 32.0]),
                original_max_position_embeddings=rng.choice([16, 64, 1024, 4096]), beta_fast=rng.choice([32.0, 8.0]),
                beta_slow=rng.choice([1.0, 2.0]), truncate=rng.random() < .5)
    if rng.random() < .15: rope = dict(rope_type="default", rope_theta=10000.0)
    return GptOssConfig(
        vocab_size=rng.choice([50, 96, 131]), hidden_size=rng.choice([32, 48, 80]), intermediate_size=rng.choice([32, 40, 64]),
        num_hidden_layers=layers, num_attention_heads=kv_heads * rng.choice([1, 2, 3, 8]), num_key_value_heads=kv_heads,
        head_dim=rng.choice([32, 64]), num_local_experts=experts, num_experts_per_tok=rng.randint(1, min(experts, 4)),
        sliding_window=rng.choice([1, 2, 7, 16, 33, 64]), rope_parameters=rope, max_position_embeddings=512,
        layer_types=[rng.choice(["sliding_attention", "full_attention"]) for _ in range(layers)],
        rms_norm_eps=rng.choice([1e-5, 1e-6]), pad_token_id=None, eos_token_id=3, attn_implementation="eager")

def random_judge(config, seed):
    "transformers' model with weights that let every part show: sinks, biases and norms are not what they start as"
    torch.manual_seed(seed)
    model = GptOssForCausalLM(config).eval()
    for name, p in model.named_parameters():
        fan_in = p.shape[-2] if "experts" in name and p.dim() == 3 else p.shape[-1]
        if "norm" in name: p.data = 1 + .2 * torch.randn_like(p)
        elif "bias" in name: p.data = .2 * torch.randn_like(p)
        elif "sinks" in name: p.data = torch.randn_like(p)
        else: p.data = torch.randn_like(p) * fan_in ** -.5
    return model

def blocks_shuffled(rng, lengths, block_size, spare=3):
    "A block table per sequence out of one shuffled pool, and the pool's size"
    need = [blocks_for(n, block_size) for n in lengths]
    pool = rng.sample(range(sum(need) + spare), sum(need))
    return [[pool.pop() for _ in range(n)] for n in need], sum(need) + spare

def in_steps(model, sequences, block_size, sizes, rng):
    "Logits of every token, when each step gives row i the next `sizes(i, left)` tokens and rows may sit a step out"
    tables, num_blocks = blocks_shuffled(rng, list(map(len, sequences)), block_size)
    kv, done, out = model.new_cache(num_blocks, block_size), [0] * len(sequences), [[] for _ in sequences]
    kv.k.fill_(torch.nan); kv.v.fill_(torch.nan)  # what was not written must not be read
    while left := [i for i, s in enumerate(sequences) if done[i] < len(s)]:
        now = [i for i in left if rng.random() < .8] or left
        rng.shuffle(now)
        n = {i: sizes(i, len(sequences[i]) - done[i]) for i in now}
        batch = make_batch([(sequences[i][done[i]:done[i] + n[i]], done[i], tables[i], "all") for i in now], block_size)
        for i, part in zip(now, model(batch, kv).split([n[i] for i in now])): out[i].append(part)
        for i in now: done[i] += n[i]
    return [torch.cat(parts) for parts in out]

@pytest.fixture(scope="module")
def case(tmp_path_factory):
    "seed -> (judge, our config, checkpoint, sequences, the judge's logits)"
    def make(seed):
        rng = random.Random(seed)
        judge = random_judge(random_config(rng), seed)
        folder = tmp_path_factory.mktemp(f"gpt_oss_{seed}")
        judge.save_pretrained(folder)
        w = judge.config.sliding_window
        lengths = [w, w + 1, max(1, w - 1), 2 * w + rng.randint(1, 40), rng.randint(1, 100)]
        sequences = [[rng.randrange(judge.config.vocab_size) for _ in range(n)] for n in lengths]
        with torch.inference_mode(): want = [judge(torch.tensor([s])).logits[0].float() for s in sequences]
        checkpoint = Checkpoint(folder)
        return judge, read_config(checkpoint), checkpoint, sequences, want
    return make

def close(got, want):
    for g, w in zip(got, want): assert (g - w).abs().max() <= TOLERANCE, f"off by {(g - w).abs().max():.1e}"

@pytest.mark.parametrize("seed", range(CASES))
def test_logits(case, seed):
    _, config, checkpoint, sequences, want = case(seed)
    rng = random.Random(~seed)
    assert max(w.std().item() for w in want) > .3, "logits of no natural size prove nothing"
    model = Transformer(config, load_weights(checkpoint, config, torch.float32, "cpu"))
    block_size = rng.choice([1, 3, 16, 256])
    close(in_steps(model, sequences, block_size, lambda i, left: left, rng), want)  # whole
    close(in_steps(model, sequences, block_size, lambda i, left: rng.randint(1, min(left, 17)), rng), want)  # chunks, mixed
    close(in_steps(model, sequences[2:], 16, lambda i, left: 1, rng), want[2:])  # token by token

def test_cases_are_different():
    configs = [random_config(random.Random(s)) for s in range(CASES)]
    assert {c.head_dim for c in configs} == {32, 64}
    assert {c.rope_parameters.get("truncate") for c in configs} >= {True, False}
    assert len({c.sliding_window for c in configs}) > 3
    assert len({c.num_attention_heads // c.num_key_value_heads for c in configs}) > 2
    assert len({c.rope_parameters.get("factor") for c in configs}) > 3
    assert len({(c.num_local_experts, c.num_experts_per_tok) for c in configs}) > 5

def test_greedy_continuation(case):
    "The same tokens as transformers' generate"
    judge, config, checkpoint, sequences, _ = case(100)
    model = Transformer(config, load_weights(checkpoint, config, torch.float32, "cpu"))
    prompt = sequences[3]
    judge.generation_config.eos_token_id = None
    want = judge.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt):].tolist()
    tokens, kv, done = list(prompt), model.new_cache(16), 0
    while len(tokens) < len(prompt) + 40:
        logits = model(make_batch([(tokens[done:], done, list(range(16)), "last")], 16), kv)
        done = len(tokens)
        tokens.append(int(logits.argmax()))
    assert tokens[len(prompt):] == want

class Room:
    "Threads of one process that add up their tensors"
    def __init__(self, size): self.barrier, self.tensors = threading.Barrier(size, timeout=60), [None] * size
    def all_reduce(self, rank, x):
        self.tensors[rank] = x
        self.barrier.wait()
        total = sum(self.tensors)
        self.barrier.wait()
        return total

@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_with_one(tmp_path, size):
    "Each rank loads its part of the checkpoint; sums over ranks give everybody the whole model's logits"
    rng = random.Random(size)
    hf = random_config(rng)
    hf.num_key_value_heads, hf.num_attention_heads, hf.intermediate_size, hf.vocab_size = 4, 8, 64, 96
    judge = random_judge(hf, size)
    judge.save_pretrained(tmp_path)
    tokens = [rng.randrange(96) for _ in range(50)]
    with torch.inference_mode(): want = judge(torch.tensor([tokens])).logits[0]
    checkpoint, room, got = Checkpoint(tmp_path), Room(size), [None] * size
    config = read_config(checkpoint)
    def rank(r):
        shard = Shard(r, size)
        weights = load_weights(checkpoint, config, torch.float32, "cpu", shard=shard)
        model = Transformer(config, weights, shard=shard, all_reduce=lambda x: room.all_reduce(r, x))
        kv, out = model.new_cache(8), []
        assert kv.k.shape[3] == 4 // size
        for a, b in ((0, 31), (31, 49), (49, 50)):
            out.append(model(make_batch([(tokens[a:b], a, [6, 1, 4, 2], "all")], 16), kv))
        got[r] = torch.cat(out)
    threads = [threading.Thread(target=rank, args=(r,), daemon=True) for r in range(size)]
    for t in threads: t.start()
    for t in threads: t.join(120)
    close(got, [want] * size)
