"""The model on a GPU with the kernels that serve it there: graphs, long prompts, batches, real widths."""

import copy
import json

import pytest
import torch
from test_model import typical_error

import step_kernels as sk
from step_kernels.generate import BUNDLED
from step_kernels.model import Step3p7, StepConfig
from step_kernels.model.attention import WholeSequences
from step_kernels.model.cache import PagedCache
from step_kernels.model.chat import Chat
from step_kernels.model.decoding import Decoder
from step_kernels.model.generation import generate
from step_kernels.model.graph import refusal
from step_kernels.model.moe import MoE
from step_kernels.model.sampling import Sampling
from step_kernels.testing import relative_error

pytestmark = pytest.mark.gpu
CONFIG = StepConfig.read(BUNDLED)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The bundled model with NVFP4 experts."""
    from quantize import run

    folder = tmp_path_factory.mktemp("gpu") / "nvfp4"
    assert run(BUNDLED, folder).problems == []
    return folder


def prompts(*lengths):
    return [
        torch.randint(13, CONFIG.vocab_size, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths
    ]


def by_request(pairs, count):
    out = [[] for _ in range(count)]
    for request, token in pairs:
        out[request].append(token)
    return out


def in_f32(model):
    """The same weights, computed with in f32."""

    def cast(thing):
        if isinstance(thing, torch.Tensor):
            return thing.float() if thing.dtype == torch.bfloat16 else thing
        if isinstance(thing, (list, tuple)):
            return type(thing)(cast(t) for t in thing)
        if type(thing).__module__.startswith("step_kernels.model") and hasattr(thing, "__dict__"):
            thing = copy.copy(thing)
            for name, value in vars(thing).items():
                object.__setattr__(thing, name, cast(value))
        return thing

    model = cast(model)
    model.dtype = torch.float32
    return model


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("kv_cache", ["fp8", "model"])
def test_graphs_give_the_tokens_of_eager_steps_and_of_the_cpu(packed, kv_cache, mtp):
    """Prompts after which every token leads the next best by 0.4 or more; after most random ones some lead by 0.05."""
    on_gpu, on_cpu = (Step3p7.from_pretrained(packed, d, torch.float32) for d in ("cuda", "cpu"))
    assert refusal(on_gpu) is None
    options = dict(max_new_tokens=24, stop_ids=(), kv_cache=kv_cache, mtp=mtp)
    batch = [*prompts(50), [37], Chat(BUNDLED, CONFIG).prompt("Who are you?")]
    wanted = by_request(generate(on_cpu, batch, **options), 3)
    for graphs in (True, False):
        assert by_request(generate(on_gpu, batch, graphs=graphs, **options), 3) == wanted


@pytest.mark.parametrize("limits", [dict(max_batch=2, chunk=40), dict(max_batch=3, cache_tokens=192), dict()])
def test_requests_that_come_and_go_decode_in_padded_graphs_what_the_cpu_decodes(packed, limits):
    """Five requests of 10 to 40 tokens, each of which leads by 0.4; one to five rows fill graphs of 1, 2, 4 and 8."""
    on_gpu, on_cpu = (Step3p7.from_pretrained(packed, d, torch.float32) for d in ("cuda", "cpu"))
    chat = Chat(BUNDLED, CONFIG)
    batch = [chat.prompt(text) for text in ("Bye", "Who are you?", "Hi", "How are you?")] + prompts(50)
    options = dict(max_new_tokens=40)
    wanted = by_request(generate(on_cpu, batch, **options), 5)
    assert [len(row) for row in wanted] == [10, 40, 24, 21, 40]
    for graphs in (True, False):
        assert by_request(generate(on_gpu, batch, graphs=graphs, **limits, **options), 5) == wanted


@torch.inference_mode()
def decoder_after(model, lengths, graphs, samplings):
    cache = PagedCache(model.config, len(lengths), max(lengths) + 200, dtype=torch.float8_e4m3fn, device=model.device)
    decoder, batch = Decoder(model, cache, graphs), prompts(*lengths)
    for request, (prompt, sampling) in enumerate(zip(batch, samplings)):
        counts = [len(prompt) if r == request else 0 for r in range(len(batch))]
        hidden = model.trunk(model.embed(torch.tensor(prompt)), cache.tokens([0] * len(batch), counts))
        cache.settle(request, len(prompt), len(prompt) + 200)
        decoder.admit(request, sampling, request)
        decoder.start([request], model.logits(hidden[-1:]), [len(prompt)])
    return decoder


@torch.inference_mode()
def test_padded_graphs_write_what_eager_steps_write_and_nothing_else(packed):
    """130 steps over pages and window, greedy and sampled in one batch; one request rests every third step."""
    model = Step3p7.from_pretrained(packed, "cuda", torch.float32)
    ways = [Sampling(), Sampling(0.8, seed=1), Sampling(0.9, top_p=0.9, seed=2), Sampling(1.0, top_k=20), Sampling()]
    eager, graphs = (decoder_after(model, (50, 1, 70, 9, 64), g, ways) for g in (False, True))
    differ = 0
    for step in range(130):
        rows = [0, 1, 2, 3, 4] if step % 3 else [0, 2, 4]
        eager.token.copy_(graphs.token)  # a near tie is to cost one token, not all that follow
        differ += sum(a != b for a, b in zip(eager.step(rows, 0).tolist(), graphs.step(rows, rows[-1]).tolist()))
    assert differ <= 3 and sorted(graphs.graphs) == [(4, 2), (8, 2)]
    assert torch.equal(eager.position[:5], graphs.position[:5])
    for one, other in zip(eager.cache.layers, graphs.cache.layers, strict=True):
        for x, y in zip(one, other):
            x, y = x.float(), y.float()
            assert torch.equal((x != 0).any(-1), (y != 0).any(-1))  # the same positions are written
            assert ((x - y).abs() > 0.07 * x.abs() + 1e-3).float().mean() < 1e-3


@torch.inference_mode()
def test_a_decode_step_does_not_make_the_host_wait(packed):
    model = Step3p7.from_pretrained(packed, "cuda", torch.bfloat16)
    decoder = decoder_after(model, (50, 1, 70), True, [Sampling(), Sampling(0.8, top_p=0.9), Sampling(0.7)])
    decoder.step([0, 1, 2], 0), decoder.step([0, 2], 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chosen = [decoder.step(rows, 0) for rows in ([0, 1, 2], [0, 2], [0, 1, 2], [0, 1, 2])]
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        late = decoder.step([0, 1, 2], 0)
        assert not late.arrived.query()  # and so the step was only launched
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [len(c.tolist()) for c in (*chosen, late)] == [3, 2, 3, 3, 3]


def test_graphs_are_refused_where_the_reference_serves(packed):
    model = Step3p7.from_pretrained(packed, "cuda", torch.float32)
    with sk.force("reference"), pytest.raises(ValueError, match="graphs: .*served by the reference"):
        model.generate([3], graphs=True)
    with pytest.raises(ValueError, match="experts are not NVFP4"):
        Step3p7.from_pretrained(BUNDLED, "cuda").generate([3], graphs=True)


def test_bf16_nvfp4_logits_err_at_most_twice_as_much_as_transformers_with_decoded_weights(packed, tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    model = Step3p7.from_pretrained(packed, "cuda", torch.bfloat16)
    exact = Step3p7.from_pretrained(packed, "cpu", torch.float64)
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes((BUNDLED / name).read_bytes())
    for file in sorted(BUNDLED.glob("*.safetensors")):
        tensors = load_file(file)
        for n in (n for n, layer in enumerate(CONFIG.layers) if layer.moe):
            experts = model.layers[n].ffn.experts
            experts = sk.nvfp4_restore(experts) if isinstance(experts.down, sk.PreparedWeight) else experts
            gate, up = experts.gate_up.dequantize().chunk(2, 1)
            for projection, w in (("gate", gate), ("up", up), ("down", experts.down.dequantize())):
                if f"model.layers.{n}.moe.{projection}_proj.weight" in tensors:
                    tensors[f"model.layers.{n}.moe.{projection}_proj.weight"] = w.bfloat16().cpu().contiguous()
        save_file(tensors, tmp_path / file.name, metadata={"format": "pt"})
    oracle = transformers.Step3p7ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).cuda().eval()
    ids = torch.randint(13, CONFIG.vocab_size, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # text alone: transformers 5.17 rotates vision patches by row first
        theirs = oracle(input_ids=ids.cuda()).logits
    wanted = exact(ids)
    # the median over the tokens: the few whose routers flip in bf16 err by up to 0.3 and carry the mean
    assert typical_error(model(ids), wanted) < 2 * typical_error(theirs, wanted)


@pytest.fixture(scope="module")
def wide():
    from bench.release import released_config

    torch.cuda.empty_cache()
    return Step3p7.random(released_config(6))


def test_real_widths_err_at_most_twice_as_much_with_kernels_as_with_references(wide):
    ids = torch.randint(0, 128000, (1, 700), generator=torch.Generator().manual_seed(0))
    got, exact = wide(ids), in_f32(wide)
    with sk.force("reference"):
        eager, wanted = wide(ids), exact(ids)
    assert relative_error(got, wanted) < 2 * relative_error(eager, wanted)


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [6, 7])
def test_experts_beside_other_kernels_give_the_same_bits_every_time(wide, tokens):
    """Norm, router and experts without a pause between them: 2000 mixtures, of which 4 differed when a slot of weights
    could be filled anew while a warp's loads from it were under way."""
    mixtures = [layer for layer in wide.layers if isinstance(layer.ffn, MoE)]
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16, generator=torch.Generator("cuda").manual_seed(1))

    def outputs():
        return torch.stack([layer.ffn(layer.post_norm(x))[0] for layer in mixtures])

    wanted = outputs()
    differ = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(2000 // len(mixtures)):
        differ += (outputs() != wanted).any((1, 2)).sum()
    assert differ == 0


def test_real_widths_decode_in_graphs_what_they_decode_eagerly(wide):
    batch = [
        torch.randint(0, 128000, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (600, 3, 2500, 40)
    ]
    options = dict(max_new_tokens=8, stop_ids=(), mtp=True)
    runs = [by_request(generate(wide, batch, graphs=g, **options), 4) for g in (True, True, False)]
    assert runs[0] == runs[1]  # the same bits on every run
    assert [len(r) for r in runs[2]] == [8, 8, 8, 8]
    assert runs[0] == runs[2]


def test_real_widths_take_images_and_long_prompts(wide):
    text = torch.randint(0, 128000, (20000,), generator=torch.Generator().manual_seed(3)).tolist()
    text[19700 : 19700 + 169] = [128001] * 169  # within the last tokens' window: of 20000 keys they would be 1 %
    image = torch.randn(1, 3, 728, 728, generator=torch.Generator().manual_seed(4))
    out = list(generate(wide, [text], max_new_tokens=5, stop_ids=(), images=[{"pixel_values": image}]))
    blank = list(generate(wide, [text], max_new_tokens=5, stop_ids=(), images=[{"pixel_values": image * 0}]))
    assert len(out) == 5 and all(0 <= token < 128896 for _, token in out) and out != blank


def twin(model, config, folder):
    """transformers' model with the same weights, NVFP4 decoded, on the same device and in the same dtype."""
    transformers = pytest.importorskip("transformers.models.step3p7", reason="needs transformers >= 5.17")
    (folder / "config.json").write_text(json.dumps(config))
    config = transformers.Step3p7Config.from_pretrained(folder)
    with model.device:
        theirs = transformers.Step3p7ForConditionalGeneration._from_config(config, dtype=model.dtype).eval()
    left = dict(theirs.named_parameters()) | dict(theirs.named_buffers())

    def put(name, *weights):
        at = 0
        for weight in weights:
            left[name].data[at : at + len(weight)] = weight
            at += len(weight)
        assert at == len(left.pop(name)), name

    def put_mlp(name, mlp):
        gate, up = mlp.gate_up.weights[0].chunk(2)
        for part, weight in (("gate", gate), ("up", up), ("down", mlp.down)):
            put(f"{name}.{part}_proj.weight", weight)

    text = "model.language_model"
    put(f"{text}.embed_tokens.weight", model.embed_tokens)
    put(f"{text}.norm.weight", model.norm.weight)
    put("lm_head.weight", model.lm_head)
    for n, layer in enumerate(model.layers):
        name, attention = f"{text}.layers.{n}", layer.attention
        put(f"{name}.input_layernorm.weight", layer.input_norm.weight)
        put(f"{name}.post_attention_layernorm.weight", layer.post_norm.weight)
        for part, weight in zip("qkvg", attention.qkvg.weights[0].split(attention.qkvg.rows)):
            put(f"{name}.self_attn.{part}_proj.weight", weight)
        put(f"{name}.self_attn.o_proj.weight", attention.o)
        for part in "qk":
            put(f"{name}.self_attn.{part}_norm.weight", getattr(attention, f"{part}_norm"))
        if isinstance(layer.ffn, MoE):
            put(f"{name}.mlp.gate.weight", layer.ffn.gate)
            put(f"{name}.mlp.gate.e_score_correction_bias", layer.ffn.bias)
            experts = layer.ffn.experts
            experts = sk.nvfp4_restore(experts) if isinstance(experts.down, sk.PreparedWeight) else experts
            put(f"{name}.mlp.experts.gate_up_proj", experts.gate_up.dequantize())
            put(f"{name}.mlp.experts.down_proj", experts.down.dequantize())
            put_mlp(f"{name}.mlp.shared_experts", layer.ffn.share)
        else:
            put_mlp(f"{name}.mlp", layer.ffn)
    assert all("vision" in name or "multi_modal" in name or "inv_freq" in name for name in left), sorted(left)
    return theirs


@pytest.fixture(scope="module")
def wide_twin(wide, tmp_path_factory):
    from bench.release import released

    config = {"model_type": "step3p7", **released(6)}
    return twin(wide, config, tmp_path_factory.mktemp("twin"))


def exact_logits(model, embeddings):
    """[batch, length, hidden] -> logits of the references in f32."""
    model = in_f32(model)
    with sk.force("reference"):
        batch, length, _ = embeddings.shape
        hidden = model.trunk(embeddings.float().flatten(0, 1), WholeSequences(batch, length, model.device))
        return model.logits(hidden).unflatten(0, (batch, length))


@torch.inference_mode()
@pytest.mark.parametrize("crops", [None, 2])
def test_real_widths_err_at_most_twice_as_much_as_transformers(wide, wide_twin, crops):
    """Two prompts of 700 tokens, beyond the window, or one with an image. The image's features are ours on both sides:
    transformers 5.17 rotates vision patches by row first."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(13, 128000, (2 if crops is None else 1, 700), generator=generator)
    images = ()
    if crops is not None:
        sizes = ((1, wide.config.vision.image_size), (crops, wide.config.vision.crop_size))
        whole, parts = (torch.randn(n, 3, s, s, generator=generator).to("cuda", wide.dtype) for n, s in sizes)
        images = whole, parts, [crops]
        ids[0, 20 : 20 + len(wide.image_features(*images))] = wide.config.image_token_id
    embeddings, got = wide.embed(ids, *images), wide(ids, *images)
    theirs, wanted = wide_twin(inputs_embeds=embeddings).logits, exact_logits(wide, embeddings)
    assert typical_error(got, wanted) < 2 * typical_error(theirs, wanted)


@torch.inference_mode()
def test_real_widths_in_a_batch_of_mixed_lengths_err_at_most_twice_as_much_as_transformers(wide, wide_twin):
    """Prompts of 600, 3 and 2500 tokens in one step but for their last tokens, which a second step feeds."""
    batch = [
        torch.randint(13, 128000, (n,), generator=torch.Generator().manual_seed(n), device="cpu")
        for n in (600, 3, 2500)
    ]
    cache = PagedCache(wide.config, 3, 2500, dtype=wide.dtype, device=wide.device)
    counts = [len(p) - 1 for p in batch]
    first = wide.trunk(wide.embed(torch.cat([p[:-1] for p in batch])), cache.tokens([0] * 3, counts))
    second = wide.trunk(wide.embed(torch.stack([p[-1] for p in batch])), cache.tokens(counts, [1] * 3))
    for r, prompt in enumerate(batch):
        hidden = torch.cat((first.split(counts)[r], second[r : r + 1]))
        embeddings = wide.embed(prompt[None])
        got, wanted = wide.logits(hidden)[None], exact_logits(wide, embeddings)
        theirs = wide_twin(inputs_embeds=embeddings).logits
        assert typical_error(got, wanted) < 2 * typical_error(theirs, wanted)
        assert relative_error(got[0, -1], wanted[0, -1]) < 2 * relative_error(theirs[0, -1], wanted[0, -1]) + 0.02
