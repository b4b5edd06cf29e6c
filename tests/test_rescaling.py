"""After projection the last layer can make up for how loud prototypes became: factors, the stage, several processes, and what is refused."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from scaleprotoseg import recipes
from scaleprotoseg.data import open_dataset
from scaleprotoseg.heads import LinearHead
from scaleprotoseg.model import load_model, read_tensors
from scaleprotoseg.projection import Rescaling
from scaleprotoseg.prototypes import Prototypes
from scaleprotoseg.recipes import Stage, find_recipe, rescaled
from scaleprotoseg.training import run_stage


@pytest.mark.parametrize('seed', range(5))
def test_factors_are_slopes_of_least_squares(seed):
    draw = np.random.default_rng(seed)
    S, C, K, images = 2, 3, 4, [(draw.integers(1, 3), *draw.integers(2, 9, 2)) for _ in range(4)]
    layer, gain = Prototypes(S, C, K, 5), draw.uniform(.1, 10, (S, C, K, 1, 1))
    pairs = []
    for b, h, w in images:
        before = draw.gamma(1., .5, (b, S, C, K, h, w))
        pairs.append((before, (before + draw.normal(0, .3, before.shape)) * gain + draw.normal(0, 2)))
    found = Rescaling(layer)
    for before, after in pairs: found.update(*(torch.tensor(x, dtype=torch.float32) for x in (before, after)))
    flat = [np.concatenate([x[i].transpose(1, 2, 3, 0, 4, 5).reshape(S, C, K, -1) for x in pairs], -1) for i in range(2)]
    for key in np.ndindex(S, C, K):
        slope = np.polyfit(flat[1][key], flat[0][key], 1)[0]
        assert float(found.factors()[key]) == pytest.approx(max(slope, 0.), rel=1e-3, abs=1e-5)


def test_a_similarity_far_from_zero_that_hardly_varies_is_not_made_louder_by_rounding():
    layer = Prototypes(1, 1, 1, 2)
    for shift in (0., 8., 9.2):                                     # log((d + 1) / (d + 1e-4)) ends at 9.2
        found = Rescaling(layer)
        noise = torch.rand(1, 1, 1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
        found.update(noise, noise * 1e-4 + shift)
        assert found.factors().isfinite().all() and (shift > 0) == (found.factors().item() == 1.)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    "A joint stage of `smoke` from a fresh trunk and its projection, plain and rescaled."
    out, start = tmp_path_factory.mktemp('rescaling'), replace(find_recipe('smoke', 'protoseg'), init=None)
    patch = pytest.MonkeyPatch()
    both = replace(start, variant='fresh'), replace(rescaled(start), variant='fresh_rescaled')
    for r in both: patch.setitem(recipes.RECIPES, r.name, r)
    for r in both:
        for s in r.ancestry('finetune'): run_stage('smoke', 'protoseg', s.name, variant=r.variant, out=out, device='cpu')
    yield *(out / 'smoke' / f'protoseg-{r.variant}' / 'seed0' for r in both), both[1]
    patch.undo()


def test_stage_changes_the_last_layer_and_nothing_else(plain):
    one, two, recipe = plain
    a, b, before = load_model(one / 'project'), load_model(two / 'project'), load_model(one / 'joint')
    assert torch.equal(a.prototypes.vectors, b.prototypes.vectors) and torch.equal(a.prototypes.alive, b.prototypes.alive)
    assert (one / 'project/prototypes.json').read_bytes() == (two / 'project/prototypes.json').read_bytes()
    assert (one / 'joint/head.safetensors').samefile(two / 'joint/head.safetensors')     # not trained twice
    assert torch.equal(a.head.weight, before.head.weight)
    dataset, found = open_dataset('partscapes', **recipe.data.splits['push']), Rescaling(a.prototypes)
    for i in range(len(dataset)):
        with torch.no_grad(): features = a.features(dataset[i].image[None])
        found.update(before.prototypes(features)[1], a.prototypes(features)[1])
    factors = found.factors()
    assert not torch.allclose(factors, torch.ones_like(factors), atol=.05)               # there was something to make up for
    by_hand = LinearHead(*a.prototypes.alive.shape)
    by_hand.load_state_dict(a.head.state_dict())
    by_hand.rescale_(factors)
    torch.testing.assert_close(b.head.weight, by_hand.weight, rtol=1e-5, atol=1e-7)
    said = json.loads((two / 'project/metrics.json').read_text())
    alive = factors[a.prototypes.alive]
    assert said['rescaling'] == pytest.approx({'least': alive.min().item(), 'median': alive.median().item(), 'most': alive.max().item()}, rel=1e-5)
    assert said['projection'] == json.loads((one / 'project/metrics.json').read_text())['projection']
    # what the head says is nearer to what it said before
    def apart(m):
        with torch.no_grad(): x, y = (n(dataset[0].image[None]).logits for n in (m, before))
        return (x - x.mean((-2, -1), keepdim=True) - y + y.mean((-2, -1), keepdim=True)).square().mean().item()
    assert apart(b) < apart(a)
    assert not torch.equal(*(load_model(f / 'finetune').head.weight for f in (one, two)))   # training goes on from there


def test_two_processes_rescale_as_one(plain, tmp_path):
    one, two, recipe = plain
    runs = shutil.copytree(one.parents[2], tmp_path / 'runs')
    mine = tmp_path / 'mine.py'
    mine.write_text('from dataclasses import replace\nfrom scaleprotoseg.recipes import add_recipes, find_recipe, rescaled\n'
                    "add_recipes(replace(rescaled(find_recipe('smoke', 'protoseg')), init=None, variant='fresh_rescaled'))\n")
    folder = runs / 'smoke/protoseg-fresh_rescaled/seed0'
    for stage in ('project', 'finetune'): shutil.rmtree(folder / stage)
    done = subprocess.run([sys.executable, '-m', 'scaleprotoseg', '--recipes', mine, 'run', 'smoke', 'protoseg', '--variant', 'fresh_rescaled', '--stage', 'project',
                           '--out', runs, '--device', 'cpu', '--devices', '2'], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    a, b = (read_tensors(f / 'project/head.safetensors') for f in (two, folder))
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-6, atol=0)
    x, y = (json.loads((f / 'project/metrics.json').read_text()) for f in (two, folder))
    assert x['confusion'] == y['confusion'] and x['rescaling'] == pytest.approx(y['rescaling'], rel=1e-6)


@pytest.mark.parametrize('kind, head', [('train', 'linear'), ('prune', 'linear'), ('project', 'groups'), ('project', 'nearest')])
def test_only_a_projection_under_a_linear_layer_can_be_rescaled(kind, head):
    with pytest.raises(ValueError, match=f"stage 'x': rescale=True is for kind project and a linear head, not for {kind} and {head}"):
        Stage('x', kind, 'joint', head, rescale=True)


def test_variants_and_methods_without_projection_cannot_be_rescaled():
    with pytest.raises(ValueError, match='em-quick-ablations/protoseg-plus is a variant; rescale em-quick-ablations/protoseg'):
        rescaled(find_recipe('em-quick-ablations', 'protoseg', 'plus'))
    for method in ('unet', 'prototype_view'):
        with pytest.raises(KeyError, match=f"unknown stage of em-quick/{method} 'finetune'"): rescaled(find_recipe('em-quick', method))


def test_recipe_says_so_and_ends_before_groups_and_pruning():
    main = find_recipe('em-quick', 'scaleprotoseg')
    r = find_recipe('em-quick-ablations', 'scaleprotoseg', 'rescaled10x')
    assert r.last.name == r.reported.name == 'finetune' and 'weights rescaled' in r.table() and 'rescaled' not in main.table()
    assert r.values()['project', 'rescale'] == 1 and ('project', 'rescale') not in main.values()
    assert find_recipe('em-quick-ablations', 'protoseg', 'rescaled').last.name == 'finetune'
    longer = find_recipe('em-quick-ablations', 'scaleprotoseg', 'joint10x')
    assert r.digest('joint') == longer.digest('joint') and r.digest('project') != longer.digest('project')
