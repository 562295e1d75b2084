"""MG-CLIP: class-incremental learning with CLIP that preserves the modality gap, then compensates for it.

"Mind the Gap: Preserving and Compensating for the Modality Gap in CLIP-Based Continual Learning"
ICCV 2025, https://arxiv.org/abs/2507.09118

CLIP learns a sequence of classification tasks. Classes never overlap, old images are never seen again, and no task
label is given at test time. Training with cross-entropy moves the gap between images and texts, and CLIP forgets.
So train only for as long as the gap stays (lines 1-7), and regain the lost plasticity with images alone (lines 8-10):

    MG-CLIP(tasks D_1..D_T, CLIP f, alpha, beta)
     1  add rank-r LoRA to the key and value projections of every attention block of both encoders; freeze the rest
     2  neg_0 <- mean negative similarity of f on D_1                                                      Eq. 2
     3  for e = 1 .. max_epochs: train one epoch on D_1; neg_e <- Eq. 2; Δ_e <- |neg_e - neg_0| / |neg_0|  Eq. 3
     4      stop at the first Δ_e > alpha
     5  E <- max(last e whose Δ_e was still within alpha, 1); restore the untrained LoRA
     6  for t = 1 .. T:
     7      train the LoRA for E epochs on D_t, cross-entropy over the classes of task t only
     8      freeze f; append one row per new class to W_v, set to its class prototype
     9      train the new rows for 3 epochs on image features; older rows stay as they are
    10      score the test images of tasks 1..t: f_clip(x, t) + beta * softmax(W_v x)                      Eq. 5
    11      A_t <- accuracy over all classes seen so far
    12  report Avg = mean(A_1..A_T), Last = A_T

A `# line n` below marks the statement that is line n. Eq. 1 and 2 are in `similarity_gap`, 3 in `find_epochs`, 5 in
`fused_scores` (W_v is `CosineHead.weight`), 6 in `subspace_distance`. Parts: 1-6 the method, 7 baselines and analyses,
8 beyond the paper, 9 data, 10 results, 11 demo, 12 several processes, 13 command line. Three commands:

    python mgclip.py                                            a demo that downloads nothing: patterns, a tiny CLIP
    python mgclip.py --dataset cifar100 --alpha 0.1 --beta 4    the paper's CIFAR-100 with OpenAI's ViT-B/16
    python mgclip.py --dataset folder --data-root DIR --tasks 10    your own DIR/{train,test}/<class>/<images>
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import distributed as dist
from torch import nn
from torchvision import transforms
from tqdm import tqdm

with warnings.catch_warnings():  # clip's import of pkg_resources warns
    warnings.simplefilter("ignore")
    import clip

progress = partial(tqdm, leave=False, disable=None)  # None: no bar unless on a terminal

# 1 The modality gap ---------------------------------------------------------------------------------------------------


def cosine(a, b):
    """Cosine of every row of a (N, D) with every row of b (K, D): float32 (N, K), under autocast too."""
    with torch.autocast(a.device.type, enabled=False):  # bf16 numbers near 0.25 step by 0.002
        return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T


def similarity_gap(image_features, text_features, labels):
    """Mean cosine of images with the text of their own class (Eq. 1) and with those of all other classes (Eq. 2).

    image_features (N, D), text_features (K, D): float32, unit norm; labels (N,): int in [0, K).
    Returns (pos, neg), floats in [-1, 1], without temperature. Raises ValueError if K < 2.
    """
    N, K = len(image_features), len(text_features)
    if K < 2:
        raise ValueError(f"Eq. 2 needs the texts of at least two classes, not {K}")
    cos = cosine(image_features, text_features)  # (N, K)
    own = cos.gather(1, labels.to(cos.device, torch.long)[:, None])  # (N, 1)
    pos = own.mean()  # Eq. 1
    neg = (cos.sum() - own.sum()) / (N * (K - 1))  # Eq. 2
    return pos.item(), neg.item()


# 2 LoRA on keys and values --------------------------------------------------------------------------------------------


class KeyValueLoRA(nn.Module):
    """CLIP's attention with LoRA: k = W x + B_k A_k x / r, W being CLIP's own, and v alike; q stays as it is."""

    def __init__(self, attn, rank):
        super().__init__()
        d = attn.embed_dim
        self.attn = attn
        self.A_k = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, d)))
        self.A_v = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, d)))
        self.B_k = nn.Parameter(torch.zeros(d, rank))  # B = 0: before training, attention is as it was
        self.B_v = nn.Parameter(torch.zeros(d, rank))

    def forward(self, query, key, value, need_weights=False, attn_mask=None):
        """As nn.MultiheadAttention's: query (m, N, d), key and value (n, N, d) -> (m, N, d), None."""
        r = len(self.A_k)  # LoRA's scale is 1 / r (authors' code)
        W_q, W_k, W_v = self.attn.in_proj_weight.chunk(3)
        b_q, b_k, b_v = self.attn.in_proj_bias.chunk(3)
        q = F.linear(query, W_q, b_q)
        k = F.linear(key, W_k, b_k) + F.linear(key @ self.A_k.T, self.B_k / r)
        v = F.linear(value, W_v, b_v) + F.linear(value @ self.A_v.T, self.B_v / r)
        with torch.autocast("cpu", enabled=False):  # a CPU's attention is slow in bf16, backwards above all
            y = F.scaled_dot_product_attention(self.heads(q), self.heads(k), self.heads(v), attn_mask)  # (N, h, m, d/h)
        y = y.permute(2, 0, 1, 3).flatten(2)  # (m, N, d)
        return self.attn.out_proj(y), None

    def heads(self, x):
        """(n, N, d) -> (N, heads, n, d / heads)"""
        x = x if x.is_cuda else x.float()
        return x.unflatten(2, (self.attn.num_heads, -1)).permute(1, 2, 0, 3)


def add_lora(model, rank=8):
    """Add LoRA to the key and value projections of both encoders, in place, and freeze everything else (line 1).

    model: a `clip.model.CLIP` with a ViT image encoder; a `KeyValueLoRA` takes the place of each block's `attn`.
    Returns [A_k, B_k, A_v, B_v] per block, image blocks first, then text; A (r, d) Xavier-uniform, B (d, r) zero. On
    ViT-B/16, rank 8, they have 491,520 entries; with the head's 100 x 512 that is the paper's 0.54M. No q, no MLP.
    Raises ValueError if the model is not in float32, as clip.load leaves it on a GPU.
    """
    if model.dtype != torch.float32:
        raise ValueError(f"LoRA trains in float32, and the model is in {model.dtype}: call model.float() first")
    model.requires_grad_(False)
    lora = []
    for block in [*model.visual.transformer.resblocks, *model.transformer.resblocks]:
        block.attn = KeyValueLoRA(block.attn, rank).to(block.attn.in_proj_weight)
        lora += [block.attn.A_k, block.attn.B_k, block.attn.A_v, block.attn.B_v]
    return lora


# 3 CLIP features ------------------------------------------------------------------------------------------------------


def encode_images(model, images):
    """Image features: uint8 (N, 3, H, W) of any size -> (N, D) float32, unit norm, on the model's device.

    As CLIP's `encode_image`, but of the last block only the class token is computed: no other is read.
    """
    vit = model.visual
    x = vit.conv1(normalised_pixels(model, images)).flatten(2).permute(2, 0, 1)  # (patches, N, d)
    x = torch.cat([vit.class_embedding.to(x.dtype).expand(1, len(images), -1), x])
    x = vit.ln_pre(x + vit.positional_embedding[:, None].to(x.dtype))  # (patches + 1, N, d)
    *blocks, last = vit.transformer.resblocks
    for block in blocks:
        x = block(x)
    y = last.ln_1(x)
    x = x[:1] + last.attn(y[:1], y, y, need_weights=False)[0]  # (1, N, d)
    x = x[0] + last.mlp(last.ln_2(x[0]))
    return F.normalize((vit.ln_post(x) @ vit.proj).float(), dim=-1)


def encode_texts(model, tokens):
    """Text features: int (K, 77) of `clip.tokenize` -> (K, D) float32, unit norm, on the model's device.

    As CLIP's `encode_text`, but cut to the longest prompt (about 12 of 77 tokens): attention is causal, so nothing
    behind the end-of-text token reaches the feature.
    """
    device = model.logit_scale.device
    end = tokens.argmax(-1)  # the end-of-text token has the highest number
    n = int(end.max()) + 1
    x = model.token_embedding(tokens[:, :n].to(device)) + model.positional_embedding[:n]  # (K, n, d)
    x = x.transpose(0, 1)  # CLIP's blocks take (n, K, d)
    causal = torch.full((n, n), -math.inf, device=device).triu(1)
    for block in model.transformer.resblocks:
        y = block.ln_1(x)
        x = x + block.attn(y, y, y, need_weights=False, attn_mask=causal)[0]
        x = x + block.mlp(block.ln_2(x))
    x = x[end.to(device), torch.arange(len(tokens), device=device)]  # (K, d)
    return F.normalize((model.ln_final(x) @ model.text_projection).float(), dim=-1)


def images_at_once(model):
    """As many images as a GPU is busy with, or as keep a CPU's widest activation, 4 d a token, within 8 MB."""
    if model.logit_scale.is_cuda:
        return 256
    tokens, d = model.visual.positional_embedding.shape
    return max(1, 2**23 // (tokens * 4 * d * 4))


@torch.no_grad()
def extract_features(model, images, desc="image features"):
    """`encode_images` without gradients, a chunk at a time: uint8 (N, 3, H, W) -> (N, D)."""
    chunks = progress(images.split(images_at_once(model)), desc=desc)
    return gathered(torch.cat([encode_images(model, chunk) for chunk in chunks]))


# 4 Preserve the gap ---------------------------------------------------------------------------------------------------


@contextmanager
def restored(lora):
    """Within it the LoRA may change; after it the LoRA is as it was."""
    before = [p.detach().clone() for p in lora]
    try:
        yield
    finally:
        for p, p_0 in zip(lora, before):
            p.data.copy_(p_0)


def mean_loss(losses, epoch):
    """Mean of an epoch's losses, read once for all steps. Raises FloatingPointError if it is not finite."""
    loss = torch.stack(losses).mean().item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"epoch {epoch}: the loss is {loss}; a smaller learning rate may help")
    return loss


def accumulate_gradients(model, lora, images, labels, tokens, batch, extra_loss=None):
    """The masked cross-entropy of one batch (n,) of image numbers; its gradients, summed over chunks, go to p.grad."""
    texts = encode_texts(model, tokens)  # (K, D), once a batch; older classes are masked, so they have no row here
    leaf = texts.detach().requires_grad_()  # the chunks' gradients gather here, then go through the text encoder once
    for p in (leaf, *lora):
        p.grad = torch.zeros_like(p)
    total = torch.zeros((), device=leaf.device)
    for rows, chunk in held_chunks(images, batch, images_at_once(model)):
        x = encode_images(model, chunk)  # (n, D)
        logits = model.logit_scale.exp() * cosine(x, leaf)  # (n, K)
        loss = F.cross_entropy(logits, labels[rows].to(x.device, torch.long, non_blocking=True))
        if extra_loss is not None:  # a baseline's; MG-CLIP has none
            loss = loss + extra_loss(x, leaf, logits, rows)
        loss = loss * len(rows) / len(batch)
        loss.backward()
        total += loss.detach()
    texts.backward(leaf.grad)
    for p in lora:
        summed(p.grad)
    return summed(total)


def train_epochs(
    model, lora, images, labels, tokens, epochs, lr=1e-3, batch_size=128, generator=None, extra_loss=None,
    after_step=None,
):  # fmt: skip
    """`finetune`, yielding (epoch, mean loss) after each epoch.

    Adam, cosine schedule stepped per epoch down to 1% of lr, no augmentation (authors' code).
    """
    optimizer = torch.optim.Adam(lora, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1), eta_min=0.01 * lr)
    for epoch in range(1, epochs + 1):
        losses = []
        batches = torch.randperm(len(labels), generator=generator).split(batch_size)
        for batch in progress(batches, desc=f"epoch {epoch}"):
            losses.append(accumulate_gradients(model, lora, images, labels, tokens, batch, extra_loss))
            optimizer.step()
            if after_step is not None:  # --null-space; MG-CLIP has none
                after_step()
            torch.clear_autocast_cache()  # it keeps bf16 copies of A and B, now out of date
        schedule.step()
        yield epoch, mean_loss(losses, epoch)


def finetune(model, lora, images, labels, tokens, epochs, **options):
    """Train the LoRA for `epochs` epochs on one task (line 7). Returns the mean loss of each epoch.

    lora: what `add_lora` returned; the same one goes on from task to task. images: uint8 (N, 3, H, W); labels (N,): int
    rows of tokens (K, 77), both of the current task alone. options: lr, batch_size, generator (of the images' order, on
    the CPU), extra_loss(x, texts, logits, rows), a baseline's loss to add, and after_step(), called after every step.
    Raises FloatingPointError, which names the epoch, if a loss is not finite.
    """
    return [loss for _, loss in train_epochs(model, lora, images, labels, tokens, epochs, **options)]


@torch.no_grad()
def measure_gap(model, images, labels, tokens):
    """(pos, neg) of a model on images and prompts (Eq. 1, Eq. 2), always in float32."""
    with torch.autocast(model.logit_scale.device.type, enabled=False):
        features = extract_features(model, images, desc="gap")
        return from_rank_0(similarity_gap(features, encode_texts(model, tokens), labels))


def find_epochs(model, lora, images, labels, tokens, alpha=0.1, max_epochs=10, **options):
    """The number of epochs that leaves the gap within alpha, found on the first task (lines 2-5, Eq. 3).

    Arguments as in `finetune`; alpha: the largest relative change of neg, 0.1 is 10%. neg is over all images given, and
    the learning-rate schedule over max_epochs, where that of the final runs is over E (authors' code).
    Returns (E, history): dicts of epoch, pos, neg, delta, from epoch 0 to the crossing one. Leaves lora as it found it.
    Raises ValueError if neg_0 is so near 0 that Δ means nothing.
    """
    pos, neg_0 = measure_gap(model, images, labels, tokens)  # line 2
    if abs(neg_0) < 1e-3:
        raise ValueError(f"neg_0 = {neg_0:.1e} is too near 0 for Eq. 3 to mean anything: fix E with --epochs")
    E, history = 1, [dict(epoch=0, pos=pos, neg=neg_0, delta=0.0)]
    with restored(lora):  # line 5: restore the untrained LoRA
        for e, _ in train_epochs(model, lora, images, labels, tokens, max_epochs, **options):  # line 3
            pos, neg = measure_gap(model, images, labels, tokens)
            delta = abs(neg - neg_0) / abs(neg_0)  # Eq. 3
            history.append(dict(epoch=e, pos=pos, neg=neg, delta=delta))
            if delta > alpha:
                break  # line 4
            E = e  # line 5: the last epoch still within alpha, and at least 1
    return E, history


# 5 Compensate for the gap ---------------------------------------------------------------------------------------------


def class_prototypes(features, labels):
    """Mean of the unit-norm features (N, D) of each class in labels (N,), int in [0, K), each with images -> (K, D)."""
    labels = labels.to(features.device)
    return torch.stack([features[labels == k].mean(0) for k in range(int(labels.max()) + 1)])


class CosineHead(nn.Module):
    """Cosine classifier in the visual space: W_v of Eq. 5, one row per class. Features (N, D) -> cosines (N, K)."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, dim))  # W_v (K, D)
        self.first_new = 0  # the rows from here on were added last

    def add_classes(self, prototypes):
        """Append one row per new class (line 8): prototypes (k, D), whose device the head goes to."""
        self.first_new = len(self.weight)
        self.weight = nn.Parameter(torch.cat([self.weight.detach().to(prototypes), prototypes]))

    def forward(self, features):
        return cosine(features, self.weight)  # no temperature (authors' code)


def fit_head(head, features, labels, epochs=3, lr=5e-4, batch_size=64, generator=None):
    """Train the rows of the head added last by cross-entropy on image features (line 9); older rows stay as they are.

    features (N, D): float32, computed once; labels (N,): int, indices into those rows.
    Adam, raw cosines as logits, cosine schedule stepped per batch down to 1% of lr (authors' code).
    Returns the mean loss of each epoch. Raises FloatingPointError as `finetune` does.
    """
    rows = head.weight[head.first_new :].detach().clone().requires_grad_()  # (k, D)
    labels = labels.to(rows.device, torch.long)
    optimizer = torch.optim.Adam([rows], lr)
    steps = epochs * math.ceil(len(features) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1), eta_min=0.01 * lr)
    history = []
    for epoch in range(1, epochs + 1):
        losses = []
        order = torch.randperm(len(features), generator=generator).to(rows.device)
        for batch in order.split(batch_size):
            loss = F.cross_entropy(cosine(features[batch], rows), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        history.append(mean_loss(losses, epoch))
    head.weight.data[head.first_new :] = rows.detach()
    return history


def fused_scores(text_logits, visual_cosines, beta=4.0):
    """f_clip(x, t) + beta * softmax(W_v x) (Eq. 5): text_logits (N, K), 100 * cos; visual_cosines (N, K) -> (N, K).

    f_clip is a softmax of the class probabilities (authors' code): both terms are then softmaxes of numbers in [-1, 1]
    and weigh about alike. Beside a single softmax, the head's, nearly flat over K classes, would change almost nothing.
    """
    return text_logits.softmax(-1).softmax(-1) + beta * visual_cosines.softmax(-1)


# 6 The algorithm ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, head, tests, tokens, beta):
    """Accuracy in per cent over all classes seen so far (lines 10 and 11).

    tests: an (images, labels) pair per task so far; tokens (K, 77): the prompts of all K classes seen.
    Returns accuracy by Eq. 5, by its text half and by its visual half alone, over all images, each counted alike
    (authors' code); and per_task, Eq. 5's on each task.
    """
    texts = encode_texts(model, tokens)  # (K, D), once for all images
    fused, text, visual = [], [], []  # a tensor per task: which images are named right
    for images, labels in tests:
        features = extract_features(model, images, desc="test images")  # (N, D)
        labels = labels.to(features.device)
        text_logits = model.logit_scale.exp() * cosine(features, texts)  # (N, K)
        visual_cosines = head(features)  # (N, K)
        fused.append(fused_scores(text_logits, visual_cosines, beta).argmax(1) == labels)  # line 10
        text.append(text_logits.argmax(1) == labels)
        visual.append(visual_cosines.argmax(1) == labels)
    A_t, A_text, A_visual = (percent(torch.cat(right)) for right in (fused, text, visual))  # line 11
    per_task = [percent(right) for right in fused]
    return dict(accuracy=A_t, text_accuracy=A_text, visual_accuracy=A_visual, per_task=per_task)


def run(config):
    """MG-CLIP, lines 1-12, on the tasks of a data set. config: what `parse` returns (--runs and --plot are `start`'s).

    Returns the `end` event of metrics.jsonl: a dict with accuracy [A_1..A_T], avg, last, epochs and the analyses.
    Raises ValueError, OSError or FloatingPointError, with a message, for what the user can cause.
    """
    model = in_turn(load_clip, config.model, config.device, config.compile, config.gelu)
    tasks = in_turn(open_tasks, config, model.visual.input_resolution)
    names = [[train.names[c] for c in classes] for train, _, classes in tasks]
    tokens = class_tokens(config.template, sum(names, []), config.data_root)  # (K, 77), in the order of the tasks
    log = Log(config, model, names)

    torch.manual_seed(config.seed)  # of the LoRA's first values
    generator = torch.Generator().manual_seed(config.seed)  # of the order of the images
    autocast = torch.autocast(model.logit_scale.device.type, torch.bfloat16, enabled=config.precision == "bf16")
    lora_options = dict(lr=config.lr, batch_size=config.batch_size, generator=generator)
    head_options = dict(lr=config.head_lr, batch_size=config.head_batch_size, generator=generator)

    lora = add_lora(model, config.rank)  # line 1
    head, null_space = head_and_null_space(model, config)  # in MG-CLIP a CosineHead and None
    done, E = log.restore(lora, head, null_space, generator)  # E: found before, fixed by --epochs, or None: to be found
    others = load_zeroshot(config, model.visual.input_resolution)
    if done == 0:
        log.zeroshot(0, model, others)

    K, tests = 0, []  # how many classes, and (test images, labels), of tasks 1..t
    for t, (train, test, classes) in enumerate(tasks, 1):  # line 6
        first, K = K, K + len(classes)  # the task's classes are those from first to K
        test_images, test_labels = load_images(test, classes, f"task {t}, test", config.workers)
        tests.append((test_images, test_labels + first))
        if t <= done:
            continue
        images, labels = load_images(train, classes, f"task {t}, train", config.workers)
        if len(labels) == 0:
            raise ValueError(f"task {t}: its training images are gone")
        task = (images, labels, tokens[first:K])
        if null_space and t > 1:
            null_space.begin_task(generator)
            lora_options["after_step"] = null_space.project

        with autocast:
            lora_options["extra_loss"] = baseline_loss(model, lora, *task, config.align, config.distill)  # else None
            if E is None or config.search == "each":  # lines 2-5
                E, history = find_epochs(model, lora, *task, config.alpha, config.max_epochs, **lora_options)
                log.search(t, history, E)
            finetune(model, lora, *task, E, **lora_options)  # line 7
            features = extract_features(model, images)  # (N, D); line 8: from here on f stands still
        if config.head == "ridge":
            head.learn(features, labels)
        else:
            head.add_classes(class_prototypes(features, labels))  # line 8
            fit_head(head, features, labels, config.head_epochs, **head_options)  # line 9
        with autocast:
            scores = evaluate(model, head, tests, tokens[:K], config.beta)  # lines 10, 11
        with torch.no_grad():
            pos, neg = similarity_gap(features, encode_texts(model, tokens[:K]), labels + first)

        encoded = (E + 1) * len(labels) + sum(len(labels) for _, labels in tests)
        log.task(t, encoded, classes_seen=K, **scores, pos=pos, neg=neg, epochs=E)
        log.zeroshot(t, model, others)
        if null_space:
            null_space.remember(images, tokens[first:K])
        log.save(t, E, lora, head, null_space, generator)
        del images, task  # before the next task is decoded

    analysis = analyse(model, head, tests, tokens[:K])
    return log.end(analysis, sum(p.numel() for p in lora) + head.weight.numel())  # line 12


# 7 The paper's baselines and analyses ---------------------------------------------------------------------------------


def baseline_loss(model, lora, images, labels, tokens, align, distill):
    """What --align and --distill add to the loss on one task, for `finetune`'s extra_loss; None in MG-CLIP."""
    if not (align or distill):
        return None
    with torch.no_grad(), restored(lora):  # the CLIP that nothing has trained yet: ΔW = B A / r = 0
        for p in lora:
            p.zero_()
        features = extract_features(model, images, desc="untouched CLIP")
        logits_0 = model.logit_scale.exp() * cosine(features, encode_texts(model, tokens))  # (N, K)

    def extra_loss(x, texts, logits, rows):  # (n, D), (K, D), (n, K), and (n,): the images' numbers in the task
        own = texts[labels[rows].to(texts.device)]  # (n, D)
        distance = (x - own).square().sum(1).mean()  # Fig. 2b: an image and its own text are made to meet
        log_p = (logits / 2).log_softmax(1)  # temperature T = 2
        log_p_0 = (logits_0[rows.to(x.device)] / 2).log_softmax(1)
        kl = F.kl_div(log_p, log_p_0, reduction="batchmean", log_target=True)  # Table 5: its logits are kept
        return align * distance + distill * 2**2 * kl

    return extra_loss


def percent(right):
    """Per cent of the True in a bool tensor; None if it is empty."""
    return 100 * right.sum().item() / len(right) if len(right) else None


@torch.no_grad()
def zeroshot_accuracy(model, images, labels, tokens):
    """Table 2: per cent of the images of a data set not learned that the text classifier names right."""
    features = extract_features(model, images, desc="zero-shot")
    predicted = cosine(features, encode_texts(model, tokens)).argmax(1)
    return percent(predicted.cpu() == labels)


def subspace_distance(B_1, B_2):
    """d(B_1, B_2): mean length of what of the columns of B_1 (D, k) is outside B_2 (D, l), both orthonormal (Eq. 6)."""
    outside = B_1 - B_2 @ (B_2.T @ B_1)  # (D, k): x - B Bᵀ x of every x
    return outside.norm(dim=0).mean().item()


@torch.no_grad()
def analyse(model, head, tests, tokens):
    """Tables 4 and 5, on all test images: pos, neg, and how far the images' space is from each classifier's.

    Bases by SVD: B_t of the text features, B_vc of W_v, B_t+vc of both; B_i of the image features, cut to as many
    leading directions as there are classes. The cut is our choice: the supplement that says how is not at hand.
    """
    features = torch.cat([extract_features(model, images, desc="analysis") for images, _ in tests])  # (N, D)
    texts = encode_texts(model, tokens)  # (K, D)
    W_v = F.normalize(head.weight, dim=-1)  # (K, D)
    pos, neg = similarity_gap(features, texts, torch.cat([labels for _, labels in tests]))
    basis = lambda rows: torch.linalg.svd(rows, full_matrices=False).Vh.T  # (D, min(n, D)) of rows (n, D)
    B_i = basis(features)[:, : len(texts)]
    result = dict(pos=pos, neg=neg)
    for name, rows in (("t", texts), ("vc", W_v), ("t+vc", torch.cat([texts, W_v]))):
        result[f"d(B_i, B_{name})"] = subspace_distance(B_i, basis(rows))
    return result


def forgetting(per_task):
    """(forgetting, backward transfer), in points, of the rows a_t = [a_t1 .. a_tt]: accuracy on each task after task t.

    Means over the earlier tasks j of max_{t<T} a_tj - a_Tj (Chaudhry et al. 2018) and of a_Tj - a_jj (Lopez-Paz and
    Ranzato 2017); 0 while there is one task. Tasks whose test images are gone (None) do not count.
    """
    *before, last = per_task
    lost, gained = [], []
    for j in range(len(before)):
        if last[j] is not None:
            scored = [row[j] for row in before[j:] if row[j] is not None]  # after task j, after the next, ..
            lost.append(max(scored) - last[j])
            gained.append(last[j] - scored[0])
    return mean(lost or [0.0]), mean(gained or [0.0])


# 8 Beyond the paper ---------------------------------------------------------------------------------------------------


class RidgeHead(CosineHead):
    """--head ridge, in the place of lines 8 and 9: W = (XᵀX + λI)⁻¹XᵀY over all training images so far.

    X (N, D): their unit-norm features; Y (N, K): a one in the column of each image's class. Only XᵀX and XᵀY are kept:
    nothing is trained, no row grows stale, and while f stands still the order of the tasks does not matter.
    """

    def __init__(self, dim, ridge=1.0):
        super().__init__(dim)
        self.ridge = ridge
        self.sums = [torch.zeros(dim, dim, dtype=torch.double), torch.zeros(dim, 0, dtype=torch.double)]

    def learn(self, features, labels):
        """Solve anew with a task more: features (N, D), and labels (N,) that count its classes from 0."""
        X = features.double().cpu()
        Y = F.one_hot(labels.long()).double()  # (N, k)
        XX, XY = self.sums
        XX = XX + X.T @ X  # (D, D)
        XY = torch.cat([XY, X.T @ Y], dim=1)  # (D, K)
        self.sums = [XX, XY]
        W = torch.linalg.solve(XX + self.ridge * torch.eye(len(XX), dtype=torch.double), XY)  # (D, K)
        self.weight = nn.Parameter(W.T.to(features))

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):
            return features @ self.weight.T  # x W takes the place of the cosines in Eq. 5


class NullSpace:
    """--null-space RHO: a task's LoRA leaves alone what the keys and values of earlier tasks were made of.

    The idea of GNSP (arXiv 2507.19839) on MG-CLIP's LoRA. Of every block it keeps the uncentred second moments (d, d)
    of what enters keys and values; the leading directions that hold 1 - RHO of their energy are closed to later tasks.
    """

    def __init__(self, model, rho):
        self.model, self.rho = model, rho
        self.attns = [module for module in model.modules() if isinstance(module, KeyValueLoRA)]  # images' first
        self.weights = [attn.attn.in_proj_weight.data for attn in self.attns]  # (3 d, d), earlier tasks' LoRA folded in
        self.moments = [torch.zeros(2 * [W.shape[1]], dtype=torch.double) for W in self.weights]
        self.P = []  # a projection (d, d) per block, from the second task on

    @torch.no_grad()
    def remember(self, images, tokens):
        """Add the moments of a task: of all tokens of its images (N, 3, H, W), and of its prompts, tokens (K, 77)."""
        new = {attn: torch.zeros_like(M) for attn, M in zip(self.attns, self.moments)}

        def add(attn, inputs):
            x = inputs[1].flatten(0, 1)  # (n N, d): the keys' input
            new[attn] += (x.T @ x).double().cpu()

        hooks = [attn.register_forward_pre_hook(add) for attn in self.attns]
        extract_features(self.model, images, desc="moments")
        for M in new.values():
            summed(M)
        encode_texts(self.model, tokens)  # every process has all prompts
        for hook in hooks:
            hook.remove()
        self.moments = [M + new[attn] for attn, M in zip(self.attns, self.moments)]

    @torch.no_grad()
    def begin_task(self, generator):
        """Fold B A / r into the frozen weights, and start a fresh LoRA in what earlier tasks leave free."""
        self.P = []
        for attn, W, M in zip(self.attns, self.weights, self.moments):
            _, W_k, W_v = W.chunk(3)  # views
            W_k += attn.B_k @ attn.A_k / len(attn.A_k)
            W_v += attn.B_v @ attn.A_v / len(attn.A_v)
            energy, directions = torch.linalg.eigh(M)  # ascending
            share = energy.cumsum(0) / energy.sum()
            closed = directions[:, share > self.rho]  # (d, n)
            P = torch.eye(len(M), dtype=torch.double) - closed @ closed.T
            self.P.append(P.to(W))
            for A, B in ((attn.A_k, attn.B_k), (attn.A_v, attn.B_v)):
                A.copy_(nn.init.xavier_uniform_(torch.empty(A.shape), generator=generator))
                B.zero_()
        self.project()

    @torch.no_grad()
    def project(self):
        """A <- A P: then B A x = 0 for every x in the closed directions."""
        for attn, P in zip(self.attns, self.P):
            attn.A_k.copy_(attn.A_k @ P)
            attn.A_v.copy_(attn.A_v @ P)


def head_and_null_space(model, config):
    """The head, and the null space or None, of --head and --null-space."""
    D = model.text_projection.shape[1]
    head = RidgeHead(D, config.ridge) if config.head == "ridge" else CosineHead(D)
    null_space = NullSpace(model, config.null_space) if config.null_space > 0 else None
    return head, null_space


def gone_tasks(config, root, done):
    """--add: the tasks of a data set that was learned and whose images are gone, by the names that the run recorded."""
    print(f"{root} is gone: its test images are not scored")
    sizes = config.tasks.split(",")
    n = len(sizes) if len(sizes) > 1 else int(sizes[0])
    if done:  # an added folder
        n = 1
    tasks = []
    for names in config.classes[done : done + n]:
        nothing = argparse.Namespace(names=names, targets=[])
        tasks.append((nothing, nothing, range(len(names))))
    return tasks


# 9 Data and weights ---------------------------------------------------------------------------------------------------

# the authors' orders: CIFAR-100's in torchvision's class numbers, ImageNet-R's in those of its sorted synsets
CIFAR100_ORDER = [int(c) for c in """
    87 0 52 58 44 91 68 97 51 15 94 92 10 72 49 78 61 14 8 86 84 96 18 24 32 45 88 11 4 67 69 66 77 47 79 93 29 50 57
    83 17 81 41 12 37 59 25 20 80 73 1 28 6 46 62 82 53 9 31 75 38 63 33 74 27 22 36 3 16 21 60 19 70 90 89 43 5 42 65
    76 40 30 23 85 2 95 56 48 71 64 98 13 99 7 34 55 54 26 35 39""".split()]  # fmt: skip
IMAGENET_R_ORDER = [int(c) for c in """
    150 119 193 2 75 179 129 68 145 53 171 133 31 103 146 174 149 40 142 30 183 156 167 166 124 56 109 198 185 170 51
    55 77 32 45 23 115 39 134 177 12 126 130 37 19 34 0 135 161 108 128 18 141 24 154 160 78 85 89 73 152 112 114 104
    44 93 138 107 100 163 3 148 147 35 199 50 25 96 79 172 98 140 22 162 6 27 60 144 197 67 165 196 102 71 65 47 9 122
    42 63 61 180 97 84 157 168 69 41 83 92 190 191 59 72 111 155 105 57 17 116 13 28 43 136 5 14 169 7 62 110 189 95 8
    4 137 194 90 74 70 113 186 132 192 33 36 158 188 94 121 164 58 11 178 151 184 1 10 64 15 106 52 176 26 81 82 88 125
    46 123 91 187 86 20 76 80 66 120 131 16 159 101 87 99 195 143 21 49 38 181 29 153 54 173 127 117 182 139 118 48
    175""".split()]  # fmt: skip
VTAB_NAMES = (  # that the authors give to VTAB's folders 0 to 49
    "airplane,airport,baseball diamond,basketball court,beach,bridge,chaparral,church,circular farmland,cloud,banded,"
    "blotchy,braided,bubbly,bumpy,chequered,cobwebbed,cracked,crosshatched,crystalline,Abyssinian Cat,American Bulldog,"
    "American Pit Bull Terrier,Basset Hound,Beagle,Bengal Cat,Birman,Bombay Cat,Boxer Dog,British Shorthair Cat,"
    "AnnualCrop,Forest,HerbaceousVegetation,Highway,Industrial,Pasture,PermanentCrop,Residential,River,SeaLake,petunia,"
    "wild pansy,primula,sunflower,pelargonium,bishop of llandaff,gaura,geranium,orange dahlia,pink-yellow dahlia"
).split(",")
IMAGENET_NAMES = torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"]  # Cardigan is a dog, cardigan a garment

COLUMNS = ("classes", "model", "tasks", "lr", "batch_size", "head_lr", "head_batch_size", "order", "paper")
PRESETS = {name: dict(zip(COLUMNS, row)) for name, *row in (
    # data set, classes   model       tasks  LoRA lr, batch  head lr, batch  order of classes  the paper's Avg, Last
    ("patterns",    64,   "tiny",     "8",   5e-3, 64,       5e-4, 64,       "1993",           None),
    ("cifar100",    100,  "ViT-B/16", "10",  1e-3, 128,      5e-4, 64,       CIFAR100_ORDER,   "87.00 / 80.57"),
    ("imagenet-r",  200,  "ViT-B/16", "10",  1e-3, 64,       5e-4, 32,       IMAGENET_R_ORDER, "87.58 / 82.67"),
    ("imagenet100", 100,  "ViT-B/16", "10",  5e-4, 128,      1e-3, 128,      "1993",           "87.31 / 78.38"),
    ("imagenet1k",  1000, "ViT-B/16", "10",  1e-3, 128,      5e-4, 64,       "1993",           "81.88 / 73.68"),
    ("vtab",        50,   "ViT-B/16", "5",   1e-3, 128,      5e-4, 64,       "natural",        "94.67 / 91.53"),
    ("folder",      None, "ViT-B/16", "10",  1e-3, 128,      5e-4, 64,       "natural",        None),
)}  # fmt: skip


def split_classes(config, K):
    """The class numbers of every task, in the order official (the data set's), natural (as listed) or of a seed."""
    order = PRESETS[config.dataset]["order"] if config.class_order == "official" else config.class_order
    if order == "natural":
        order = range(K)
    elif isinstance(order, str):
        order = np.random.RandomState(int(order)).permutation(K)
    elif len(order) != K:
        raise ValueError(f"--class-order official is of {len(order)} classes, the data holds {K}: natural or a seed?")
    sizes = [int(size) for size in config.tasks.split(",")]
    if len(sizes) == 1:  # 10: ten tasks
        tasks = np.array_split(order, sizes[0])
    else:  # 4,8,16: three tasks of so many classes; what is left over is not learned
        tasks = np.split(order, np.cumsum(sizes))[:-1]
    if sum(sizes) > K or min(len(task) for task in tasks) < 2:
        raise ValueError(f"--tasks {config.tasks}: {K} classes do not give two classes in each, as Eq. 2 needs")
    return [task.tolist() for task in tasks]


def preprocess(size):
    """CLIP's own preprocessing but for `normalised_pixels`: a picture -> uint8 (3, size, size)."""
    resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
    crop, rgb = transforms.CenterCrop(size), lambda image: image.convert("RGB")
    return transforms.Compose([resize, crop, rgb, transforms.PILToTensor()])


def open_image(path):
    """A picture, by Pillow. Raises ValueError, naming the file, if it cannot be read."""
    with naming(f"{path}: cannot be read as an image"), Image.open(path) as image:
        image.load()
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image


class Folder(torchvision.datasets.ImageFolder):
    """ROOT/<class>/**/<images>, hidden ones left out; classes sorted by number if all are numbers, else as text."""

    def __init__(self, root, size):
        self.left_out = Counter()  # files that are no images, by suffix
        super().__init__(root, preprocess(size), loader=open_image, is_valid_file=self.is_image)
        left_out = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in self.left_out.items())
        print(f"{root}: {len(self):,} images of {len(self.classes)} classes; files left out: {left_out or 'none'}")

    def is_image(self, path):
        hidden = f"{os.sep}." in path[len(str(self.root)) :]
        image = path.lower().endswith(torchvision.datasets.folder.IMG_EXTENSIONS)
        if not hidden and not image:
            self.left_out[Path(path).suffix] += 1
        return image and not hidden

    def find_classes(self, root):
        classes = [c for c in super().find_classes(root)[0] if c[0] != "."]
        if all(c.isdecimal() for c in classes):
            classes.sort(key=int)
        return classes, {c: number for number, c in enumerate(classes)}


def class_names(root, folders):
    """As ROOT/classes.txt has them, <folder> <name> on a line, or ImageNet-1K for its synsets, or the folders' own."""
    listing = Path(root, "classes.txt")
    if listing.is_file():
        with naming(f"{listing}: is not UTF-8, or has no line '<folder> <name>' for a class"):
            lines = filter(str.strip, listing.read_text("utf-8-sig").splitlines())
            named = dict(line.strip().split("\t" if "\t" in line else " ", 1) for line in lines)
            return [named[folder] for folder in folders]
    if len(folders) in (100, 1000) and folders[99] == "n01855672":  # the hundredth synset
        return [name.replace("Cardigan", "Cardigan Welsh corgi") for name in IMAGENET_NAMES[: len(folders)]]
    return folders


def open_data(dataset, root, half, size):
    """A half (train, test, or zeroshot: a test half not to be learned) of a data set; nothing is decoded yet.

    Items are (uint8 image, class number), .targets the class numbers of all, .names the names of the classes.
    """
    option = "--zeroshot" if half == "zeroshot" else "--data-root"
    with naming(f"{option} {root}: {dataset}, {half}"):
        if dataset == "patterns":
            data, names = draw_split(half), PATTERNS
        elif dataset == "cifar100":  # at 32 x 32: `encode_images` resizes. The names keep torchvision's underscores
            data = torchvision.datasets.CIFAR100(root, half == "train", transforms.PILToTensor(), download=True)
            names = data.classes
        elif dataset in ("food101", "pets"):
            kind = dict(food101=torchvision.datasets.Food101, pets=torchvision.datasets.OxfordIIITPet)[dataset]
            data = kind(root, split="test", transform=preprocess(size), download=True)
            data.targets, names = data._labels, [c.replace("_", " ") for c in data.classes]
        else:
            choices = [Path(root, "train")] if half == "train" else [Path(root, "test"), Path(root, "val")]
            data = Folder(next(filter(Path.is_dir, choices), choices[0]), size)
            names = class_names(root, data.classes)
            if dataset == "vtab" and names == [str(c) for c in range(50)]:
                names = VTAB_NAMES
    data.names = names[: PRESETS.get(dataset, PRESETS["folder"])["classes"]]  # imagenet100: ImageNet-1K's first
    return data


def open_tasks(config, size):
    """Of every task: its training set, its test set, and the numbers of its classes in them."""
    tasks = []
    for dataset, root in [(config.dataset, config.data_root)] + [("folder", folder) for folder in config.add]:
        if config.add and dataset != "patterns" and not os.path.exists(root):
            tasks += gone_tasks(config, root, len(tasks))
            continue
        train, test = (open_data(dataset, root, half, size) for half in ("train", "test"))
        if train.names != test.names:
            raise ValueError(f"{root}: only in train/ or in test/: {set(train.names) ^ set(test.names)}")
        learned = {os.path.realpath(path) for path, _ in getattr(train, "samples", [])}
        for path, _ in getattr(test, "samples", []):
            if os.path.realpath(path) in learned:
                raise ValueError(f"{path}: is a training image, too")
        K = len(train.names)
        groups = [range(K)] if tasks else split_classes(config, K)  # an added folder is one task
        print(f"{K} classes, with prompts as '{config.template.replace('{}', train.names[0])}'")
        tasks += [(train, test, classes) for classes in groups]
    return tasks


def class_tokens(template, names, root):
    """The prompts of all classes (K, 77). Raises ValueError at one that is too long, or at two that are the same."""
    where = f"{root}/classes.txt or, without one, its folders"
    with naming(f"{where}: a class has no prompt that CLIP can read"):  # clip's own message says which
        tokens = clip.tokenize([template.replace("{}", name) for name in names])
    prompts = [tuple(prompt) for prompt in tokens.tolist()]
    count = Counter(prompts)
    twins = [name for name, prompt in zip(names, prompts) if count[prompt] > 1]
    if twins:
        raise ValueError(f"{where}: classes with one prompt, as CLIP reads it: {', '.join(twins)}")
    return tokens


def load_images(data, classes, desc, workers=None):
    """The images of some classes: uint8 (N, 3, H, W), and labels (N,) counting from 0 in classes."""
    targets = np.asarray(data.targets)
    members = [np.flatnonzero(targets == c) for c in classes]
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(rows) for rows in members]))
    rank, ranks = process()
    mine = np.concatenate(members)[rank::ranks].tolist()  # a process decodes its share, and has all labels
    if not mine:
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8), labels
    shape = (len(mine), *data[mine[0]][0].shape)
    file = tempfile.TemporaryFile()  # without a name: memory keeps what fits, and the disk is free after any end
    with naming(f"{tempfile.gettempdir()} (TMPDIR names another folder): no room for decoded images"):
        if hasattr(os, "posix_fallocate"):  # a full disk is named here, not in the middle of a task
            os.posix_fallocate(file.fileno(), 0, math.prod(shape))
        images = torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=shape))

    def decode(i):
        images[i] = data[mine[i]][0]

    with ThreadPoolExecutor(workers) as pool:  # Pillow lets go of Python's lock while it decodes
        list(progress(pool.map(decode, range(len(mine))), desc=desc, total=len(mine)))
    return images, labels


def load_zeroshot(config, size):
    """The (images, labels, tokens) of every --zeroshot data set, by its name."""
    others = {}
    for entry in config.zeroshot:
        name, _, folder = entry.partition("=")
        root = folder or config.data_root
        data = in_turn(open_data, name, root, "zeroshot", size)
        images, labels = load_images(data, range(len(data.names)), name, config.workers)
        others[name] = (images, labels, class_tokens(config.template, data.names, root))
    return others


def resize_and_crop(images, size):
    """`preprocess` on a tensor, as Pillow does it: (N, 3, H, W) -> (N, 3, size, size)."""
    H, W = images.shape[-2:]
    if H == W == size:
        return images
    short = min(H, W)
    h = int(size * H / short)
    w = int(size * W / short)
    for shape in ((H, w), (h, w)):  # width, then height, to 8 bits after each
        images = F.interpolate(images.float(), shape, mode="bicubic", antialias=True).add(0.5).floor().clamp(0, 255)
    return transforms.functional.center_crop(images, size)


PIXEL_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]  # CLIP's own, of pixels in [0, 1]
PIXEL_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def normalised_pixels(model, images):
    """CLIP's preprocessing on the model's device, with no augmentation: uint8 (N, 3, H, W) -> (N, 3, size, size)."""
    device = model.logit_scale.device
    if device.type == "cuda" and not images.is_cuda:
        images = images.pin_memory()  # so that the copy does not wait for the GPU
    pixels = resize_and_crop(images.to(device, non_blocking=True), model.visual.input_resolution) / 255
    return (pixels - PIXEL_MEAN.to(device, non_blocking=True)) / PIXEL_STD.to(device, non_blocking=True)


def load_clip(name_or_path, device="cpu", compile=False, gelu=False):
    """A CLIP with a ViT image encoder, in float32 and eval mode.

    name_or_path: a name of `clip.available_models()`, downloaded if need be; tiny, the demo's; a file: a state dict, or
    one of OpenAI's TorchScript archives (it may hold code: name none that you do not trust). compile: the image blocks;
    gelu: for weights trained with GELU, as most of OpenCLIP's, in the place of OpenAI's QuickGELU.
    Raises ValueError if there is no such model, or it cannot be read or is no ViT.
    """
    with naming(f"--device {device}: cannot be used here"):
        torch.empty(0, device=device)
    path = tiny_clip() if name_or_path == "tiny" else name_or_path
    with naming(f"--model {path}: not there (downloads go to ~/.cache/clip), cut short or no CLIP"):
        archive = zipfile.is_zipfile(path) and "/code/" in " ".join(zipfile.ZipFile(path).namelist())
        if os.path.isfile(path) and not archive:  # clip.load of openai/CLIP cannot read a state dict
            state = torch.load(path, map_location="cpu", weights_only=True)
            model = clip.model.build_model(dict(state)).float()
            model.load_state_dict({name: state[name] for name in model.state_dict()})  # build_model rounds to float16
        else:
            model, _ = clip.load(path, device="cpu")
    if not isinstance(model.visual, clip.model.VisionTransformer):
        raise ValueError(f"--model {path}: a ResNet encodes its images; the LoRA needs the attention of a ViT")
    if len(model.visual.class_embedding) in (1280, 1408, 1664):  # OpenCLIP's ViT-H, g and G
        raise ValueError(f"--model {path}: its heads are not of width 64, as all of CLIP's are")
    if gelu:
        for block in [*model.visual.transformer.resblocks, *model.transformer.resblocks]:
            block.mlp.gelu = nn.GELU()
    if compile:
        for block in model.visual.transformer.resblocks:
            block.compile()
    return model.float().eval().to(device)


@contextmanager
def naming(what):
    """Within it whatever goes wrong becomes a ValueError that says what it means to the user."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} ({error!s:.300})") from error


# 10 Results: log, checkpoint, predictions, picture --------------------------------------------------------------------


@contextmanager
def replacing(path):
    """A file to write in the place of path, which holds the old or the new content, never a part."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2).encode())


def model_sha256(model):
    """SHA-256 of a model's parameters, whatever file they came from."""
    digest = hashlib.sha256()
    for parameter in model.state_dict().values():
        digest.update(parameter.cpu().contiguous().numpy())
    return digest.hexdigest()


def read_checkpoint(folder, record):
    """What `Log.save` wrote last, or None. Raises ValueError where the record of its run differs from this one."""
    path = Path(folder, "checkpoint.pt")
    if not path.exists():
        return None
    with naming(f"{path}: cannot be read, is cut short or no checkpoint of mgclip"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        began = state["record"]
    may_change = "out resume add data_root model zeroshot device workers plot predict runs versions classes".split()
    for name in record.keys() - may_change:
        if record[name] != began.get(name):
            raise ValueError(f"{path}: is of a run with {name} {began.get(name)!r}, and now it is {record[name]!r}")
    for then, now in zip(began["classes"], record["classes"]):
        if then != now:
            raise ValueError(f"{path}: is of a run that learned the classes {then}, where now there are {now}")
    if record["versions"] != began["versions"]:
        print(f"{path}: began with {began['versions']}: late digits may differ", file=sys.stderr)
    return state


def load_parameters(state, lora, head, null_space):
    for p, saved in zip(lora, state["lora"], strict=True):
        p.data.copy_(saved)
    head.add_classes(state["head"].to(lora[0].device))
    head.sums = state["sums"]
    if null_space:
        null_space.moments, weights = state["null_space"]
        for W, saved in zip(null_space.weights, weights, strict=True):
            W.copy_(saved)


ROWS = dict(  # what the terminal shows of an event
    search="search: epoch {epoch:2d}   pos {pos:.4f}   neg {neg:.4f}   Δ {delta:.4f}",
    epochs="E = {epochs}",
    zeroshot="zero-shot {dataset}: {accuracy:.2f}",
    task="task {task:2d}   classes {classes_seen:4d}   A_t {accuracy:6.2f}   text {text_accuracy:6.2f}   visual "
    "{visual_accuracy:6.2f}   pos {pos:.4f}   neg {neg:.4f}   E {epochs:2d}   {seconds:.1f} s",
)


def new_folder(path):
    """Make the folder of a run. Raises ValueError if it is there and not empty."""
    with naming(f"--out {path}: must be a new or empty folder"):
        if path.is_dir():
            path.rmdir()  # refuses a folder that is not empty
        path.mkdir(parents=True)


class Log:
    """A run's folder (config.json, metrics.jsonl, checkpoint.pt), which process 0 writes, and its tables."""

    def __init__(self, config, model, names):
        """Make the run's folder, or take that of a run to go on with. names: those of every task's classes."""
        versions = {d.name: d.version for name in ("clip", "clip-anytorch") for d in distributions(name=name)}
        versions |= dict(python=sys.version.split()[0], torch=str(torch.__version__), threads=torch.get_num_threads())
        self.record = vars(config) | dict(model_sha256=model_sha256(model), versions=versions, classes=names)
        self.folder = Path(config.out)
        self.began = self.last = time.perf_counter()
        self.writes = process()[0] == 0
        if not self.writes:
            return
        if not config.resume:
            new_folder(self.folder)
        self.lock = open(self.folder / ".lock", "a")
        if os.name == "posix":  # the system lets go of the lock, however this process ends
            import fcntl

            with naming(f"{self.folder}: another process is at work on this run"):
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def restore(self, lora, head, null_space, generator):
        """Bring back what `save` wrote last, and write config.json and metrics.jsonl so far.

        Returns how many tasks are learned, 0 in a new run, and E or None.
        """
        saved = read_checkpoint(self.folder, self.record) if self.writes else None
        state = from_rank_0(saved) or dict(task=0, epochs=self.record["epochs"], events=[], seconds=0)
        if state["task"] > 0:
            load_parameters(state, lora, head, null_space)
            generator.set_state(state["generator"])
        self.began -= state["seconds"]
        self.events = state["events"]
        if self.writes:
            write_json(self.folder / "config.json", self.record)
            with replacing(self.folder / "metrics.jsonl") as file:
                file.writelines(json.dumps(event).encode() + b"\n" for event in self.events)
        return state["task"], state["epochs"]

    def save(self, task, epochs, lora, head, null_space, generator):
        """Replace checkpoint.pt."""
        state = dict(task=task, epochs=epochs, record=self.record, events=self.events, generator=generator.get_state())
        state |= dict(lora=[p.detach().cpu() for p in lora], head=head.weight.detach().cpu())
        state |= dict(seconds=time.perf_counter() - self.began, sums=getattr(head, "sums", None))
        state |= dict(null_space=null_space and (null_space.moments, null_space.weights))
        if self.writes:
            with replacing(self.folder / "checkpoint.pt") as file:
                torch.save(state, file)

    def write(self, event, **values):
        """Append to metrics.jsonl, and print a row if there is one for such an event."""
        self.events.append(dict(event=event, **values))
        self.last = time.perf_counter()
        if self.writes:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(self.events[-1]) + "\n")
        if event in ROWS:
            print(ROWS[event].format(**values), flush=True)

    def search(self, t, history, E):
        for entry in history:
            self.write("search", task=t, **entry)
        self.write("epochs", task=t, epochs=E, alpha=self.record["alpha"])
        if t == 1 and self.record["dataset"] == "cifar100":
            print("(published, with OpenAI's ViT-B/16: pos 0.2574, neg 0.1880 at first, E = 1)")

    def task(self, t, encoded, **values):
        """encoded: how many images were trained on or encoded, baselines aside, since the last event."""
        seconds = time.perf_counter() - self.last
        self.write("task", task=t, **values, seconds=seconds, images_per_second=encoded / seconds)

    def zeroshot(self, t, model, others):
        for name, other in others.items():
            self.write("zeroshot", dataset=name, task=t, accuracy=zeroshot_accuracy(model, *other))

    def end(self, analysis, trainable_parameters):
        tasks = [e for e in self.events if e["event"] == "task"]
        A, E = [e["accuracy"] for e in tasks], [e["epochs"] for e in tasks]
        lost, gained = forgetting([e["per_task"] for e in tasks])
        result = dict(avg=mean(A), last=A[-1], forgetting=lost, backward_transfer=gained, **analysis)  # line 12
        print("\n".join(f"{name:18} {value:8.4f}" for name, value in result.items()))
        paper = PRESETS[self.record["dataset"]]["paper"]
        if paper:
            print(f"the paper's Avg / Last: {paper}")
        result |= dict(accuracy=A, epochs=E if len(set(E)) > 1 else E[0], trainable_parameters=trainable_parameters)
        self.write("end", **result, seconds=time.perf_counter() - self.began)
        print(f"{trainable_parameters:,} trainable parameters\n{self.folder}")
        return self.events[-1] | dict(folder=str(self.folder))


def read_events(folder, kind):
    """The events of a kind in a run's metrics.jsonl."""
    lines = Path(folder, "metrics.jsonl").read_text().split("\n")
    events = [json.loads(line) for line in lines[:-1]]  # behind the last \n may be a line that was cut off
    return [e for e in events if e["event"] == kind]


@torch.no_grad()
def predict(config):
    """--predict: print the five best classes of every image by a run's last checkpoint. Returns the exit status.

    fused: Eq. 5; text: CLIP's probability of the class; visual: the cosine with its row of W_v.
    """
    model = load_clip(config.model, config.device, gelu=config.gelu)
    state = read_checkpoint(config.out, vars(config) | dict(model_sha256=model_sha256(model)))
    if state is None:
        raise ValueError(f"--resume {config.out}: no checkpoint yet (those of --runs lie in its folders)")
    lora = add_lora(model, config.rank)
    head, null_space = head_and_null_space(model, config)
    load_parameters(state, lora, head, null_space)
    names = sum(config.classes, [])[: len(head.weight)]
    texts = encode_texts(model, class_tokens(config.template, names, config.data_root))  # (K, D)
    images, status = {}, 0
    for path in progress(config.predict, desc="decoding"):
        try:
            images[path] = preprocess(model.visual.input_resolution)(open_image(path))
        except ValueError as error:
            print(f"mgclip: {error}", file=sys.stderr)
            status = 1
    print("image\trank\tclass\tfused\ttext\tvisual")
    if images:
        features = extract_features(model, torch.stack(list(images.values())))  # (N, D)
        text_logits, visual = model.logit_scale.exp() * cosine(features, texts), head(features)  # (N, K)
        fused, text = fused_scores(text_logits, visual, config.beta), text_logits.softmax(1)
    for i, path in enumerate(images):
        for rank, k in enumerate(fused[i].argsort(descending=True)[:5], 1):
            scores = f"{fused[i, k]:.4f}\t{text[i, k]:.4f}\t{visual[i, k]:.4f}"
            print(path, rank, names[k], scores, sep="\t")
    return status


def plot(folders):
    """Draw runs, one a row, into plot.png in the first one's folder: accuracy, search, similarity, forgetting."""
    from matplotlib import style  # nothing else needs it
    from matplotlib.figure import Figure

    style.use("tableau-colorblind10")
    figure = Figure(figsize=(13, 4.6 * len(folders)), dpi=110, layout="constrained")
    grid = figure.subplots(len(folders), 3, squeeze=False, sharey="col")
    for (left, middle, right), folder in zip(grid, folders):
        with naming(f"--plot {folder}: metrics.jsonl is not there, not a run's, or has no task yet"):
            tasks, search, scores, found = (read_events(folder, k) for k in ("task", "search", "zeroshot", "epochs"))
            E = tasks[0]["epochs"]
        search = [e for e in search if e["task"] == 1]
        seen, numbers = [e["classes_seen"] for e in tasks], [e["task"] for e in tasks]
        for name in ("accuracy", "text_accuracy", "visual_accuracy"):
            left.plot(seen, [e[name] for e in tasks], "o-", label=name)
        for name in dict.fromkeys(e["dataset"] for e in scores):
            own = [e["accuracy"] for e in scores if e["dataset"] == name]
            left.plot([0, *seen][: len(own)], own, "x--", label=f"zero-shot: {name}")
        left.set(title=f"{folder}\nTest images named right", xlabel="classes seen so far", ylabel="accuracy (%)")
        for name in ("pos", "neg"):
            ratios = [e[name] / search[0][name] for e in search]
            middle.plot([100 * (ratio - 1) for ratio in ratios], "o-", label=name)
            right.plot(numbers, [e[name] for e in tasks], "o-", label=name)
        alpha = 100 * found[0]["alpha"] if found else 0
        if alpha < 100:
            middle.axhspan(-alpha, alpha, alpha=0.1, label=f"alpha: {alpha:g}%")
        middle.axvline(E, color="grey", linestyle=":", label=f"E = {E}")
        middle.set(title="Search on the first task:\nhow far mean cosines move", xlabel="epoch", ylabel="change (%)")
        lost = [forgetting([e["per_task"] for e in tasks[:t]])[0] for t in numbers]
        right.twinx().plot(numbers, lost, "^:", color="grey")
        right.set(title="Similarity; in grey forgetting,\nin points", xlabel="task", ylabel="mean cosine")
        for axes in (left, middle, right):
            axes.legend()
            axes.xaxis.get_major_locator().set_params(integer=True)
    path = Path(folders[0], "plot.png")
    figure.savefig(path)
    return path


# 11 Demo --------------------------------------------------------------------------------------------------------------

COLOURS = dict(
    red=(220, 40, 40), orange=(240, 140, 30), yellow=(235, 220, 50), green=(50, 170, 70),
    blue=(50, 90, 220), purple=(140, 60, 190), pink=(245, 150, 190), brown=(120, 75, 40),
)  # fmt: skip
TEXTURES = ("stripes", "bands", "diagonals", "checks", "dots", "plain", "gradient", "grid")
PATTERNS = [f"{colour} {texture}" for colour in COLOURS for texture in TEXTURES]
TEMPLATES = ("a photo of a {}.", "a good photo of a {}.", "a picture of a {}.", "an image of {}.", "a {}.", "{}.")
# Spreads in pixel values, 0 to 255; brightness in parts of 1. context: how far a class's own background colour goes.
STYLE = dict(brightness=0.1, hue=15, background=(150, 210), tint=10, context=0, noise=50)
TASK_STYLE = STYLE | dict(context=20)  # what there is to learn, and what leads naive fine-tuning astray
SPLITS = dict(train=(80, TASK_STYLE, 1), test=(25, TASK_STYLE, 3), zeroshot=(25, STYLE, 2))  # pictures a class, seed


def draw_patterns(labels, style, generator):
    """32 x 32 pictures of the classes (N,) of PATTERNS, each with its own phase and frequency: uint8 (N, 3, 32, 32)."""
    N = len(labels)
    uniform = lambda *shape: torch.rand(N, *shape, generator=generator)
    normal = lambda *shape: torch.randn(N, *shape, generator=generator)
    y, x = torch.meshgrid(torch.arange(32) / 32, torch.arange(32) / 32, indexing="ij")  # (32, 32)
    frequency = 2 + 3 * uniform(1, 1)
    u = 2 * math.pi * (frequency * x + uniform(1, 1))  # (N, 32, 32)
    v = 2 * math.pi * (frequency * y + uniform(1, 1))
    ramp = torch.where(uniform(1, 1) < 0.5, x, 1 - x)
    masks = (  # in the order of TEXTURES: 1 where the colour is, 0 where the background is
        u.sin() > 0, v.sin() > 0, (u + v).sin() > 0, u.sin() * v.sin() > 0,
        u.cos() + v.cos() > 0.6, torch.ones_like(u), ramp, (u.cos() > 0.7) | (v.cos() > 0.7),
    )  # fmt: skip
    masks = torch.stack([mask.float() for mask in masks], 1)  # (N, 8, 32, 32)
    mask = masks[torch.arange(N), labels % 8][:, None]  # (N, 1, 32, 32)
    colour = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[labels // 8]  # (N, 3)
    colour = colour * (1 + style["brightness"] * (2 * uniform(1) - 1)) + style["hue"] * normal(3)
    low, high = style["background"]
    context = torch.randn(64, 3, generator=torch.Generator().manual_seed(7))[labels]  # always the same for a class
    background = low + (high - low) * uniform(1) + style["tint"] * normal(3) + style["context"] * context
    pictures = mask * colour[..., None, None] + (1 - mask) * background[..., None, None]
    pictures = pictures + style["noise"] * normal(3, 32, 32)
    return pictures.clamp(0, 255).to(torch.uint8)


def draw_split(split):
    """The pictures and class numbers of a half of the demo's data set: 8 colours x 8 textures."""
    n, style, seed = SPLITS[split]
    labels = torch.arange(64).repeat_interleave(n)
    data = torch.utils.data.TensorDataset(draw_patterns(labels, style, torch.Generator().manual_seed(seed)), labels)
    data.targets = labels
    return data


def pretrain_tiny(steps=500, per_class=2, lr=2e-3, seed=0):
    """A CLIP of 2-layer, width-64 towers, pre-trained by the contrastive loss with half of the captions wrong."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = clip.model.CLIP(64, 32, 2, 64, 8, 77, 49408, 64, 1, 2).eval()
    generator = torch.Generator().manual_seed(seed)
    model.token_embedding.requires_grad_(False)  # random words do as well, and save a fifth of the time
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    tokens = torch.stack([clip.tokenize([template.format(name) for name in PATTERNS]) for template in TEMPLATES])
    captions = torch.arange(64).repeat(per_class)  # (N,)
    for _ in progress(range(steps), desc="pre-training the tiny CLIP"):
        templates = torch.randint(len(TEMPLATES), (64,), generator=generator)
        others = torch.randint(64, captions.shape, generator=generator)
        wrong = torch.rand(captions.shape, generator=generator) < 0.5  # as on the web: what narrows CLIP's cone
        drawn = torch.where(wrong, others, captions)
        image_features = encode_images(model, draw_patterns(drawn, STYLE, generator))  # (N, D)
        text_features = encode_texts(model, tokens[templates, torch.arange(64)])  # (64, D)
        cos = image_features @ text_features.T  # (N, 64)
        logits = 50 * cos
        loss = F.cross_entropy(logits, captions) - logits.log_softmax(0).gather(1, captions[:, None]).mean()
        loss = loss + 10 * (cos.mean() - 0.2).square()  # a softmax leaves the mean cosine open: 0.2, as CLIP's
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.logit_scale.data.fill_(math.log(100))  # CLIP's own temperature, 1/100
    return model


def tiny_clip():
    """Path of the tiny CLIP in the cache folder of `clip`; pre-trains it first if it is not there."""
    path = Path.home() / ".cache" / "clip" / "mgclip-tiny-2.pt"  # a new number for a new recipe
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:  # opened first: pre-training takes a minute
            torch.save(pretrain_tiny().state_dict(), file)
    return str(path)


# 12 Several processes -------------------------------------------------------------------------------------------------

# With one process, as without torchrun, these hand back what they are given. With several, on one machine or more, all
# must call them; process r holds the images r, r + ranks, r + 2 ranks, .. of every task, and nobody holds all.


def process():
    """(rank, ranks): the number of this process and how many torchrun started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def held_chunks(images, batch, size):
    """Those of a batch (n,) of image numbers that this process holds: (numbers, images), at most `size` at a time."""
    rank, ranks = process()
    held = batch[batch % ranks == rank]
    for rows in held.split(size):
        if len(rows) > 0:
            yield rows, images[rows // ranks]


def summed(tensor):
    """The tensor, in place its sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gathered(mine):
    """The rows (N, D) of all processes, in the order of the images, from those of each."""
    rank, ranks = process()
    N = int(summed(mine.new_tensor(len(mine))))
    everything = mine.new_zeros(N, mine.shape[1])
    everything[rank::ranks] = mine
    return summed(everything)


def from_rank_0(value):
    """What process 0 has."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def in_turn(work, *arguments):
    """What work(*arguments) returns, in one process after the other: what the first downloads the others find."""
    rank, ranks = process()
    for turn in range(ranks):
        if turn == rank:
            result = work(*arguments)
        summed(torch.zeros(1))  # wait for it
    return result


# 13 Command line ------------------------------------------------------------------------------------------------------


def checked(kind, accept, meaning):
    """A type for argparse: kind(text), refused unless accept(value)."""

    def read(text):
        with suppress(ValueError):
            value = kind(text)
            if accept(value):
                return value
        raise argparse.ArgumentTypeError(f"{text}: must be {meaning}")

    return read


def absolute(entry):
    """food101, or NAME=FOLDER with the whole path of the folder: --resume may come from another one."""
    name, equals, folder = entry.partition("=")
    return name + equals + (folder and os.path.abspath(folder))


def parse(argv=None):
    """The options of a run, a Namespace; the preset of --dataset gives defaults, also to what --help prints."""
    parser = argparse.ArgumentParser(
        description="MG-CLIP. The paper's baselines: zero-shot --epochs 0 --beta 0; naive fine-tuning --epochs 10 "
        "--beta 0; compensation alone --epochs 10 --beta 4; preservation alone --beta 0.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    count = checked(int, lambda n: 1 <= n < 2**31, "a whole number of at least 1, below 2**31")
    whole = checked(int, lambda n: 0 <= n < 2**31, "a whole number of at least 0, below 2**31")
    weight = checked(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
    existing = checked(os.path.abspath, os.path.isdir, "a folder with train/CLASS/* and test/CLASS/*")
    share = checked(float, lambda x: 0 <= x < 1, "at least 0 and below 1")
    rate = checked(float, lambda x: 0 < x < math.inf, "a number above 0")
    sizes = checked(str, re.compile(r"[1-9]\d*(,[1-9]\d*)*").fullmatch, "10, or 4,8,16")
    order = checked(str, re.compile(r"official|natural|\d{1,9}").fullmatch, "official, natural or a seed")
    others = checked(absolute, re.compile("food101|pets|patterns|[^=]+=.+").fullmatch, "one of those in --help")
    prompt = checked(str, lambda text: text.count("{}") == 1, "a text with one {}, where the class name goes")
    add = parser.add_argument
    add("--dataset", default="patterns", choices=list(PRESETS), help="the data set; its preset fills in the defaults")
    add("--data-root", type=os.path.abspath, default="data", help="its folder; what torchvision has is put there")
    add("--tasks", type=sizes, help="number of tasks, or the classes in each: 4,8,16")
    add("--class-order", type=order, default="official", help="official, natural (as listed), or a NumPy seed")
    add("--zeroshot", type=others, default=[], nargs="+", help="scored, not learned: food101 pets patterns NAME=FOLDER")
    add("--model", help="name of a CLIP with a ViT, or a checkpoint file; tiny: the demo's own")
    add("--rank", type=count, default=8, help="LoRA rank r")
    add("--template", type=prompt, default="a good photo of a {}.", help="prompt; {} is the class name")
    add("--alpha", type=weight, default=0.1, help="largest relative change of the mean negative similarity, Eq. 3")
    add("--beta", type=weight, default=4.0, help="weight of the visual classifier, Eq. 5")
    add("--search", default="first", choices=["first", "each"], help="tasks that the epochs are searched on")
    add("--epochs", type=whole, help="fix E and skip the search; 0: CLIP untrained")
    add("--max-epochs", type=count, default=10, help="longest search, in epochs")
    add("--lr", type=rate, help="learning rate of the LoRA")
    add("--batch-size", type=count, help="images a step of the LoRA")
    add("--head-epochs", type=whole, default=3, help="epochs of the visual classifier on each task")
    add("--head-lr", type=rate, help="learning rate of the visual classifier")
    add("--head-batch-size", type=count, help="images a step of the visual classifier")
    add("--align", type=weight, default=0.0, help="weight of ‖image - text‖² of matched features, Fig. 2b")
    add("--distill", type=weight, default=0.0, help="weight of the KL from the untouched CLIP's logits, Table 5")
    add("--head", default="cosine", choices=["cosine", "ridge"], help="the visual classifier; ridge: in closed form")
    add("--ridge", type=rate, default=1.0, help="λ of --head ridge")
    add("--null-space", type=share, default=0.0, help="share of earlier tasks' energy that the LoRA may touch; 0: off")
    add("--gelu", action="store_true", help="GELU for QuickGELU: most weights of OpenCLIP")
    add("--seed", type=whole, default=0, help="seed of the LoRA's first values and of the images' order")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device of torch")
    add("--precision", choices=["fp32", "bf16"], help="None: bf16 on cuda, else fp32; a CPU wants AVX512-BF16 or AMX")
    add("--compile", action="store_true", help="torch.compile the image blocks but the last")
    add("--workers", type=count, help="threads that decode images; None: Python's default")
    add("--runs", type=count, help="this many class orders: --class-order, then the seeds 1, 2, ..")
    add("--out", help="the run's folder; None: runs/DATASET-ALPHA-BETA-SEED, numbered when taken")
    add("--resume", metavar="RUN", help="go on with a run that was cut off, with the options that it began with")
    add("--add", type=existing, nargs="+", action="extend", default=[], metavar="DIR", help="one task more each")
    add("--predict", nargs="+", metavar="IMAGE", help="the five best classes of each image, by the run of --resume")
    add("--plot", nargs="*", metavar="RUN", help="draw plot.png at the end; with RUNs: draw these, one a row")
    argv = sys.argv[1:] if argv is None else argv
    first = [word for word in argv if word not in ("-h", "--help")]  # help is to show the preset's defaults
    preset = PRESETS[parser.parse_known_args(first)[0].dataset]
    parser.set_defaults(**{name: preset[name] for name in COLUMNS if name not in ("classes", "order", "paper")})
    config = parser.parse_args(argv)
    given = {word.partition("=")[0] for word in argv if word.startswith("--")}
    if config.resume is not None:
        for option in given - {"--resume", "--add", "--predict", "--plot", "--device", "--data-root", "--workers"}:
            parser.error(f"{option} does not go with --resume: a run goes on with the options that it began with")
        with naming(f"--resume {config.resume}: is not the folder of a run"):
            began = json.loads(Path(config.resume, "config.json").read_text())
            if began["dataset"] not in PRESETS:
                raise ValueError(f"no data set {began['dataset']}")
            parser.set_defaults(**began | dict(out=config.resume))
        config = parser.parse_args(argv)
    elif config.predict or config.add:
        parser.error("--predict and --add need --resume RUN")
    elif config.dataset == "patterns" and "--data-root" in given:
        parser.error("--data-root: the demo draws its pictures; --dataset folder learns yours")
    if os.path.isfile(config.model):
        config.model = os.path.abspath(config.model)  # --resume may come from another folder
    if "--add" in given and config.predict:
        parser.error("--predict: in a command of its own, after that with --add")
    if config.plot and config.resume:
        parser.error("--plot RUN draws finished runs: without --resume")
    if config.runs and config.add:
        parser.error("--add goes with a single run: name one of the folders within")
    if config.search == "each" and config.epochs is not None:
        parser.error(f"--search each: nothing is searched, as --epochs {config.epochs} fixes E")
    if config.null_space and config.compile:
        parser.error("--null-space cannot see what enters compiled blocks: without --compile")
    if config.null_space and config.distill:
        parser.error("--distill needs the untouched CLIP, into which --null-space folds what is learned")
    if config.plot is not None and not find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib")
    config.precision = config.precision or ("bf16" if config.device.startswith("cuda") else "fp32")
    if config.out is None:
        base = f"runs/{config.dataset}-{config.alpha:g}-{config.beta:g}-{config.seed}"
        folders = [base, *(f"{base}-{n}" for n in range(2, 10_000))]
        config.out = next(folder for folder in folders if not os.path.exists(folder))
    return config


def run_orders(config):
    """--runs: a run for each class order, in a folder within --out. One that is finished is read, one begun goes on."""
    folder, results = Path(config.out), []
    if process()[0] == 0 and not config.resume:
        new_folder(folder)
        write_json(folder / "config.json", vars(config))
    seeds = [str(seed) for seed in range(1, config.runs + 1) if str(seed) != config.class_order]
    for order in [config.class_order, *seeds[: config.runs - 1]]:
        out = folder / f"order-{order}"
        ends = from_rank_0(read_events(out, "end") if (out / "metrics.jsonl").exists() else [])
        if not ends:
            options = dict(class_order=order, out=str(out), runs=None)
            options["resume"] = str(out) if (out / "config.json").exists() else None
            ends = [run(argparse.Namespace(**vars(config) | options))]
        results.append(ends[-1])
    summary = {}
    for name in ("avg", "last"):
        values = [result[name] for result in results]
        summary[name] = dict(mean=mean(values), deviation=stdev(values) if len(values) > 1 else 0.0, values=values)
        print(f"{name} of {len(values)} class orders: {{mean:.2f}} ± {{deviation:.2f}}".format(**summary[name]))
    if process()[0] == 0:
        write_json(folder / "summary.json", summary)


def start(config):
    """Run what the options ask for, in one of the processes of torchrun if it was started by that."""
    several = "WORLD_SIZE" in os.environ  # torchrun: on one machine or more; on GPUs a process each
    with naming(f"--device {config.device}: cannot be used here; every process needs a GPU of its own"):
        if several and config.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if several:
        backend = "cpu:gloo,cuda:nccl" if config.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # a download may be waited for
    if config.dataset == "patterns":
        torch.set_num_threads(1)  # on so small a model a second one waits more than it helps
    config.out = from_rank_0(config.out)
    result = run_orders(config) if config.runs else run(config)
    if config.plot is not None and process()[0] == 0:
        print(plot(sorted(Path(config.out).glob("order-*")) or [config.out]))
    return result


def main(argv=None):
    """The command line. Returns the exit status."""
    rank, stderr = int(os.environ.get("RANK", "0")), sys.stderr
    if rank > 0:  # process 0 speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Δ shows its number
    config = argparse.Namespace(out=None)
    try:
        config, status = parse(argv), 0
        if config.predict:
            status = predict(config)
        elif config.plot and not config.resume:
            print(plot(config.plot))
        else:
            start(config)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        message, status = f"error: {str(error) or 'out of memory'}", 2
    except RuntimeError as error:
        if "memory" in str(error):
            message, status = f"error: {error!s:.300}", 2
        elif dist.is_initialized() and "peer" in str(error):  # which has said why
            message, status = "another process of this run has stopped", 2
        else:
            raise
    if config.out and not config.predict and Path(config.out, "config.json").exists():
        message += f"; to go on: python mgclip.py --resume {config.out}"
    time.sleep(rank)  # torchrun ends the others as soon as one has said what is wrong
    print(f"mgclip: {message}", file=stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
