"""Claims about MG-CLIP, on tiny models and made-up data: `pytest -q`. Its speed: `python test_mgclip.py`."""

import argparse
import functools
import io
import itertools
import json
import math
import multiprocessing.connection
import os
import pickle
import resource
import shutil
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mgclip
from mgclip import CosineHead, add_lora, class_prototypes, clip, encode_images, encode_texts, extract_features
from mgclip import find_epochs, finetune, fit_head, fused_scores, load_clip, main, parse, run, similarity_gap

pytestmark = pytest.mark.filterwarnings("ignore:.*fork")  # forks beside threads: theirs are not used again

# Golden figures -------------------------------------------------------------------------------------------------------
# by the authors' code on a tiny CLIP, which `golden_inputs` builds again; a batch is the whole set, so no order matters

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
        head_weight=[
            [-0.004818, -0.075453, -0.019899], [-0.103264, -0.073039, 0.028982], [0.015638, 0.135655, -0.238356],
        ],
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
        head_weight=[
            [-0.004818, -0.075453, -0.019899], [-0.103264, -0.073039, 0.028982], [0.015638, 0.135655, -0.238356],
            [-0.207922, -0.094444, -0.033498], [0.027705, -0.095560, 0.014465], [-0.122553, 0.085614, 0.018341],
        ],
    ),
]  # fmt: skip
NAMES = ("apple", "bicycle", "castle", "dolphin", "elephant", "forest")


@functools.cache
def made_up_weights(seed):
    """Weights for a CLIP of 2-layer, width-64 towers for 32 x 32 pixels, drawn with NumPy by order of name."""
    state, rs = clip.model.CLIP(64, 32, 2, 64, 8, 77, 49408, 64, 1, 2).state_dict(), np.random.RandomState(seed)
    for name in sorted(state):
        shape = state[name].shape
        if name == "logit_scale":
            weight = math.log(100)
        elif "ln_" in name and name.endswith("weight"):
            weight = 1 + 0.1 * rs.standard_normal(shape)
        elif name.endswith("bias"):
            weight = 0.02 * rs.standard_normal(shape)
        elif "embedding" in name:
            weight = 0.05 * rs.standard_normal(shape)
        else:
            weight = rs.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) >= 2 else 0.05)
        state[name] = torch.tensor(weight, dtype=torch.float32)
    return state


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


@pytest.fixture
def task():
    """The first golden task: model, LoRA, 24 images of three classes, labels, tokens."""
    model, lora, images, labels, tokens = golden_inputs()
    return model, lora, images[:24], labels[:24], tokens[:3]


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
def test_search_stops_with_the_authors_at_the_first_crossing_and_leaves_the_lora_as_it_was(task, alpha, epochs):
    before = copied(task[1])
    E, history = find_epochs(*task, alpha, lr=0.01, batch_size=24)
    crossing = next((e for e, delta in enumerate(DELTA) if delta > alpha), 10)
    assert E == epochs and same(task[1], before) and [h["epoch"] for h in history] == list(range(crossing + 1))
    close([h["neg"] for h in history], NEG[: len(history)])
    close([h["delta"] for h in history], DELTA[: len(history)])


def test_two_tasks_agree_with_the_authors():
    (model, lora, images, labels, tokens), head = golden_inputs(), CosineHead(64)
    for t, golden in enumerate(TASKS):
        own, classes, seen = slice(24 * t, 24 * t + 24), slice(3 * t, 3 * t + 3), tokens[: 3 * t + 3]
        data, before = (images[own], labels[own] - 3 * t, tokens[classes]), copied(lora)
        gaps = [mgclip.measure_gap(model, images[own], labels[own], seen)]
        for _ in mgclip.train_epochs(model, lora, *data, 3, lr=0.01, batch_size=24):
            gaps.append(mgclip.measure_gap(model, images[own], labels[own], seen))
        close(gaps, golden["pos_neg"])
        for p, p_0 in zip(lora, before):
            p.data = p_0
        close(finetune(model, lora, *data, 3, lr=0.01, batch_size=24), golden["loss"])
        features = extract_features(model, images[own])
        head.add_classes(class_prototypes(features, data[1]))
        close(fit_head(head, features, data[1], 3, lr=0.05, batch_size=24), golden["head_loss"])
        close(F.normalize(head.weight)[:, :3], golden["head_weight"])
        image_features, text_features = encode_images(model, images[::7]), encode_texts(model, seen)
        text_logits = model.logit_scale.exp() * image_features @ text_features.T
        fused = fused_scores(text_logits, head(image_features), beta=4)
        close(fused[:3], golden["fused"])
        close(image_features[0, :6], golden["image_feature"])
        close(text_features[0, :6], golden["text_feature"])
        assert fused.argmax(1).tolist() == golden["pred"] and text_logits.argmax(1).tolist() == golden["text_pred"]


# The method -----------------------------------------------------------------------------------------------------------


def test_under_autocast_training_is_in_bf16_and_the_gap_in_float32(task):
    plain = find_epochs(*task, max_epochs=1)[1]
    with torch.autocast("cpu", torch.bfloat16):  # one context around all steps: its cached weights must not go stale
        assert encode_images(task[0], task[2]).dtype == torch.float32  # the encoder's bf16 ends before the cosine
        under = find_epochs(*task, max_epochs=1)[1]
        losses = finetune(*task, epochs=3, lr=0.01, batch_size=24)
    assert under[0] == plain[0] and under[1] != plain[1]
    assert losses == pytest.approx(TASKS[0]["loss"], rel=0.05) and losses != pytest.approx(TASKS[0]["loss"], abs=1e-4)


def test_zero_initialised_lora_leaves_clip_unchanged_and_nothing_else_is_trained():
    model, (_, _, images, labels, tokens) = made_up_clip(), golden_inputs()
    features = lambda: (extract_features(model, images), encode_texts(model, tokens))
    before, clips_own = features(), [*model.parameters()]
    lora, state = add_lora(model), copied(clips_own)
    assert same(features(), before) and all(A.any() and not B.any() for A, B in zip(lora[::2], lora[1::2]))
    finetune(model, lora, images, labels, tokens, epochs=2, lr=0.01)
    assert same(clips_own, state) and all(B.any() for B in lora[1::2]) and not same(features(), before)


def test_vit_b16_trains_the_papers_number_of_parameters_in_float32():
    with torch.device("meta"):  # sizes without numbers
        lora = add_lora(clip.model.CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12), rank=8)
    assert sum(p.numel() for p in lora) == 491_520
    with pytest.raises(ValueError, match="float32"):
        add_lora(made_up_clip().half())


def decoded(file, size=32):
    """An image file by CLIP's own preprocessing but for the normalisation: uint8 (3, size, size)."""
    image = Image.open(file)
    for step in clip.clip._transform(size).transforms[:4]:
        image = step(image)
    return (image * 255).round().to(torch.uint8)


@pytest.mark.parametrize("height, width, mode", [(32, 32, "RGB"), (64, 64, "L"), (100, 333, "RGBA"), (50, 41, "P")])
def test_features_agree_with_clips_preprocess_and_encoder_and_resize_with_pillow(tmp_path, height, width, mode):
    model, path = made_up_clip(), tmp_path / "class" / "image.png"
    path.parent.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    Image.fromarray(pixels).convert(mode).save(path)
    image = mgclip.Folder(tmp_path, 32)[0][0]
    expected = model.encode_image(clip.clip._transform(32)(Image.open(path))[None])
    torch.testing.assert_close(encode_images(model, image[None]), F.normalize(expected, dim=-1))
    for size in (32, 48, 224):
        ours = mgclip.resize_and_crop(torch.from_numpy(pixels).permute(2, 0, 1)[None], size)[0]
        off = ours.int() - decoded(tmp_path / "plain.png", size)
        assert off.abs().max() <= 2 and (off != 0).float().mean() < 0.01  # Pillow computes in fixed point


def test_no_token_is_encoded_that_no_feature_reads_and_the_features_are_those_of_all():
    model, lora, images, _, tokens = golden_inputs()
    for p in lora:
        torch.nn.init.normal_(p, std=0.1)
    whole, rows = F.normalize(model.encode_text(tokens), dim=-1), []
    for block in (model.transformer.resblocks[0], *model.visual.transformer.resblocks):
        block.mlp.register_forward_hook(lambda _, inputs, output: rows.append(output.numel() // 64))
    torch.testing.assert_close(encode_texts(model, tokens.int()), whole, atol=1e-6, rtol=1e-5)
    assert rows == [6 * (int(tokens.argmax(-1).max()) + 1)] and rows[0] < 6 * 15  # none behind the longest prompt
    encode_images(model, images)
    assert rows[1:] == [48 * 17, 48]  # of the last block the class token alone


@pytest.mark.parametrize("chunk", [5, 48])
@pytest.mark.parametrize("align, distill", [(0, 0), (0.5, 0), (0, 3.0)])
def test_loss_and_gradients_of_a_batch_are_those_of_the_plain_form(monkeypatch, chunk, align, distill):
    """Plain: the whole batch at once, the prompts of all classes, and the logits of the older ones masked."""
    model, lora, images, labels, tokens = golden_inputs()
    images, labels = images[24:], labels[24:]
    assert 100 < mgclip.images_at_once(model) < 1000  # what keeps 17 tokens of width 64 within a CPU's caches
    monkeypatch.setattr(mgclip, "images_at_once", lambda model: chunk)
    logits_0 = (100 * extract_features(model, images) @ encode_texts(model, tokens[3:]).T).detach()  # CLIP untouched
    for p in lora:
        torch.nn.init.normal_(p, std=0.1)
    x, texts = encode_images(model, images), encode_texts(model, tokens)
    logits = 100 * x @ texts.T
    plain = F.cross_entropy(logits.index_fill(1, torch.arange(3), -math.inf), labels)
    plain = plain + align * (x - texts[labels]).square().sum(1).mean()  # Fig. 2b
    p_0 = (logits_0 / 2).softmax(1)
    kl = (p_0 * (p_0.log() - (logits[:, 3:] / 2).log_softmax(1))).sum(1).mean()
    plain = plain + distill * 4 * kl  # Table 5, at temperature 2
    gradients, before = torch.autograd.grad(plain, lora), copied(lora)
    own = images, labels - 3, tokens[3:]
    extra = mgclip.baseline_loss(model, lora, *own, align, distill)
    assert same(lora, before) and (extra is None) == (align == distill == 0) and kl > 0.001
    counts, sizes = [], []
    monkeypatch.setattr(mgclip, "encode_texts", lambda model, t: counts.append(len(t)) or encode_texts(model, t))
    model.visual.conv1.register_forward_hook(lambda _, inputs, output: sizes.append(len(output)))
    assert finetune(model, lora, *own, 1, lr=1e-9, extra_loss=extra) == [pytest.approx(plain.item(), rel=1e-5)]
    assert counts == [3] and sum(sizes) == 24 and max(sizes) == min(chunk, 24)  # the current task's prompts, once
    for p, gradient in zip(lora, gradients):
        torch.testing.assert_close(p.grad, gradient, atol=1e-4, rtol=1e-3)


def test_eq_6_is_a_mean_of_norms_not_a_root_mean_square():
    e, angle = torch.eye(4), math.radians(30)
    turned = (math.cos(angle) * e[0] + math.sin(angle) * e[2])[:, None]
    both = torch.cat([turned, e[:, 1:2]], 1)  # e_0 lies 0.5 outside, e_1 not at all: mean 0.25, root mean square 0.35
    assert mgclip.subspace_distance(e[:, :2], both) == pytest.approx(0.25, abs=1e-6)
    assert mgclip.subspace_distance(e[:, :2], e[:, 2:]) == 1 and mgclip.subspace_distance(e[:, :2], e) == 0


def test_forgetting_and_backward_transfer_by_their_definitions():
    assert mgclip.forgetting([[90.0], [80.0, 70.0], [85.0, 60.0, 50.0]]) == ((5 + 10) / 2, (-5 - 10) / 2)
    assert mgclip.forgetting([[50.0], [70.0, 9.0], [60.0, 9.0, 9.0]]) == (5, 5)  # the best is not the first
    assert mgclip.forgetting([[50.0]]) == (0, 0)


# Whole runs -----------------------------------------------------------------------------------------------------------

FOLDER = "--dataset folder --data-root images --model tiny.pt --tasks 3 --device cpu --batch-size 5"
LONG = f"{FOLDER} --max-epochs 2 --lr 0.01 --alpha 0.5 --distill 0.1 --zeroshot birds=birds"


def paint(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 80, (40, 36, 3)) + 30 * (seed % 6)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A tiny CLIP, a folder data set of six classes, a whole run on them and one interrupted in its second task."""
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
        patch.setattr(mgclip, "evaluate", at_call(2, mgclip.evaluate, Mock(side_effect=KeyboardInterrupt)))
        assert main(f"{LONG} --out cut".split()) == 130
    return root


@pytest.fixture
def workplace(template, tmp_path, monkeypatch):
    """A folder of its own to run in, with what the template holds; nothing is kept outside it, nothing downloaded."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    for config in tmp_path.glob("*/config.json"):
        config.write_text(config.read_text().replace(str(template), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network
    monkeypatch.setattr(mgclip, "pretrain_tiny", lambda: pytest.fail("pre-trains"))
    return tmp_path


def at_call(n, function, instead):
    """The function, but for its n-th call."""
    calls = itertools.count(1)
    return lambda *args, **options: (instead if next(calls) == n else function)(*args, **options)


def events(folder, kind=None):
    """What a run wrote, but for the times; all of it, or of one kind."""
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]
    return [line for line in lines if kind in (None, line["event"])]


def ran(command, out="run"):
    """The events of a command that ends well."""
    assert main(f"{command} --out {out}".split()) == 0
    return events(out)


def learned(folder):
    state = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)
    return [*state["lora"], state["head"]]


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


@functools.cache
def by_hand(rank=8, lr=0.01, batch_size=5, epochs=2, head_epochs=3, head_lr=5e-4, head_batch_size=64, beta=4.0,
            align=0.0, distill=0.0, seed=0):  # fmt: skip
    """Lines 1-12 on six classes, two a task, by public functions: the tasks' events, LoRA and head, the analyses."""
    model, rows, distances = load_clip("tiny.pt"), [], {}
    train, test = (mgclip.open_data("folder", "images", half, 32) for half in ("train", "test"))
    torch.manual_seed(seed)
    lora, head, generator = add_lora(model, rank), CosineHead(64), torch.Generator().manual_seed(seed)
    for t in range(3):
        tokens, (images, labels) = tokens_of(NAMES[: 2 * t + 2]), mgclip.load_images(train, [2 * t, 2 * t + 1], "")
        data = images, labels, tokens[2 * t :]
        extra = mgclip.baseline_loss(model, lora, *data, align, distill)
        finetune(model, lora, *data, epochs, lr=lr, batch_size=batch_size, generator=generator, extra_loss=extra)  # 7
        features = extract_features(model, images)
        head.add_classes(class_prototypes(features, labels))  # line 8
        fit_head(head, features, labels, head_epochs, head_lr, head_batch_size, generator)  # line 9
        pictures, truth = mgclip.load_images(test, range(2 * t + 2), "")
        x, texts, W_v = extract_features(model, pictures), encode_texts(model, tokens), F.normalize(head.weight)
        text, visual = 100 * x @ texts.T, x @ W_v.T
        scores = text.softmax(-1).softmax(-1) + beta * visual.softmax(-1)  # line 10
        right, *halves = [100.0 * (s.argmax(1) == truth) for s in (scores, text, visual)]
        row = dict(accuracy=right.mean().item())  # line 11: every image counts alike
        row["per_task"] = [part.mean().item() for part in right.split([7, 6, 6][: t + 1])]
        row["text_accuracy"], row["visual_accuracy"] = (half.mean().item() for half in halves)
        row["pos"], row["neg"] = similarity_gap(features, texts, labels + 2 * t)
        rows.append(row | dict(task=t + 1, classes_seen=2 * t + 2, epochs=epochs))
    leading = np.linalg.svd(x)[2][:6].T  # (64, 6): of 19 directions as many as there are classes
    for name, vectors in (("t", texts), ("vc", W_v), ("t+vc", torch.cat([texts, W_v]))):
        B = np.linalg.qr(vectors.detach().T)[0]
        distances[f"d(B_i, B_{name})"] = np.linalg.norm(leading - B @ (B.T @ leading), axis=0).mean()
    return rows, copied([*lora, head.weight]), distances


@pytest.mark.parametrize("change", [
    {}, dict(rank=2), dict(lr=0.02), dict(batch_size=4), dict(epochs=1), dict(head_epochs=1), dict(head_lr=0.05),
    dict(head_batch_size=4), dict(beta=0.0), dict(align=1.0), dict(distill=1.0), dict(seed=1),
], ids=str)  # fmt: skip
def test_a_run_is_the_public_functions_one_after_the_other_and_every_option_matters(workplace, change):
    options = dict(lr=0.01, epochs=2) | change
    end = ran(" ".join([FOLDER, *(f"--{name.replace('_', '-')} {value}" for name, value in options.items())]))[-1]
    rows, parameters, distances = by_hand(**change)
    for event, row in zip(events("run", "task"), rows, strict=True):
        assert event == {"event": "task"} | {name: pytest.approx(value) for name, value in row.items()}
    assert same(learned("run"), parameters)
    assert not change or rows != by_hand()[0] or not same(parameters, by_hand()[1])
    A = [row["accuracy"] for row in rows]
    assert [*end["accuracy"], end["avg"], end["last"]] == pytest.approx([*A, np.mean(A), A[-1]])  # line 12
    assert {name: end[name] for name in distances} == pytest.approx(distances, abs=1e-4)
    assert end["trainable_parameters"] == sum(p.numel() for p in parameters)


def test_a_run_writes_its_options_its_metrics_and_its_checkpoint(workplace, capsys):
    result = run(parse(LONG.split()))  # as another program starts it
    assert main(LONG.split()) == 0
    assert sorted(os.listdir("runs")) == ["folder-0.5-4-0", "folder-0.5-4-0-2"]
    folder = Path("runs/folder-0.5-4-0-2")
    assert {"checkpoint.pt", "config.json", "metrics.jsonl"} == {n for n in os.listdir(folder) if n[0] != "."}
    config, log = json.loads((folder / "config.json").read_text()), events(folder)
    assert (config["lr"], config["precision"], config["versions"]["torch"]) == (0.01, "fp32", torch.__version__)
    assert log == events("whole") == events("runs/folder-0.5-4-0")  # same seed, same numbers
    tasks, birds = events(folder, "task"), events(folder, "zeroshot")  # the birds are the test images of all tasks
    assert [e["task"] for e in birds] == [0, 1, 2, 3] and birds[3]["accuracy"] == tasks[-1]["text_accuracy"]
    assert log[-1]["forgetting"] == mgclip.forgetting([e["per_task"] for e in tasks])[0] and set(log[-1]) <= set(result)
    out, err = capsys.readouterr()
    assert err == "" and "\r" not in out and out.splitlines()[-1] == str(folder)  # well-formed off a terminal


def test_a_run_encodes_nothing_twice_and_holds_a_training_task_and_the_tests_in_nameless_files(workplace, monkeypatch):
    encoded, texts, held, rates, load_images, step = [], [], [], [], mgclip.load_images, torch.optim.Adam.step
    mapped = lambda: [m[-9:] for m in Path("/proc/self/maps").read_text().splitlines() if f"{workplace}/scratch" in m]
    spy = lambda self: rates.append(self.param_groups[0]["lr"]) or step(self)
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    monkeypatch.setattr(mgclip, "images_at_once", lambda model: 4)
    monkeypatch.setattr(mgclip, "encode_images", lambda *a: encoded.append(len(a[1])) or encode_images(*a))
    monkeypatch.setattr(mgclip, "encode_texts", lambda *a: texts.append(len(a[1])) or encode_texts(*a))
    monkeypatch.setattr(mgclip, "load_images", lambda *a: held.append(len(mapped())) or load_images(*a))
    monkeypatch.setattr("tempfile.tempdir", str(workplace / "scratch"))
    Path("scratch").mkdir()
    ran(f"{FOLDER} --max-epochs 1 --head-batch-size 4")
    # search; a task: training, and once for prototypes and all epochs of the head; tests of tasks 1..t; analysis
    assert sum(encoded) == 3 * 12 + 3 * (12 + 12) + (7 + 13 + 19) + 19
    assert len(texts) <= 2 + 3 + 3 * (3 + 1 + 1) + 1  # one for each gap, batch, evaluation and the analysis
    assert held == [0, 1, 1, 2, 2, 3] and os.listdir("scratch") == mapped() == []  # before each task's tests, training
    schedule = [0.01 + 0.99 * (1 + math.cos(math.pi * i / 9)) / 2 for i in range(9)]  # the head's falls by batch
    assert rates[:15] == pytest.approx([1e-3] * 6 + [5e-4 * part for part in schedule])  # the LoRA's by epoch


def test_search_on_each_task_finds_each_its_own_epochs_and_on_the_first_for_all(workplace, monkeypatch):
    found = iter([2, 3, 1, 2])
    monkeypatch.setattr(mgclip, "find_epochs", lambda *a, **k: (next(found), find_epochs(*a, **k)[1]))
    for search, epochs in (("first", [2, 2, 2]), ("each", [3, 1, 2])):
        ran(f"{FOLDER} --search {search} --max-epochs 1", search)
        assert [e["epochs"] for e in events(search, "task")] == epochs
        assert [e["epochs"] for e in events(search, "epochs")] == epochs[: 1 if search == "first" else 3]


def test_runs_are_the_official_order_then_seeds_and_go_on_where_they_were_cut_off(workplace, monkeypatch):
    evaluate, calls, command = mgclip.evaluate, [], f"{FOLDER} --epochs 1 --runs 3 --out"
    assert main(f"{command} runs/all".split()) == 0
    monkeypatch.setattr(mgclip, "evaluate", at_call(5, evaluate, Mock(side_effect=KeyboardInterrupt)))  # order 2 task 2
    assert main(f"{command} runs/cut".split()) == 130
    monkeypatch.setattr(mgclip, "evaluate", lambda *args: calls.append(1) or evaluate(*args))
    assert main("--resume runs/cut".split()) == 0
    assert len(calls) == 2 + 3  # of the second order two tasks, of the third all; the first is read
    summary = json.loads(Path("runs/cut/summary.json").read_text())
    last = [events(f"runs/all/order-{o}")[-1]["last"] for o in ("official", "1", "2")]
    assert summary == json.loads(Path("runs/all/summary.json").read_text()) and len(set(last)) > 1
    deviation = pytest.approx(np.std(last, ddof=1))
    assert (summary["last"]["mean"], summary["last"]["deviation"]) == (pytest.approx(np.mean(last)), deviation)


# Data, weights and what can be wrong with them ------------------------------------------------------------------------

PERMUTED = {(s, K): np.random.RandomState(s).permutation(K)[:10].tolist() for s in (5, 1993) for K in (100, 1000)}
SYNSETS = [*(f"n{1443500 + i:08d}" for i in range(99)), "n01855672", *(f"n{2000000 + i:08d}" for i in range(900))]


@pytest.mark.parametrize("options, lr, batch, head_lr, head_batch, sizes, first", [
    ("cifar100", 1e-3, 128, 5e-4, 64, [10] * 10, [87, 0, 52, 58, 44, 91, 68, 97, 51, 15]),
    ("imagenet-r", 1e-3, 64, 5e-4, 32, [20] * 10, [150, 119, 193, 2, 75, 179, 129, 68, 145, 53]),
    ("imagenet100", 5e-4, 128, 1e-3, 128, [10] * 10, PERMUTED[1993, 100]),
    ("imagenet1k", 1e-3, 128, 5e-4, 64, [100] * 10, PERMUTED[1993, 1000]),
    ("vtab", 1e-3, 128, 5e-4, 64, [10] * 5, list(range(10))),
    ("folder --tasks 3", 1e-3, 128, 5e-4, 64, [3, 2, 2], [0, 1, 2]),  # as even as can be
    ("cifar100 --tasks 4,2,94 --class-order 5 --lr 7", 7.0, 128, 5e-4, 64, [4, 2, 94], PERMUTED[5, 100]),
])  # fmt: skip
def test_presets_are_the_papers_and_what_help_prints(capsys, options, lr, batch, head_lr, head_batch, sizes, first):
    command = ["--dataset", *options.split()]
    config = parse(command)
    assert (config.lr, config.batch_size, config.head_lr, config.head_batch_size) == (lr, batch, head_lr, head_batch)
    assert (config.model, config.rank, config.alpha, config.beta) == ("ViT-B/16", 8, 0.1, 4)
    tasks = mgclip.split_classes(config, sum(sizes))
    assert [len(task) for task in tasks] == sizes and sum(tasks, [])[: len(first)] == first
    assert sorted(sum(tasks, [])) == list(range(sum(sizes)))
    with pytest.raises(SystemExit):
        parse([*command, "--help"])
    assert f"images a step of the LoRA (default: {batch})" in " ".join(capsys.readouterr().out.split())


def test_class_names_come_from_classes_txt_else_imagenet_else_the_folders(tmp_path):
    folders, listing = ["n01443537", "n01484850"], tmp_path / "classes.txt"
    assert mgclip.class_names(tmp_path, folders) == folders
    names = mgclip.class_names(tmp_path, SYNSETS)
    assert (names[0], names[99], mgclip.class_names(tmp_path, SYNSETS[:100])[99]) == ("tench", "goose", "goose")
    assert len(set(map(tuple, tokens_of(names).tolist()))) == 1000  # Cardigan, the dog, and cardigan, the garment, too
    listing.write_text("\ufeffn01484850\tgreat white shark\nn01443537 fish\n", encoding="utf-8")
    assert mgclip.class_names(tmp_path, folders) == ["fish", "great white shark"]
    listing.write_text("sea horse\tthe fish\nsea\tsalt\n")
    assert mgclip.class_names(tmp_path, ["sea", "sea horse"]) == ["salt", "the fish"]


def opened(dataset, classes, half="train", size=32):
    """Names, images and labels of some classes of a data set in the folder data."""
    data = mgclip.open_data(dataset, "data", half, size)
    return data.names, *mgclip.load_images(data, classes, half)


def test_imagenet100_is_the_first_100_of_all_synsets_and_vtab_has_the_authors_names_by_number(workplace):
    for path in [*(Path("data/val", synset) for synset in SYNSETS), *(Path("data/train", str(c)) for c in range(50))]:
        path.mkdir(parents=True)
        (path / "0.png").touch()
    names = mgclip.open_data("imagenet100", "data", "test", 32).names
    assert (names[0], names[-1], len(names)) == ("tench", "goose", 100)
    paint(Path("data/train/2/0.png"))
    names, images, _ = opened("vtab", [2])
    assert (names[0], names[20], names[49], len(set(names))) == ("airplane", "Abyssinian Cat", "pink-yellow dahlia", 50)
    assert torch.equal(images[0], decoded("data/train/2/0.png"))
    Path("data/classes.txt").write_text("".join(f"{c} thing {c}\n" for c in range(50)))
    assert opened("vtab", [2])[0][2] == "thing 2"


def test_folders_1_and_01_sort_the_same_on_every_run(tmp_path, monkeypatch):
    for folder in ("1", "01", "2", "10", ".hidden"):
        paint(tmp_path / folder / "0.png")
    scandir, listing = os.scandir, sorted(os.scandir(tmp_path), key=lambda entry: entry.name)
    for order in (listing, listing[::-1]):
        monkeypatch.setattr(os, "scandir", lambda path: order if str(path) == str(tmp_path) else scandir(path))
        assert mgclip.Folder(tmp_path, 32).classes == ["01", "1", "2", "10"]


def test_what_is_no_image_is_left_out_and_counted_while_subfolders_and_odd_names_count(workplace, capsys):
    for half in ("train", "test"):
        apple = Path("images", half, "apple").rename(Path("images", half, "grüne Äpfel 苹果"))
    for name in ("Thumbs.db", "notes.txt", "a.heic", "b.heic", ".hidden.png"):
        (apple / name).write_text("words")
    for name in ("more/deep/a\nb.png", os.fsdecode(b"more/\xff.JPG"), ".cache/8.png"):
        paint(apple / name)
    assert len(ran(f"{FOLDER} --epochs 0")) == 4
    start = capsys.readouterr().out.partition("\ntask")[0]
    assert "36 images of 6 classes" in start and "21 images of 6 classes" in start
    assert all(words in start for words in ("1 .db", "1 .txt", "2 .heic")) and "hidden" not in start


def test_cifar100_food101_and_pets_are_read_as_torchvision_lays_them_out(workplace, monkeypatch):
    cifar, food, pets = (Path("data", name) for name in ("cifar-100-python", "food-101", "oxford-iiit-pet"))
    for folder in (cifar, food / "meta", pets / "annotations"):
        folder.mkdir(parents=True)
    pixels = np.random.RandomState(0).randint(0, 256, (200, 3072)).astype(np.uint8)
    (cifar / "train").write_bytes(pickle.dumps({"data": pixels, "fine_labels": [*range(100)] * 2}))
    (cifar / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"thing_{i:02d}" for i in range(100)]}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    names, images, labels = opened("cifar100", [7, 3], "train", 224)
    assert np.array_equal(images, pixels.reshape(-1, 3, 32, 32)[[7, 107, 3, 103]])  # not enlarged yet
    assert (names[7], labels.tolist()) == ("thing_07", [0, 0, 1, 1])
    for i, name in enumerate(("food-101/images/apple_pie/0.jpg", "oxford-iiit-pet/images/great_dane_7.jpg")):
        paint(Path("data", name), i)
    (food / "meta" / "test.json").write_text('{"apple_pie": ["apple_pie/0"]}')
    (pets / "annotations" / "test.txt").write_text("great_dane_7 1 1 1\n")
    for dataset, name, path in (("food101", "apple pie", "apple_pie/0"), ("pets", "Great Dane", "great_dane_7")):
        names, images, labels = opened(dataset, [0], "zeroshot")
        assert names == [name] and torch.equal(images[0], decoded(*Path("data").rglob(f"{path}.jpg")))


@pytest.mark.filterwarnings("ignore")
def test_state_dicts_are_read_in_float32_to_the_bit_and_torchscript_archives_too(workplace):
    model, images = made_up_clip(), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert same(load_clip("tiny.pt").state_dict().values(), model.state_dict().values())
    torch.save({name: weight.half() for name, weight in model.state_dict().items()}, "half.pt")
    assert same(load_clip("half.pt").state_dict().values(), [w.half().float() for w in model.state_dict().values()])
    for name, value in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        if not hasattr(model, name):  # as OpenAI's archives carry their sizes
            model.register_buffer(name, torch.tensor(value))
    torch.jit.trace(model, (torch.randn(1, 3, 32, 32), tokens_of(NAMES[:2]))).save("traced.pt")
    difference = encode_images(load_clip("traced.pt"), images) - encode_images(made_up_clip(), images)
    assert difference.abs().max() < 0.01  # clip.load goes through float16


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


def twins(*names):
    """Renames the first folders of both halves."""
    for half, (old, new) in itertools.product(("train", "test"), zip(NAMES, names)):
        Path("images", half, old).rename(Path("images", half, new))


NEW, CUT = f"{FOLDER} --epochs 0 --out new", "--resume cut"
TRAP = type("Trap", (), dict(__reduce__=lambda self: (os.mkdir, ("sprung",))))()  # makes a folder if a file runs code
LISTING = Path("images/classes.txt")
NO_MEMORY = Mock(side_effect=RuntimeError("DefaultCPUAllocator: can't allocate memory"))


@pytest.mark.parametrize("damage, command, words", [
    *((None, f"{NEW} {option}", option.split()) for option in (
        "--tasks 0", "--tasks 5,1", "--alpha nan", "--alpha -0.1", "--beta inf", "--lr 0", "--rank 0", "--runs 0",
        "--class-order random", "--template photo", "--device quantum", "--zeroshot birds", "--zeroshot =images",
        "--chunk-size 5", "--model no-such", "--model ViT-B/16", "--dataset imagenet", "--data-root nowhere",
    )),
    (None, f"{NEW} --tasks 4", ["--tasks 4", "6 classes", "two classes in each"]),
    (None, f"{NEW} --dataset imagenet-r", ["official", "200 classes", "holds 6", "natural"]),
    (None, "--dataset cifar100 --model tiny.pt --out new", ["cifar100", "--data-root", "data"]),
    (None, "--data-root images", ["--data-root", "--dataset folder"]),
    (None, f"{NEW} --out mine", ["mine"]),
    (None, f"{NEW} --out whole", ["whole"]),
    (None, ["--resume", ""], ["--resume"]),
    (None, "--resume cut --alpha 1", ["--alpha", "--resume"]),
    (None, f"{FOLDER} --epochs 3 --lr 1e30 --out new", ["epoch", "loss", "--resume new"]),
    (lambda _: Path("images/test/castle").rename("castle"), NEW, ["images", "castle"]),
    (lambda _: Path("images/test/forest/6.png").write_text("words"), NEW, ["images/test/forest/6.png", "--resume new"]),
    (lambda _: os.truncate("images/train/forest/0.png", 1000), NEW, ["images/train/forest/0.png", "image"]),
    (lambda _: Image.new("1", (20_000, 20_000)).save("images/train/apple/b.png"), NEW, ["apple/b.png", "bomb"]),
    (lambda _: Path("images/test/apple/a.png").symlink_to("../../train/apple/0.png"), NEW, ["a.png", "training"]),
    (lambda _: twins("Apple", "apple"), NEW, ["images", "Apple", "apple", "one prompt"]),
    (lambda _: LISTING.write_text("".join(f"{n} {n * 99}\n" for n in NAMES)), NEW, [str(LISTING), "appleapple"]),
    (lambda _: LISTING.write_text("apple fruit\n"), NEW, [str(LISTING), "bicycle"]),
    (lambda _: LISTING.write_bytes(b"apple \xfcber\n"), NEW, [str(LISTING), "UTF-8"]),
    (lambda _: os.truncate("tiny.pt", 100_000), NEW, ["--model", "tiny.pt", "cut short"]),
    (lambda _: torch.save(TRAP, "tiny.pt"), NEW, ["--model", "tiny.pt", "no CLIP"]),
    (lambda _: torch.save(clip.model.CLIP(64, 32, (1, 1, 1, 1), 8, None, 77, 100, 64, 1, 1).state_dict(), "tiny.pt"),
     NEW, ["--model", "tiny.pt", "ViT"]),
    (lambda _: twins("avocado"), CUT, ["cut/checkpoint.pt", "classes", "apple", "avocado"]),
    (lambda _: torch.save(made_up_weights(1), "tiny.pt"), CUT, ["cut/checkpoint.pt", "sha256"]),
    (lambda _: torch.save(made_up_weights(1), "tiny.pt"), "--predict a.png --resume whole", ["whole", "sha256"]),
    (lambda _: [ran(f"{LONG} --seed 1", "other"), shutil.copy("other/checkpoint.pt", "cut")],
     CUT, ["cut/checkpoint.pt", "seed"]),
    (lambda _: [ran(f"{LONG} --class-order 5", "other"), shutil.copy("other/checkpoint.pt", "cut")],
     CUT, ["cut/checkpoint.pt", "class_order", "official", "5"]),
    (lambda _: os.truncate("cut/checkpoint.pt", 5000), CUT, ["cut/checkpoint.pt", "cut short or no checkpoint"]),
    (lambda _: torch.save(TRAP, "cut/checkpoint.pt"), CUT, ["cut/checkpoint.pt", "no checkpoint"]),
    (lambda _: Path("metrics.jsonl").write_text("words"), "--plot .", ["--plot"]),
    (lambda patch: patch.setattr(mgclip, "measure_gap", lambda *_: (0.1, 1e-6)), f"{FOLDER} --out new", ["--epochs"]),
    (lambda patch: patch.setattr(mgclip, "finetune", NO_MEMORY), NEW, ["memory", "--resume new"]),
    (lambda patch: patch.setattr(mgclip, "finetune", Mock(side_effect=MemoryError)), NEW, ["memory", "--resume new"]),
    (lambda patch: patch.setattr(os, "posix_fallocate", Mock(side_effect=OSError("full"))), NEW, ["TMPDIR", "no room"]),
    (lambda patch: patch.setitem(sys.modules, "matplotlib", None), f"{NEW} --plot", ["pip install matplotlib"]),
    (lambda _: Path(".cache").write_text("a file"), "--out new --device cpu", [".cache"]),
])  # fmt: skip
def test_what_a_user_can_get_wrong_is_one_message(workplace, monkeypatch, capsys, damage, command, words):
    Path("mine").mkdir()
    for name in ("metrics.jsonl", "checkpoint.pt", "notes.txt"):
        Path("mine", name).write_text("mine")
    if damage:
        damage(monkeypatch)
    before = [contents(folder) for folder in ("mine", "whole", "cut")]
    refused(capsys, command, *words)
    assert before == [contents(folder) for folder in ("mine", "whole", "cut")] and not Path("sprung").exists()


# Processes and terminals ----------------------------------------------------------------------------------------------


def forked(command, err=os.devnull, folder=".", **environment):
    """Starts a process with a command of ours, as data loaders start theirs."""

    def work():
        sys.stdout, sys.stderr = open(1, "w"), open(err, "w", buffering=1)
        os.environ.update(environment)
        os.chdir(folder)
        sys.exit(main(command.split()))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def ended(*processes):
    """The exit statuses of processes, negative if a signal ended them; None of one that does not end in a minute."""
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_a_run_that_is_killed_or_fills_the_disk_resumes_to_the_very_same_metrics(workplace, monkeypatch):
    killed, save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL), torch.save
    full = lambda *args: [resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)), save(*args)]  # as a full disk
    moments = (  # the call that is the last, the exit status, and the tasks finished by then
        ("search", mgclip, "measure_gap", 2, killed, -signal.SIGKILL, 0),
        ("training", torch.optim.Adam, "step", 18, killed, -signal.SIGKILL, 1),
        ("saving", os, "replace", 4, killed, -signal.SIGKILL, 1),  # the checkpoint of task 2 is not in its place yet
        ("full", torch, "save", 2, full, 2, 1),
    )
    processes = []
    for out, owner, name, n, instead, *_ in moments:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, at_call(n, getattr(owner, name), instead))
            processes.append(forked(f"{LONG} --out {out}", f"{out}.err"))
    assert ended(*processes) == [status for *_, status, _ in moments]
    for out, *_, tasks in moments:
        saved = Path(out, "checkpoint.pt")
        assert (torch.load(saved, weights_only=True)["task"] if saved.exists() else 0) == tasks, out
    said = Path("full.err").read_text()
    assert said.count("\n") == 1 and "--resume full" in said and len([*Path("full").glob("*part")]) == 0
    assert ended(*(forked(f"--resume {out}") for out, *_ in moments)) == [0] * 4
    for out, *_ in moments:
        assert events(out) == events("whole") and same(learned(out), learned("whole")), out


def test_an_interrupted_run_goes_on_from_anywhere_with_its_data_moved_and_leaves_the_users_files(workplace, capsys):
    mine = ("notes.txt", ".a.b.1", "checkpoint.pt.1.part", ".checkpoint.pt.12", "images")
    for name in mine:
        Path("cut", name).write_text(name)
    Path("images").rename("birds/moved")
    os.chdir("birds")
    for threads in (1, 2):  # a finished run stays as it is
        with patch.object(torch, "get_num_threads", lambda: threads):
            assert main("--resume ../cut --data-root moved --device cpu".split()) == 0
        assert ("digits may differ" in capsys.readouterr().err) == (threads == 2)
        assert events("../cut") == events("../whole") and same(learned("../cut"), learned("../whole"))
    assert all(Path("../cut", name).read_text() == name for name in mine)


def test_two_processes_are_never_at_work_in_one_folder(workplace, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(mgclip, "evaluate", at_call(2, mgclip.evaluate, lambda *_: time.sleep(60)))
        live = forked(f"{LONG} --out run")
    while not Path("run/checkpoint.pt").exists():
        time.sleep(0.02)
    before = contents("run")
    refused(capsys, f"{LONG} --out run", "run")
    refused(capsys, "--resume run", "run", "another process")
    live.kill()
    assert ended(live) == [-signal.SIGKILL] and contents("run") == before
    assert main("--resume run".split()) == 0 and len(events("run", "task")) == 3


def together(command, nodes=(".", ".")):
    """The exit statuses of two processes, in these folders, as torchrun starts them on two machines, one on each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    world |= dict(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    processes = [forked(command, f"err{r}", nodes[r], RANK=str(r), **world) for r in (0, 1)]
    multiprocessing.connection.wait([process.sentinel for process in processes], 60)
    time.sleep(0.1)
    if any(process.exitcode for process in processes):  # one has failed: torchrun ends the others
        for process in processes:
            process.terminate()
    return ended(*processes)


def test_two_nodes_agree_with_one_process_and_each_decodes_and_holds_its_share(workplace, template, monkeypatch):
    """Losses and similarities to 1e-4, accuracies exactly, with batches of 5, which do not divide evenly."""

    def watched(name, note):
        function = getattr(mgclip, name)

        def noted(*args, **options):
            result = function(*args, **options)
            with open(workplace / f"{name}-{mgclip.process()[0]}-of-{mgclip.process()[1]}", "a") as file:
                print(*note(args, result), file=file)
            return result

        monkeypatch.setattr(mgclip, name, noted)

    watched("finetune", lambda args, losses: losses)
    watched("load_images", lambda args, result: [len(result[0])])
    watched("open_image", lambda args, image: [os.path.relpath(args[0])])
    noted = lambda name: [Path(f"{name}-{who}").read_text().split() for who in ("0-of-1", "0-of-2", "1-of-2")]
    for node in ("node0", "node1"):  # they share no file
        shutil.copytree(template, node)
    one = ran(LONG)
    assert together(f"{LONG} --out run", ["node0", "node1"]) == [0, 0], Path("err0").read_text()
    for a, b in zip(one, events("node0/run"), strict=True):
        exact = lambda key, value: "accuracy" in key or key == "per_task" or not isinstance(value, float)
        assert b == {key: value if exact(key, value) else pytest.approx(value, abs=1e-4) for key, value in a.items()}
    losses, *both = np.array(noted("finetune"), float)
    assert len(losses) >= 3 and np.abs(losses - both[0]).max() < 1e-4 and np.array_equal(*both)
    by_one, first, second = map(set, noted("open_image"))
    assert len(by_one) == len(first) + len(second) == 55 + 19 and by_one == first | second
    images, first, second = np.array(noted("load_images"), int)
    assert (first + second == images).all() and (first - second <= 1).all()
    assert not Path("node1/run").exists()  # process 0 alone writes


@pytest.mark.parametrize("options, words", [("--alpha=-1", "argument --alpha"), ("", "apple/1.png: cannot be read")])
def test_bad_input_is_said_once_whoever_finds_it(workplace, options, words):
    Path("images/train/apple/1.png").write_text("words")  # in the share of process 1
    statuses = together(f"{FOLDER} {options} --out run")
    said = Path("err0").read_text() + Path("err1").read_text()
    assert 2 in statuses and said.count("error:") == said.count(words) == 1 and "Traceback" not in said, said


def test_a_terminal_that_is_not_utf_8_survives_a_delta(workplace, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert len(ran(f"{FOLDER} --tasks 1 --max-epochs 1")) >= 4
    terminal.flush()
    assert "neg 0." in terminal.buffer.getvalue().decode("ascii")


@pytest.mark.parametrize("command", [NEW, "--predict images/test/apple/6.png --resume whole"])
def test_a_reader_who_has_gone_ends_a_command_quietly(workplace, command):
    terminal, (reading, writing) = os.dup(1), os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    process = forked(command, "err")
    os.dup2(terminal, 1)
    assert ended(process) in ([0], [141]) and Path("err").read_text() == ""


def test_predict_gives_the_five_best_classes_by_eq_5_and_names_and_skips_what_it_cannot_read(workplace, capsys):
    ran(f"{FOLDER} --max-epochs 1 --beta 2 --class-order 5")
    paths, names = ["images/test/castle/6.png", "images/test/apple/7.png"], np.random.RandomState(5).permutation(NAMES)
    capsys.readouterr()
    assert main(["--predict", paths[0], "tiny.pt", paths[1], "nowhere.png", "--resume", "run"]) == 1
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 2 and all(name in err for name in ("tiny.pt", "nowhere.png"))
    header, *rows = [line.split("\t") for line in out.splitlines()]
    assert header == ["image", "rank", "class", "fused", "text", "visual"] and len(rows) == 10
    (*lora, head_rows), model, head = learned("run"), load_clip("tiny.pt"), CosineHead(64)
    for p, saved in zip(add_lora(model), lora, strict=True):
        p.data = saved
    head.add_classes(head_rows)
    x = encode_images(model, torch.stack([decoded(path) for path in paths]))
    text_logits, visual = 100 * x @ encode_texts(model, tokens_of(names)).T, head(x)
    fused, text = fused_scores(text_logits, visual, 2), text_logits.softmax(1)
    best = [(i, k) for i in (0, 1) for k in fused[i].argsort(descending=True)[:5].tolist()]
    assert [row[:3] for row in rows] == [[paths[i], str(n % 5 + 1), names[k]] for n, (i, k) in enumerate(best)]
    scores = [[part[i, k].item() for part in (fused, text, visual)] for i, k in best]
    close([[float(number) for number in row[3:]] for row in rows], scores)


def test_plot_draws_a_row_for_each_run(workplace):
    pytest.importorskip("matplotlib")
    ran(f"{FOLDER} --epochs 1 --plot", "fixed")
    assert main("--plot whole fixed".split()) == 0
    with Image.open("fixed/plot.png") as one, Image.open("whole/plot.png") as two:
        assert two.size == (one.width, 2 * one.height)
    assert main(f"{FOLDER} --epochs 0 --runs 2 --plot --out several".split()) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("more", ["fp32", "bf16", "bf16 --compile"])
def test_a_gpu_agrees_with_the_cpu(workplace, more):
    ran(f"{LONG} --device cuda --precision {more}")
    cpu, gpu = ([e["neg"] for e in events(out, "search")] for out in ("whole", "run"))
    assert gpu[0] == pytest.approx(cpu[0], abs=1e-4) and gpu == pytest.approx(cpu, abs=0.02)


# Beyond the paper -----------------------------------------------------------------------------------------------------


def test_ridge_head_is_least_squares_on_all_images_at_once_whatever_the_order_of_tasks():
    x, labels = F.normalize(torch.randn(60, 16), dim=1), torch.arange(60) % 6
    heads = []
    for tasks in ([0, 1, 2], [2, 0, 1]):
        head = mgclip.RidgeHead(16, ridge=0.5)
        for t in tasks:
            head.learn(x[labels // 2 == t], labels[labels // 2 == t] - 2 * t)
        heads.append(head.weight.detach().view(3, 2, 16)[np.argsort(tasks)].view(6, 16))
    I, Y = torch.eye(16).double(), F.one_hot(labels).double()
    rows = torch.cat([x.double(), 0.5**0.5 * I]), torch.cat([Y, torch.zeros(16, 6)])
    expected = torch.linalg.lstsq(*rows).solution.T.float()
    torch.testing.assert_close(heads[0], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(heads[0], heads[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(head(x), x @ head.weight.T)


def test_null_space_leaves_what_earlier_tasks_fed_to_keys_and_values_alone():
    model, lora, images, labels, tokens = golden_inputs()
    null_space, inputs = mgclip.NullSpace(model, 0.01), {}
    finetune(model, lora, images[:24], labels[:24], tokens[:3], epochs=2, lr=0.01, batch_size=8)
    with torch.no_grad():
        before = encode_images(model, images), encode_texts(model, tokens)
        null_space.remember(images[:24], tokens[:3])
        null_space.begin_task(torch.Generator().manual_seed(0))
        for a, b in zip(before, (encode_images(model, images), encode_texts(model, tokens))):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)  # the LoRA is folded into the weights, and B is 0

        def keep(attn, arguments):
            inputs[attn] = arguments[1].flatten(0, 1)

        for attn in null_space.attns:
            attn.register_forward_pre_hook(keep)
        encode_images(model, images[:24])
        encode_texts(model, tokens[:3])
        old = dict(inputs)
    finetune(model, lora, images[24:], labels[24:] - 3, tokens[3:], epochs=3, lr=0.01, after_step=null_space.project)
    for attn, M in zip(null_space.attns, null_space.moments):
        energy, directions = torch.linalg.eigh(M)
        closed = directions[:, energy.cumsum(0) > 0.01 * energy.sum()].float()
        for A, B in ((attn.A_k, attn.B_k), (attn.A_v, attn.B_v)):
            x = old[attn] @ closed @ closed.T  # all but a hundredth of the energy
            assert (x - old[attn]).square().sum() <= 0.011 * old[attn].square().sum()
            assert (x @ A.T @ B.T).norm() < 1e-4 < B.norm()


@pytest.mark.parametrize("more", ["--head ridge", "--null-space 0.1 --head ridge --max-epochs 2 --alpha 0.9"])
def test_runs_beyond_the_paper_go_on_as_if_they_had_not_been_cut_off(workplace, monkeypatch, more):
    options = f"{FOLDER} --lr 0.01 {more} --out"
    assert main(f"{options} once".split()) == 0
    evaluate = mgclip.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(mgclip, "evaluate", at_call(3, evaluate, Mock(side_effect=KeyboardInterrupt)))
        assert main(f"{options} again".split()) == 130
    assert main("--resume again".split()) == 0
    assert events("again") == events("once") and same(learned("again"), learned("once"))
    assert main("--resume again --predict images/test/apple/6.png".split()) == 0


def test_classes_of_another_day_are_learned_by_a_finished_run(workplace, capsys):
    def day(root, *names):
        for (i, half), (c, name) in itertools.product(enumerate(("train", "test")), enumerate(names)):
            for n in range(4):
                paint(Path(root, half, name, f"{n}.png"), 50 * i + 6 * n + c)

    day("day", "crow", "owl")
    assert main(f"{FOLDER} --epochs 1 --out run".split()) == 0
    before = events("run")
    refused(capsys, "--resume run --add images", "one prompt", "apple")
    refused(capsys, "--resume run --add nowhere", "--add", "nowhere")
    refused(capsys, f"{FOLDER} --add day", "--resume")
    assert events("run") == before
    assert main("--resume run --add day".split()) == 0
    tasks = events("run", "task")
    assert [e["classes_seen"] for e in tasks] == [2, 4, 6, 8] and len(tasks[-1]["per_task"]) == 4
    assert events("run")[: len(before) - 1] == before[:-1]
    assert events("run")[-1]["accuracy"] == [e["accuracy"] for e in tasks]
    capsys.readouterr()
    assert main("--resume run --predict day/test/owl/0.png".split()) == 0
    assert "owl" in capsys.readouterr().out
    shutil.move("images", "gone")
    day("later", "ant", "bee")
    assert main("--resume run --add later".split()) == 0
    assert "images is gone" in capsys.readouterr().out
    last = events("run", "task")[-1]
    assert last["classes_seen"] == 10 and last["per_task"][:3] == [None] * 3 and None not in last["per_task"][3:]
    assert main("--resume run".split()) == 0


def test_weights_of_openclip_load_with_gelu(workplace):
    model, images = made_up_clip(), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ours, quick = load_clip("tiny.pt", gelu=True), load_clip("tiny.pt")
    for block in [*model.visual.transformer.resblocks, *model.transformer.resblocks]:
        block.mlp.gelu = torch.nn.GELU()
    for encode, data in ((encode_images, images), (encode_texts, tokens_of(NAMES))):
        assert torch.equal(encode(ours, data), encode(model, data))
        assert not torch.allclose(encode(ours, data), encode(quick, data), atol=1e-3)


def readme_after(opening):
    return Path(mgclip.__file__).with_name("README.md").read_text("utf-8").partition(opening)[2].partition("```")[0]


def test_the_readmes_python_runs_as_it_stands():
    found = {}
    exec(readme_after("```python\n"), found)
    assert found["predictions"].shape == (64,) and 1 <= found["E"] <= 10


def test_the_readmes_shell_links_published_lists_and_takes_imagenet_rs_names(workplace):
    shell = readme_after("```sh\nhalf=\n").partition("python mgclip.py")[0]
    for path in ("n01443537/art_0.jpg", "n01484850/cartoon_1.jpg"):
        paint(Path("imagenet-r", path))
    Path("imgr_train_test_split.txt").write_text("train\nn01443537/art_0.jpg\ntest\nn01484850/cartoon_1.jpg\n")
    Path("imagenet-r/README.txt").write_text("ImageNet-R\n\nn01443537 goldfish\nn01484850 great_white_shark\n")
    assert os.system(shell) == 0
    assert Image.open("split/train/n01443537/art_0.jpg").size == Image.open("split/test/n01484850/cartoon_1.jpg").size
    assert mgclip.class_names("split", ["n01484850", "n01443537"]) == ["great_white_shark", "goldfish"]


# Benchmark: python test_mgclip.py [--device cuda] [--precision bf16] [--model ViT-B/16] [--images N] ------------------
# Random weights and pictures. The plain form is what a careful user writes from the paper with CLIP's own encoders.

SHAPES = {  # D; resolution, layers, width, patch of the image encoder; context, words, width, heads, layers of the text
    "ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
    "tiny": (64, 32, 2, 64, 8, 77, 49408, 64, 1, 2),
}


class AddedLoRA(mgclip.KeyValueLoRA):
    """CLIP's own attention, with ΔW = B A / r added to its in-projection in every forward."""

    def forward(self, *inputs, **options):
        W_q, W_k, W_v = self.attn.in_proj_weight.chunk(3)
        W = torch.cat([W_q, W_k + self.B_k @ self.A_k / len(self.A_k), W_v + self.B_v @ self.A_v / len(self.A_v)])
        return torch.func.functional_call(self.attn, {"in_proj_weight": W}, inputs, options)


def plain_images(model, images):
    return F.normalize(model.encode_image(mgclip.normalised_pixels(model, images)).float(), dim=-1)


def plain_texts(model, tokens):
    return F.normalize(model.encode_text(tokens.to(model.logit_scale.device)).float(), dim=-1)


def plain_epoch(model, lora, images, labels, tokens):
    """The prompts of all classes seen, 77 tokens each; only the last ten's logits are not masked. The mean loss."""
    optimizer, losses = torch.optim.Adam(lora, 1e-3), []
    for batch in torch.randperm(len(labels)).split(128):
        optimizer.zero_grad()
        texts = plain_texts(model, tokens)  # once a batch, as ours: once a micro-batch would cost more
        leaf = texts.detach().requires_grad_()
        for rows in batch.split(128 if texts.is_cuda else 32):  # 128 images of ViT-B/16 take 27 GB in float32
            logits = model.logit_scale.exp() * mgclip.cosine(plain_images(model, images[rows]), leaf)
            logits[:, :-10] = -torch.inf
            loss = F.cross_entropy(logits, labels[rows].to(leaf.device) + len(tokens) - 10, reduction="sum")
            (loss / len(batch)).backward()
            losses.append(loss.detach())
        texts.backward(leaf.grad)
        optimizer.step()
        torch.clear_autocast_cache()  # it keeps bf16 copies of A and B, now out of date
    return torch.stack(losses).sum().item() / len(labels)


def plain_head(model, images, labels, encode=plain_images):
    """Prototypes, then what `fit_head` does, with the frozen encoder in every step."""
    encoded = torch.no_grad()(lambda batch: encode(model, images[batch]))
    features = torch.cat([encoded(batch) for batch in torch.arange(len(labels)).split(128)])
    head = mgclip.CosineHead(features.shape[1])
    head.add_classes(mgclip.class_prototypes(features, labels))
    optimizer = torch.optim.Adam([head.weight], 5e-4)
    batches = [batch for _ in range(3) for batch in torch.randperm(len(labels)).split(64)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches), eta_min=5e-6)
    for batch in batches:
        loss = F.cross_entropy(head(encoded(batch)), labels[batch].to(features.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.weight.detach()


def evaluation(model, head, images, labels, tokens, batch_size=128):  # the texts are encoded with every batch
    batches = zip(images.split(batch_size), labels.split(batch_size))
    return [mgclip.evaluate(model, head, [batch], tokens, 4.0)["accuracy"] for batch in batches]


def pixels_by_pillow(model, images, normalised_pixels=mgclip.normalised_pixels):  # this one, before it is patched
    """`normalised_pixels` of images that Pillow has resized, on all processors."""
    resize = mgclip.preprocess(model.visual.input_resolution)
    with ThreadPoolExecutor() as pool:
        resized = pool.map(lambda image: resize(mgclip.Image.fromarray(image.permute(1, 2, 0).numpy())), images)
    return normalised_pixels(model, torch.stack([*resized]))


def our_head(model, images, labels):
    features = mgclip.extract_features(model, images)
    head = mgclip.CosineHead(features.shape[1])
    head.add_classes(mgclip.class_prototypes(features, labels))
    mgclip.fit_head(head, features, labels)
    return head.weight.detach()


our_epoch = lambda model, lora, images, labels, tokens: mgclip.finetune(model, lora, images, labels, tokens[-10:], 1)[0]
at_once = patch.object(mgclip, "images_at_once", lambda model: 64)
all_tokens = patch.object(mgclip, "encode_images", plain_images)
by_clip = patch.multiple(mgclip, encode_images=plain_images, encode_texts=plain_texts, images_at_once=lambda model: 128)
by_pillow = patch.object(mgclip, "normalised_pixels", pixels_by_pillow)
PLAIN = (AddedLoRA, plain_images, plain_epoch, plain_head, by_clip(evaluation))
OURS = (mgclip.KeyValueLoRA, mgclip.extract_features, our_epoch, our_head, partial(evaluation, batch_size=10**6))


def prepared(form, name, images, labels, tokens, device="cpu", compile=False):
    """(model, lora, [training, head, evaluation]): a task after the first, so that no gap is measured."""
    attention, _, epoch, learn_head, score = form
    torch.manual_seed(0)  # the same values in both forms
    model = mgclip.clip.model.CLIP(*SHAPES[name]).eval().to(device)
    with patch.object(mgclip, "KeyValueLoRA", attention):
        lora = mgclip.add_lora(model)
    if compile:
        for block in model.visual.transformer.resblocks:
            block.compile()
    data, head = (images, labels), partial(mgclip.cosine, b=torch.randn(len(tokens), SHAPES[name][0]).to(device))
    training, scoring = partial(epoch, model, lora, *data, tokens), partial(score, model, head, *data, tokens)
    return model, lora, [training, partial(learn_head, model, *data), scoring]


def check_that_both_compute_the_same(images, labels, tokens):
    """On the tiny CLIP, in float32: loss and gradients of the first step, then head, accuracy and features."""
    results = []
    for form in (PLAIN, OURS):
        model, lora, works = prepared(form, "tiny", images, labels, tokens)
        for p in lora:
            torch.nn.init.normal_(p, std=0.1)  # B too, which begins at zero
        results.append([[work() for work in works], [p.grad for p in lora], form[1](model, images)])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def protocol(model, lora, tokens):
    """CIFAR-100's: a search of two epochs that finds E = 1, ten tasks of 5,000 images and 1,000 to score, analyses."""
    draw = lambda n: (torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8), torch.arange(n) % 10)
    head, tests = mgclip.CosineHead(model.text_projection.shape[1]), []
    mgclip.find_epochs(model, lora, *draw(5000), tokens[:10], alpha=1e9, max_epochs=2)
    for seen in range(10, 101, 10):
        images, labels = draw(5000)
        our_epoch(model, lora, images, labels, tokens[:seen])
        head.add_classes(our_head(model, images, labels))
        tests.append(draw(1000))
        mgclip.evaluate(model, head, tests, tokens[:seen], 4.0)
    mgclip.analyse(model, head, tests, tokens)


def benchmark():
    parser = argparse.ArgumentParser(description="The speed of mgclip.py: saving by saving, and beside the plain form.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: bf16 on cuda, else fp32")
    parser.add_argument("--model", default="ViT-B/16", choices=SHAPES)
    parser.add_argument("--images", type=int, help="to learn and to score, 10 or more; default: 5000 on cuda, else 64")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--compile", action="store_true", help="the image blocks of both forms")
    options = parser.parse_args()
    device, cuda = torch.device(options.device), options.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device.index or 0)  # what is synchronised, and whose memory is read
    precision = options.precision or ("bf16" if cuda else "fp32")
    N = options.images or (5000 if cuda else 64)
    data = torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8), torch.arange(N) % 10
    tokens = mgclip.clip.tokenize([f"a good photo of a {name}." for name in mgclip.IMAGENET_NAMES[:100]])
    check_that_both_compute_the_same(*(x[:24] for x in data), tokens[:30])
    options_of_task = options.model, *data, tokens[:50], device, options.compile  # the fifth of ten
    model, lora, ours = prepared(OURS, *options_of_task)
    plain = prepared(PLAIN, *options_of_task)[-1]
    training = partial(our_epoch, model, lora, *data)
    float32 = torch.autocast(device.type, enabled=False)
    fp32 = [float32(work) for work in ours]
    texts = lambda encode, tokens: lambda: encode(model, tokens).sum().backward()
    own_texts, one_pass = texts(mgclip.encode_texts, tokens[:10]), partial(mgclip.extract_features, model, data[0])
    stages = ("training", "prototypes and head", "evaluation")
    rows = [
        *((f"{stage}: plain, ours", [a], [b]) for stage, a, b in zip(stages, plain, ours)),
        ("a task after the first, these three: plain, ours", plain, ours),
        ("training: at 100 classes seen, at 10", [partial(training, tokens)], [partial(training, tokens[:10])]),
        ("the texts of a step: of 100 classes, of the task's 10", [texts(mgclip.encode_texts, tokens)], [own_texts]),
        ("the texts of a step: 77 tokens, cut to the longest prompt", [texts(plain_texts, tokens[:10])], [own_texts]),
        ("a pass, last block: all tokens, the class token", [all_tokens(one_pass)], [one_pass]),
        ("head: encoded in every step, once", [partial(plain_head, model, *data, mgclip.extract_features)], [ours[1]]),
    ]
    if N > 128:
        rows += [("evaluation: texts with every batch, once", [partial(ours[2], batch_size=128)], [ours[2]])]
    if not cuda:
        rows += [(f"training: 64 images at once, {mgclip.images_at_once(model)}", [at_once(ours[0])], [ours[0]])]
    if precision == "bf16":
        rows += [(f"{stage}: ours in fp32, in bf16", [a], [b]) for stage, a, b in zip(stages, fp32, ours)]
    if cuda:
        rows += [("a task in fp32: plain with Pillow, ours", [by_pillow(float32(work)) for work in plain], fp32)]
    n, products = (8192, 50) if cuda else (3072, 1)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    multiply = lambda: [a @ a for _ in range(products)]
    times = {ours[0]: [], multiply: []}  # after a training, so that the device is warm
    times |= {work: [] for _, *sides in rows for side in sides for work in side}
    order, peak = [*times] * (options.repeats + (cuda or options.compile)), {}  # a first turn warms up
    if cuda:
        whole = lambda: protocol(*prepared(OURS, *options_of_task)[:2], tokens)  # on a fresh model
        times[whole] = []
        order.append(whole)
    for work in mgclip.progress(order):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            work()
        if cuda:
            torch.cuda.synchronize()
            peak[work] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
        times[work].append(time.perf_counter() - began)
    total = lambda works: median(map(sum, zip(*(times[work][-options.repeats :] for work in works))))
    where = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    print(f"{options.model}, {N} images, batches of {min(N, 128)}, {precision}, {where}, torch {torch.__version__}")
    print(f"\n{'seconds':66}{'first':>9}{'second':>9}{'ratio':>8}")
    for what, first, second in rows:
        print(f"{what:66}{total(first):9.3f}{total(second):9.3f}{total(first) / total(second):8.2f}")
    rate = products * 2 * n**3 / total([multiply]) / 1e9
    print(f"\nmatrices of {n} x {n} are multiplied at {rate:,.0f} GFLOP/s")
    encode = lambda: mgclip.encode_images(model, data[0][:1])
    for what, work, one in (("training", ours[0], lambda: encode().sum().backward()), ("a pass", one_pass, encode)):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # flash attention is not counted
            one()
        gflop, speed = counter.get_total_flops() / 1e9, N / total([work])
        print(f"{what}: {speed:,.1f} images/s of {gflop:.1f} GFLOP, {speed * gflop / rate:.0%} of that rate")
    if cuda:
        print(f"peak memory of training, both models held: plain {peak[plain[0]]:.1f} GB, ours {peak[ours[0]]:.1f} GB")
        print(f"CIFAR-100's protocol, from making the model on: {times[whole][0]:.0f} s")


if __name__ == "__main__":
    benchmark()
