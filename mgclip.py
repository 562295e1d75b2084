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

A `# line n` below marks the statement that is line n: 6 and 12 in `run`, 10 and 11 in `evaluate`, 1-9 in `MGCLIP` and
what it calls. Eq. 1 and 2 are in `similarity_gap`, 3 in `find_epochs`, 5 in `fused_scores`, 6 in `subspace_distance`.
Parts: 1-6 the method, 7 baselines and analyses, 8 beyond the paper, 9 data, 10 results, 11 demo, 12 several processes,
13 command line.

    python mgclip.py                                            a demo that downloads nothing: patterns, a tiny CLIP
    python mgclip.py --dataset cifar100 --alpha 0.1 --beta 4    the paper's CIFAR-100 with OpenAI's ViT-B/16
    python mgclip.py --dataset folder --data-root DIR --tasks 10    your own DIR/{train,test}/<class>/<images>
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shlex
import sys
import tempfile
import time
import unicodedata
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
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
    Returns (pos, neg), floats in [-1, 1], without temperature. Raises ValueError if K < 2, and FloatingPointError if
    the features are not finite, as after a step that was too long.
    """
    N, K = len(image_features), len(text_features)
    if K < 2:
        raise ValueError(f"Eq. 2 needs the texts of at least two classes, not {K}")
    cos = cosine(image_features, text_features)  # (N, K)
    own = cos.gather(1, labels.to(cos.device, torch.long)[:, None])  # (N, 1)
    pos = own.mean()  # Eq. 1
    neg = (cos.sum() - own.sum()) / (N * (K - 1))  # Eq. 2
    if not neg.isfinite():
        raise FloatingPointError("the features are no longer finite; a smaller learning rate may help")
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
        """As nn.MultiheadAttention's: n tokens of N images or texts, (n, N, d) each -> (n, N, d), None."""
        r = len(self.A_k)  # LoRA's scale is 1 / r (authors' code)
        W_q, W_k, W_v = self.attn.in_proj_weight.chunk(3)
        b_q, b_k, b_v = self.attn.in_proj_bias.chunk(3)
        q = F.linear(query, W_q, b_q)
        k = F.linear(key, W_k, b_k) + F.linear(key @ self.A_k.T, self.B_k / r)
        v = F.linear(value, W_v, b_v) + F.linear(value @ self.A_v.T, self.B_v / r)
        y = F.scaled_dot_product_attention(self.heads(q), self.heads(k), self.heads(v), attn_mask)  # (N, h, n, d / h)
        y = y.permute(2, 0, 1, 3).flatten(2)  # (n, N, d)
        return self.attn.out_proj(y), None

    def heads(self, x):
        """(n, N, d) -> (N, h, n, d / h)"""
        return x.unflatten(2, (self.attn.num_heads, -1)).permute(1, 2, 0, 3)


def add_lora(model, rank=8):
    """Add LoRA to the key and value projections of both encoders, in place, and freeze everything else (line 1).

    model: a `clip.model.CLIP` with a ViT image encoder; a `KeyValueLoRA` takes the place of each block's `attn`.
    Returns [A_k, B_k, A_v, B_v] per block, image blocks first, then text; A (r, d) Xavier-uniform, B (d, r) zero. On
    ViT-B/16, rank 8, they have 491,520 entries; with the head's 100 x 512 that is the paper's 0.54M. No q, no MLP.
    Raises ValueError if the model is not in float32, as clip.load leaves it on a GPU, or has its LoRA already.
    """
    if model.dtype != torch.float32:
        raise ValueError(f"LoRA trains in float32, and the model is in {model.dtype}: call model.float() first")
    model.requires_grad_(False)
    lora = []
    for block in [*model.visual.transformer.resblocks, *model.transformer.resblocks]:
        if isinstance(block.attn, KeyValueLoRA):
            raise ValueError("the model has a LoRA already")
        block.attn = KeyValueLoRA(block.attn, rank).to(block.attn.in_proj_weight)
        lora += [block.attn.A_k, block.attn.B_k, block.attn.A_v, block.attn.B_v]
    return lora


# 3 CLIP features ------------------------------------------------------------------------------------------------------


def encode_images(model, images):
    """Image features: uint8 (N, 3, H, W) of any size -> (N, D) float32, unit norm, on the model's device."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images are uint8, 0 to 255, not {images.dtype}: `normalised_pixels` is CLIP's preprocessing")
    return F.normalize(model.encode_image(normalised_pixels(model, images)).float(), dim=-1)


def encode_texts(model, tokens):
    """Text features: int (K, 77) of `clip.tokenize` -> (K, D) float32, unit norm, on the model's device."""
    return F.normalize(model.encode_text(tokens.to(model.logit_scale.device)).float(), dim=-1)


def images_at_once(model):
    """As many images as a GPU is busy with, or as keep a CPU's widest activation within 8 MB."""
    if model.logit_scale.is_cuda:
        return 64
    tokens, d = model.visual.positional_embedding.shape
    bytes_per_image = tokens * 4 * d * 4  # 4 d float32 a token, in the MLP
    return max(1, 2**23 // bytes_per_image)


@torch.no_grad()
def extract_features(model, images, desc="image features"):
    """`encode_images` without gradients, a chunk at a time: uint8 (N, 3, H, W) -> (N, D)."""
    chunks = progress(images.split(images_at_once(model)), desc=desc)
    return gathered(torch.cat([encode_images(model, chunk) for chunk in chunks]))


# 4 Preserve the gap ---------------------------------------------------------------------------------------------------


def accumulate_gradients(model, lora, images, labels, tokens, batch, extra_loss=None):
    """Cross-entropy of a batch of image numbers over the task's classes; its gradients become the LoRA's .grad.

    The texts are encoded once, the images a chunk at a time: the chunks' gradients add up to those of the batch.
    """
    texts = encode_texts(model, tokens)  # (K, D), of the task's classes alone: masked ones need no text
    leaf = texts.detach().requires_grad_()  # its .grad adds up over the chunks, for one pass back through the texts
    for p in (leaf, *lora):
        p.grad = torch.zeros_like(p)
    total = torch.zeros((), device=leaf.device)
    for rows, chunk in held_chunks(images, batch, images_at_once(model)):
        x = encode_images(model, chunk)  # (n, D)
        logits = model.logit_scale.exp() * cosine(x, leaf)  # (n, K)
        loss = F.cross_entropy(logits, labels[rows].to(x.device, torch.long))
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
    """`finetune`, with the same arguments, but yielding (epoch, mean loss) after each epoch.

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
        schedule.step()
        yield epoch, mean_loss(losses, epoch)


def mean_loss(losses, epoch):
    """Mean of an epoch's losses, read once for all steps. Raises FloatingPointError if it is not finite."""
    loss = torch.stack(losses).mean().item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"epoch {epoch}: the loss is {loss}; a smaller learning rate may help")
    return loss


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


@contextmanager
def restored(lora, generator=None):
    """Within it the LoRA and a generator (None: torch's own) may change; after it they are as they were."""
    generator = generator or torch.default_generator
    before = [p.detach().clone() for p in lora]
    state = generator.get_state()
    try:
        yield
    finally:
        generator.set_state(state)
        for p, p_0 in zip(lora, before):
            p.data.copy_(p_0)


def find_epochs(model, lora, images, labels, tokens, alpha=0.1, max_epochs=10, generator=None, **options):
    """The number of epochs that leaves the gap within alpha, found on the first task (lines 2-5, Eq. 3).

    Arguments as in `finetune`; alpha: the largest relative change of neg, 0.1 is 10%. neg is over all images given, and
    the learning-rate schedule over max_epochs, where that of the final runs is over E (authors' code).
    Returns (E, history): dicts of epoch, pos, neg, delta, from epoch 0 to the crossing one, else to max_epochs. Leaves
    lora and generator as it found them: training then goes on as if E had been given.
    Raises ValueError if neg_0 is so near 0 that Δ means nothing.
    """
    pos, neg_0 = measure_gap(model, images, labels, tokens)  # line 2
    if abs(neg_0) < 1e-3:
        raise ValueError(f"neg_0 = {neg_0:.1e} is too near 0 for Eq. 3 to mean anything: fix E with --epochs")
    E, history = 1, [dict(epoch=0, pos=pos, neg=neg_0, delta=0.0)]
    with restored(lora, generator):  # line 5: restore the LoRA
        epochs = train_epochs(model, lora, images, labels, tokens, max_epochs, generator=generator, **options)
        for e, _ in epochs:  # line 3
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
    K = int(labels.max()) + 1
    return torch.stack([features[labels == k].mean(0) for k in range(K)])


class CosineHead:
    """Cosine classifier in the visual space: W_v of Eq. 5, one row per class. Features (N, D) -> cosines (N, K)."""

    def __init__(self, dim):
        self.weight = torch.empty(0, dim)  # W_v (K, D)
        self.first_new = 0  # the rows from here on were added last

    def add_classes(self, prototypes):
        """Append one row per new class (line 8): prototypes (k, D), whose device the head goes to."""
        self.first_new = len(self.weight)
        self.weight = torch.cat([self.weight.to(prototypes), prototypes])

    def learn(self, features, labels, **options):
        """Lines 8 and 9 on a task: features (N, D); labels (N,) count its classes from 0; options are `fit_head`'s."""
        self.add_classes(class_prototypes(features, labels))  # line 8
        fit_head(self, features, labels, **options)  # line 9

    def __call__(self, features):
        return cosine(features, self.weight)  # no temperature (authors' code)


def fit_head(head, features, labels, epochs=3, lr=5e-4, batch_size=64, generator=None):
    """Train the rows of the head added last by cross-entropy on image features (line 9); older rows stay as they are.

    features (N, D): float32, computed once; labels (N,): int, indices into those rows.
    Adam, raw cosines as logits, cosine schedule stepped per batch down to 1% of lr (authors' code).
    Returns the mean loss of each epoch. Raises FloatingPointError as `finetune` does.
    """
    rows = head.weight[head.first_new :].clone().requires_grad_()  # (k, D)
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
    head.weight[head.first_new :] = rows.detach()
    return history


def fused_scores(text_logits, visual_cosines, beta=4.0):
    """f_clip(x, t) + beta * softmax(W_v x) (Eq. 5): text_logits (N, K), 100 * cos; visual_cosines (N, K) -> (N, K).

    f_clip takes the softmax twice (authors' code), so that both terms are softmaxes of numbers in [-1, 1] and vary
    alike. Against a single one the head's softmax, nearly flat over K classes, would hardly count.
    """
    return text_logits.softmax(-1).softmax(-1) + beta * visual_cosines.softmax(-1)


# 6 The algorithm ------------------------------------------------------------------------------------------------------


class MGCLIP:
    """A CLIP that learns one task after another: `learn` is lines 2-9 of the algorithm, `scores` line 10.

    model: a `clip.model.CLIP` with a ViT, in float32, trained in place. epochs: E; None: found on the first task;
    "each": on every task. head: a `CosineHead`, or what takes its place. make_extra_loss(learner, images, labels,
    tokens): a baseline's, called on every task; what it returns is `finetune`'s extra_loss. bf16: mixed precision. The
    other options are the paper's, with CIFAR-100's values.
    Attributes: names, of all K classes so far; E, the number of epochs of the last task.
    """

    def __init__(
        self, model, rank=8, alpha=0.1, beta=4.0, epochs=None, max_epochs=10, lr=1e-3, batch_size=128, head_epochs=3,
        head_lr=5e-4, head_batch_size=64, template="a good photo of a {}.", head=None, make_extra_loss=None, seed=0,
        bf16=False,
    ):  # fmt: skip
        self.model = model
        with torch.random.fork_rng(devices=[]):  # torch's own generator stays as it was
            torch.manual_seed(seed)
            self.lora = add_lora(model, rank)  # line 1
        self.generator = torch.Generator().manual_seed(seed)  # of the order of the images
        self.head_generator = torch.Generator().manual_seed(seed)  # of its own, so that heads compare
        self.head = head or CosineHead(model.text_projection.shape[1])
        self.names = []
        self.template = template
        self.beta = beta
        self.search_each = epochs == "each"
        self.E = None if self.search_each else epochs
        self.make_extra_loss = make_extra_loss
        self.search_options = dict(alpha=alpha, max_epochs=max_epochs)
        self.lora_options = dict(lr=lr, batch_size=batch_size, generator=self.generator)
        self.head_options = dict(epochs=head_epochs, lr=head_lr, batch_size=head_batch_size)
        device = model.logit_scale.device.type
        # no cache: it would keep bf16 copies of A and B from before a step
        self.autocast = partial(torch.autocast, device, torch.bfloat16, enabled=bf16, cache_enabled=False)

    def learn(self, images, labels, names):
        """Learn a task. images: uint8 (N, 3, H, W); labels (N,): int, indices into names, those of its k new classes.

        Returns the history of the search, empty where E was known. Raises ValueError if images and labels do not fit,
        a class has no image or no prompt that the model can read, or E cannot be found on this task; FloatingPointError
        if a loss or a feature is not finite.
        """
        rank, ranks = process()
        if len(images) != len(labels[rank::ranks]):
            raise ValueError(f"{len(images)} images, but {len(labels)} labels")
        if labels.unique().tolist() != list(range(len(names))):
            raise ValueError(f"labels: each of the {len(names)} classes needs an image, and they count from 0")
        history = self.preserve(images, labels, self.prompts(names))  # lines 2-5 and 7
        features = self.features(images)  # (N, D), once: until the next task f is frozen (line 8)
        self.head.learn(features, labels, generator=self.head_generator, **self.head_options)  # lines 8, 9
        self.names += [str(name) for name in names]
        return history

    def preserve(self, images, labels, tokens):
        """Find E if it is not known (lines 2-5), and train the LoRA for E epochs (line 7). tokens: prompts (k, 77)."""
        task = dict(model=self.model, lora=self.lora, images=images, labels=labels, tokens=tokens)
        options = dict(self.lora_options, after_step=self.after_step)
        history = []
        with self.autocast():
            if self.make_extra_loss is not None:
                options["extra_loss"] = self.make_extra_loss(self, images, labels, tokens)
            if self.E is None or (self.search_each and len(tokens) > 1):  # Eq. 2 needs two classes
                self.E, history = find_epochs(**task, **self.search_options, **options)  # lines 2-5
            finetune(**task, epochs=self.E, **options)  # line 7
        return history

    def after_step(self):
        """What follows every step of the LoRA: nothing, in MG-CLIP."""

    def features(self, images):
        """Image features (N, D) of uint8 images (N, 3, H, W)."""
        with self.autocast():
            return extract_features(self.model, images)

    @torch.no_grad()
    def texts(self, names=None):
        """Text features (K, D) of all classes so far, or of others."""
        with self.autocast():
            return encode_texts(self.model, self.prompts(self.names if names is None else names))

    def prompts(self, names):
        """The prompts (K, 77) of classes. Raises ValueError at one that is too long for the model."""
        return class_tokens(self.template, names, self.model.context_length)

    def scores(self, features, texts):
        """Scores over all classes so far, in the order in which they were learned: features (N, D), texts (K, D).

        Returns (N, K) each: Eq. 5's scores (line 10), and their halves, text logits and visual cosines.
        """
        text_logits = self.model.logit_scale.exp().detach() * cosine(features, texts)
        visual_cosines = self.head(features)
        return fused_scores(text_logits, visual_cosines, self.beta), text_logits, visual_cosines

    def predict(self, images):
        """The number (N,), in `names`, of each image's class: uint8 (N, 3, H, W)."""
        return self.scores(self.features(images), self.texts())[0].argmax(1)

    def state(self):
        """All that was learned, without CLIP's own weights, for `load`: it loads with `weights_only=True`."""
        lora = [p.detach().cpu().clone() for p in self.lora]
        generators = [self.generator.get_state(), self.head_generator.get_state()]
        head = dict(vars(self.head), weight=self.head.weight.cpu())
        return dict(E=self.E, names=list(self.names), lora=lora, head=head, generators=generators)

    def load(self, state):
        """Go on where `state` was taken: by a learner of the same options, on the same CLIP."""
        self.E = state["E"]
        self.names = list(state["names"])
        for p, saved in zip(self.lora, state["lora"], strict=True):
            p.data.copy_(saved)
        vars(self.head).update(state["head"])
        self.head.weight = self.head.weight.to(self.lora[0].device)
        self.generator.set_state(state["generators"][0])
        self.head_generator.set_state(state["generators"][1])


def evaluate(learner, tests):
    """Lines 10 and 11. tests: (images, labels) of every task so far, labels counting over all classes.

    Returns accuracy, in per cent, by Eq. 5, by its text half and by its visual half alone, over all images, each
    counted alike (authors' code); per_task, Eq. 5's on each task; and what `analyse` says of all images.
    """
    texts = learner.texts()  # (K, D), once for all images
    features, right = [], []  # of every task (N, D), and (3, N): 1 where Eq. 5, text half, visual half name right
    for images, labels in tests:
        x = learner.features(images)  # (N, D)
        scores = learner.scores(x, texts)  # line 10
        features.append(x)
        right.append(torch.stack([part.argmax(1).cpu() == labels for part in scores]).double())
    A_t, A_text, A_visual = (100 * torch.cat(right, 1).mean(1)).tolist()  # line 11
    per_task = [100 * task[0].mean().item() for task in right]
    truth = torch.cat([labels for _, labels in tests])
    analysis = analyse(torch.cat(features), truth, texts, learner.head.weight)
    return dict(accuracy=A_t, text_accuracy=A_text, visual_accuracy=A_visual, per_task=per_task, **analysis)


def run(config):
    """MG-CLIP, lines 1-12, on the tasks of a data set. config: what `parse` returns.

    Returns the `end` event of metrics.jsonl: a dict with accuracy [A_1..A_T], avg, last, epochs and the analyses.
    Raises ValueError, OSError or FloatingPointError, with a message, for what the user can cause.
    """
    learner = in_turn(build, config)  # line 1
    tasks = in_turn(open_tasks, config, learner)  # of each: names, training images, test images
    others = load_zeroshot(config, learner)  # scored, not learned
    log = Log(config, learner, tasks, others)
    done = log.restore(learner)  # how many tasks were learned before --resume
    if done == 0:
        log.zeroshot(0, learner, others)

    K, tests = 0, []  # of tasks 1..t: how many classes; test images and labels
    for t, (names, train, test) in enumerate(tasks, 1):  # line 6
        images, labels = load_images(test, f"task {t}, test")
        tests.append((images, K + labels))  # labels count over all classes
        K += len(names)
        if t <= done:
            continue
        history = learner.learn(*load_images(train, f"task {t}, train"), names)  # lines 2-5 and 7-9
        log.search(t, history, learner.E)
        log.task(t, learner, **evaluate(learner, tests))  # lines 10, 11
        log.zeroshot(t, learner, others)
        log.save(t, learner)
    A = log.accuracies()  # [A_1..A_T]
    return log.end(learner, avg=mean(A), last=A[-1])  # line 12


# 7 The paper's baselines and analyses ---------------------------------------------------------------------------------


def baseline_loss(learner, images, labels, tokens, align, distill):
    """What --align and --distill add to the loss on one task: `finetune`'s extra_loss."""
    model, lora = learner.model, learner.lora
    with torch.no_grad(), restored(lora):  # the CLIP that nothing has trained yet: ΔW = B A / r = 0
        for p in lora:
            p.zero_()
        features = extract_features(model, images, desc="untouched CLIP")
        logits_0 = model.logit_scale.exp() * cosine(features, encode_texts(model, tokens))  # (N, K)

    def extra_loss(x, texts, logits, rows):  # (n, D), (K, D), (n, K), and (n,): the images' numbers in the task
        own = texts[labels[rows].to(texts.device)]  # (n, D)
        distance = (x - own).square().sum(1).mean()  # Fig. 2b: an image and its own text are made to meet
        drift = F.mse_loss(logits, logits_0[rows.to(x.device)])  # Table 5: the logits are held (authors' code)
        return align * distance + distill * drift

    return extra_loss


@torch.no_grad()
def zeroshot_accuracy(learner, images, labels, names):
    """Table 2: per cent of the images of a data set not learned that the text classifier names right."""
    predicted = cosine(learner.features(images), learner.texts(names)).argmax(1)
    return 100 * (predicted.cpu() == labels).double().mean().item()


def basis(rows, n):
    """Orthonormal basis (D, n) of the n leading directions of rows (N, D)."""
    return torch.linalg.svd(rows, full_matrices=False).Vh[:n].T


def subspace_distance(B_1, B_2):
    """d(B_1, B_2): mean length of what of the columns of B_1 (D, k) is outside B_2 (D, l), both orthonormal (Eq. 6)."""
    outside = B_1 - B_2 @ (B_2.T @ B_1)  # (D, k): x - B Bᵀ x of every x
    return outside.norm(dim=0).mean().item()


def analyse(features, labels, texts, W_v):
    """Tables 4 and 5, on images of all classes: pos, neg, and how far the images' space is from each classifier's.

    features (N, D), labels (N,), texts (K, D), W_v (K, D). B_i of the images is cut to K directions: our choice, since
    the supplement that says how is not at hand. B_t is of the texts, B_vc of W_v, B_t+vc of both. A distance is left
    out where so many vectors fill the space.
    """
    K, D = texts.shape
    pos, neg = similarity_gap(features, texts, labels)
    result = dict(pos=pos, neg=neg)
    if K < D:
        W_v = F.normalize(W_v, dim=-1)
        B_i = basis(features, K)
        result["d(B_i, B_t)"] = subspace_distance(B_i, basis(texts, K))
        result["d(B_i, B_vc)"] = subspace_distance(B_i, basis(W_v, K))
    if 2 * K < D:
        result["d(B_i, B_t+vc)"] = subspace_distance(B_i, basis(torch.cat([texts, W_v]), 2 * K))
    return result


def forgetting(per_task):
    """(forgetting, backward transfer), in points, of the rows a_t = [a_t1 .. a_tt]: accuracy on each task after task t.

    Means over the earlier tasks j of max_{t<T} a_tj - a_Tj (Chaudhry et al. 2018) and of a_Tj - a_jj (Lopez-Paz and
    Ranzato 2017); 0 while there is one task.
    """
    *before, last = per_task
    lost, gained = [], []
    for j in range(len(before)):
        best = max(row[j] for row in before[j:])  # after task j, after the next, ..
        lost.append(best - last[j])
        gained.append(last[j] - before[j][j])
    return mean(lost or [0.0]), mean(gained or [0.0])


# 8 Beyond the paper ---------------------------------------------------------------------------------------------------


class RidgeHead(CosineHead):
    """--head ridge, in the place of line 9: W = (ΦᵀΦ + λI)⁻¹ΦᵀY over all training images so far, Φ = relu(X R).

    X (N, D): their unit-norm features; R (D, M): random and fixed; Y (N, K): a one in the column of each image's class.
    The idea of RanPAC (arXiv 2307.02251). Only ΦᵀΦ and ΦᵀY are kept: nothing is trained, no row grows stale, and while
    f stands still the order of the tasks does not matter.
    """

    def __init__(self, dim, width=2048, ridge=10.0):
        super().__init__(dim)
        self.R = torch.randn(dim, width, generator=torch.Generator().manual_seed(0))
        self.gram = ridge * torch.eye(width, dtype=torch.double)  # ΦᵀΦ + λI (M, M)
        self.sums = torch.zeros(width, 0, dtype=torch.double)  # ΦᵀY (M, K)

    def learn(self, features, labels, **_):
        self.add_classes(class_prototypes(features, labels))  # line 8, for the analyses
        phi = self.expanded(features).cpu().double()
        Y = F.one_hot(labels.cpu().long()).double()  # (N, k)
        self.gram = self.gram + phi.T @ phi
        self.sums = torch.cat([self.sums, phi.T @ Y], dim=1)
        self.W = torch.linalg.solve(self.gram, self.sums).float()  # (M, K)

    def expanded(self, features):
        return (features @ self.R.to(features)).relu()  # (N, M)

    def __call__(self, features):
        return self.expanded(features) @ self.W.to(features)  # in the place of the cosines in Eq. 5


class NullSpaceMGCLIP(MGCLIP):
    """--null-space RHO: a task's LoRA leaves alone what the keys and values of earlier tasks were made of.

    The idea of GNSP (arXiv 2507.19839) on MG-CLIP's LoRA. Of every block it keeps the uncentred second moments (d, d)
    of what enters keys and values; the leading directions that hold 1 - RHO of their energy are closed to later tasks.
    """

    def __init__(self, model, rho=0.1, **options):
        super().__init__(model, **options)
        self.rho = rho
        self.attns = [module for module in model.modules() if isinstance(module, KeyValueLoRA)]  # images' first
        widths = [attn.attn.embed_dim for attn in self.attns]
        self.moments = [torch.zeros(d, d, dtype=torch.double) for d in widths]
        self.P = []  # a projection (d, d) per block, from the second task on

    def learn(self, images, labels, names):
        if self.names:
            self.begin_task()
        history = super().learn(images, labels, names)
        self.remember(images, self.prompts(names))
        return history

    @torch.no_grad()
    def begin_task(self):
        """Fold B A / r into the frozen weights, and start a fresh LoRA in what earlier tasks leave free."""
        self.P = []
        for attn, M in zip(self.attns, self.moments):
            W = attn.attn.in_proj_weight  # (3 d, d)
            _, W_k, W_v = W.chunk(3)  # views
            W_k += attn.B_k @ attn.A_k / len(attn.A_k)
            W_v += attn.B_v @ attn.A_v / len(attn.A_v)
            energy, directions = torch.linalg.eigh(M)  # ascending
            share = energy.cumsum(0) / energy.sum()
            closed = directions[:, share > self.rho]  # (d, n)
            self.P.append((torch.eye(len(M)) - closed @ closed.T).to(W))
            for A, B in ((attn.A_k, attn.B_k), (attn.A_v, attn.B_v)):
                A.copy_(nn.init.xavier_uniform_(torch.empty(A.shape), generator=self.generator))
                B.zero_()
        self.after_step()

    @torch.no_grad()
    def after_step(self):
        """A <- A P: then B A x = 0 for every x in the closed directions."""
        for attn, P in zip(self.attns, self.P):
            attn.A_k.copy_(attn.A_k @ P)
            attn.A_v.copy_(attn.A_v @ P)

    @torch.no_grad()
    def remember(self, images, tokens):
        """Add the moments of a task: of all tokens of its images (N, 3, H, W), and of its prompts, tokens (K, 77)."""
        new = {attn: torch.zeros_like(M) for attn, M in zip(self.attns, self.moments)}

        def add(attn, inputs):
            x = inputs[1].flatten(0, 1)  # (n N, d): the keys' input
            new[attn] += (x.T @ x).cpu().double()

        hooks = [attn.register_forward_pre_hook(add) for attn in self.attns]
        extract_features(self.model, images, desc="moments")
        for M in new.values():
            summed(M)
        encode_texts(self.model, tokens)  # every process has all prompts
        for hook in hooks:
            hook.remove()
        self.moments = [M + new[attn] for attn, M in zip(self.attns, self.moments)]

    def state(self):
        weights = [attn.attn.in_proj_weight.cpu().clone() for attn in self.attns]  # earlier tasks' LoRA folded in
        return super().state() | dict(moments=self.moments, weights=weights)

    def load(self, state):
        super().load(state)
        self.moments = state["moments"]
        self.P = []
        for attn, saved in zip(self.attns, state["weights"], strict=True):
            attn.attn.in_proj_weight.data.copy_(saved)


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

OFFICIAL_ORDER = {  # natural: as listed; a number: NumPy's RandomState(number).permutation
    "cifar100": CIFAR100_ORDER, "imagenet-r": IMAGENET_R_ORDER, "patterns": "1993", "imagenet100": "1993",
    "imagenet1k": "1993", "vtab": "natural", "folder": "natural",
}  # fmt: skip
PAPER = {  # Table 1: Avg / Last; E by the authors' code
    "cifar100": "87.00 / 80.57, E = 1", "imagenet-r": "87.58 / 82.67, E = 2", "imagenet100": "87.31 / 78.38, E = 2",
    "imagenet1k": "81.88 / 73.68, E = 1", "vtab": "94.67 / 91.53, E unknown",
}  # fmt: skip
COLUMNS = ("model", "tasks", "lr", "batch_size", "head_lr", "head_batch_size", "head_epochs")
PRESETS = {name: dict(zip(COLUMNS, row)) for name, *row in (
    # data set,    model       tasks  LoRA lr, batch  head lr, batch, epochs
    ("patterns",    "tiny",     "8",   7e-3, 64,       5e-4, 64, 3),
    ("cifar100",    "ViT-B/16", "10",  1e-3, 128,      5e-4, 64, 3),
    ("imagenet-r",  "ViT-B/16", "10",  1e-3, 64,       5e-4, 32, 3),
    ("imagenet100", "ViT-B/16", "10",  5e-4, 128,      1e-3, 128, 3),
    ("imagenet1k",  "ViT-B/16", "10",  5e-4, 80,       5e-4, 64, 2),
    ("vtab",        "ViT-B/16", "5",   1e-3, 128,      5e-4, 64, 3),  # ours: none of the authors' is known
    ("folder",      "ViT-B/16", "10",  1e-3, 128,      5e-4, 64, 3),
)}  # fmt: skip


def split_classes(config, K):
    """The class numbers of every task, in the order official (the data set's), natural (as listed) or of a seed."""
    order = OFFICIAL_ORDER[config.dataset] if config.class_order == "official" else config.class_order
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
    if sum(sizes) > K or len(tasks[0]) < 2 or len(tasks[-1]) < 1:
        raise ValueError(f"--tasks {config.tasks}: {K} classes do not give two to the first task, as Eq. 2 needs, "
                         "and one to each other")  # fmt: skip
    return [task.tolist() for task in tasks]


def preprocess(size):
    """CLIP's own preprocessing but for `normalised_pixels`: a picture -> uint8 (3, size, size)."""
    resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
    crop, rgb = transforms.CenterCrop(size), lambda image: image.convert("RGB")
    return transforms.Compose([resize, crop, rgb, transforms.PILToTensor()])


def open_image(path):
    """A picture, by Pillow. Raises ValueError, naming the file, if it cannot be read."""
    with naming(f"{path}: cannot be read as an image"), Image.open(path) as image:
        if max(image.size) > 500 * min(image.size):
            raise ValueError("over 500 times as long as wide: resized it would take gigabytes")
        image.load()
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # 16 bits, clipped by Pillow
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError("more than 16 bits a pixel")
        return image


def hidden(name):
    """Of a file or folder: hidden, or where a NAS keeps its thumbnails."""
    return name.startswith(".") or name == "@eaDir"


def composed(text):
    """The one form of names that Unicode writes in two, as é in an archive of macOS."""
    return unicodedata.normalize("NFC", text)


def class_folders(root):
    """Names of the folders in a folder, hidden ones left out: by number if all are numbers, else as text."""
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not hidden(entry.name))
    if all(folder.isdecimal() for folder in folders):
        return sorted(folders, key=int)
    return sorted(folders, key=composed)


class Folder(torchvision.datasets.ImageFolder):
    """ROOT/<class>/**/<images>, hidden ones left out."""

    def __init__(self, root, size):
        super().__init__(root, preprocess(size), loader=open_image, is_valid_file=self.is_image)
        print(f"{root}: {len(self):,} images of {len(self.classes)} classes")

    def is_image(self, path):
        inside = Path(path).relative_to(self.root).parts
        suffixes = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".jfif", ".gif", ".avif")
        return path.lower().endswith(suffixes) and not any(hidden(part) for part in inside)

    def find_classes(self, root):
        folders = class_folders(root)
        return [composed(folder) for folder in folders], {folder: c for c, folder in enumerate(folders)}


def class_names(root, folders):
    """As ROOT/classes.txt has them, a line <folder> <name> for every class, or else the folders' own."""
    listing = Path(root, "classes.txt")
    if not listing.is_file():
        synsets = [folder for folder in folders if re.fullmatch(r"n\d{8}", folder)]
        if synsets:
            raise ValueError(f"{listing}: is missing, and {synsets[0]} is no name; see Class names in README.md")
        return folders
    with naming(f"{listing}: is not UTF-8"):
        lines = composed(listing.read_text("utf-8-sig")).splitlines()
    names = {}
    for line in lines:
        folder, tab, name = line.partition("\t")
        if not tab:  # a space: which may also be within the folder's name
            folder = max((f for f in folders if line.startswith(f"{f} ")), key=len, default="")
            name = line.removeprefix(folder)
        names[folder] = name.strip()
    for folder in folders:
        if not names.get(folder):
            raise ValueError(f"{listing}: has no line '{folder} <name>'")
    return [names[folder] for folder in folders]


def open_data(dataset, root, half, size):
    """The train, test or zeroshot half of a data set, and its class names; nothing is decoded yet.

    Items are (uint8 image, class number), .targets the class numbers of all. Only the demo tells zeroshot from test.
    """
    if dataset == "patterns":
        return draw_split(half), PATTERNS
    if dataset == "cifar100":  # at 32 x 32: `encode_images` resizes. The names keep torchvision's underscores
        data = torchvision.datasets.CIFAR100(root, half == "train", transforms.PILToTensor(), download=True)
        return data, data.classes
    if dataset in ("food101", "pets"):
        kind = dict(food101=torchvision.datasets.Food101, pets=torchvision.datasets.OxfordIIITPet)[dataset]
        data = kind(root, split="test", transform=preprocess(size), download=True)
        data.targets = data._labels
        return data, [c.replace("_", " ") for c in data.classes]
    if half != "train":
        test = Path(root, "test")  # ImageNet's own has no classes: its val/ is scored
        half = "test" if test.is_dir() and class_folders(test) else "val"
    data = Folder(Path(root, half), size)
    if dataset == "imagenet100":
        data.classes = data.classes[:100]  # out of all, or alone
    if dataset == "vtab" and data.classes == [str(c) for c in range(50)]:
        return data, VTAB_NAMES
    names = class_names(root, data.classes)
    if dataset.startswith("imagenet") and names is data.classes:
        print(f"{root}: no classes.txt: prompts are made of the folders' names, which are not the paper's")
    return data, names


def open_tasks(config, learner):
    """Of every task: the names of its classes, and its training and test images as `load_images` takes them.

    The folder of --data-root is split into tasks; each of --add is one.
    """
    size, tasks, known = learner.model.visual.input_resolution, [], []
    for root in [config.data_root, *config.add]:
        dataset = "folder" if tasks else config.dataset
        with naming(f"{'--add' if tasks else '--data-root'} {root}: {dataset} cannot be read"):
            test, names = open_data(dataset, root, "test", size)
            gone = config.resume and isinstance(test, Folder) and not Path(root, "train").is_dir()
            train, train_names = (None, names) if gone else open_data(dataset, root, "train", size)
        if names != train_names:
            only = few(set(names) ^ set(train_names))
            raise ValueError(f"{root}: train/ and test/ differ, in folders or in their order: {only}")
        if set(names) & set(known):
            raise ValueError(f"{root}: the run knows already: {few(set(names) & set(known))}")
        split = [range(len(names))] if tasks else split_classes(config, len(names))
        for classes in split:
            tasks.append(([names[c] for c in classes], (train, classes), (test, classes)))
            known += tasks[-1][0]
    with naming(f"--model {config.model}: cannot read a prompt; shorten it in {config.data_root}/classes.txt"):
        prompts = learner.prompts(known)  # (K, 77)
    if len(prompts.unique(dim=0)) < len(known):
        print("warning: some classes have one prompt; only their images tell them apart", file=sys.stderr)
    return tasks


def few(names):
    """How many names there are, and the first of them, for a message."""
    return f"{len(names)} classes: {', '.join(sorted(names)[:5])}"


def load_zeroshot(config, learner):
    """The data sets of --zeroshot: (data set, names, images, labels) of each."""
    others = []
    for entry in config.zeroshot:
        name, _, root = entry.partition("=")
        dataset = "folder" if root else name
        size = learner.model.visual.input_resolution
        with naming(f"--zeroshot {entry}: cannot be read"):
            test, names = in_turn(open_data, dataset, root or config.data_root, "zeroshot", size)
            learner.prompts(names)
        images, labels = load_images((test, range(len(names))), name)
        others.append((name, names, images, labels))
    return others


def class_tokens(template, names, context_length=77):
    """The prompts (K, 77) of classes. Raises ValueError, with clip's own message, at one that is too long."""
    with naming("a class has no prompt that CLIP can read"):
        return clip.tokenize([template.replace("{}", name) for name in names], context_length)


def load_images(part, desc):
    """Decode the images of some classes, in parallel: uint8 (N, 3, H, W), and labels (N,) counting from 0 in classes.

    part: a data set of `open_data` and class numbers. Of several processes each has its share, and the labels of all.
    """
    data, classes = part
    if data is None:
        raise ValueError(f"{desc}: its images are gone")
    targets = np.asarray(data.targets)
    members = [np.flatnonzero(targets == c) for c in classes]
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(rows) for rows in members]))
    rank, ranks = process()
    mine = np.concatenate(members)[rank::ranks].tolist()
    if len(labels) < ranks:
        raise ValueError(f"{desc}: {len(labels)} images are too few for {ranks} processes")
    shape = (len(mine), *data[mine[0]][0].shape)
    file = tempfile.TemporaryFile()  # without a name: memory keeps what fits, and the disk is free after any end
    with naming(f"{tempfile.gettempdir()} (TMPDIR names another folder): no room for decoded images"):
        file.truncate(math.prod(shape))
        if hasattr(os, "posix_fallocate"):  # a full disk is named here, not in the middle of a task
            os.posix_fallocate(file.fileno(), 0, math.prod(shape))
        images = torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=shape))

    def decode(i):
        images[i] = data[mine[i]][0]

    with ThreadPoolExecutor() as pool:  # Pillow lets go of Python's lock while it decodes
        list(progress(pool.map(decode, range(len(mine))), desc=desc, total=len(mine)))
    return images, labels


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
    pixels = resize_and_crop(images.to(device), model.visual.input_resolution) / 255
    return (pixels - PIXEL_MEAN.to(device)) / PIXEL_STD.to(device)


def load_clip(name_or_path, device="cpu", gelu=False):
    """A CLIP with a ViT image encoder, in float32 and eval mode.

    name_or_path: a name of `clip.available_models()`, downloaded if need be; tiny, the demo's; a file: a state dict, or
    one of OpenAI's TorchScript archives (it may hold code: name none that you do not trust). gelu: for weights trained
    with GELU, as most of OpenCLIP's, in the place of OpenAI's QuickGELU.
    Raises ValueError if there is no such model, or it cannot be read or is no ViT.
    """
    if not hasattr(clip, "available_models"):
        raise ValueError("the package `clip` here is another than OpenAI's CLIP: pip uninstall clip, then pip install "
                         "clip-anytorch==2.6.0, as in requirements.txt")  # fmt: skip
    with naming(f"--device {device}: cannot be used here"):
        torch.zeros(1, device=device).item()
    with naming(f"--model {name_or_path}: not there (downloads go to ~/.cache/clip), cut short or no CLIP"):
        path = tiny_clip() if name_or_path == "tiny" else name_or_path
        archive = zipfile.is_zipfile(path) and "/code/" in " ".join(zipfile.ZipFile(path).namelist())
        if os.path.isfile(path) and not archive:  # clip.load of openai/CLIP cannot read a state dict
            state = read_tensors(path)
            state = state.get("state_dict", state)  # of a training program
            state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
            model = clip.model.build_model(dict(state)).float()
            model.load_state_dict({name: state[name] for name in model.state_dict()})  # build_model rounds to float16
        else:
            model, _ = clip.load(path, device="cpu")
    if not isinstance(model.visual, clip.model.VisionTransformer):
        raise ValueError(f"--model {path}: a ResNet encodes its images; the LoRA needs the attention of a ViT")
    if len(model.visual.class_embedding) in (1280, 1408, 1664):  # OpenCLIP's ViT-H, g and G
        raise ValueError(f"--model {path}: its heads are not of width 64, as all of CLIP's are")
    if model.vocab_size != 49408:
        raise ValueError(f"--model {path}: knows {model.vocab_size} words, where CLIP's tokenizer has 49408")
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError(f"--model {path}: holds numbers that are not finite")
    if gelu:
        for block in [*model.visual.transformer.resblocks, *model.transformer.resblocks]:
            block.mlp.gelu = nn.GELU()
    return model.float().eval().to(device)


def read_tensors(path):
    """What `torch.save` wrote: tensors, numbers and texts in dicts and lists. Runs no code that the file may hold."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("no state dict: torch.save(model.state_dict(), FILE) writes one") from None


@contextmanager
def naming(what):
    """Within it whatever goes wrong becomes a ValueError that says what it means to the user."""
    try:
        yield
    except BrokenPipeError:  # a reader of our output has gone
        raise
    except Exception as error:
        reason = " ".join(str(error).split())  # in one line
        raise ValueError(f"{what} ({reason:.300})") from error


# 10 Results: log, checkpoint, predictions, picture --------------------------------------------------------------------


@contextmanager
def replacing(path):
    """A file to write in the place of path, which holds the old or the new content, never a part."""
    part = Path(f"{path}.part")
    try:
        with naming(f"{path}: cannot be written"), open(part, "wb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


ROWS = dict(  # what the terminal shows of an event
    search="search: epoch {epoch:2d}   pos {pos:.4f}   neg {neg:.4f}   Δ {delta:.4f}",
    epochs="E = {epochs}",
    zeroshot="zero-shot {dataset}: {accuracy:.2f}",
    task="task {task:2d}   classes {classes_seen:4d}   A_t {accuracy:6.2f}   text {text_accuracy:6.2f}   visual "
    "{visual_accuracy:6.2f}   pos {pos:.4f}   neg {neg:.4f}   E {epochs:2d}   {seconds:.1f} s",
)


class Log:
    """A run's folder (config.json, metrics.jsonl, checkpoint.pt), which process 0 writes, and its tables."""

    def __init__(self, config, learner, tasks, others):
        """Make the run's folder, or take that of a run to go on with."""
        self.config = config
        self.names = [name for names, _, _ in tasks for name in names]
        self.others = {name: names for name, names, _, _ in others}
        self.first_added = len(tasks) - len(config.add)  # so many tasks are of --data-root
        self.model_sha256 = model_sha256(learner.model)
        self.events = []
        self.began = time.perf_counter()
        self.done = 0  # how many tasks are learned
        self.written = False
        self.writes = process()[0] == 0
        if self.writes:
            self.lock = claim(config)
            self.folder = Path(config.out)

    def restore(self, learner):
        """Take up the run where `save` left it. Returns how many tasks are learned, 0 in a new run."""
        saved = from_rank_0(read_checkpoint(self.folder) if self.writes else None)
        if saved is None:
            if self.writes:
                self.write_config()
            return 0
        load_checkpoint(saved, learner, self.config.model, self.model_sha256)
        for then, now in zip(learner.names, self.names):
            if then != now:
                raise ValueError(f"the run learned the class '{then}', where the data now has '{now}'")
        if saved["others"] != self.others:
            raise ValueError("--zeroshot: the data has other classes than the run began with")
        if len(learner.names) > len(self.names):
            raise ValueError("the run learned more classes than its data holds: name the last folder with --add again")
        self.events = saved["events"]
        self.began -= saved["seconds"]
        self.done = saved["task"]
        return self.done

    def write_config(self):
        """Replace config.json. An added folder is the run's once it is learned."""
        versions = dict(python=sys.version, torch=torch.__version__, threads=torch.get_num_threads())
        added = self.config.add[: max(0, self.done - self.first_added)]
        options = vars(self.config) | dict(add=added, versions=versions)
        with replacing(self.folder / "config.json") as file:
            file.write(json.dumps(options, indent=2).encode())

    def save(self, t, learner):
        """Replace checkpoint.pt."""
        state = dict(task=t, learner=learner.state(), model_sha256=self.model_sha256, others=self.others)
        state |= dict(events=self.events, seconds=time.perf_counter() - self.began)
        if self.writes:
            with replacing(self.folder / "checkpoint.pt") as file:
                torch.save(state, file)
            self.done = t
            self.write_config()

    def write(self, event, **values):
        """Add a line to metrics.jsonl, and print a row if there is one for such an event."""
        self.events.append(dict(event=event, **values))
        if self.writes:
            self.write_metrics()
        if event in ROWS:
            print(ROWS[event].format(**values), flush=True)

    def write_metrics(self):
        events = self.events[-1:] if self.written else self.events
        lines = "".join(json.dumps(event, allow_nan=False) + "\n" for event in events)
        path = self.folder / "metrics.jsonl"
        if self.written:
            with naming(f"{path}: cannot be written"), open(path, "a") as file:
                file.write(lines)
        else:  # until now the run is as it was before --resume
            with replacing(path) as file:
                file.write(lines.encode())
            self.write_config()
        self.written = True

    def search(self, t, history, E):
        for entry in history:
            self.write("search", task=t, **entry)
        if history:
            self.write("epochs", task=t, epochs=E, alpha=self.config.alpha)

    def task(self, t, learner, **values):
        seconds = time.perf_counter() - self.began - sum(e["seconds"] for e in self.tasks())
        self.write("task", task=t, classes_seen=len(learner.names), epochs=learner.E, **values, seconds=seconds)

    def tasks(self):
        return [e for e in self.events if e["event"] == "task"]

    def accuracies(self):
        """[A_1..A_T], also of the tasks before --resume."""
        return [e["accuracy"] for e in self.tasks()]

    def zeroshot(self, t, learner, others):
        for name, names, images, labels in others:
            accuracy = zeroshot_accuracy(learner, images, labels, names)
            self.write("zeroshot", dataset=name, task=t, accuracy=accuracy)

    def end(self, learner, avg, last):
        """Write and print what the run comes to. Returns the end event."""
        tasks = self.tasks()
        lost, gained = forgetting([e["per_task"] for e in tasks])
        result = dict(avg=avg, last=last, forgetting=lost, backward_transfer=gained)
        for name in ("pos", "neg", "d(B_i, B_t)", "d(B_i, B_vc)", "d(B_i, B_t+vc)"):
            if name in tasks[-1]:
                result[name] = tasks[-1][name]
        for name, value in result.items():
            print(f"{name:18} {value:8.4f}")
        as_the_paper = self.config.tasks == PRESETS[self.config.dataset]["tasks"]
        if self.config.dataset in PAPER and as_the_paper:
            print(f"the paper's Avg / Last: {PAPER[self.config.dataset]}")
        parameters = sum(p.numel() for p in learner.lora) + learner.head.weight.numel()
        result |= dict(accuracy=self.accuracies(), epochs=[e["epochs"] for e in tasks], trainable_parameters=parameters)
        self.write("end", **result, seconds=time.perf_counter() - self.began)
        print(f"{parameters:,} trainable parameters\n{self.config.out}")
        return self.events[-1]


def claim(config):
    """Make the run's folder, or take that of a run to go on with, for this process alone until it ends: its lock."""
    if config.out is None:
        config.out = new_folder(f"runs/{config.dataset}-{config.seed}")
    folder = Path(config.out)
    with naming(f"--out {folder}: cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    held = {path.name for path in folder.iterdir()}
    begun = {".lock", "config.json", "config.json.part", "metrics.jsonl", "metrics.jsonl.part", "checkpoint.pt.part"}
    cut_off = ".lock" in held and held <= begun  # a run of ours that had learned nothing yet
    if held and not cut_off and not config.resume:
        raise ValueError(f"--out {folder}: must be a new or empty folder")
    with naming(f"--out {folder}: cannot be written"):
        lock = open(folder / ".lock", "a")
    if os.name == "posix":
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is at work on this run") from None
        except OSError:
            pass  # a file system without locks
    return lock


def new_folder(base):
    """Make the first of the folders base, base-2, base-3, .. that is not there yet, whoever else does. Its path."""
    os.makedirs(os.path.dirname(base), exist_ok=True)
    for n in itertools.count(1):
        folder = base if n == 1 else f"{base}-{n}"
        with suppress(FileExistsError):
            os.mkdir(folder)
            return folder


def model_sha256(model):
    """SHA-256 of CLIP's own parameters, whatever file they came from."""
    digest = hashlib.sha256()
    for name, parameter in model.state_dict().items():
        if not name.endswith((".A_k", ".B_k", ".A_v", ".B_v")):
            digest.update(parameter.cpu().contiguous().numpy())
    return digest.hexdigest()


def read_checkpoint(folder):
    """What `Log.save` wrote last, or None. Raises ValueError if it is damaged."""
    path = Path(folder, "checkpoint.pt")
    if not path.exists():
        return None
    with naming(f"{path}: cannot be read, is cut short or no checkpoint of mgclip"):
        damaged = zipfile.ZipFile(path).testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        return read_tensors(path)


def load_checkpoint(saved, learner, model, sha256):
    """Bring a learner to where a checkpoint was saved. model: its name, for the message; sha256: of its weights."""
    with naming("checkpoint.pt: is not of these options or of this version of mgclip"):
        same_weights = saved["model_sha256"] == sha256
        if same_weights:
            learner.load(saved["learner"])
    if not same_weights:
        raise ValueError(f"--model {model}: not the weights that the run began with")


def predict(config):
    """--predict: print the five best classes of every image by a run's last checkpoint. Returns the exit status.

    fused: Eq. 5; text: CLIP's probability of the class; visual: the cosine with its row of W_v.
    """
    learner = build(config)
    saved = read_checkpoint(config.out)
    if saved is None:
        raise ValueError(f"--resume {config.out}: no checkpoint yet")
    load_checkpoint(saved, learner, config.model, model_sha256(learner.model))
    texts = learner.texts()
    status = 0
    print("image\trank\tclass\tfused\ttext\tvisual")
    for path in config.predict:
        try:
            image = preprocess(learner.model.visual.input_resolution)(open_image(path))
        except ValueError as error:
            print(f"mgclip: {error}", file=sys.stderr)
            status = 1
            continue
        fused, text_logits, visual = learner.scores(learner.features(image[None]), texts)  # (1, K)
        scores = torch.cat([fused, text_logits.softmax(1), visual]).T  # (K, 3)
        best = fused[0].argsort(descending=True)[:5].tolist()
        for rank, k in enumerate(best, 1):
            numbers = [f"{score:.4f}" for score in scores[k]]
            print(path, rank, learner.names[k], *numbers, sep="\t")
    return status


def read_events(folder):
    """The lines of a run's metrics.jsonl; behind the last line break may stand one that was cut off."""
    with naming(f"--plot {folder}: metrics.jsonl is not there or not a run's"):
        lines = Path(folder, "metrics.jsonl").read_text().split("\n")[:-1]
        events = [json.loads(line) for line in lines]
        if not all("event" in event for event in events):
            raise ValueError("lines without an event")
        return events


def plot_accuracy(axes, events):
    """Accuracy after every task, and on data sets that are not learned (Table 2)."""
    tasks = [e for e in events if e["event"] == "task"]
    seen = [e["classes_seen"] for e in tasks]
    for name in ("accuracy", "text_accuracy", "visual_accuracy"):
        axes.plot(seen, [e[name] for e in tasks], "o-", label=name)
    scores = [e for e in events if e["event"] == "zeroshot"]
    for name in dict.fromkeys(e["dataset"] for e in scores):
        own = [e["accuracy"] for e in scores if e["dataset"] == name]  # the first before the first task
        axes.plot([0, *seen][: len(own)], own, "x--", label=f"zero-shot: {name}")
    axes.set(xlabel="classes seen so far", ylabel="accuracy (%)")


def plot_search(axes, events):
    """How pos and neg change in the search on the first task (Fig. 3), and alpha."""
    search = [e for e in events if e["event"] == "search" and e["task"] == 1]
    for name in ("pos", "neg"):
        ratios = [e[name] / search[0][name] for e in search]
        axes.plot([100 * (ratio - 1) for ratio in ratios], "o-", label=name)
    found = [e for e in events if e["event"] == "epochs"]
    if found:
        limit = 100 * found[0]["alpha"]
        axes.axhspan(-limit, limit, alpha=0.1, label=f"alpha: {limit:g}%")
    axes.set(xlabel="epoch of the search on the first task", ylabel="change of the mean cosine (%)")


def plot(folders):
    """--plot: draw runs into plot.png, a column each, and print the mean and deviation of their Avg and Last."""
    runs = [read_events(folder) for folder in folders]
    with naming("--plot needs matplotlib: pip install matplotlib"):
        from matplotlib import style
        from matplotlib.figure import Figure

    style.use("tableau-colorblind10")
    figure = Figure(figsize=(6 * len(runs), 8), dpi=110, layout="constrained")
    grid = figure.subplots(2, len(runs), squeeze=False)
    for (top, bottom), folder, events in zip(grid.T, folders, runs):
        top.set_title(folder)
        for axes, draw, kind in ((top, plot_accuracy, "task"), (bottom, plot_search, "search")):
            if any(e["event"] == kind for e in events):
                draw(axes, events)
                axes.legend()
                axes.xaxis.get_major_locator().set_params(integer=True)
            else:
                axes.remove()  # nothing to show
    path = Path(folders[0], "plot.png")
    with replacing(path) as file:
        figure.savefig(file, format="png", bbox_inches="tight")
    ends = [e for events in runs for e in events if e["event"] == "end"]
    for name in ("avg", "last"):
        values = [e[name] for e in ends]
        if len(values) > 1:
            print(f"{name} of {len(values)} runs: {mean(values):.2f} ± {stdev(values):.2f}")
    print(path)


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
TASK_STYLE = STYLE | dict(context=40)  # what there is to learn, and what leads naive fine-tuning astray
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
        model = clip.model.CLIP(64, 32, 2, 64, 8, 16, 49408, 64, 1, 2).eval()
    generator = torch.Generator().manual_seed(seed)
    model.token_embedding.requires_grad_(False)  # random words do as well, and save a fifth of the time
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    tokens = torch.stack([clip.tokenize([template.format(name) for name in PATTERNS], 16) for template in TEMPLATES])
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
    path = Path.home() / ".cache" / "clip" / "mgclip-tiny-3.pt"  # a new number for a new recipe
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:  # opened first: pre-training takes a minute
            torch.save(pretrain_tiny().state_dict(), file)
    return str(path)


# 12 Several processes -------------------------------------------------------------------------------------------------

# Under torchrun, on one machine or more, process r holds the images r, r + ranks, r + 2 ranks, .. of every task, and all
# must call these. Without it, and in other programs, they hand back what they are given.
UNDER_TORCHRUN = False  # `start` sets it


def process():
    """(rank, ranks): the number of this process and how many torchrun started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if UNDER_TORCHRUN else (0, 1)


def held_chunks(images, batch, size):
    """Those of a batch (n,) of image numbers that this process holds: (numbers, images), at most `size` at a time."""
    rank, ranks = process()
    held = batch[batch % ranks == rank]
    for rows in held.split(size):
        if len(rows) > 0:
            yield rows, images[rows // ranks]


def summed(tensor):
    """The tensor, in place its sum over all processes."""
    if UNDER_TORCHRUN:
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
    if UNDER_TORCHRUN:
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
    return f"{name}={os.path.abspath(folder)}" if equals else name


def file_or_name(text):
    """--model: the whole path of a file, likewise, or a name."""
    return os.path.abspath(text) if os.path.isfile(text) else text


def set_name(entry):
    """Of an entry of --zeroshot, food101 or NAME=FOLDER: its name."""
    return entry.partition("=")[0]


def parse(argv=None):
    """The options of a run, a Namespace: as given, else as the run of --resume began, the preset's, or the default."""
    parser = argparse.ArgumentParser(
        description="MG-CLIP. The paper's baselines: zero-shot --epochs 0 --beta 0; naive fine-tuning --epochs 10 "
        "--beta 0; compensation alone --epochs 10 --beta 4; preservation alone --beta 0.", allow_abbrev=False,
    )  # fmt: skip
    defaults = {}

    def add(option, default, help, **kind):
        shown = "" if default in (None, []) else f" ({default})"
        parser.add_argument(option, default=argparse.SUPPRESS, help=help.replace("%", "%%") + shown, **kind)
        defaults[option[2:].replace("-", "_")] = default

    count = checked(int, lambda n: 1 <= n < 2**31, "a whole number of at least 1, below 2**31")
    whole = checked(int, lambda n: 0 <= n < 2**31, "a whole number of at least 0, below 2**31")
    weight = checked(float, lambda x: 0 <= x <= 1e30, "a number from 0 to 1e30")
    rate = checked(float, lambda x: 0 < x <= 1e30, "a number above 0, up to 1e30")
    share = checked(float, lambda x: 0 <= x < 1, "at least 0 and below 1")
    sizes = checked(str, re.compile(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*").fullmatch, "10, or 4,8,16")
    order = checked(str, re.compile(r"official|natural|\d{1,9}").fullmatch, "official, natural or a seed")
    other = checked(absolute, re.compile("food101|pets|patterns|[^=]+=.+").fullmatch, "one of those in --help")
    prompt = checked(str, lambda text: text.count("{}") == 1, "a text with one {}, where the class name goes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--dataset", "patterns", "its preset fills in the options that show no default here", choices=list(PRESETS))
    add("--data-root", os.path.abspath("data"), "its folder; what torchvision has is put there", type=os.path.abspath)
    add("--tasks", None, "number of tasks, or the classes in each: 4,8,16", type=sizes)
    add("--class-order", "official", "official, natural (as listed), or a NumPy seed", type=order)
    add("--zeroshot", [], "scored, not learned: food101 pets patterns NAME=FOLDER",
        type=other, nargs="+", action="extend")  # fmt: skip
    add("--model", None, "name of a CLIP with a ViT, or a checkpoint file; tiny: the demo's own", type=file_or_name)
    add("--gelu", False, "GELU for QuickGELU: most weights of OpenCLIP", action="store_true")
    add("--template", "a good photo of a {}.", "prompt; {} is the class name", type=prompt)
    add("--rank", 8, "LoRA rank r", type=count)
    add("--alpha", 0.1, "largest relative change of the mean negative similarity, Eq. 3", type=weight)
    add("--beta", 4.0, "weight of the visual classifier, Eq. 5", type=weight)
    add("--epochs", None, "E, or each: found on each task; without it, on the first; 0: CLIP untrained",
        type=lambda text: text if text == "each" else whole(text))  # fmt: skip
    add("--max-epochs", 10, "longest search, in epochs", type=count)
    add("--lr", None, "learning rate of the LoRA", type=rate)
    add("--batch-size", None, "images a step of the LoRA", type=count)
    add("--head-epochs", None, "epochs of the visual classifier on each task", type=whole)
    add("--head-lr", None, "learning rate of the visual classifier", type=rate)
    add("--head-batch-size", None, "images a step of the visual classifier", type=count)
    add("--align", 0.0, "weight of ‖image - text‖² of matched features, Fig. 2b", type=weight)
    add("--distill", 0.0, "weight of the squared distance to the untouched CLIP's logits, Table 5", type=weight)
    add("--head", "cosine", "the visual classifier; ridge: in closed form", choices=["cosine", "ridge"])
    add("--null-space", 0.0, "share of earlier tasks' energy that the LoRA may touch; 0: off", type=share)
    add("--seed", 0, "seed of the LoRA's first values and of the images' order", type=whole)
    add("--device", device, "device of torch")
    add("--bf16", False, "mixed precision: faster on a GPU, and on a CPU with AVX512-BF16 or AMX", action="store_true")
    add("--out", None, "the run's folder (runs/DATASET-SEED, numbered when taken)")
    add("--resume", None, "go on with a run that was cut off, with the options that it began with", metavar="RUN")
    more = dict(nargs="+", action="extend")
    add("--add", [], "with --resume: one task more each", type=os.path.abspath, metavar="DIR", **more)
    add("--predict", None, "with --resume: the five best classes of each image", metavar="IMAGE", **more)
    add("--plot", None, "draw runs, and print their mean and deviation", metavar="RUN", **more)
    given = vars(parser.parse_args(argv))
    others = [set_name(entry) for entry in given.get("zeroshot", [])]
    if len(set(others)) < len(others):
        parser.error("--zeroshot: two data sets of one name")
    if "plot" in given and len(given) > 1:
        parser.error("--plot draws runs that are there: in a command of its own")
    if "add" in given and "predict" in given:
        parser.error("--predict: in a command of its own, after that with --add")
    if "resume" in given:
        for name in given.keys() - {"resume", "add", "predict", "device", "data_root", "model", "zeroshot"}:
            parser.error(f"--{name.replace('_', '-')}: a run goes on with the options that it began with (--resume)")
        return resumed(given, defaults)
    config = argparse.Namespace(**defaults | PRESETS[given.get("dataset", "patterns")] | given)
    if config.predict or config.add:
        parser.error("--predict and --add need --resume RUN")
    if config.dataset == "patterns" and "data_root" in given:
        parser.error("--data-root: the demo draws its pictures; --dataset folder learns yours")
    if config.null_space and config.distill:
        parser.error("--distill needs the untouched CLIP, into which --null-space folds what is learned")
    return config


def resumed(given, defaults):
    """The options that the run of --resume began with; of those given anew, files may have moved."""
    with naming(f"--resume {given['resume']}: is not the folder of a run"):
        began = json.loads(Path(given["resume"], "config.json").read_text())
        options = defaults | PRESETS[began["dataset"]] | began
        known = [set_name(entry) for entry in options["zeroshot"]]
        added = list(options["add"])
    if not os.path.isdir(given.get("data_root", ".")):
        raise ValueError(f"--data-root {given['data_root']}: is no folder")
    moved = {set_name(entry): entry for entry in given.pop("zeroshot", [])}
    for name in moved:
        if name not in known:
            raise ValueError(f"--zeroshot {moved[name]}: the run began without one of this name")
    options["zeroshot"] = [moved.get(set_name(entry), entry) for entry in options["zeroshot"]]
    new = [folder for folder in given.get("add", []) if folder not in added]  # the same command may be given again
    given["add"] = added + new
    return argparse.Namespace(**options | given | dict(out=given["resume"]))


def build(config):
    """The learner that the options ask for."""
    model = load_clip(config.model, config.device, config.gelu)
    D = model.text_projection.shape[1]
    names = (
        "template", "rank", "alpha", "beta", "epochs", "max_epochs", "lr", "batch_size", "head_epochs", "head_lr",
        "head_batch_size", "seed", "bf16",
    )  # fmt: skip
    options = {name: getattr(config, name) for name in names}
    if config.head == "ridge":
        options["head"] = RidgeHead(D)
    if config.align or config.distill:
        options["make_extra_loss"] = partial(baseline_loss, align=config.align, distill=config.distill)
    if config.null_space:
        return NullSpaceMGCLIP(model, config.null_space, **options)
    return MGCLIP(model, **options)


def start(config):
    """`run`, in one of the processes of torchrun if it was started by that: on one machine or more, a GPU each."""
    global UNDER_TORCHRUN
    if "TORCHELASTIC_RUN_ID" in os.environ:
        UNDER_TORCHRUN = True
        if config.device == "cuda":
            with naming("--device cuda: every process needs a GPU of its own"):
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if config.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # a download may be waited for
    if config.dataset == "patterns":
        torch.set_num_threads(1)  # on so small a model a second one waits more than it helps
    run(config)


def prepare_streams():
    """Closed streams lead nowhere, so that no file of ours gets their numbers; a terminal without Δ shows its code."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def main(argv=None):
    """The command line. Returns the exit status."""
    prepare_streams()
    rank = int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0
    stderr = sys.stderr
    if rank > 0:  # process 0 speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")
    config = argparse.Namespace(out=None, predict=None)
    status = 0
    try:
        config = parse(argv)
        if config.predict:
            status = predict(config)
        elif config.plot:
            plot(config.plot)
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
        if "peer" in str(error):  # which has said why
            message, status = "another process of this run has stopped", 2
        elif "memory" in str(error):
            message, status = f"error: {error!s:.300}", 2
        else:
            raise
    finally:
        sys.stderr = stderr  # an error that nobody foresaw is seen, whichever process it is
    if config.out and not config.predict and Path(config.out, "checkpoint.pt").exists():
        message += f"; to go on: python mgclip.py --resume {shlex.quote(config.out)}"
    time.sleep(rank)  # torchrun ends the others as soon as one has said what is wrong
    print(f"mgclip: {message}", file=stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
