"""Each switch that brings a known behaviour of the published programs back, and the difference that it makes.

All are off unless asked for.
"""
import numpy as np
import pytest
import torch

from scaleprotoseg.data import Sample
from scaleprotoseg.losses import diversity, legacy_labels
from scaleprotoseg.projection import Projection, nearest_own_cell, touched, trace
from scaleprotoseg.prototypes import Prototypes
from scaleprotoseg.transforms import reduce_labels

# -- ProtoSeg's diversity over the labels of the class before ----------------------------------------------------------

S, C, K = 1, 3, 4


@pytest.fixture
def maps():
    "Distances (2, S, C, K, 6, 8) that want a gradient, and labels with every class and void."
    torch.manual_seed(0)
    labels = torch.randint(-1, C, (2, 6, 8))
    assert all((labels[b] == c).sum() > 2 for b in range(2) for c in range(-1, C))
    return (torch.rand(2, S, C, K, 6, 8) * 5).requires_grad_(), labels, torch.ones(S, C, K, dtype=torch.bool)


def classes_and_labels_that_learn(distances, labels) -> set[tuple[int, int]]:
    "Pairs (class of a prototype, label of a position) whose distances have a gradient."
    learns = distances.grad.abs().amax((1, 3)) > 0                       # (B, C, h, w)
    return {(c, labels[b, y, x].item()) for b, c, y, x in torch.nonzero(learns).tolist()}


def test_prototypes_are_spread_over_their_own_class(maps):
    distances, labels, alive = maps
    diversity(distances, labels, alive).backward()
    assert classes_and_labels_that_learn(distances, labels) == {(0, 0), (1, 1), (2, 2)}


def test_legacy_labels_spread_them_over_the_class_before_and_the_first_over_void(maps):
    distances, labels, alive = maps
    diversity(distances, legacy_labels(labels, C), alive).backward()
    assert classes_and_labels_that_learn(distances, labels) == {(0, -1), (1, 0), (2, 1)}    # class 2's positions: unused


def test_legacy_labels_change_the_value_and_leave_the_labels_alone(maps):
    distances, labels, alive = maps
    before = labels.clone()
    correct, published = (diversity(distances, x, alive) for x in (labels, legacy_labels(labels, C)))
    assert torch.equal(labels, before) and abs(correct - published) > 1e-3


def test_with_legacy_labels_even_an_image_of_void_has_a_diversity(maps):
    distances, labels, alive = maps
    void = torch.full_like(labels, -1)
    assert diversity(distances, void, alive) == 0
    loss = diversity(distances, legacy_labels(void, C), alive)
    loss.backward()
    assert 0 < loss < 1 and classes_and_labels_that_learn(distances, void) == {(0, -1)}


def test_with_legacy_labels_one_class_without_void_has_no_pair():
    distances, alive = torch.rand(1, 1, 1, 2, 4, 4), torch.ones(1, 1, 2, dtype=torch.bool)
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    assert diversity(distances, labels, alive) > 0 and diversity(distances, legacy_labels(labels, 1), alive) == 0


# -- ProtoSeg's projection: a cell belongs to every class that touches it ----------------------------------------------

def project(layer, images, rule='nearest', **options):
    projection = Projection(layer)
    for i, (features, labels) in enumerate(images):
        grid = features.shape[-2:]
        eligible = touched(labels, layer.alive.shape[1], grid) if rule == 'touched' else None
        projection.update(i, features, *layer(features), reduce_labels(labels, grid), eligible)
    return projection, projection.apply_(layer, **options)


@pytest.fixture
def thin():
    "An image of 32 x 32 pixels on a grid of 4 x 4: class 0, with a line of class 1 that misses every cell centre."
    torch.manual_seed(0)
    labels = torch.zeros(1, 32, 32, dtype=torch.long)
    labels[:, :, 1] = 1
    return torch.rand(1, 2, 8, 4, 4), labels


def test_a_thin_class_has_no_nearest_label_but_touches_cells(thin):
    nearest, generous = (Prototypes(2, 2, 3, 8) for _ in range(2))
    generous.load_state_dict(nearest.state_dict())
    assert project(nearest, [thin])[1]['absent'] == 6 and not nearest.alive[:, 1].any()
    projection, counts = project(generous, [thin], rule='touched')
    assert counts['absent'] == 0 and generous.alive[:, 1].any()
    assert (projection.cell[:, 1, :, 1] == 0).all()                       # the column of cells under the line


def test_what_nearest_labels_allow_is_touched_and_touching_is_never_farther():
    torch.manual_seed(1)
    labels, d = torch.randint(-1, 4, (3, 33, 47)), torch.rand(3, 2, 4, 3, 9, 13)
    small, eligible = reduce_labels(labels, (9, 13)), touched(labels, 4, (9, 13))
    b, y, x = torch.nonzero(small >= 0, as_tuple=True)
    assert eligible[b, small[b, y, x], y, x].all() and eligible.sum() > len(b)
    strict, generous = nearest_own_cell(d, small)[0], nearest_own_cell(d, small, eligible)[0]
    assert (generous <= strict).all() and (generous < strict).any()


def test_void_touches_nothing():
    assert not touched(torch.full((1, 8, 8), -1), 3, (2, 2)).any()


# -- prototypes of classes that occur nowhere --------------------------------------------------------------------------

UNUSED = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]     # of COCO-Stuff's 182 classes


@pytest.fixture(scope='module')
def coco():
    "An image that has each used class of COCO-Stuff in three cells, a different one for each of three prototypes."
    torch.manual_seed(0)
    used = torch.tensor([c for c in range(182) if c not in UNUSED])
    labels = torch.full((1, 2 + len(used), 3), -1)                         # two rows of void first
    labels[0, 2:] = used[:, None]
    features, layer = torch.rand(1, 4, 8, *labels.shape[1:]), Prototypes(4, 182, 3, 8)
    layer.vectors.data[:, used] = features[0, :, :, 2:].permute(0, 2, 3, 1)
    other = torch.rand_like(features), torch.full_like(labels, -1)
    return layer, [(features, labels), other], used


def copy(layer):
    new = Prototypes(*layer.vectors.shape)
    new.load_state_dict(layer.state_dict())
    return new


def test_prototypes_of_absent_classes_die(coco):
    layer, images, used = coco
    layer = copy(layer)
    counts = project(layer, images)[1]
    assert int(layer.alive.sum()) == 2184 - 11 * 12 == 2052 and layer.alive[:, used].all()
    assert counts == {'projected': 2052, 'absent': 132, 'duplicate': 0}


def test_legacy_absent_leaves_one_per_scale_in_the_name_of_the_first_absent_class(coco):
    layer, images, used = coco
    layer = copy(layer)
    projection, counts = project(layer, images, legacy_absent=True)
    assert int(layer.alive.sum()) == 2184 - 11 * 12 + 4 == 2056 and layer.alive[:, used].all()
    assert layer.alive[:, UNUSED].nonzero().tolist() == [[s, 0, 0] for s in range(4)] and UNUSED[0] == 11
    assert torch.equal(layer.vectors[:, 11, 0], images[0][0][0, :, :, 0, 0])               # cell 0 of the first image
    assert counts == {'projected': 2184, 'absent': 132, 'duplicate': 128}


def test_legacy_absent_makes_no_difference_where_every_class_occurs(thin):
    one, two = (Prototypes(2, 1, 3, 8) for _ in range(2))
    two.load_state_dict(one.state_dict())
    image = thin[0], thin[1] * 0
    assert project(one, [image])[1] == project(two, [image], legacy_absent=True)[1]
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


def test_legacy_absent_spares_the_dead_and_keeps_a_source(thin):
    features, labels = thin
    layer = Prototypes(2, 3, 2, 8)
    layer.kill_(torch.tensor([[[False, False], [False, False], [True, False]]] * 2))
    before = layer.vectors.detach().clone()
    projection, _ = project(layer, [(features, labels * 0)], legacy_absent=True)
    assert layer.alive[:, 1:].tolist() == [[[True, False], [False, False]]] * 2     # class 1 comes before class 2
    assert torch.equal(layer.vectors[:, 2, 0], before[:, 2, 0])                     # dead before: not moved
    expected = (before[0, 1, 0] - features[0, 0, :, 0, 0]).square().sum()
    assert projection.distance[0, 1, 0] == pytest.approx(expected.item(), rel=1e-5)
    data = [Sample(torch.rand(3, 32, 32), labels[0] * 0, 'first')]
    sources, tiles = trace(projection, data)
    source = next(s for s in sources if (s.scale, s.cls, s.k) == (0, 1, 0))
    assert source.image == 'first' and source.cell == (0, 0) and source.box == source.cell_box == (0, 8, 0, 8)
    assert source.coverage == 0 and np.array(tiles).shape[0] == len(sources)


def test_legacy_absent_without_a_single_image_kills():
    layer = Prototypes(1, 2, 2, 3)
    assert Projection(layer).apply_(layer, legacy_absent=True) == {'projected': 0, 'absent': 4, 'duplicate': 0}
    assert not layer.alive.any()
