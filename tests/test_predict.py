"""Prediction for users: any picture in, its own size out; explanations that add up; errors that say what to do."""
import copy
import json
import os
import shutil
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image


from saved import DATA, write_stage

from scaleprotoseg.failures import cell_weights
from scaleprotoseg.model import Model
from scaleprotoseg.predict import as_region, last_stage, load, resolve_run, to_image

matplotlib.use('Agg')



@pytest.fixture(scope='module')
def stages(tmp_path_factory):
    runs = tmp_path_factory.mktemp('runs') / 'smoke'
    return {'groups': write_stage(runs / 'scaleprotoseg/seed0/threshold'),
            'unet': write_stage(runs / 'scaleprotoseg-unet/seed0/threshold', backbone=dict(name='unet', width=4)),
            'linear': write_stage(runs / 'protoseg/seed0/finetune', 'linear', 1, recipe='smoke/protoseg'),
            'pixel': write_stage(runs / 'linear/seed0/joint', 'pixel', 1, dict(name='unet', width=4), 'smoke/linear')}


@pytest.fixture(scope='module')
def predictors(stages): return {name: load(stage) for name, stage in stages.items()}


@pytest.fixture(scope='module')
def grouped(predictors): return predictors['groups']


@pytest.fixture(scope='module')
def array(): return (DATA[0].image.permute(1, 2, 0) * 255).round().byte().numpy()


# -- which model ------------------------------------------------------------------------------------------------------

def empty_stage(folder, recipe='', finished=True, age=0):
    folder.mkdir(parents=True)
    needed = dict.fromkeys(('backbone', 'head', 'activation', 'classes', 'scales', 'channels'))
    (folder / 'config.json').write_text(json.dumps({**needed, 'recipe': recipe}))
    if finished:
        (folder / 'metrics.json').write_text('{}')
        os.utime(folder / 'metrics.json', (1e9 - age, 1e9 - age))
    return folder


def test_seed_folder_stands_for_the_last_finished_stage_of_the_main_line(tmp_path):
    for age, name in enumerate(['finetune', 'project', 'joint', 'warmup']):        # the side branch is the newest
        empty_stage(tmp_path / name, 'smoke/scaleprotoseg', age=age)
    assert last_stage(tmp_path).name == 'project'
    empty_stage(tmp_path / 'group_warmup', 'smoke/scaleprotoseg', finished=False)
    assert last_stage(tmp_path).name == 'project'
    empty_stage(tmp_path / 'threshold', 'smoke/scaleprotoseg', age=99)
    assert last_stage(tmp_path).name == 'threshold'


def test_unknown_recipe_falls_back_to_the_newest_stage(tmp_path):
    for age, name in enumerate(['b', 'c', 'a']): empty_stage(tmp_path / name, 'mine/own', age=age)
    assert last_stage(tmp_path).name == 'b'


def test_the_newest_stage_is_the_one_that_says_so(tmp_path):
    for age, name in enumerate(['b', 'c', 'a']):        # a copy gives all files the times of the copying
        (empty_stage(tmp_path / name, 'mine/own', age=age) / 'provenance.json').write_text(json.dumps({'finished': f'2030-01-0{age + 1}T00:00:00+00:00'}))
    assert last_stage(tmp_path).name == 'a'


def test_unfinished_stages_and_runs_are_refused(tmp_path):
    stage = empty_stage(tmp_path / 'seed0/joint', finished=False)
    with pytest.raises(FileNotFoundError, match='not finished'): last_stage(stage)
    with pytest.raises(FileNotFoundError, match='no finished stage yet'): last_stage(tmp_path / 'seed0')


def test_missing_and_wrong_folders_say_what_is_expected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='no weights come with the package, train some, e.g. with `scaleprotoseg train demo'): load('runs/nothing')
    empty_stage(tmp_path / 'method/seed0/joint')
    with pytest.raises(FileNotFoundError, match='seed0'): load(tmp_path / 'method')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='neither a stage'): load('empty')


def test_relative_runs_are_found_from_a_folder_below(tmp_path, monkeypatch):
    (tmp_path / 'runs/a').mkdir(parents=True)
    (tmp_path / 'nbs/tutorials').mkdir(parents=True)
    monkeypatch.chdir(tmp_path / 'nbs/tutorials')
    assert resolve_run('runs/a').samefile(tmp_path / 'runs/a')
    (tmp_path / 'nbs/runs/a').mkdir(parents=True)
    assert resolve_run('runs/a').samefile(tmp_path / 'nbs/runs/a')                  # the nearest one


@pytest.mark.parametrize('name, text', [('config.json', '{'), ('config.json', '{"labels": 3}'), ('prototypes.json', '['),
                                        ('head.safetensors', 'x'), ('backbone.safetensors', 'x')])
def test_damaged_files_are_named(stages, tmp_path, name, text):
    for file in stages['unet'].iterdir(): shutil.copy(file, tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name): load(tmp_path)


# -- any picture ------------------------------------------------------------------------------------------------------

def test_all_kinds_of_picture_give_the_same_labels(grouped, array, tmp_path):
    Image.fromarray(array).save(tmp_path / 'a.png')
    label = grouped.predict(array)
    assert label.shape == array.shape[:2] and label.dtype == np.int64 and isinstance(label, np.ndarray)
    same = [tmp_path / 'a.png', str(tmp_path / 'a.png'), Image.fromarray(array), array / 255,
            (array / 255).astype(np.float32), np.asfortranarray(array),
            torch.from_numpy(array).permute(2, 0, 1), DATA[0].image, DATA[0].image.double(),
            array[:, ::-1][:, ::-1]]
    for picture in same: assert np.array_equal(grouped.predict(picture), label)


def test_transparency_is_dropped_and_an_array_stays_as_it_is(array):
    array = array.copy()
    array.flags.writeable = False
    clear = np.concatenate([array, np.full((*array.shape[:2], 1), 7, np.uint8)], -1)
    assert torch.equal(to_image(clear), to_image(array)) and torch.equal(to_image(array), to_image(Image.fromarray(array)))


def test_grey_is_repeated(array):
    grey = array[..., 0]
    want = to_image(np.stack([grey] * 3, -1))
    for picture in grey, grey[..., None], Image.fromarray(grey), grey / 255: assert torch.allclose(to_image(picture), want, atol=1e-7)


@pytest.mark.parametrize('size', [(16, 16), (17, 131), (64, 96), (97, 33), (150, 200)])
def test_labels_have_the_size_of_the_picture(predictors, size):
    for name in 'groups', 'pixel':
        label = predictors[name].predict(np.random.default_rng(0).random((*size, 3)))
        assert label.shape == size and 0 <= label.min() and label.max() < 10


@pytest.mark.parametrize('picture, match', [
    (np.zeros((8, 40, 3), np.uint8), '16 x 16'), (np.zeros((0, 0, 3), np.uint8), '16 x 16'),
    (np.full((32, 32, 3), 255.), 'divide'), (np.full((32, 32), -0.1), 'divide'), (np.full((32, 32), np.nan), 'divide'),
    (np.zeros((32, 32, 2), np.uint8), r'\(H, W, 3\)'), (np.zeros((1, 32, 32, 3)), r'\(H, W, 3\)'),
    (np.zeros((32, 32), int), 'uint8'), (torch.zeros(1, 3, 32, 32), r'\(3, H, W\)'),
    (torch.zeros(32, 32, 3), r'\(3, H, W\)')])
def test_wrong_pictures_are_refused(grouped, picture, match):
    with pytest.raises(ValueError, match=match): grouped.predict(picture)


def test_wrong_files_and_types_are_refused(grouped, tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing.png'): grouped.predict(tmp_path / 'nothing.png')
    (tmp_path / 'text.png').write_text('no picture')
    with pytest.raises(ValueError, match='text.png'): grouped.predict(str(tmp_path / 'text.png'))
    with pytest.raises(TypeError, match='list'): grouped.predict([[0]])


@pytest.mark.parametrize('head', ['groups', 'linear', 'pixel'])
def test_chunks_change_nothing_but_rounding(predictors, array, monkeypatch, head):
    whole = predictors[head].predict(array)
    monkeypatch.setattr(Model, '_chunk', lambda self, features: 7)
    assert (predictors[head].predict(array) == whole).mean() > 0.99       # ties may fall the other way


def test_import_is_light():
    code = ("import sys, scaleprotoseg.predict; print([m for m in ('lightning_fabric', 'matplotlib', 'pandas', "
            "'scaleprotoseg.training') if m in sys.modules])")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


# -- where to look ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('grid, size', [((8, 12), (64, 96)), ((9, 13), (64, 96)), ((5, 5), (33, 41)), ((9, 9), (9, 9))])
def test_cell_weights_are_the_mean_of_the_enlarged_map(grid, size):
    g = torch.Generator().manual_seed(0)
    maps = torch.rand(1, 1, *grid, generator=g)
    large = F.interpolate(maps, size, mode='bilinear', align_corners=False)[0, 0]
    for region in torch.rand(size, generator=g) > 0.7, as_region((3, size[1] - 1), size), np.ones(size, bool):
        region = torch.as_tensor(region)
        weights = cell_weights(region.numpy(), grid)
        assert weights.min() >= 0 and torch.isclose(weights.sum(), torch.ones(()))
        assert torch.isclose((weights * maps[0, 0]).sum(), large[region].mean(), rtol=1e-4)


@pytest.mark.parametrize('at', [(64, 0), (0, 96), (-1, 3), (1.5, 2.), (1, 2, 3), 'here', np.zeros((64, 96), bool),
                                np.ones((9, 9), bool), np.ones((64, 96), int)])
def test_places_outside_the_picture_are_refused(grouped, array, at):
    with pytest.raises(ValueError, match=r'expected \(row, column\) inside|the mask (is empty|has shape)'): grouped.explain(array, at=at)


# -- explanations -----------------------------------------------------------------------------------------------------

def enlarged_logits(predictor, array):
    with torch.no_grad(): out = predictor.model(to_image(array)[None])
    return F.interpolate(out.logits, array.shape[:2], mode='bilinear', align_corners=False)[0].double()


@pytest.mark.parametrize('head', ['groups', 'linear'])
@pytest.mark.parametrize('place', ['point', 'region', 'tensor'])
def test_contributions_sum_to_the_logit_that_was_compared(predictors, array, head, place):
    predictor = predictors[head]
    mask = np.zeros(array.shape[:2], bool)
    if place == 'point': mask[(at := (41, 17))] = True
    else: mask[10:40, 20:77] = True; at = mask if place == 'region' else torch.from_numpy(mask)
    why, logits = predictor.explain(array, at=at), enlarged_logits(predictor, array)
    mean = logits[:, torch.from_numpy(mask)].mean(1)
    assert sum(e.contribution for e in why.evidence) == pytest.approx(why.logit, rel=1e-4, abs=1e-4)
    assert why.logit == pytest.approx(mean.max().item(), rel=1e-4, abs=1e-4) and why.cls == mean.argmax()
    want = {name: mean[c].item() for c, name in enumerate(predictor.labels.names)}
    assert why.scores == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert all(e.contribution == pytest.approx(e.activation * e.weight) for e in why.evidence)


def test_point_is_explained_with_the_class_that_predict_gives(grouped, array):
    label = grouped.predict(array)
    for at in [(0, 0), (63, 95), (30, 50), (12, 77)]: assert grouped.explain(array, at=at).cls == label[at]


@pytest.mark.parametrize('head', ['groups', 'linear'])
def test_without_a_place_every_predicted_class_is_explained(predictors, array, head):
    predictor = predictors[head]
    label, whys = predictor.predict(array), predictor.explain(array)
    assert set(whys) == {predictor.labels.names[c] for c in np.unique(label)}
    for name, why in whys.items():
        assert np.array_equal(why.region, label == why.cls) and why.name == name == next(iter(why.scores))
        assert sum(e.contribution for e in why.evidence) == pytest.approx(why.logit, rel=1e-4, abs=1e-4)


def test_group_activation_at_a_cell_is_the_product_of_its_parts(predictors, array):
    for e in predictors['unet'].explain(array, at=(20, 30)).evidence:                      # stride 1: a pixel is a cell
        assert e.activation == pytest.approx(np.exp(sum(p.weight * p.similarity for p in e.parts)), rel=1e-4)
        assert [p.weight for p in e.parts] == sorted((p.weight for p in e.parts), reverse=True)


def test_parts_know_their_training_patch(grouped, array):
    for e in grouped.explain(array, at=(20, 30)).evidence:
        for p in e.parts:
            assert (p.source.scale, p.source.cls, p.source.k) == (p.scale, e.cls, p.k) and p.source.image in DATA.ids
            assert np.array_equal(p.patch, grouped.atlas.tiles[p.source.tile]) and p.weight >= 0.1


def test_dead_prototypes_take_no_part(predictors, array):
    for head in 'groups', 'linear':
        predictor = copy.deepcopy(predictors[head])
        c = predictor.explain(array, at=(30, 40)).cls
        predictor.model.prototypes.alive[:, c, 0] = False
        predictor.model.prototypes.alive[:, (c + 1) % 10] = False
        why = predictor.explain(array, at=(30, 40), cls=c)
        assert not any(p.k == 0 for e in why.evidence if e.cls == c for p in e.parts)
        assert not any(e.cls == (c + 1) % 10 for e in why.evidence)
        assert sum(e.contribution for e in why.evidence) == pytest.approx(why.logit, rel=1e-4, abs=1e-4)


def test_any_class_can_be_asked_about(grouped, array):
    why = grouped.explain(array, at=(30, 40), cls='bus')
    assert why.name == 'bus' and why.logit == why.scores['bus']
    assert grouped.explain(array, at=(30, 40), cls=6).name == 'bus'
    present = next(iter(grouped.explain(array)))
    assert set(grouped.explain(array, cls=present)) == {present}
    for cls in 'bus stop', 10, -1:
        with pytest.raises(ValueError, match='unknown class'): grouped.explain(array, cls=cls)


def test_explanations_are_json_and_pictures(predictors, array):
    for head in 'groups', 'linear':
        predictor = predictors[head]
        for why in predictor.explain(array, at=(30, 40)), *predictor.explain(array).values():
            d = json.loads(json.dumps(why.to_dict()))
            assert d['class'] == why.name and d['pixels'] == why.region.sum()
            assert len(d['evidence']) == len(why.evidence)
        fig = why.plot()
        assert any(why.name in ax.get_title() for ax in fig.axes)
        matplotlib.pyplot.close('all')


def test_black_boxes_and_early_stages_cannot_explain(stages, predictors, array, tmp_path):
    with pytest.raises(ValueError, match='black box'): predictors['pixel'].explain(array)
    for file in stages['unet'].iterdir(): shutil.copy(file, tmp_path)
    (tmp_path / 'prototypes.json').unlink()
    predictor = load(tmp_path)
    assert predictor.predict(array).shape == array.shape[:2]
    with pytest.raises(FileNotFoundError, match='`project` stage'): predictor.explain(array)


@pytest.mark.parametrize('asked, window', [(None, (16, 16)), ((0, 0), None), ((24, 32), (24, 32))])
def test_a_window_is_the_recipes_unless_it_is_asked_for(stages, tmp_path, asked, window):
    from scaleprotoseg.cli import _trained
    stage = shutil.copytree(stages['groups'], tmp_path / 'threshold')
    config = json.loads((stage / 'config.json').read_text())
    (stage / 'config.json').write_text(json.dumps(config | {'evaluation': {'window': [16, 16]}}))
    how = _trained(stage, 'val', '', None, 'cpu', asked, False)[1]
    assert how.window and tuple(how.window) == window if window else how.window is None
