"PartScapes: the same bytes everywhere, legal labels, real perspective, clear errors."
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleprotoseg.data import open_dataset
from scaleprotoseg.partscapes import (
    EYE,
    LABELS,
    SKY_DEPTH,
    SPLITS,
    UNITS,
    Canvas,
    Dice,
    PartScapes,
    draw_thing,
    make_thing,
    render,
)

DIGEST = '''
import hashlib
from scaleprotoseg.partscapes import PartScapes
h = hashlib.sha256()
for i in (5, 2):
    for a in PartScapes('val', size=(72, 101), seed=3).arrays(i).values(): h.update(a.tobytes())
print(h.hexdigest())
'''


def same(a, b):
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ('image', 'label', 'parts', 'depth')) and a.id == b.id


def test_every_process_renders_the_same_bytes():
    def run(hash_seed):
        return subprocess.run([sys.executable, '-c', DIGEST], env=os.environ | {'PYTHONHASHSEED': hash_seed},
                              capture_output=True, text=True, check=True).stdout.strip()
    digests = {run('1'), run('2')}
    assert len(digests) == 1 and len(digests.pop()) == 64


def test_an_image_depends_on_seed_split_and_index_only():
    ds = PartScapes('train', size=(64, 96))
    late = ds[7]
    assert same(late, PartScapes('train', size=(64, 96), n=8)[7])
    assert same(late, ds[7 - len(ds)])
    for other in (ds[8], PartScapes('train', size=(64, 96), seed=1)[7], PartScapes('val', size=(64, 96))[7]):
        assert not torch.equal(late.image, other.image) and not torch.equal(late.label, other.label)


def test_splits_share_no_scene():
    scenes = [PartScapes(split).scene(i) for split in SPLITS for i in range(64)]
    assert len(set(scenes)) == len(scenes)


def test_survives_pickling_into_a_worker():
    ds = PartScapes('test', size=(64, 64), n=4)
    loader = torch.utils.data.DataLoader(ds, batch_size=None, num_workers=1, multiprocessing_context='spawn')
    assert same(next(iter(loader)), ds[0])
    assert same(pickle.loads(pickle.dumps(ds))[3], ds[3])


@settings(max_examples=25, deadline=None)
@given(h=st.integers(64, 160), w=st.integers(64, 300), i=st.integers(0, 63), seed=st.integers(0, 10**6))
def test_any_size_gives_legal_labels_and_parts_of_their_class(h, w, i, seed):
    s = PartScapes('val', size=(h, w), seed=seed)[i]
    assert s.image.shape == (3, h, w) and s.label.shape == s.parts.shape == s.depth.shape == (h, w)
    assert s.image.dtype == s.depth.dtype == torch.float32 and s.label.dtype == s.parts.dtype == torch.int64
    assert 0 <= s.image.min() and s.image.max() <= 1
    assert s.label.min() >= LABELS.ignore and s.label.max() < len(LABELS)
    n_parts = torch.tensor([len(p) for p in LABELS.parts] + [0])[s.label]
    assert (s.parts <= n_parts).all() and ((s.parts > 0) == (n_parts > 0)).all()
    assert s.depth.min() > 0 and ((s.depth == SKY_DEPTH) == (s.label == LABELS.names.index('sky'))).all()


def test_size_changes_the_sampling_not_the_street():
    small, large = (PartScapes('train', size=size) for size in ((64, 96), (192, 288)))
    for i in range(5):
        assert small.scene(i) == large.scene(i)
        assert (large[i].label[1::3, 1::3] == small[i].label).all()      # pixel centres coincide


@pytest.mark.parametrize('kind', ['car', 'bus', 'person', 'pony', 'zebra'])
def test_twice_as_far_is_half_as_high(kind):
    def rows(depth):
        canvas = Canvas((512, 1024))
        draw_thing(canvas, make_thing(Dice('t'), kind, depth, 0), 1500)
        return np.flatnonzero((canvas.code > 0).any(1))
    near, far = rows(8000), rows(16000)
    assert abs(len(near) / len(far) - 2) < .06
    for r, depth in ((near, 8000), (far, 16000)):     # feet on the ground
        assert abs(r[-1] * UNITS / 512 - (1500 + EYE * UNITS / depth)) < 20


def test_a_nearer_thing_hides_a_farther_one_whatever_their_order():
    ds = PartScapes('train')
    scene = ds.scene(0)
    things = tuple(make_thing(Dice('hide', k), k, d, 0) for k, d in (('car', 6000), ('bus', 12000)))
    a, b = (render(replace(scene, things=t), ds.size, Dice('n')) for t in (things, things[::-1]))
    assert all((a[k] == b[k]).all() for k in a)
    alone = render(replace(scene, things=things[:1]), ds.size, Dice('n'))
    car = alone['label'] == LABELS.names.index('car')
    assert car.any() and (a['label'][car] == LABELS.names.index('car')).all()


def test_pony_and_zebra_have_one_silhouette_and_one_part_map():
    maps = []
    for kind in 'pony', 'zebra':
        canvas = Canvas((128, 192))
        draw_thing(canvas, make_thing(Dice('twin'), kind, 4000, 0), 1700)
        maps.append(canvas)
    pony, zebra = maps
    assert (pony.code > 0).any() and ((pony.code & 15) == (zebra.code & 15)).all() and (pony.depth == zebra.depth).all()
    assert ((pony.code > 0) == (zebra.code > 0)).all() and (pony.rgb != zebra.rgb).any()


def test_every_class_is_large_and_frequent_enough_to_learn():
    labels = torch.stack([PartScapes('pretrain', seed=1)[i].label for i in range(48)])
    for c, name in enumerate(LABELS.names):
        hit = labels == c
        assert hit.float().mean() > .012 and hit.any(-1).any(-1).float().mean() > .3, name
    assert .005 < (labels == LABELS.ignore).float().mean() < .1


def test_opens_by_name_with_the_default_lengths():
    for split, n in SPLITS.items():
        ds = open_dataset('partscapes', split, root='anywhere')
        assert len(ds) == n == len(ds.ids) and ds.ids[12] == f'{split}-00012' and ds[12].id == ds.ids[12]
        assert ds.labels == LABELS
    assert len(open_dataset('partscapes', 'val', size=(64, 64), n=3)) == 3


@pytest.mark.parametrize('options, error, says', [
    (dict(split='tset'), KeyError, "did you mean 'test'"), (dict(size=(63, 100)), ValueError, 'at least 64'),
    (dict(size=(128,)), ValueError, 'height, width'), (dict(size=128), ValueError, 'height, width'),
    (dict(size=(100.5, 100)), ValueError, 'whole'), (dict(n=0), ValueError, 'at least 1'),
    (dict(n=2.5), ValueError, 'whole')])
def test_wrong_arguments_are_named(options, error, says):
    with pytest.raises(error) as e: PartScapes(**options)
    assert says in str(e.value)


def test_index_beyond_the_end():
    ds = PartScapes('val', n=2)
    for i in 2, -3:
        with pytest.raises(IndexError, match='2 images'): ds[i]
    assert len(list(ds)) == 2           # the old iteration protocol ends at IndexError
