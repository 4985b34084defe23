"""Drafts: what they are, what becomes of them in a round on the device, and that none changes what the model says."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from step_kernels.generate import BUNDLED
from step_kernels.model import Step3p7, StepConfig, drafts, generation
from step_kernels.model.batch import Request
from step_kernels.model.chat import Chat
from step_kernels.model.checkpoint import Checkpoint
from step_kernels.model.drafts import Drafts, DraftStats
from step_kernels.model.generation import generate
from step_kernels.model.sampling import Sampling
from step_kernels.testing import relative_error

CONFIG = StepConfig.read(BUNDLED)
VOCAB = CONFIG.vocab_size


@pytest.fixture(scope="module")
def model():
    return Step3p7.from_pretrained(BUNDLED, "cpu", torch.float32)


@pytest.fixture(params=[False, True], ids=["at once", "a round behind"])
def reading(request, monkeypatch):
    """Rounds are read as soon as they are launched, as on a CPU, or after the next launch, as on a GPU."""
    run = generation._run
    monkeypatch.setattr(generation, "_run", lambda batch, runs_ahead: run(batch, request.param))


def tokens(*shape, seed=4):
    return torch.randint(13, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def question(text):
    return Chat(BUNDLED, CONFIG).prompt(text)


def by_request(pairs, count):
    out = [[] for _ in range(count)]
    for request, token in pairs:
        out[request].append(token)
    return out


@torch.inference_mode()
def begun(model, prompts, samplings=None, graphs=False, kv_cache="model", chunk=2048, **options):
    """A batch with drafts whose prompts have been fed, and what each request has said."""
    samplings = samplings or [Sampling()] * len(prompts)
    requests = [
        Request(model, i, prompt, new=300, stop=set(), sampling=sampling, depths=3, **options)
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings))
    ]
    stats = DraftStats([0] * 3, [0] * 3)
    batch = generation._batch(model, requests, kv_cache, chunk, len(prompts), None, graphs, stats)
    batch.admit()
    said = [[] for _ in prompts]
    while batch.prefilling:
        launched = batch.prefill()
        for request, token in batch.read(*launched) if launched else ():
            said[request].append(token)
    return batch, said


def forced(monkeypatch, draft_of):
    """Depth by depth, drafts are draft_of(round, depth, positions i32 [rows]) in place of the layers' own."""
    calls = itertools.count()

    def choose(logits, positions, requests):
        call = next(calls)
        return draft_of(call // 3, call % 3, positions)

    monkeypatch.setattr(drafts, "choose", choose)


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_kept_and_refused_drafts_leave_the_greedy_output(model, monkeypatch, reading, offset):
    """Drafts of which three, none, one or two are right by turns, which the model's own are not at will."""
    prompt, options = question("What can you do?"), dict(max_new_tokens=30, stop_ids=(), kv_cache="model")
    greedy = list(model.generate(prompt, **options))
    rounds = []

    def oracle(number, depth, positions):
        if depth == 0:
            rounds.append(number)
        place = positions[0].item() + 1 + depth - len(prompt)
        right = greedy[place] if place < len(greedy) else 13
        return torch.tensor([right if depth < (number + 3) % 4 else (right + 1 + offset) % VOCAB])

    forced(monkeypatch, oracle)
    stats = DraftStats()
    assert list(model.generate(prompt, mtp=True, stats=stats, **options)) == greedy
    # 29 tokens behind the first: 4, 1, 2 and 3 a round, so 10 in four; the last three rounds end at 29
    assert stats.drafted == [12] * 3 and len(rounds) in (12, 13)
    assert stats.accepted == [9, 6, 3]


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
    prompt, seen, draft = tokens(length).tolist(), [], Drafts.draft

    def spy(self, source, target, position, *rest):
        out = draft(self, source, target, position, *rest)
        seen.append((position[0].item() + 1, out[0].tolist()))
        return out

    monkeypatch.setattr(Drafts, "draft", spy)
    said = list(model.generate(prompt, mtp=True, max_new_tokens=40, stop_ids=(), kv_cache="model", chunk=9))
    assert len(seen) > 10
    for known, drafted in seen:
        for depth in range(3):
            logits = model.draft_logits(torch.tensor([(prompt + said)[:known] + drafted[:depth]]))[depth]
            assert logits[0, -1].argmax().item() == drafted[depth]


@torch.inference_mode()
@pytest.mark.parametrize("lengths, chunk", [((1, 2, 3, 4, 5), 2048), ((70, 66), 2048), ((63, 9), 5)])
def test_settled_items_are_those_of_the_whole_sequence(model, monkeypatch, lengths, chunk):
    """45 rounds, over pages and windows, in which 0 to 3 right drafts are kept by turns, other numbers of each row."""
    prompts = [tokens(n, seed=n).tolist() for n in lengths]
    plain = by_request(generate(model, prompts, max_new_tokens=200, stop_ids=(), kv_cache="model"), len(prompts))
    whole = [prompt + new for prompt, new in zip(prompts, plain)]

    def oracle(number, depth, positions):
        places = [position + 1 + depth for position in positions.tolist()]
        right = [(number * (row + 2) + row) % 4 > depth for row in range(len(places))]
        return torch.tensor([(whole[r][p] + 1 - right[r]) % VOCAB for r, p in enumerate(places)])

    forced(monkeypatch, oracle)
    batch, said = begun(model, prompts, chunk=chunk)
    for _ in range(45):
        for request, token in batch.read(*batch.decode()):
            said[request].append(token)
    assert all(new == wanted[: len(new)] for new, wanted in zip(said, plain))
    assert len({len(new) for new in said}) > 1 and min(map(len, said)) > 80
    position = batch.decoder.position[: len(prompts)].tolist()
    assert position == [len(prompt) + len(new) - 1 for prompt, new in zip(prompts, said)]
    for row, p in enumerate(position):
        one, _ = begun(model, [whole[row][: p + 1]])
        kept = range(p - 4 - 60, p - 4)  # items that no round computes again, and that its items attend to
        for layer in range(CONFIG.num_layers, CONFIG.num_layers + 3):
            for part in range(2):
                got, wanted = (
                    torch.stack([cache.layers[layer][part][table[n // 64], :, n % 64] for n in kept])
                    for cache, table in ((b.cache, b.cache.groups[64].table[r]) for b, r in ((batch, row), (one, 0)))
                )
                assert relative_error(got, wanted) < 1e-4


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_limits_and_stops_within_a_round_end_a_request_where_they_end_it_without_drafts(model, reading, temperature):
    """Every number of new tokens from 1 to 12, and every stop among the first 12, of prompts whose drafts are kept."""
    batch = [question("What can you do?"), question("Hello"), tokens(3).tolist()]
    options = dict(temperature=temperature, seed=2, kv_cache="model")
    free = by_request(generate(model, batch, max_new_tokens=14, stop_ids=(), **options), 3)
    for end in range(1, 13):
        stats = DraftStats()
        got = by_request(generate(model, batch, max_new_tokens=end, stop_ids=(), mtp=True, stats=stats, **options), 3)
        assert got == [row[:end] for row in free]
        # a round gives one token more than it keeps drafts, but for a request's last, which a kept draft may end
        assert 0 <= stats.drafted[0] + sum(stats.accepted) - 3 * (end - 1) <= 3
        stop = free[0][end]
        wanted = [row[: row.index(stop) + 1] if stop in row else row for row in free]
        assert by_request(generate(model, batch, max_new_tokens=14, stop_ids=(stop,), mtp=True, **options), 3) == wanted


def test_a_request_as_long_as_the_model_allows_drafts_to_its_end(model, monkeypatch, reading):
    """Two whole pages of 64: rounds feed drafts on a third."""
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, max_positions=128))
    prompt, options = tokens(107).tolist(), dict(max_new_tokens=21, stop_ids=(), kv_cache="model")
    greedy = list(model.generate(prompt, **options))
    forced(monkeypatch, lambda number, depth, positions: torch.tensor([(greedy + greedy)[positions + depth - 106]]))
    assert list(model.generate(prompt, mtp=True, **options)) == greedy and len(greedy) == 21


def test_drafts_behind_an_image_see_its_features(model):
    features = torch.randn(9, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    prompt, images = tokens(20).tolist()[:11] + [CONFIG.image_token_id] * 9, {"pixel_values": torch.zeros(1)}
    embed = model.embed
    try:
        model.embed = lambda ids, **images: features if images else embed(ids)
        batch, said = begun(model, [prompt], images=images, chunk=7)
    finally:
        del model.embed
    lately = batch.decoder.drafts.feed(torch.tensor([0]), torch.tensor([[17, 18, 19, 20]]))
    assert torch.equal(lately[:3], features[-3:]) and torch.equal(lately[3], model.embed_tokens[said[0][0]])


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


@torch.inference_mode()
def test_padding_rows_of_a_round_change_neither_tokens_nor_what_is_kept(model):
    """30 rounds, past pages and window; the second request rests every third."""
    batch = [tokens(n, seed=n).tolist() for n in (30, 66, 2)]
    (plain, said), (padded, also) = (begun(model, batch) for _ in "pp")
    assert said == also
    for number in range(30):
        rows = [0, 1, 2] if number % 3 else [0, 2]
        assert plain.decoder.step(rows, 0).lists() == padded.decoder.step(rows, rows[-1], rows=4).lists()
    assert plain.decoder.position[:3].tolist() == padded.decoder.position[:3].tolist()
    for name in ("embeddings", "hidden"):
        one, other = (getattr(b.decoder.drafts, name)[: 3 * 8] for b in (plain, padded))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for one, other in zip(plain.cache.layers, padded.cache.layers, strict=True):
        for x, y in zip(one, other):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The bundled model with NVFP4 experts."""
    from quantize import run

    folder = tmp_path_factory.mktemp("drafts") / "nvfp4"
    assert run(BUNDLED, folder).problems == []
    return folder


@pytest.mark.gpu
@torch.inference_mode()
def test_rounds_in_graphs_leave_the_bits_that_eager_rounds_leave(packed):
    """60 rounds over pages and window, greedy and sampled; two requests rest every third round."""
    model = Step3p7.from_pretrained(packed, "cuda", torch.bfloat16)
    ways = [Sampling(), Sampling(0.8, seed=1), Sampling(0.9, top_p=0.9, seed=2), Sampling(1.0, top_k=20), Sampling()]
    batch = [question("What can you do?"), *(tokens(n, seed=n).tolist() for n in (1, 70, 3, 64))]
    (eager, said), (graphs, also) = (begun(model, batch, ways, g, kv_cache="fp8") for g in (False, True))
    kept = 0
    for number in range(60):
        rows = [0, 1, 2, 3, 4] if number % 3 else [0, 2, 4]
        wanted = eager.decoder.step(rows, rows[-1], rows=8 if number % 3 else 4).lists()
        got = graphs.decoder.step(rows, rows[-1]).lists()
        assert got == wanted, number
        kept += sum(map(len, got)) - len(rows)
    assert said == also and sorted(graphs.decoder.graphs) == [(4, 2), (8, 2)]
    assert 30 < kept < 3 * 60 * 5
    assert torch.equal(eager.decoder.position[:5], graphs.decoder.position[:5])
    for name in ("embeddings", "hidden"):  # the last request's are those of padding rows
        one, other = (getattr(b.decoder.drafts, name)[: 5 * 8] for b in (eager, graphs))
        assert torch.equal(one, other), name
    for layer, (one, other) in enumerate(zip(eager.cache.layers, graphs.cache.layers, strict=True)):
        for x, y in zip(one, other):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), layer


@pytest.mark.gpu
@torch.inference_mode()
def test_a_round_does_not_make_the_host_wait(packed):
    model = Step3p7.from_pretrained(packed, "cuda", torch.bfloat16)
    ways = [Sampling(), Sampling(0.8, top_p=0.9), Sampling(0.7)]
    batch, _ = begun(model, [tokens(n, seed=n).tolist() for n in (50, 1, 70)], ways, True, kv_cache="fp8")
    decoder = batch.decoder
    decoder.step([0, 1, 2], 0), decoder.step([0, 2], 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chosen = [decoder.step(rows, 0) for rows in ([0, 1, 2], [0, 2], [0, 1, 2], [0, 1, 2])]
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        late = decoder.step([0, 1, 2], 0)
        assert not late.arrived.query()  # and so the round was only launched
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [len(c.lists()) for c in (*chosen, late)] == [3, 2, 3, 3, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("limits", [dict(max_batch=2, chunk=40), dict(max_batch=3, cache_tokens=256), dict()])
def test_requests_that_come_and_go_say_with_drafts_on_the_gpu_what_the_cpu_says_without(packed, limits):
    """Five requests of 10 to 40 tokens, each of which leads by 0.4; one to five rows fill graphs of 1 to 8."""
    on_gpu, on_cpu = (Step3p7.from_pretrained(packed, d, torch.float32) for d in ("cuda", "cpu"))
    batch = [question(text) for text in ("Bye", "Who are you?", "Hi", "How are you?")] + [tokens(50, seed=50).tolist()]
    options = dict(max_new_tokens=40)
    wanted = by_request(generate(on_cpu, batch, **options), 5)
    assert [len(row) for row in wanted] == [10, 40, 24, 21, 40]
    for graphs in (True, False):
        stats = DraftStats()
        assert (
            by_request(generate(on_gpu, batch, graphs=graphs, mtp=True, stats=stats, **limits, **options), 5) == wanted
        )
        assert sum(stats.accepted) > stats.drafted[0]
