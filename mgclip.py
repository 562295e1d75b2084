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

A `# line n` below marks the statement that is line n. The equations:

    Eq. 1  pos = mean cos(image, text of its class)           similarity_gap
    Eq. 2  neg = mean cos(image, text of another class)       similarity_gap
    Eq. 3  Δ_e = |neg_e - neg_0| / |neg_0| <= alpha           find_epochs
    Eq. 5  f_clip(x, t) + beta * softmax(W_v x)               fused_scores, W_v is CosineHead.weight

Three commands:

    python mgclip.py                                            a demo that downloads nothing: patterns, a tiny CLIP
    python mgclip.py --dataset cifar100 --alpha 0.1 --beta 4    the paper's CIFAR-100 with OpenAI's ViT-B/16
    python mgclip.py --dataset folder --data-root DIR --tasks 10    your own DIR/{train,test}/<class>/<images>

Parts: 1 the modality gap, 2 LoRA, 3 CLIP features, 4 preserve the gap, 5 compensate, 6 the algorithm;
7 data and weights, 8 results (analyses, log, predictions, pictures), 9 demo, 10 several processes, 11 command line.
"""

import argparse
import hashlib
import inspect
import json
import math
import os
import platform
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import distributions
from importlib.util import find_spec
from itertools import chain, count, islice, product
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

# None: no bar unless on a terminal
progress = partial(tqdm, unit=" images", leave=False, disable=os.environ.get("RANK", "0") != "0" or None)

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
    K = len(text_features)
    if K < 2:
        raise ValueError(f"Eq. 2 needs the texts of at least two classes, not {K}")
    cos = cosine(image_features, text_features)  # (N, K)
    own = labels.to(cos.device)[:, None] == torch.arange(K, device=cos.device)  # (N, K), one True a row
    pos = cos[own].mean()  # Eq. 1
    neg = cos[~own].mean()  # Eq. 2
    return pos.item(), neg.item()


# 2 LoRA on keys and values --------------------------------------------------------------------------------------------


class KeyValueLoRA(nn.Module):
    """CLIP's attention with LoRA: k = W x + B_k A_k x / r, W being CLIP's own, and v alike; q stays as it is."""

    def __init__(self, attn, rank):
        super().__init__()
        self.attn, d = attn, attn.embed_dim
        self.A_k, self.A_v = (nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, d))) for _ in "kv")
        self.B_k, self.B_v = (nn.Parameter(torch.zeros(d, rank)) for _ in "kv")  # zeros: as it was before training

    def forward(self, query, x, _, need_weights=False, attn_mask=None):
        """As nn.MultiheadAttention's: query (m, N, d), key and value x (n, N, d) -> (m, N, d)."""
        attn, r = self.attn, len(self.A_k)  # LoRA's own alpha is 1: the scale is 1 / r (authors' code)
        W, b = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
        q = F.linear(query, W[0], b[0])
        k = F.linear(x, W[1], b[1]) + F.linear(F.linear(x, self.A_k), self.B_k / r)
        v = F.linear(x, W[2], b[2]) + F.linear(F.linear(x, self.A_v), self.B_v / r)
        heads = (y.unflatten(-1, (attn.num_heads, -1)).permute(1, 2, 0, 3) for y in (q, k, v))  # (N, heads, n, d/heads)
        y = F.scaled_dot_product_attention(*heads, attn_mask).permute(2, 0, 1, 3).flatten(-2)  # (m, N, d)
        return attn.out_proj(y), None


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
    for block in chain(model.visual.transformer.resblocks, model.transformer.resblocks):
        block.attn = KeyValueLoRA(block.attn, rank).to(block.attn.in_proj_weight)
        lora += [block.attn.A_k, block.attn.B_k, block.attn.A_v, block.attn.B_v]
    return lora


# 3 CLIP features ------------------------------------------------------------------------------------------------------

PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own


def resize_and_crop(images, size):
    """CLIP's bicubic resize and centre crop on a tensor, as Pillow does it: (N, 3, H, W) -> (N, 3, size, size)."""
    height, width = images.shape[-2:]
    if height == width == size:
        return images
    short = min(height, width)
    h, w = (size if side == short else int(size * side / short) for side in (height, width))
    for shape in ((height, w), (h, w)):  # as Pillow: width, then height, to 8 bits after each
        images = F.interpolate(images.float(), shape, mode="bicubic", antialias=True).add(0.5).floor().clamp(0, 255)
    return transforms.functional.center_crop(images, size)


def normalised_pixels(model, images):
    """CLIP's preprocessing on the model's device, with no augmentation: uint8 (N, 3, H, W) -> (N, 3, size, size)."""
    device = model.logit_scale.device
    if device.type == "cuda" and not images.is_cuda:
        images = images.pin_memory()  # so that the copy does not wait for the GPU
    pixels = resize_and_crop(images.to(device, non_blocking=True), model.visual.input_resolution) / 255
    return transforms.functional.normalize(pixels, PIXEL_MEAN, PIXEL_STD)


def encode_images(model, images):
    """Image features: uint8 (N, 3, H, W) of any size -> (N, D) float32, unit norm, on the model's device.

    Gradients flow to the LoRA. CLIP's `encode_image` is written out because only the class token leaves the last block:
    no other goes through all of it.
    """
    vit, pixels = model.visual, normalised_pixels(model, images)
    x = vit.conv1(pixels).flatten(2).permute(2, 0, 1)  # (patches, N, d)
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

    Attention is causal, so nothing behind the end-of-text token reaches the feature: all prompts are cut to the longest
    one (about 12 of 77 tokens). CLIP's `encode_text` is written out because openai/CLIP's takes 77 tokens only.
    """
    tokens = tokens.to(model.logit_scale.device)
    end = tokens.argmax(-1)  # the end-of-text token has the highest number
    n = int(end.max()) + 1
    x = model.token_embedding(tokens[:, :n]) + model.positional_embedding[:n]  # (K, n, d)
    x = x.transpose(0, 1)  # CLIP's blocks take (n, K, d)
    causal = torch.full((n, n), -math.inf, device=x.device).triu(1)
    for block in model.transformer.resblocks:
        y = block.ln_1(x)
        x = x + block.attn(y, y, y, need_weights=False, attn_mask=causal)[0]
        x = x + block.mlp(block.ln_2(x))
    x = x[end, torch.arange(len(tokens))]  # (K, d)
    return F.normalize((model.ln_final(x) @ model.text_projection).float(), dim=-1)


def images_at_once(model):
    """As many images as a GPU is busy with, or as keep a CPU's widest activation, 4 d a token, within 32 MB."""
    tokens, d = model.visual.positional_embedding.shape
    return 256 if model.logit_scale.is_cuda else max(1, 2**25 // (tokens * 4 * d * 4))


@torch.no_grad()
def extract_features(model, images, chunk_size=None, desc="image features"):
    """`encode_images`, chunk_size at a time, without gradients: uint8 (N, 3, H, W) -> (N, D), the same in all processes.

    chunk_size: None is `images_at_once`. If torch.distributed is in use, every process encodes its share: all must call
    it, with the same images.
    """
    features = torch.zeros(len(images), model.text_projection.shape[1], device=model.logit_scale.device)
    with progress(desc=desc, total=len(images)) as bar:
        for rows in my_chunks(torch.arange(len(images)), chunk_size or images_at_once(model)):
            features[rows] = encode_images(model, images[rows])
            bar.update(process()[1] * len(rows))
    return summed(features)


# 4 Preserve the gap ---------------------------------------------------------------------------------------------------


def mean_loss(losses, where):
    """Mean of an epoch's losses (steps,); raises FloatingPointError naming the first that is not finite."""
    losses = losses.tolist()  # read once an epoch, not in every step
    for step, loss in enumerate(losses, 1):
        if not math.isfinite(loss):
            raise FloatingPointError(f"{where}, step {step}: the loss is {loss}; a smaller learning rate may help")
    return sum(losses) / len(losses)


@contextmanager
def kept(lora):
    """Within it the LoRA may change; after it the LoRA is as it was."""
    before = [p.detach().clone() for p in lora]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, p_0 in zip(lora, before):
                p.copy_(p_0)


@torch.no_grad()
def untouched_logits(model, lora, images, tokens):
    """Logits (N, K) of the CLIP that nothing has trained yet: the same model with its LoRA switched off."""
    with kept(lora):
        for B in lora[1::2]:
            B.zero_()  # ΔW = B A / r = 0
        features = extract_features(model, images, desc="untouched CLIP")
        return model.logit_scale.exp() * cosine(features, encode_texts(model, tokens))


def loss_and_gradients(model, lora, images, labels, tokens, batch, chunk_size, logits_0=None, align=0.0, distill=0.0):
    """The masked cross-entropy of one batch, into every p.grad of the LoRA; returns this process's share of the loss.

    Every process takes its share of the batch (n,), chunk_size images at a time: the gradients add up to the whole's.
    """
    encoded = encode_texts(model, tokens)  # (K, D), once a batch:
    texts = encoded.detach().requires_grad_()  # these collect the gradients of all chunks
    total = torch.zeros((), device=texts.device)
    for p in (texts, *lora):
        p.grad = torch.zeros_like(p)
    for chunk in my_chunks(batch, chunk_size):
        x, y = encode_images(model, images[chunk]), labels[chunk]  # (m, D), (m,)
        logits = model.logit_scale.exp() * cosine(x, texts)  # (m, K)
        loss = F.cross_entropy(logits, y)  # older classes are masked: they have no logits here
        if align:  # Fig. 2b: the gap between an image and its own text is made to close
            loss = loss + align * (x - texts[y]).square().sum(1).mean()
        if distill:  # Table 5: the logits of the untouched CLIP are kept, KL at temperature 2
            log_p, log_p_0 = ((z / 2).log_softmax(1) for z in (logits, logits_0[chunk]))
            loss = loss + distill * 2**2 * F.kl_div(log_p, log_p_0, reduction="batchmean", log_target=True)
        loss = loss * len(chunk) / len(batch)
        loss.backward()
        total += loss.detach()
    encoded.backward(texts.grad)
    if process()[1] > 1:
        gradient = summed(nn.utils.parameters_to_vector([p.grad for p in lora]))
        nn.utils.vector_to_parameters(gradient, [p.grad for p in lora])
    return total


def train_epochs(
    model, lora, images, labels, tokens, epochs, lr, batch_size, generator, desc, align=0.0, distill=0.0,
    chunk_size=None,
):  # fmt: skip
    """Train the LoRA on one task by the masked cross-entropy; a generator of each epoch's mean loss.

    The loss is over the task's own classes: older ones are masked, so their prompts, without gradient, are not encoded.
    Adam, cosine schedule stepped per epoch down to 1% of lr, no augmentation (authors' code).
    """
    labels = labels.to(model.logit_scale.device, torch.long)
    logits_0 = untouched_logits(model, lora, images, tokens) if distill else None  # (N, K), once: no augmentation
    chunk_size = chunk_size or (batch_size if labels.is_cuda else images_at_once(model))
    optimizer = torch.optim.Adam(lora, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1), eta_min=0.01 * lr)
    with progress(desc=desc, total=epochs * len(images)) as bar:
        for epoch in range(1, epochs + 1):
            losses = []
            for batch in torch.randperm(len(images), generator=generator).split(batch_size):
                task = (images, labels, tokens, batch)
                losses.append(loss_and_gradients(model, lora, *task, chunk_size, logits_0, align, distill))
                optimizer.step()
                torch.clear_autocast_cache()  # it keeps bf16 copies of A and B, now out of date
                bar.update(len(batch))
            schedule.step()
            yield mean_loss(summed(torch.stack(losses)), f"{desc}, epoch {epoch}")


def finetune(
    model, lora, images, labels, tokens, epochs, lr=1e-3, batch_size=128, generator=None, align=0.0, distill=0.0,
    chunk_size=None, desc="finetune",
):  # fmt: skip
    """Train the LoRA for `epochs` epochs on one task (line 7).

    lora: what `add_lora` returned; the same one goes on from task to task. images: uint8 (N, 3, H, W);
    labels (N,): int, rows of tokens (K, 77), both of the current task alone; generator: the CPU generator of the order.
    align, distill: weights of the baselines' losses, none in the method: the squared distance of matched unit-norm
    features (Fig. 2b), and the KL from the untouched CLIP's probabilities over the K classes (Table 5).
    chunk_size: images of a batch to encode at a time, for less memory and the same step; None is all on a GPU. If
    torch.distributed is in use, all processes must call it alike, the generator's seed included.
    Returns the mean loss of each epoch. Raises FloatingPointError, which names epoch and step, if one is not finite.
    """
    options = (epochs, lr, batch_size, generator, desc, align, distill, chunk_size)
    return list(train_epochs(model, lora, images, labels, tokens, *options))


@torch.no_grad()
def measure_gap(model, images, labels, tokens):
    """(pos, neg) of a model on images and prompts (Eq. 1, Eq. 2), always computed in float32."""
    with torch.autocast(model.logit_scale.device.type, enabled=False):
        features = extract_features(model, images, desc="gap")
        return from_rank_0(similarity_gap(features, encode_texts(model, tokens), labels))


def find_epochs(
    model, lora, images, labels, tokens, alpha=0.1, max_epochs=10, lr=1e-3, batch_size=128, generator=None,
    align=0.0, distill=0.0, chunk_size=None, report=lambda entry: None,
):  # fmt: skip
    """The number of epochs that leaves the gap within alpha, found on the first task (lines 2-5, Eq. 3).

    Arguments as in `finetune`; alpha: the largest relative change of neg, 0.1 is 10%. neg is over all images given, and
    the learning-rate schedule over max_epochs, where that of the final runs is over E (authors' code).
    Returns (E, history), history a list of dicts with epoch, pos, neg, delta, from epoch 0 to the crossing one, each of
    which also goes to report as it comes.
    Leaves lora as it found it. Raises ValueError if neg_0 is so near 0 that Δ means nothing.
    """
    pos, neg_0 = measure_gap(model, images, labels, tokens)  # line 2
    if not abs(neg_0) > 1e-3:
        raise ValueError(f"neg_0 = {neg_0:.1e} is too near 0 for Eq. 3 to mean anything: fix E with --epochs")
    history = [dict(epoch=0, pos=pos, neg=neg_0, delta=0.0)]
    report(history[-1])
    options = (max_epochs, lr, batch_size, generator, "search", align, distill, chunk_size)
    with kept(lora):  # line 5: restore the untrained LoRA
        for e, _ in enumerate(train_epochs(model, lora, images, labels, tokens, *options), 1):  # line 3
            pos, neg = measure_gap(model, images, labels, tokens)
            delta = abs(neg - neg_0) / abs(neg_0)  # Eq. 3
            if not math.isfinite(delta):
                raise FloatingPointError(f"search, epoch {e}: neg is {neg}; a smaller learning rate may help")
            history.append(dict(epoch=e, pos=pos, neg=neg, delta=delta))
            report(history[-1])
            if delta > alpha:
                break  # line 4
    E = max([1] + [h["epoch"] for h in history if h["delta"] <= alpha])  # line 5
    return E, history


# 5 Compensate for the gap ---------------------------------------------------------------------------------------------


def class_prototypes(features, labels):
    """Mean of the unit-norm features (N, D) of each class in labels (N,), int in [0, K), each with images -> (K, D)."""
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


def fit_head(head, features, labels, epochs=3, lr=5e-4, batch_size=64, generator=None, desc="head"):
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
        for batch in torch.randperm(len(features), generator=generator).split(batch_size):
            loss = F.cross_entropy(cosine(features[batch], rows), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        history.append(mean_loss(torch.stack(losses), f"{desc}, epoch {epoch}"))
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
    Returns [Eq. 5, its text half alone, its visual half alone] over all images, each counted alike (authors' code), and
    Eq. 5's accuracy on each task.
    """
    text_features = encode_texts(model, tokens)  # (K, D), once for all images
    correct = []
    for images, labels in tests:
        features = extract_features(model, images, desc="test images")  # (N, D)
        text_logits = model.logit_scale.exp() * cosine(features, text_features)  # (N, K)
        visual_cosines = head(features)  # (N, K)
        scores = fused_scores(text_logits, visual_cosines, beta)  # line 10
        correct.append(torch.stack([s.argmax(1).cpu() == labels for s in (scores, text_logits, visual_cosines)]))
    percent = lambda hits: 100 * hits.double().mean(-1)
    return percent(torch.cat(correct, 1)).tolist(), [percent(c[0]).item() for c in correct]  # line 11


def run(config):
    """MG-CLIP, lines 1-12. Returns the fields of the `end` event of metrics.jsonl, and the run's folder.

    Raises ValueError, OSError or FloatingPointError, with a message for the user, for whatever the user can cause.
    """
    config, model, tasks, prompts, others, log = prepare(config)
    device = model.logit_scale.device
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    lora_options = dict(lr=config.lr, batch_size=config.batch_size, generator=generator, chunk_size=config.chunk_size)
    lora_options |= dict(align=config.align, distill=config.distill)
    head_options = dict(lr=config.head_lr, batch_size=config.head_batch_size, generator=generator)
    search = dict(alpha=config.alpha, max_epochs=config.max_epochs, **lora_options)

    lora = add_lora(model, config.rank)  # line 1
    head = CosineHead(model.text_projection.shape[1])
    E, done = restore(log.state, lora, head, generator)  # E: None while open; done: 0 but for a run that was cut off
    seen, tests = [], []
    if not done:
        log.zeroshot(0, model, others)
    for t, task in enumerate(tasks, 1):  # line 6
        names, images, labels, test_images, test_labels = task()
        tests.append((test_images, test_labels + len(seen)))
        seen += names
        own, all_seen = prompts(names), prompts(seen)
        if t <= done:
            continue
        if E is None or config.search == "each":  # on D_1 alone, but for --search each
            report = partial(log.search, t)
            with autocast:
                E, _ = find_epochs(model, lora, images, labels, own, **search, report=report)  # lines 2-5
            log.write("epochs", task=t, epochs=E, alpha=config.alpha)
        began = time.perf_counter()
        with autocast:
            finetune(model, lora, images, labels, own, E, **lora_options, desc=f"task {t}")  # line 7
            features = extract_features(model, images)  # line 8: from here on f stands still; (N, D)
        head.add_classes(class_prototypes(features, labels))  # line 8
        fit_head(head, features, labels, config.head_epochs, **head_options, desc=f"task {t}, head")  # line 9
        with autocast:
            accuracies, per_task = evaluate(model, head, tests, all_seen, config.beta)  # lines 10, 11
        with torch.no_grad():
            gap = similarity_gap(features, encode_texts(model, all_seen), labels + len(seen) - len(names))
        encoded = (E + 1) * len(images) + sum(len(i) for i, _ in tests)
        log.task(t, len(seen), accuracies, per_task, gap, E, encoded, time.perf_counter() - began)
        log.zeroshot(t, model, others)
        log.save(t, E, lora, head, generator, seen)
        del images, features  # to make room for the next task's
    parameters = sum(p.numel() for p in lora) + head.weight.numel()
    return log.end(parameters, analyse(model, head, tests, all_seen))  # line 12, its Avg and Last


# 7 Data and weights ---------------------------------------------------------------------------------------------------

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
COLUMNS = ("classes", "model", "tasks", "lr", "batch_size", "head_lr", "head_batch_size", "order")
PRESETS = {name: dict(zip(COLUMNS, row)) for name, *row in (
    # data set, classes   model       tasks  LoRA lr, batch  head lr, batch  order of the classes
    ("patterns",    64,   "tiny",     8,     5e-3, 64,       5e-4, 64,       "1993"),
    ("cifar100",    100,  "ViT-B/16", 10,    1e-3, 128,      5e-4, 64,       CIFAR100_ORDER),
    ("imagenet-r",  200,  "ViT-B/16", 10,    1e-3, 64,       5e-4, 32,       IMAGENET_R_ORDER),
    ("imagenet100", 100,  "ViT-B/16", 10,    5e-4, 128,      1e-3, 128,      "1993"),
    ("imagenet1k",  1000, "ViT-B/16", 10,    1e-3, 128,      5e-4, 64,       "1993"),
    ("vtab",        50,   "ViT-B/16", 5,     1e-3, 128,      5e-4, 64,       "natural"),
    ("folder",      None, "ViT-B/16", 10,    1e-3, 128,      5e-4, 64,       "natural"),
)}  # fmt: skip


def task_groups(config, classes):
    """The classes of every task, in the order official (the data set's), natural (as listed) or NumPy's of a seed."""
    order = PRESETS[config.dataset]["order"] if config.class_order == "official" else config.class_order
    if order == "natural":
        order = range(classes)
    elif isinstance(order, str):
        order = np.random.RandomState(int(order)).permutation(classes)
    elif len(order) != classes:
        of = f"of {len(order)} classes, and {config.data_root} holds {classes}"
        raise ValueError(f"--class-order official: {config.dataset}'s is {of}; choose natural or a seed")
    if isinstance(config.tasks, int):
        groups, asked = np.array_split(order, config.tasks), config.tasks
    else:  # what is left over is not learned
        groups, asked = np.split(order, np.cumsum(config.tasks))[:-1], ",".join(map(str, config.tasks))
    sizes = [len(group) for group in groups]
    if min(sizes) < 2 or config.tasks not in (sizes, len(sizes)):
        raise ValueError(f"--tasks {asked}: too many for {classes} classes; Eq. 2 needs two classes in each task")
    return [group.tolist() for group in groups]


# A data set is (names, read). names: of all classes. read(split, classes, size) -> (images, labels) of some classes:
# uint8 (N, 3, H, W), files resized and cropped to (size, size), and labels (N,) that count from 0 in `classes`.


def torchvision_data(kind, config, **options):
    """A data set of torchvision, downloaded into --data-root if it is not there."""
    try:
        return kind(config.data_root, download=True, **options)
    except (OSError, RuntimeError) as error:
        what = f"--data-root {config.data_root}: {kind.__name__} is not there and cannot be downloaded ({error})"
        raise ValueError(f"{what}; put {getattr(kind, 'url', 'its archives')} there") from error


def load_cifar100(config):
    """torchvision's CIFAR-100: (names, read). The names keep torchvision's underscores (authors' code)."""
    arrays = {}
    for split in ("train", "test"):
        data = torchvision_data(torchvision.datasets.CIFAR100, config, train=split == "train")
        arrays[split] = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)
    return data.classes, lambda split, classes, size: select(*arrays[split], classes)


def select(images, labels, classes):
    """The images of some classes, labelled 0, 1, .. in the order of `classes`."""
    rows = [torch.nonzero(labels == c).flatten() for c in classes]
    return images[torch.cat(rows)], numbered(rows)


def numbered(groups):
    """Labels (N,) for the members of some groups: 0 for those of the first, 1 for those of the second, .."""
    return torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups]))


def load_folder(config):
    """Image files in folders by class, or as --train-list and --test-list name them: (names, read)."""
    root, lists = Path(config.data_root), dict(train=config.train_list, test=config.test_list)
    files = {split: read_list(root, path, split) if path else scan(root, split) for split, path in lists.items()}
    classes = natural_order(files["train"].keys() | files["test"].keys())
    if config.dataset == "imagenet100":
        classes = classes[:100]  # ImageNet-1K's first 100 synsets
    for split, c in product(files, classes):
        if not files[split].get(c):
            raise ValueError(f"--data-root {root}: there is no {split} image of class {c}")
    if any(lists.values()):
        twice = set(chain(*files["train"].values())) & set(chain(*files["test"].values()))
        if twice:
            raise ValueError(f"--test-list {config.test_list}: {min(twice)} is a training image, too")

    def read(split, chosen, size):
        paths = [files[split][classes[c]] for c in chosen]
        return decode_all(list(chain(*paths)), size, config, split), numbered(paths)

    return class_names(root, classes), read


def scan(root, split):
    """{class: its files} of ROOT/train/<class>/*, or of ROOT/test/<class>/* or val/, without hidden ones."""
    choices = ("train",) if split == "train" else ("test", "val")
    half = next((root / name for name in choices if (root / name).is_dir()), None)
    if half is None:
        raise ValueError(f"{root}: there is no {'/ or '.join(choices)}/ in it; needed: train/CLASS/* and test/CLASS/*")
    classes = [d for d in visible(half) if d.is_dir()]
    if not classes:
        raise ValueError(f"{half}: there is no class folder in it; needed: {half.name}/CLASS/*")
    return {d.name: sorted(f for f in visible(d) if f.is_file()) for d in classes}


def visible(folder):
    """What a folder holds but for hidden files. Raises ValueError at a link that leads nowhere."""
    for path in folder.iterdir():
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{shown(path)}: a link that leads nowhere")
        if path.name[0] != ".":
            yield path


def shown(path):
    """A path as one line that any terminal can show."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def read_list(root, listing, split):
    """{class: its files} of a list: a path per line, relative to root, in the folder of its class.

    The lines `train` and `test` head the halves of a list that holds both, as the authors' of ImageNet-R does.
    """
    files, half = {}, split
    try:
        lines = Path(listing).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--{split}-list {listing}: cannot be read ({error})") from error
    for line in filter(None, map(str.strip, lines)):
        if line in ("train", "test"):
            half = line
        elif half == split:
            files.setdefault((root / line).parent.name, []).append(root / line)
    missing = [path for path in chain(*files.values()) if not path.is_file()]
    if missing or not files:
        what = f"{missing[0]} is not there; its paths are relative to --data-root" if missing else "names no image"
        raise ValueError(f"--{split}-list {listing}: {what}")
    return files


def natural_order(classes):
    """Sorted by number if all are numbers, else as text."""
    return sorted(classes, key=int if all(c.isdecimal() for c in classes) else None)


def decode(path, size):
    """An image file, resized and centre-cropped exactly as CLIP's `preprocess` does it: uint8 (3, size, size)."""
    bicubic = transforms.InterpolationMode.BICUBIC
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = transforms.functional.center_crop(transforms.functional.resize(image, size, bicubic), size)
            return transforms.functional.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # Pillow raises a dozen kinds
        raise ValueError(f"{shown(path)}: cannot be read as an image ({error})") from error


def decode_all(paths, size, config, what):
    """`decode` of all files, in parallel, with a bar: uint8 (N, 3, size, size)."""
    images, (rank, ranks) = room((len(paths), 3, size, size), config, what), process()
    mine = range(rank, len(paths), ranks)

    def put(i):
        images[i] = decode(paths[i], size)

    with ThreadPoolExecutor(config.workers) as pool:  # Pillow lets go of Python's lock while it decodes
        for _ in progress(pool.map(put, mine), desc=f"decoding {what}", total=len(mine)):
            pass
    barrier()  # the other processes' images are there, too
    return images


def room(shape, config, what):
    """uint8 zeros for decoded images: in memory, or where that is short, or several processes share them, in a file.

    The file has no name any more when it is returned: however the run ends, the disk is free again.
    """
    (rank, ranks), size = process(), math.prod(shape)
    free = 0.8 * free_memory() if config.memory is None else 1e9 * config.memory
    if ranks == 1 and size <= free:
        return torch.zeros(shape, dtype=torch.uint8)
    print(f"{what}: {shape[0]:,} decoded images, {size / 1e9:.2f} GB, go to a file in {config.out}", flush=True)
    path = None
    try:
        if not rank:
            Path(config.out).mkdir(parents=True, exist_ok=True)
            fd, path = tempfile.mkstemp(prefix=".images-", dir=config.out)
            getattr(os, "posix_fallocate", lambda fd, _, size: os.truncate(fd, size))(fd, 0, size)
            os.close(fd)
        path = from_rank_0(path)
        images = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        barrier()  # all have it open
    except ConnectionError:
        raise
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--out {config.out}: no room for {size / 1e9:.2f} GB of decoded {what} ({error})") from error
    finally:
        if path and not rank:
            os.unlink(path)
    return images.view(shape)


def free_memory():
    """Bytes that programs can have without swapping, as Linux estimates it; elsewhere half of what there is."""
    try:
        return 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def class_names(root, folders):
    """Names of class folders: as ROOT/classes.txt has them, or ImageNet-1K for its synsets, or the folders' own."""
    unfit = [f for f in folders if not f.isprintable()]
    if unfit and not (root / "classes.txt").is_file():
        raise ValueError(f"{root}: {unfit[0]!a} cannot be a class name in a prompt; write a classes.txt")
    synsets, K = all(re.fullmatch(r"n\d{8}", f) for f in folders), len(folders)
    for listing in ("classes.txt", "README.txt") if synsets else ("classes.txt",):  # ImageNet-R brings a README.txt
        if (root / listing).is_file():
            names, text = {}, (root / listing).read_text("utf-8-sig", errors="replace").replace("\t", " ")
            for line in map(str.strip, text.splitlines()):
                folder = max((f for f in folders if line.startswith(f + " ")), key=len, default="")  # may hold spaces
                names[folder] = line[len(folder) :].strip()
            missing = [f for f in folders if f not in names]
            if not missing:
                return [names[f] for f in folders]
            if listing == "classes.txt":
                raise ValueError(f"{root / listing}: no line '{missing[0]} NAME'; {len(missing)} classes lack one")
    if synsets and (K == 1000 or K == 100 and folders[-1] <= "n01855672"):  # that is the hundredth
        return torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"][:K]  # by sorted synset
    if synsets or all(f.isdecimal() for f in folders):
        print(f"mgclip: warning: {root}: without classes.txt, prompts say '{folders[0]}'", file=sys.stderr)
    return folders


def task_stream(names, read, groups, size, done=0):
    """The tasks in order, each a function to call when it is due, so that its images are not read before.

    It returns (names, train_images, train_labels, test_images, test_labels), labels from 0 in each task.
    groups: the classes of every task; done: so many tasks are over, and their training images not needed any more.
    """

    def task(t, classes):
        train = read("train", classes, size) if t >= done else (None, None)
        return [names[c] for c in classes], *train, *read("test", classes, size)

    return [partial(task, t, classes) for t, classes in enumerate(groups)]


def load_zeroshot(entry, config, size):
    """A data set to score but not to learn: (its name, class names, test images, labels).

    entry: food101 or pets (torchvision's), imagenet1k (the folder of that name in --data-root), NAME=FOLDER, or
    patterns, the demo's classes in the style that its CLIP was pre-trained on.
    """
    name, _, folder = entry.partition("=")
    kinds = dict(food101=torchvision.datasets.Food101, pets=torchvision.datasets.OxfordIIITPet)
    if entry == "patterns":
        labels = torch.arange(64).repeat(25)
        return name, PATTERNS, draw_patterns(labels, CLEAN, torch.Generator().manual_seed(2)), labels
    if name and folder or name == "imagenet1k":
        root = Path(folder or Path(config.data_root, name))
        files = scan(root, "test")
        classes = natural_order(files)
        names, groups = class_names(root, classes), [files[c] for c in classes]
        paths, labels = list(chain(*groups)), numbered(groups)
    elif entry in kinds:
        with rank_0_first():
            data = torchvision_data(kinds[name], config, split="test")
        names, labels = [c.replace("_", " ") for c in data.classes], torch.tensor(data._labels)
        paths = data._image_files if name == "food101" else data._images
    else:
        raise ValueError(f"--zeroshot {entry}: must be food101, pets, imagenet1k, patterns or NAME=FOLDER")
    if len(paths) < 1:
        raise ValueError(f"--zeroshot {entry}: there is no test image")
    return name, names, decode_all(paths, size, config, name), labels


def load_clip(name_or_path, device="cpu"):
    """A CLIP with a ViT image encoder, in float32 and eval mode.

    name_or_path: a name of `clip.available_models()`, downloaded if need be, or a file: one of OpenAI's TorchScript
    archives, or a CLIP state dict. Raises ValueError if there is no such model, or it cannot be read or is no ViT.
    """
    named = name_or_path in clip.available_models()
    if not named and not os.path.isfile(name_or_path):
        known = ", ".join(name for name in clip.available_models() if name.startswith("ViT"))
        raise ValueError(f"--model {name_or_path}: neither a file nor one of {known}")
    resnet = ValueError(f"--model {name_or_path}: a ResNet encodes its images; the LoRA needs the attention of a ViT")
    if named and name_or_path.startswith("RN"):
        raise resnet
    try:
        if named or is_torchscript(name_or_path):
            model, _ = clip.load(str(name_or_path), device="cpu")
        else:  # clip.load of openai/CLIP cannot read a state dict
            state = torch.load(name_or_path, map_location="cpu", weights_only=True)
            model = clip.model.build_model(dict(state)).float()
            # once more, as build_model rounds to float16
            model.load_state_dict({name: state[name] for name in model.state_dict()})
    except Exception as error:  # of the network, the archive, the pickle or the shapes
        why = (str(error).splitlines() or [type(error).__name__])[0][:100]
        path = weights_file(name_or_path)
        what = f"cannot be downloaded; put {path.name} into {path.parent}" if named else "is no CLIP, or is cut short"
        raise ValueError(f"--model {name_or_path}: {what} ({why})") from error
    if not isinstance(model.visual, clip.model.VisionTransformer):
        raise resnet
    return model.float().eval().to(device)


def is_torchscript(path):
    return zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist())


def weights_file(name_or_path):
    """Where the weights lie: the file itself, or where `clip.load` puts a named model."""
    if name_or_path in clip.available_models():
        return Path.home() / ".cache" / "clip" / clip.clip._MODELS[name_or_path].rsplit("/", 1)[1]
    return Path(name_or_path)


def load_weights(name_or_path, device):
    """(CLIP, SHA-256 of its file); tiny is the demo's."""
    path = tiny_clip() if name_or_path == "tiny" else name_or_path
    return load_clip(path, device), sha256(weights_file(path).read_bytes())


# 8 Results ------------------------------------------------------------------------------------------------------------


def subspace_distance(B_1, B_2):
    """Distance of two subspaces, by orthonormal bases (D, k), (D, l), k <= l: 0 if one holds the other (Eq. 6).

    The root mean square of the sines of the k principal angles, at most 1; if k = l, ‖B_1 B_1ᵀ - B_2 B_2ᵀ‖ / √(2k).
    """
    cosines = torch.linalg.svdvals(B_1.T @ B_2)
    return (1 - cosines.square().mean()).clamp(min=0).sqrt().item()


@torch.no_grad()
def analyse(model, head, tests, tokens):
    """Tables 4 and 5, on all test images: pos, neg, and how far the images' space is from each classifier's.

    Bases by SVD: B_i of the image features, cut to as many leading directions as there are classes; B_t of the text
    features, B_vc of W_v, B_t+vc of both. A distance is None where a classifier has so many rows that they fill R^D.
    """
    features = torch.cat([extract_features(model, images, desc="analysis") for images, _ in tests])  # (N, D)
    texts, W_v = encode_texts(model, tokens), F.normalize(head.weight, dim=-1)  # (K, D)
    pos, neg = similarity_gap(features, texts, torch.cat([labels for _, labels in tests]))
    basis = lambda rows: torch.linalg.svd(rows, full_matrices=False).Vh.T  # (D, number of rows)
    B_i, result = basis(features)[:, : len(texts)], dict(pos=pos, neg=neg)
    for name, rows in (("t", texts), ("vc", W_v), ("t+vc", torch.cat([texts, W_v]))):
        fills = len(rows) >= rows.shape[1]
        result[f"d(B_i, B_{name})"] = None if fills else subspace_distance(B_i, basis(rows))
    return result


def forgetting(per_task):
    """(forgetting, backward transfer), in points, of the rows a_t = [a_t1 .. a_tt]: accuracy on each task after task t.

    Means over the earlier tasks j of max_{t<T} a_tj - a_Tj (Chaudhry et al. 2018) and of a_Tj - a_jj (Lopez-Paz and
    Ranzato 2017); 0 while there is one task.
    """
    *before, now = per_task
    lost = [max(row[j] for row in before[j:]) - now[j] for j in range(len(before))]
    gained = [now[j] - row[j] for j, row in enumerate(before)]
    return sum(lost) / max(len(lost), 1), sum(gained) / max(len(gained), 1)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def write_whole(path, write):
    """Call write(temporary file), then move that to path: path holds the old or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # on the disk before it takes the name
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save has it as RuntimeError
        raise OSError(f"{path}: cannot be written ({error}); what was there before is whole") from error
    finally:
        temporary.unlink(missing_ok=True)


def new_folder(config):
    """Make runs/DATASET-ALPHA-BETA-SEED, numbered when taken, also by a run that starts at the same moment."""
    base = f"runs/{config.dataset}-{config.alpha:g}-{config.beta:g}-{config.seed}"
    Path("runs").mkdir(exist_ok=True)
    for folder in chain([base], (f"{base}-{n}" for n in count(2))):
        try:
            Path(folder).mkdir()
            return folder
        except FileExistsError:
            pass


def read_config(folder, **record):
    """The options of a run. Raises ValueError if a SHA-256 of record is not the run's."""
    path = Path(folder, "config.json")
    try:
        stored = json.loads(path.read_text())
        config = Config(**{f.name: stored[f.name] for f in fields(Config)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume {folder}: {path} is not the record of a run ({error})") from error
    for name, value in record.items():
        if name.endswith("sha256") and stored.get(name) != value:
            raise ValueError(f"--resume {folder}: {name} is not what the run began with")
    return config


def read_checkpoint(folder, config):
    """What `Log.save` wrote for a run of these options, or None if there is nothing yet."""
    path = Path(folder, "checkpoint.pt")
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        options, _ = state["options"], [state[key] for key in ("task", "epochs", "events", "seconds", "lora", "head")]
    except Exception as error:  # zip, pickle and key errors alike
        raise ValueError(f"{path}: cannot be read, is cut short or no checkpoint of mgclip ({error!r})") from error
    for name, value in run_options(config).items():
        if options.get(name) != value:
            other = f"--{name.replace('_', '-')} {options.get(name)}"
            raise ValueError(f"{path}: is of a run with {other}, and {folder}/config.json says {value}")
    return state


def run_options(config):
    """The options that a run's numbers depend on, be it only by rounding."""
    free = ("out", "resume", "device", "workers", "memory", "data_root", "model")
    return {name: value for name, value in asdict(config).items() if name not in free}


def restore(state, lora, head, generator=None):
    """Bring back what a checkpoint holds. Returns the number of epochs, None if still open, and of tasks done."""
    if state["task"]:
        for p, saved in zip(lora, state["lora"], strict=True):
            p.data.copy_(saved)
        head.add_classes(state["head"].to(lora[0].device))
        if generator:
            generator.set_state(state["generator"])
    return state["epochs"], state["task"]


class Log:
    """A run's folder (config.json, metrics.jsonl, checkpoint.pt), which process 0 writes, and its tables."""

    def __init__(self, config, record):
        self.folder, self.header, self.options = Path(config.out), None, run_options(config)
        self.state = dict(task=0, epochs=config.epochs, events=[], seconds=0)
        self.writes = process()[0] == 0
        try:
            if config.resume is not None:
                read_config(self.folder, **record)
                self.state = read_checkpoint(self.folder, config) or self.state
                cut_off = [*self.folder.glob(".*.*.[0-9]*"), *self.folder.glob(".images-*")] if self.writes else []
                for part in cut_off:
                    part.unlink()
            elif self.writes:
                self.folder.mkdir(parents=True, exist_ok=True)
                if (self.folder / "config.json").exists():
                    raise ValueError(f"--out {self.folder}: holds a run already; choose another folder, or --resume it")
                text = json.dumps(asdict(config) | record, indent=2) + "\n"
                write_whole(self.folder / "config.json", lambda path: path.write_text(text))
            self.events = self.state["events"]
            lines = "".join(json.dumps(event) + "\n" for event in self.events)
            if self.writes:
                write_whole(self.folder / "metrics.jsonl", lambda path: path.write_text(lines))
        except OSError as error:
            raise ValueError(f"--out {self.folder}: cannot be written ({error})") from error
        self.began = time.perf_counter() - self.state["seconds"]

    def save(self, task, epochs, lora, head, generator, classes):
        """Replace checkpoint.pt."""
        if not self.writes:
            return
        model = dict(lora=[p.detach().cpu() for p in lora], head=head.weight.detach().cpu(), classes=classes)
        state = dict(task=task, epochs=epochs, generator=generator.get_state(), events=self.events) | model
        state |= dict(seconds=time.perf_counter() - self.began, options=self.options)
        write_whole(self.folder / "checkpoint.pt", lambda path: torch.save(state, path))

    def write(self, event, **values):
        self.events.append(dict(event=event, **values))
        if self.writes:
            try:
                with open(self.folder / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(self.events[-1]) + "\n")
            except OSError as error:
                raise OSError(f"{self.folder}/metrics.jsonl: cannot be written ({error})") from error

    def row(self, header, row, values):
        """Print a row of a table, below its header where another table stood last."""
        if header != self.header:
            print("\n" + header)
        self.header = header
        print(row.format(*values), flush=True)

    def search(self, t, entry):
        self.write("search", task=t, **entry)
        self.row("search, epoch     pos     neg       Δ", "{:13d} {:7.4f} {:7.4f} {:7.4f}", entry.values())

    def task(self, t, classes, accuracies, per_task, gap, epochs, encoded, seconds):
        names = ("accuracy", "text_accuracy", "visual_accuracy", "pos", "neg", "epochs", "seconds", "images_per_second")
        values = (*accuracies, *gap, epochs, seconds, encoded / seconds)
        self.write("task", task=t, classes_seen=classes, per_task=per_task, **dict(zip(names, values)))
        header = "task  classes     A_t    text  visual     pos     neg   E  seconds  images/s"
        row = "{:4d} {:8d} {:7.2f} {:7.2f} {:7.2f} {:7.4f} {:7.4f} {:3d} {:8.1f} {:9.0f}"
        self.row(header, row, (t, classes, *values))

    @torch.no_grad()
    def zeroshot(self, t, model, others):
        """Per cent of the images of data sets not learned that the text classifier names right (Table 2)."""
        for name, tokens, images, labels in others:
            cos = cosine(extract_features(model, images, desc=f"zero-shot {name}"), encode_texts(model, tokens))
            right = cos.argmax(1).cpu() == labels
            self.write("zeroshot", dataset=name, task=t, accuracy=100 * right.double().mean().item())

    def end(self, trainable_parameters, analysis):
        tasks = [e for e in self.events if e["event"] == "task"]
        accuracy, E = [e["accuracy"] for e in tasks], [e["epochs"] for e in tasks]
        E = E[0] if len(set(E)) == 1 else E
        result = dict(avg=mean(accuracy), last=accuracy[-1])  # line 12
        result |= zip(("forgetting", "backward_transfer"), forgetting([e["per_task"] for e in tasks]))
        heading = [f"{name.capitalize().replace('_', ' ')} {value:.2f}" for name, value in result.items()]
        print("\n" + "   ".join([*heading, f"E = {E}"]))
        shown = [f"{name} -" if value is None else f"{name} {value:.4f}" for name, value in analysis.items()]
        print("   ".join(["all test images:", *shown]))
        scores = [e for e in self.events if e["event"] == "zeroshot"]
        for name in dict.fromkeys(e["dataset"] for e in scores):
            before, *_, after = [e["accuracy"] for e in scores if e["dataset"] == name]
            print(f"zero-shot {name} {after:.2f}, by the untouched CLIP {before:.2f}: {after - before:+.2f}")
        result |= analysis | dict(accuracy=accuracy, epochs=E, trainable_parameters=trainable_parameters)
        result |= dict(seconds=time.perf_counter() - self.began)
        self.write("end", **result)
        print(f"{trainable_parameters:,} trainable parameters   {result['seconds']:.0f} s\n{self.folder}")
        return result | dict(folder=str(self.folder))


@torch.no_grad()
def predict(folder, paths, device=None, as_json=False):
    """Print the five best classes of every image by a run's last checkpoint. Returns 1 if one cannot be read, else 0.

    fused: Eq. 5; text: CLIP's probability of the class; visual: the cosine with its row of W_v.
    """
    config = settle(replace(read_config(folder), device=device))
    state = read_checkpoint(folder, config)
    if state is None:
        raise ValueError(f"--resume {folder}: has no checkpoint yet; one comes with the first task that is learned")
    model, model_sha256 = load_weights(config.model, config.device)
    read_config(folder, model_sha256=model_sha256)
    lora, head, status = add_lora(model, config.rank), CosineHead(model.text_projection.shape[1]), 0
    restore(state, lora, head)
    texts = encode_texts(model, prompt_tokens(config.template, state["classes"]))  # (K, D)
    for path in paths:
        try:
            features = encode_images(model, decode(path, model.visual.input_resolution)[None])  # (1, D)
        except ValueError as error:
            print(f"mgclip: {error}", file=sys.stderr)
            status = 1
            continue
        text_logits, visual_cosines = model.logit_scale.exp() * cosine(features, texts), head(features)  # (1, K)
        fused = fused_scores(text_logits, visual_cosines, config.beta)
        scores = torch.cat([fused, text_logits.softmax(1), visual_cosines])  # (3, K)
        best = fused[0].argsort(descending=True)[:5]
        rows = [(state["classes"][k], *row) for k, row in zip(best, scores[:, best].T.tolist())]
        if as_json:
            names = ("class", "fused", "text", "visual")
            print(json.dumps(dict(image=path, classes=[dict(zip(names, row)) for row in rows])))
        else:
            lines = ("{1:7.4f} {2:7.4f} {3:7.4f}  {0}".format(*row) for row in rows)
            print(f"\n{shown(path)}\n  fused    text  visual  class", *lines, sep="\n")
    return status


def plot(folders):
    """Draw runs, one a row, into plot.png in the first one's folder, and return its path."""
    from matplotlib.figure import Figure  # nothing else needs it

    blue, orange, green, red, grey = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"  # Okabe and Ito's: safe
    below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False, fontsize=9)
    figure = Figure(figsize=(13, 4.4 * len(folders)), dpi=110, layout="constrained")
    grid = figure.subplots(len(folders), 3, squeeze=False, sharey="col")
    for (left, middle, right), folder in zip(grid, map(Path, folders)):
        try:
            events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            kinds = ("task", "search", "zeroshot", "epochs")
            tasks, search, scores, found = ([e for e in events if e["event"] == kind] for kind in kinds)
            search = [e for e in search if e["task"] == 1]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--plot {folder}: metrics.jsonl is not there or not a run's ({error!r})") from error
        if not tasks:
            raise ValueError(f"--plot {folder}: no task is learned yet")
        column = lambda name, tasks=tasks: [e[name] for e in tasks]

        seen = column("classes_seen")
        left.plot(seen, column("accuracy"), "o-", color=blue, label="both (Eq. 5)")
        left.plot(seen, column("text_accuracy"), "s--", color=orange, label="text half")
        left.plot(seen, column("visual_accuracy"), "^:", color=green, label="visual half")
        for i, name in enumerate(dict.fromkeys(e["dataset"] for e in scores)):
            values = [e["accuracy"] for e in scores if e["dataset"] == name]
            left.plot([0, *seen][: len(values)], values, "xv+d"[i % 4] + "-.", color=grey, label=f"zero-shot: {name}")
        left.set(title=f"{folder.name}\nTest images named right", xlabel="classes seen so far", ylabel="accuracy (%)")
        left.legend(**below)

        if search:
            alpha = found[0]["alpha"]
            for key, label, colour, style in (("pos", "own text", blue, "o-"), ("neg", "other texts", red, "s--")):
                values = [e[key] for e in search]
                change = [100 * (value - values[0]) / abs(values[0]) for value in values]
                middle.plot(change, style, color=colour, label=f"{key}, {label}: from {values[0]:.3f}")
            if alpha < 1:
                middle.axhspan(-100 * alpha, 100 * alpha, color=red, alpha=0.12, label=f"alpha: {100 * alpha:g}%")
            middle.axvline(tasks[0]["epochs"], color=grey, linestyle=":", label=f"E = {tasks[0]['epochs']} is taken")
            middle.legend(**below)
        else:
            middle.text(0.5, 0.5, f"no search: E = {tasks[0]['epochs']}", ha="center", transform=middle.transAxes)
        middle.set(title="Search on the first task:\nhow far mean cosines move", xlabel="epoch", ylabel="change (%)")

        twin, numbers = right.twinx(), column("task")
        lost = [forgetting(column("per_task")[:t])[0] for t in numbers]
        lines = right.plot(numbers, column("pos"), "o-", color=blue, label="pos, own text")
        lines += right.plot(numbers, column("neg"), "s--", color=red, label="neg, other texts")
        lines += twin.plot(numbers, lost, "^:", color=grey, label="forgetting (right axis)")
        right.legend(handles=lines, **below)
        right.set(title="Similarity and forgetting,\ntask by task", xlabel="task")
        right.set_ylabel("mean cosine of image and text")
        twin.set_ylabel("forgetting (points of accuracy)", color=grey)
        for axes in (middle, right):
            axes.xaxis.get_major_locator().set_params(integer=True)
    path = Path(folders[0], "plot.png")
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path


# 9 Demo ---------------------------------------------------------------------------------------------------------------

COLOURS = dict(
    red=(220, 40, 40), orange=(240, 140, 30), yellow=(235, 220, 50), green=(50, 170, 70),
    blue=(50, 90, 220), purple=(140, 60, 190), pink=(245, 150, 190), brown=(120, 75, 40),
)  # fmt: skip
TEXTURES = ("stripes", "bands", "diagonals", "checks", "dots", "plain", "gradient", "grid")
PATTERNS = [f"{colour} {texture}" for colour in COLOURS for texture in TEXTURES]
TEMPLATES = ("a photo of a {}.", "a good photo of a {}.", "a picture of a {}.", "an image of {}.", "a {}.", "{}.")
# Pixel values, 0 to 255, but brightness, a factor's range. context: every class has a background colour of its own.
CLEAN = dict(brightness=0.0, hue=10, background=(235, 250), tint=0, context=0, noise=5)
SHIFTED = dict(brightness=0.1, hue=15, background=(150, 210), tint=10, context=10, noise=50)


def draw_patterns(labels, style, generator):
    """32 x 32 pictures of the classes (N,) of PATTERNS, with random phase and frequency: uint8 (N, 3, 32, 32)."""
    uniform = lambda *shape: torch.rand(len(labels), *shape, generator=generator)
    normal = lambda *shape: torch.randn(len(labels), *shape, generator=generator)
    y, x = torch.meshgrid(torch.arange(32) / 32, torch.arange(32) / 32, indexing="ij")
    frequency = 2 + 3 * uniform(1, 1)
    u = 2 * math.pi * (frequency * x + uniform(1, 1))  # (N, 32, 32)
    v = 2 * math.pi * (frequency * y + uniform(1, 1))
    ramp = torch.where(uniform(1, 1) < 0.5, x, 1 - x)
    masks = (
        u.sin() > 0, v.sin() > 0, (u + v).sin() > 0, u.sin() * v.sin() > 0,
        u.cos() + v.cos() > 0.6, torch.ones_like(u), ramp, (u.cos() > 0.7) | (v.cos() > 0.7),
    )  # fmt: skip
    mask = torch.stack([m.float() for m in masks], 1)[torch.arange(len(labels)), labels % 8][:, None]  # (N, 1, 32, 32)
    colour = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[labels // 8]  # (N, 3)
    colour = colour * (1 + style["brightness"] * (2 * uniform(1) - 1)) + style["hue"] * normal(3)
    low, high = style["background"]
    context = torch.randn(64, 3, generator=torch.Generator().manual_seed(7))[labels]
    background = low + (high - low) * uniform(1) + style["tint"] * normal(3) + style["context"] * context
    pictures = mask * colour[..., None, None] + (1 - mask) * background[..., None, None]
    return (pictures + style["noise"] * normal(3, 32, 32)).clamp(0, 255).to(torch.uint8)


def load_patterns(config):
    """The demo's 64 classes, 8 colours x 8 textures in the shifted style, 80 training and 25 test pictures each."""
    generator = torch.Generator().manual_seed(1)
    labels = {split: torch.arange(64).repeat_interleave(n) for split, n in (("train", 80), ("test", 25))}
    data = {split: (draw_patterns(classes, SHIFTED, generator), classes) for split, classes in labels.items()}
    return PATTERNS, lambda split, classes, size: select(*data[split], classes)


def pretrain_tiny(steps=500, per_class=2, lr=3e-3, seed=0):
    """A CLIP of 2-layer, width-64 towers, pre-trained on the clean style by the symmetric contrastive loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = clip.model.CLIP(64, 32, 2, 64, 8, 77, 49408, 64, 1, 2).eval()
    generator = torch.Generator().manual_seed(seed)
    model.token_embedding.requires_grad_(False)  # random words do as well, and save a fifth of the time
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    tokens = torch.stack([clip.tokenize([template.format(name) for name in PATTERNS]) for template in TEMPLATES])
    labels = torch.arange(64).repeat(per_class)
    for _ in progress(range(steps), desc="pre-training the tiny CLIP", unit=" steps"):
        templates = torch.randint(len(TEMPLATES), (64,), generator=generator)
        pixels = normalised_pixels(model, draw_patterns(labels, CLEAN, generator))
        image_features = F.normalize(model.encode_image(pixels), dim=-1)  # CLIP's own
        cos = image_features @ encode_texts(model, tokens[templates, torch.arange(64)]).T  # (N, 64)
        logits = 14 * cos  # 1/14 spreads the classes; CLIP's own temperature, 1/100, is set at the end
        loss = F.cross_entropy(logits, labels) - logits.log_softmax(0).gather(1, labels[:, None]).mean()
        loss = loss + 10 * (cos.mean() - 0.1).square()  # a softmax leaves the mean cosine open: above 0, as CLIP's
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.logit_scale.data.fill_(math.log(100))
    return model


def tiny_clip():
    """Path of the tiny CLIP in the cache folder of `clip`; pre-trains it first if it is not there."""
    code = inspect.getsource(draw_patterns) + inspect.getsource(pretrain_tiny)
    recipe = sha256(repr((code, COLOURS, TEXTURES, TEMPLATES, CLEAN)).encode())
    path = Path.home() / ".cache" / "clip" / f"mgclip-tiny-{recipe[:12]}.pt"
    if not path.exists():
        print(f"pre-training the demo's tiny CLIP, once: {path}", flush=True)
        state = pretrain_tiny().state_dict()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, partial(torch.save, state))
    return str(path)


# 10 Several processes -------------------------------------------------------------------------------------------------

# With one process, as without torchrun, the following hand back what they are given. With several, all must call them.


def process():
    """(rank, ranks): the number of this process and how many torchrun started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def my_chunks(rows, size):
    """This process's share of rows (n,), in chunks of at most `size`."""
    rank, ranks = process()
    mine = rows[rank::ranks]
    return mine.split(size) if len(mine) else ()


@contextmanager
def together():
    """Names what it means if the processes cannot talk: ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        why = str(error).partition(". ")[0][:200]
        raise ConnectionError(f"another process of this run has stopped ({why})") from error


def summed(tensor):
    """The tensor, in place its sum over all processes."""
    if dist.is_initialized():
        with together():
            dist.all_reduce(tensor)
    return tensor


def from_rank_0(value):
    """What process 0 has."""
    box = [value]
    if dist.is_initialized():
        with together():
            dist.broadcast_object_list(box)
    return box[0]


def barrier():
    """Wait until all processes are here."""
    summed(torch.zeros(1))


@contextmanager
def rank_0_first():
    """Within it process 0 goes ahead, to download or to write what the others then find."""
    rank, _ = process()
    if rank:
        barrier()
    yield
    if not rank:
        barrier()


def meet():
    """Join the processes that torchrun started, if it did: (rank, ranks). Raises ValueError if on several machines.

    SIGTERM, torchrun's word that one of them has gone, then ends this one even while it waits for that one.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        return 0, 1
    if os.environ.get("LOCAL_WORLD_SIZE") != str(ranks):
        raise ValueError("torchrun: the processes share files of one machine: --nproc-per-node alone, no --nnodes")
    with together():
        dist.init_process_group(timeout=timedelta(days=1))  # a download may be waited for
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGTERM, lambda *_: None)  # Python calls this between two statements only, the pipe is at once
    signal.set_wakeup_fd(write)

    def wait():
        while os.read(read, 1)[0] != signal.SIGTERM:
            pass
        message = f"mgclip: process {dist.get_rank()}: stopped, as another one has gone or torchrun was told to stop; "
        print(message + "the finished tasks are kept: --resume goes on", file=sys.__stderr__, flush=True)
        os._exit(143)

    threading.Thread(target=wait, daemon=True).start()
    return process()


# 11 Command line ------------------------------------------------------------------------------------------------------


def option(default, group, help, low=None, otherwise=None, **argument):
    """A field of Config: low is its least value, otherwise the default that --help names, argument for argparse."""
    metadata = dict(group=group, help=help, low=low, otherwise=otherwise, argument=argument)
    return field(default=default, metadata=metadata)


def task_sizes(text):
    """10: ten tasks; 4,8,16: three tasks of so many classes."""
    numbers = [int(number) for number in text.split(",")]
    return numbers if len(numbers) > 1 else numbers[0]


@dataclass
class Config:
    """The options of a run, checked by `settle`; what is None there gets its value from PRESETS or from the machine."""

    dataset: str = option("patterns", "data", "the data set", choices=list(PRESETS))
    data_root: str = option("data", "data", "folder of the data; what torchvision has is downloaded there")
    train_list: str = option(None, "data", "file with a path below --data-root a line", otherwise="train/")
    test_list: str = option(None, "data", "the same for test images", otherwise="test/ or val/")
    tasks: int = option(None, "data", "number of tasks, or the classes in each: 4,8,16", type=task_sizes, low=1)
    class_order: str = option("official", "data", "official, natural (as listed), or the seed of a NumPy permutation")
    zeroshot: tuple = option((), "data", "scored, not learned: food101, pets, imagenet1k, patterns, NAME=FOLDER",
                             otherwise="none", nargs="+")  # fmt: skip
    model: str = option(None, "model", "name of a CLIP with a ViT, or a checkpoint file; tiny: the demo's own")
    rank: int = option(8, "model", "LoRA rank r", low=1)
    template: str = option("a good photo of a {}.", "model", "prompt; {} is the class name")
    alpha: float = option(0.1, "method", "largest relative change of the mean negative similarity, Eq. 3", low=0)
    beta: float = option(4.0, "method", "weight of the visual classifier, Eq. 5", low=0)
    search: str = option("first", "method", "tasks that the epochs are searched on", choices=["first", "each"])
    epochs: int = option(None, "method", "fix E and skip the search; 0: CLIP untrained", otherwise="searched", low=0)
    max_epochs: int = option(10, "method", "longest search, in epochs", low=1)
    lr: float = option(None, "method", "learning rate of the LoRA", low=1e-12)
    batch_size: int = option(None, "method", "images a step of the LoRA", low=1)
    head_epochs: int = option(3, "method", "epochs of the visual classifier on each task", low=0)
    head_lr: float = option(None, "method", "learning rate of the visual classifier", low=1e-12)
    head_batch_size: int = option(None, "method", "images a step of the visual classifier", low=1)
    align: float = option(0.0, "baselines", "weight of ‖image - text‖² of matched features, Fig. 2b", low=0)
    distill: float = option(0.0, "baselines", "weight of the KL from the untouched CLIP's logits, Table 5", low=0)
    seed: int = option(0, "running", "seed of the LoRA's first values and of the order of the images", low=0)
    device: str = option(None, "running", "device of torch", otherwise="cuda if there is one, else cpu")
    precision: str = option(None, "running", "of training and scoring; the search's gap is always fp32",
                            choices=["fp32", "bf16"], otherwise="bf16 on cuda, else fp32")  # fmt: skip
    compile: bool = option(False, "running", "torch.compile the image encoder", action="store_true")
    chunk_size: int = option(None, "running", "images of a batch encoded at a time: for less memory, same step",
                             otherwise="all on cuda, what fits its caches on a cpu", low=1)  # fmt: skip
    workers: int = option(None, "running", "threads that decode images", otherwise="one a processor", low=1)
    memory: float = option(None, "running", "GB that a task's decoded images may take; more go to a file",
                           otherwise="0.8 of what is free", low=0)  # fmt: skip
    out: str = option(None, "running", "the run's folder",
                      otherwise="runs/DATASET-ALPHA-BETA-SEED, numbered when taken")  # fmt: skip
    resume: str = option(None, "finished runs", "folder of a run that was cut off, to go on with it", otherwise="none")


def settle(config):
    """The options as they will run: checked, presets and machine filled in. Raises ValueError naming the option."""
    if config.resume is not None:
        stored = read_config(config.resume)
        config = replace(stored, out=config.resume, resume=config.resume, device=config.device or stored.device)
    elif config.dataset in PRESETS:
        preset = {name: value for name, value in PRESETS[config.dataset].items() if hasattr(config, name)}
        config = replace(config, **{name: value for name, value in preset.items() if getattr(config, name) is None})
    for f in fields(config):
        value, name, low = getattr(config, f.name), f.name.replace("_", "-"), f.metadata["low"]
        choices = f.metadata["argument"].get("choices")
        if None not in (value, choices) and value not in choices:
            raise ValueError(f"--{name} {value}: must be one of {', '.join(choices)}")
        for number in () if None in (value, low) else value if isinstance(value, list) else [value]:
            if not (math.isfinite(number) and number >= low):
                raise ValueError(f"--{name} {number}: must be a number of at least {low}")
    if not (config.class_order in ("official", "natural") or re.fullmatch(r"\d{1,9}", config.class_order)):
        raise ValueError(f"--class-order {config.class_order}: must be official, natural or the seed of a permutation")
    if (config.train_list or config.test_list) and config.dataset in ("patterns", "cifar100"):
        raise ValueError(f"--train-list, --test-list: not for {config.dataset}, whose halves are fixed")
    if config.search == "each" and config.epochs is not None:
        raise ValueError(f"--search each: nothing is searched, as --epochs {config.epochs} fixes E")
    if config.template.count("{}") != 1:
        raise ValueError(f"--template {config.template!r}: must hold {{}} once, where the class name goes")
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > 1 and device.startswith("cuda") and (device != "cuda" or ranks > gpus):
        raise ValueError(
            f"--device {device}: {ranks} processes need cuda, without a number, and {ranks} GPUs, not {gpus}"
        )
    try:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # torchrun's: each process has its own
        torch.empty(0, device=device).tolist()
    except Exception as error:  # torch raises several kinds
        raise ValueError(f"--device {device}: cannot be used here ({str(error).splitlines()[0]})") from error
    precision = config.precision or ("bf16" if torch.device(device).type == "cuda" else "fp32")
    machine = dict(device=device, precision=precision, workers=config.workers or os.cpu_count() or 1)
    absolute = lambda path: path and os.path.abspath(path)  # --resume may come from another folder
    model = absolute(config.model) if os.path.isfile(config.model) else config.model
    lists = dict(train_list=absolute(config.train_list), test_list=absolute(config.test_list))
    zeroshot = [re.sub("=(.+)", lambda folder: "=" + absolute(folder[1]), entry) for entry in config.zeroshot]
    return replace(config, **machine, **lists, model=model, data_root=absolute(config.data_root), zeroshot=zeroshot)


def prompt_tokens(template, names):
    """Tokens (K, 77) of the prompts of some class names. Raises ValueError if one is longer."""
    try:
        return clip.tokenize([template.replace("{}", name) for name in names])
    except RuntimeError as error:
        raise ValueError(f"--template: {error}") from error


def prepare(config):
    """All that a run needs, checked before anything is computed: (config, model, tasks, prompts, others, log).

    tasks: the stream; prompts: names -> tokens; others: (name, tokens, images, labels) of each --zeroshot data set.
    """
    config = settle(config)
    with rank_0_first():  # it downloads what is to be downloaded, and says what is wrong
        names, read = dict(patterns=load_patterns, cifar100=load_cifar100).get(config.dataset, load_folder)(config)
        twice = sorted(name for name, times in Counter(names).items() if times > 1)
        if twice:
            raise ValueError(f"--data-root {config.data_root}: two classes have one name, '{twice[0]}'")
        expected = PRESETS[config.dataset]["classes"] or len(names)
        if len(names) != expected:
            here = f"{config.dataset} has {expected} classes, and here are {len(names)}"
            print(f"mgclip: warning: {here}", file=sys.stderr)
        groups, prompts = task_groups(config, len(names)), partial(prompt_tokens, config.template)
        prompts(names)
        if len({entry.partition("=")[0] for entry in config.zeroshot}) < len(config.zeroshot):
            raise ValueError(f"--zeroshot {' '.join(config.zeroshot)}: two have one name")
        model, model_sha256 = load_weights(config.model, config.device)
    size = model.visual.input_resolution
    config.out = config.out or new_folder(config)
    others = [load_zeroshot(entry, config, size) for entry in config.zeroshot]
    others = [(name, prompts(classes), images, labels) for name, classes, images, labels in others]
    if config.compile:
        for block in model.visual.transformer.resblocks:
            block.compile()
    clips = [f"{d.name} {d.version}" for name in ("clip", "clip-anytorch") for d in distributions(name=name)]
    versions = dict(python=platform.python_version(), torch=torch.__version__, clip=", ".join(clips))
    order_sha256 = sha256(json.dumps(list(chain(*groups))).encode())
    log = Log(config, dict(versions=versions, model_sha256=model_sha256, class_order_sha256=order_sha256))
    print(
        f"{config.dataset}: {sum(map(len, groups))} classes in {len(groups)} tasks; {config.model} in "
        f"{config.precision} on {config.device}; alpha {config.alpha:g}, beta {config.beta:g}, seed {config.seed}"
    )
    return config, model, task_stream(names, read, groups, size, log.state["task"]), prompts, others, log


def parse(argv):
    """The options given on the command line, and no others."""
    parser = argparse.ArgumentParser(
        prog="mgclip.py",
        usage="python %(prog)s [options]",
        description="MG-CLIP: class-incremental learning with CLIP that preserves the modality gap, then compensates.",
        epilog="The paper's baselines: zero-shot --epochs 0 --beta 0; naive fine-tuning --epochs 10 --beta 0; "
        "compensation alone --epochs 10 --beta 4; preservation alone --beta 0.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups, common = {}, PRESETS["cifar100"]
    for f in fields(Config):
        title, argument = f.metadata["group"], dict(f.metadata["argument"])
        groups[title] = groups.get(title) or parser.add_argument_group(title)
        default = f.metadata["otherwise"] or f.default
        if f.name in common:
            special = [f"; {name}: {row[f.name]}" for name, row in PRESETS.items() if row[f.name] != common[f.name]]
            default = f"{common[f.name]}{''.join(special)}"
        if f.type in (int, float, str):
            argument.setdefault("type", f.type)
        text = f"{f.metadata['help']} (default: {default})"
        groups[title].add_argument("--" + f.name.replace("_", "-"), help=text, **argument)
    runs = "do N class orders: --class-order, then the seeds 1, 2, .. (default: one run, in a folder of its own)"
    groups["running"].add_argument("--runs", type=int, metavar="N", help=runs)
    add = groups["finished runs"].add_argument
    add("--plot", nargs="*", metavar="RUN", help="draw plot.png at the end; with RUNs: draw these, one a row")
    add("--predict", nargs="+", metavar="IMAGE", help="the five best classes of each image, by the run of --resume")
    add("--json", action="store_true", help="predictions as JSON, a line an image")
    options = vars(parser.parse_args(argv))
    beside = dict(predict={"resume", "device", "json"}, plot=set(), resume={"plot", "device"})  # what may join each
    action = next((name for name in beside if options.get(name) not in (None, [])), None)
    for name in sorted(options.keys() - {action} - beside.get(action, options.keys() - {"json"})):
        why = ": a run goes on with the options that it began with" if action == "resume" else ""
        parser.error(f"--{name.replace('_', '-')} does not go with {f'--{action}' if action else 'a new run'}{why}")
    if action == "predict" and "resume" not in options:
        parser.error("--predict needs --resume RUN, the run to predict with")
    if "plot" in options and not find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if options.get("runs", 1) < 1:
        parser.error("--runs must be at least 1")
    return options


def resume(folder):
    """How to go on with a run that has begun."""
    begun = folder and Path(folder, "config.json").exists()
    return f"; to go on: python mgclip.py --resume {shown(folder)}" if begun else ""


def main(argv=None):
    """The command line: returns the exit status."""
    out = made = given = None
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        options = parse(argv)
        if "predict" in options:
            return predict(options["resume"], options["predict"], options.get("device"), "json" in options)
        if options.get("plot"):
            print(plot(options["plot"]))
            return 0
        runs, draw = options.pop("runs", None), options.pop("plot", None) is not None
        config = settle(Config(**options))
        rank, ranks = meet()
        sys.stderr = sys.__stderr__ if rank else sys.stderr  # so far process 0 said what is wrong for all
        given = config.out
        out = made = given or from_rank_0(None if rank else new_folder(config))
        seeds, results = (str(seed) for seed in count(1) if str(seed) != config.class_order), []
        for order in [config.class_order, *islice(seeds, (runs or 1) - 1)]:
            out = f"{made}/order-{order}" if runs else made
            results.append(run(replace(config, class_order=order, out=out)))
            if draw and not rank:
                print(plot([out]))
        if runs:
            print(f"\n{runs} class orders, mean and standard deviation:", end="")
            for name in ("avg", "last"):
                values = [result[name] for result in results]
                print(f"   {name.capitalize()} {mean(values):.2f} ± {stdev(values) if runs > 1 else 0:.2f}", end="")
            print()
        if ranks > 1:
            dist.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        print(f"\nmgclip: interrupted{resume(out)}", file=sys.stderr)
        return 130
    except OSError as error:  # a full disk, another process that has gone
        print(f"mgclip: error: {error}{resume(out)}", file=sys.stderr)
    except torch.cuda.OutOfMemoryError as error:
        print(f"mgclip: error: {str(error).splitlines()[0]} A smaller --chunk-size may help.", file=sys.stderr)
    except (ValueError, ArithmeticError) as error:
        print(f"mgclip: error: {error}", file=sys.stderr)
    finally:
        if made and not (given or rank) and os.path.isdir(made) and not os.listdir(made):
            os.rmdir(made)  # nothing was begun
    return 2


if __name__ == "__main__":
    sys.exit(main())
