"""Cache, batches and decoding: none of them changes what the model says."""

import random

import pytest
import torch

from step_kernels.generate import BUNDLED
from step_kernels.model import Step3p7, StepConfig, decoding, generation
from step_kernels.model.cache import PagedCache
from step_kernels.model.chat import Chat
from step_kernels.model.decoding import Chosen, Decoder
from step_kernels.model.generation import generate
from step_kernels.model.sampling import Sampling
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


@pytest.fixture(params=[False, True], ids=["at once", "a step behind"])
def reading(request, monkeypatch):
    """Tokens are read as soon as they are launched, as on a CPU, or after the next launch, as on a GPU."""
    run = generation._run
    monkeypatch.setattr(generation, "_run", lambda batch, runs_ahead: run(batch, request.param))


@pytest.fixture(scope="module")
def alone(model):
    """What six prompts say on their own."""
    batch = prompts(70, 1, 33, 65, 12, 5)
    return batch, [list(model.generate(p, max_new_tokens=16, stop_ids=(), kv_cache="model")) for p in batch]


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("limits", [dict(max_batch=1), dict(max_batch=2, chunk=5), dict(cache_tokens=192, chunk=16)])
def test_requests_that_wait_their_turn_say_what_they_say_alone(model, alone, reading, limits, mtp):
    """Six requests which a stop token ends at different times; the cache holds three pages of 64 or more."""
    batch, free = alone
    stop = (free[0][3], free[2][9], free[4][0])
    wanted = [row[: min((row.index(t) + 1 for t in stop if t in row), default=16)] for row in free]
    assert len({len(row) for row in wanted}) > 2
    options = dict(max_new_tokens=16, stop_ids=stop, kv_cache="model")
    assert by_request(generate(model, batch, mtp=mtp, **limits, **options), 6) == wanted


class GraphStandIn:
    """What a capture gives, on a CPU: a replay runs the step on the inputs that the capture saw."""

    def __init__(self, run):
        self.run, self.outputs = run, run()

    def replay(self):
        self.outputs.copy_(self.run())


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_of_padded_graphs_say_what_exact_steps_say(model, monkeypatch, reading, temperature, mtp):
    """Rows of one to five fill graphs of 1, 2, 4 and 8; a capture runs the step twice and is to change nothing."""
    batch, options = prompts(70, 1, 33, 65, 12), dict(temperature=temperature, kv_cache="model", chunk=50)
    free = by_request(generate(model, batch, max_new_tokens=20, stop_ids=(), **options), 5)
    options |= dict(max_new_tokens=20, stop_ids=(free[1][10], free[2][12], free[3][12], free[4][7]))
    wanted = by_request(generate(model, batch, **options), 5)
    captured = []

    def capture(device, run, pool):
        run()
        captured.append(GraphStandIn(run))
        return captured[-1], captured[-1].outputs

    monkeypatch.setattr(decoding, "capture", capture)
    monkeypatch.setattr(decoding, "Chosen", lambda tokens: Chosen(tokens.clone()))  # on a GPU it copies them
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(generation, "refusal", lambda model: None)
    assert by_request(generate(model, batch, mtp=mtp, **options), 5) == wanted
    assert len(captured) == len({len(graph.outputs) for graph in captured}) and (mtp or len(captured) == 4)


@pytest.mark.parametrize("mtp", [False, True])
def test_drafts_and_waiting_leave_greedy_tokens(model, mtp):
    batch, options = [question("What can you do?"), *prompts(1, 66), question("Hello")], dict(max_new_tokens=10)
    wanted = [list(model.generate(prompt, **options)) for prompt in batch]
    assert by_request(generate(model, batch, max_batch=2, mtp=mtp, chunk=30, **options), 4) == wanted


def test_a_sample_depends_on_seed_request_and_position_alone(model, reading):
    batch = prompts(40, 1, 17)
    options = dict(max_new_tokens=9, temperature=1.3, top_p=0.95, top_k=50, stop_ids=(), kv_cache="model")
    wanted = by_request(generate(model, batch, seed=5, **options), 3)
    for variant in (dict(max_batch=1), dict(chunk=3, max_batch=2), dict(mtp=True)):
        assert by_request(generate(model, batch, seed=5, **variant, **options), 3) == wanted
    assert by_request(generate(model, [batch[0], [9], [9]], seed=5, **options), 3)[0] == wanted[0]
    assert list(model.generate(batch[1], seed=5, **options)) != wanted[1]  # the same prompt as another request
    assert list(model.generate(batch[0], seed=6, **options)) != wanted[0]


@torch.inference_mode()
def decoder_after(model, batch, room):
    """A decoder whose requests have seen their prompts but the last token."""
    longest = max(map(len, batch)) + room
    cache = PagedCache(model.config, len(batch), longest, dtype=torch.float32, device=model.device, page_size=16)
    decoder = Decoder(model, cache, graphs=False)
    for request, prompt in enumerate(batch):
        starts, counts = ([n if r == request else 0 for r in range(len(batch))] for n in (0, len(prompt) - 1))
        model.trunk(model.embed(torch.tensor(prompt[:-1])), cache.tokens(starts, counts))
        cache.settle(request, len(prompt) - 1, len(prompt) + room)
        decoder.admit(request, Sampling(temperature=request % 2 * 0.8, seed=1), request)
    decoder.feed(list(range(len(batch))), torch.tensor([p[-1] for p in batch]), [len(p) - 1 for p in batch])
    return decoder


@torch.inference_mode()
def test_padding_rows_change_neither_tokens_nor_cache(model):
    """40 steps, past pages and window; the second request rests every third step."""
    batch = prompts(30, 66, 5)
    plain, padded = (decoder_after(model, batch, 40) for _ in "pp")
    for step in range(40):
        rows = [0, 1, 2] if step % 3 else [0, 2]
        assert plain.step(rows, 0).tolist() == padded.step(rows, repeated=2, rows=4).tolist()
    assert plain.position[:3].tolist() == padded.position[:3].tolist() == [69, 91, 44]
    for one, other in zip(plain.cache.layers, padded.cache.layers, strict=True):
        for x, y in zip(one, other):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_padding_rows_have_no_slot_and_leave_their_token_to_no_request(model, monkeypatch):
    decoder, trunk, contexts = decoder_after(model, prompts(30, 66, 5), 10), model.trunk, []
    monkeypatch.setattr(model, "trunk", lambda x, context: contexts.append(context) or trunk(x, context))
    decoder.step([0, 2], repeated=2, rows=4)
    assert decoder.position.tolist()[:3] == [30, 65, 5]
    assert decoder.rows[0].tolist() == [0, 2, 2, 2] and decoder.rows[1].tolist() == [0, 2, 3, 3]
    assert contexts[0].lengths.tolist() == [30, 5, 5, 5]
    for slots, table in contexts[0].groups.values():
        assert (slots[:2] >= 0).all() and (slots[2:] < 0).all()
        assert torch.equal(table[1], table[2]) and torch.equal(table[1], table[3])


@torch.inference_mode()
def test_a_step_gives_the_tokens_of_the_full_forward_at_any_sampling(model):
    batch = prompts(70, 3)
    decoder, other = (decoder_after(model, batch, 20) for _ in "do")
    rows = list(batch)
    for _ in range(20):
        logits = torch.cat([model(torch.tensor([row]))[:, -1] for row in rows])
        wanted = other.start([0, 1], logits, [len(row) for row in rows]).tolist()
        assert decoder.step([0, 1], 0).tolist() == wanted
        rows = [row + [token] for row, token in zip(rows, wanted)]


@pytest.mark.parametrize("drafts, alive", [(0, 62 // 8 + 2), (3, (64 + 3 + 2) // 8 + 2)])
def test_live_pages_of_requests_never_meet(model, drafts, alive):
    """Random arrivals: prompts in chunks of 40 tokens and rings of decoding, in the fewest sliding pages."""
    rng, chunk, page, keep = random.Random(3), 40, 8, 64 + drafts if drafts else 63
    cache = PagedCache(
        model.config, 5, 300, dtype=torch.bfloat16, device=model.device, mtp_depths=drafts, chunk=chunk, page_size=page,
        tokens=800,
    )  # fmt: skip
    sliding, full = cache.groups[64], cache.groups[None]
    assert sliding.pages == 5 * alive + 40 // 8 + 1 and full.pages == 100
    live, order, waited = {}, [], 0  # row -> [length so far, prompt, end]; rows that prefill
    for _ in range(600):
        free = [row for row in range(5) if row not in live]
        if free:
            prompt = rng.randint(1, 200)
            end = prompt + rng.randint(1, 90) + 2 * drafts
            if cache.admit(free[0], end):
                live[free[0]] = [0, prompt, end]
                order.append(free[0])
            else:
                waited += 1
        starts, counts, room = [0] * 5, [0] * 5, chunk
        for row in order:
            starts[row], counts[row] = live[row][0], min(room, live[row][1] - live[row][0])
            room -= counts[row]
        if order:
            cache.tokens(starts, counts)
        for row, (length, _, _) in live.items():
            if row not in order:
                starts[row], counts[row] = length, 1 + drafts
        for group in (sliding, full):
            pages = [
                group.table[row, n].item()
                for row, (start, count) in enumerate(zip(starts, counts))
                if count
                for n in range(max(0, start - keep if group is sliding else 0) // page, -(-(start + count) // page))
            ]
            assert min(pages) >= 0 and len(pages) == len(set(pages))
        for row in list(live):
            live[row][0] += counts[row]
            if row in order and live[row][0] == live[row][1]:
                order.remove(row)
                cache.settle(row, live[row][1], live[row][2])
            elif row not in order:
                live[row][0] = min(live[row][0] + rng.randint(0, 8), live[row][2] - drafts)
                if live[row][0] == live[row][2] - drafts:
                    cache.free(row)
                    del live[row]
    assert waited > 20
    for row in live:
        cache.free(row)
    assert len(sliding.unused) == sliding.pages and len(full.unused) == full.pages


def spied_batches(monkeypatch):
    made, build = [], generation._batch
    monkeypatch.setattr(generation, "_batch", lambda *args: made.append(build(*args)) or made[-1])
    return made


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("taken", [0, 1, 9, None])
def test_an_interrupted_or_finished_generation_holds_no_pages(model, monkeypatch, reading, taken, mtp):
    made = spied_batches(monkeypatch)
    stream = generate(model, prompts(70, 3, 30), max_new_tokens=6, stop_ids=(), max_batch=2, chunk=32, mtp=mtp)
    tokens = [token for token, _ in zip(stream, range(99 if taken is None else taken))]
    stream.close()
    assert len(tokens) == (18 if taken is None else taken)
    for group in made[0].cache.groups.values():
        assert sorted(group.unused) == list(range(group.pages))


def test_only_last_tokens_of_prompts_meet_the_head(model, monkeypatch):
    rows, logits = [], model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: rows.append(len(hidden)) or logits(hidden))
    list(generate(model, prompts(70, 3, 30), max_new_tokens=2, stop_ids=(), chunk=40))
    assert rows == [2, 2, 1, 1]  # 40 of 70; 30, 3 and 7 of 30; two decode; 23; one decodes


def test_seed_repeats_a_sample_and_top_p_narrows_it(model):
    prompt = prompts(12)[0]

    def run(**options):
        return list(model.generate(prompt, max_new_tokens=25, stop_ids=(), kv_cache="model", **options))

    assert run(temperature=1.0, seed=1) == run(temperature=1.0, seed=1) != run(temperature=1.0, seed=2)
    assert run(temperature=1.0, top_p=1e-6, seed=3) == run() == run(temperature=1e-6)
    assert run(temperature=1.0, seed=1, mtp=True) != run()


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
        ([3], {"top_k": 1025}, "top_k: got 1025, wanted 0 (all) to 1024"),
        ([3], {"chunk": 0}, "chunk, max_batch: got 0, 128"),
        ([3] * 60, {"cache_tokens": 64, "max_new_tokens": 5}, "cache_tokens: got 64, wanted at least 128"),
        ([3], {"kv_cache": "int4"}, "kv_cache: got 'int4'"),
    ],
)
def test_bad_requests_name_what_came(model, prompt, options, message):
    with pytest.raises(ValueError) as error:
        list(model.generate(prompt, **options))
    assert message in str(error.value)
