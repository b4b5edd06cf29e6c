"""The vectorised mathematics equals the loops of oracle.py on any small input.

Prototypes die at random, so classes with one or no living prototype are common; so are void-only images and classes
that occur nowhere. Features and prototypes lie on a grid: exact hits and ties happen all the time.
"""
from dataclasses import dataclass

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from scaleprotoseg.heads import GroupHead, LinearHead, to_simplex
from scaleprotoseg.losses import class_weights, cross_entropy, diversity, group_entropy, legacy_labels, lovasz, off_class_l1
from scaleprotoseg.metrics import average_weight, class_iou, confusion, group_statistics, mean_iou, pixel_accuracy
from scaleprotoseg.model import OUTPUTS, Model
from scaleprotoseg.projection import Projection, duplicates, nearest_own_cell, touched
from scaleprotoseg.pruning import NearestPatches
from scaleprotoseg.prototypes import Prototypes

few = settings(max_examples=60, deadline=None)
TOLERANCE = {torch.float32: {'rtol': 2e-5, 'atol': 1e-4}, torch.float64: {'rtol': 1e-10, 'atol': 1e-10}}


def close(got: Tensor, want, **tolerance):
    torch.testing.assert_close(got.detach().double(), torch.as_tensor(want, dtype=torch.float64),
                               **tolerance or TOLERANCE[got.dtype])


def double(x: Tensor) -> np.ndarray: return x.detach().double().numpy()


@dataclass
class Case:
    "A random small problem."
    features: Tensor   # (B, S, D, h, w)
    labels: Tensor     # (B, h, w)
    prototypes: Prototypes
    linear: LinearHead
    grouped: GroupHead

    @property
    def alive(self): return self.prototypes.alive

    def model(self, head: nn.Module) -> Model: return Model(nn.Identity(), self.prototypes, head, 'none')


@st.composite
def cases(draw) -> Case:
    size = lambda n: draw(st.integers(1, n))
    B, S, C, K, D, G, h, w = map(size, (3, 3, 4, 3, 3, 3, 3, 4))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    classes = st.integers(-1, C - 1) if draw(st.booleans()) else st.sampled_from([-1, 0])
    labels = draw(arrays(np.int64, (B, h, w), elements=classes, fill=st.just(-1)))
    rng = np.random.default_rng(draw(st.integers(0, 2 ** 32 - 1)))
    steps = draw(st.sampled_from([4, 64]))     # coarse: ties; fine: exact in single, not in half precision
    grid = lambda *shape: torch.from_numpy(rng.integers(0, steps + 1, shape) / steps).to(dtype)
    modules = Prototypes(S, C, K, D), LinearHead(S, C, K), GroupHead(S, C, K, G)
    prototypes, linear, grouped = (m.to(dtype) for m in modules)
    prototypes.vectors.data = grid(S, C, K, D)
    prototypes.kill_(~torch.from_numpy(draw(arrays(bool, (S, C, K)))))
    for p in (linear.weight, grouped.last): p.data = torch.from_numpy(rng.normal(size=p.shape)).to(dtype)
    grouped.weights.data = torch.from_numpy(rng.normal(size=grouped.weights.shape)).to(dtype)
    grouped.project_(prototypes.alive)
    if draw(st.booleans()): grouped.threshold_(0.3)
    grouped.weights.data[~prototypes.alive.transpose(0, 1)[:, None].expand_as(grouped.weights)] = 5.   # must not count
    return Case(grid(B, S, D, h, w), torch.from_numpy(labels), prototypes, linear, grouped)


# -- scores -----------------------------------------------------------------------------------------------------------

@few
@given(cases(), st.integers(1, 12))
def test_scores_are_those_of_the_equations_in_any_chunks(case, chunk):
    alive = case.alive.numpy()
    d = oracle.distances(double(case.features), double(case.prototypes.vectors))
    a = oracle.similarities(d)
    u = oracle.groups(a, double(case.grouped.weights), alive)
    want = {'distances': d, 'similarities': a}
    heads = [(case.linear, {'logits': oracle.linear_logits(a, double(case.linear.weight), alive)}),
             (case.grouped, {'groups': u, 'logits': oracle.grouped_logits(u, double(case.grouped.last))})]
    for head, scores in heads:
        model = case.model(head)
        whole, pieces = model.score(case.features, OUTPUTS), model.score(case.features, OUTPUTS, chunk)
        with torch.no_grad(): packed = model.score(case.features, ['groups'], chunk)      # of the used prototypes alone
        assert torch.equal(pieces.features, case.features)
        for name, value in (want | scores).items():
            # a logit is a sum of group activations up to 1e4 of either sign: errors are relative to those
            scale = max(1., u.max()) if name == 'logits' and head is case.grouped else 1.
            close(getattr(whole, name) / scale, value / scale)
            close(getattr(pieces, name) / scale, value / scale)
            if name in ('logits', 'groups'): close(getattr(packed, name) / scale, value / scale)
            assert getattr(whole, name).dtype == case.features.dtype
        assert (whole.groups is None) == (pieces.groups is None) == (head is case.linear)


# -- losses -----------------------------------------------------------------------------------------------------------

@few
@given(cases())
def test_losses_are_those_of_the_equations(case):
    alive, labels = case.alive.numpy(), case.labels.numpy()
    out = case.model(case.linear).score(case.features, ('distances',))
    close(cross_entropy(out.logits, case.labels), oracle.cross_entropy(double(out.logits), labels))
    pixels = np.arange(len(case.alive[0]))                            # the first class has none
    if labels.max() > 0:
        weights = class_weights(torch.from_numpy(pixels), .5)
        close(cross_entropy(out.logits, case.labels, weights=weights.to(out.logits)), oracle.cross_entropy(double(out.logits), labels, weights.tolist()))
        assert np.allclose(weights, oracle.class_weights(pixels.tolist(), .5), rtol=1e-6)
    close(diversity(out.distances, case.labels, case.alive), oracle.diversity(double(out.distances), labels, alive))
    close(off_class_l1(case.linear.last, case.linear.evidence(case.alive)),
          oracle.off_class_l1_linear(double(case.linear.weight), alive))
    close(off_class_l1(case.grouped.last, case.grouped.evidence(case.alive)),
          oracle.off_class_l1_groups(double(case.grouped.last), alive))
    close(group_entropy(case.grouped.weights, case.alive), oracle.group_entropy(double(case.grouped.weights), alive))


@few
@given(cases())
def test_published_labels_of_the_diversity_loss(case):
    d = case.prototypes(case.features)[0]
    got = diversity(d, legacy_labels(case.labels, case.alive.shape[1]), case.alive)
    close(got, oracle.legacy_diversity(double(d), case.labels.numpy(), case.alive.numpy()))


@few
@given(cases(), st.sampled_from([1., 1e-3, 1e3]))
def test_no_loss_or_gradient_is_ever_nan_and_the_dead_get_none(case, far):
    features = (case.features * far).requires_grad_()
    for head in (case.linear, case.grouped):
        model = case.model(head).requires_grad_()
        model.zero_grad()
        out = model.score(features, ('distances',))
        loss = cross_entropy(out.logits, case.labels) + diversity(out.distances, case.labels, case.alive)
        loss = loss + diversity(out.distances, legacy_labels(case.labels, case.alive.shape[1]), case.alive)
        loss = loss + off_class_l1(head.last, head.evidence(case.alive))
        if head is case.grouped: loss = loss + group_entropy(head.weights, case.alive)
        loss.backward()
        assert loss.isfinite() and loss > -1e-4      # the entropy's 1e-5 inside the logarithm
        assert all(p.grad.isfinite().all() for p in [features, *model.parameters()])
        dead = ~case.alive
        assert (case.prototypes.vectors.grad[dead] == 0).all()
        if head is case.linear: assert (head.weight.grad[:, dead.transpose(0, 1)] == 0).all()
        else: assert (head.weights.grad.transpose(0, 1)[:, dead.transpose(0, 1)] == 0).all()


@few
@given(cases())
def test_losses_of_void_are_zero(case):
    void, out = torch.full_like(case.labels, -1), case.model(case.linear).score(case.features, ('distances',))
    assert cross_entropy(out.logits, void) == 0 and diversity(out.distances, void, case.alive) == 0


@few
@given(cases(), st.floats(-3, 3))
def test_what_the_dead_say_changes_nothing(case, rubbish):
    linear, grouped, alive = case.linear, case.grouped, case.alive
    def everything():
        a, b = (case.model(head).score(case.features, ('distances', 'groups')) for head in (linear, grouped))
        return [a.logits, b.logits, b.groups,
                diversity(a.distances, case.labels, alive), group_entropy(grouped.weights, alive),
                *(off_class_l1(head.last, head.evidence(alive)) for head in (linear, grouped))]
    before, dead = everything(), ~alive.transpose(0, 1)                              # (C, S, K)
    case.prototypes.vectors.data[~alive] = rubbish
    linear.weight.data[:, dead] = rubbish
    grouped.weights.data.transpose(0, 1)[:, dead] = rubbish
    grouped.last.data[:, ~grouped.evidence(alive)] = rubbish
    assert all(torch.equal(a, b) for a, b in zip(before, everything()))


# -- the simplex ------------------------------------------------------------------------------------------------------

@st.composite
def rows(draw):
    "(20, n) values of any size, in some draws with many ties, and a mask of the entries that may live."
    n, dtype = draw(st.integers(1, 12)), draw(st.sampled_from([torch.float32, torch.float64]))
    size = draw(st.sampled_from([1e-3, 0.3, 1., 30.] + [1e6] * (dtype is torch.float64)))
    rng = np.random.default_rng(draw(st.integers(0, 2 ** 32 - 1)))
    v = rng.normal(size=(20, n)) * size
    if draw(st.booleans()): v = np.round(v, 1)
    return torch.from_numpy(v).to(dtype), torch.from_numpy(rng.random((20, n)) < draw(st.sampled_from([0.2, 0.8, 1.])))


@few
@given(rows(), st.integers(0, 2 ** 32 - 1))
def test_simplex_projection_is_the_nearest_living_point(rows, seed):
    v, mask = rows
    w, some = to_simplex(v, mask), mask.any(-1)
    atol = {torch.float32: 1e-5, torch.float64: 1e-9}[v.dtype]
    close(w, np.stack([oracle.simplex(a, m) for a, m in zip(double(v), mask.numpy())]), rtol=0, atol=atol)
    assert (w >= 0).all() and (w[~mask] == 0).all()
    close(w.sum(-1), some.double(), rtol=0, atol=atol)
    close(to_simplex(w, mask), w.double(), rtol=0, atol=atol)                            # already there: stays
    other = np.random.default_rng(seed).exponential(size=(20, *v.shape)) * mask.numpy()
    other = other / np.maximum(other.sum(-1, keepdims=True), 1e-300)
    gap = lambda p: (np.where(mask, double(v) - p, 0) ** 2).sum(-1)
    assert (gap(double(w)) <= gap(other) * (1 + 1e-6) + 1e-6)[:, some.numpy()].all()     # no other point is nearer


@few
@given(rows(), st.floats(-50, 50))
def test_simplex_projection_ignores_order_and_a_common_shift(rows, shift):
    v, _ = rows
    atol = {torch.float32: 1e-4, torch.float64: 1e-9}[v.dtype]
    close(to_simplex(v.flip(-1)).flip(-1), double(to_simplex(v)), rtol=0, atol=atol)
    close(to_simplex(v + shift), double(to_simplex(v)), rtol=0, atol=atol)


def test_a_diverged_weight_is_not_hidden_by_the_simplex():
    v = torch.tensor([[1., torch.nan], [torch.inf, 1.], [1., 2.]])
    assert to_simplex(v).isnan().any(-1).tolist() == [True, True, False]


# -- projection -------------------------------------------------------------------------------------------------------

@few
@given(cases())
def test_every_prototype_goes_to_the_first_nearest_patch_of_its_class(case):
    B, labels, alive = len(case.features), case.labels.numpy(), case.alive.clone()
    start = case.prototypes.vectors.detach().clone()
    d = oracle.distances(double(case.features), double(start))
    distances, similarities = case.prototypes(case.features)
    value, cell = nearest_own_cell(distances, case.labels)
    projection = Projection(case.prototypes)
    stream = case.features, distances, similarities, case.labels
    for i in range(B): projection.update(i, *(x[i:i + 1] for x in stream))
    counts = projection.apply_(case.prototypes)

    want, absent = start.clone(), torch.zeros_like(alive)
    for s, c, k in np.ndindex(alive.shape):
        for b in range(B):
            one = oracle.nearest(d[b:b + 1], labels[b:b + 1], c, s, k)
            assert (value[b, s, c, k].item(), cell[b, s, c, k].item()) == (
                (torch.inf, -1) if one is None else (one[0], one[2] * labels.shape[-1] + one[3]))
        best = oracle.nearest(d, labels, c, s, k)
        if not alive[s, c, k]: best = None
        elif best is None: absent[s, c, k] = True
        assert projection.image[s, c, k] == (-1 if best is None else best[1])
        if best is not None:
            assert projection.distance[s, c, k] == best[0] and projection.cell[s, c, k].tolist() == [*best[2:]]
            want[s, c, k] = case.features[best[1], s, :, best[2], best[3]]
    assert torch.equal(case.prototypes.vectors.detach(), want)
    equal = torch.from_numpy(oracle.duplicates(want.numpy(), (alive & ~absent).numpy()))
    assert torch.equal(duplicates(want, alive & ~absent), equal)
    assert torch.equal(case.alive, alive & ~absent & ~equal)
    assert [counts[k] for k in ('projected', 'absent', 'duplicate')] == [
        (alive & ~absent).sum(), absent.sum(), equal.sum()]


@st.composite
def streams(draw):
    """Prototypes and up to 7 images of any size, each as distances (1, S, C, K, h, w) and labels (1, H, W).

    Few different distances, so ties within and between images are common, and images with nothing but void."""
    S, C, K = (draw(st.integers(1, n)) for n in (2, 3, 3))
    prototypes = Prototypes(S, C, K, 1)
    prototypes.kill_(~torch.from_numpy(draw(arrays(bool, (S, C, K)))))
    images = []
    for _ in range(draw(st.integers(0, 7))):
        h, w = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        H, W = draw(st.integers(h, 3 * h)), draw(st.integers(w, 3 * w))
        labels = draw(arrays(np.int64, (1, H, W), elements=st.integers(-1, C - 1), fill=st.just(-1)))
        rng = np.random.default_rng(draw(st.integers(0, 2 ** 32 - 1)))
        distances = rng.integers(0, draw(st.sampled_from([2, 100])), (1, S, C, K, h, w)) / 4
        images.append((torch.from_numpy(distances).float(), torch.from_numpy(labels)))
    return prototypes, images


@few
@given(streams())
def test_touched_cells_and_the_nearest_of_them(stream):
    prototypes, images = stream
    C = prototypes.alive.shape[1]
    for d, labels in images:
        eligible = touched(labels, C, d.shape[-2:])
        assert np.array_equal(eligible[0].numpy(), oracle.touched(labels[0].numpy(), C, d.shape[-2:]))
        value, cell = nearest_own_cell(d, labels[:, :0, :0], eligible)     # labels do not matter
        for s, c, k in np.ndindex(prototypes.alive.shape):
            want = oracle.nearest_eligible(d.numpy(), eligible[:, c].numpy(), c, s, k)
            want = (torch.inf, -1) if want is None else (want[0], want[2] * d.shape[-1] + want[3])
            assert (value[0, s, c, k].item(), cell[0, s, c, k].item()) == want


@few
@given(cases())
def test_eligible_cells_by_label_are_those_of_the_labels(case):
    d, C = case.prototypes(case.features)[0], case.alive.shape[1]
    by_label = nn.functional.one_hot(case.labels + 1, C + 1)[..., 1:].movedim(-1, 1).bool()
    one, two = nearest_own_cell(d, case.labels), nearest_own_cell(d, case.labels, by_label)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    h, w = case.labels.shape[1:]
    assert torch.equal(touched(case.labels, C, (h, w)), by_label)          # one pixel a cell: the rules are the same


# -- pruning ----------------------------------------------------------------------------------------------------------

@few
@given(streams(), st.integers(1, 4), st.data())
def test_pruning_looks_at_the_nearest_patches_of_the_nearest_images(stream, k, data):
    prototypes, images = stream
    threshold, before = data.draw(st.integers(1, k)), prototypes.alive.clone()
    seen = NearestPatches(prototypes, k)
    for i, (d, labels) in enumerate(images): seen.update(i, d, labels)
    rows = {(r['scale'], r['cls'], r['k']): r for r in seen.to_dict(threshold)['prototypes']}
    want = torch.zeros_like(before)
    for s, c, j in np.ndindex(before.shape):
        if not before[s, c, j]:
            assert (s, c, j) not in rows and (seen.image[s, c, j] == -1).all()
            continue
        maps, maps_of_labels = [d[0, s, c, j].numpy() for d, _ in images], [x[0].numpy() for _, x in images]
        patches = oracle.nearest_patches(maps, maps_of_labels, c, k)
        assert [(p['distance'], p['image'], *p['cell'], p['label']) for p in rows[s, c, j]['patches']] == patches
        assert [p['grid'] for p in rows[s, c, j]['patches']] == [list(images[p[1]][0].shape[-2:]) for p in patches]
        want[s, c, j] = bool(sum(p[-1] == c for p in patches) >= threshold)
    assert torch.equal(seen.keep(threshold), want)
    if seen.images < threshold:
        with pytest.raises(ValueError, match='more images'): seen.apply_(prototypes, threshold)
        assert torch.equal(prototypes.alive, before)
        return
    counts, per_class = seen.apply_(prototypes, threshold), lambda alive: alive.sum((0, 2))
    assert torch.equal(prototypes.alive, want)
    assert (counts['kept'], counts['pruned']) == (want.sum(), (before & ~want).sum())
    assert counts['single'] == (per_class(want) == 1).sum()
    assert counts['emptied'] == ((per_class(want) == 0) & (per_class(before) > 0)).sum()


# -- metrics ----------------------------------------------------------------------------------------------------------

@st.composite
def predictions(draw):
    "Class maps and labels (n, h, w); the label maps use only some classes and void, the classes number."
    C = draw(st.integers(2, 5))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 5)))
    used = draw(st.lists(st.integers(-1, C - 1), min_size=1))
    return (draw(arrays(np.int64, shape, elements=st.integers(0, C - 1))),
            draw(arrays(np.int64, shape, elements=st.sampled_from(used))), C)


@few
@given(predictions(), st.data())
def test_miou_by_counting_pixels_and_for_any_batch_split(case, data):
    p, t, C = case
    counts = confusion(torch.from_numpy(p), torch.from_numpy(t), C)
    want = oracle.class_iou(p, t, C)
    got = class_iou(counts)
    assert [None if np.isnan(x) else x for x in got.tolist()] == want
    occur = [x for x in want if x is not None]
    mean = sum(occur) / len(occur) if occur else np.nan
    assert mean_iou(counts) == pytest.approx(mean, rel=1e-12, nan_ok=True)        # sums may differ in the last bit
    valid = t >= 0
    accuracy = (p == t)[valid].mean() if valid.any() else np.nan
    assert pixel_accuracy(counts) == pytest.approx(accuracy, rel=1e-12, nan_ok=True)
    at = data.draw(st.integers(0, len(p)))
    split = sum(confusion(torch.from_numpy(a), torch.from_numpy(b), C) for a, b in ((p[:at], t[:at]), (p[at:], t[at:])))
    assert torch.equal(split, counts)


@few
@given(predictions(), st.integers(0, 4))
def test_void_pixels_do_not_change_miou(case, to):
    p, t, C = case
    other = np.where(t < 0, to % C, p)
    a, b = (confusion(torch.from_numpy(x), torch.from_numpy(t), C) for x in (p, other))
    assert torch.equal(a, b) and a.sum() == (t >= 0).sum()


@few
@given(cases(), st.sampled_from([0., 0.05, 0.25, 0.5, 1.]))
def test_prototypes_in_groups_by_counting(case, tau):
    alive = case.alive
    active, average = oracle.group_statistics(case.grouped.weights.detach().numpy().copy(), alive.numpy(), tau)
    case.grouped.threshold_(tau)
    found = group_statistics(case.grouped.weights, alive)
    assert found['active'] == active and found['group_average'].item() == pytest.approx(average)


@few
@given(cases())
def test_average_weight_is_over_what_lives(case):
    weight, alive = case.linear.weight, case.alive.numpy()
    C = len(weight)
    w = [abs(weight[to, c, s, k].item()) for to in range(C) for c in range(C) for s, k in oracle.living(alive, c)]
    assert average_weight(weight, case.linear.evidence(case.alive)) == pytest.approx(np.mean(w) if w else 0., rel=1e-5)


@few
@given(arrays(np.float64, (2, 3, 2, 4), elements=st.floats(-3, 3)), arrays(np.int64, (2, 2, 4), elements=st.integers(-1, 2)))
def test_lovasz(logits, labels):
    x, y = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(labels)
    loss = lovasz(x, y)
    close(loss, oracle.lovasz(logits, labels))
    close(loss, sum(lovasz(x[i:i + 1], y[i:i + 1]) for i in range(2)) / 2)       # the parts of an update
    loss.backward()
    assert x.grad.isfinite().all() and (x.grad.abs().sum(1)[y < 0] == 0).all()   # void teaches nothing
