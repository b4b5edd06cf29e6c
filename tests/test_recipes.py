"""Every value of a recipe is the one transcribed from the papers and their published configurations."""
import csv
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from scaleprotoseg.data import DATASETS
from scaleprotoseg.recipes import RECIPES, Stage, Train, changed, chosen, find_recipe
from scaleprotoseg.training import KINDS, OPTIMIZERS

ROWS = list(csv.DictReader(open(Path(__file__).resolve().parents[1] / 'data/published/recipes.csv', newline='')))
NATIVE = {'cityscapes': (1024, 2048), 'em': (512, 512)}      # published as a size, but that of the images themselves


def recipe_of(row):
    experiment, method, variant = row['dataset'], row['method'], row['variant']
    if variant == 'supplement': return find_recipe(f'{experiment}-supplement', method)
    if variant.startswith('tau_row'): variant = 'tau'
    return find_recipe(experiment + ('-ablations' if variant else ''), method, variant)


def test_the_transcription_covers_every_dataset_and_method():
    assert {(r['dataset'], r['method']) for r in ROWS} == {(d, m) for d in ('pascal', 'cityscapes', 'ade20k', 'cocostuff')
                                                         for m in ('deeplabv2', 'protoseg', 'scaleprotoseg')} | {
        ('em', m) for m in ('unet', 'protoseg', 'scaleprotoseg')} | {('cityscapes-hrnet', m) for m in ('hrnet', 'prototype_view')} | {
        (f'{d}-segformer', m) for d in ('cityscapes', 'ade20k') for m in ('segformer', 'prototype_view')}
    assert sum(bool(r['value']) for r in ROWS) == 789 and all(r['source'] for r in ROWS)      # README says how many


@pytest.mark.parametrize('dataset', sorted({r['dataset'] for r in ROWS}))
def test_every_published_value_is_in_the_recipe(dataset):
    wrong = []
    for row in (r for r in ROWS if r['dataset'] == dataset and r['value']):
        recipe, key = recipe_of(row), (row['stage'], row['quantity'])
        if key[1] == 'classes': continue                                     # a property of the dataset, tested below
        if key[0] == 'test' and dataset in NATIVE:
            assert recipe.data.evaluation == type(recipe.data.evaluation)()    # as it is
            assert int(row['value']) == NATIVE[dataset][key[1] == 'test_width']
            continue
        if key[1] == 'steps' and row['value'] == '0':                        # a stage of no steps does not exist
            assert key[0] not in [s.name for s in recipe.stages]
            continue
        ours = recipe.values().get(key)
        try: same = float(row['value']) == pytest.approx(ours, rel=1e-12)
        except (ValueError, TypeError): same = row['value'] == ours
        if not same: wrong.append((recipe.name, *key, row['value'], ours))
    assert not wrong


@pytest.mark.parametrize('dataset', sorted({r['dataset'] for r in ROWS if r['quantity'] == 'classes'}))
def test_numbers_of_classes(dataset):
    published = {int(r['value']) for r in ROWS if r['dataset'] == dataset and r['quantity'] == 'classes'}
    assert published == {len(DATASETS[dataset].labels)}


def test_numbers_of_prototypes_before_projection():
    per = lambda name, method: (r := find_recipe(name, method)).model['per_class'] * r.model['scales'] * len(DATASETS[r.data.dataset].labels)
    assert [per(n, 'protoseg') for n in ('cityscapes', 'pascal', 'ade20k', 'cocostuff', 'em')] == [190, 210, 1800, 2184, 20]
    assert [per(n, 'scaleprotoseg') for n in ('cityscapes', 'pascal', 'ade20k', 'cocostuff', 'em')] == [228, 252, 1800, 2184, 24]


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_is_sound(name):
    r = RECIPES[name]
    names = [s.name for s in r.stages]
    assert len(set(names)) == len(names) and r.seeds
    for i, s in enumerate(r.stages):
        assert s.kind in KINDS and (s.parent is None) == (i == 0) and (s.parent is None or s.parent in names[:i])
        assert (s.train is not None) == (s.kind == 'train') and (s.tau is not None) == (s.kind == 'threshold')
        assert ((s.k, s.keep) != (None, None)) == (s.kind == 'prune') and (not s.legacy or s.kind == 'project')
        assert not set(s.legacy) - {'touched', 'absent'}
        if s.train: assert s.train.optimizer in OPTIMIZERS and s.train.lr
    groups = {'scaleprotoseg': 'threshold'} if not any(s.rescale for s in r.stages) else {}
    assert r.last.kind == {**groups, 'prototype_view': 'project'}.get(r.method, 'train')


def test_a_new_option_at_its_default_does_not_change_a_digest():
    stage = Stage('joint', 'train', train=Train(10, {'last': .1}, batch=4))
    assert chosen(stage) == {'name': 'joint', 'kind': 'train', 'train': {'steps': 10, 'lr': {'last': .1}, 'batch': 4}}
    r = find_recipe('smoke', 'protoseg')
    assert replace(r, seeds=(5,)).digest('joint') == r.digest('joint')
    louder = replace(r, stages=tuple(replace(s, train=s.train and replace(s.train, legacy_labels=True)) for s in r.stages))
    assert louder.digest('joint') != r.digest('joint')


CHANGED = {   # by ablation; the others change stages alone
    **dict.fromkeys(('k1', 'k4', 'k5', 'k20', 'k50', 'd128', 'd256', 'one_scale', 'one_scale_wide', 'one_rate', 'coco'), {'model'}),
    **dict.fromkeys(('push_train_aug', 'no_zoom', 'warped', 'every_third', 'zoomed', 'unwarped'), {'data'}),
    **dict.fromkeys(('sgd_coco', 'plain', 'wide3x', 'wide10x'), {'model', 'stages'}), **dict.fromkeys(('no_zoom3x', 'no_zoom10x'), {'data', 'stages'})}


def test_ablations_change_what_they_say_and_nothing_else():
    for r in (r for r in RECIPES.values() if r.experiment.endswith('-ablations')):
        main = find_recipe(r.experiment.removesuffix('-ablations'), r.method)
        a, b = asdict(replace(r, experiment='x', variant='')), asdict(replace(main, experiment='x', variant=''))
        assert a != b, r.name
        expected = CHANGED.get(r.variant, {'stages'})
        assert {k for k in a if a[k] != b[k]} == expected, r.name


def test_balance_after_projection_leaves_what_comes_before_alone():
    main, r = find_recipe('camvid-quick', 'scaleprotoseg'), find_recipe('camvid-quick-ablations', 'scaleprotoseg', 'balanced_last')
    assert {s.name: s.train.balance for s in r.stages if s.train} == dict(warmup=0., joint=0., finetune=.5, group_warmup=.5, group_joint=.5)
    assert r.digest('project') == main.digest('project') and r.digest('finetune') != main.digest('finetune')
    assert 'CE balanced by 0.5' in r.table() and r.values()['finetune', 'balance'] == .5
    with pytest.raises(ValueError, match='balance=2'): Train(1, {}, balance=2.)
    with pytest.raises(ValueError, match='views=2 keeps similarities alone, but diversity=0.5'): Train(1, {}, views=2, diversity=.5)
    with pytest.raises(ValueError, match='batch=0'): Train(1, {}, batch=0)


def test_a_misspelled_part_of_a_model_is_not_passed_over():
    with pytest.raises(KeyError, match="unknown part of the model of smoke/linear 'chanels'; did you mean 'channels'"):
        changed(find_recipe('smoke', 'linear'), '', {'chanels': 3})
