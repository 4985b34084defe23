"""The training twin computes what the model computes, its gradients are right, and its batches hold what they say."""

import json
import shutil

import numpy as np
import pytest
import torch

from bench import bundled, card, corpus, digits
from bench.batches import LENGTH, Dialogue, Rows, answer_ids, draw
from bench.trainable import Parameters, Trainable, _Collect, _Spread
from step_kernels.model.chat import Chat
from step_kernels.model.config import StepConfig
from step_kernels.model.image import crop_plan
from step_kernels.model.step import Step3p7
from step_kernels.testing import relative_error

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trainable():
    config = StepConfig.from_dict(bundled.config())
    parameters = Parameters(CPU, 2 * len(config.layers), seed=1)
    trainable = Trainable(Step3p7(config, parameters, bundled.MTP), torch.float32, compile=False)
    trainable.parameters = parameters
    torch.manual_seed(0)
    with torch.no_grad():  # norms away from their start, experts picked by more than their logits
        for x in parameters.tensors.values():
            if x.dim() == 1:
                x += 0.1 * torch.randn_like(x)
    return trainable


def test_hidden_states_are_the_models(trainable):
    ids = torch.randint(20, bundled.VOCAB, (2, 90), generator=torch.Generator().manual_seed(2))
    model = trainable.model
    with torch.no_grad():
        trunk, *drafts = trainable(ids, None)
    assert relative_error(model.logits(trunk), model(ids)) < 1e-4
    for depth, wanted in enumerate(model.draft_logits(ids)):
        got = model.mtp[depth].logits(drafts[depth][:, : wanted.shape[1]])
        assert relative_error(got, wanted) < 1e-4


def test_image_features_take_the_places_of_image_tokens(trainable):
    model, generator = trainable.model, torch.Generator().manual_seed(3)
    ids = torch.randint(20, bundled.VOCAB, (2, 40), generator=generator)
    ids[1, 4:21] = torch.tensor([model.config.image_token_id] * 17)
    views, crops = torch.randn(1, 3, 168, 168, generator=generator), torch.randn(2, 3, 112, 112, generator=generator)
    places = torch.zeros(1, 40, dtype=torch.long)
    places[0, 4:21] = torch.tensor([*range(9, 17), *range(9)])  # the two crops' features, then the view's
    with torch.no_grad():
        hidden = trainable(ids, (trainable.features(views, crops), places))[0]
    wanted = model(ids, views, crops, [2])
    assert relative_error(model.logits(hidden), wanted) < 1e-4
    assert relative_error(wanted[1], model(ids)[1]) > 0.1


def test_loss_of_the_trunk_and_of_each_depth_is_cross_entropy_of_the_models_logits(trainable):
    tokens = torch.randint(20, bundled.VOCAB, (2, 50), generator=torch.Generator().manual_seed(4))
    weights = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        losses = trainable.loss(tokens, weights, None)
    logits = [trainable.model(tokens[:, :-1]), *trainable.model.draft_logits(tokens[:, :-1])]
    for skip, (loss, each) in enumerate(zip(losses, logits)):
        token_loss = torch.nn.functional.cross_entropy(each.mT, tokens[:, 1 + skip :], reduction="none")
        kept = weights[:, 1 + skip :]
        assert abs(loss - (token_loss * kept).sum() / kept.sum()) < 1e-4


def test_spread_and_collect_have_the_gradients_of_indexing():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(12)
    inverse = order.argsort()
    assert torch.autograd.gradcheck(lambda x: _Spread.apply(x, order, inverse, 2), x)
    rows = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: _Collect.apply(r, order, inverse), rows)
    assert torch.equal(_Collect.apply(_Spread.apply(x, order, inverse, 2), order, inverse), x.repeat_interleave(2, 0))


def test_every_parameter_gets_a_gradient(trainable):
    model = trainable.model
    ids = torch.randint(20, bundled.VOCAB, (4, 129), generator=torch.Generator().manual_seed(6))
    ids[0, 4:21] = torch.tensor([model.config.image_token_id] * 17)
    features = trainable.features(torch.randn(1, 3, 168, 168), torch.randn(2, 3, 112, 112))
    places = torch.arange(128).clamp(max=16).expand(4, 128)
    sum(trainable.loss(ids, torch.ones(ids.shape), (features, places))).backward()
    for name, x in trainable.parameters.tensors.items():
        if not name.endswith("router_bias"):
            assert x.grad is not None and x.grad.abs().sum() > 0, name
            x.grad = None


def test_balance_moves_a_bias_towards_experts_chosen_too_rarely(trainable):
    moe = next(layer.ffn for layer in trainable.model.layers if hasattr(layer.ffn, "bias"))
    before = moe.bias.clone()
    trainable.counts = {moe: torch.arange(32)}
    trainable.balance(torch.tensor(0.5))
    assert torch.equal(moe.bias - before > 0, torch.arange(32) < 15.5)
    with torch.no_grad():
        moe.bias.copy_(before)


def test_checkpoint_has_the_released_names_and_dtypes(trainable, tmp_path):
    bundled.save(tmp_path, trainable.parameters.checkpoint())
    assert max(f.stat().st_size for f in tmp_path.iterdir()) < 16e6
    loaded, model = Step3p7.from_pretrained(tmp_path, "cpu", torch.float32), trainable.model
    assert torch.equal(loaded.layers[7].ffn.experts.gate_up, model.layers[7].ffn.experts.gate_up.bfloat16().float())
    assert torch.equal(loaded.layers[7].ffn.bias, model.layers[7].ffn.bias)
    assert torch.equal(loaded.mtp[2].head, model.mtp[2].head.bfloat16().float())


def test_rows_hold_text_from_the_stream_and_whole_dialogues(trainable):
    stream = (np.arange(5000) % 700 + 100).astype(np.uint16)
    stream[::50] = trainable.model.config.bos_id
    image = trainable.model.config.image_token_id
    view, crops = np.zeros((3, 168, 168), np.float16), np.zeros((2, 3, 112, 112), np.float16)
    talk = Dialogue([0, 3, *[image] * 17, 2000, 2001, 4], 20, view, crops)
    alone = Dialogue([0, 3, *[image] * 9, 2002, 4], 11, view, crops[:0])
    rows = Rows(stream, [talk, alone], trainable.model.config, 16, 1, CPU)
    batch = rows.draw()
    tokens, weights = batch.tokens, batch.weights
    assert tokens.shape == weights.shape == (16, LENGTH + 1)
    assert bool((weights[:14] == 1).all())
    assert bool((tokens[1:14:2, 0] == 0).all())  # every other row begins at a document
    assert set(tokens[14:][weights[14:] > 0].tolist()) == {2001, 2002, 4}
    assert len(batch.views) == 20 and len(batch.crops) == 40
    first = tokens[14, :20].tolist()
    expected = [*range(180, 188), *range(9)] if first[19] == 2000 else [*range(9)]  # behind 9 features of 20 views
    assert batch.places[0, 2 : 2 + len(expected)].tolist() == expected
    assert batch.views[0] == (0 if first[19] == 2000 else 1)


def test_strips_are_cut_into_crops_and_single_digits_are_not():
    images, labels = corpus.heldout_digits()
    config = StepConfig.from_dict(bundled.config()).vision
    plans = [crop_plan(*digits.picture(images[:n]).size, config) for n in (1, 2, 3, 4)]
    assert [(plan.columns, plan.rows) for plan in plans] == [(0, 0), (2, 1), (3, 1), (2, 1)]
    assert digits.answer([7]) == "It is a 7." and digits.answer(labels[[4, 0, 7, 2]]) == "The digits are 6 2 9 4."


def test_shaken_digits_keep_their_ink_and_are_the_same_for_a_seed():
    images, _ = corpus.heldout_digits()
    plain = np.asarray(digits.picture(images[:1])).astype(float)
    shaken = [np.asarray(digits.picture(images[:1], np.random.default_rng(seed))) for seed in (1, 1, 2)]
    assert np.array_equal(shaken[0], shaken[1]) and not np.array_equal(shaken[0], shaken[2])
    for picture in shaken:  # ink against paper, whatever their colours
        grey = picture.astype(float).mean(-1)
        share = abs(grey - np.median(grey)) / abs(grey - np.median(grey)).max()
        assert 0.6 < share.sum() / (plain.mean(-1) / 255).sum() < 1.5


def test_a_dialogue_is_a_prompt_and_then_the_answer_to_its_picture(tmp_path):
    images, labels = corpus.heldout_digits()
    np.savez(tmp_path / "digits.npz", images=images, labels=labels)
    chat = Chat(bundled.BUNDLED, StepConfig.from_dict(bundled.config()))
    for i, dialogue in enumerate(draw(bundled.BUNDLED, tmp_path, 6, 4), 6):
        rng = np.random.default_rng(i)
        chosen = rng.integers(len(images), size=1 if i % 3 == 0 else rng.integers(2, 5))
        assert dialogue.ids[dialogue.answer :] == answer_ids(chat, digits.answer(labels[chosen]))
        patches = chat.config.vision.image_tokens + chat.config.vision.crop_tokens * len(dialogue.crops)
        assert dialogue.ids.count(chat.config.image_token_id) == patches and dialogue.ids[0] == chat.config.bos_id
        assert chat.tokenizer.decode(dialogue.ids[dialogue.answer :]).strip() == digits.answer(labels[chosen])


def test_card_is_the_one_that_training_wrote(tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "bundled"
    shutil.copytree(bundled.BUNDLED, folder)
    card.write_card(folder, json.loads((folder / "training.json").read_text()))
    assert (folder / "README.md").read_text() == (bundled.BUNDLED / "README.md").read_text()


def test_bundled_files_are_small_enough_to_keep_in_the_repository():
    assert sum(f.stat().st_size for f in bundled.BUNDLED.iterdir()) < 24e6
