"""Cache, decoding and drafts: none of them changes what the model says."""

import pytest
import torch
import torch.nn.functional as F

from step_kernels.generate import BUNDLED
from step_kernels.model import Step3p7, StepConfig, generation
from step_kernels.model.cache import PagedCache
from step_kernels.model.chat import Chat
from step_kernels.model.checkpoint import Checkpoint
from step_kernels.model.generation import DraftStats, generate
from step_kernels.testing import relative_error

CONFIG = StepConfig.read(BUNDLED)
VOCAB = CONFIG.vocab_size


@pytest.fixture(scope="module")
def model():
    return Step3p7.from_pretrained(BUNDLED, "cpu", torch.float32)


def tokens(*shape, seed=4):
    return torch.randint(13, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def prompts(*lengths):
    return [tokens(n, seed=i).tolist() for i, n in enumerate(lengths)]


def question(text):
    return Chat(BUNDLED, CONFIG).prompt(text)


def by_request(pairs, count):
    out = [[] for _ in range(count)]
    for request, token in pairs:
        out[request].append(token)
    return out


@pytest.mark.parametrize("page_size", [4, 16, 64])
@pytest.mark.parametrize(
    "steps",
    [
        [[150, 97]],
        [[1, 1]] * 70,
        [[64, 30], [37, 1], [1, 1], [5, 0], [40, 60], [3, 5]],  # over window (64) and page edges, uneven
        [[63, 64], [1, 1], [1, 1], [66, 65], [0, 8], [1, 0]],
    ],
)
@torch.inference_mode()
def test_cached_steps_equal_the_full_forward(model, steps, page_size):
    ids, ends = tokens(2, 150), [sum(s[r] for s in steps) for r in range(2)]
    cache = PagedCache(model.config, 2, 150, dtype=torch.float32, device=model.device, chunk=150, page_size=page_size)
    starts, got = [0, 0], [[], []]
    for counts in steps:
        x = torch.cat([ids[r, starts[r] : starts[r] + counts[r]] for r in range(2)])
        logits = model.logits(model.trunk(model.embed(x), cache.tokens(starts, counts))).split(counts)
        for r in range(2):
            got[r].append(logits[r])
            starts[r] += counts[r]
    wanted = model(ids)
    for r in range(2):
        assert relative_error(torch.cat(got[r]), wanted[r, : ends[r]]) < 1e-5  # the goal is 1e-4


@torch.inference_mode()
def test_sliding_layers_keep_only_their_window(model):
    cache = PagedCache(model.config, 1, 400, dtype=torch.float32, device=model.device, chunk=8, page_size=8)
    for start in range(0, 400, 8):
        model.trunk(model.embed(tokens(8)), cache.tokens([start], [8]))
        held = (cache.groups[64].table[0] >= 0).sum().item()
        assert held <= (64 - 1 + 8) // 8 + 1
    assert (cache.groups[None].table >= 0).all()
    assert cache.groups[64].pages * 8 < 100 and cache.groups[None].pages * 8 == 400


def test_fp8_cache_is_close_and_half_the_size_of_bf16(model):
    prompt = prompts(60)
    full = model(torch.tensor(prompt))[0, -1]
    with torch.inference_mode():
        caches = [
            PagedCache(model.config, 1, 60, dtype=d, device=model.device) for d in (torch.float8_e4m3fn, torch.bfloat16)
        ]
        got = model.logits(model.trunk(model.embed(torch.tensor(prompt[0])), caches[0].tokens([0], [60])))[-1]
    assert 1e-4 < relative_error(got, full) < 0.1
    assert 2 * caches[0].bytes == caches[1].bytes


def test_greedy_tokens_are_the_full_forwards_argmax(model):
    prompt, out = prompts(30)[0], []
    for token in model.generate(prompt, max_new_tokens=40, kv_cache="model", stop_ids=()):
        out.append(token)
    logits = model(torch.tensor([prompt + out]))[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == out


@pytest.mark.parametrize("chunk", [1, 7, 64, 2048])
@pytest.mark.parametrize("mtp", [False, True])
def test_a_batch_of_mixed_lengths_says_what_each_prompt_says_alone(model, chunk, mtp):
    batch = prompts(70, 1, 3, 65)
    options = dict(max_new_tokens=12, stop_ids=(), kv_cache="model")
    together = by_request(generate(model, batch, chunk=chunk, mtp=mtp, **options), 4)
    assert together == [list(model.generate(p, **options)) for p in batch]


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_kept_and_refused_drafts_leave_the_greedy_output(model, monkeypatch, offset):
    """Drafts that are right, half right or wrong by turns, which the model's own are not at will."""
    prompt, options = question("What can you do?"), dict(max_new_tokens=30, stop_ids=(), kv_cache="model")
    greedy = list(model.generate(prompt, **options))
    draft, rounds = generation._draft, []

    def oracle(model, cache, requests):
        own = draft(model, cache, requests)
        request, right = requests[0], len(rounds) % 4
        rounds.append(right)
        future = greedy[request.new : request.new + 3] + [13] * 3
        return [[t if i < right else (t + 1 + offset) % VOCAB for i, t in enumerate(future[: len(own[0])])]]

    monkeypatch.setattr(generation, "_draft", oracle)
    stats = DraftStats()
    assert list(model.generate(prompt, mtp=True, stats=stats, **options)) == greedy
    assert len(rounds) < 20 and stats.drafted == [len(rounds)] * 3
    assert stats.accepted[0] > stats.accepted[1] > stats.accepted[2] > 0


@pytest.mark.parametrize("mtp", [False, True])
def test_trained_drafts_are_kept_and_save_rounds(model, mtp):
    stats, prompt = DraftStats(), question("What can you do?")
    said = list(model.generate(prompt, max_new_tokens=60, mtp=mtp, stats=stats))
    assert len(said) == 49 and said[-1] in CONFIG.eos_ids
    if mtp:
        assert stats.drafted[0] < 49 / 3
        assert all(kept > 0.7 * rounds for kept, rounds in zip(stats.accepted, stats.drafted, strict=True))


@pytest.mark.parametrize("length", [1, 2, 3, 40])
def test_drafts_equal_teacher_forced_draft_logits(model, monkeypatch, length):
    """Draft d + 1 is depth d's choice when it is fed the sequence and the drafts before it."""
    seen, draft = [], generation._draft

    def spy(model, cache, requests):
        out = draft(model, cache, requests)
        seen.append((list(requests[0].tokens), out[0]))
        return out

    monkeypatch.setattr(generation, "_draft", spy)
    list(model.generate(tokens(length).tolist(), mtp=True, max_new_tokens=40, stop_ids=(), kv_cache="model", chunk=9))
    assert len(seen) > 10
    for known, drafts in seen:
        for depth in range(3):
            logits = model.draft_logits(torch.tensor([known + drafts[:depth]]))[depth]
            assert logits[0, -1].argmax().item() == drafts[depth]


def naive_mtp(ids, hidden):
    """Draft logits of one sequence by MODEL's formulas, position by position, from the raw tensors."""
    checkpoint = Checkpoint(BUNDLED)

    def w(name):
        return checkpoint.read(name).float()

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + w(name))

    def rotated(x, position):  # [heads, 32]
        angle = position * 1e4 ** (-torch.arange(0, 32, 2).float() / 32)
        a, b = x[:, :16], x[:, 16:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def layer(x, name):  # 12 heads of 32, 6 to a key head, a window of 64
        n, heads = norm(x, f"{name}.input_layernorm.weight"), []
        q, k, v = ((n @ w(f"{name}.self_attn.{p}_proj.weight").T).unflatten(-1, (-1, 32)) for p in "qkv")
        q, k = norm(q, f"{name}.self_attn.q_norm.weight"), norm(k, f"{name}.self_attn.k_norm.weight")
        q, k = (torch.stack([rotated(t[i], i) for i in range(len(x))]) for t in (q, k))
        for i in range(len(x)):
            past = slice(max(0, i - 63), i + 1)
            for h in range(12):
                scores = k[past, h // 6] @ q[i, h] / 32**0.5
                heads.append(scores.softmax(0) @ v[past, h // 6])
        out = torch.stack(heads).unflatten(0, (len(x), 12))
        out = out * (n @ w(f"{name}.self_attn.g_proj.weight").T).sigmoid()[..., None]
        x = x + out.flatten(1) @ w(f"{name}.self_attn.o_proj.weight").T
        n = norm(x, f"{name}.post_attention_layernorm.weight")
        gate, up = (n @ w(f"{name}.mlp.{p}_proj.weight").T for p in ("gate", "up"))
        return x + (F.silu(gate) * up) @ w(f"{name}.mlp.down_proj.weight").T

    embeddings = w("model.embed_tokens.weight")[ids]
    for depth in range(3):
        name = f"model.layers.{CONFIG.num_layers + depth}"
        length = len(ids) - 1 - depth
        joined = torch.cat(
            (norm(embeddings[1 + depth :], f"{name}.enorm.weight"), norm(hidden[:length], f"{name}.hnorm.weight")), -1
        )
        hidden = layer(joined @ w(f"{name}.eh_proj.weight").T, name)
        head = f"{name}.transformer.shared_head"
        yield norm(hidden, f"{head}.norm.weight") @ w(f"{head}.output.weight").T


def test_draft_logits_equal_a_step_by_step_computation(model):
    ids = tokens(80)
    with torch.inference_mode():
        hidden = model._hidden(ids[None], model.embed(ids[None]))[0]
    for got, wanted in zip(model.draft_logits(ids[None]), naive_mtp(ids, hidden), strict=True):
        assert relative_error(got[0], wanted) < 1e-5


def test_seed_repeats_a_sample_and_top_p_narrows_it(model):
    prompt = prompts(12)[0]

    def run(**options):
        return list(model.generate(prompt, max_new_tokens=25, stop_ids=(), kv_cache="model", **options))

    assert run(temperature=1.0, seed=1) == run(temperature=1.0, seed=1) != run(temperature=1.0, seed=2)
    assert run(temperature=1.0, top_p=1e-6, seed=3) == run() == run(temperature=1e-6)
    assert run(temperature=1.0, seed=1, mtp=True) != run()


def test_samples_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0]).log_softmax(-1).expand(20000, 3)
    draws = generation._choose(logits, 1.0, 1.0, torch.Generator().manual_seed(0)).bincount(minlength=3) / 20000
    assert (draws - logits[0].exp()).abs().max() < 0.015  # five standard deviations are 0.018
    nucleus = generation._choose(logits, 1.0, 0.6, torch.Generator().manual_seed(0))
    assert nucleus.unique().tolist() == [2]  # its 0.665 alone reach 0.6


def test_stop_tokens_end_a_request_and_are_given(model):
    prompt = prompts(30)[0]
    out = list(model.generate(prompt, max_new_tokens=30, stop_ids=(), kv_cache="model"))
    stop = out[7]
    for mtp in (False, True):
        got = list(model.generate(prompt, max_new_tokens=30, stop_ids=(VOCAB - 1, stop), mtp=mtp, kv_cache="model"))
        assert got == out[: out.index(stop) + 1]


def test_zero_new_tokens_give_none(model):
    assert list(model.generate([3], max_new_tokens=0)) == []


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([], {}, "got an empty prompt"),
        ([3] * 4090, {"max_new_tokens": 7}, "make 4097 tokens, wanted at most 4096"),
        ([2048], {}, "got token id 2048"),
        ([3], {"temperature": -1.0}, "temperature, top_p: got -1.0"),
        ([3], {"top_p": 0.0}, "top_p: got 0.0, 0.0"),
        ([3], {"kv_cache": "int4"}, "kv_cache: got 'int4'"),
    ],
)
def test_bad_requests_name_what_came(model, prompt, options, message):
    with pytest.raises(ValueError) as error:
        list(model.generate(prompt, **options))
    assert message in str(error.value)
