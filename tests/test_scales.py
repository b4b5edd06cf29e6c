"Scale analysis: connected components against counting by hand and by loops, pairs across scales against known agreement."
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleprotoseg import scales
from scaleprotoseg.data import rng
from scaleprotoseg.explain import scale_names
from scaleprotoseg.model import build_model
from scaleprotoseg.prototypes import Prototypes
from scaleprotoseg.scales import (
    Components,
    Equivariance,
    best_pair,
    binarize,
    component_areas,
    cut_in_class,
    equivariance_table,
    equivariant_groups,
    measure_equivariance,
    merge_linked,
    on_one_grid,
    pair_maps,
    plot_components,
    plot_equivariance,
    plot_outlined,
    plot_pairs,
    quantile_levels,
    scale_components,
    scale_rates,
    share_of_classes,
    shrink_factors,
    shrunk_similarities,
    spread,
    strongest_pairs,
    taps_inside,
    trend_text,
)


def random(*shape, key='scales'):
    return torch.from_numpy(rng(key, *shape).random(shape)).float()


def tiny(rates=(1, 2), scales_=2, head='linear', **changed):
    torch.manual_seed(0)
    return build_model(dict(backbone={'name': 'unet', 'width': 4, 'rates': list(rates)}, head=head, activation='sigmoid',
                            classes=3, scales=scales_, channels=4, per_class=2, groups=2) | changed).eval()


def regions_by_loops(mask):
    "Areas of 8-connected regions: flood fill, one pixel after the other."
    left, areas = {(y, x) for y, x in np.argwhere(mask).tolist()}, []
    while left:
        stack, area = [left.pop()], 0
        while stack:
            y, x = stack.pop()
            area += 1
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            stack += near
        areas.append(area)
    return areas


# ---- cutting a map

@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 10 ** 6), st.booleans())
@settings(max_examples=150, deadline=None)
def test_maps_are_cut_where_numpy_puts_the_quantile(n, q, seed, ties):
    x = np.random.default_rng(seed).random((2, n))
    if ties: x = np.round(x, 1)
    rank = q * (n - 1)
    if 0 < abs(rank - round(rank)) < 1e-5: return            # a rounding error of the rank decides in numpy
    expected = x >= np.quantile(x, q, axis=1, method='higher')[:, None]
    assert (binarize(torch.from_numpy(x), [q])[0].numpy() == expected).all()


def test_several_quantiles_at_once_equal_one_at_a_time():
    x, qs = random(3, 101), (0.95, 0.0, 0.8, 1.0, 0.8)       # neither sorted nor distinct
    assert torch.equal(quantile_levels(x, qs), torch.cat([quantile_levels(x, [q]) for q in qs]))


def test_ties_at_the_level_are_kept():
    assert binarize(torch.tensor([[0., 1., 1., 1.]]), [1.0]).sum() == 3


@pytest.mark.parametrize('q', [-0.1, 1.5, 95])
def test_quantiles_outside_the_unit_interval_are_refused(q):
    with pytest.raises(ValueError, match='not in'): quantile_levels(torch.rand(1, 4), [q])


def test_a_map_without_positions_has_no_quantile():
    with pytest.raises(ValueError, match='without positions'): quantile_levels(torch.rand(1, 0), [0.5])


# ---- connected components

def test_components_counted_by_hand():
    mask = torch.zeros(6, 7, dtype=torch.bool)
    mask[0, 0] = mask[1, 1] = mask[2, 2] = True               # a diagonal is one region
    mask[0, 4:6] = mask[1, 4:6] = True                        # a square
    mask[5, 6] = True                                         # a corner
    owner, area = component_areas(mask[None])
    assert sorted(area.tolist()) == [1, 3, 4] and owner.tolist() == [0, 0, 0]


def test_background_is_no_component():
    assert component_areas(torch.zeros(2, 4, 4, dtype=torch.bool))[0].numel() == 0
    ring = torch.ones(1, 3, 3, dtype=torch.bool)
    ring[0, 1, 1] = False                                     # a hole is background too
    assert component_areas(ring)[1].tolist() == [8]


def test_regions_do_not_grow_from_one_mask_into_the_next():
    mask = torch.zeros(3, 2, 2, dtype=torch.bool)
    mask[0, 1, 0] = mask[1, 0, 1] = mask[1, 1] = mask[2, 0] = True      # touch across the borders if simply stacked
    owner, area = component_areas(mask)
    assert list(zip(owner.tolist(), area.tolist())) == [(0, 1), (1, 3), (2, 2)]


@given(st.integers(0, 10 ** 6), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 0.9))
@settings(max_examples=60, deadline=None)
def test_components_equal_a_flood_fill(seed, n, H, W, share):
    masks = np.random.default_rng(seed).random((n, H, W)) < share
    owner, area = component_areas(torch.from_numpy(masks))
    assert (owner.diff() >= 0).all()
    for i, mask in enumerate(masks): assert sorted(area[owner == i].tolist()) == sorted(regions_by_loops(mask))


def test_the_accumulator_equals_loops_over_prototypes_and_images():
    S, C, K, qs = 2, 3, 2, (0.7, 0.9)
    alive = random(S, C, K) > 0.2
    seen, expected = Components(alive, qs), np.zeros((len(qs), S, C, K, 3))
    images = np.zeros(C)
    for i in range(4):
        maps, label = random(1, S, C, K, 3, 4, key=f'maps{i}'), torch.from_numpy(rng('label', i).integers(-1, C - i % 2, (10, 13)))
        seen.update(maps, label[None])
        for c in range(C):
            if not (label == c).any(): continue
            images[c] += 1
            for s, k in np.ndindex(S, K):
                if not alive[s, c, k]: continue
                large = F.interpolate(maps[:, s, c, k][:, None].double(), (10, 13), mode='bilinear')[0, 0].float().numpy()
                for j, q in enumerate(qs):
                    areas = regions_by_loops(large >= np.quantile(large, q, method='higher'))
                    expected[j, s, c, k] += len(areas), sum(areas), sum(areas) / 130
    assert seen.images.tolist() == images.tolist()
    assert np.allclose(np.stack([seen.count, seen.area, seen.share], -1), expected)
    count, area, share = (x.numpy() for x in seen.per_prototype())
    living = alive.numpy() & (images > 0)[:, None]
    for x, want in zip((count, area, share), (expected[..., 0] / images[:, None], expected[..., 1] / expected[..., 0],
                                              expected[..., 2] / expected[..., 0])):
        assert np.isnan(x[:, ~living]).all() and np.allclose(x[:, living], want[:, living])
    row = next(r for r in seen.table() if r['quantile'] == 0.9 and r['scale'] == 2)
    assert row['prototypes'] == living[1].sum() and math.isclose(row['components'], count[1, 1][living[1]].mean())
    assert math.isclose(row['area_error'], area[1, 1][living[1]].std(ddof=1) / living[1].sum() ** 0.5)


def test_only_images_with_the_class_count():
    seen = Components(torch.ones(1, 2, 1, dtype=torch.bool), [0.5])
    label = torch.full((1, 6, 6), -1)
    label[0, 0, 0] = 1
    seen.update(random(1, 1, 2, 1, 3, 3), label)
    assert seen.images.tolist() == [0, 1] and seen.count[0, 0, 0, 0] == 0 < seen.count[0, 0, 1, 0]
    assert seen.table()[0]['prototypes'] == 1 and math.isnan(seen.table()[0]['components_error'])


def test_dead_prototypes_are_not_looked_at():
    alive = torch.tensor([[[True, False]]])
    seen = Components(alive, [0.5])
    seen.update(random(1, 1, 1, 2, 3, 3), torch.zeros(1, 6, 6, dtype=torch.int64))
    assert seen.count[..., 1].sum() == 0 and seen.per_prototype()[0][..., 1].isnan().all()


def test_an_image_without_any_living_class_changes_nothing():
    seen = Components(torch.zeros(1, 1, 1, dtype=torch.bool))
    seen.update(random(1, 1, 1, 1, 3, 3), torch.zeros(1, 6, 6, dtype=torch.int64))
    assert seen.count.sum() == 0 and all(math.isnan(r['components']) for r in seen.table())
    assert 'not every scale' in trend_text(seen.table())


def test_portions_bound_memory_and_change_nothing(monkeypatch):
    maps, label = random(1, 2, 3, 4, 4, 5), torch.from_numpy(rng('l').integers(0, 3, (1, 16, 20)))
    whole = Components(torch.ones(2, 3, 4, dtype=torch.bool))
    whole.update(maps, label)
    sizes, cut = [], scales.binarize
    monkeypatch.setattr(scales, 'binarize', lambda x, q: sizes.append(x.numel() * len(q)) or cut(x, q))
    monkeypatch.setattr(scales, 'PIXELS', 3 * 16 * 20 * 4)                    # three maps at four quantiles
    parts = Components(torch.ones(2, 3, 4, dtype=torch.bool))
    parts.update(maps, label)
    assert len(sizes) == 8 and max(sizes) <= 3 * 16 * 20 * 4
    assert torch.equal(whole.count, parts.count) and torch.equal(whole.area, parts.area)


def test_smooth_maps_have_fewer_and_larger_regions_than_rough_ones():
    rough = random(1, 1, 1, 1, 24, 24)
    smooth = F.avg_pool2d(F.pad(rough[0, 0], (3, 3, 3, 3), 'replicate'), 7, 1)[None, None]
    seen = Components(torch.ones(2, 1, 1, dtype=torch.bool))
    seen.update(torch.cat([rough, smooth], 1), torch.zeros(1, 48, 48, dtype=torch.int64))
    assert (seen.count[:, 0] > seen.count[:, 1]).all() and 'the count falls' in trend_text(seen.table())


def test_the_stream_is_read_once_image_by_image():
    def stream():
        for i in range(3):
            yield i, SimpleNamespace(label=torch.zeros(4, 4, dtype=torch.int64)), SimpleNamespace(similarities=random(1, 1, 1, 1, 2, 2))
    assert scale_components(stream(), torch.ones(1, 1, 1, dtype=torch.bool)).images.tolist() == [3]


@pytest.mark.parametrize('rate', [1, 6, 18, 24, 40])
def test_taps_inside_equal_a_convolution_of_ones(rate):
    counted = F.conv2d(torch.ones(1, 1, 16, 24), torch.ones(1, 1, 3, 3), padding=rate, dilation=rate).mean().item()
    assert math.isclose(taps_inside((16, 24), rate), counted, rel_tol=1e-6)


def test_a_trend_that_turns_is_not_called_steady():
    rows = [{'quantile': 0.9, 'scale': s, 'components': n, 'area': a} for s, n, a in ((1, 5., 10.), (2, 6., 20.), (3, 2., 3000.))]
    text = trend_text(rows)
    assert 'count falls from 5 to 2 (not at every step)' in text and 'area grows from 10 to 3000 (at every step)' in text


# ---- pairs across scales

def test_factors_equalise_the_fields_of_view():
    rates = (6, 12, 18, 24)
    assert shrink_factors(rates) == {(0, 1): (2, 1), (0, 2): (3, 1), (0, 3): (4, 1), (1, 2): (3, 2), (1, 3): (2, 1), (2, 3): (4, 3)}
    assert Equivariance(torch.ones(4, 1, 1, dtype=torch.bool), rates).factors == [1, 2, 3, 4]


def test_models_of_one_scale_or_without_prototypes_are_refused():
    for model in (tiny(scales_=1), tiny(head='pixel')):
        with pytest.raises(ValueError, match='one scale|black box'): scale_rates(model)
        with pytest.raises(ValueError, match='one scale|black box'): measure_equivariance(model, [])
    with pytest.raises(ValueError, match='two scales'): shrink_factors([6])
    with pytest.raises(ValueError, match='rates'): Equivariance(torch.ones(2, 1, 1, dtype=torch.bool), (6, 12, 18))


def test_scales_that_are_levels_of_a_backbone_have_names_and_no_rates():
    model = build_model(dict(backbone=dict(name='hrnet', arch='hrnet_w18_small', scales=4, channels=8), head='linear', activation='sigmoid',
                             classes=2, scales=4, channels=8, per_class=2))
    assert scale_names(model) == ['s1', 's2', 's3', 's4'] and scale_names(tiny()) == ['s1 r1', 's2 r2']
    with pytest.raises(ValueError, match='levels of its backbone'): scale_rates(model)


def constructed(q=0.9, images=1, size=64, classes=1):
    "Scale 2, prototype 2 on X sees what scale 1, prototype 1 sees on X/2; all other maps are independent."
    seen = Equivariance(torch.ones(2, classes, 2, dtype=torch.bool), (6, 12), q)
    for i in range(images):
        half, full = random(2, classes, 2, size // 2, size // 2, key=f'half{i}'), random(2, classes, 2, size, size, key=f'full{i}')
        full[1, :, 1] = on_one_grid(half[0], full[1])[0][:, 0]
        label = torch.from_numpy(rng('halves', i).integers(0, classes, (1, size, size)))
        seen.update(i, {1: full, 2: half}, label, torch.arange(classes))
    return seen


def test_a_prototype_that_follows_size_agrees_fully_and_others_by_chance():
    seen = constructed(images=6)
    found = seen.similarity()[0, 1, 0]
    assert found[0, 1] == 1
    others = torch.tensor([[True, False], [True, True]])
    assert (found[others] - 0.1 / 1.9).abs().max() < 0.02                      # p / (2 - p)
    assert (seen.chance()[0, 1, 0] - 0.1 / 1.9).abs().max() < 0.03               # shifted, also the one that follows
    pair, = strongest_pairs(seen)
    assert (pair.scales, pair.ks, pair.factors, pair.similarity) == ((0, 1), (0, 1), (2, 1), 1)


def test_agreement_is_counted_within_the_class_and_summed_over_images():
    "Against loops over classes, pairs and positions."
    S, C, K, q = 3, 2, 2, 0.8
    seen = Equivariance(torch.ones(S, C, K, dtype=torch.bool), (1, 2, 3), q)
    both, union, shifted = np.zeros((3, S, S, C, K, K))
    for i in range(3):
        maps = {k: random(S, C, K, 12 // k, 18 // k, key=f'm{i}{k}') for k in (1, 2, 3)}
        label = torch.from_numpy(rng('lab', i).integers(-1, C, (12, 18)))
        seen.update(i, maps, label[None], torch.arange(C))
        for (a, b), (ka, kb) in shrink_factors((1, 2, 3)).items():
            for c in range(C):
                one = F.interpolate(maps[ka][a, c][None], maps[kb].shape[-2:], mode='bilinear')[0].numpy()
                other = maps[kb][b, c].numpy()
                (h, w) = other.shape[-2:]
                inside = np.array([[label[(2 * y + 1) * 12 // (2 * h), (2 * x + 1) * 18 // (2 * w)] == c for x in range(w)] for y in range(h)])
                for k1, k2 in np.ndindex(K, K):
                    x, y = (m[inside] >= np.quantile(m[inside], q, method='higher') for m in (one[k1], other[k2]))
                    both[a, b, c, k1, k2] += (x & y).sum()
                    union[a, b, c, k1, k2] += (x | y).sum()
                    shifted[a, b, c, k1, k2] += (x & np.roll(y, len(y) // 2)).sum()
    assert (seen.both.numpy() == both).all() and (seen.any.numpy() == union).all() and (seen.shifted.numpy() == shifted).all()
    assert np.allclose(seen.similarity()[0, 1], (both / np.maximum(union, 1))[0, 1])
    assert np.allclose(seen.chance()[0, 2], (shifted / np.maximum(both + union - shifted, 1))[0, 2])


def test_the_chance_level_of_the_best_pair_is_what_unrelated_smooth_maps_reach():
    "Few positions, smooth maps, many pairs: the best pair is far above p / (2 - p), and so is the best shifted pair."
    found, chance = [], []
    for i in range(40):
        seen = Equivariance(torch.ones(2, 1, 3, dtype=torch.bool), (1, 1), 0.9)
        for image in range(4):
            smooth = F.interpolate(random(2, 3, 4, 6, key=f'smooth{i}{image}'), (16, 24), mode='bicubic')[:, None]
            seen.update(image, {1: smooth}, torch.zeros(1, 16, 24, dtype=torch.int64), torch.tensor([0]))
        found.append(best_pair(seen.similarity()).item())
        chance.append(best_pair(seen.chance()).item())
    assert min(np.mean(found), np.mean(chance)) > 1.5 * 0.1 / 1.9 and abs(np.mean(found) - np.mean(chance)) < 0.02


def test_dead_prototypes_and_absent_classes_have_no_similarity():
    seen = Equivariance(torch.tensor([[[True, False], [True, True]], [[True, True], [True, True]]]), (1, 1), 0.5)
    seen.update(7, {1: random(2, 1, 2, 4, 4)}, torch.zeros(1, 4, 4, dtype=torch.int64), torch.tensor([0]))
    found = seen.similarity()[0, 1]
    assert found[0, 0].isfinite().all() and found[0, 1].isnan().all() and found[1].isnan().all()
    assert seen.images.tolist() == [1, 0] and seen.largest.tolist() == [7, -1]
    assert [p.cls for p in strongest_pairs(seen)] == [0]
    assert share_of_classes(seen.similarity(), [0.], seen.images).tolist() == [1.]
    assert share_of_classes(seen.similarity(), [0.]).tolist() == [0.5]


def test_classes_that_are_asked_for_land_in_their_rows():
    maps, label = random(2, 3, 2, 6, 6), torch.from_numpy(rng('three').integers(0, 3, (1, 6, 6)))
    one, some = (Equivariance(torch.ones(2, 3, 2, dtype=torch.bool), (1, 1), 0.5) for _ in range(2))
    one.update(0, {1: maps}, label, torch.arange(3))
    some.update(0, {1: maps[:, [2, 0]]}, label, torch.tensor([2, 0]))
    assert torch.equal(one.both[:, :, [0, 2]], some.both[:, :, [0, 2]]) and not some.any[:, :, 1].any()


def test_maps_of_a_model_are_those_of_its_own_output():
    model, image = tiny(), random(1, 3, 36, 44)
    maps = shrunk_similarities(model, image, (1, 2), torch.tensor([2, 0]))
    with torch.no_grad(): own = model(image, ['similarities']).similarities[0]
    assert torch.allclose(maps[1], own[:, [2, 0]], atol=1e-5)
    assert maps[2].shape[-2:] == (18, 22)
    pair = scales.Pair(0, (0, 1), (1, 0), (2, 1), 1., 0., 0)
    one, other = pair_maps(model, image, pair)
    assert torch.allclose(other, own[1, 0, 0], atol=1e-5) and one.shape == other.shape


def test_maps_of_cosine_prototypes_are_cosines():
    model, image = tiny(activation='unit', similarity='cosine'), random(1, 3, 36, 44)
    with torch.no_grad(): own = model(image, ['similarities']).similarities[0]
    assert torch.allclose(shrunk_similarities(model, image, (1,), torch.arange(own.shape[1]))[1], own, atol=1e-6) and own.min() < 0


def test_measuring_reads_every_image_once_and_skips_void_ones():
    model = tiny()
    samples = [(i, SimpleNamespace(image=random(3, 32, 48, key=f'i{i}'), label=torch.full((32, 48), i - 1))) for i in range(3)]
    seen = measure_equivariance(model, iter(samples), quantile=0.9)
    assert seen.images.tolist() == [1, 1, 0] and seen.largest.tolist() == [1, 2, -1] and len(strongest_pairs(seen)) == 2


def test_only_prototypes_of_present_classes_are_compared(monkeypatch):
    sizes, compare = [], Prototypes.compare
    monkeypatch.setattr(Prototypes, 'compare', lambda self, z, p: sizes.append(tuple(p.shape)) or compare(self, z, p))
    label = torch.ones(32, 48, dtype=torch.int64)
    measure_equivariance(tiny(), [(0, SimpleNamespace(image=random(3, 32, 48), label=label))])
    assert sizes == [(2, 1, 2, 4)] * 2


# ---- groups and classes

@given(st.integers(1, 8), st.integers(0, 10 ** 6), st.floats(0, 0.6))
@settings(max_examples=80, deadline=None)
def test_merging_equals_union_find(n, seed, share):
    linked = np.random.default_rng(seed).random((2, n, n)) < share
    found = merge_linked(torch.from_numpy(linked)).numpy()
    for one, labels in zip(linked, found):
        parent = list(range(n))
        def root(i, parent=parent):
            while parent[i] != i: i = parent[i]
            return i
        for i, j in np.argwhere(one):
            a, b = sorted((root(i), root(j)))
            parent[b] = a
        assert labels.tolist() == [root(i) for i in range(n)]


def test_pairs_with_a_common_prototype_are_one_group():
    similarity = torch.full((3, 3, 2, 2, 2), torch.nan)
    similarity[0, 1, 0, 0, 1] = similarity[1, 2, 0, 1, 1] = 0.9            # s1 p1 - s2 p2 - s3 p2
    similarity[0, 2, 0, 1, 0] = 0.7                                          # s1 p2 - s3 p1
    assert equivariant_groups(similarity, 0.8) == [(0, [(0, 0), (1, 1), (2, 1)])]
    assert equivariant_groups(similarity, 0.6) == [(0, [(0, 0), (1, 1), (2, 1)]), (0, [(0, 1), (2, 0)])]
    assert equivariant_groups(similarity, 0.9) == []                         # above, not at


def test_the_share_of_classes_falls_with_the_threshold():
    similarity = random(4, 4, 20, 3, 3)
    thetas = np.linspace(0, 1, 50)
    share = share_of_classes(similarity, thetas)
    assert (share.diff() <= 0).all() and share[0] == 1 and share[-1] == 0
    for theta, found in zip(thetas[::7], share[::7]):
        assert math.isclose(found, len({c for c, _ in equivariant_groups(similarity, float(theta))}) / 20)


def test_the_table_agrees_with_the_groups():
    seen = constructed(images=2, classes=2)
    rows = equivariance_table(seen, [0., 0.5, 1.])
    assert [r['classes'] for r in rows] == [100, 100, 0] and rows[1]['by_chance'] == 0 and math.isnan(rows[2]['members'])
    assert rows[1]['groups'] == 2 and rows[1]['members'] == rows[1]['scales'] == 2
    assert best_pair(seen.similarity()).tolist() == [1, 1]


# ---- pictures

def test_a_cut_map_stays_inside_its_class():
    label = torch.zeros(16, 16, dtype=torch.int64)
    label[:8] = 1
    mask = cut_in_class(random(8, 8), label, 1, 0.75)
    assert mask[:4].sum() == 8 and not mask[4:].any()


def test_outlines_lie_on_the_border_of_a_mask():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 2] = True                                        # pixels 10..19 and 20..29 of 40 x 40
    ax = plot_outlined(np.zeros((40, 40, 3), np.uint8), {'white': mask})
    x, y = np.concatenate([p.vertices for c in ax.collections for p in c.get_paths()]).T
    assert (x.min(), x.max(), y.min(), y.max()) == (19.5, 29.5, 9.5, 19.5)
    assert not plot_outlined(np.zeros((4, 4, 3), np.uint8), {'white': mask & False}).collections


def test_figures_have_a_panel_per_percentile_and_pair():
    import matplotlib.pyplot as plt
    seen = Components(torch.ones(2, 1, 1, dtype=torch.bool))
    seen.update(random(1, 2, 1, 1, 3, 3), torch.zeros(1, 6, 6, dtype=torch.int64))
    assert len(plot_components(seen.table(), ['s1', 's2']).axes) == 8
    pairs = constructed()
    assert plot_equivariance(equivariance_table(pairs, [0., 0.5])).get_ylim()[1] > 100
    grey, mask = np.zeros((8, 8, 3), np.uint8), np.eye(8) > 0
    fig = plot_pairs([(p, [grey] * 3, mask, [mask, mask]) for p in strongest_pairs(pairs)], ['tree'], ['s1', 's2'])
    assert [ax.get_title() for ax in fig.axes] == ['tree: IoU 1.00 (chance 0.03)', 's1 p1 on X/2', 's2 p2 on X']
    plt.close('all')


def test_spread_indices_are_distinct_and_even():
    assert spread(100, 4) == [0, 25, 50, 75] and spread(5, 0) == spread(5, 9) == list(range(5))
    assert len(set(spread(7, 6))) == 6
