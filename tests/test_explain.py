"""Explanations: the atlas, exactness of the evidence, views of classes, groups, and plots that survive odd input."""
import json
from dataclasses import asdict, fields, replace

import matplotlib
import numpy as np
import pytest
import torch

from scaleprotoseg.data import Labels, palette
from scaleprotoseg.explain import (
    Atlas,
    class_view,
    evidence_kind,
    evidence_maps,
    evidence_names,
    evidence_weights,
    group_members,
    normalized,
    overlay,
    plot_group_graph,
    plot_prototypes,
    plot_scale_usage,
    plot_segmentation,
    read_atlas,
    scale_names,
    scale_usage,
)
from scaleprotoseg.model import build_model
from scaleprotoseg.projection import TILE, Source, save_sheet

matplotlib.use('Agg')
C, S, K, G = 3, 4, 2, 3
LABELS = Labels(('a', 'b', 'c'), palette(C))


def make_model(head, scales=S):
    torch.manual_seed(0)
    model = build_model(dict(backbone=dict(name='unet', width=4), activation='sigmoid', head=head, classes=C,
                             scales=scales, channels=6, per_class=K, groups=G)).eval()
    if model.prototypes is not None:
        model.head.last.data.uniform_(-1, 1)
        model.prototypes.alive[0, 0, 1] = False
    return model


def make_atlas(n=S * C * K):
    keys = [(s, c, k) for s in range(S) for c in range(C) for k in range(K)][:n]
    sources = [Source(s, c, k, f'im{i}', (1, 2), (4, 6), (32, 48), 0.5, (8, 16, 16, 24), (8, 16, 16, 24), (8, 16, 16, 24), 1., i)
               for i, (s, c, k) in enumerate(keys)]
    return Atlas(sources, np.random.default_rng(0).integers(0, 255, (n, TILE, TILE, 3), dtype=np.uint8))


def score(model):
    torch.manual_seed(1)
    with torch.no_grad(): return model(torch.rand(2, 3, 20, 24), want=[evidence_kind(model)])


def write(atlas, folder):
    save_sheet(atlas.tiles, folder / 'patches.webp')
    (folder / 'prototypes.json').write_text(json.dumps([asdict(s) for s in atlas.sources]))


# -- the atlas --------------------------------------------------------------------------------------------------------

def test_atlas_comes_back_as_it_was_written(tmp_path):
    atlas = make_atlas(7)
    write(atlas, tmp_path)
    again = read_atlas(tmp_path)
    assert again.sources == atlas.sources and np.array_equal(again.tiles, atlas.tiles)
    assert np.array_equal(again.tile(0, 1, 1), atlas.tiles[atlas.find(0, 1, 1).tile])
    assert again.find(3, 2, 1) is None and again.tile(3, 2, 1) is None


def test_empty_atlas_is_no_error(tmp_path):
    write(make_atlas(0), tmp_path)
    assert read_atlas(tmp_path).sources == []


def test_stage_without_atlas_names_the_stage_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match='`project` stage'): read_atlas(tmp_path)


@pytest.mark.parametrize('text', ['', '{"a": 1}', '[{"scale": 0}]', '[1]', '[]'])
def test_damaged_prototypes_json_is_named(tmp_path, text):
    write(make_atlas(), tmp_path)
    (tmp_path / 'prototypes.json').write_text(text)
    with pytest.raises(ValueError, match='prototypes.json'): read_atlas(tmp_path)


def test_missing_and_damaged_sheets_are_named(tmp_path):
    write(make_atlas(), tmp_path)
    sheet = tmp_path / 'patches.webp'
    data = sheet.read_bytes()
    sheet.write_bytes(data[:50])
    with pytest.raises(ValueError, match='patches.webp'): read_atlas(tmp_path)
    sheet.unlink()
    with pytest.raises(FileNotFoundError, match='patches'): read_atlas(tmp_path)
    save_sheet(make_atlas(1).tiles, sheet)
    write(make_atlas(), tmp_path)
    many = json.loads((tmp_path / 'prototypes.json').read_text())
    many[-1]['tile'] = 999
    (tmp_path / 'prototypes.json').write_text(json.dumps(many))
    with pytest.raises(ValueError, match='other patches'): read_atlas(tmp_path)


# -- evidence ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('head', ['linear', 'groups'])
def test_logits_are_the_weighted_sum_of_the_evidence(head):
    model = make_model(head)
    out = score(model)
    again = torch.einsum('ije,bjehw->bihw', evidence_weights(model), evidence_maps(out))
    assert torch.allclose(again, out.logits, rtol=1e-4, atol=1e-4)
    assert len(evidence_names(model)) == evidence_maps(out).shape[2] == (G if head == 'groups' else S * K)


def test_black_box_has_no_evidence():
    with pytest.raises(ValueError, match='black box'): evidence_kind(make_model('pixel', 1))


def test_output_without_evidence_says_what_to_ask_for():
    model = make_model('linear')
    with torch.no_grad(), pytest.raises(ValueError, match='want='): evidence_maps(model(torch.rand(1, 3, 16, 16)))


def test_scales_are_named_after_their_rates():
    assert scale_names(make_model('groups')) == ['s1 r6', 's2 r12', 's3 r18', 's4 r24']
    assert scale_names(make_model('linear', 1)) == ['s1']


def views(model, out, classes):
    "The view of every class of every image, at the positions of the maps."
    one = lambda x, b: None if x is None else x[b:b + 1]
    return [[class_view(model, replace(out, **{f.name: one(getattr(out, f.name), b) for f in fields(out)}), torch.zeros(3, *classes.shape[1:]), classes[b] == c, c)
             for c in range(C)] for b in range(len(classes))]


@pytest.mark.parametrize('head', ['linear', 'groups'])
def test_the_strongest_living_evidence_of_the_class_is_assigned(head):
    model = make_model(head)
    survivor = int(score(model).similarities[:, :, 1].mean((0, 3, 4)).argmin()) if head == 'linear' else -1
    if head == 'linear': model.prototypes.alive[:, 1] = torch.arange(S * K).view(S, K) == survivor   # the weakest
    out, classes = score(model), torch.randint(-1, C, (2, 20, 24), generator=torch.Generator().manual_seed(2))
    maps, found = evidence_maps(out), views(model, out, classes)
    for b, y, x in [(0, 0, 0), (0, 7, 3), (1, 19, 23), (1, 4, 11), (0, 12, 2), (1, 9, 9)]:
        for c in range(C):
            assigned = found[b][c].assigned[y, x]
            if c != classes[b, y, x]:
                assert assigned == -1
                continue
            if head == 'groups': strength = maps[b, c, :, y, x] * model.head.last[c, c]
            else: strength = torch.where(model.prototypes.alive[:, c].flatten(), maps[b, c, :, y, x], -torch.inf)
            assert assigned == int(strength.argmax())
    if head == 'linear': assert all((v[1].assigned[v[1].mask] == survivor).all() and v[1].strongest() == [survivor] for v in found)


def test_dead_class_is_assigned_to_nothing():
    model = make_model('groups')
    model.prototypes.alive[:, 1] = False
    found = views(model, score(model), torch.ones(2, 20, 24, dtype=torch.long))
    assert all((v[1].assigned == -1).all() and v[1].strongest() == [] for v in found)


def test_an_empty_group_plays_no_part():
    """A threshold may leave a group no prototype; its activation is 1 everywhere."""
    model = make_model('groups')
    model.head.weights.data[1, 0] = 0.
    found = views(model, score(model), torch.ones(2, 20, 24, dtype=torch.long))
    assert all(v[1].alive.tolist() == [False] + [True] * (G - 1) and 0 not in v[1].assigned for v in found)


# -- groups -----------------------------------------------------------------------------------------------------------

def test_groups_list_their_living_non_zero_members_heaviest_first():
    model, atlas = make_model('groups'), make_atlas()
    model.head.threshold_(0.12)
    for c in range(C):
        groups = group_members(model, atlas, c)
        assert [g.index for g in groups] == list(range(G))
        for g in groups:
            w = model.head.weights[c, g.index] * model.prototypes.alive[:, c]
            assert g.last == pytest.approx(model.head.last[c, c, g.index].item())
            assert {(m.scale, m.k) for m in g.members} == set(map(tuple, torch.nonzero(w).tolist()))
            assert [m.weight for m in g.members] == sorted((m.weight for m in g.members), reverse=True)
            assert all(m.source is atlas.find(m.scale, c, m.k) for m in g.members)


def test_dead_class_has_no_groups_and_linear_heads_have_none_at_all():
    model = make_model('groups')
    model.prototypes.alive[:, 2] = False
    assert group_members(model, make_atlas(), 2) == []
    for f in (lambda m: group_members(m, make_atlas(), 0), scale_usage):
        with pytest.raises(ValueError, match='groups'): f(make_model('linear'))


def test_scale_usage_counts_living_weights_only():
    model = make_model('groups')
    model.head.weights.data[0] = 0
    model.head.weights.data[1] = 0
    model.head.weights.data[1, :, 1] = 0.25
    model.head.weights.data[1, :, 3, 0] = 0.5
    model.prototypes.alive[1, 1, 0] = False
    usage = scale_usage(model)
    assert usage[0].eq(0).all()                                                         # no weight, no NaN
    assert torch.allclose(usage[1], torch.tensor([0, 1 / 3, 0, 2 / 3])) and usage[2].sum().item() == pytest.approx(1)


# -- pictures ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('heat', [np.zeros((3, 4)), np.full((3, 4), -7.), torch.full((3, 4), 2.)])
def test_flat_heat_map_is_no_error(heat):
    assert (normalized(heat) == 0).all()
    picture = overlay(torch.rand(3, 12, 16), heat)
    assert picture.shape == (12, 16, 3) and picture.dtype == np.uint8


def test_overlay_is_warmer_where_it_is_hot_and_leaves_the_image_alone():
    image, heat = np.full((8, 8, 3), 100, np.uint8), np.zeros((8, 8), np.float32)
    heat[:, 4:] = 1
    before = image.copy()
    shown = overlay(image, heat).astype(int)
    assert shown[0, 7].sum() > shown[0, 0].sum() and np.array_equal(image, before)


def texts(fig): return [t.get_text() for t in fig.findobj(matplotlib.text.Text) if t.get_text()]


def legend_names(fig): return [t.get_text() for legend in fig.legends for t in legend.get_texts()]


def test_segmentation_legend_lists_what_occurs():
    label = np.array([[0, 0, -1, 1]] * 4)
    fig = plot_segmentation(torch.rand(3, 4, 4), label, np.zeros((4, 4), int), LABELS)
    assert legend_names(fig) == ['a', 'b', 'void'] and len(fig.axes) == 3
    assert len(plot_segmentation(torch.rand(3, 4, 4), None, torch.ones(4, 4, dtype=torch.long), LABELS).axes) == 2


def test_prototype_sheet_survives_dead_and_missing_prototypes():
    alive = torch.ones(S, C, K, dtype=torch.bool)
    alive[0] = False
    fig = plot_prototypes(make_atlas(5), LABELS, alive, classes=[2, 0])
    assert {'a', 'c', 's1'} <= set(texts(fig)) and 'b' not in texts(fig)
    ax = fig.axes[0]
    tiles = [np.asarray(i.get_array()) for i in ax.images]
    grey = [bool((t == t[..., :1]).all()) for t in tiles if len(t) > 1]                # not those that were never projected
    assert len(ax.lines) == 2 * K and grey == [True] * len(grey) and len(grey) == 3   # of scale 1 both classes are crossed out; the atlas knows three of them


def test_group_graph_names_groups_scales_and_weights():
    model = make_model('groups')
    groups = group_members(model, make_atlas(), 1)
    ax = plot_group_graph(groups, make_atlas(0), LABELS, scale_names(model))       # without patches
    found = texts(ax.figure)
    assert {'b', 's1 r6 p1', 's4 r24 p2'} <= set(found) and sum('group' in t for t in found) == G
    assert f'{groups[0].members[0].weight:.2f}'.lstrip('0') in found
    for g in groups: g.members.clear()
    assert sum('empty' in t for t in texts(plot_group_graph(groups, make_atlas(), LABELS).figure)) == G
    with pytest.raises(ValueError, match='no groups'): plot_group_graph([], make_atlas(), LABELS)


def test_plots_draw_on_the_axis_they_are_given():
    import matplotlib.pyplot as plt
    ax = plt.subplots()[1]
    model = make_model('groups')
    assert plot_scale_usage(scale_usage(model), LABELS, scale_names(model), ax) is ax


@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt
    plt.close('all')
