"Pruning, what the other parts do with what it leaves, and what is counted afterwards."
import csv
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from scaleprotoseg.heads import GroupHead, LinearHead, PixelHead
from scaleprotoseg.losses import cross_entropy, diversity, group_entropy, legacy_labels, off_class_l1
from scaleprotoseg.metrics import average_weight, extra_parameters, group_statistics
from scaleprotoseg.model import Model
from scaleprotoseg.projection import Projection, touched
from scaleprotoseg.prototypes import Prototypes
from scaleprotoseg.pruning import NearestPatches

PUBLISHED = Path(__file__).parents[1] / 'data' / 'published'


def stream(layer, rows, k=6):
    """Feed one image per row: (distances of its cells, labels of its cells), one pixel a cell.

    All prototypes have the same distances."""
    seen = NearestPatches(layer, k)
    for i, (distances, labels) in enumerate(rows):
        d = torch.tensor(distances, dtype=torch.float32).view(1, 1, -1).expand(layer.alive.numel(), 1, -1)
        seen.update(i, d.reshape(1, *layer.alive.shape, 1, -1), torch.tensor(labels).view(1, 1, -1))
    return seen


@pytest.fixture
def layer(): return Prototypes(1, 2, 1, 3)                # one prototype per class


# -- the rule ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('own, kept', [(2, False), (3, True), (6, True)])
def test_three_of_six_patches_of_the_class_keep_a_prototype(layer, own, kept):
    rows = [([1., 2.], [0, 0])] * own + [([1., 2.], [1, 1])] * (6 - own)
    seen = stream(layer, rows)
    counts = seen.apply_(layer)
    assert layer.alive[0, 0, 0] == kept and seen.own()[0, 0, 0] == own
    assert counts['images'] == 6 and counts['kept'] + counts['pruned'] == 2


def test_only_the_k_nearest_images_count(layer):
    far = [([9., 9.], [0, 0])] * 20
    near = [([1., 2.], [1, 1])] * 6
    assert stream(layer, far + near).own().flatten().tolist() == [0, 6]
    assert stream(layer, near + far).own().flatten().tolist() == [0, 6]


def test_an_image_gives_one_patch_of_whatever_class_is_nearest(layer):
    seen = stream(layer, [([3., 1., 2.], [0, 1, 0])], k=2)                # both cells of class 0 are farther
    assert seen.image[0, 0, 0].tolist() == [0, -1] and seen.label[0, 0, 0].tolist() == [1, -1]
    assert seen.cell[0, 0, 0, 0].tolist() == [0, 1]


def test_void_is_no_candidate_and_an_image_of_void_is_skipped(layer):
    seen = stream(layer, [([0., 5.], [-1, 0]), ([0., 0.], [-1, -1]), ([1., 7.], [0, 0])])
    assert seen.images == 2 and seen.image[0, 0, 0, :3].tolist() == [2, 0, -1]
    assert seen.distance[0, 0, 0, :2].tolist() == [1., 5.]


def test_of_equal_distances_the_earlier_image_and_the_lower_cell_stay(layer):
    seen = stream(layer, [([4., 4.], [0, 0])] + [([2., 2., 2.], [1, 0, 0])] * 5, k=3)
    assert seen.image[0, 0, 0].tolist() == [1, 2, 3] and (seen.cell[0, 0, 0] == 0).all()


@pytest.mark.parametrize('corner, label', [([0, 1, 1, 1], 0), ([2, -1, 1, 1], 1), ([2, 2, 1, 1], 1), ([-1, 2, 2, 1], 2)])
def test_a_patch_is_of_the_class_if_any_pixel_is_else_of_the_most_frequent(corner, label):
    "One cell of 2 x 2 pixels, looked at by a prototype of class 0; of equally frequent classes the lower one."
    seen = NearestPatches(Prototypes(1, 3, 1, 2), k=1)
    seen.update(0, torch.ones(1, 1, 3, 1, 1, 1), torch.tensor(corner).view(1, 2, 2))
    assert seen.label[0, 0, 0, 0] == label


def test_memory_does_not_grow_with_the_images(layer):
    def numbers(seen): return sum(x.numel() for x in vars(seen).values() if isinstance(x, torch.Tensor))
    few, many = (stream(layer, [([1., 2.], [0, 1])] * n) for n in (1, 40))
    assert numbers(few) == numbers(many) == 2 + 2 * 6 * 7
    assert not [x for x in vars(many).values() if isinstance(x, (list, dict))]


# -- few images, few prototypes, wrong use ----------------------------------------------------------------------------

def test_fewer_than_k_images_are_judged_as_they_are_and_said(layer):
    seen = stream(layer, [([1.], [0])] * 4)
    assert seen.apply_(layer) == {'pruned': 1, 'kept': 1, 'images': 4, 'emptied': 1, 'single': 1}
    assert len(seen.to_dict()['prototypes'][0]['patches']) == 4


@pytest.mark.parametrize('rows', [[], [([1.], [0])] * 2, [([1.], [-1])] * 9], ids=['none', 'two', 'void'])
def test_too_few_images_are_an_error_and_remove_nothing(layer, rows):
    with pytest.raises(ValueError, match='fewer than the threshold of 3'): stream(layer, rows).apply_(layer)
    assert layer.alive.all()


def test_dead_prototypes_stay_dead_and_are_not_listed(layer):
    layer.kill_(torch.tensor([[[True], [False]]]))
    seen = stream(layer, [([1.], [1])] * 6)
    assert [r['cls'] for r in seen.to_dict()['prototypes']] == [1]
    assert seen.apply_(layer) == {'pruned': 0, 'kept': 1, 'images': 6, 'emptied': 0, 'single': 1}


def test_the_record_is_plain_json_with_the_names_of_the_images(layer):
    seen = stream(layer, [([2., 1.], [0, 1])] * 6)
    record = json.loads(json.dumps(seen.to_dict(ids=list('abcdef'))))
    assert (record['k'], record['threshold'], record['images']) == (6, 3, 6)
    first = record['prototypes'][0]
    assert (first['scale'], first['cls'], first['k'], first['own'], first['kept']) == (0, 0, 0, 0, False)
    assert first['patches'][0] == {'image': 'a', 'label': 1, 'distance': 1., 'cell': [0, 1], 'grid': [1, 2]}


def test_wrong_numbers_and_a_wrong_order_are_errors(layer):
    with pytest.raises(ValueError, match='at least 1'): NearestPatches(layer, 0)
    seen = stream(layer, [([1.], [0])] * 3)
    for threshold in (0, 7):
        with pytest.raises(ValueError, match='1..6'): seen.keep(threshold)
    with pytest.raises(ValueError, match='increasing order'):
        seen.update(2, torch.ones(1, 1, 2, 1, 1, 1), torch.zeros(1, 1, 1).long())


# -- everything else is well-defined on what is left ------------------------------------------------------------------

S, C, K, D, G = 2, 4, 3, 5, 3


def only(alive, where):
    "A mask that is true in one place."
    alive = alive & False
    alive[where] = True
    return alive


ALIVE = {
    'all': lambda a: a,
    'one class without': lambda a: a.index_fill(1, torch.tensor(1), False),
    'one prototype a class': lambda a: only(a, (0, slice(None), 1)),
    'one prototype': lambda a: only(a, (1, 2, 0)),
    'none': lambda a: a & False,
}
LABELS = {
    'every class': lambda n: torch.arange(n) % (C + 1) - 1,
    'one class': lambda n: torch.full((n,), 3),
    'one pixel': lambda n: torch.full((n,), -1).index_fill(0, torch.tensor(0), 2),
    'only void': lambda n: torch.full((n,), -1),
}


@pytest.mark.parametrize('labels', LABELS)
@pytest.mark.parametrize('alive', ALIVE)
@pytest.mark.parametrize('head', [LinearHead, GroupHead])
def test_no_step_of_the_method_ever_gives_nan(head, alive, labels):
    torch.manual_seed(0)
    layer = Prototypes(S, C, K, D)
    layer.kill_(~ALIVE[alive](layer.alive.clone()))
    model = Model(nn.Identity(), layer, head(S, C, K, G) if head is GroupHead else head(S, C, K), 'sigmoid')
    if head is GroupHead: model.head.project_(layer.alive)
    x, y = torch.randn(2, S, D, 3, 4), LABELS[labels](12).view(1, 3, 4).repeat(2, 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def step():
        out, alive = model.score(x.sigmoid(), ('distances', 'similarities')), layer.alive
        losses = [cross_entropy(out.logits, y), off_class_l1(model.head.last, model.head.evidence(alive)),
                  diversity(out.distances, y, alive), diversity(out.distances, legacy_labels(y, C), alive)]
        if head is GroupHead: losses.append(group_entropy(model.head.weights, alive))
        optimizer.zero_grad()
        sum(losses).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(t.isfinite().all() for t in [*losses, *grads, out.logits])
        optimizer.step()
        if head is GroupHead: model.head.project_(layer.alive)

    step()
    projection = Projection(layer)
    seen = NearestPatches(layer)
    for i in range(6):
        f = torch.rand(1, S, D, 3, 4)
        projection.update(i, f, *layer(f), y[:1], touched(y[:1], C, (3, 4)))
        seen.update(i, layer(f)[0], y[:1])
    projection.apply_(layer)
    if seen.images: seen.apply_(layer)
    else: assert not layer.alive.any()                      # classes seen nowhere: projection has left nothing
    if head is GroupHead:
        model.head.project_(layer.alive)
        model.head.threshold_(0.05)
        assert group_statistics(model.head.weights, layer.alive)['group_average'].isfinite()
    step()
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert math.isfinite(average_weight(model.head.last, model.head.evidence(layer.alive)))


def test_a_class_that_loses_its_prototypes_has_only_what_others_leave_it():
    torch.manual_seed(0)
    layer, head = Prototypes(1, 3, 2, 4), LinearHead(1, 3, 2)
    seen = NearestPatches(layer)
    label = torch.arange(2).repeat(1, 4, 2)                                 # classes 0 and 1; 2 is nowhere
    for i in range(6):
        f = torch.rand(1, 1, 4, 4, 4)
        seen.update(i, layer(f)[0], label)
    counts = seen.apply_(layer, threshold=1)
    assert counts['emptied'] >= 1 and not layer.alive[:, 2].any()
    logits, _ = head(layer(f)[1], layer.alive)
    assert logits.isfinite().all() and (logits[:, 2] < 0).all()


# -- Table 10 ---------------------------------------------------------------------------------------------------------

def published(table, metric, **where):
    "The one number of a published table."
    with open(PUBLISHED / f'scaleprotoseg_table_{table}.csv') as f:
        where = where | {'metric': metric}
        found = [r['value'] for r in csv.DictReader(f) if all(r[k] == v for k, v in where.items())]
    assert len(found) == 1, (table, metric, where, found)
    return float(found[0])


CLASSES = {'Cityscapes val': 19, 'Pascal VOC val': 21, 'ADE20K val': 150}
PRINTED = 50      # half of the last printed digit, 0.1K


@pytest.mark.parametrize('data, table', [('Pascal VOC val', '03'), ('Cityscapes val', '04')])
def test_parameters_of_protoseg_are_as_printed(data, table):
    "The prototypes are those of the 3-run means in Tables 3 and 4, where all are active."
    active = published(table, 'sparsity', data=data, method='protoseg')
    got = extra_parameters(CLASSES[data], active)
    assert abs(got - published('10', 'extra_parameters', data=data, method='protoseg')) <= PRINTED


def prototypes_of(data):
    of = lambda step, method: published('02', 'prototypes', data=data, method=method, step=step)
    return of('pruned', 'protoseg'), of('grouped', 'scaleprotoseg'), of('project', 'scaleprotoseg')


def test_parameters_of_scaleprotoseg_on_pascal_are_as_printed():
    _, active, projected = prototypes_of('Pascal VOC val')
    got = extra_parameters(21, active, projected)
    assert abs(got - published('10', 'extra_parameters', data='Pascal VOC val', method='scaleprotoseg')) <= PRINTED


@pytest.mark.parametrize('data, method, missing', [
    ('ADE20K val', 'protoseg', 3.1), ('Cityscapes val', 'scaleprotoseg', 0.9), ('ADE20K val', 'scaleprotoseg', 5.5)])
def test_other_parameters_are_as_printed_but_for_a_few_prototypes(data, method, missing):
    """Table 2 has the counts of one run, Table 10 averages three: `missing` prototypes fewer, at most 0.8 %.

    Neither the mean counts nor more digits were published, so this cannot be narrowed down."""
    pruned, grouped, projected = prototypes_of(data)
    C, printed = CLASSES[data], published('10', 'extra_parameters', data=data, method=method)
    count, total = (pruned, None) if method == 'protoseg' else (grouped, projected)
    at = lambda n: extra_parameters(C, n, total)
    assert at(count - missing) - PRINTED <= printed < at(count)
    assert missing / count < 0.0085 and abs(at(count) - printed) / printed < 0.0085


def test_protoseg_on_ade_is_as_printed_with_1158_prototypes():
    printed = published('10', 'extra_parameters', data='ADE20K val', method='protoseg')
    assert abs(extra_parameters(150, 1158) - printed) <= PRINTED


@pytest.mark.parametrize('data', CLASSES)
def test_average_weight_of_protoseg_is_still_near_its_start(data):
    C = CLASSES[data]
    head, alive = LinearHead(1, C, 10), torch.ones(1, C, 10, dtype=torch.bool)
    start = average_weight(head.last, head.evidence(alive))
    assert start == pytest.approx((1 + 0.5 * (C - 1)) / C, abs=1e-6)
    assert start == pytest.approx(published('10', 'average_weight', data=data, method='protoseg'), abs=0.005)


def test_the_formula_counts_what_the_modules_hold():
    layer, linear, grouped = Prototypes(4, 7, 3, 16), LinearHead(4, 7, 3), GroupHead(4, 7, 3, 2)
    plain = PixelHead(1, 7, 16).conv.weight.numel()
    size = lambda m: sum(p.numel() for p in m.parameters())
    assert extra_parameters(7, 84, channels=16) == size(layer) + size(linear) - plain
    assert extra_parameters(7, 84, 84, channels=16, groups=2) == size(layer) + size(grouped) - plain
