"Neighbours: the nearest patches of prototypes, the nearest prototypes of places, and what groups have in common."
import math

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

from scaleprotoseg.data import Labels, Sample, palette
from scaleprotoseg.evaluation import stream
from scaleprotoseg.explain import Group, group_members, scale_names
from scaleprotoseg.heads import GroupHead, LinearHead
from scaleprotoseg.model import Model, Output, build_model
from scaleprotoseg.neighbours import (
    Place,
    agreement_map,
    find_patches,
    group_agreement,
    group_pairs,
    leading_prototypes,
    measure_overlap,
    nearest_prototypes,
    neighbour_agreement,
    plot_group_agreement,
    plot_group_members,
    plot_nearest_patches,
    plot_nearest_prototypes,
    prototype_weights,
    purity_table,
    random_cells,
    read_patches,
    region_box,
    shrunk,
    top_cells,
)
from scaleprotoseg.projection import TILE, cell_box
from scaleprotoseg.protocols import Evaluation
from scaleprotoseg.prototypes import Prototypes
from scaleprotoseg.transforms import reduce_labels

matplotlib.use('Agg')
C, K, G = 3, 3, 2
LABELS = Labels(('a', 'b', 'c'), palette(C))


class Noise:
    "Random images with blocks of labels; the left third of every image is void."
    labels = LABELS
    def __init__(self, n=5, size=(40, 56)): self.n, self.size, self.ids = n, size, [f'n/{i}' for i in range(n)]
    def __len__(self): return self.n
    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        label = torch.randint(0, C, (5, 7), generator=g).repeat_interleave(8, 0).repeat_interleave(8, 1)
        label[:, :self.size[1] // 3] = -1
        return Sample(torch.rand(3, *self.size, generator=g), label[:self.size[0], :self.size[1]], self.ids[i])


def make_model(head='groups', scales=2):
    torch.manual_seed(0)
    trunk = nn.Conv2d(3, scales * 4, 8, stride=8)
    class Backbone(nn.Module):
        aspp = None
        def __init__(self): super().__init__(); self.trunk = trunk
        def forward(self, image, every_scale=False): return trunk(image).unflatten(1, (scales, 4))
    layer = Prototypes(scales, C, K, 4)
    layer.kill_(torch.arange(scales * C * K).view(scales, C, K) % 5 == 3)
    built = GroupHead(scales, C, K, G) if head == 'groups' else LinearHead(scales, C, K)
    if head == 'groups':
        built.project_(layer.alive)
        built.threshold_(0.2)
    return Model(Backbone(), layer, built).eval()


@pytest.fixture(params=['groups', 'linear'])
def model(request): return make_model(request.param, 2 if request.param == 'groups' else 1)


def used_of(model):
    alive = model.prototypes.alive
    if isinstance(model.head, LinearHead): return alive
    return alive & (model.head.weights > 0).any(1).transpose(0, 1)


def outputs(model, data, how=Evaluation()):  # noqa: B008, frozen
    "Everything a loop needs: sample, output, label on the grid."
    return [(i, s, o, reduce_labels(s.label[None], o.distances.shape[-2:])[0])
            for i, s, o in stream(model, data, how, ('distances', 'similarities', 'groups'))]


# -- patches of a prototype -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n', [1, 3, 9])
def test_nearest_patches_are_those_of_a_loop_over_all_cells(model, n):
    data = Noise()
    seen = find_patches(model, data, n=n)
    everything = outputs(model, data)
    for s, c, k in np.ndindex(*model.prototypes.alive.shape):
        best = []
        for i, _, out, label in everything:
            cells = [(float(out.distances[0, s, c, k, y, x]), i, (y, x)) for y, x in np.ndindex(*label.shape) if label[y, x] >= 0]
            best.append(min(cells, key=lambda t: (t[0], t[2])))
        expected = sorted(best)[:n] if model.prototypes.alive[s, c, k] else []
        found = [(float(d), int(i), tuple(at.tolist())) for d, i, at in zip(seen.distance[s, c, k], seen.image[s, c, k], seen.cell[s, c, k]) if i >= 0]
        assert found == expected


def test_ties_go_to_the_first_image_and_the_first_cell(model):
    class Same(Noise):
        def __getitem__(self, i): return Sample(torch.full((3, 40, 56), 0.5), torch.zeros(40, 56, dtype=torch.int64), self.ids[i])
    seen = find_patches(model, Same(), n=3)
    alive = model.prototypes.alive
    assert (seen.image[alive] == torch.arange(3)).all() and (seen.cell[alive] == 0).all()
    assert (seen.image[~alive] == -1).all()


def test_patches_lie_on_labelled_cells_inside_their_boxes(model):
    data, how = Noise(), Evaluation(size=(80, 112))                    # the model sees twice the size
    seen = find_patches(model, data, how)
    keys = [tuple(k) for k in torch.nonzero(model.prototypes.alive).tolist()]
    rows = read_patches(seen, model, data, keys, how)
    assert [len(r) for r in rows] == [3] * len(keys)
    for key, patches in zip(keys, rows):
        assert [p.rank for p in patches] == [0, 1, 2] and (patches[0].scale, patches[0].cls, patches[0].k) == key
        assert patches[0].distance <= patches[1].distance <= patches[2].distance
        for p in patches:
            y0, y1, x0, x1 = p.cell_box
            label = data[data.ids.index(p.image)].label
            assert p.heat.shape == (10, 14) and p.size == (40, 56) and p.cell_box == cell_box(p.cell, (10, 14), (40, 56))
            assert (label[y0:y1, x0:x1] >= 0).any() and p.label >= 0
            assert p.box[0] <= y0 < y1 <= p.box[1] and p.box[2] <= x0 < x1 <= p.box[3]
            assert p.similarity == pytest.approx(math.log((p.distance + 1) / (p.distance + 1e-4)), rel=1e-4)
            assert p.heat[p.cell] == pytest.approx(p.similarity, rel=1e-2)


def test_dead_prototypes_have_no_patches(model):
    seen, dead = find_patches(model, Noise()), tuple(torch.nonzero(~model.prototypes.alive)[0].tolist())
    assert read_patches(seen, model, Noise(), [dead]) == [[]]
    plot_nearest_patches([[]], [dead], LABELS, ['s1', 's2'], used_of(model))           # says so instead of failing


def test_each_winning_image_is_read_once():
    class Counted(Noise):
        reads: list = []
        def __getitem__(self, i): self.reads.append(i); return super().__getitem__(i)
    model, data = make_model(), Counted()
    seen = find_patches(model, data)
    data.reads.clear()
    keys = [tuple(k) for k in torch.nonzero(model.prototypes.alive).tolist()]
    rows = read_patches(seen, model, data, keys)
    assert sorted(data.reads) == sorted({data.ids.index(p.image) for r in rows for p in r})
    shared = {}
    for p in (p for r in rows for p in r): assert shared.setdefault(p.image, p.picture) is p.picture


def test_purity_counts_patches_of_the_class(model):
    seen, used = find_patches(model, Noise()), used_of(model)
    table = purity_table(seen, LABELS, used).set_index('class')
    hits = seen.label == torch.arange(C)[:, None, None]
    unused = model.prototypes.alive & ~used
    assert table.loc['all', 'used'] == int(used.sum()) and table.loc['all', 'unused'] == int(unused.sum())
    assert table.loc['all', 'purity'] == pytest.approx(hits[used].double().mean().item())
    for c, name in enumerate(LABELS.names):
        assert table.loc[name, 'purity'] == pytest.approx(hits[:, c][used[:, c]].double().mean().item(), nan_ok=True)


# -- a picture with a blob at a known place ---------------------------------------------------------------------------

class MeanColour(nn.Module):
    aspp = trunk = None
    def forward(self, image, every_scale=False): return nn.functional.avg_pool2d(image, 8)[:, None]


class Blob:
    labels, ids = Labels(('blob', 'rest'), ((213, 94, 0), (0, 114, 178))), ['blob']
    def __init__(self, corner=(24, 72), size=(64, 96)): self.corner, self.size = corner, size
    def __len__(self): return 1
    def __getitem__(self, i):
        (y, x), image, label = self.corner, torch.full((3, *self.size), 0.4), torch.ones(self.size, dtype=torch.int64)
        image[:, y:y + 8, x:x + 8] = torch.tensor([1., 0, 0])[:, None, None]
        label[y:y + 8, x:x + 8] = 0
        return Sample(image, label, 'blob')


@pytest.fixture
def red():
    layer = Prototypes(1, 2, 1, 3)
    with torch.no_grad(): layer.vectors.copy_(torch.tensor([[[[1., 0, 0]], [[0, 0, 1.]]]]))
    return Model(MeanColour(), layer, LinearHead(1, 2, 1), 'none').eval()


def drawn(fig, box, at, unit):
    "Mean colour (0..1) of a part of a figure; `at` is the frame in inches, `box` y0, y1, x0, x1 as shares of it."
    fig.set_dpi(100)
    fig.canvas.draw()
    pixels = np.asarray(fig.canvas.buffer_rgba())[..., :3] / 255
    (y0, y1, x0, x1), (x, y, w, h) = box, at
    r = lambda v: int(round(100 * v))
    return pixels[r(y + y0 * h):r(y + y1 * h), r(x + x0 * w):r(x + x1 * w)].mean((0, 1))


def frames(fig):
    "Extent of every image of a figure's axis, in inches: x, y, width, height."
    return [(x0, y1, x1 - x0, y0 - y1) for x0, x1, y0, y1 in (im.get_extent() for im in fig.axes[0].images)]


def test_overlay_and_boxes_lie_on_the_blob(red):
    data = Blob()
    rows = read_patches(find_patches(red, data), red, data, [(0, 0, 0)], quantile=0.995)    # the blob is 1 % of the image
    (p,), = rows
    assert p.cell_box == (24, 32, 72, 80) and p.distance == 0 and p.label == 0
    fig = plot_nearest_patches(rows, [(0, 0, 0)], data.labels, ['s1'], torch.ones(1, 2, 1, dtype=torch.bool))
    picture = frames(fig)[1]                                       # after the prototype's own tile
    assert picture[2] / picture[3] == pytest.approx(96 / 64)
    inside = drawn(fig, (26 / 64, 30 / 64, 74 / 96, 78 / 96), picture, 1)
    mirrored = drawn(fig, (34 / 64, 38 / 64, 18 / 96, 22 / 96), picture, 1)
    assert inside.mean() > mirrored.mean() + 0.2                   # hot at the blob, dark where a flip would put it
    from matplotlib.patches import Rectangle
    boxes = [(b.get_y(), b.get_y() + b.get_height(), b.get_x(), b.get_x() + b.get_width()) for b in fig.axes[0].patches
             if isinstance(b, Rectangle)]
    x, y, w, h = picture
    expected = (y + h * 24 / 64, y + h * 32 / 64, x + w * 72 / 96, x + w * 80 / 96)
    assert any(np.allclose(b, expected, atol=1e-6) for b in boxes)
    assert (p.tile[TILE // 2, TILE // 2] == (255, 0, 0)).all()


def test_place_and_its_enlargement_show_the_same_cell(red):
    data = Blob()
    places = [p for p in nearest_prototypes(red, data, cells=96) if p.label == 0]
    assert len(places) == 1 and places[0].cell == (3, 9) and places[0].neighbours[0].cls == 0
    fig = plot_nearest_prototypes(data[0].image, places, data.labels, ['s1'])
    picture, enlarged = frames(fig)[:2]
    assert drawn(fig, (27 / 64, 29 / 64, 75 / 96, 77 / 96), picture, 1) == pytest.approx([1, 0, 0], abs=0.2)
    from matplotlib.patches import Rectangle
    cells = [b for b in fig.axes[0].patches if isinstance(b, Rectangle) and b.get_edgecolor()[:3] == (1, 1, 1)]
    x, y = (cells[1].get_x() + cells[1].get_width() / 2, cells[1].get_y() + cells[1].get_height() / 2)
    at = ((y - enlarged[1]) / enlarged[3], (x - enlarged[0]) / enlarged[2])
    assert drawn(fig, (at[0] - .01, at[0] + .01, at[1] - .01, at[1] + .01), enlarged, 1) == pytest.approx([1, 0, 0], abs=0.2)


def test_pictures_are_never_enlarged_nor_distorted():
    assert shrunk(np.zeros((10, 20, 3), np.uint8), 20).shape == (10, 20, 3)
    assert shrunk(np.zeros((100, 300, 3), np.uint8), 60).shape == (20, 60, 3)
    assert shrunk(np.zeros((1000, 1, 3), np.uint8), 10).shape == (10, 1, 3)


# -- prototypes of a place --------------------------------------------------------------------------------------------

def test_nearest_prototypes_are_those_of_a_loop(model):
    data, used = Noise(), used_of(model)
    places = nearest_prototypes(model, data, used=used, cells=4, n=3)
    everything = {s.id: (out, label) for _, s, out, label in outputs(model, data)}
    assert len(places) == 4 * len(data)
    for p in places:
        out, label = everything[p.id]
        assert label[p.cell] == p.label >= 0                                            # never void
        rows = sorted((float(out.distances[(0, *key, *p.cell)]), key) for key in np.ndindex(*used.shape) if used[key])
        assert [(q.distance, (q.scale, q.cls, q.k)) for q in p.neighbours] == rows[:3]
        for q in p.neighbours:
            heat = out.similarities[0, q.scale, q.cls, q.k].numpy()
            assert q.similarity == heat[p.cell]
            y0, y1, x0, x1 = p.cell_box
            assert q.box[0] <= y0 < y1 <= q.box[1] and q.box[2] <= x0 < x1 <= q.box[3]


def test_dead_and_unused_prototypes_are_never_shown(model):
    used = used_of(model)
    all_of_them = {(q.scale, q.cls, q.k) for p in nearest_prototypes(model, Noise(), used=torch.ones_like(used), n=99, cells=5) for q in p.neighbours}
    assert all_of_them == {tuple(k) for k in torch.nonzero(model.prototypes.alive).tolist()}     # `used` does not revive the dead
    some = {(q.scale, q.cls, q.k) for p in nearest_prototypes(model, Noise(), used=used, n=99) for q in p.neighbours}
    assert some == {tuple(k) for k in torch.nonzero(used).tolist()}
    assert all(p.neighbours == [] for p in nearest_prototypes(model, Noise(), used=torch.zeros_like(used)))


def test_cells_depend_on_nothing_but_seed_and_image():
    groups, other = make_model(), make_model('linear', 1)
    at = lambda places: [(p.id, p.cell) for p in places]
    first = at(nearest_prototypes(groups, Noise()))
    assert at(nearest_prototypes(other, Noise(), n=1)) == first                             # another model
    assert at(nearest_prototypes(groups, Noise(), images=[4, 1])) == [x for x in first if x[0] in ('n/1', 'n/4')]
    assert at(nearest_prototypes(groups, Noise(), seed=1)) != first


def test_random_cells_are_different_and_not_void():
    label = torch.tensor([[-1, 0, 1], [2, -1, 0]])
    assert random_cells(label, 99, 'x').tolist() == [1, 2, 3, 5]
    assert random_cells(torch.full((2, 2), -1), 3, 'x').tolist() == []
    for seed in range(20):
        chosen = random_cells(label, 2, seed).tolist()
        assert len(set(chosen)) == 2 and set(chosen) <= {1, 2, 3, 5}


def test_region_is_connected_and_contains_the_cell():
    heat = np.zeros((4, 6), np.float32)
    heat[0, 0] = heat[3, 5] = 1                                                            # the same, but far away
    assert region_box(heat, (0, 0), (32, 48)) == (0, 8, 0, 8)
    y0, y1, x0, x1 = region_box(heat, (3, 5), (32, 48), 0.5)
    assert y0 >= 16 and x0 >= 32 and (y1, x1) == (32, 48)
    assert region_box(heat, (1, 3), (32, 48)) == (0, 32, 0, 48)                            # inactive: everything is as active


def test_agreement_of_neighbours_counts_classes(model):
    places = nearest_prototypes(model, Noise(), cells=7)
    first = np.mean([p.neighbours[0].cls == p.label for p in places])
    some = np.mean([any(q.cls == p.label for q in p.neighbours) for p in places])
    assert neighbour_agreement(places) == pytest.approx({'nearest': first, 'any': some})
    assert math.isnan(neighbour_agreement([Place(0, 'x', (0, 0), (8, 8), 0, (0, 8, 0, 8), [])])['nearest'])


def test_black_boxes_are_refused():
    black = build_model(dict(backbone=dict(name='unet', width=4), activation='sigmoid', head='pixel', classes=C, scales=1, channels=4))
    for call in (find_patches, nearest_prototypes, measure_overlap):
        with pytest.raises(ValueError, match='black box'): call(black, Noise())


# -- which prototypes -------------------------------------------------------------------------------------------------

def test_leading_prototypes_take_turns_between_scales():
    w = torch.tensor([[[.9, .8, .7]], [[.1, .2, .0]]])
    assert leading_prototypes(w, w > 0, 0, 9) == [(0, 0, 0), (1, 0, 1), (0, 0, 1), (1, 0, 0), (0, 0, 2)]
    assert leading_prototypes(w, w > 9, 0) == []


def test_weights_of_prototypes_are_of_their_own_class(model):
    w, alive = prototype_weights(model), model.prototypes.alive
    assert w.shape == alive.shape and (w[~alive] == 0).all()
    for s, c, k in torch.nonzero(alive).tolist():
        own = model.head.last[c, c, s, k] if isinstance(model.head, LinearHead) else model.head.weights[c, :, s, k].max()
        assert w[s, c, k] == own


# -- groups -----------------------------------------------------------------------------------------------------------

def test_top_cells_are_those_of_a_loop():
    g = torch.Generator().manual_seed(0)
    values, segment = torch.randint(0, 9, (4, 200), generator=g).float(), torch.randint(0, 5, (200,), generator=g)
    marked = top_cells(values, segment, 0.1)
    for row, marks in zip(values, marked):
        for c in range(5):
            at = [i for i in range(200) if segment[i] == c]
            best = sorted(at, key=lambda i: (-row[i], i))[:math.ceil(len(at) / 10 - 1e-9)]
            assert sorted(best) == [i for i in at if marks[i]]


def test_five_per_cent_of_a_hundred_and_forty_are_seven():
    assert top_cells(torch.rand(1, 140), torch.zeros(140, dtype=torch.int64), 0.05).sum() == 7      # 7.000000000000001


def test_overlap_is_that_of_a_loop(model):
    data, share, least = Noise(), 0.3, 4
    found = measure_overlap(model, data, share=share, least=least)
    S, P = model.prototypes.alive.shape[0], model.prototypes.alive.shape[0] * K
    total, count = np.zeros((C, P, P)), np.zeros(C, int)
    for _, _, out, label in outputs(model, data):
        for c in range(C):
            at = np.flatnonzero(label.flatten() == c)
            if len(at) < least: continue
            count[c] += 1
            maps = out.similarities[0, :, c].reshape(S * K, -1)[:, at].numpy()
            marks = [set(sorted(range(len(at)), key=lambda i: (-m[i], i))[:math.ceil(share * len(at) - 1e-9)]) for m in maps]
            total[c] += [[len(a & b) / len(a | b) for b in marks] for a in marks]
    assert found.images.tolist() == count.tolist() and count.min() > 0
    assert np.allclose(found.iou.numpy(), total / count[:, None, None])


def test_small_classes_are_not_counted_and_the_largest_image_is_found():
    model, data = make_model(), Noise()
    areas = torch.stack([torch.bincount(label[label >= 0], minlength=C) for *_, label in outputs(model, data)])     # (n, C)
    found = measure_overlap(model, data, least=9)
    assert found.images.tolist() == (areas >= 9).sum(0).tolist() and found.largest.tolist() == areas.argmax(0).tolist()
    none = measure_overlap(model, data, least=999)
    assert none.images.sum() == 0 and none.iou.isnan().all()
    pairs = group_pairs(none, model, LABELS)
    assert len(pairs) == 0 and group_agreement(pairs).iloc[-1].pairs_together == 0


def test_pairs_are_together_if_a_group_has_both():
    model = make_model()
    found = measure_overlap(model, Noise(), least=2)
    pairs = group_pairs(found, model, LABELS)
    w = model.head.weights * model.prototypes.alive.transpose(0, 1)[:, None]
    expected = {}
    for c in range(C):
        members = [{(s, k) for s, k in torch.nonzero(x).tolist()} for x in w[c]]
        everyone = sorted(set().union(*members))
        for i, a in enumerate(everyone):
            for b in everyone[i + 1:]: expected[LABELS.names[c], *a, *b] = any({a, b} <= m for m in members)
    rows = {tuple(r)[:5]: r.together for r in pairs.itertuples(index=False)}
    assert rows == expected and len(expected) > 5
    r = pairs.iloc[0]
    c = LABELS.names.index(r['class'])
    assert r.iou == found.iou[c, r.scale_1 * K + r.k_1, r.scale_2 * K + r.k_2]
    with pytest.raises(ValueError, match='no groups'): group_pairs(found, make_model('linear', 2), LABELS)


def test_pairs_apart_are_weighted_by_the_scales_of_those_together():
    import pandas as pd
    columns = ['class', 'scale_1', 'k_1', 'scale_2', 'k_2', 'together', 'iou', 'chance', 'images']
    rows = [('a', 0, 0, 0, 1, True, .5, .1, 2), ('a', 0, 0, 0, 2, True, .7, .1, 2), ('a', 0, 0, 1, 1, True, .3, .1, 2),
            ('b', 0, 1, 0, 2, False, .4, .2, 1), ('b', 0, 0, 1, 2, False, .1, .2, 1), ('b', 1, 0, 1, 2, False, .9, .2, 1)]
    table = group_agreement(pd.DataFrame(rows, columns=columns)).set_index('class')
    assert table.loc['all', 'together'] == pytest.approx(.5) and table.loc['all', 'apart'] == pytest.approx(1.4 / 3)
    assert table.loc['a', 'chance'] == pytest.approx(.1) and table.loc['all', 'chance'] == pytest.approx(.15)
    assert table.loc['all', 'apart_same_scales'] == pytest.approx((2 * .4 + .1) / 3)            # scale 1 with itself is never together
    assert table.loc['a', 'pairs_together'] == 3 and math.isnan(table.loc['a', 'apart'])
    plot_group_agreement(table.reset_index())


def test_members_that_are_equal_agree_everywhere():
    similarities = torch.rand(1, 1, 1, 1, 6, 8, generator=torch.Generator().manual_seed(0)).expand(1, 2, 1, 2, 6, 8).clone()
    out, label = Output(torch.zeros(1, 1, 6, 8), similarities=similarities), torch.zeros(48, 64, dtype=torch.int64)
    label[:, 32:] = -1
    class Member:
        def __init__(self, scale, k): self.scale, self.k, self.weight = scale, k, .5
    group = Group(0, 0, 1., [Member(0, 0), Member(1, 1)])
    shares, iou = agreement_map(out, label, group, 0.1)
    assert iou == 1 and set(np.unique(shares)) == {0, 1} and shares.sum() == 3 and (shares[:, 4:] == 0).all()
    similarities[0, 1, 0, 1] *= -1
    assert agreement_map(out, label, group, 0.1)[1] == 0
    assert math.isnan(agreement_map(out, label, Group(0, 0, 1., [Member(0, 0)]), 0.1)[1])
    assert math.isnan(agreement_map(out, label - 9, group, 0.1)[1])                          # no such class here


def test_picture_of_groups_has_a_row_per_group_with_members():
    model, data = make_model(), Noise()
    class NoAtlas:
        def find(self, *key): return None
    (_, sample, out), = stream(model, data, want=('similarities', 'groups'), images=[2])
    for c in range(C):
        groups = group_members(model, NoAtlas(), c)
        fig = plot_group_members(sample.image, sample.label, out, groups, LABELS, ['s1', 's2'], members=2)
        shown = [g for g in groups if g.members]
        assert len(fig.axes[0].images) == 1 + sum(2 + min(2, len(g.members)) for g in shown)


def test_scale_names_fit_models_without_branches(red): assert scale_names(red) == ['s1']
