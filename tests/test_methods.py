"""The published recipes at their real model sizes on miniatures of the datasets, and what training does with several input scales."""
import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_datasets import MINIATURES

from scaleprotoseg import recipes, training
from scaleprotoseg.basics import read_json
from scaleprotoseg.data import rng
from scaleprotoseg.losses import lovasz
from scaleprotoseg.model import build_model, load_model, weights_digest
from scaleprotoseg.predict import load
from scaleprotoseg.recipes import Train, find_recipe
from scaleprotoseg.runs import is_finished, read_metrics
from scaleprotoseg.training import initial_backbone, make_optimizer, mean_losses, passes, run_method, run_stage, stage_losses, update_counts

OTHER = dict(pascal=0, cityscapes=7, ade20k=1, cocostuff=0, em=0)     # a second value of label files


def make_em(root):
    for i in range(30):
        for kind, pixels in dict(images=rng('slice', i).integers(0, 255, (64, 64), np.uint8),
                                 labels=255 * (np.arange(64) % 20 < 14).astype(np.uint8) * np.ones((64, 1), np.uint8)).items():
            (root / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / kind / f'{i:02}.png')


def miniature(name, root):
    """A dataset in its layout with images of 72 x 96 pixels and two classes; EM has slices of 64 x 64."""
    root.mkdir()
    if name == 'em': return make_em(root)
    MINIATURES[name](root)
    for path in (*root.rglob('*.png'), *root.rglob('*.jpg')):
        picture = Image.open(path).resize((96, 72), Image.Resampling.NEAREST)
        if picture.mode in 'LP':
            picture = np.array(picture)
            picture[:, :40] = OTHER[name]
            picture = Image.fromarray(picture)
        picture.save(path)


def shrunk(recipe):
    """One step per stage on small crops, random weights; the model is the real one."""
    def short(t): return t and replace(t, steps=1, rise=0, accumulate=1, batch=min(t.batch, 2), eval_every=0)
    backbone = {k: v for k, v in recipe.model['backbone'].items() if k != 'weights'}
    crop = (64, 64) if recipe.data.dataset == 'em' else (65, 65)
    evaluation = replace(recipe.data.evaluation, size=recipe.data.evaluation.size and (65, 65), shorter=recipe.data.evaluation.shorter and 65)
    return replace(recipe, experiment='mini', model={**recipe.model, 'backbone': backbone}, data=replace(recipe.data, crop=crop, evaluation=evaluation),
                   stages=tuple(replace(s, train=short(s.train), keep=s.keep and 1) for s in recipe.stages))


CASES = [pytest.param(d, m, marks=() if (d, m) == ('cityscapes', 'scaleprotoseg') else pytest.mark.slow)
         for d in ('pascal', 'cityscapes', 'ade20k', 'cocostuff', 'em')
         for m in (('unet' if d == 'em' else 'deeplabv2'), 'protoseg', 'scaleprotoseg', 'prototype_view')]


CASES += [pytest.param(e, 'prototype_view', marks=pytest.mark.slow) for e in ('cityscapes-hrnet', 'ade20k-segformer')]


@pytest.mark.parametrize('experiment, method', CASES)
def test_every_stage_of_a_published_recipe_runs_at_real_size(experiment, method, tmp_path, monkeypatch):
    recipe = shrunk(find_recipe(experiment, method))
    miniature(recipe.data.dataset, tmp_path / 'data')
    monkeypatch.setitem(recipes.RECIPES, recipe.name, recipe)
    folders = run_method('mini', method, out=tmp_path / 'runs', data_root=tmp_path / 'data', device='cpu')
    assert [f.name for f in folders] == [s.name for s in recipe.stages] and all(map(is_finished, folders))
    for f in folders: assert 0 <= read_metrics(f)['miou'] <= 1
    if projected := [f for f, s in zip(folders, recipe.stages) if s.kind == 'project']:
        facts = read_metrics(projected[0])['projection']
        classes = 2 * recipe.model['scales'] * recipe.model['per_class']            # two classes occur
        assert facts['projected'] == classes and facts['absent'] + classes == recipe_prototypes(folders[0])
    label = load(folders[-1]).predict(np.zeros((50, 70, 3), np.uint8))
    assert label.shape == (50, 70)
    print(f'{experiment} {method}: peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 ** 2:.1f} GB')


@pytest.mark.parametrize('name', recipes.RECIPES)
def test_the_first_weights_of_every_recipe_can_be_named(name, tmp_path):
    """A file below the data root, or what the backbone's own loader knows."""
    backbone = initial_backbone(SimpleNamespace(recipe=recipes.RECIPES[name], data_root=tmp_path))
    assert backbone.get('weights') in (None, 'imagenet', 'pretrained', 'bundled') or Path(backbone['weights']).is_relative_to(tmp_path)


def test_weights_that_are_there_are_not_downloaded(tmp_path):
    where = lambda experiment, method: initial_backbone(SimpleNamespace(recipe=find_recipe(experiment, method), data_root=tmp_path))['weights']
    assert where('ade20k-segformer', 'segformer') == 'pretrained'
    folder, file = tmp_path / 'weights/b0', tmp_path / 'weights/resnet101.pth'
    folder.mkdir(parents=True)
    file.touch()
    assert where('ade20k-segformer', 'segformer') == str(folder) and where('cityscapes', 'protoseg') == str(file)


def recipe_prototypes(folder): return load_model(folder).prototypes.alive.numel()


def small(**options):
    torch.manual_seed(0)
    return build_model(dict(backbone=dict(name='deeplabv2', arch='resnet18', **options), head='linear', activation='sigmoid', classes=3,
                            scales=4, channels=8, per_class=2))


def test_losses_are_averaged_over_input_scales():
    model, train = small(inputs=[.5, .75]), Train(1, {}, diversity=.25, l1=1e-4)
    model.train_only_(['trunk', 'aspp', 'prototypes'])
    image, label = torch.rand(2, 3, 65, 65), torch.randint(-1, 3, (2, 65, 65))
    outputs = model.outputs(image, ('distances',))
    assert [o.logits.shape[-1] for o in outputs] == [9, 5, 7, 9]                 # full, 0.5, 0.75, maximum
    means = mean_losses(outputs, label, model, train)
    each = [stage_losses(o, label, model, train) for o in outputs]
    for name in means: torch.testing.assert_close(means[name], torch.stack([e[name] for e in each]).mean())
    with torch.no_grad(): torch.testing.assert_close(model(image).logits, outputs[-1].logits)  # evaluation: the maximum alone


def test_without_input_scales_training_sees_the_same_output():
    model, image = small().eval(), torch.rand(1, 3, 65, 65)
    (only,) = model.outputs(image)
    assert torch.equal(only.logits, model(image).logits)


def test_deeplabs_own_optimiser_has_four_rates():
    r = find_recipe('pascal-ablations', 'deeplabv2', 'sgd')
    model = small().train_only_(['trunk', 'aspp'])
    optimizer = make_optimizer(model, r.last.train)
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults['momentum'] == .9
    trunk, weights, biases = optimizer.param_groups
    assert (trunk['lr'], weights['lr'], biases['lr']) == (2.5e-4, 2.5e-3, 5e-3)        # 1, 10, 20 times
    assert (trunk['weight_decay'], weights['weight_decay'], biases['weight_decay']) == (5e-4, 5e-4, 0.)
    assert len(weights['params']) == len(biases['params']) == 4


def test_parts_of_an_update_add_up_to_one_large_batch():
    """Unequal numbers of labelled cells, an image of nothing but void, losses that look at no image, input scales (spec 11.5)."""
    model = small(inputs=[.5]).double().train_only_(['aspp', 'prototypes', 'last'])
    image, label = torch.rand(4, 3, 65, 65).double(), torch.randint(-1, 3, (4, 65, 65))
    label[0, :, 9:], label[3] = -1, -1
    train, gradients, weights = Train(1, {}, diversity=.25, l1=1e-3), [], torch.tensor([.5, 1., 4.]).double()
    for sizes in ((4,), (1, 3), (1, 1, 1, 1)):
        model.zero_grad()
        for x, y in zip(image.split(list(sizes)), label.split(list(sizes))):
            outputs = model.outputs(x, ('distances',))
            whole = update_counts(outputs, label, model, train)
            sum(mean_losses(outputs, y, model, train, whole, 1 / len(sizes), weights=weights).values()).backward()
        gradients.append([p.grad.clone() for p in (model.prototypes.vectors, model.head.last)])
    for parts in gradients[1:]: torch.testing.assert_close(parts, gradients[0], rtol=1e-9, atol=1e-12)
    model.zero_grad()
    sum(mean_losses(model.outputs(image, ('distances',)), label, model, train, weights=weights).values()).backward()
    torch.testing.assert_close([model.prototypes.vectors.grad, model.head.last.grad], gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('batch, accumulate, worlds', [(2, 5, (1, 2, 5, 10)), (10, 1, (1, 2, 5, 10)), (1, 6, (1, 2, 3, 6))])
def test_processes_together_see_the_images_of_an_update(batch, accumulate, worlds):
    train = Train(3, {}, batch=batch, accumulate=accumulate)
    for world in worlds:
        seen = [passes(2, train, rank, world) for rank in range(world)]
        assert sorted(p for parts in seen for part in parts for p in part) == list(range(2 * batch * accumulate, 3 * batch * accumulate))
        assert len({tuple(map(len, parts)) for parts in seen}) == 1                   # all do the same work
        assert max(len(part) for parts in seen for part in parts) <= batch


@pytest.mark.parametrize('batch, accumulate, world', [(5, 2, 2), (2, 2, 1), (1, 6, 3)])
def test_shares_of_passes_add_up_to_the_mean_over_images(batch, accumulate, world):
    train = Train(1, {}, batch=batch, accumulate=accumulate)
    parts = [part for rank in range(world) for part in passes(0, train, rank, world)]
    image = torch.rand(batch * accumulate, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    label = torch.randint(0, 3, (batch * accumulate, 2, 2), generator=torch.Generator().manual_seed(1))
    added = sum(len(p) / (batch * accumulate) * lovasz(image[list(p)], label[list(p)]) for p in parts)
    torch.testing.assert_close(added, lovasz(image, label))


def test_a_variant_takes_over_the_stages_it_shares(tmp_path, monkeypatch, capsys):
    recipe = find_recipe('smoke', 'pretrain')
    twin = replace(recipe, experiment='smoke-ablations', variant='twin')
    other = replace(twin, variant='longer', stages=(replace(twin.last, train=replace(twin.last.train, steps=4)),))
    for r in (twin, other): monkeypatch.setitem(recipes.RECIPES, r.name, r)
    (first,) = run_method('smoke', 'pretrain', out=tmp_path, device='cpu')
    capsys.readouterr()
    (second,) = run_method('smoke-ablations', 'pretrain', 'twin', out=tmp_path, device='cpu')
    assert 'the same as' in capsys.readouterr().err
    assert (second / 'head.safetensors').samefile(first / 'head.safetensors') and read_metrics(second) == read_metrics(first)
    assert json.loads((second / 'config.json').read_text())['recipe'] == 'smoke-ablations/pretrain-twin'
    assert load(second).labels == load(first).labels
    (third,) = run_method('smoke-ablations', 'pretrain', 'longer', out=tmp_path, device='cpu')
    assert not (third / 'head.safetensors').samefile(first / 'head.safetensors') and read_metrics(third)['steps'] == 4
    shutil.rmtree(second)
    (first / 'backbone.safetensors').rename(tmp_path / 'elsewhere')                    # as `pack` leaves a stage: there is nothing to go on from
    (again,) = run_method('smoke-ablations', 'pretrain', 'twin', out=tmp_path, device='cpu')
    assert (again / 'backbone.safetensors').is_file() and not (again / 'head.safetensors').samefile(first / 'head.safetensors')
    (seed1,) = run_method('smoke-ablations', 'pretrain', 'twin', seed=1, out=tmp_path, device='cpu')
    assert not (seed1 / 'head.safetensors').samefile(first / 'head.safetensors')


def test_prune_stage_keeps_what_it_says(tmp_path):
    for method in ('pretrain', 'protoseg'): folders = run_method('smoke', method, out=tmp_path, device='cpu')
    by_name = {f.name: f for f in folders}
    facts, seen = read_metrics(by_name['prune'])['pruning'], json.loads((by_name['prune'] / 'prune.json').read_text())
    kept = [p for p in seen['prototypes'] if p['kept']]
    assert facts['kept'] == len(kept) == int(load_model(by_name['prune_finetune']).prototypes.alive.sum())
    assert all(p['kept'] == (p['own'] >= seen['threshold']) for p in seen['prototypes']) and 0 < facts['pruned']
    assert (Path(by_name['prune_finetune']) / 'prune.json').samefile(by_name['prune'] / 'prune.json')


def test_dropout_is_drawn_by_seed_and_step(tmp_path, monkeypatch):
    """HRNet's and SegFormer's heads drop channels: the same seed must drop the same ones, whatever was drawn in this process before."""
    view = find_recipe('smoke', 'prototype_view')
    small = replace(view, experiment='mini', init=None, stages=(replace(view.stages[0], train=replace(view.stages[0].train, steps=2)),),
                    model={**view.model, 'backbone': dict(name='hrnet', arch='hrnet_w18_small')})
    monkeypatch.setitem(recipes.RECIPES, small.name, small)
    first, again, other = (run_method('mini', 'prototype_view', seed=seed, out=tmp_path / out, device='cpu')[0] / 'head.safetensors'
                           for seed, out in ((0, 'a'), (0, 'b'), (1, 'c')))
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_a_stage_is_tied_to_the_weights_it_began_with(tmp_path, monkeypatch, capsys):
    """Its parent trained again (here: with another precision) is another training, for what is finished and for what would be taken over."""
    recipe = find_recipe('smoke', 'pretrain')
    two = replace(recipe, method='two', stages=(recipe.last, replace(recipe.last, name='more', parent='joint')))
    twin = replace(two, experiment='smoke-ablations', variant='twin')
    for r in (two, twin): monkeypatch.setitem(recipes.RECIPES, r.name, r)
    first, second = run_method('smoke', 'two', out=tmp_path, device='cpu')
    begun = [read_json(f / 'provenance.json')['begun'] for f in (first, second)]
    assert begun[0] != begun[1] == weights_digest(load_model(first))
    assert (second / 'head.safetensors').stat().st_mode & 0o777 == (second / 'config.json').stat().st_mode & 0o777
    shutil.rmtree(first)
    run_stage('smoke', 'two', 'joint', out=tmp_path, device='cpu')
    assert run_stage('smoke', 'two', 'more', out=tmp_path, device='cpu') == second                     # the same weights again
    for absent in (ImportError('no package with weights'), OSError('no network')):                    # then it stands as it is
        def fail(*a, absent=absent): raise absent
        with monkeypatch.context() as patch:
            patch.setattr(training, 'start_model', fail)
            assert run_stage('smoke', 'two', 'more', out=tmp_path, device='cpu') == second and str(absent) in capsys.readouterr().err
    shutil.rmtree(first)
    run_stage('smoke', 'two', 'joint', out=tmp_path, device='cpu', precision='64-true')
    with pytest.raises(ValueError, match=f'{second} did not begin with the weights that {first} has now; remove it'): run_stage('smoke', 'two', 'more', out=tmp_path, device='cpu')
    run_stage('smoke-ablations', 'two', 'joint', 'twin', out=tmp_path, device='cpu')
    other = run_stage('smoke-ablations', 'two', 'more', 'twin', out=tmp_path, device='cpu')
    assert other.is_dir() and (other / 'head.safetensors').samefile(second / 'head.safetensors')         # it begins as `second` did
    shutil.rmtree(first)
    shutil.rmtree(other)
    (second / 'provenance.json').write_text((second / 'provenance.json').read_text().replace(begun[1], '0' * 12))
    other = run_stage('smoke-ablations', 'two', 'more', 'twin', out=tmp_path, device='cpu')
    assert not (other / 'head.safetensors').samefile(second / 'head.safetensors')
