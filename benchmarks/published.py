"""The published structure, once more from its description: convolutions with filters of ones, loops over classes, images and pairs,
images scaled in whole.

What is slow there is slow here; what is computed is the same, which `tests/test_benchmarks.py` checks. Shapes are the package's."""
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from scaleprotoseg.protocols import Augment
from scaleprotoseg.transforms import IMAGENET_MEAN


def distances(features: Tensor, prototypes: Tensor) -> Tensor:  # (B, S, D, h, w), (S, C, K, D) -> (B, P, h, w), scale by scale
    "Squared distances by two convolutions per scale, one of them with P filters of ones."
    S, C, K, D = prototypes.shape
    maps = []
    for s in range(S):
        filters = prototypes[s].reshape(C * K, D, 1, 1)
        squares = F.conv2d(features[:, s] ** 2, torch.ones_like(filters))
        cross = F.conv2d(features[:, s], filters)
        maps.append(F.relu(squares + (-2 * cross + (filters ** 2).sum((1, 2, 3)).view(-1, 1, 1))))
    return torch.cat(maps, 1)


def similarities(distance: Tensor, epsilon: float = 1e-4) -> Tensor:  # (B, P, h, w) -> (B h w, P)
    "Log similarity with the prototypes last, as the layers after it want them."
    a = torch.log((distance + 1) / (distance + epsilon))
    return a.permute(0, 2, 3, 1).reshape(-1, a.shape[1])


def linear_logits(features: Tensor, prototypes: Tensor, weight: Tensor) -> Tensor:  # weight (C, C, S, K) -> (B, C, h, w)
    "ProtoSeg: one linear layer over all similarities."
    B, (h, w), C = len(features), features.shape[-2:], len(weight)
    out = F.linear(similarities(distances(features, prototypes)), weight.transpose(1, 2).reshape(C, -1))
    return out.view(B, h, w, C).permute(0, 3, 1, 2)


def grouped_logits(features: Tensor, prototypes: Tensor, weights: Tensor, last: Tensor) -> Tensor:  # (C, G, S, K), (C, C, G) -> (B, C, h, w)
    "ScaleProtoSeg: class by class the columns of its prototypes, a linear layer and an exponential; then the last layer."
    S, C, K, _ = prototypes.shape
    B, (h, w) = len(features), features.shape[-2:]
    a = similarities(distances(features, prototypes))
    owner = torch.arange(C).view(1, C, 1).expand(S, C, K).reshape(-1).to(a.device)
    groups = []
    for c in range(C):
        own = torch.nonzero(owner == c).flatten().tolist()
        groups.append(torch.exp(F.linear(a[:, own], weights[c].flatten(1))))
    return F.linear(torch.cat(groups, 1), last.flatten(1)).view(B, h, w, C).permute(0, 3, 1, 2)


def diversity(distance: Tensor, labels: Tensor) -> Tensor:  # (B, S, C, K, h, w), (B, h, w) void -1 -> scalar
    "Image by image, class by class, scale by scale, pair by pair."
    values = []
    for image in range(len(labels)):
        for c in labels[image].unique().tolist():
            if c < 0: continue
            mask = labels[image] == c
            if mask.sum().item() < 2: continue
            for s in range(distance.shape[1]):
                maps = [F.log_softmax(torch.masked_select(d, mask), 0) for d in distance[image, s, c]]
                for i in range(len(maps)):
                    for j in range(i):
                        one, other = (F.kl_div(maps[x], maps[y], log_target=True, reduction='sum') for x, y in ((i, j), (j, i)))
                        values.append(torch.exp(-(one + other) / 2))
    return torch.stack(values).mean() if values else distance.sum() * 0


def nearest_cells(distance: Tensor, label: Tensor, value_of: dict[int, int]) -> list[tuple[float, int]]:  # (S, C, K, h, w), raw (H, W)
    "Projection of one image: labels mapped pixel by pixel, one plane per class, and a masked minimum per prototype."
    S, C, K, h, w = distance.shape
    mapped = torch.tensor([[value_of[v] for v in line] for line in label.tolist()])
    small = F.interpolate(mapped[None, None].float(), (h, w), mode='nearest-exact')[0, 0].long()
    planes = F.one_hot((small + 1).flatten(), C + 1).T.view(C + 1, h, w)[1:]
    found = []
    for s in range(S):
        for c in range(C):
            for k in range(K):
                masked = distance[s, c, k] + (1 - planes[c]) * 1e10
                found.append((masked.min().item(), masked.argmin().item()) if planes[c].any().item() else (float('inf'), -1))
    return found


def sample(image: Path, label: Path, page: int, table: np.ndarray,  # (256,) file value -> class + 1, 0 for void
           how: Augment, rng: np.random.Generator, fill=IMAGENET_MEAN) -> tuple[Tensor, Tensor]:  # (3, h, w) in [0, 1], (h, w)
    "A training sample with every step on the whole image (spec 6.1): map labels, scale, divide by 255, pad, crop, flip."
    pixels, values = (np.asarray(decode(path, page, mode)) for path, mode in ((image, 'RGB'), (label, 'L')))
    draw = how.draw(values.shape, rng)
    (h, w), (top, left), (height, width) = draw.size, draw.corner, how.crop
    x = cv2.resize(pixels, (w, h), interpolation=cv2.INTER_LINEAR).astype(np.float32) / 255
    y = np.asarray(Image.fromarray(table[values]).resize((w, h), Image.Resampling.NEAREST))
    below, right = max(height - h, 0), max(width - w, 0)
    x = cv2.copyMakeBorder(x, 0, below, 0, right, cv2.BORDER_CONSTANT, value=fill)
    y = np.pad(y, ((0, below), (0, right)))
    x, y = x[top:top + height, left:left + width], y[top:top + height, left:left + width]
    if draw.flip: x, y = x[:, ::-1], y[:, ::-1]
    return torch.from_numpy(x.transpose(2, 0, 1).copy()), torch.from_numpy(y.astype(np.int64)) - 1


def decode(path: Path, page: int, mode: str) -> Image.Image:
    "A picture, decoded by Pillow and nothing else."
    with Image.open(path) as im:
        im.seek(page)
        im.load()
    return im if im.mode in (mode, 'P') else im.convert(mode)          # palette indices stay


def plan(scores: Tensor, kappa: float = 0.05, iterations: int = 3) -> Tensor:  # (N, K) of one class -> (N, K)
    "Sinkhorn by exponentials and divisions."
    L = torch.exp(scores / kappa).T
    K, N = L.shape
    L = L / L.sum()
    for _ in range(iterations):
        L = L / L.sum(1, keepdim=True) / K
        L = L / L.sum(0, keepdim=True) / N
    return (L * N).T


def assignment(own: Tensor, labels: Tensor, classes: Tensor) -> Tensor:  # (N, K), (N,), (C,) -> (N,)
    "Class by class: which pixels are of it, and their assignment."
    index = torch.full_like(labels, -1)
    for c in classes.tolist():
        mine = labels == c
        if mine.any().item(): index[mine] = plan(own[mine]).argmax(-1)
    return index


def clustering_step(z: Tensor, vectors: Tensor, labels: Tensor, momentum: float = 0.999) -> Tensor:  # (N, D), (C, K, D), (N,) -> (C, K, D)
    "Similarities, and class by class assignment and movement by the correct pixels."
    scores = torch.einsum('nd,ckd->nkc', z, vectors)
    correct = scores.amax(1).argmax(-1) == labels
    for c in range(len(vectors)):
        mine = labels == c
        if not mine.any().item(): continue
        index = F.one_hot(plan(scores[mine][:, :, c]).argmax(-1), vectors.shape[1]).to(z.dtype) * correct[mine][:, None]
        sums, counts = index.T @ z[mine], index.sum(0)
        moved = momentum * vectors[c] + (1 - momentum) * F.normalize(sums, dim=-1)
        vectors[c] = torch.where((counts > 0)[:, None], moved, vectors[c])
    return F.normalize(vectors, dim=-1)
