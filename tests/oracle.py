"""The equations once more, as slow loops over images, classes, scales, prototypes and positions.

Written from the papers' equations, in NumPy and float64, with nothing of the package in it. A dead prototype is simply
not looped over.
"""
import math

import numpy as np


def distances(features, vectors):
    "(B, S, D, h, w) and (S, C, K, D) -> (B, S, C, K, h, w)"
    (B, S, _, h, w), (_, C, K, _) = features.shape, vectors.shape
    out = np.zeros((B, S, C, K, h, w))
    for b, s, c, k, y, x in np.ndindex(out.shape):
        out[b, s, c, k, y, x] = sum((z - p) ** 2 for z, p in zip(features[b, s, :, y, x], vectors[s, c, k]))
    return out


def similarities(d, epsilon=1e-4):
    return np.array([math.log((x + 1) / (x + epsilon)) for x in d.ravel()]).reshape(d.shape)


def living(alive, c):
    "Pairs (scale, k) of the living prototypes of a class."
    S, _, K = alive.shape
    return [(s, k) for s in range(S) for k in range(K) if alive[s, c, k]]


def linear_logits(a, weight, alive):
    "(B, S, C, K, h, w), (C, C, S, K), (S, C, K) -> (B, C, h, w)"
    B, _, C, _, h, w = a.shape
    out = np.zeros((B, C, h, w))
    for b, to, y, x in np.ndindex(out.shape):
        for c in range(C):
            for s, k in living(alive, c): out[b, to, y, x] += weight[to, c, s, k] * a[b, s, c, k, y, x]
    return out


def groups(a, weights, alive):
    "(B, S, C, K, h, w), (C, G, S, K), (S, C, K) -> (B, C, G, h, w): geometric means of ratios, 0 for an empty class"
    B, _, C, _, h, w = a.shape
    out = np.zeros((B, C, weights.shape[1], h, w))
    for b, c, g, y, x in np.ndindex(out.shape):
        if not living(alive, c): continue
        out[b, c, g, y, x] = 1
        for s, k in living(alive, c): out[b, c, g, y, x] *= math.exp(a[b, s, c, k, y, x]) ** weights[c, g, s, k]
    return out


def grouped_logits(u, last):
    "(B, C, G, h, w) and (C, C, G) -> (B, C, h, w)"
    B, C, G, h, w = u.shape
    out = np.zeros((B, C, h, w))
    for b, to, y, x in np.ndindex(out.shape):
        out[b, to, y, x] = sum(last[to, c, g] * u[b, c, g, y, x] for c in range(C) for g in range(G))
    return out


def class_weights(pixels, balance):
    raw = [(n / sum(pixels)) ** -balance if n else 0. for n in pixels]
    mean = sum(w * n for w, n in zip(raw, pixels)) / sum(pixels)
    return [w / mean for w in raw]


def cross_entropy(logits, labels, weights=None):
    terms = []
    for b, y, x in np.ndindex(labels.shape):
        if labels[b, y, x] < 0: continue
        z = logits[b, :, y, x]
        loss = z.max() + math.log(np.exp(z - z.max()).sum()) - z[labels[b, y, x]]
        terms.append(loss * (1. if weights is None else weights[labels[b, y, x]]))
    return sum(terms) / len(terms) if terms else 0.


def log_softmax(x): return x - x.max() - math.log(np.exp(x - x.max()).sum())


def divergence(u, v):
    "Half the sum of both Kullback-Leibler divergences of two log-distributions."
    return sum(0.5 * math.exp(a) * (a - b) + 0.5 * math.exp(b) * (b - a) for a, b in zip(u, v))


def diversity(d, labels, alive):
    "Mean over images, classes, scales and pairs of exp(-divergence) of the maps over the class's positions."
    B, S, C, K = d.shape[:4]
    terms = []
    for b, c, s in np.ndindex(B, C, S):
        own = labels[b] == c
        if own.sum() < 2: continue
        maps = [log_softmax(d[b, s, c, k][own]) for k in range(K) if alive[s, c, k]]
        terms += [math.exp(-divergence(maps[i], maps[j])) for j in range(len(maps)) for i in range(j)]
    return sum(terms) / len(terms) if terms else 0.


def legacy_diversity(d, labels, alive):
    "The same where stored labels, 0 void and c + 1 for class c, are taken for the numbers of classes."
    B, S, C, K = d.shape[:4]
    terms = []
    for b, c, s in np.ndindex(B, C, S):
        stored = labels[b] + 1
        if (stored == c).sum() < 2: continue
        maps = [log_softmax(d[b, s, c, k][stored == c]) for k in range(K) if alive[s, c, k]]
        terms += [math.exp(-divergence(maps[i], maps[j])) for j in range(len(maps)) for i in range(j)]
    return sum(terms) / len(terms) if terms else 0.


def off_class_l1_linear(weight, alive):
    C = len(weight)
    return sum(abs(weight[to, c, s, k]) for to in range(C) for c in range(C) if to != c for s, k in living(alive, c))


def off_class_l1_groups(last, alive):
    C = len(last)
    return sum(abs(w) for to in range(C) for c in range(C) if to != c and living(alive, c) for w in last[to, c])


def group_entropy(weights, alive):
    rows = []
    for c, g in np.ndindex(weights.shape[:2]):
        members = living(alive, c)
        if not members: continue
        w = [weights[c, g, s, k] for s, k in members]
        rows.append(-sum(x * math.log(x + 1e-5) for x in w) / math.log(len(w)) if len(w) > 1 else 0.)
    return sum(rows) / len(rows) if rows else 0.


def simplex(v, mask):
    "Nearest point of one row: share what is missing among the members, drop those that fall below 0, repeat."
    out, members = np.zeros(len(v)), [i for i in range(len(v)) if mask[i]]
    if not members: return out
    top = max(v[i] for i in members)
    x = {i: float(v[i]) - float(top) for i in members}
    while True:
        shift = (math.fsum(x[i] for i in members) - 1) / len(members)
        keep = [i for i in members if x[i] > shift]
        if keep == members: break
        members = keep
    for i in members: out[i] = x[i] - shift
    return out


def nearest(d, labels, c, s, k):
    "Smallest distance of one prototype over its class, with (image, row, column): the first in this order; or None."
    return nearest_eligible(d, labels == c, c, s, k)


def nearest_eligible(d, eligible, c, s, k):
    "The same over cells (B, h, w) that are eligible."
    best = None
    for b, y, x in np.ndindex(eligible.shape):
        if eligible[b, y, x] and (best is None or d[b, s, c, k, y, x] < best[0]):
            best = (d[b, s, c, k, y, x], b, y, x)
    return best


def pixels_under(labels, grid, cell):
    "Labels of the pixels (Y, X) of a map (H, W) whose Y h / H, X w / W lies in the cell y..y+1, x..x+1; void left out."
    (H, W), (h, w), (y, x) = labels.shape, grid, cell
    return [labels[Y, X] for Y, X in np.ndindex(H, W)
            if y * H <= Y * h < (y + 1) * H and x * W <= X * w < (x + 1) * W and labels[Y, X] >= 0]


def touched(labels, classes, grid):
    "(H, W) -> (C, h, w): has a cell at least one pixel of a class?"
    out = np.zeros((classes, *grid), bool)
    for c, y, x in np.ndindex(out.shape): out[c, y, x] = c in pixels_under(labels, grid, (y, x))
    return out


def centre_label(labels, grid, cell):
    "Label of the pixel that contains the centre of a cell."
    at = [next(Y for Y in range(N) if 2 * n * Y <= (2 * y + 1) * N < 2 * n * (Y + 1))
          for N, n, y in zip(labels.shape, grid, cell)]
    return labels[tuple(at)]


def nearest_patches(maps, labels, c, count):
    """The `count` nearest of the nearest patches of each image, as (distance, image, row, column, label).

    maps: per image (h, w) distances to one prototype of class c; labels: per image (H, W)."""
    found = []
    for i, (d, label) in enumerate(zip(maps, labels)):
        cells = [(d[cell], *cell) for cell in np.ndindex(d.shape) if centre_label(label, d.shape, cell) >= 0]
        if not cells: continue
        value, y, x = min(cells)
        under = pixels_under(label, d.shape, (y, x))
        most = min(under, key=lambda v: (-under.count(v), v)) if under else -1
        found.append((value, i, y, x, c if c in under else most))
    return sorted(found)[:count]


def group_statistics(weights, alive, tau):
    "Prototypes in use in some group, and how many a group uses on average."
    C, G = weights.shape[:2]
    used = {(c, g, s, k) for c in range(C) for g in range(G) for s, k in living(alive, c)
            if weights[c, g, s, k] > 0 and weights[c, g, s, k] >= tau}
    groups = sum(G for c in range(C) if living(alive, c))
    return len({(c, s, k) for c, _, s, k in used}), len(used) / groups if groups else 0.


def duplicates(vectors, alive):
    "Living prototypes equal to an earlier living one."
    seen, out = [], np.zeros(alive.shape, bool)
    for s, c, k in np.ndindex(alive.shape):
        if not alive[s, c, k]: continue
        out[s, c, k] = any((vectors[s, c, k] == v).all() for v in seen)
        seen.append(vectors[s, c, k])
    return out


def class_iou(predictions, labels, classes):
    "Of each class over all images: union without void; None if it occurs neither in truth nor in prediction."
    out = []
    for c in range(classes):
        both = either = 0
        for p, t in zip(predictions, labels):
            for y, x in np.ndindex(t.shape):
                if t[y, x] < 0: continue
                both += p[y, x] == c and t[y, x] == c
                either += p[y, x] == c or t[y, x] == c
        out.append(both / either if either else None)
    return out


def lovasz(logits, labels):
    "Lovász-Softmax, image by image and class by class: each error times the growth of the Jaccard loss when its pixel joins the wrong ones."
    scores = []
    for image, label in zip(logits, labels):                                   # (C, h, w), (h, w)
        there = label >= 0
        p = np.exp(image[:, there] - image[:, there].max(0))
        p, y, losses = p / p.sum(0), label[there], []
        for c in sorted(set(y.tolist())):
            error, wrong, before, loss = np.abs((y == c) - p[c]), set(), 0., 0.
            for i in np.argsort(-error, kind='stable').tolist():
                wrong.add(i)
                said = {j for j in range(len(y)) if (y[j] == c) != (j in wrong)}   # the pixels called c if these were wrong
                true = set(np.flatnonzero(y == c).tolist())
                jaccard = 1 - len(said & true) / len(said | true)
                loss, before = loss + error[i] * (jaccard - before), jaccard
            losses.append(loss)
        scores.append(np.mean(losses) if losses else 0.)
    return float(np.mean(scores))
