"""The prototype view in the contract of the other methods: what decides, what explains, what moves, what is saved."""
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from scaleprotoseg import recipes
from scaleprotoseg.data import Labels
from scaleprotoseg.deploy import Deployed
from scaleprotoseg.explain import Atlas, class_view, evidence_weights
from scaleprotoseg.failure_plots import scene
from scaleprotoseg.failures import FailureCase, blame, cell_weights, evidence_parts, find_failures
from scaleprotoseg.model import build_model, load_model, save_model
from scaleprotoseg.predict import explain_region
from scaleprotoseg.projection import Projection, Source
from scaleprotoseg.recipes import changed, find_recipe, in_stage
from scaleprotoseg.transforms import Sample
from scaleprotoseg.training import COLLAPSED, assigned_prototypes, followed_sums, run_stage

CONFIG = dict(backbone=dict(name='unet', width=4), head='nearest', activation='unit', similarity='cosine', classes=4, scales=1, channels=6, per_class=3)
LABELS = Labels(tuple('abcd'), ((0, 0, 0), (80, 0, 0), (0, 80, 0), (0, 0, 80)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    m = build_model(CONFIG).eval()
    m.prototypes.kill_(torch.tensor([[[False] * 3, [True, False, False], [False, True, True], [False] * 3]]))
    return m


@pytest.fixture
def out(model):
    with torch.no_grad(): return model(torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(1)), ('features', 'distances', 'similarities'))


def test_the_nearest_of_all_living_prototypes_decides(model, out):
    dead = ~model.prototypes.alive[..., None, None]
    flat = out.similarities.masked_fill(dead, -2.).flatten(1, 3)
    assert torch.equal(out.logits.argmax(1), flat.argmax(1) // 3)
    torch.testing.assert_close(out.distances, (1 - out.similarities).clamp_min(0))


def test_contributions_add_up_to_logits(model, out):
    image, region = np.zeros((24, 32, 3), np.uint8), np.zeros((24, 32), bool)
    region[3:20, 5:30] = True
    why = explain_region(model, out, image, region, Atlas([], np.zeros((0, 64, 64, 3), np.uint8)), LABELS)
    assert sum(e.contribution for e in why.evidence) == pytest.approx(why.logit, abs=1e-5)
    base, parts = evidence_parts(model, out.similarities, torch.ones(out.logits.shape[-2:]))
    last = model.head.last.flatten(2).double()
    torch.testing.assert_close(((base + parts.sum((-2, -1)))[None] * last).sum((1, 2)), out.logits[0].sum((1, 2)).double(), atol=1e-3, rtol=1e-4)


def test_a_class_without_prototypes_has_its_constant_score_in_every_explanation(model, out):
    gone = torch.zeros(1, 4, 3, dtype=torch.bool)
    gone[0, 3] = True
    model.prototypes.kill_(gone)
    image = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): out = model(image, ('similarities',))
    region = np.ones((24, 32), bool)
    why = explain_region(model, out, np.zeros((24, 32, 3), np.uint8), region, Atlas([], np.zeros((0, 64, 64, 3), np.uint8)), LABELS, cls=3)
    assert why.logit == pytest.approx(-10, abs=1e-5) and sum(e.contribution for e in why.evidence) == pytest.approx(why.logit, abs=1e-5)
    assert [(e.name, e.parts, e.activation) for e in why.own] == [('d without prototypes', [], pytest.approx(-1))]
    prediction = out.logits.argmax(1)[0].repeat_interleave(24 // out.logits.shape[-2], 0).repeat_interleave(32 // out.logits.shape[-1], 1)
    taken = int(prediction.flatten().mode().values)
    case = FailureCase('a', 0, 3, taken, 'missed', 0., region.size, int((prediction == taken).sum()), 0, int((prediction == taken).sum()))
    label = torch.full((24, 32), 3)
    found = blame(model, case, label, prediction, out)
    weights = cell_weights(prediction == taken, out.logits.shape[-2:])
    means = (out.logits[0].double() * weights).sum((-2, -1))
    assert found.margin == pytest.approx(float(means[taken] - means[3]), rel=1e-5)
    assert found.driver is None or found.driver.cls == taken           # what is constant does not drive
    with torch.no_grad(): logits, evidence = Deployed(model)(image)
    last = evidence_weights(model)
    counted = (evidence[0] * last.diagonal().T[..., None, None]).masked_fill((last.diagonal().T == 0)[..., None, None], -torch.inf)
    torch.testing.assert_close(counted.amax(1), logits[0])


def test_a_constant_score_is_not_drawn_as_the_patch_of_a_dead_prototype(model):
    image = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): taken = int(model(image[None]).logits.argmax(1).flatten().mode().values)
    gone = (taken + 1) % 4
    model.prototypes.alive[0, gone] = False
    class One(list): labels, ids, in_memory = LABELS, ['a'], True
    data = One([Sample(image, torch.full((24, 32), gone), 'a')])
    case, = find_failures(model, data, threshold=2., min_pixels=1)
    sources = [Source(0, c, k, 'b', (0, 0), (1, 1), (8, 8), .1, (0, 8, 0, 8), (0, 8, 0, 8), (0, 8, 0, 8), 1., 0) for c in range(4) for k in range(3)]
    shown = scene(model, data, case, Atlas(sources, np.zeros((1, 64, 64, 3), np.uint8)))
    assert shown.unit == 'cosine of the nearest'
    assert [(x.title, x.patch) for x in shown.evidence[gone]] == [('without prototypes: −10', None)]
    assert all(x.patch is not None for x in shown.evidence[case.predicted])


def test_what_decides_is_what_is_drawn(model, out):
    """A map of an explanation is what was counted: 0 where another prototype of the class is nearer."""
    region = np.ones((24, 32), bool)
    why = explain_region(model, out, np.zeros((24, 32, 3), np.uint8), region, Atlas([], np.zeros((0, 64, 64, 3), np.uint8)), LABELS, cls=0)
    weights = cell_weights(region, out.logits.shape[-2:])
    for e in why.own: assert e.activation == pytest.approx(float((torch.from_numpy(e.heat).double() * weights).sum()), abs=1e-6)
    assert (np.stack([e.heat for e in why.own]) != 0).sum(0).max() == 1


def test_assignment_is_the_nearest_living_of_the_own_class(model, out):
    predicted, own = out.logits[0].argmax(0), out.similarities[0, 0].masked_fill(~model.prototypes.alive[0, ..., None, None], -2.)
    for c in range(4):
        view = class_view(model, out, torch.zeros(3, *predicted.shape), predicted == c, c)
        assert (view.assigned[view.mask] == own[c].argmax(0).numpy()[view.mask]).all() and (view.assigned[~view.mask] == -1).all()


def test_only_correct_positions_move_prototypes(model, out):
    labels = out.logits.argmax(1)
    labels[0, :4], labels[0, 4:6] = (labels[0, :4] + 1) % 4, -1                          # wrong; void
    assigned = assigned_prototypes(out, labels, model)
    assert ((assigned >= 0) == (labels >= 0)).all()
    alive = model.prototypes.alive[0]
    assert alive[labels[labels >= 0], assigned[labels >= 0]].all()
    sums = followed_sums(out, labels, assigned, model)
    assert sums[:, -1].sum() == labels[0, 6:].numel()
    c, k = (int(x[0, 10, 10]) for x in (labels, assigned))
    mine = (labels == c) & (assigned == k)
    mine[0, :4] = False
    torch.testing.assert_close(sums[c * 3 + k, :-1], out.features[0, 0][:, mine[0]].sum(1), atol=1e-4, rtol=0)


def test_snapped_prototypes_are_features_of_positions(model, out):
    projection = Projection(model.prototypes)
    projection.update(0, out.features, out.distances, out.similarities, out.logits.argmax(1))
    projection.apply_(model.prototypes)
    alive = model.prototypes.alive & (projection.image >= 0)
    flat = F.normalize(out.features[0, 0].flatten(1), dim=0)
    best = torch.einsum('ckd,dn->ckn', model.prototypes.vectors[0], flat).amax(-1)
    assert alive.any() and torch.allclose(best[alive[0]], torch.ones(()), atol=1e-5)


def test_saved_and_loaded_is_the_same(model, out, tmp_path):
    save_model(model, CONFIG, tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(again.prototypes.vectors, model.prototypes.vectors) and torch.equal(again.prototypes.alive, model.prototypes.alive)
    with torch.no_grad(): assert torch.equal(again(torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(1))).logits, out.logits)


def joint(monkeypatch, folder, variant, **changes):
    """`smoke`'s joint stage with something changed, from a fresh trunk; its log, and its prototypes."""
    recipe = replace(changed(find_recipe('smoke', 'prototype_view'), variant, **changes), init=None)
    monkeypatch.setitem(recipes.RECIPES, recipe.name, recipe)
    done = run_stage('smoke', 'prototype_view', 'joint', variant=variant, out=folder, device='cpu')
    return pd.read_csv(done / 'log.csv'), load_model(done).prototypes.vectors


def test_one_prototype_per_class_trains(monkeypatch, tmp_path):
    log, vectors = joint(monkeypatch, tmp_path, 'k1', model={'per_class': 1})
    assert set(log.cosine) == {-1.} and vectors.shape[2] == 1 and vectors.isfinite().all()
    classes = vectors.shape[1]
    assert all(abs(x * classes - round(x * classes)) < 1e-4 for x in log.moved) and 0 < log.moved.max() <= 1      # classes with a correct pixel


def test_prototypes_move_and_a_collapse_is_said_once(monkeypatch, tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('default')
        log, vectors = joint(monkeypatch, tmp_path, 'legacy', legacy_draw=in_stage('joint', True), momentum=in_stage('joint', .01))
        still, _ = joint(monkeypatch, tmp_path, 'still', momentum=in_stage('joint', .9999))
    assert log.cosine.iloc[-1] > COLLAPSED > still.cosine.iloc[-1]                       # drawn at random, all get the mean of their class
    assert [str(w.message) for w in said if 'collapsing' in str(w.message)] == [
        f'{tmp_path / "smoke/prototype_view-legacy/seed0/joint"}: prototypes of a class are collapsing into one, so that more of them say no more '
        f'(mean cosine above {COLLAPSED}, see log.csv)']


@pytest.mark.parametrize('head', ['linear', 'groups'])
def test_other_heads_over_cosines_give_the_same_logits_piece_by_piece(head):
    """The used prototypes alone are compared as all of them are."""
    torch.manual_seed(0)
    model = build_model(dict(backbone=dict(name='unet', width=4), head=head, activation='unit', similarity='cosine', classes=3, scales=4, channels=8,
                             per_class=4, groups=2)).eval()
    model.prototypes.kill_(torch.rand(model.prototypes.alive.shape) < .4)
    with torch.no_grad():
        features = model.features(torch.rand(2, 3, 32, 32))
        torch.testing.assert_close(model.score(features, chunk=7).logits, model.score(features, chunk=10**6).logits)


def test_unit_vectors_are_unit_vectors_in_half_precision():
    model = build_model(dict(backbone=dict(name='unet', width=4), head='nearest', activation='unit', similarity='cosine', classes=3, scales=1, channels=8, per_class=2))
    with torch.autocast('cpu', torch.bfloat16): features = model.features(torch.rand(1, 3, 32, 32))
    torch.testing.assert_close(features.float().norm(dim=2), torch.ones(1, 1, *features.shape[-2:]), rtol=1e-5, atol=0)
