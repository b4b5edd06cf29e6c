"""Every legacy switch and the push split, from the recipe through the stages to the files, and the difference that each makes.

Its arithmetic is tested in test_legacy.py. All variants share one output folder, so stages that a switch does not concern are not
trained twice.
"""
import csv
import json
import shutil
from dataclasses import replace

import pytest
import torch
from test_datasets import make_pascal, save, write

from scaleprotoseg import recipes, training
from scaleprotoseg.data import open_dataset
from scaleprotoseg.losses import class_weights, cross_entropy, diversity
from scaleprotoseg.model import build_model, load_model, read_tensors
from scaleprotoseg.projection import touched
from scaleprotoseg.recipes import find_recipe
from scaleprotoseg.runs import read_metrics
from scaleprotoseg.training import FrozenViews, Job, StepBatches, passes, run_method, run_stage, start_model
from scaleprotoseg.transforms import reduce_labels


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    "Runs with the trunk that every smoke recipe starts from."
    out = tmp_path_factory.mktemp('runs')
    run_stage('smoke', 'pretrain', 'joint', out=out, device='cpu')
    return out


GRID = (9, 13)   # cells of a smoke image


def until(recipe, last):
    "A recipe without the stages after `last`; a side branch before it stays."
    return replace(recipe, stages=recipe.stages[:[s.name for s in recipe.stages].index(last) + 1])


def on_push(recipe, **options):
    "A recipe whose push split has other options."
    return replace(recipe, data=replace(recipe.data, splits={**recipe.data.splits, 'push': {**recipe.data.splits['push'], **options}}))


def in_stage(recipe, name, **options):
    "A recipe with other values in one stage; those of `Train` go to its training."
    def new(s):
        if s.name != name: return s
        return replace(s, **options) if 'legacy' in options else replace(s, train=replace(s.train, **options))
    return replace(recipe, stages=tuple(map(new, recipe.stages)))


@pytest.fixture
def run(out, monkeypatch):
    "`run(variant, recipe)` registers and runs a variant of a smoke recipe; returns the folders of its stages by name."
    def run(variant, recipe):
        recipe = replace(recipe, variant=variant)
        monkeypatch.setitem(recipes.RECIPES, recipe.name, recipe)
        return {f.name: f for f in run_method('smoke', recipe.method, variant, out=out, device='cpu')}
    run.out = out
    return run


def log(folder): return [{k: float(v) for k, v in row.items()} for row in csv.DictReader((folder / 'log.csv').open())]
def sources(folder): return json.loads((folder / 'prototypes.json').read_text())
def key(source): return source['scale'], source['cls'], source['k']


def push_data(recipe): return Job(recipe, recipe.last, 0, None, None, None, lambda: '').data('push')


# -- balance -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('stage', ['joint', 'finetune'])            # on images, and on similarity maps kept of them
def test_balance_weighs_classes_in_the_cross_entropy_of_the_first_step(run, stage):
    recipe = until(find_recipe('smoke', 'protoseg'), stage)
    plain, balanced = (log(run(f'{name}_{stage}', r)[stage]) for name, r in
                       dict(counted=recipe, balanced=in_stage(recipe, stage, balance=1.)).items())
    assert {k for k in plain[0] if plain[0][k] != balanced[0][k]} == {'ce'}
    assert plain[-1]['ce'] != balanced[-1]['ce']
    job = Job(recipe, recipe.stage(stage), 0, None, None, None, lambda: '')
    data = job.data('train')
    pixels = sum(torch.bincount(data[i].label[data[i].label >= 0], minlength=len(data.labels)) for i in range(len(data)))
    weights = class_weights(pixels, 1.)
    assert weights[pixels > 0].max() / weights[pixels > 0].min() == pytest.approx(float(pixels.max() / pixels[pixels > 0].min()))
    if stage == 'finetune': return
    model, _ = start_model(replace(job, out=run.out, recipe=replace(recipe, variant=f'counted_{stage}')), data.labels)
    x, y = StepBatches(data, recipe.data, model.backbone.mean.flatten().tolist(), 0, stage)[passes(0, recipe.stage(stage).train)[0]]
    logits = model.train_only_(recipe.stage(stage).train.lr)(x).logits
    assert balanced[0]['ce'] == pytest.approx(cross_entropy(logits, reduce_labels(y, logits.shape[-2:]), weights=weights).item(), rel=1e-5)


# -- updates -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('stage', ['warmup', 'joint'])
def test_an_update_in_two_parts_is_that_of_one_batch(run, monkeypatch, stage):
    folders = {}
    for name, batch, accumulate in (('one', 2, 1), ('two', 1, 2)):
        recipe = until(find_recipe('smoke', 'protoseg'), stage)
        for s in recipe.stages: recipe = in_stage(recipe, s.name, batch=batch, accumulate=accumulate)
        recipe = replace(recipe, variant=f'{name}_{stage}')
        monkeypatch.setitem(recipes.RECIPES, recipe.name, recipe)
        folders[name] = run_method('smoke', 'protoseg', recipe.variant, out=run.out, device='cpu', precision='64-true')[-1]
    one, two = (log(f) for f in folders.values())
    for a, b in zip(one, two, strict=True): assert a == pytest.approx(b, rel=1e-6, abs=1e-9)      # losses; as written, with single precision
    a, b = (read_tensors(f / 'head.safetensors') for f in folders.values())
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=0, atol=1e-6)
    assert len(one) == recipe.last.train.steps and {'ce', 'diversity'} <= one[0].keys()


def test_a_loss_that_is_not_finite_ends_the_stage(out, tmp_path, monkeypatch):
    calls, stage_losses = [], training.stage_losses
    def diverged(*args, **options):
        calls.append(1)
        return {k: v * (float('nan') if len(calls) == 2 else 1.) for k, v in stage_losses(*args, **options).items()}
    monkeypatch.setattr(training, 'stage_losses', diverged)
    shutil.copytree(out / 'smoke/pretrain', tmp_path / 'smoke/pretrain')
    with pytest.raises(ValueError, match=r"warmup: \['ce'.* not finite at step 1"): run_stage('smoke', 'protoseg', 'warmup', out=tmp_path, device='cpu')
    assert not (tmp_path / 'smoke/protoseg/seed0/warmup/metrics.json').exists()


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own():
    data = find_recipe('smoke', 'protoseg').data
    images = open_dataset('partscapes', 'train', n=5, size=(64, 96))
    batches, other = (StepBatches(images, data, [0.] * 3, seed, 'joint') for seed in (0, 1))
    orders = [[b.index(p) for p in range(e * 5, (e + 1) * 5)] for b in (batches, other) for e in range(3)]
    assert all(sorted(o) == list(range(5)) for o in orders) and len(set(map(tuple, orders))) > 3
    assert orders[:3] == [[StepBatches(images, data, [0.] * 3, 0, 'joint').index(p) for p in range(e * 5, (e + 1) * 5)] for e in range(3)]


def test_kept_similarity_maps_are_those_of_the_views_of_every_epoch():
    data, n, views = find_recipe('smoke', 'protoseg').data, 3, 2
    batches = StepBatches(open_dataset('partscapes', 'train', n=n, size=(64, 96)), data, [0.] * 3, 0, 'finetune')
    torch.manual_seed(0)
    model = build_model(dict(backbone=dict(name='unet', width=4), activation='sigmoid', head='linear', classes=10, scales=1, channels=4, per_class=2)).eval()
    kept = FrozenViews(model, batches, views, torch.device('cpu'), progress=False)
    for p in range(2 * n * views):
        image, label = batches.view(batches.index(p), 'view', p // n % views, batches.index(p))
        with torch.no_grad(): expected = model(image[None], ('similarities',)).similarities
        maps, labels = kept[range(p, p + 1)]
        assert torch.equal(maps, expected) and torch.equal(labels, reduce_labels(label[None], expected.shape[-2:]))
    assert not torch.equal(kept[range(0, n)][0].sort(0).values, kept[range(n, 2 * n)][0].sort(0).values)     # the second epoch shows other views


def test_every_image_of_a_view_has_a_window_of_its_own():
    sample = open_dataset('partscapes', 'train', n=1, size=(64, 96))[0]
    batches = StepBatches([sample] * 6, find_recipe('smoke', 'protoseg').data, [0.] * 3, 0, 'finetune')
    torch.manual_seed(0)
    model = build_model(dict(backbone=dict(name='unet', width=4), activation='sigmoid', head='linear', classes=10, scales=1, channels=4, per_class=2)).eval()
    kept = FrozenViews(model, batches, 2, torch.device('cpu'), progress=False)
    assert len({label.numpy().tobytes() for _, label in kept.maps}) == 12


# -- legacy_labels -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('stage', ['warmup', 'joint'])
def test_legacy_labels_change_the_diversity_of_the_first_step_and_nothing_else(run, stage):
    plain = until(find_recipe('smoke', 'protoseg'), stage)
    correct, published = (log(run(f'{name}_{stage}', r)[stage]) for name, r in
                          dict(plain=plain, shifted=in_stage(plain, stage, legacy_labels=True)).items())
    assert {k for k in correct[0] if correct[0][k] != published[0][k]} == {'diversity'}
    assert abs(correct[0]['diversity'] - published[0]['diversity']) > 1e-5
    assert correct[-1]['ce'] != published[-1]['ce']               # other gradients, other weights from then on


def test_logged_diversity_is_that_of_the_shifted_labels(run, out):
    """The first step of the warm-up, computed by hand: class c stands where c - 1 is, the first where void is, the last nowhere."""
    recipe = replace(in_stage(until(find_recipe('smoke', 'protoseg'), 'warmup'), 'warmup', legacy_labels=True), variant='shifted')
    logged = log(run('shifted', recipe)['warmup'])[0]['diversity']
    job = Job(recipe, recipe.last, 0, out, None, None, lambda: '')
    model, _ = start_model(job, job.data('val').labels)
    model.train_only_(recipe.last.train.lr)
    batches = StepBatches(job.data('train'), recipe.data, model.backbone.mean.flatten().tolist(), 0, 'warmup')
    image, label = batches[range(recipe.last.train.batch)]
    with torch.no_grad(): (result,) = model.outputs(image, ('distances',))
    label = reduce_labels(label, result.logits.shape[-2:])
    shifted = label + 1
    shifted[label == 9] = -1                                       # the last of ten classes
    expected, correct = (recipe.last.train.diversity * diversity(result.distances, x, model.prototypes.alive) for x in (shifted, label))
    assert logged == pytest.approx(expected.item(), rel=1e-6) != pytest.approx(correct.item(), rel=1e-6)


def test_legacy_labels_mean_nothing_without_a_diversity_loss(run):
    plain = until(find_recipe('smoke', 'protoseg'), 'finetune')
    assert plain.last.train.diversity == 0
    correct, published = run('plain', plain), run('finetune_shifted', in_stage(plain, 'finetune', legacy_labels=True))
    assert log(correct['finetune']) == log(published['finetune'])


# -- the projection's switches -----------------------------------------------------------------------------------------

def nearest_label(source, dataset):
    "Label of the cell that a prototype comes from, as the losses see it."
    label = dataset[dataset.ids.index(source['image'])].label
    y, x = source['cell']
    return int(reduce_labels(label[None], tuple(source['grid']))[0, y, x])


def classes_below(source, dataset):
    "Classes that have a pixel under the cell that a prototype comes from."
    label, (y, x) = dataset[dataset.ids.index(source['image'])].label, source['cell']
    return touched(label[None], len(dataset.labels), tuple(source['grid']))[0, :, y, x].nonzero()[:, 0].tolist()


def test_touched_takes_prototypes_from_cells_of_other_classes(run):
    plain = until(find_recipe('smoke', 'protoseg'), 'project')
    data = push_data(plain)
    strict, generous = (sources(run(name, in_stage(plain, 'project', legacy=legacy))['project'])
                        for name, legacy in dict(plain=(), touched=('touched',)).items())
    assert {tuple(s['grid']) for s in strict} == {GRID}
    assert all(nearest_label(s, data) == s['cls'] for s in strict)
    assert any(nearest_label(s, data) != s['cls'] for s in generous)
    assert all(s['cls'] in classes_below(s, data) for s in generous)                 # but it does touch the cell
    before, after = ({key(s): s['distance'] for s in x} for x in (strict, generous))
    assert before.keys() <= after.keys() and all(after[k] <= before[k] for k in before)   # more cells: never farther


def few(method, last):
    "A recipe that projects on one image: some classes do not occur, one only touches cells."
    return on_push(until(find_recipe('smoke', method), last), n=1, seed=3)


def missing(recipe):
    "Classes without a cell in the one push image, and without a pixel."
    label, every = push_data(recipe)[0].label[None], set(range(10))                  # PartScapes has ten classes
    return tuple(sorted(every - set(x.unique().tolist())) for x in (reduce_labels(label, GRID), label))


def test_touched_projects_a_class_that_has_no_cell(run):
    plain = few('protoseg', 'project')
    no_cell, no_pixel = missing(plain)
    assert 0 < len(no_pixel) < len(no_cell), 'the image needs a class of a few pixels'
    strict, generous = (run(name, in_stage(plain, 'project', legacy=legacy))['project']
                        for name, legacy in dict(one=(), one_touched=('touched',)).items())
    for folder, absent in ((strict, no_cell), (generous, no_pixel)):
        alive = load_model(folder).prototypes.alive
        assert [c for c in range(10) if not alive[:, c].any()] == absent
        assert read_metrics(folder)['projection']['absent'] == len(absent) * alive.shape[2]


def test_prototypes_of_absent_classes_die(run):
    plain = few('scaleprotoseg', 'project')
    absent, _ = missing(plain)
    folder = run('one', plain)['project']
    alive = load_model(folder).prototypes.alive
    assert absent and not alive[:, absent].any() and alive.flatten(2).any(-1).sum() == alive.shape[0] * (10 - len(absent))
    assert not {s['cls'] for s in sources(folder)} & set(absent)


def one_survives(found, alive, scale, ours):
    """Class and number of the one that lives of all prototypes of a scale that come from the first cell; `ours` are among them.

    A class that the first cell does have may come from there too; its vector is then the same, and the earlier class keeps it."""
    here = sorted(key(s) for s in found if s['scale'] == scale and tuple(s['cell']) == (0, 0))
    assert {k for k in ours if k[0] == scale} <= set(here)
    assert [k for k in here if alive[k]] == here[:1]
    return here[0][1:]


def test_with_the_switch_one_per_scale_survives(run):
    plain = few('scaleprotoseg', 'project')
    absent, _ = missing(plain)
    strict, folder = (run(name, in_stage(plain, 'project', legacy=legacy))['project']
                      for name, legacy in dict(one=(), one_absent=('absent',)).items())
    alive, found = load_model(folder).prototypes.alive, sources(folder)
    ours = {key(s) for s in found if s['cls'] in absent}
    assert len(ours) == alive[:, absent].numel() and {s['image'] for s in found} == {push_data(plain).ids[0]}
    survivors = [one_survives(found, alive, scale, ours) for scale in range(4)]
    assert (absent[0], 0) in survivors                            # in the name of the first absent class, see `one_survives`
    others = [c for c in range(10) if c not in absent]
    assert torch.equal(alive[:, others], load_model(strict).prototypes.alive[:, others])  # the rest is as without the switch
    assert read_metrics(folder)['projection']['absent'] == len(ours)


def test_both_switches_work_together(run):
    plain = few('scaleprotoseg', 'project')
    _, absent = missing(plain)
    folder = run('one_both', in_stage(plain, 'project', legacy=('touched', 'absent')))['project']
    alive, found, data = load_model(folder).prototypes.alive, sources(folder), push_data(plain)
    ours = {key(s) for s in found if s['cls'] in absent}
    assert len(ours) == alive[:, absent].numel()
    for scale in range(4): one_survives(found, alive, scale, ours)
    others = [s for s in found if s['cls'] not in absent]
    assert all(s['cls'] in classes_below(s, data) for s in others) and any(nearest_label(s, data) != s['cls'] for s in others)


def test_published_variants_ask_for_these_switches():
    for name, switches in dict(cityscapes=('touched', 'absent'), pascal=('touched', 'absent'), ade20k=('absent',), cocostuff=('absent',)).items():
        plain, published = find_recipe(name, 'protoseg'), find_recipe(f'{name}-ablations', 'protoseg', 'legacy')
        for a, b in zip(plain.stages, published.stages, strict=True):
            assert (a.legacy, b.legacy) == ((), switches if a.kind == 'project' else ())
            if a.train: assert not a.train.legacy_labels and b.train == replace(a.train, legacy_labels=True)


# -- the push split ----------------------------------------------------------------------------------------------------

def images_of(folder): return {s['image'] for s in sources(folder)}


def seen_by_pruning(folder):
    return {p['image'] for s in json.loads((folder / 'prune.json').read_text())['prototypes'] for p in s['patches']}


def test_prototypes_come_from_the_push_split_and_training_does_not_use_it(run):
    plain = until(find_recipe('smoke', 'protoseg'), 'prune')
    other = on_push(plain, split='val', n=8)
    first, second = run('plain', plain), run('push_val', other)
    for folders, recipe in ((first, plain), (second, other)):
        ids = set(push_data(recipe).ids)
        assert ids == {f'{recipe.data.splits["push"]["split"]}-{i:05d}' for i in range(8)}
        assert images_of(folders['project']) <= ids and len(images_of(folders['project'])) > 1
        assert seen_by_pruning(folders['prune']) <= ids and len(seen_by_pruning(folders['prune'])) >= plain.last.k
    for stage in ('warmup', 'joint'): assert log(first[stage]) == log(second[stage])


def test_a_larger_push_split_is_searched_as_a_whole(run):
    plain = until(find_recipe('smoke', 'protoseg'), 'project')
    small, large = (sources(run(f'push_{n}', on_push(plain, n=n))['project']) for n in (2, 8))
    before, after = ({key(s): s['distance'] for s in x} for x in (small, large))
    first_two = {'train-00000', 'train-00001'}
    assert {s['image'] for s in small} <= first_two and {s['image'] for s in large} - first_two
    assert all(after[k] <= before[k] for k in before) and any(after[k] < before[k] for k in before)


def test_pascal_pushes_on_train_and_the_variant_on_train_aug(tmp_path):
    make_pascal(tmp_path)
    home = tmp_path / 'VOCdevkit/VOC2012'
    save(home / 'JPEGImages/2010_000004.jpg', torch.zeros(6, 8, 3, dtype=torch.uint8).numpy())      # a second image of train
    save(home / 'SegmentationClassAug/2010_000004.png', torch.ones(6, 8, dtype=torch.uint8).numpy())
    write(home / 'ImageSets/Segmentation/train.txt', '2007_000001\n2010_000004\n')
    ids = {}
    for experiment, variant in (('pascal', ''), ('pascal-ablations', 'push_train_aug')):
        recipe = find_recipe(experiment, 'scaleprotoseg', variant)
        job = Job(recipe, recipe.stage('project'), 0, tmp_path, tmp_path, None, lambda: '')
        ids[variant] = {role: job.data(role).ids for role in ('train', 'push', 'val')}
    aug, train = ['2007_000001', '2008_000002', '2010_000004'], ['2007_000001', '2010_000004']
    assert ids[''] == {'train': aug, 'push': train, 'val': ['2009_000003']}
    assert ids['push_train_aug'] == {'train': aug, 'push': aug, 'val': ['2009_000003']}
