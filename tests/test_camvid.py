"CamVid with a timm backbone: every stage of all four methods, on a miniature."
from dataclasses import replace

import numpy as np
import pytest
import test_methods
from test_methods import miniature, shrunk

from scaleprotoseg import recipes
from scaleprotoseg.predict import load
from scaleprotoseg.recipes import find_recipe
from scaleprotoseg.runs import is_finished, read_metrics
from scaleprotoseg.training import run_method


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "CamVid's layout with images of 72 x 96 pixels: sky at the left, a bicyclist at the right."
    root = tmp_path_factory.mktemp('camvid') / 'data'
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(test_methods.OTHER, 'camvid', 0)
        miniature('camvid', root)
    return root


@pytest.mark.parametrize('method', ['deeplabv2', 'linear', 'protoseg', 'scaleprotoseg', 'prototype_view'])
def test_every_stage_runs_with_a_timm_backbone(method, data, tmp_path, monkeypatch):
    recipe = shrunk(find_recipe('camvid-quick', method))
    assert recipe.model['backbone'] == dict(name='timm', arch='tf_efficientnet_lite0')      # no weights: nothing is downloaded
    recipe = replace(recipe, data=replace(recipe.data, crop=(64, 64)))
    monkeypatch.setitem(recipes.RECIPES, recipe.name, recipe)
    folders = run_method('mini', method, out=tmp_path / 'runs', data_root=data, device='cpu')
    assert [f.name for f in folders] == [s.name for s in recipe.stages] and all(map(is_finished, folders))
    by_name = {f.name: read_metrics(f) for f in folders}
    for metrics in by_name.values():
        assert 0 <= metrics['miou'] <= 1 and metrics['iou'].keys() == {*load(folders[0]).labels.names}
        assert sum(map(sum, metrics['confusion'])) == 72 * 96
    if 'project' in by_name:
        each = recipe.model['scales'] * recipe.model['per_class']
        facts = by_name['project']['projection']
        assert (facts['projected'], facts['absent']) == (2 * each, 9 * each)                # two of eleven classes occur
    label = load(folders[-1]).predict(np.zeros((50, 70, 3), np.uint8))
    assert label.shape == (50, 70) and 0 <= label.min() <= label.max() < 11
