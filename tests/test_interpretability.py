"Consistency, stability, sparsity and overlap: golden vectors, hand-computed cases, slow loops, and sanity on PartScapes."
import json
import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scaleprotoseg.heads import GroupHead, LinearHead, PixelHead
from scaleprotoseg.interpretability import (LEGACY, PASCAL_LEGACY_CLASSES, GroupOverlap, PartScores, PartTest, add_noise,
                                            key_points, living_groups, part_hits, points_on, quantile_rank,
                                            ranked_values, score_overlap, score_parts, sparsity, sparsity_curve,
                                            strongest_area, throughput, used_prototypes)
from scaleprotoseg.model import Model
from scaleprotoseg.partscapes import PartScapes
from scaleprotoseg.protocols import Evaluation
from scaleprotoseg.prototypes import Prototypes, log_similarity

S, C, K, M = 4, 5, 3, 5


# -- the published definition, against golden vectors -------------------------------------------------------------------

@pytest.fixture(scope='module')
def gold(golden):
    g = golden('interpretability')
    maps = {name: log_similarity(torch.from_numpy(g[name]), float(g['epsilon'])).view(5, S, C, K, 5, 7)
            for name in ('distances', 'distances_noisy')}
    return g | {'clean': maps['distances'], 'noisy': maps['distances_noisy'], 'label': torch.from_numpy(g['labels']) - 1,
                'part': torch.from_numpy(g['parts'])}


@pytest.mark.parametrize('prefix, quantile', [('', 0.8), ('q95_', 0.95), ('filtered_', 0.8)])
def test_legacy_switch_gives_the_published_programs_rows(gold, prefix, quantile):
    test, kept = replace(LEGACY, quantiles=(quantile,)), gold['kept_prototypes'] if prefix == 'filtered_' else range(60)
    used = torch.tensor([p in set(kept) for p in range(S * C * K)]).view(S, C, K)
    scores, presence, stability = PartScores((S, C, K), M, test), [], []
    for i in range(5):
        label, part = gold['label'][i], gold['part'][i]
        points = key_points(label, part, background=True)
        clean, noisy = (part_hits(gold[name][i], label, points, M, test)[0] for name in ('clean', 'noisy'))
        for c in sorted({int(c) for c in points[:, 0]}):
            here = {int(p) for p in points[points[:, 0] == c][:, 1]}
            for s, k in np.ndindex(S, K):
                if not used[s, c, k]: continue
                p, flags = s * C * K + c * K + k, [x[s, c, k].tolist() for x in (clean, noisy)]
                presence.append([i, p, np.nan] + [flags[0][m] if m + 1 in here else np.nan for m in range(M)])
                stability.append([i, p, 0, *flags[0], 0, *flags[1], flags[0] == flags[1]])
        scores.update(gold['clean'][i:i + 1], gold['noisy'][i:i + 1], label, part)
    np.testing.assert_array_equal(np.array(presence, float), gold[prefix + 'presence'])
    np.testing.assert_array_equal(np.array(stability, float), gold[prefix + 'stability_rows'])
    consistent = {s * C * K + c * K + k: bool(v) for (s, c, k), v in np.ndenumerate(scores.consistent()[0].numpy())}
    assert {p: bool(v) for p, v in gold[prefix + 'consistent_prototypes']} == {p: consistent[p] for p in sorted(kept)}
    result = scores.scores(used)
    assert result['consistency'] == pytest.approx(float(gold[prefix + 'consistency']), rel=1e-12)
    assert result['stability'] == pytest.approx(float(gold[prefix + 'stability']), rel=1e-12)
    assert result['prototypes'] == len(gold[prefix + 'consistent_prototypes']) and result['comparisons'] == len(stability)


def test_corrected_definition_differs_from_the_published_one(gold):
    clean = [part_hits(gold['clean'][0], gold['label'][0], key_points(gold['label'][0], gold['part'][0], t.background), M, t)
             for t in (PartTest((0.8,)), replace(LEGACY, quantiles=(0.8,)))]
    assert not torch.equal(*clean)


# -- slow loops from the definitions ------------------------------------------------------------------------------------

def slow_points(label, parts, background=False):
    rows = []
    for c in sorted(set(label[label >= 0].tolist())):
        for p in sorted(set(parts[(label == c) & (parts > 0)].tolist())):
            mask, seen = (label == c) & (parts == p), np.zeros(label.shape, bool)
            found = []
            for start in zip(*np.nonzero(mask)):
                if seen[start]: continue
                stack, component = [start], []
                seen[start] = True
                while stack:
                    y, x = stack.pop()
                    component.append((y, x))
                    for v, u in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                        if 0 <= v < len(mask) and 0 <= u < mask.shape[1] and mask[v, u] and not seen[v, u]:
                            seen[v, u] = True
                            stack.append((v, u))
                found.append(np.mean(component, 0))
            if background and not mask.all(): found.append(np.mean(np.argwhere(~mask), 0))
            rows += [(c, p, int(np.rint(y)), int(np.rint(x))) for y, x in found]
    return sorted(rows)


def slow_enlarge(m, size, how):
    (h, w), (H, W), out = m.shape, size, np.zeros(size)
    for y, x in np.ndindex(H, W):
        if how == 'nearest':
            out[y, x] = m[y * h // H, x * w // W]
            continue
        v, u = (min(max((i + 0.5) * n / N - 0.5, 0), n - 1) for i, n, N in ((y, h, H), (x, w, W)))
        y0, x0 = int(v), int(u)
        y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
        top, bottom = (m[r, x0] + (m[r, x1] - m[r, x0]) * (u - x0) for r in (y0, y1))
        out[y, x] = top + (bottom - top) * (v - y0)
    return out


def slow_hits(similarities, label, parts, test, quantile):
    "{(scale, class, k, part): hit} of one image."
    out = {}
    points = slow_points(label, parts, test.background)
    for c, p in sorted({row[:2] for row in points}):
        mask = label == c
        for s, k in np.ndindex(similarities.shape[0], similarities.shape[2]):
            large = slow_enlarge(similarities[s, c, k], label.shape, test.enlarge)
            values = np.sort((large * mask).ravel() if test.whole_map else large[mask])
            # the lower neighbour of the interpolated quantile: members of the sample are above both or neither
            limit = values[math.floor(quantile * (len(values) - 1) + 1e-9)]
            out[s, c, k, p] = any(mask[y, x] and large[y, x] > limit for a, b, y, x in points if (a, b) == (c, p))
    return out


def random_image(seed, H=13, W=17, classes=3, parts=3, grid=(4, 5), levels=6):
    g = np.random.default_rng(seed)
    blocks = lambda low, high, n: np.kron(g.integers(low, high, (-(-H // n), -(-W // n))), np.ones((n, n), int))[:H, :W]
    maps = [g.integers(1, levels, (2, classes, 2, *grid)).astype(float) / 8 for _ in range(2)]      # many ties
    return maps[0], maps[1], blocks(-1, classes, 4), blocks(-1, parts + 1, 2)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), enlarge=st.sampled_from(['bilinear', 'nearest']), whole=st.booleans(), background=st.booleans())
def test_fast_hits_are_those_of_the_slow_loop(seed, enlarge, whole, background):
    clean, _, label, parts = random_image(seed)
    test = PartTest((0.5, 0.8, 0.95), enlarge=enlarge, whole_map=whole, background=background)
    points = key_points(torch.from_numpy(label), torch.from_numpy(parts), background)
    assert sorted(map(tuple, points.tolist())) == slow_points(label, parts, background)
    hits = part_hits(torch.from_numpy(clean), torch.from_numpy(label), points, 3, test)
    for i, q in enumerate(test.quantiles):
        slow = slow_hits(clean, label, parts, test, q)
        fast = {key: bool(hits[(i, *key[:3], key[3] - 1)]) for key in slow}
        assert fast == slow
        assert int(hits[i].sum()) == sum(slow.values())                    # nothing else is hit


def test_scores_are_those_of_the_slow_loop():
    test, images = PartTest((0.95,), consistent=0.25), [random_image(seed, classes=2) for seed in range(6)]
    scores, hits, same = PartScores((2, 2, 2), 3, test), {}, []
    for clean, noisy, label, parts in images:
        scores.update(torch.from_numpy(clean)[None], torch.from_numpy(noisy)[None], torch.from_numpy(label), torch.from_numpy(parts))
        a, b = (slow_hits(x, label, parts, test, 0.95) for x in (clean, noisy))
        for key, v in a.items(): hits.setdefault(key, []).append(v)
        for proto in sorted({key[:3] for key in a}): same.append(all(a[key] == b[key] for key in a if key[:3] == proto))
    best = {}
    for key, v in hits.items(): best[key[:3]] = max(best.get(key[:3], 0), np.mean(v))
    result = scores.scores()
    assert result['consistency'] == pytest.approx(np.mean([v > 0.25 for v in best.values()])) and 0 < result['consistency'] < 1
    assert result['stability'] == pytest.approx(np.mean(same)) and 0 < result['stability'] < 1
    assert (result['prototypes'], result['comparisons'], result['images']) == (len(best), len(same), 6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 5)), min_size=1, max_size=12), st.floats(0, 0.999))
def test_above_the_rank_is_above_numpys_quantile(cells, q):
    values, counts = (torch.tensor(x) for x in zip(*cells))
    sample = np.repeat(values.numpy().astype(float), counts.numpy())
    limit = ranked_values(values.double()[None], (q,), counts)[0, 0].item()
    exact = q * (len(sample) - 1)
    if abs(exact - round(exact)) < 1e-6: return                            # NumPy's own rounding decides there
    np.testing.assert_array_equal(sample > limit, sample > np.quantile(sample, q))


def test_few_prototypes_at_a_time_give_the_same(monkeypatch):
    clean, _, label, parts = (torch.from_numpy(x) for x in random_image(3))
    points = key_points(label, parts)
    for test in (PartTest(), LEGACY):
        whole = part_hits(clean, label, points, 3, test)
        monkeypatch.setattr('scaleprotoseg.interpretability.VALUES', 1)
        assert torch.equal(part_hits(clean, label, points, 3, test), whole)
        monkeypatch.undo()


# -- by hand ------------------------------------------------------------------------------------------------------------

def image(*rows): return torch.tensor(rows)
def one_map(*values): return torch.tensor(values, dtype=torch.float32).view(1, 1, 1, 1, 1, -1)


ROW, TWO_PARTS = image([0] * 10), image([1] + [0] * 8 + [2])


def test_a_hit_part_and_a_missed_one():
    "Of 10 pixels the 0.8-quantile leaves one: rank floor(0.8 * 9) = 7, so the two largest are on."
    hits = part_hits(one_map(9, 1, 2, 3, 4, 5, 6, 7, 8, 0)[0], ROW, key_points(ROW, TWO_PARTS), 2, PartTest((0.8, 0.9)))
    assert hits.flatten(1).tolist() == [[True, False], [True, False]]
    hits = part_hits(one_map(8, 1, 2, 3, 4, 5, 6, 7, 9, 0)[0], ROW, key_points(ROW, TWO_PARTS), 2, PartTest((0.8, 0.9)))
    assert hits.flatten(1).tolist() == [[True, False], [False, False]]      # second largest: not above 0.9


@pytest.mark.parametrize('values, quantile, hit', [
    ([5, 1, 1, 1, 1, 1, 1, 1, 1, 1], 0.8, True),       # all others tie at the quantile
    ([1, 1, 1, 1, 1, 1, 1, 1, 1, 1], 0.8, False),      # flat: nothing is strictly greater
    ([5, 5, 5, 1, 1, 1, 1, 1, 1, 1], 0.8, False),      # three tie for two places: rank 7 is one of them
    ([5, 5, 1, 1, 1, 1, 1, 1, 1, 1], 0.8, True)])      # two tie for two places
def test_ties_at_the_quantile(values, quantile, hit):
    hits = part_hits(one_map(*values)[0], ROW, key_points(ROW, TWO_PARTS), 2, PartTest((quantile,)))
    assert hits[0, 0, 0, 0].tolist() == [hit, False]


def test_flat_maps_stay_flat_when_enlarged():
    label, flat = torch.zeros(33, 47).long(), torch.full((1, 5, 7), 0.1)
    for how in ('bilinear', 'nearest'):
        assert not points_on(flat, label == 0, torch.tensor([[0, 0], [16, 20], [32, 46]]), PartTest(enlarge=how)).any()


def test_no_parts_no_score():
    scores = PartScores((1, 1, 1), 2)
    scores.update(one_map(*range(10)), one_map(*range(10)), ROW, torch.zeros_like(ROW))
    scores.update(one_map(*range(10)), one_map(*range(10)), torch.full_like(ROW, -1), TWO_PARTS)       # parts in the void
    assert scores.scores() | {'consistency': None, 'stability': None, 'prototypes': 0, 'images': 0} == scores.scores()
    assert scores.prototypes() == []


def test_one_prototype_over_images():
    "Hit in 4 of 5 images is not more than 0.8; in 9 of 10 it is."
    scores, hit, miss = PartScores((1, 1, 1), 2, PartTest((0.8,))), one_map(*range(10)), one_map(*([5] * 10))
    for m in [hit] * 4 + [miss]: scores.update(m, m, ROW, TWO_PARTS)
    assert scores.scores()['consistency'] == 0 and scores.scores()['stability'] == 1
    assert scores.prototypes()[0] | {'part': 2, 'share': 0.8, 'images': 5, 'consistent': [False]} == scores.prototypes()[0]
    for _ in range(5): scores.update(hit, miss, ROW, TWO_PARTS)
    assert scores.scores()['consistency'] == 1 and scores.scores()['stability'] == 0.5
    json.dumps([scores.scores(), scores.prototypes()], allow_nan=False)


def test_absent_parts_are_missing_not_missed():
    "Part 2 is shown once and hit once; part 1 is shown in all images."
    scores = PartScores((1, 1, 1), 2, PartTest((0.8,)))
    for parts in (TWO_PARTS, TWO_PARTS * (TWO_PARTS == 1), TWO_PARTS * (TWO_PARTS == 1)):
        scores.update(one_map(*range(10)), None, ROW, parts)
    assert scores.shown.tolist() == [[3, 1]] and scores.shares()[0, 0, 0, 0].tolist() == [0, 1]
    assert scores.scores()['consistency'] == 1 and scores.scores()['stability'] is None
    assert scores.prototypes()[0]['stability'] is None


def test_a_centroid_off_the_class_is_never_on_and_the_background_is_a_point_only_in_legacy():
    ring = image([0, 0, 0], [0, -1, 0], [0, 0, 0])
    points = key_points(ring, torch.ones_like(ring))
    assert points.tolist() == [[0, 1, 1, 1]]                              # in the void in the middle
    peak = torch.zeros(1, 1, 1, 3, 3)
    peak[..., 1, 1] = 1
    assert not part_hits(peak, ring, points, 1, PartTest((0.5,))).any()
    assert sorted(key_points(ROW, TWO_PARTS, background=True).tolist()) == [[0, 1, 0, 0], [0, 1, 0, 5], [0, 2, 0, 4], [0, 2, 0, 9]]


def test_used_prototypes_and_classes_select():
    label, parts = image([0] * 5 + [1] * 5), image([1, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    scores = PartScores((1, 2, 1), 1, PartTest((0.5,)))
    maps = torch.arange(10.).repeat(2, 1).view(1, 1, 2, 1, 1, 10)           # rises: misses class 0's part, hits class 1's
    scores.update(maps, maps, label, parts)
    assert scores.scores()['consistency'] == 0.5 and scores.scores()['comparisons'] == 2
    assert scores.scores(classes=[1])['consistency'] == 1 and scores.scores(classes=[1])['comparisons'] == 2      # stability is of all classes
    assert scores.scores(used=torch.tensor([[[True], [False]]]))['consistency'] == 0
    assert [p['cls'] for p in scores.prototypes(torch.tensor([[[True], [False]]]))] == [0]


def test_the_legacy_filter_of_pascal_drops_cow_and_four_classes_without_parts():
    from scaleprotoseg.datasets import PASCAL, PASCAL_PARTS
    dropped = [name for c, name in enumerate(PASCAL.names) if c not in PASCAL_LEGACY_CLASSES]
    assert dropped == ['background', 'boat', 'chair', 'cow', 'sofa'] and [n for n in dropped if n in PASCAL_PARTS] == ['cow']


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="'bilinear' or 'nearest'"): PartTest(enlarge='cubic')
    for q in ((), (1.,), (-0.1,)):
        with pytest.raises(ValueError, match='quantiles'): PartTest(q)
    with pytest.raises(ValueError, match='part 2: expected 1..1'): PartScores((1, 1, 1), 1).update(one_map(*range(10)), None, ROW, TWO_PARTS)


# -- sanity on PartScapes -----------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def streets(): return [s for s in PartScapes('val', size=(64, 96), n=8)]


def detector(sample, classes, parts):
    "Prototype i of a class peaks at a key-point of part i + 1, on the class."
    H, W = sample.label.shape
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing='ij')
    maps = (y * 1.7 + x).div(1e4).expand(1, 1, classes, parts, H, W).clone()
    for c, i, py, px in key_points(sample.label, sample.parts).tolist():
        if sample.label[py, px] == c: maps[0, 0, c, i - 1] = 1e3 - torch.hypot(y - py + 1e-3, x - px + 2e-3)
    return maps


def test_a_perfect_part_detector_is_consistent_and_zero_noise_is_stable(streets):
    labels = PartScapes.labels
    parts = max(map(len, labels.parts))
    scores, on_class = PartScores((1, len(labels), parts), parts), torch.zeros(len(labels), parts)
    for s in streets:
        maps = detector(s, len(labels), parts)
        scores.update(maps, maps, s.label, s.parts)
        points = key_points(s.label, s.parts)
        pixels = torch.bincount(s.label[s.label >= 0], minlength=len(labels))
        good = {(c, i) for c, i, y, x in points.tolist() if s.label[y, x] == c and pixels[c] > 1}
        for c, i in good: on_class[c, i - 1] += 1
    findable = (on_class == scores.shown) & (scores.shown > 0)       # a centroid beside its bent part, or on one pixel, cannot be hit
    assert findable.sum() >= 8 and findable.sum() >= 0.5 * (scores.shown > 0).sum()
    result = scores.scores(findable[None])
    assert [r['consistency'] for r in result['quantiles']] == [1, 1, 1, 1]
    assert [r['stability'] for r in result['quantiles']] == [1, 1, 1, 1]
    best = {(p['cls'], p['part']) for p in scores.prototypes(findable[None])}
    assert all(p['share'] == 1 for p in scores.prototypes(findable[None])) and len(best) > 4


def hit_chance(pixels, points, quantile):
    """Probability that shuffled values without ties hit one of `points` pixels of a class of `pixels` pixels: 1 - C(N - a, m) / C(N, m), a values on."""
    off = quantile_rank(pixels, quantile) + 1
    return 1 - math.comb(off, points) / math.comb(pixels, points)


def test_shuffled_maps_hit_parts_as_often_as_chance(streets):
    "Maps at pixel resolution whose values are shuffled: every part's rate is the hypergeometric one."
    test, n, g = PartTest((0.8, 0.95)), 400, torch.Generator().manual_seed(0)
    for s in streets[:3]:
        points = key_points(s.label, s.parts)
        for c in points[:, 0].unique().tolist():
            mask, mine = s.label == c, points[points[:, 0] == c]
            N, on_class = int(mask.sum()), mask[mine[:, 2], mine[:, 3]]
            maps = torch.rand(n, 1, 1, *mask.shape, generator=g)                    # n "scales" of one class
            hits = part_hits(maps, torch.where(mask, 0, -1), mine * torch.tensor([0, 1, 1, 1]), int(mine[:, 1].max()), test)
            for i, q in enumerate(test.quantiles):
                for part in mine[:, 1].unique().tolist():
                    m = len(mine[(mine[:, 1] == part) & on_class][:, 2:].unique(dim=0))
                    p = hit_chance(N, m, q)
                    assert abs(hits[i, :, 0, 0, part - 1].float().mean() - p) <= 5 * math.sqrt(p * (1 - p) / n) + 1e-9


def test_shuffled_maps_score_the_chance_level(streets):
    "In one image a prototype is consistent if it hits any key-point of its class."
    s, n = streets[0], 500
    points = key_points(s.label, s.parts)
    classes, expected = points[:, 0].unique().tolist(), []
    scores = PartScores((n, len(PartScapes.labels), 1), int(points[:, 1].max()), PartTest((0.9,)))
    scores.update(torch.rand(1, n, len(PartScapes.labels), 1, *s.label.shape, generator=torch.Generator().manual_seed(1)),
                  None, s.label, s.parts)
    for c in classes:
        mine = points[points[:, 0] == c][:, 2:].unique(dim=0)
        expected.append(hit_chance(int((s.label == c).sum()), int((s.label[mine[:, 0], mine[:, 1]] == c).sum()), 0.9))
    spread = 5 * math.sqrt(sum(p * (1 - p) for p in expected) / n) / len(classes)
    assert scores.scores()['consistency'] == pytest.approx(np.mean(expected), abs=spread)


def test_chance_is_counted_right():
    "All placements of 3 on-pixels among 6, 2 key-points."
    from itertools import combinations
    hit = [bool({0, 1} & set(on)) for on in combinations(range(6), 6 - 1 - quantile_rank(6, 0.5))]
    assert hit_chance(6, 2, 0.5) == pytest.approx(np.mean(hit))
    assert hit_chance(6, 0, 0.5) == 0 and hit_chance(6, 6, 0.5) == 1


# -- with a model -------------------------------------------------------------------------------------------------------

class Shrink(nn.Module):
    "A backbone that shows the image's channels on a grid a quarter of its size."
    def __init__(self, scales=1):
        super().__init__()
        self.trunk, self.aspp, self.scales = nn.Conv2d(3, 3, 1), None, scales
        self.register_buffer('std', torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1))

    def forward(self, x, every_scale=False): return nn.functional.avg_pool2d(x, 4)[:, None].expand(-1, self.scales, -1, -1, -1)


def model_of(head, classes=10, per_class=2):
    torch.manual_seed(0)
    prototypes = Prototypes(1, classes, per_class, 3) if not isinstance(head, PixelHead) else None
    return Model(Shrink(), prototypes, head, 'none').eval()


@pytest.fixture
def grouped(): return model_of(GroupHead(1, 10, 2))


@pytest.fixture(scope='module')
def dataset(): return PartScapes('val', size=(64, 96), n=4)


def test_zero_noise_gives_stability_one_and_noise_less(grouped, dataset):
    still = score_parts(grouped, dataset, test=PartTest(noise=0.)).scores()
    moved = score_parts(grouped, dataset, test=PartTest(noise=2.)).scores()
    assert still['stability'] == 1 and still['images'] == 4 and 0 < moved['stability'] < 1
    assert still['consistency'] == moved['consistency']                     # of the clean image


def test_the_noise_of_an_image_does_not_depend_on_the_others(grouped, dataset):
    one, all_of_them = score_parts(grouped, dataset, images=[2]), score_parts(grouped, dataset, images=[0, 1, 3])
    whole = score_parts(grouped, dataset)
    assert torch.equal(one.equal + all_of_them.equal, whole.equal) and torch.equal(one.hits + all_of_them.hits, whole.hits)


def test_noise_is_added_to_the_resized_image(grouped, dataset):
    how, seen = Evaluation(size=(32, 48)), []
    grouped.backbone.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    score_parts(grouped, dataset, how, PartTest(noise=0.2), images=[0])
    clean, noisy = seen
    assert noisy.shape == (1, 3, 32, 48)
    torch.testing.assert_close(noisy, add_noise(clean, grouped.backbone.std, dataset.ids[0]))
    assert ((noisy - clean).std((0, 2, 3)) / grouped.backbone.std.flatten()).tolist() == pytest.approx([0.2] * 3, rel=0.1)


def test_models_and_data_that_cannot_be_scored_are_refused(grouped, dataset):
    black = model_of(PixelHead(1, 10, 3))
    with pytest.raises(ValueError, match='black box'): score_parts(black, dataset)
    with pytest.raises(ValueError, match='black box'): sparsity(black)
    with pytest.raises(ValueError, match='no groups'): score_overlap(black, dataset)
    with pytest.raises(ValueError, match='part labels'):
        score_parts(grouped, type('Bare', (), {'labels': replace(dataset.labels, parts=())})())


def test_throughput_runs_and_is_json():
    rates = throughput({'a': model_of(GroupHead(1, 10, 2)), 'b': model_of(LinearHead(1, 10, 2))}, (32, 48), runs=3, warm_up=1)
    assert list(rates) == ['a', 'b'] and all(r['size'] == [32, 48] for r in rates.values())
    assert all(0 < r['slowest'] <= r['per_second'] <= r['fastest'] for r in rates.values())
    json.dumps(rates)


# -- sparsity -----------------------------------------------------------------------------------------------------------

def slow_sparsity(model, tau):
    last, counts = model.head.last, []
    alive, (S_, C_, K_) = model.prototypes.alive, model.prototypes.alive.shape
    for c in range(C_):
        active = set()
        for s, d, k in np.ndindex(S_, C_, K_):
            if not alive[s, d, k]: continue
            if isinstance(model.head, LinearHead):
                if abs(last[c, d, s, k]) > tau: active.add((s, d, k))
                continue
            for g in range(last.shape[2]):
                if abs(last[c, d, g]) > tau and model.head.weights[d, g, s, k] > 0: active.add((s, d, k))
        counts.append(len(active))
    return sum(counts) / C_


@pytest.mark.parametrize('head', [LinearHead(1, 10, 2), GroupHead(1, 10, 2)])
def test_sparsity_counts_unique_prototypes_and_falls_as_tau_rises(head):
    model, g, taus = model_of(head), torch.Generator().manual_seed(2), (0., 0.05, 0.3, 0.7, 5.)
    with torch.no_grad(): head.last.copy_(torch.rand(head.last.shape, generator=g) - 0.5)
    if isinstance(head, GroupHead): head.threshold_(0.3)
    model.prototypes.kill_(torch.rand(1, 10, 2, generator=g) < 0.3)
    curve = [row['sparsity'] for row in sparsity_curve(model, taus)]
    assert curve == sorted(curve, reverse=True) and curve[0] > curve[2] > curve[-1] == 0
    assert curve == pytest.approx([slow_sparsity(model, tau) for tau in taus])
    assert curve[0] == int(used_prototypes(model).sum())                    # every weight is above 0
    assert sparsity(model) == curve[1]


def test_at_the_start_every_prototype_is_active_for_every_class():
    assert sparsity(model_of(LinearHead(1, 10, 2))) == 20


# -- overlap ------------------------------------------------------------------------------------------------------------

def test_overlap_of_identical_groups_is_one_and_of_separate_ones_zero():
    label, g = torch.zeros(40, 60).long(), torch.Generator().manual_seed(0)
    same = torch.rand(1, 1, 1, 10, 15, generator=g).expand(1, 1, 3, 10, 15)
    overlap = GroupOverlap(torch.ones(1, 3, dtype=torch.bool))
    overlap.update(same, label)
    assert overlap.scores()['overlap'] == 1 and overlap.scores()['classes'] == [1]
    apart, overlap = torch.zeros(1, 1, 2, 10, 20), GroupOverlap(torch.ones(1, 2, dtype=torch.bool))
    apart[0, 0, 0, :, 2], apart[0, 0, 1, :, 17] = 1, 1
    overlap.update(apart, label)
    assert overlap.scores()['overlap'] == 0


def test_overlap_is_that_of_a_slow_loop():
    g = torch.Generator().manual_seed(4)
    living = torch.tensor([[True] * 3, [True, False, True], [True, False, False], [True] * 3])
    overlap, counts = GroupOverlap(living, 0.9), np.zeros((4, 2), int)
    for _ in range(3):
        groups, label = torch.rand(1, 4, 3, 6, 7, generator=g), torch.randint(-1, 3, (24, 35), generator=g)
        overlap.update(groups, label)
        for c in range(3):                                                  # class 3 is never there
            areas = []
            for i in range(3):
                large = cv2.resize(groups[0, c, i].numpy(), (35, 24), interpolation=cv2.INTER_CUBIC)
                areas.append(large > np.quantile(large, 0.9))
            for i, j in ((0, 1), (0, 2), (1, 2)):
                if living[c, i] and living[c, j]: counts[c] += [(areas[i] & areas[j]).sum(), (areas[i] | areas[j]).sum()]
    result = overlap.scores()
    assert result['overlap'] == pytest.approx(counts[:, 0].sum() / counts[:, 1].sum(), abs=2e-3)       # the kernels round differently
    assert result['classes'][:2] == pytest.approx([a / b for a, b in counts[:2]], abs=2e-3)
    assert result['classes'][2:] == [None, None] and result['images'] == 3


def test_one_class_at_a_time_gives_the_same_overlap(monkeypatch):
    g = torch.Generator().manual_seed(5)
    groups, label, found = torch.rand(1, 4, 3, 6, 7, generator=g), torch.randint(0, 4, (24, 35), generator=g), []
    for values in (1, 1 << 22):
        monkeypatch.setattr('scaleprotoseg.interpretability.VALUES', values)
        overlap = GroupOverlap(torch.ones(4, 3, dtype=torch.bool))
        overlap.update(groups, label)
        found.append(overlap.scores())
    assert found[0] == found[1]


def test_torchs_cubic_is_opencvs():
    m = torch.rand(1, 9, 11, generator=torch.Generator().manual_seed(6))
    ours = torch.nn.functional.interpolate(m[None], (36, 50), mode='bicubic', align_corners=False)[0, 0]
    np.testing.assert_allclose(ours, cv2.resize(m[0].numpy(), (50, 36), interpolation=cv2.INTER_CUBIC), atol=1e-4)
    assert strongest_area(m, (36, 50), 0.95).sum() == 36 * 50 - 1 - quantile_rank(36 * 50, 0.95)


def test_a_group_without_weights_is_dead_and_a_model_is_scored(grouped, dataset):
    with torch.no_grad(): grouped.head.weights[3, 1] = 0
    grouped.prototypes.kill_(torch.arange(10).eq(5).view(1, 10, 1).expand(1, 10, 2))
    living = living_groups(grouped)
    assert not living[3, 1] and not living[5].any() and living.sum() == 30 - 4
    result = score_overlap(grouped, dataset).scores()
    assert 0 < result['overlap'] < 1 and result['classes'][5] is None and result['images'] == 4
