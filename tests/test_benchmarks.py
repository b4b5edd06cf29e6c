"The published loops that benchmarks compare with compute what the package computes; and the benchmarks run."
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from scaleprotoseg.clustering import assign, assigned_sums, follow_
from scaleprotoseg.data import Sample, read_pair, rng
from scaleprotoseg.heads import GroupHead, LinearHead
from scaleprotoseg.losses import diversity
from scaleprotoseg.model import Model
from scaleprotoseg.projection import nearest_own_cell
from scaleprotoseg.protocols import Augment
from scaleprotoseg.prototypes import Prototypes, squared_distances
from scaleprotoseg.transforms import augment, reduce_labels

FOLDER = Path(__file__).parents[1] / 'benchmarks'
B, S, C, K, D, G, h, w = 2, 3, 5, 4, 6, 2, 9, 11


@pytest.fixture(scope='module')
def published():
    sys.path.insert(0, str(FOLDER))
    import published
    yield published
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope='module')
def features(): return torch.rand(B, S, D, h, w, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope='module')
def layer():
    torch.manual_seed(0)
    return Prototypes(S, C, K, D).double()


def test_logits_of_groups(published, features, layer):
    head = GroupHead(S, C, K, G).double()
    got = Model(torch.nn.Identity(), layer, head, 'none').score(features).logits
    torch.testing.assert_close(published.grouped_logits(features, layer.vectors, head.weights, head.last), got)


def test_logits_of_prototypes(published, features, layer):
    head = LinearHead(S, C, K).double()
    head.weight.data.normal_()
    got = Model(torch.nn.Identity(), layer, head, 'none').score(features).logits
    torch.testing.assert_close(published.linear_logits(features, layer.vectors, head.weight), got)


def test_diversity_and_its_gradient(published, features, layer):
    labels = torch.randint(-1, C, (B, h, w), generator=torch.Generator().manual_seed(1))
    one, other = (squared_distances(features, layer.vectors).detach().requires_grad_() for _ in range(2))
    got, want = diversity(one, labels, layer.alive), published.diversity(other, labels)
    torch.testing.assert_close(got, want)
    got.backward(), want.backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_nearest_cells(published, features, layer):
    raw = torch.randint(0, C + 1, (40, 50), generator=torch.Generator().manual_seed(2))
    d = squared_distances(features[:1], layer.vectors).detach().float()      # 1e10 is added to masked cells, as published
    value, cell = nearest_own_cell(d, reduce_labels(raw[None] - 1, (h, w)))
    found = published.nearest_cells(d[0], raw, {v: v - 1 for v in range(C + 1)})
    assert [c for _, c in found] == cell.flatten().tolist()
    assert [v for v, _ in found] == value.flatten().tolist()


@pytest.mark.parametrize('crop', [(24, 32), (90, 40)])         # inside the scaled image, and beyond it
def test_training_samples(published, tmp_path, crop):
    r, mapping, size = rng('sample'), {7: 0, 9: 1, 255: -1}, (49, 65)    # odd: no centre of a new pixel lies between two old ones
    smooth = torch.nn.functional.interpolate(torch.from_numpy(r.random((1, 3, 6, 8), np.float32)), size, mode='bilinear')[0]
    Image.fromarray((255 * smooth).byte().permute(1, 2, 0).numpy()).save(tmp_path / 'image.png')
    Image.fromarray(r.choice(np.array([7, 9, 255], np.uint8), size)).save(tmp_path / 'label.png')
    files = tmp_path / 'image.png', tmp_path / 'label.png'
    table = np.zeros(256, np.uint8)
    table[list(mapping)] = [c + 1 for c in mapping.values()]
    for seed in range(10):
        image, label = augment(Sample(*read_pair(*files, mapping), id='a'), Augment(crop), rng(seed))
        theirs, their_label = published.sample(*files, 0, table, Augment(crop), rng(seed))
        assert theirs.dtype == image.dtype and theirs.shape == image.shape
        assert (theirs - image).abs().max() < 1.1 / 255                     # they scale bytes, and round
        assert torch.equal(their_label, label)


def test_clustering_step(published):
    g = torch.Generator().manual_seed(0)
    z, vectors = (F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1) for shape in ((400, 16), (5, 3, 16)))
    labels, alive = torch.randint(0, 4, (400,), generator=g), torch.ones(5, 3, dtype=torch.bool)      # the last class is absent
    scores = (z @ vectors.flatten(0, 1).T).view(400, 5, 3)
    own = scores[torch.arange(400), labels]
    index = assign(own, labels, alive)
    assert torch.equal(published.assignment(own, labels, torch.arange(5)), index)
    sums, counts = assigned_sums(z, torch.where(scores.amax(-1).argmax(-1) == labels, labels * 3 + index, -1), 15)
    theirs = published.clustering_step(z, vectors.clone(), labels)
    follow_(vectors, sums.view(5, 3, -1), counts.view(5, 3))
    torch.testing.assert_close(vectors, theirs, atol=1e-12, rtol=0)


def test_synthesised_datasets_open(published, tmp_path, monkeypatch):
    import data
    import sizes
    for name, layout in data.LAYOUTS.items():
        size = replace(sizes.SIZES[layout.size], image=(40, 60))
        monkeypatch.setitem(sizes.SIZES, layout.size, size)
        root = tmp_path / name
        data.write(layout, root)
        ds = data.opened(layout, root)
        image, label, page = data.files(ds, 1)
        assert len(ds) >= data.IMAGES and ds[1].image.shape == (3, 40, 60), name
        assert ds[1].image.std() > .05 and len(ds[1].label.unique()) > 1
        assert published.decode(image, page, 'RGB').size == published.decode(label, page, 'L').size == (60, 40)


@pytest.mark.slow
@pytest.mark.parametrize('command', [
    ['head.py', '--only', 'Pascal', '--repeats', '3'], ['losses.py', '--repeats', '3'], ['projection.py', '--repeats', '3'],
    ['data.py', '--only', 'Pascal', '--repeats', '3'], ['clustering.py', '--repeats', '3'],
    ['network.py', '--dataset', 'Pascal', '--pixels', '65', '--repeats', '3', '--no-memories']], ids=lambda c: c[0])
def test_benchmarks_run(command, tmp_path):
    run = 'import sys, runpy, sizes; from pathlib import Path; sizes.OUT = Path(sys.argv.pop(1)); runpy.run_path(sys.argv[0], run_name="__main__")'
    done = subprocess.run([sys.executable, '-c', f'import sys; sys.argv.pop(0); {run}', command[0], str(tmp_path), *command[1:]], cwd=FOLDER,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '| size | work |' in done.stdout and len(list(tmp_path.glob('*.json'))) == 1


@pytest.mark.parametrize('method', ['unet', 'protoseg', 'scaleprotoseg', 'prototype_view'])
def test_the_operations_of_every_method_are_counted(published, method):      # the fixture: benchmarks can be imported
    import sweep
    from scaleprotoseg.recipes import find_recipe
    trained = [s for s in find_recipe('em', method).stages if s.train and not s.train.views]
    assert trained
    for stage in trained:
        inference, training = (sweep.counted(find_recipe('em', method), stage, 2, (32, 32), training) for training in (False, True))
        assert inference > 1e6
        if stage.name == 'joint': assert training > 2 * stage.train.batch * inference          # a pass forward, and more than one back
