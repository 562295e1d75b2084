"""Claims about MG-CLIP, on tiny models and made-up data: `pytest -q`. Its speed: `python test_mgclip.py`."""

import argparse
import contextlib
import csv
import functools
import importlib.util
import io
import itertools
import json
import math
import multiprocessing.connection
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from statistics import median
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import distributed as dist

import mgclip
from mgclip import MGCLIP, CosineHead, add_lora, class_prototypes, clip, encode_images, encode_texts, extract_features
from mgclip import find_epochs, finetune, fit_head, fused_scores, load_clip, main, parse, run

PLOTS = importlib.util.find_spec("matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork")  # forks beside threads: theirs are not used again

# Golden figures -------------------------------------------------------------------------------------------------------
# What the authors' code, github.com/linlany/MindtheGap at commit f40bfce, computes on the tiny CLIP, LoRA and images
# that `golden_inputs` builds again: its weights were drawn, not trained. A batch is the whole set: no order matters.

NEG = [0.093181, 0.091218, 0.087475, 0.084117, 0.083058, 0.083511, 0.084385, 0.085041, 0.085356, 0.085450, 0.085462]
DELTA = [0.000000, 0.021066, 0.061241, 0.097270, 0.108637, 0.103778, 0.094402, 0.087361, 0.083981, 0.082967, 0.082841]
EPOCHS = {0.005: 1, 0.01: 1, 0.02: 1, 0.05: 1, 0.1: 3, 0.2: 10}  # alpha: E, the last before the first crossing
TASKS = [
    dict(
        pos_neg=[[0.085515, 0.093181], [0.086409, 0.091218], [0.085946, 0.088401], [0.085636, 0.087277]],
        loss=[3.608309, 3.011576, 2.480627], head_loss=[1.024160, 0.958018, 0.923535],
        fused=[[1.963638, 1.346240, 1.690122], [1.987772, 1.308647, 1.703580], [1.439825, 1.903353, 1.656822]],
        pred=[0, 0, 1, 2, 2, 2, 0], text_pred=[0, 2, 2, 2, 2, 2, 2],
        image_feature=[-0.089246, -0.005241, -0.149934, 0.030076, -0.173014, 0.172288],
        text_feature=[-0.099303, 0.213690, -0.012346, -0.009827, -0.133944, 0.092457],
        new_rows=[[-0.004818, -0.075453, -0.019899], [-0.103264, -0.073039, 0.028982], [0.015638, 0.135655, -0.238356]],
    ),
    dict(
        pos_neg=[[0.103905, 0.091144], [0.096750, 0.084189], [0.091229, 0.077715], [0.089690, 0.075733]],
        loss=[1.089577, 0.961833, 0.864242], head_loss=[1.059178, 1.006861, 0.978392],
        fused=[
            [0.942788, 0.687081, 0.820584, 0.787781, 0.881761, 0.880003],
            [0.961115, 0.671102, 0.823673, 0.819524, 0.910008, 0.814579],
            [0.710037, 0.955734, 0.765383, 0.678038, 0.827532, 1.063276],
        ],
        pred=[0, 0, 5, 2, 3, 4, 5], text_pred=[5, 4, 5, 4, 4, 4, 5],
        image_feature=[-0.096904, -0.005823, -0.149683, 0.035602, -0.165402, 0.174020],
        text_feature=[-0.101364, 0.215576, -0.014770, -0.019719, -0.119590, 0.076283],
        new_rows=[[-0.207922, -0.094444, -0.033498], [0.027705, -0.095560, 0.014465], [-0.122553, 0.085614, 0.018341]],
    ),
]  # fmt: skip
NAMES = ("apple", "bicycle", "castle", "dolphin", "elephant", "forest")


@functools.cache
def made_up_weights(seed):
    """Weights for a CLIP of 2-layer, width-64 towers for 32 x 32 pixels, drawn with NumPy by order of name."""
    state, rs = clip.model.CLIP(64, 32, 2, 64, 8, 77, 49408, 64, 1, 2).state_dict(), np.random.RandomState(seed)
    for name in sorted(state.keys() - {"logit_scale"}):
        shape, mean = state[name].shape, 0
        scale = shape[-1] ** -0.5 if len(shape) >= 2 else 0.05
        if "ln_" in name and name.endswith("weight"):
            scale, mean = 0.1, 1
        elif name.endswith("bias"):
            scale = 0.02
        elif "embedding" in name:
            scale = 0.05
        state[name] = torch.tensor(mean + scale * rs.standard_normal(shape), dtype=torch.float32)
    return state | {"logit_scale": torch.tensor(math.log(100))}


def made_up_clip(seed=0):
    model = clip.model.CLIP(64, 32, 2, 64, 8, 77, 49408, 64, 1, 2).eval()
    model.load_state_dict(made_up_weights(seed))
    return model


def tokens_of(names):
    return clip.tokenize([f"a good photo of a {name}." for name in names])


def golden_inputs():
    """A tiny CLIP with rank-4 LoRA, its LoRA parameters, 48 images of six classes in two tasks, labels, tokens."""
    model, rs = made_up_clip(), np.random.RandomState(1)
    lora = add_lora(model, rank=4)
    for A in lora[::2]:  # A_k and A_v of every block; B stays zero
        A.data = torch.tensor(rs.standard_normal((4, 64)) * 0.2, dtype=torch.float32)
    proto = rs.randint(0, 256, (6, 3, 32, 32))
    labels = np.repeat(np.arange(6), 8)
    images = np.clip(proto[labels] + rs.randint(-60, 61, (48, 3, 32, 32)), 0, 255).astype(np.uint8)
    return model, lora, torch.from_numpy(images), torch.from_numpy(labels), tokens_of(NAMES)


def golden_images():
    return golden_inputs()[2][:3]


def first_task():
    """The first golden task: model, LoRA, 24 images of three classes, labels, tokens."""
    model, lora, images, labels, tokens = golden_inputs()
    return model, lora, images[:24], labels[:24], tokens[:3]


@pytest.fixture
def task():
    return first_task()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more only wait for each other on tiny models


def copied(parameters):
    return [p.detach().clone() for p in parameters]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def close(ours, theirs):
    np.testing.assert_allclose(torch.as_tensor(ours).detach(), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("alpha, epochs", EPOCHS.items())
def test_search_stops_with_the_authors(task, alpha, epochs):
    E, history = find_epochs(*task, alpha, lr=0.01, batch_size=24)
    crossing = next((e for e, delta in enumerate(DELTA) if delta > alpha), 10)
    assert E == epochs and [h["epoch"] for h in history] == list(range(crossing + 1))
    close([h["neg"] for h in history], NEG[: len(history)])
    close([h["delta"] for h in history], DELTA[: len(history)])


def test_a_learner_agrees_with_the_authors(monkeypatch):
    _, lora, images, labels, tokens = golden_inputs()
    options = dict(rank=4, epochs=3, lr=0.01, batch_size=24, head_lr=0.05, head_batch_size=24)
    learner, mean_loss = MGCLIP(made_up_clip(), **options), mgclip.mean_loss
    for p, golden in zip(learner.lora, lora, strict=True):
        p.data.copy_(golden)
    for t, golden in enumerate(TASKS):
        own, seen = slice(24 * t, 24 * t + 24), tokens[: 3 * t + 3]
        gap = lambda: mgclip.measure_gap(learner.model, images[own], labels[own], seen)
        losses, gaps = [], [gap()]

        def noted(batches, epoch):
            losses.append(mean_loss(batches, epoch))
            gaps.append(gap())
            return losses[-1]

        monkeypatch.setattr(mgclip, "mean_loss", noted)
        learner.learn(images[own], labels[own] - 3 * t, NAMES[3 * t : 3 * t + 3])
        close(losses, golden["loss"] + golden["head_loss"])
        close(gaps[:4], golden["pos_neg"])
        rows = [row for task in TASKS[: t + 1] for row in task["new_rows"]]  # older ones stay as they are
        close(F.normalize(learner.head.weight)[:, :3], rows)
        fused, text_logits, _ = learner.scores(learner.features(images[::7]), learner.texts())
        close(fused[:3], golden["fused"])
        assert learner.predict(images[::7]).tolist() == golden["pred"]
        assert text_logits.argmax(1).tolist() == golden["text_pred"]
        close(learner.features(images[:1])[0, :6], golden["image_feature"])
        close(learner.texts()[0, :6], golden["text_feature"])


# The method -----------------------------------------------------------------------------------------------------------


def test_only_keys_and_values_change():
    model, (_, _, images, labels, tokens) = made_up_clip(), golden_inputs()
    features = lambda: (extract_features(model, images), encode_texts(model, tokens))
    before, clips_own = features(), [*model.parameters()]
    lora, state = add_lora(model), copied(clips_own)
    torch.testing.assert_close(features(), before, atol=1e-6, rtol=1e-5)  # B is zero
    assert all(A.any() and not B.any() for A, B in zip(lora[::2], lora[1::2]))
    finetune(model, lora, images, labels, tokens, epochs=2, lr=0.01)
    assert same(clips_own, state) and all(B.any() for B in lora[1::2])
    assert {p for p in model.parameters() if p.requires_grad} == set(lora)
    assert not torch.allclose(features()[0], before[0], atol=1e-3)
    for again, words in ((model, "a LoRA already"), (made_up_clip().half(), "float32")):
        with pytest.raises(ValueError, match=words):
            add_lora(again)


def test_vit_b16_trains_the_papers_number_of_parameters():
    with torch.device("meta"):  # sizes without numbers
        lora = add_lora(clip.model.CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12), rank=8)
    assert sum(p.numel() for p in lora) == 491_520


def test_search_leaves_lora_and_generators_as_they_were(task):
    generator, before = torch.Generator().manual_seed(3), copied(task[1])
    states = lambda: (generator.get_state(), torch.get_rng_state())
    began = states()
    find_epochs(*task, lr=0.01, batch_size=5, max_epochs=2, generator=generator)
    find_epochs(*task, lr=0.01, batch_size=5, max_epochs=2)
    assert same(states(), began) and same(task[1], before)


def test_gap_and_head_are_in_float32_where_training_is_in_bf16(task):
    plain = find_epochs(*task, max_epochs=1)[1]
    features, labels = extract_features(task[0], task[2]), task[3]
    heads = CosineHead(64), CosineHead(64)
    heads[0].learn(features, labels, batch_size=24)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        under = find_epochs(*task, max_epochs=1)[1]
        losses = finetune(*task, epochs=3, lr=0.01, batch_size=24)
        heads[1].learn(features, labels, batch_size=24)
    torch.testing.assert_close(heads[1].weight, heads[0].weight, atol=1e-6, rtol=1e-6)
    assert under[0] == plain[0] and under[1] != plain[1]
    assert losses == pytest.approx(TASKS[0]["loss"], rel=0.05) and losses != pytest.approx(TASKS[0]["loss"], abs=1e-4)


def test_a_bf16_learner_trains_on_the_weights_of_the_last_step(task, monkeypatch):
    """And not on bf16 copies of them, which autocast keeps of parameters that are multiplied as they are."""
    learner = MGCLIP(made_up_clip(), rank=4, epochs=3, lr=0.01, batch_size=24, bf16=True)
    losses, mean_loss = [], mgclip.mean_loss
    for p, golden in zip(learner.lora, task[1], strict=True):
        p.data.copy_(golden)
    monkeypatch.setattr(mgclip, "mean_loss", lambda *batches: losses.append(mean_loss(*batches)) or losses[-1])
    learner.learn(*task[2:4], NAMES[:3])
    assert losses[:3] == pytest.approx(TASKS[0]["loss"], rel=0.05)


def test_the_lora_learns_the_same_with_any_head():
    _, _, images, labels, _ = golden_inputs()
    learners = [MGCLIP(made_up_clip(), epochs=1, batch_size=5, head=head) for head in (None, mgclip.RidgeHead(64))]
    for learner in learners:
        for names in (NAMES[:3], NAMES[3:]):
            learner.learn(images[:24], labels[:24], names)
    assert same(*[learner.lora for learner in learners])


@pytest.mark.parametrize("github", [False, True])
def test_features_and_gradients_are_those_of_clips_own_encoders(monkeypatch, github):
    """Of all 77 tokens and all of the last image block, where ours stop at the longest prompt and the class token."""
    if github:  # openai/CLIP from there gives attention the mask of all 77, and its tokens are int32
        whole_mask = lambda block, x: block.attn(x, x, x, need_weights=False, attn_mask=block.attn_mask)[0]
        monkeypatch.setattr(clip.model.ResidualAttentionBlock, "attention", whole_mask)
    (model, lora, images, _, tokens), plain = golden_inputs(), made_up_clip()
    tokens = tokens.int() if github else tokens
    torch.testing.assert_close(encode_texts(plain, tokens), F.normalize(plain.encode_text(tokens), dim=-1))
    plains = add_plain_lora(plain, rank=4)
    for p, q in zip(lora, plains, strict=True):
        p.data = q.data = torch.randn(p.shape) * 0.1
    seen = []
    for block in (model.transformer.resblocks[-1], model.visual.transformer.resblocks[-1]):
        block.mlp.register_forward_hook(lambda mlp, inputs, y: seen.append(y.shape[0]))
    x, texts = encode_images(model, images), encode_texts(model, tokens)
    assert sorted(seen) == [1, 9]  # tokens: the class token; start, "a good photo of a {}.", end, but no padding
    x_0, texts_0 = encode_images(plain, images), plain_texts(plain, tokens)  # `encode_images` is CLIP's own encoder
    torch.testing.assert_close((x, texts), (x_0, texts_0))
    gradients = [torch.autograd.grad((100 * a @ b.T).logsumexp(1).sum(), p)
                 for a, b, p in ((x, texts, lora), (x_0, texts_0, plains))]  # fmt: skip
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


def decoded(file, size=32):
    """An image file by CLIP's own preprocessing but for the normalisation: uint8 (3, size, size)."""
    image = Image.open(file)
    for step in clip.clip._transform(size).transforms[:4]:
        image = step(image)
    return (image * 255).round().to(torch.uint8)


@pytest.mark.parametrize("height, width, mode", [(32, 32, "RGB"), (64, 64, "L"), (100, 333, "RGBA"), (50, 41, "P")])
def test_pictures_are_preprocessed_as_by_clip(tmp_path, height, width, mode):
    model, path = made_up_clip(), tmp_path / "class" / "image.png"
    path.parent.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    image = mgclip.Folder(tmp_path, 32)[0][0]
    expected = model.encode_image(clip.clip._transform(32)(Image.open(path))[None])
    torch.testing.assert_close(encode_images(model, image[None]), F.normalize(expected, dim=-1))


@pytest.mark.parametrize("size", [32, 48, 224])
def test_tensors_are_resized_as_by_pillow(tmp_path, size):
    pixels = np.random.RandomState(0).randint(0, 256, (50, 41, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    ours = mgclip.resize_and_crop(torch.from_numpy(pixels).permute(2, 0, 1)[None], size)[0]
    off = ours.int() - decoded(tmp_path / "plain.png", size)
    assert off.abs().max() <= 2 and (off != 0).float().mean() < 0.01  # Pillow computes in fixed point


@pytest.mark.parametrize("chunk", [5, 48])
@pytest.mark.parametrize("align, distill", [(0, 0), (0.5, 0), (0, 3.0)])
def test_loss_and_gradients_are_those_of_the_plain_form(monkeypatch, chunk, align, distill):
    """Plain: the whole batch at once, the prompts of all classes, and the logits of the older ones masked."""
    model, lora, images, labels, tokens = golden_inputs()
    images, labels = images[24:], labels[24:]
    monkeypatch.setattr(mgclip, "chunk_size", lambda model: chunk)
    logits_0 = (100 * extract_features(model, images) @ encode_texts(model, tokens[3:]).T).detach()  # CLIP untouched
    for p in lora:
        torch.nn.init.normal_(p, std=0.1)
    x, texts = encode_images(model, images), encode_texts(model, tokens)
    logits = 100 * x @ texts.T
    plain = F.cross_entropy(logits.index_fill(1, torch.arange(3), -math.inf), labels)
    plain = plain + align * (x - texts[labels]).square().sum(1).mean()  # Fig. 2b
    drift = (logits[:, 3:] - logits_0).square().mean()
    plain = plain + distill * drift  # Table 5: the squared difference of 100 cos, no temperature
    gradients, before = torch.autograd.grad(plain, lora), copied(lora)
    own = dict(images=images, labels=labels - 3, tokens=tokens[3:])
    if not distill:  # then nothing is encoded beforehand
        monkeypatch.setattr(mgclip, "extract_features", Mock(side_effect=AssertionError))
    extra = mgclip.baseline_loss(argparse.Namespace(model=model, lora=lora), **own, align=align, distill=distill)
    assert same(lora, before) and drift > 0.001
    loss = finetune(model, lora, **own, epochs=1, lr=1e-9, extra_loss=extra)
    assert loss == [pytest.approx(plain.item(), rel=1e-5)]
    for p, gradient in zip(lora, gradients):
        torch.testing.assert_close(p.grad, gradient, atol=1e-4, rtol=2e-3)


def test_schedules_fall_by_epoch_and_by_batch_to_a_hundredth(task, monkeypatch):
    rates, step = [], torch.optim.Adam.step
    spy = lambda self: rates.append(self.param_groups[0]["lr"]) or step(self)
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    learner = MGCLIP(made_up_clip(), epochs=2, batch_size=12, head_batch_size=8)
    learner.learn(*task[2:4], NAMES[:3])
    fall = lambda n: [0.01 + 0.99 * (1 + math.cos(math.pi * i / n)) / 2 for i in range(n)]
    assert rates[:4] == pytest.approx([1e-3 * fall(2)[i // 2] for i in range(4)])  # the LoRA's, two steps an epoch
    assert rates[4:] == pytest.approx([5e-4 * part for part in fall(9)])  # the head's


def test_the_analyses_by_their_definitions():
    e, angle = torch.eye(4), math.radians(30)
    turned = (math.cos(angle) * e[0] + math.sin(angle) * e[2])[:, None]
    both = torch.cat([turned, e[:, 1:2]], 1)  # e_0 lies 0.5 outside, e_1 not at all: mean 0.25, root mean square 0.35
    assert mgclip.subspace_distance(e[:, :2], both) == pytest.approx(0.25, abs=1e-6)
    assert mgclip.subspace_distance(e[:, :2], e[:, 2:]) == 1 and mgclip.subspace_distance(e[:, :2], e) == 0
    x, labels, texts = torch.randn(40, 8), torch.arange(40) % 8, torch.randn(8, 8)
    assert set(mgclip.analyse(x, labels, texts, texts)) == {"pos", "neg"}  # eight classes fill eight dimensions
    assert "d(B_i, B_t+vc)" not in mgclip.analyse(x, labels % 5, texts[:5], texts[:5])  # nor do twice five
    assert mgclip.analyse(x, labels % 3, texts[:3], texts[:3])["d(B_i, B_t+vc)"] > 0.1
    assert mgclip.forgetting([[90.0], [80.0, 70.0], [85.0, 60.0, 50.0]]) == ((5 + 10) / 2, (-5 - 10) / 2)
    assert mgclip.forgetting([[50.0], [70.0, 9.0], [60.0, 9.0, 9.0]]) == (5, 5)  # the best is not the first
    assert mgclip.forgetting([[50.0]]) == (0, 0)


def test_a_task_of_one_class_teaches_the_head_alone(task):
    _, _, images, labels, _ = task
    learner = MGCLIP(made_up_clip(), epochs="each", max_epochs=1)
    learner.learn(images[labels < 2], labels[labels < 2], NAMES[:2])
    before = copied(learner.lora)
    assert learner.learn(images[labels == 2], labels[labels == 2] - 2, NAMES[2:3]) == []
    assert same(learner.lora, before) and len(learner.head.weight) == 3 == len(learner.names)


@functools.cache
def learned_two_classes(kind):
    learner = kind(made_up_clip(), epochs=1)
    learner.learn(golden_images(), [0, 1, 0], ["fox", "owl"])
    return learner


WHOLE = torch.full((3, 3, 32, 32), 200, dtype=torch.uint8)  # three images
LABELS = ([0, 0, 2], [1, 2, 3], [0, 0, 0], [0, 1, 2, 2], [0, 1], [[0], [1], [2]], np.eye(3), [0, 1, 2.5],
          [0, 1, math.nan], ["a", "b", "c"], None)  # fmt: skip


@pytest.mark.parametrize("change, words", [
    *((dict(labels=labels), "labels") for labels in LABELS),
    (dict(images=WHOLE / 255), r"\(N, 3, H, W\), not Tensor torch.float32 .*\(255 \* x\).round\(\).byte\(\)"),
    (dict(images=(WHOLE / 255).byte()), r"no value is above 1; .*\(255 \* x\).round\(\).byte\(\)"),
    (dict(images=WHOLE.numpy()), "must be a uint8 tensor .* not ndarray uint8"),
    (dict(images=WHOLE.permute(0, 2, 3, 1)), r"not Tensor torch.uint8 \(3, 32, 32, 3\)"),
    (dict(images=WHOLE[:, :1]), r"\(3, 1, 32, 32\)"), (dict(images=WHOLE[0]), r"\(3, 32, 32\)"),
    (dict(names=["ant", "bee", "ant"]), "given twice: ant"), (dict(names=["ant", "fox", "cat"]), "already.*: fox"),
    (dict(names=["ant", ("b", "e"), "cat"]), "names .*'b'"), (dict(names=["ant", "bee", math.nan]), "names .*nan"),
    (dict(names="abc"), "names .*'abc'"), (dict(names={"ant", "bee", "cat"}), "names"), (dict(names=None), "names"),
    (dict(names=dict(ant=0, bee=1, cat=2)), "names"), (dict(images=WHOLE[:0]), "0 images, but 3 labels"),
    (dict(names=[], labels=[], images=WHOLE[:0]), "labels"),
])  # fmt: skip
@pytest.mark.parametrize("kind", [MGCLIP, mgclip.NullSpaceMGCLIP])
def test_a_call_that_does_not_fit_is_refused_before_anything_changes(kind, change, words):
    learner = learned_two_classes(kind)
    before = learner.state()
    with pytest.raises(ValueError, match=words):
        learner.learn(**dict(images=WHOLE, labels=[0, 1, 2], names=["ant", "bee", "cat"]) | change)
    after = learner.state()
    assert same(after["generators"] + after["lora"], before["generators"] + before["lora"]) and len(learner.names) == 2
    if "images" in change and len(change["images"]) and change["images"].shape != WHOLE.shape:
        with pytest.raises(ValueError, match=words):
            learner.predict(change["images"])


def test_a_function_called_with_labels_that_do_not_fit_refuses_them(task):
    model, lora, images, labels, tokens = task
    with pytest.raises(ValueError, match="24 images, but 23 labels"):
        finetune(model, lora, images, labels[1:], tokens, 1)
    features = extract_features(model, images)
    with pytest.raises(ValueError, match="24 images, but 23 labels"):
        mgclip.similarity_gap(features, features[:3], labels[1:])
    for wrong in (labels + 1, labels.clamp(1), labels - 1):
        for work in (class_prototypes, functools.partial(fit_head, CosineHead(64))):
            with pytest.raises(ValueError, match="0, 1, .."):
                work(features=features, labels=wrong)


def test_labels_names_and_heads_of_other_kinds_are_taken():
    for labels in ([0.0, 1.0, 0.0], np.array([0, 1, 0], object), torch.tensor([0, 1, 0], dtype=torch.uint8)):
        learner = MGCLIP(made_up_clip(), epochs=0)
        learner.learn(golden_images(), labels, np.array([7, 8]))
        assert learner.names == ["7", "8"]
    head = torch.nn.Sequential()  # it is empty, and counts as False
    assert MGCLIP(made_up_clip(), head=head).head is head


@pytest.mark.parametrize("options, words", [
    (dict(template="a photo"), "template"), (dict(template="{} or {}"), "template"), (dict(alpha=10), "0.1 is 10%"),
    (dict(epochs=-1), "epochs"), (dict(epochs="all"), "epochs"), (dict(rank=0), "rank"), (dict(max_epochs=0), "max_ep"),
    (dict(beta=math.nan), "beta"), (dict(beta=1e39), "beta"), (dict(batch_size=0), "batch_size"),
    (dict(batch_size=2.5), "batch_size"), (dict(head_epochs=-1), "head_epochs"), (dict(lr=-1), "lr"),
    (dict(seed=2.5), "seed"),
    (dict(head=CosineHead(9)), "head .*64 dimensions"), (dict(rho=1.5), "rho"), (dict(ridge=0), "ridge"),
])  # fmt: skip
def test_an_option_that_makes_wrong_figures_is_refused(options, words):
    kind = dict(rho=mgclip.NullSpaceMGCLIP, ridge=mgclip.RidgeHead).get(*options, MGCLIP)
    model = made_up_clip()
    with pytest.raises(ValueError, match=words):
        kind(model, **options)
    learner = MGCLIP(model, epochs=np.int64(1), batch_size=np.int64(8))  # the refused call left the model as it was
    assert type(learner.E) is int  # which JSON and torch.load take
    learner.learn(WHOLE, [0, 1, 1], ["fox", "owl"])


def test_what_is_no_clip_is_refused():
    with pytest.raises(ValueError, match="ViT image encoder, not tuple"):
        MGCLIP((made_up_clip(), "preprocess"))


@torch.no_grad()  # as a host may have it: `learn` sets it right
def test_predict_needs_a_task_takes_no_images_and_encodes_the_prompts_once(monkeypatch):
    learner = MGCLIP(made_up_clip(), epochs=1)
    with pytest.raises(ValueError, match="no class"):
        learner.predict(WHOLE)
    learner.learn(golden_images(), [0, 1, 0], ["fox", "owl"])
    assert learner.predict(WHOLE[:0]).shape == (0,)
    first = learner.texts()
    monkeypatch.setattr(mgclip, "encode_texts", Mock(side_effect=AssertionError))
    assert learner.texts() is first and learner.predict(WHOLE).shape == (3,)
    monkeypatch.undo()
    learner.make_extra_loss = lambda learner, *task: [learner.texts(), None][1]  # in the middle of a task
    learner.learn(WHOLE, [0, 0, 0], ["ant"])
    assert torch.equal(learner.texts(), encode_texts(learner.model, tokens_of(["fox", "owl", "ant"])))


def test_a_state_of_another_clip_or_of_other_options_is_refused():
    state = MGCLIP(made_up_clip()).state()
    for other in (
        MGCLIP(made_up_clip(1)), MGCLIP(made_up_clip(), rank=1), MGCLIP(made_up_clip(), template="{}"),
        MGCLIP(made_up_clip(), head=mgclip.RidgeHead(64)), mgclip.NullSpaceMGCLIP(made_up_clip()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="the state is of another (clip|rank|template|head|learner)"):
            other.load(state)
    MGCLIP(made_up_clip(), seed=5).load(state)


@pytest.mark.parametrize("host", [
    lambda: torch.device("meta"),  # a default device on which nothing can be computed
    lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad,
])  # fmt: skip
@pytest.mark.parametrize("new", [
    lambda model: MGCLIP(model, max_epochs=1, batch_size=2),
    lambda model: mgclip.NullSpaceMGCLIP(model, epochs=1, head=mgclip.RidgeHead(64, width=9)),
])  # fmt: skip
def test_what_a_host_has_set_changes_nothing(new, host):
    images, outcomes = golden_images(), []
    p = torch.zeros(1, requires_grad=True)
    p.grad = torch.zeros(1)
    with host(), torch.enable_grad():
        try:
            torch.optim.Adam([p]).step()
        except NotImplementedError:
            pytest.skip("this torch's own Adam counts its steps on the default device")
    for context in (host(), contextlib.nullcontext()):
        model = made_up_clip()
        with context:
            learner = new(model)
            for names in (["fox", "owl"], ["ant", "bee"], ["cat", "dog"]):
                learner.learn(images, [0, 1, 0], names)
            outcomes.append([*scored(learner, images), learner.predict(images), learner.predict(images[:0])])
    assert same(*outcomes)


class Copies(torch.overrides.TorchFunctionMode):
    """Notes copies from the CPU, and the moment at which a step has given the device its first work."""

    def __init__(self):
        self.noted = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function is torch.Tensor.to and args[0].device.type == "cpu" != result.device.type:
            self.noted.append("copy")
        if function is F.embedding:
            self.noted.append("work")
        return result


def test_nothing_in_a_step_waits_for_the_device(monkeypatch):
    """On the meta device, where whatever needs a number raises; all copies of a step are made before its work."""
    _, _, images, labels, tokens = first_task()
    model = made_up_clip().to("meta")
    lora = add_lora(model)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which knows no such device
    monkeypatch.setattr(mgclip, "mean_loss", lambda losses, epoch: len(losses))  # waits, once an epoch
    monkeypatch.setattr(mgclip, "chunk_size", lambda model: 5)
    with Copies() as copies:
        assert finetune(model, lora, images, labels, tokens, epochs=1, batch_size=12) == [2]
    step = ["copy"] * (2 * 3 + 2) + ["work"]  # three chunks: their numbers and images; tokens and their ends
    assert copies.noted == ["copy", *step, *step]  # first the labels of all


def test_gradients_of_the_cosine_are_float32_under_bf16(task, monkeypatch):
    inputs, grads, cosine = [], {}, mgclip.cosine

    def spied(*tensors):
        inputs.extend(tensor.detach() for tensor in tensors)
        result = cosine(*tensors)
        for name, tensor in zip(("x", "t", "cosine"), (*tensors, result)):
            tensor.register_hook(lambda grad, name=name: grads.update({name: grad.clone()}))
        return result

    monkeypatch.setattr(mgclip, "cosine", spied)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        finetune(*task, epochs=1, batch_size=24)
    x, t = (tensor.requires_grad_() for tensor in inputs)
    expected = torch.autograd.grad(cosine(x, t), (x, t), grads["cosine"])
    torch.testing.assert_close((grads["x"], grads["t"]), expected, atol=1e-6, rtol=1e-6)


IMPORTS_OF_A_PASTE = """
import copy
import hashlib
import math
from contextlib import contextmanager
from functools import partial
import clip, torch
import numpy as np
import torch.nn.functional as F
from torch import distributed as dist, nn
from torchvision import transforms
from tqdm import tqdm
"""


def test_parts_a_to_g_pasted_alone_learn_and_predict(tmp_path, monkeypatch):
    """Also where the host has a process group of its own, on which they never call."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for name in ("all_reduce", "broadcast_object_list", "get_rank", "get_world_size"):
        monkeypatch.setattr(dist, name, Mock(side_effect=AssertionError(name)))
    source = Path(mgclip.__file__).read_text("utf-8")
    method = source.partition("\n# A ")[2].partition("\n# H ")[0]
    pasted = {}
    exec(f"{IMPORTS_OF_A_PASTE}\n# A {method}", pasted)
    _, _, images, labels, _ = golden_inputs()
    new = lambda which: which["MGCLIP"](made_up_clip(), max_epochs=2, alpha=0.5, lr=0.01, batch_size=7)
    theirs, ours = new(pasted), new(vars(mgclip))
    for t in (0, 1):
        task = images[24 * t :][:24], labels[:24], NAMES[3 * t :][:3]
        assert theirs.learn(*task) == ours.learn(*task)
        torch.save(theirs.state(), tmp_path / "state.pt")
        theirs = new(pasted)
        theirs.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(scored(theirs, images), scored(ours, images))
    assert torch.equal(theirs.predict(images), ours.predict(images))


def scored(learner, images):
    return learner.scores(learner.features(images), learner.texts())


OPTIONS = dict(lr=0.01, batch_size=8)


class ListHead:
    """A head of a user's own, which changes in place."""

    def __init__(self):
        self.rows = []

    def learn(self, features, labels, **_):
        self.rows.extend(class_prototypes(features, labels))

    def __call__(self, features):
        return features @ torch.stack(self.rows).T


@pytest.mark.parametrize("new", [
    lambda: MGCLIP(made_up_clip(), max_epochs=2, **OPTIONS),
    lambda: MGCLIP(made_up_clip(), epochs=1, head=mgclip.RidgeHead(64, width=99), **OPTIONS),
    lambda: mgclip.NullSpaceMGCLIP(made_up_clip(), rho=0.05, epochs=1, **OPTIONS),
    lambda: MGCLIP(made_up_clip(), epochs=1, head=ListHead(), **OPTIONS),
], ids=["MG-CLIP", "ridge", "null space", "own head"])  # fmt: skip
def test_a_learner_goes_on_from_a_state_however_often(new, tmp_path, monkeypatch):
    _, _, images, labels, _ = golden_inputs()
    learner = new()
    learner.learn(images[:24], labels[:24].numpy(), np.array(NAMES[:3]))
    first, state = scored(learner, images), learner.state()
    torch.save(state, tmp_path / "learner.pt")
    second = images[24:40], labels[24:40] - 3, np.array(NAMES[3:5])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        learn = type(learner.head).learn
        patch.setattr(type(learner.head), "learn", lambda *a, **k: [learn(*a, **k), signal.raise_signal(signal.SIGINT)])
        learner.learn(*second)
    assert same(scored(learner, images), first) and len(learner.names) == 3  # what was half learned is undone
    learner.learn(*second)
    expected = scored(learner, images)
    saved = torch.load(tmp_path / "learner.pt", weights_only=True)
    for which, state in ((learner, state), (new(), saved), (learner, state)):  # in place, elsewhere, once more
        which.load(state)
        assert same(scored(which, images), first) and which.names == list(NAMES[:3])
        which.learn(*second)
        assert same(scored(which, images), expected) and which.names == list(NAMES[:5])


# Whole runs -----------------------------------------------------------------------------------------------------------

FOLDER = "--dataset folder --data-root images --model tiny.pt --tasks 3 --device cpu --batch-size 5"
LONG = f"{FOLDER} --max-epochs 2 --lr 0.01 --alpha 0.5 --distill 0.1 --zeroshot birds=birds"


def paint(path, seed=0, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 80, (*size, 3)) + 30 * (seed % 6)
    Image.fromarray(pixels.astype(np.uint8)).save(path, None if path.suffix.lower() in Image.EXTENSION else "PNG")


def day(root, *names, halves=("train", "test")):
    for (i, half), (c, name) in itertools.product(enumerate(halves), enumerate(names)):
        for n in range(4):
            paint(Path(root, half, name, f"{n}.png"), 50 * i + 6 * n + c)


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A tiny CLIP, a folder data set of six classes, two runs on them and one interrupted in its second task."""
    root = tmp_path_factory.mktemp("template")
    torch.set_num_threads(1)
    torch.save(made_up_clip().state_dict(), root / "tiny.pt")
    for (c, name), i in itertools.product(enumerate(NAMES), range(9)):
        paint(root / "images" / ("train" if i < 6 else "test") / name / f"{i}.png", 6 * i + c)
    paint(root / "images" / "test" / "apple" / "9.png", 60)  # tasks of 7, 6 and 6 test images
    shutil.copytree(root / "images" / "test", root / "birds" / "test")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(f"{LONG} --out whole".split()) == 0
        assert main(f"{FOLDER} --tasks 2 --lr 0.01 --epochs 1 --out plain".split()) == 0
        patch.setattr(mgclip, "evaluate", at_call(2, mgclip.evaluate, Mock(side_effect=KeyboardInterrupt)))
        assert main(f"{LONG} --out cut".split()) == 130
    return root


@pytest.fixture
def workplace(template, tmp_path, monkeypatch):
    """A folder of its own to run in, with what the template holds; nothing is kept outside it, nothing downloaded."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    for metrics in tmp_path.glob("*/metrics.jsonl"):
        metrics.write_text(metrics.read_text().replace(str(template), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network
    monkeypatch.setattr(mgclip, "pretrain_tiny", lambda: pytest.fail("pre-trains"))
    monkeypatch.setattr(mgclip, "RidgeHead", functools.partial(mgclip.RidgeHead, width=64))  # 2,048 take a while
    return tmp_path


def at_call(n, function, instead):
    """The function, but for its n-th call."""
    calls = itertools.count(1)
    return lambda *args, **options: (instead if next(calls) == n else function)(*args, **options)


def events(folder, kind=None):
    """What a run wrote, but for the times and its first line; or all lines of one kind."""
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    assert lines[0]["event"] == "config"
    return [line for line in lines if line["event"] == kind or (kind is None and line is not lines[0])]


def ran(command, out="run"):
    """The events of a command that ends well."""
    assert main([*command.split(), "--out", out]) == 0
    return events(out)


def learned(folder):
    state = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)["learner"]
    return [p.tolist() for p in (*state["lora"], state["head"]["weight"])]


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


@pytest.mark.parametrize("option", [
    "--rank 2", "--lr 0.02", "--batch-size 4", "--epochs 2", "--head-epochs 1", "--head-lr 0.05", "--head-batch-size 4",
    "--beta 0.5", "--align 1", "--distill 1", "--seed 1", "--class-order 5", "--template {}", "--gelu", "--bf16",
    "--head ridge", "--null-space 0.1", "--tasks 3", "--epochs each",
])  # fmt: skip
def test_every_option_matters(workplace, option):
    ran(f"{FOLDER} --tasks 2 --lr 0.01 --epochs 1 --max-epochs 2 --alpha 0.5 {option}")
    assert learned("run") != learned("plain") or events("run") != events("plain")


def test_a_t_counts_every_image_alike():
    _, _, images, labels, _ = golden_inputs()
    learner = MGCLIP(made_up_clip(), epochs=0, head_epochs=0)
    learner.learn(images, labels, NAMES)
    result = mgclip.evaluate(learner, [(images[:7], labels[:7]), (images[20:], labels[20:].flip(0))])
    truth = torch.cat([labels[:7], labels[20:].flip(0)])
    seen = []
    on_gpu = type("OnGPU", (torch.Tensor,), dict(cpu=lambda self: seen.append(self) or self.as_subclass(torch.Tensor)))
    mgclip.evaluate(learner, [(images[:35], truth.as_subclass(on_gpu))])
    assert mgclip.evaluate(learner, [(images[:7], labels[:7].tolist()), (images[20:], labels[20:].flip(0))]) == result
    with pytest.raises(ValueError, match="7 images, but 8 labels"):
        mgclip.evaluate(learner, [(images[:7], labels[:8]), (images[20:], labels[21:])])
    assert len(seen) == 1  # labels on a GPU are copied to the CPU
    scores = scored(learner, torch.cat([images[:7], images[20:]]))
    fused, text, visual = [100 * (part.argmax(1) == truth).double() for part in scores]
    means = [part.mean().item() for part in (fused, text, visual, fused[:7], fused[7:])]
    names = ("accuracy", "text_accuracy", "visual_accuracy")
    assert [*(result[name] for name in names), *result["per_task"]] == pytest.approx(means)


def test_epochs_found_give_the_figures_of_epochs_given(workplace):
    assert events("whole")[-1]["epochs"] == [2, 2, 2] and [e["epochs"] for e in events("whole", "epochs")] == [2]
    ran(f"{LONG} --epochs 2")
    assert events("run", "task") == events("whole", "task") and learned("run") == learned("whole")


def test_epochs_are_found_on_each_task_where_asked_for(workplace, monkeypatch):
    found = iter([3, 1, 2])
    monkeypatch.setattr(mgclip, "find_epochs", lambda **data: (next(found), find_epochs(**data)[1]))
    ran(f"{FOLDER} --epochs each --max-epochs 1")
    assert [e["epochs"] for e in events("run", "epochs")] == [e["epochs"] for e in events("run", "task")] == [3, 1, 2]


def test_a_run_is_two_files_and_its_options_are_the_first_line(workplace, capsys):
    result = run(parse(LONG.split()))  # as another program starts it
    assert main(LONG.split()) == 0
    assert sorted(os.listdir("runs")) == ["folder-0", "folder-0-2"]
    folder = Path("runs/folder-0-2")
    assert sorted(os.listdir(folder)) == ["checkpoint.pt", "metrics.jsonl"]
    [config], log = events(folder, "config"), events(folder)
    options, versions = config["options"], config["versions"]
    assert (options["lr"], options["bf16"], versions["torch"]) == (0.01, False, torch.__version__)
    assert options.keys() == vars(parse([])).keys() and len(options) <= 30
    assert log == events("whole") == events("runs/folder-0")  # same seed, same numbers
    tasks, birds = events(folder, "task"), events(folder, "zeroshot")  # the birds are the test images of all tasks
    assert [e["task"] for e in birds] == [0, 1, 2, 3] and birds[3]["accuracy"] == tasks[-1]["text_accuracy"]
    A = [e["accuracy"] for e in tasks]
    assert (log[-1]["accuracy"], log[-1]["avg"], log[-1]["last"]) == (A, pytest.approx(np.mean(A)), A[-1])  # line 12
    assert log[-1]["forgetting"] == mgclip.forgetting([e["per_task"] for e in tasks])[0]
    assert log[-1]["trainable_parameters"] == 2 * 2 * 4 * 8 * 64 + 6 * 64 and set(log[-1]) <= set(result)
    out, err = capsys.readouterr()
    assert err == "" and "\r" not in out and out.splitlines()[-1] == str(folder)  # well-formed off a terminal


# Data and weights -----------------------------------------------------------------------------------------------------

PERMUTED = {(s, K): np.random.RandomState(s).permutation(K)[:10].tolist() for s in (5, 1993) for K in (100, 1000)}


@pytest.mark.parametrize("options, row, sizes, first", [
    ("cifar100", [1e-3, 128, 5e-4, 64, 3], [10] * 10, [87, 0, 52, 58, 44, 91, 68, 97, 51, 15]),
    ("imagenet-r", [1e-3, 64, 5e-4, 32, 3], [20] * 10, [150, 119, 193, 2, 75, 179, 129, 68, 145, 53]),
    ("imagenet100", [5e-4, 128, 1e-3, 128, 3], [10] * 10, PERMUTED[1993, 100]),
    ("imagenet1k", [5e-4, 80, 5e-4, 64, 2], [100] * 10, PERMUTED[1993, 1000]),
    ("folder --tasks 3", [1e-3, 128, 5e-4, 64, 3], [3, 2, 2], [0, 1, 2]),  # as even as can be
    ("cifar100 --tasks 4,2,94 --class-order 5 --lr 7", [7, 128, 5e-4, 64, 3], [4, 2, 94], PERMUTED[5, 100]),
])  # fmt: skip
def test_presets_are_the_authors(options, row, sizes, first):
    config = parse(["--dataset", *options.split()])
    assert [config.lr, config.batch_size, config.head_lr, config.head_batch_size, config.head_epochs] == row
    assert (config.model, config.rank, config.alpha, config.beta) == ("ViT-B/16", 8, 0.1, 4)
    tasks = mgclip.split_classes(config, sum(sizes))
    assert [len(task) for task in tasks] == sizes and sum(tasks, [])[: len(first)] == first
    assert sorted(sum(tasks, [])) == list(range(sum(sizes)))


@pytest.mark.parametrize("listing, folders, names", [
    ("\ufeffn02\tgreat_white shark\nn01 fish\n", ["n01", "n02"], ["fish", "great_white shark"]),
    ("sea horse the fish\nsea salt\n", ["sea", "sea horse"], ["salt", "the fish"]),
    ("sea horse\tthe fish\nsea\tsalt\n", ["sea", "sea horse"], ["salt", "the fish"]),
    (None, ["a b", "c", "red_apple"], ["a b", "c", "red apple"]),
])  # fmt: skip
def test_class_names_come_from_classes_txt_or_the_folders(tmp_path, listing, folders, names):
    if listing:
        (tmp_path / "classes.txt").write_text(listing, encoding="utf-8")
    assert mgclip.class_names(tmp_path, folders) == names


def opened(dataset, classes, half="train", size=32):
    """Names, images and labels of some classes of a data set in the folder data."""
    data, names = mgclip.open_data(dataset, "data", half, size, "--data-root")
    return names, *mgclip.load_images(data, classes, half)


def test_vtab_has_the_authors_names_and_ends_with_the_papers_figures(workplace, capsys):
    for half, c in itertools.product(("train", "val"), range(50)):
        paint(Path("data", half, str(c), "0.png"), c, (8, 8))
    ran("--dataset vtab --model tiny.pt --epochs 0 --head-epochs 0 --device cpu")
    assert "the paper's Avg / Last: 94.67 / 91.53, E unknown" in capsys.readouterr().out
    day("more", "crow")
    assert main("--resume run --add more".split()) == 0 and "the paper's" not in capsys.readouterr().out
    names, images, _ = opened("vtab", [10])
    assert (names[0], names[20], names[49], len(set(names))) == ("airplane", "Abyssinian Cat", "pink-yellow dahlia", 50)
    assert torch.equal(images[0], decoded("data/train/10/0.png"))
    for i in range(50, 101):
        shutil.copytree("data/val/0", f"data/val/{i}")
    assert opened("imagenet100", [99], "test")[0] == [str(i) for i in range(100)]  # of all, the first 100


def cifar100_on_disk(monkeypatch):
    """Writes a CIFAR-100 of two images per class, as torchvision reads it, and returns its pixels."""
    Path("data/cifar-100-python").mkdir(parents=True)
    pixels = np.random.RandomState(0).randint(0, 256, (200, 3072)).astype(np.uint8)
    for name in ("train", "test"):
        images = {"data": pixels, "fine_labels": [*range(100)] * 2}
        Path("data/cifar-100-python", name).write_bytes(pickle.dumps(images))
    names = {"fine_label_names": [f"thing_{i:02d}" for i in range(100)]}
    Path("data/cifar-100-python/meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    return pixels


def test_cifar100_and_pets_are_read_as_torchvision_lays_them_out(workplace, monkeypatch):
    pixels = cifar100_on_disk(monkeypatch)
    names, images, labels = opened("cifar100", [7, 3], "train", 224)
    assert np.array_equal(images, pixels.reshape(-1, 3, 32, 32)[[7, 107, 3, 103]])  # not enlarged yet
    assert (names[7], labels.tolist()) == ("thing_07", [0, 0, 1, 1])
    Path("data/oxford-iiit-pet/annotations").mkdir(parents=True)
    paint(Path("data/oxford-iiit-pet/images/great_dane_7.jpg"))
    Path("data/oxford-iiit-pet/annotations/test.txt").write_text("great_dane_7 1 1 1\n")
    names, images, labels = opened("pets", [0], "zeroshot")
    assert names == ["Great Dane"] and torch.equal(images[0], decoded("data/oxford-iiit-pet/images/great_dane_7.jpg"))


@pytest.mark.parametrize("write", [dict, lambda state: dict(state_dict={f"module.{k}": state[k] for k in state})])
def test_state_dicts_are_read_in_float32_to_the_bit(workplace, write):
    torch.save(write(made_up_weights(0)), "other.pt")
    for name, weight in load_clip("other.pt").state_dict().items():
        assert torch.equal(weight, made_up_weights(0)[name])


@pytest.mark.filterwarnings("ignore")
def test_torchscript_archives_are_read(workplace):
    model, images = made_up_clip(), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for name, value in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        if not hasattr(model, name):  # as OpenAI's archives carry their sizes
            model.register_buffer(name, torch.tensor(value))
    torch.jit.trace(model, (torch.randn(1, 3, 32, 32), tokens_of(NAMES[:2]))).save("traced.pt")
    difference = encode_images(load_clip("traced.pt"), images) - encode_images(made_up_clip(), images)
    assert difference.abs().max() < 0.01  # clip.load goes through float16


# What a user can get wrong, and what is odd but right -----------------------------------------------------------------


def refused(capsys, arguments, *words):
    """The command line ends with status 2 and one message on standard error that holds all the words."""
    capsys.readouterr()
    try:
        status = main(arguments if isinstance(arguments, list) else arguments.split())
    except SystemExit as stop:  # argparse
        status = stop.code
    error = capsys.readouterr().err
    message = [line for line in error.splitlines() if "error:" in line]
    assert status == 2 and len(message) == 1 and "Traceback" not in error, error
    assert all(word in message[0] for word in words), error
    assert message[0] == error.splitlines()[-1], error  # in one line


def renamed(*names):
    """Renames the first folders of both halves."""
    for half, (old, new) in itertools.product(("train", "test"), zip(NAMES, names)):
        Path("images", half, old).rename(Path("images", half, new))


def reweighted(**tensors):
    torch.save(made_up_weights(0) | tensors, "tiny.pt")


def flipped(path):
    """Turns one bit of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def small_clip(*sizes):
    torch.save(clip.model.CLIP(*sizes).state_dict(), "tiny.pt")


NEW, CUT = f"{FOLDER} --epochs 0 --out new", "--resume cut"
TRAP = type("Trap", (), dict(__reduce__=lambda self: (os.mkdir, ("sprung",))))()  # makes a folder if a file runs code
APPLE, LISTING, TINY = Path("images/train/apple"), Path("images/classes.txt"), Path("tiny.pt")
NO_MEMORY = Mock(side_effect=RuntimeError("DefaultCPUAllocator: can't allocate memory"))


@pytest.mark.parametrize("command, words", [
    *((f"{NEW} {option}", option.split()) for option in (
        "--tasks 0", "--tasks 5,2", "--tasks 1,5", "--tasks 7", "--alpha nan", "--alpha 10", "--beta 1e39", "--rank 0",
        "--epochs all", "--runs 3", "--template photo", "--device quantum", "--zeroshot birds", "--zeroshot =images",
        "--model no-such", "--model ViT-B/16", "--data-root nowhere/peer", "--null-space 1",
    )),
    (f"{NEW} --zeroshot birds=nowhere", ["--zeroshot birds", "nowhere"]),
    (f"{NEW} --zeroshot a=birds --zeroshot a=images", ["--zeroshot", "one name"]),
    (f"{NEW} --dataset imagenet-r", ["official", "200 classes", "holds 6", "natural"]),
    (f"{NEW} --null-space 0.1 --distill 1", ["--distill", "--null-space"]),
    ("--data-root images", ["--data-root", "--dataset folder"]),
    (f"{FOLDER} --out images", ["--out images", "new or empty"]),
    (f"{NEW} --add birds", ["--add", "--resume"]),
    ("--predict a.png --resume whole --add birds", ["--predict", "--add"]),
    ("--plot whole --resume cut", ["--plot", "no other option"]),
    ("--plot whole images", ["--plot images", "metrics.jsonl"]),
    (["--resume", ""], ["--resume"]),
    (f"{CUT} --batch-size 1", ["--batch-size", "--resume"]),
    (f"{FOLDER} --epochs 1 --batch-size 99 --lr 1e30 --out new", ["learning rate"]),  # only the last step ruins it
], ids=str)  # fmt: skip
def test_a_bad_option_is_one_message(workplace, capsys, command, words):
    before = [contents(folder) for folder in ("whole", "cut")]
    refused(capsys, command, *words)
    assert before == [contents(folder) for folder in ("whole", "cut")]


@pytest.mark.parametrize("damage, command, words", [
    (lambda _: Path("images/test/castle").rename("castle"), NEW, ["images", "in one alone: castle"]),
    (lambda _: Path("images/test").rename("images/valid"), NEW, ["--data-root", "images: has no val/", "train/"]),
    (lambda _: os.truncate("images/train/forest/0.png", 1000), NEW, ["images/train/forest/0.png", "image"]),
    (lambda _: Image.new("RGB", (30_000, 1)).save(APPLE / "b.png"), NEW, ["apple/b.png", "as long as wide"]),
    (lambda _: Image.new("F", (9, 9)).save(APPLE / "b.tif"), NEW, ["apple/b.tif", "16 bits"]),
    (lambda _: [Image.new("L", (9, 9), 1).save(p) for p in APPLE.parent.glob("*/*.png")], NEW, ["task 1", "black"]),
    *((lambda _, name=name: renamed(name), NEW, ["images/classes.txt", name, "README"])
      for name in ("n02100000", "n02085620-apple", "001.apple")),
    (lambda _: LISTING.write_text("".join(f"{n} {n * 99}\n" for n in NAMES)), NEW, ["classes.txt", "appleapple"]),
    (lambda _: LISTING.write_text("apple fruit\n"), NEW, ["classes.txt", "bicycle"]),
    (lambda _: LISTING.write_bytes(b"apple \xfcber\n"), NEW, ["classes.txt", "UTF-8"]),
    (lambda _: os.truncate(TINY, 100_000), NEW, ["--model", "tiny.pt", "cut short"]),
    (lambda _: torch.save(TRAP, TINY), NEW, ["--model", "tiny.pt", "state_dict()"]),
    (lambda _: small_clip(64, 32, (1, 1, 1, 1), 8, None, 77, 100, 64, 1, 1), NEW, ["--model", "tiny.pt", "ViT"]),
    (lambda _: small_clip(64, 32, 1, 64, 8, 77, 99, 64, 1, 1), NEW, ["--model", "tiny.pt", "99 tokens"]),
    (lambda _: reweighted(logit_scale=torch.tensor(math.nan)), NEW, ["--model", "tiny.pt", "finite"]),
    (lambda _: renamed("avocado"), CUT, ["apple", "avocado"]),
    (lambda _: day("images", "zebra"), CUT, ["no class", "castle"]),  # the first task would have three classes
    (lambda _: os.remove("images/train/apple/0.png"), CUT, None),  # old images are never seen again
    (lambda _: reweighted(logit_scale=torch.tensor(1.0)), CUT, ["tiny.pt", "another clip"]),
    (lambda _: reweighted(logit_scale=torch.tensor(1.0)), "--predict a.png --resume whole", ["another clip"]),
    (lambda _: shutil.rmtree("images/train"), CUT, ["task 2, train", "gone"]),
    (lambda _: flipped(Path("cut/checkpoint.pt")), CUT, ["cut/checkpoint.pt", "a checksum is wrong"]),
    (lambda _: torch.save({}, "cut/checkpoint.pt"), CUT, ["checkpoint.pt", "version"]),
    (lambda _: os.remove("whole/checkpoint.pt"), "--resume whole", ["--resume whole", "checkpoint.pt is gone"]),
    (lambda _: Path("cut/metrics.jsonl").unlink(), CUT, ["--resume cut", "metrics.jsonl"]),
    (lambda patch: patch.setattr(mgclip, "similarity_gap", lambda *_: (0, 0)), f"{FOLDER} --out new", ["--epochs"]),
    (lambda patch: patch.setattr(mgclip, "finetune", NO_MEMORY), NEW, ["memory"]),
    (lambda patch: patch.setattr(mgclip, "finetune", Mock(side_effect=torch.cuda.OutOfMemoryError)), NEW, ["memory"]),
    (lambda patch: patch.setattr(os, "posix_fallocate", Mock(side_effect=OSError("full"))), NEW, ["TMPDIR", "no room"]),
    (lambda patch: patch.setitem(sys.modules, "matplotlib", None), "--plot whole", ["pip install matplotlib"]),
    (lambda patch: patch.delattr(clip, "available_models"), NEW, ["pip uninstall clip", "clip-anytorch==2.6.0"]),
    (lambda patch: patch.setenv("RANK", "1"), f"{NEW} --rank 0", ["--rank: 0"]),  # is no torchrun
])  # fmt: skip
def test_bad_data_is_one_message(workplace, monkeypatch, capsys, damage, command, words):
    damage(monkeypatch)
    before = [contents(folder) for folder in ("whole", "cut")]
    if words is None:
        assert main(command.split()) == 0 and events("cut") == events("whole")
        return
    refused(capsys, command, *words)
    assert before == [contents(folder) for folder in ("whole", "cut")] and not Path("sprung").exists()
    assert "--resume new" not in "".join(capsys.readouterr())  # nothing is there to go on from


@pytest.mark.parametrize("error", [
    ValueError("a bug"), RuntimeError("an illegal memory access was encountered"), RuntimeError("peer access"),
])  # fmt: skip
@pytest.mark.parametrize("where", ["evaluate", "open_data", "finetune", "write_atomically"])
def test_a_bug_keeps_its_traceback(workplace, monkeypatch, where, error):
    monkeypatch.setattr(mgclip, where, Mock(side_effect=error))
    with pytest.raises(type(error)) as raised:
        main(f"{FOLDER} --epochs 0 --out new --zeroshot birds=birds".split())
    assert raised.value is error


def odd_pictures():
    for name in ("Thumbs.db", "notes.txt", "a.HEIC", "b", ".hidden.png", "@eaDir/0.png/thumb.jpg", "../.cache/0.png"):
        paint(APPLE / name)


def more_pictures():
    for name in ("more/deep/a\nb.png", os.fsdecode(b"more/\xff.JPG"), "a.jfif", "a.gif", "a.webp", "a.TIFF"):
        paint(APPLE / name)
    pixels = np.arange(900, dtype=np.uint16).reshape(30, 30) * 70
    Image.fromarray(pixels).save(APPLE / "16 bits.png")
    assert np.array_equal(mgclip.open_image(APPLE / "16 bits.png"), pixels >> 8)


def two_forms_of_unicode():
    Path("images/train/apple").rename("images/train/cafe\u0301")  # as in an archive of macOS
    Path("images/test/apple").rename("images/test/caf\u00e9")


def twins():
    lines = [f"{name}\t{'missile' if name in NAMES[3:5] else name}\n" for name in NAMES]
    Path("images/classes.txt").write_text("".join(lines))


def unlabelled_test():
    Path("images/test").rename("images/val")
    paint(Path("images/test/0.png"))


@pytest.mark.parametrize("make, images, others, shown", [
    (odd_pictures, 36, 4, "apple, bicycle, castle"), (more_pictures, 43, 0, "apple"), (unlabelled_test, 36, 0, "apple"),
    (two_forms_of_unicode, 36, 0, "bicycle, caf\u00e9, castle"), (lambda: renamed(*"123456"), 36, 0, "1, 2, 3"),
    (lambda: renamed("a castle", "A  Castle"), 36, 0, "A  Castle, a castle"),  # one prompt: they are warned of
    (twins, 36, 0, None),  # of one name, as ImageNet-1K has two
])  # fmt: skip
def test_odd_data_is_read_and_what_was_read_is_said(workplace, capsys, make, images, others, shown):
    make()
    assert len(ran(f"{FOLDER} --epochs 0")) == 4
    out, err = capsys.readouterr()
    assert f"{images} images of 6 classes; {others} other files left out" in out and "19 images of 6 classes" in out
    assert shown is None or f"the folders' names: {shown}" in out
    assert ("one prompt" in err) == (shown in (None, "A  Castle, a castle"))


def test_a_tilde_that_the_shell_leaves_is_the_home_folder(workplace):
    home = f"{FOLDER} --data-root=~/images --zeroshot=patterns=~/birds --model=~/tiny.pt --epochs 0 --out=~/run"
    assert main(home.split()) == main(["--resume=~/run", "--predict=~/images/test/apple/6.png"]) == 0
    assert [e["accuracy"] for e in events("run", "zeroshot")] == [events("run", "task")[-1]["text_accuracy"]] * 4
    assert not Path("~").exists()
    if PLOTS:
        assert ended(forked(main, ["--plot=~/run"])) == [0] and Path("run/plot.png").exists()


# Ends of all kinds ----------------------------------------------------------------------------------------------------


def test_a_kill_at_any_moment_resumes_to_the_metrics_of_an_unbroken_run(workplace, monkeypatch):
    """As a kill leaves the folder before each replacement of a file, the new one lying beside it, also during --add."""
    moments, replace = [], os.replace

    def noted(part, path):
        moments.append(f"moment{len(moments)}")
        shutil.copytree("run", moments[-1])
        replace(part, path)

    day("tomorrow", "crow")
    begin = f"{FOLDER} --tasks 2 --max-epochs 1 --lr 0.01 --batch-size 12 --null-space 0.1 --zeroshot birds=birds --out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", noted)
        assert main(f"{begin} run".split()) == main("--resume run --add tomorrow".split()) == 0
    assert len(moments) == 11 + 4  # 9 events and 2 checkpoints, then a task, retention, a checkpoint and the end
    for moment in moments:
        assert list(Path(moment).glob("*.part"))
        if not Path(moment, "metrics.jsonl").exists():  # killed before its first event: it is started again
            assert main(f"{begin} {moment}".split()) == 0
        assert main(f"--resume {moment} --add tomorrow".split()) == 0  # which may have been given before
        assert events(moment) == events("run") and learned(moment) == learned("run"), moment
        assert events(moment, "config")[0]["options"]["add"] == [os.path.abspath("tomorrow")]
        assert sorted(os.listdir(moment)) == ["checkpoint.pt", "metrics.jsonl"]


def forked(work, *arguments, err=os.devnull, folder=".", **environment):
    """Starts a process, as data loaders start theirs, that ends with what work(*arguments) returns."""

    def begin():
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(err, "w", buffering=1)
        os.environ.update(environment)
        os.chdir(folder)
        os._exit(work(*arguments) or 0)

    process = multiprocessing.get_context("fork").Process(target=begin)
    process.start()
    return process


def ended(*processes):
    """The exit statuses of processes, negative if a signal ended them; None of one that does not end in a minute."""
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_a_run_that_fills_the_disk_goes_on(workplace, monkeypatch):
    save = torch.save
    full = lambda *args: [resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)), save(*args)]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", at_call(2, save, full))
        assert ended(forked(main, f"{LONG} --out full".split(), err="err")) == [2]
    said = Path("err").read_text()
    assert said.count("\n") == 1 and "full/checkpoint.pt" in said and "disk full?" in said and "--resume full" in said
    assert not list(Path("full").glob("*.part"))
    assert main("--resume full".split()) == 0
    assert events("full") == events("whole") and learned("full") == learned("whole")


def test_a_run_goes_on_with_all_that_it_needs_moved(workplace, capsys):
    for name in ("images", "birds", "tiny.pt"):
        Path(name).rename(f"{name}.moved")
    Path("cut/notes.txt").write_text("mine")
    Path("elsewhere").mkdir()
    os.chdir("elsewhere")
    moved = "--resume ../cut --data-root ../images.moved --model ../tiny.pt.moved --device cpu --zeroshot"
    refused(capsys, f"{moved} other=../birds.moved", "--zeroshot")
    for _ in range(2):  # a finished run stays as it is
        assert main(f"{moved} birds=../birds.moved".split()) == 0
        assert events("../cut") == events("../whole") and learned("../cut") == learned("../whole")
    assert Path("../cut/notes.txt").read_text() == "mine"


def test_a_run_goes_on_where_there_is_no_such_device(workplace):
    metrics = Path("cut/metrics.jsonl")
    metrics.write_text(metrics.read_text().replace('"device": "cpu"', '"device": "cuda:7"'))
    torch.backends.cudnn.allow_tf32 = True
    assert main(["--resume", "cut"]) == 0 and events("cut") == events("whole")
    assert not torch.backends.cudnn.allow_tf32  # also where no run is begun, as by --predict
    options = events("cut", "config")[0]["options"]
    assert options["device"] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_run_is_taken_up_from_python(workplace):
    Path("tiny.pt").rename("moved.pt")
    with pytest.raises(ValueError, match="tiny.pt"):
        mgclip.load_run("plain")
    learner = mgclip.load_run(Path("plain"), device="cpu", model="moved.pt")
    expected = torch.load("plain/checkpoint.pt", weights_only=True)["learner"]
    assert same(learner.lora, expected["lora"]) and learner.names == list(NAMES)
    learner.learn(WHOLE, [0, 0, 0], ["fox"])
    assert learner.names == [*NAMES, "fox"] and learner.head.weight.shape == (7, 64)
    os.remove("plain/checkpoint.pt")
    metrics = Path("plain/metrics.jsonl")
    Path("begun").mkdir()
    Path("begun/metrics.jsonl").write_text(metrics.read_text().partition("\n")[0])
    for folder, words in (("plain", "is gone"), ("begun", "no checkpoint yet"), ("nowhere", "metrics.jsonl")):
        with pytest.raises(ValueError, match=words):
            mgclip.load_run(folder, "cpu", "moved.pt")


def test_runs_that_start_together_get_what_they_need(workplace, monkeypatch):
    assert ended(*[forked(main, f"{FOLDER} --epochs 0".split()) for _ in range(3)]) == [0, 0, 0]
    assert sorted(os.listdir("runs")) == ["folder-0", "folder-0-2", "folder-0-3"]
    assert all(len(events(f"runs/{name}")) == 4 for name in os.listdir("runs"))
    monkeypatch.setattr(mgclip, "pretrain_tiny", lambda: time.sleep(0.5) or made_up_clip())
    tiny = lambda: load_clip("tiny") and 0
    assert ended(forked(tiny), forked(tiny)) == [0, 0] and len(os.listdir(".cache/clip")) == 1


def together(command, nodes=(".", ".")):
    """The exit statuses of two processes, in these folders, as torchrun starts them on two machines, one on each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    world |= dict(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", TORCHELASTIC_RUN_ID="test")
    begin = lambda r: forked(main, command.split(), err=f"err{r}", folder=nodes[r], RANK=str(r), **world)
    processes = [begin(0), begin(1)]
    multiprocessing.connection.wait([process.sentinel for process in processes], 60)
    time.sleep(0.1)
    if any(process.exitcode for process in processes):  # one has failed: torchrun ends the others
        for process in processes:
            process.terminate()
    return ended(*processes)


@pytest.mark.parametrize("options", [LONG, f"{FOLDER} --epochs 2 --lr 0.01 --null-space 0.1"])
def test_two_nodes_agree_with_one_process(workplace, template, options, monkeypatch):
    """Similarities to 1e-4, accuracies exactly, with batches of 5, which do not divide evenly."""
    for node in ("node0", "node1"):  # they share no file
        shutil.copytree(template, node)
    one = ran(options)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: Path("left").touch())
    assert together(f"{options} --out run", ["node0", "node1"]) == [0, 0], Path("err0").read_text()
    for a, b in zip(one, events("node0/run"), strict=True):
        exact = lambda key, value: "accuracy" in key or key == "per_task" or not isinstance(value, float)
        assert b == {key: value if exact(key, value) else pytest.approx(value, abs=1e-4) for key, value in a.items()}
    assert not Path("node1/run").exists()  # process 0 alone writes
    assert Path("node0/left").exists() and Path("node1/left").exists()


def test_a_node_needs_no_checkpoint_to_resume(workplace, template):
    for node in ("node0", "node1"):
        shutil.copytree(template, node)
    os.remove("node1/whole/checkpoint.pt")
    assert together("--resume whole", ["node0", "node1"]) == [0, 0], Path("err0").read_text()
    assert events("node0/whole") == events("whole")


@pytest.mark.parametrize("options, words", [("--alpha=-1", "argument --alpha"), ("", "apple/1.png: cannot be read")])
def test_bad_input_is_said_once_whoever_finds_it(workplace, options, words):
    Path("images/train/apple/1.png").write_text("words")  # in the share of process 1
    statuses = together(f"{FOLDER} {options} --out run")
    said = Path("err0").read_text() + Path("err1").read_text()
    assert 2 in statuses and said.count("error:") == said.count(words) == 1 and "Traceback" not in said, said


def as_a_program(command, prepare):
    """What `python mgclip.py` does, in a process with odd streams."""
    prepare()
    sys.argv = ["mgclip.py", *command.split()]
    try:
        runpy.run_path(mgclip.__file__, run_name="__main__")
    except SystemExit as stop:
        return stop.code


def reader_gone():
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    sys.stdout = io.TextIOWrapper(open(1, "wb", buffering=0, closefd=False), write_through=True)


def stderr_closed():
    os.close(2)
    sys.stderr = None  # as Python has it that starts so


@pytest.mark.parametrize("prepare, status", [
    (reader_gone, -signal.SIGPIPE), (stderr_closed, 0),
    (lambda: setattr(sys, "stdout", open("ascii", "w", encoding="ascii")), 0),  # a terminal that is not UTF-8
    (lambda: setattr(sys, "stdout", argparse.Namespace(write=len, flush=bool)), 0),  # a notebook's
], ids=["reader gone", "stderr closed", "ascii", "notebook"])  # fmt: skip
def test_odd_streams_do_no_harm(workplace, prepare, status):
    command = f"{FOLDER} --tasks 1 --max-epochs 1 --out new"
    assert ended(forked(as_a_program, command, prepare, err="err")) == [status] and Path("err").read_text() == ""
    assert status or len(events("new")) == 5
    assert not Path("ascii").exists() or "\\u0394 0." in Path("ascii").read_text()


# What a run is for, afterwards ----------------------------------------------------------------------------------------


def test_predict_gives_the_five_best_classes_and_skips_what_it_cannot_read(workplace, capsys):
    ran(f"{FOLDER} --max-epochs 1 --beta 2 --class-order 5")
    paths, names = ["images/test/castle/6.png", "images/test/a\tpple.png"], np.random.RandomState(5).permutation(NAMES)
    Path("images/test/apple/7.png").rename(paths[1])
    capsys.readouterr()
    assert main(["--predict", paths[0], "tiny.pt", "--resume", "run", "--predict", paths[1], "nowhere.png"]) == 1
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 2 and "tiny.pt" in err and "nowhere.png" in err
    header, *rows = csv.reader(out.splitlines(), "excel-tab")
    assert header == ["image", "rank", "class", "fused", "text", "visual"] and len(rows) == 10
    learner = MGCLIP(load_clip("tiny.pt"), beta=2.0)
    learner.load(torch.load("run/checkpoint.pt", weights_only=True)["learner"])
    fused, text_logits, visual = scored(learner, torch.stack([decoded(path) for path in paths]))
    best = [(i, k) for i in (0, 1) for k in fused[i].argsort(descending=True)[:5].tolist()]
    assert [row[:3] for row in rows] == [[paths[i], str(n % 5 + 1), names[k]] for n, (i, k) in enumerate(best)]
    scores = [[part[i, k].item() for part in (fused, text_logits.softmax(1), visual)] for i, k in best]
    close([[float(number) for number in row[3:]] for row in rows], scores)


def test_added_folders_are_the_runs_once_they_are_learned(workplace, capsys):
    ran(f"{FOLDER} --epochs each --max-epochs 1")
    before = events("run")
    shutil.rmtree("images/train")  # old images are never seen again
    day("one", "crow")
    day("bad", "ant", "bee")
    day("three", "owl", "cat")
    Path("bad/train/bee/0.png").write_text("words")
    added = lambda: [Path(folder).name for folder in events("run", "config")[0]["options"]["add"]]
    for folder, words in (("bad", "bee/0.png"), ("birds", "apple"), ("nowhere", "nowhere")):
        now = contents("run")
        refused(capsys, f"--resume run --add {folder}", words)
        assert contents("run") == now
    refused(capsys, "--resume run --add one bad", "bee/0.png")
    assert added() == ["one"] and main("--resume run".split()) == 0
    assert main("--resume run --add three".split()) == 0 and added() == ["one", "three"]
    assert [e["classes_seen"] for e in events("run", "task")] == [2, 4, 6, 7, 9]
    assert events("run")[: len(before) - 1] == before[:-1] and len(events("run")[-1]["accuracy"]) == 5
    capsys.readouterr()
    assert main("--resume run --predict three/test/owl/0.png".split()) == 0 and "owl" in capsys.readouterr().out
    shutil.rmtree("images")
    refused(capsys, "--resume run", "images", "test")


@pytest.mark.skipif(not PLOTS, reason="needs matplotlib")
def test_plot_draws_what_there_is(workplace, capsys, monkeypatch):
    notebook = dict(MPLBACKEND="module://matplotlib_inline.backend_inline")  # of its shell
    assert ended(forked(main, ["--plot", "whole"], **notebook)) == [0]
    ran(f"{FOLDER} --epochs 1", "$fixed_{$")
    Path("begun").mkdir()
    Path("begun/metrics.jsonl").write_text("".join(Path("whole/metrics.jsonl").read_text().splitlines(True)[:4]))
    from matplotlib.figure import Figure

    save, seen, curves = Figure.savefig, [], ["MG-CLIP (Eq. 5)", "text half", "visual half"]
    legends = lambda figure: [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    noted = lambda figure, *args, **options: [seen.append(legends(figure)), save(figure, *args, **options)]
    monkeypatch.setattr(Figure, "savefig", noted)
    for runs in ("whole", "$fixed_{$", "begun", f"$fixed_{{$ {os.path.abspath('whole')}"):
        assert main(["--plot", *runs.split()]) == 0
        Image.open(Path(runs.split()[0], "plot.png")).verify()
    search = ["pos", "neg", "within alpha, 50%"]
    assert seen[:3] == [[[*curves, "zero-shot: birds"], search], [curves], [["zero-shot: birds"], search]]
    above = ["$fixed_{$", "whole", "whole, zero-shot: birds"]  # one pair of axes for both
    assert seen[3] == [above, ["whole, pos", "whole, neg", search[2]]]
    last = [events(name)[-1]["last"] for name in ("whole", "$fixed_{$")]
    assert f"last of 2 runs: {np.mean(last):.2f} ± {np.std(last, ddof=1):.2f}" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("more", ["", "--bf16"])
def test_a_gpu_agrees_with_the_cpu(workplace, more):
    ran(f"{LONG} --device cuda {more}")
    cpu, gpu = ([e["neg"] for e in events(out, "search")] for out in ("whole", "run"))
    assert gpu[0] == pytest.approx(cpu[0], abs=1e-4) and gpu == pytest.approx(cpu, abs=0.02 if more else 1e-3)


# Beyond the paper -----------------------------------------------------------------------------------------------------


def test_ridge_head_is_least_squares_on_all_images_at_once():
    x, labels = F.normalize(torch.randn(60, 16), dim=1), torch.arange(60) % 6
    head = mgclip.RidgeHead(16, width=24, ridge=0.5)
    for t in (2, 0, 1):  # whatever the order of the tasks
        head.learn(x[labels // 2 == t], labels[labels // 2 == t] - 2 * t)
    phi = (x @ head.R).relu().double()
    Y = F.one_hot((labels - 4) % 6).double()  # in the order of learning
    rows = torch.cat([phi, 0.5**0.5 * torch.eye(24).double()]), torch.cat([Y, torch.zeros(24, 6)])
    expected = torch.linalg.lstsq(*rows).solution.float()
    torch.testing.assert_close(head(x), phi.float() @ expected, atol=1e-5, rtol=1e-4)


def test_null_space_leaves_alone_what_earlier_tasks_were_made_of():
    _, _, images, labels, _ = golden_inputs()
    learner, inputs = mgclip.NullSpaceMGCLIP(made_up_clip(), rho=0.01, epochs=3, **OPTIONS), {}
    learner.learn(images[:24], labels[:24], NAMES[:3])
    before, old = learner.features(images), copied(attn.A_k for attn in learner.attns)

    def keep(attn, arguments):  # what enters keys and values first
        inputs.setdefault(attn, arguments[1].detach().flatten(0, 1))

    learner.begin_task()
    torch.testing.assert_close(learner.features(images), before, atol=1e-5, rtol=1e-4)  # folded into the weights
    for A, attn, P in zip(old, learner.attns, learner.P):
        assert not torch.allclose(attn.A_k, A @ P, atol=1e-2)  # a fresh LoRA
        attn.register_forward_pre_hook(keep)
    learner.features(images[:24])
    learner.texts()
    moments = [x.double().T @ x.double() for x in inputs.values()]
    learner.learn(images[24:], labels[24:] - 3, NAMES[3:])
    for attn, M in zip(learner.attns, moments):
        energy, directions = torch.linalg.eigh(M)
        closed = directions[:, energy.cumsum(0) > 0.01 * energy.sum()].float()
        x = inputs[attn] @ closed @ closed.T  # all but a hundredth of the energy
        assert (x - inputs[attn]).square().sum() <= 0.011 * inputs[attn].square().sum()
        for A, B in ((attn.A_k, attn.B_k), (attn.A_v, attn.B_v)):
            assert (x @ A.T @ B.T).norm() < 1e-4 < B.norm()


def test_null_space_projects_in_float32_under_bf16():
    _, _, images, labels, _ = golden_inputs()
    learner = mgclip.NullSpaceMGCLIP(made_up_clip(), epochs=1, bf16=True, **OPTIONS)
    for names in (NAMES[:3], NAMES[3:]):
        learner.learn(images[:24], labels[:24], names)
    for attn, P in zip(learner.attns, learner.P):
        torch.testing.assert_close(attn.A_k @ P, attn.A_k, atol=1e-6, rtol=1e-5)


# The README's blocks, and what it claims of the demo ------------------------------------------------------------------


DEMO = dict(untouched="--epochs 0", long="--epochs 10", mgclip="")


def run_demo():
    torch.set_num_threads(1)
    mgclip.tiny_clip()
    runs = [forked(main, f"{DEMO[name]} --out {name}".split(), err=f"{name}.err") for name in DEMO]
    for process in runs:
        process.join()


@pytest.fixture(scope="session", autouse=True)
def demo(request, tmp_path_factory):
    """The demo's runs, seed 0, in processes beside the other tests: what waits for them, and says where they lie."""
    home = tmp_path_factory.mktemp("demo")
    if any("demo" in item.name for item in request.session.items):
        process = forked(run_demo, folder=home, err=home / "err", HOME=str(home))
    return lambda: process.join() or home


def test_the_demo_shows_the_papers_effects(demo, monkeypatch):
    def averages(name, half=""):
        accuracies = [e[f"{half}accuracy"] for e in events(demo() / name, "task")]
        return np.array([np.mean(accuracies), accuracies[-1]])  # Avg, Last

    untouched, naive, preservation = [averages(name, "text_") for name in DEMO]  # what --beta 0 has
    untouched_with_W_v, compensation, mg_clip = [averages(name) for name in DEMO]
    for lower, higher in (
        (naive, untouched), (naive, compensation), (naive, preservation), (untouched, preservation),
        (compensation, mg_clip), (preservation, mg_clip), (untouched_with_W_v, mg_clip),
        (averages("mgclip", "visual_"), mg_clip),
    ):  # fmt: skip
        assert (lower < higher).all()
    search = [e["neg"] for e in events(demo() / "mgclip", "search")]
    assert search == sorted(search, reverse=True) and 2 <= events(demo() / "mgclip", "epochs")[0]["epochs"] <= 6
    monkeypatch.setenv("HOME", str(demo()))  # where the runs' CLIP lies
    images, labels = mgclip.draw_split("zeroshot")[::2]  # half of them will do
    zeroshot_sets = [("patterns", mgclip.PATTERNS, images, labels)]
    learners = [mgclip.load_run(demo() / name, "cpu") for name in DEMO]
    retention = [mgclip.zeroshot_accuracy(learner, zeroshot_sets)[0]["accuracy"] for learner in learners]
    untouched, naive, mg_clip = retention
    assert untouched - naive > 1.5 * (untouched - mg_clip) and untouched - naive > 2


def readme_blocks(language):
    return re.findall(f"```{language}\n(.*?)```", Path(mgclip.__file__).with_name("README.md").read_text("utf-8"), re.S)


def run_block(block, more):
    """Runs the lines of a block of the README that call the program; more: further options where a run begins."""
    for line in block.splitlines():
        if line.startswith("python mgclip.py") and (PLOTS or "--plot" not in line):
            arguments = line.replace("new/*.jpg", "new/a.jpg").split()[2:]
            begins = "--plot" not in line and "--resume" not in line
            assert main(arguments + more.split() * begins) == 0, line


def test_the_readmes_commands_run_as_they_stand(workplace, monkeypatch, capsys):
    _, _, paper, names, own, picture = readme_blocks("sh")
    cifar100_on_disk(monkeypatch)
    monkeypatch.setattr(mgclip, "SPLITS", {split: (2, 0.5, 1) for split in mgclip.SPLITS})
    run_block(paper, "--model tiny.pt --tasks 2 --epochs 0 --head-epochs 0 --device cpu")
    run_block(picture, "--model tiny.pt --tasks 2 --epochs 0 --head-epochs 0 --device cpu")
    assert len(os.listdir("runs")) == 6
    for name in ("images", "images/test/apple"):
        shutil.copytree(name, "photos" if name == "images" else "new")
    Path("new/6.png").rename("new/a.jpg")
    day("march", "crow", "owl")
    trained = own.replace("--epochs 0", "--null-space 0.1")
    assert trained != own
    for block in (own, trained):
        shutil.rmtree("runs/photos", ignore_errors=True)
        run_block(block, "--model tiny.pt --max-epochs 1 --device cpu")
        assert len(events("runs/photos", "task")) == 2
        assert events("runs/photos")[-1]["trainable_parameters"] == 4 * 4 * 8 * 64  # the LoRA's: ridge trains nothing
    for name, folder in (("imagenet100", "imagenet100"), ("imagenet1000", "imagenet1k"), ("imagenet_R", "imagenet-r")):
        Path(folder).mkdir()
        Path(f"{name}_classes.txt").write_text("0\tn01443537\tgoldfish\n1\tn01484850\tgreat white shark\n")
    assert os.system(names) == 0
    for folder in ("imagenet100", "imagenet1k", "imagenet-r"):
        assert mgclip.class_names(folder, ["n01484850", "n01443537"]) == ["great white shark", "goldfish"]
    monkeypatch.setattr(mgclip, "tiny_clip", lambda: "tiny.pt")
    capsys.readouterr()
    for block in readme_blocks("python"):
        exec(block, {})
    one, four = capsys.readouterr().out.splitlines()
    assert one in (*NAMES, "crow", "owl") and four.count("'") == 8 and Path("learner.pt").exists()


# Benchmark: python test_mgclip.py [--device cuda] [--bf16] [--images N] -----------------------------------------------
# Random weights and pictures. The plain form is what a careful user writes from the paper with CLIP's own modules.

SHAPES = {  # D; resolution, layers, width, patch of the image encoder; context, words, width, heads, layers of the text
    "ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
    "tiny": (64, 32, 2, 64, 8, 77, 49408, 64, 1, 2),
}


class AddedLoRA(mgclip.KeyValueLoRA):
    """CLIP's own attention, with ΔW = B A / r added to its in-projection in every forward."""

    def forward(self, *inputs, **options):
        W_q, W_k, W_v = self.base.in_proj_weight.chunk(3)
        W = torch.cat([W_q, W_k + self.B_k @ self.A_k / len(self.A_k), W_v + self.B_v @ self.A_v / len(self.A_v)])
        return torch.func.functional_call(self.base, {"in_proj_weight": W}, inputs, options)


def add_plain_lora(model, rank=8):
    """`add_lora` without its savings: CLIP's own attention, and all tokens of the last block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mgclip, "KeyValueLoRA", AddedLoRA)
        patch.setattr(mgclip, "LastImageBlock", lambda block: block)
        return add_lora(model, rank)


def plain_texts(model, tokens):
    """All 77 tokens of every prompt."""
    return F.normalize(model.encode_text(tokens.to(model.logit_scale.device)).float(), dim=-1)


def plain_learning(model, lora, images, labels, tokens):
    """An epoch with the prompts of all classes seen, of which the last ten's logits are not masked; then their rows."""
    optimizer = torch.optim.Adam(lora, 1e-3)
    for batch in torch.randperm(len(labels)).split(128):
        optimizer.zero_grad()
        texts = plain_texts(model, tokens)  # once a batch, as ours: once a micro-batch would cost more
        leaf = texts.detach().requires_grad_()
        for rows in batch.split(128 if texts.is_cuda else 32):  # 128 images of ViT-B/16 take 27 GB in float32
            logits = model.logit_scale.exp() * mgclip.cosine(encode_images(model, images[rows]), leaf)
            logits[:, :-10] = -torch.inf
            loss = F.cross_entropy(logits, labels[rows].to(leaf.device) + len(tokens) - 10, reduction="sum")
            (loss / len(batch)).backward()
        texts.backward(leaf.grad)
        optimizer.step()
    encoded = torch.no_grad()(lambda rows: encode_images(model, images[rows]))
    features = torch.cat([encoded(rows) for rows in torch.arange(len(labels)).split(128)])
    weight = class_prototypes(features, labels).requires_grad_()
    optimizer = torch.optim.Adam([weight], 5e-4)
    batches = [batch for _ in range(3) for batch in torch.randperm(len(labels)).split(64)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches), eta_min=5e-6)
    for batch in batches:  # as `fit_head`, but with the frozen encoder in every step
        loss = F.cross_entropy(mgclip.cosine(encoded(batch), weight), labels[batch].to(features.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return weight.detach()


@torch.no_grad()
def plain_scoring(model, weight, images, tokens):
    """The texts are encoded with every batch."""
    scores = []
    for rows in torch.arange(len(images)).split(128):
        x, texts = encode_images(model, images[rows]), plain_texts(model, tokens)
        scores.append(fused_scores(model.logit_scale.exp() * x @ texts.T, mgclip.cosine(x, weight)))
    return torch.cat(scores)


def two_forms(name, images, labels, device="cpu", bf16=False):
    """[learning, scoring] of the plain form and of ours, the LoRA of both: the fifth of ten tasks, with no search."""
    plain, model = (clip.model.CLIP(*SHAPES[name]).eval().to(device) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    learner, lora = MGCLIP(model, epochs=1, bf16=bf16), add_plain_lora(plain)
    learner.names = [f"thing {i}" for i in range(40)]
    learner.head.weight = weight = torch.randn(40, SHAPES[name][0], device=device)
    for p, q in zip(lora, learner.lora):
        torch.nn.init.normal_(q, std=0.1)  # B too, which begins at zero
        p.data.copy_(q)
    state, new, plain_rows = learner.state(), [f"thing {i}" for i in range(40, 50)], []
    tokens = learner.tokenize(learner.names + new)
    ours = [lambda: [learner.load(state), learner.learn(images, labels, new)],
            lambda: learner.scores(learner.features(images), learner.texts())[0]]  # fmt: skip
    plains = [lambda: plain_rows.append(plain_learning(plain, lora, images, labels, tokens)),
              lambda: plain_scoring(plain, torch.cat([weight, plain_rows[-1]]), images, tokens)]  # fmt: skip
    return plains, ours, lora, learner.lora


def test_the_benchmark_compares_what_computes_the_same():
    plains, ours, *loras = two_forms("tiny", golden_inputs()[2][:30], torch.arange(30) % 10)
    (_, theirs), (_, scores) = [[work() for work in works] for works in (plains, ours)]
    torch.testing.assert_close(scores, theirs, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(*[[p.grad for p in lora] for lora in loras], atol=1e-4, rtol=1e-3)


def protocol(model, bf16):
    """CIFAR-100's, with random pictures: a search of two epochs, then ten tasks with E = 1, scored after each."""
    draw = lambda n: (torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8), torch.arange(n) % 10)
    learner, tests = MGCLIP(model, alpha=1, max_epochs=2, bf16=bf16), []
    for t in range(10):
        learner.learn(*draw(5000), [f"thing {10 * t + c}" for c in range(10)])
        learner.E = 1
        images, labels = draw(1000)
        tests.append((images, 10 * t + labels))
        mgclip.evaluate(learner, tests)


def benchmark():
    parser = argparse.ArgumentParser(description="The speed of mgclip.py beside the plain form.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--images", type=int, help="to learn and to score, 10 or more; default: 5000 on cuda, else 64")
    options = parser.parse_args()
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)  # what is synchronised, and whose memory is read
    N = options.images or (5000 if cuda else 64)
    data = torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8), torch.arange(N) % 10
    plains, ours, *_ = two_forms("ViT-B/16", *data, device, options.bf16)
    n, products = (8192, 50) if cuda else (3072, 4)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if options.bf16 else torch.float32)
    multiply = lambda: [a @ a for _ in range(products)]
    times = {work: [] for work in (*plains, *ours, multiply)}
    for work in mgclip.progress([*times] * (3 + cuda)):  # on a GPU a first turn warms up
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16, cache_enabled=False):
            work()
        if cuda:
            torch.cuda.synchronize()
        times[work].append(time.perf_counter() - began)
    seconds = lambda *works: sum(median(times[work][-3:]) for work in works)
    where = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    precision = "bf16" if options.bf16 else "float32"
    print(f"ViT-B/16, {N} images, batches of {min(N, 128)}, {precision}, {where}, torch {torch.__version__}")
    print(f"{'seconds':12}{'plain':>9}{'ours':>9}{'ratio':>8}")
    rows = ("learning", plains[:1], ours[:1]), ("scoring", plains[1:], ours[1:]), ("a task", plains, ours)
    for name, first, second in rows:
        print(f"{name:12}{seconds(*first):9.3f}{seconds(*second):9.3f}{seconds(*first) / seconds(*second):8.2f}")
    rate = products * 2 * n**3 / seconds(multiply) / 1e9
    share = N * 35.1 / seconds(ours[1]) / rate  # GFLOP of an image's forward pass
    print(f"matrices of {n} x {n} are multiplied at {rate:,.0f} GFLOP/s; images are scored at {share:.0%} of that")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        protocol(clip.model.CLIP(*SHAPES["ViT-B/16"]).eval().to(device), options.bf16)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(f"CIFAR-100's protocol: {time.perf_counter() - began:.0f} s, {peak:.1f} GB")


if __name__ == "__main__":
    benchmark()
