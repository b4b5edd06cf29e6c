"""Against numbers that the papers' own programs computed (their README gives formulas and tolerances), in float64.

There, prototypes are rows ordered scale, class, k and label 0 is void; here, they are (S, C, K, D) and void is -1.
"""
import numpy as np
import pytest
import torch
from torch import Tensor

from scaleprotoseg.heads import GroupHead, LinearHead, linear_logits, to_simplex
from scaleprotoseg.losses import cross_entropy, diversity, group_entropy, jeffreys
from scaleprotoseg.projection import Projection, duplicates, nearest_own_cell
from scaleprotoseg.prototypes import Prototypes, log_similarity, squared_distances

S, C, K, G = 4, 5, 3, 3
T9 = {'rtol': 1e-9, 'atol': 1e-12}
RUBBISH = 7.     # stands where a dead prototype's numbers would stand; it must not count


def close(got: Tensor, want: np.ndarray, rtol=0., atol=0.):
    torch.testing.assert_close(got.detach(), torch.as_tensor(want), rtol=rtol, atol=atol)


def our_labels(labels: np.ndarray) -> Tensor:
    "0 void, 1..C -> -1 void, 0..C-1; anything else is void as well."
    ours = torch.from_numpy(labels) - 1
    return ours.masked_fill((ours < 0) | (ours >= C), -1)


def dense(maps: np.ndarray, scales=S, classes=C) -> Tensor:
    "(B, P, h, w) -> (B, S, C, K, h, w)"
    return torch.from_numpy(maps).unflatten(1, (scales, classes, -1))


def pixels_first(maps: Tensor) -> Tensor:
    "(B, ..., h, w) -> (B, h, w, flat ...)"
    return maps.movedim((-2, -1), (1, 2)).flatten(3)


def our_weight(weight: np.ndarray, scales=S) -> Tensor:
    "(C, P) -> (C, C, S, K)"
    return torch.from_numpy(weight).unflatten(1, (scales, C, -1)).transpose(1, 2).contiguous()


def scattered(values: np.ndarray, where: Tensor, axis: int) -> Tensor:
    "The columns of the living prototypes at their places among all, rubbish elsewhere."
    values = torch.from_numpy(values).movedim(axis, 0)
    full = values.new_full((where.numel(), *values.shape[1:]), RUBBISH)
    full[where.flatten()] = values
    return full.movedim(0, axis)


def features_of(g, name='features', scales=S) -> Tensor:
    return torch.from_numpy(g[name]).unflatten(1, (scales, -1))


def without(dropped: np.ndarray) -> Tensor:
    alive = torch.ones(S * C * K, dtype=torch.bool)
    alive[torch.from_numpy(dropped)] = False
    return alive.view(S, C, K)


def ragged_weights(g, alive: Tensor) -> Tensor:
    "Group weights (C, G, S, K) of the pruned model; its classes have rows of different lengths, class 2 has none."
    per_class = alive.transpose(0, 1).flatten(1)
    rows = [scattered(g.get(f'pruned_group_weight_class{c}', np.zeros((G, 0))), per_class[c], 1) for c in range(C)]
    return torch.stack(rows).unflatten(-1, (S, K))


ALL = torch.ones(S, C, K, dtype=torch.bool)


@pytest.fixture
def head(golden): return golden('head')


@pytest.fixture
def pruned(head) -> tuple[dict, Tensor]:
    "Every prototype of class 2 is dead, so are two of class 0 in scale 1 and all of class 3 in scale 2."
    alive = without(head['pruned_dropped'])
    assert not alive[:, 2].any() and alive[1, 0].sum() == 1 and not alive[2, 3].any() and alive.sum() == 43
    return head, alive


# -- distances, similarities, logits ----------------------------------------------------------------------------------

def test_distances_and_similarities(head):
    prototypes = Prototypes(S, C, K, 8, epsilon=float(head['epsilon'])).double()
    prototypes.vectors.data = torch.from_numpy(head['prototypes']).view(S, C, K, 8)
    distances, similarities = prototypes(features_of(head))
    close(distances.flatten(1, 3), head['distances'], **T9)
    close(pixels_first(similarities), head['similarity'], atol=1e-8)
    exact = similarities[0, 0, 0, :2, 0, 0]                      # rows 0 and 1 are equal, and the pixel hits both
    close(exact, np.full(2, np.log(1e4)), atol=1e-6)


def test_linear_logits(head):
    similarities = log_similarity(dense(head['distances']))
    module = LinearHead(S, C, K).double()
    module.weight.data = our_weight(head['stage1_last_weight'])
    close(pixels_first(module(similarities, ALL)[0]), head['stage1_logits'], atol=1e-8)


def test_groups_and_their_logits(head):
    similarities = log_similarity(dense(head['distances']))
    module = GroupHead(S, C, K, G).double()
    module.weights.data = torch.from_numpy(head['group_weights']).view(C, G, S, K)
    module.last.data = torch.from_numpy(head['group_last_weight']).view(C, C, G)
    logits, groups = module(similarities, ALL)
    close(pixels_first(groups), head['group_activations'], **T9)
    close(pixels_first(logits), head['grouped_logits'], rtol=1e-8, atol=1e-12)


def test_linear_logits_without_the_pruned_prototypes(pruned):
    g, alive = pruned
    similarities = log_similarity(scattered(g['pruned_distances'], alive, 1).view(2, S, C, K, 7, 9))
    weight = scattered(g['pruned_stage1_last_weight'], alive, 1).view(C, S, C, K).transpose(1, 2)
    close(squared_distances(features_of(g), torch.from_numpy(g['prototypes']).view(S, C, K, 8))[:, alive],
          g['pruned_distances'], **T9)
    close(pixels_first(linear_logits(similarities, weight, alive)), g['pruned_stage1_logits'], atol=1e-8)


def test_ragged_groups_and_a_class_without_any(pruned):
    g, alive = pruned
    similarities = log_similarity(dense(g['distances']))
    module = GroupHead(S, C, K, G).double()
    module.weights.data = ragged_weights(g, alive)
    has_groups = module.evidence(alive)
    assert has_groups[:, 0].tolist() == [True, True, False, True, True]
    module.last.data = scattered(g['pruned_group_last_weight'], has_groups, 1).view(C, C, G)
    logits, groups = module(similarities, alive)
    close(pixels_first(groups)[..., has_groups.flatten()], g['pruned_group_activations'], **T9)
    close(pixels_first(logits), g['pruned_grouped_logits'], rtol=1e-8, atol=1e-12)
    assert (groups[:, 2] == 0).all() and (logits[:, 2] < 0).all()     # its logit is what the others leave


def test_one_scale(head):
    vectors = torch.from_numpy(head['single_prototypes']).view(1, C, 2, 8)
    distances = squared_distances(features_of(head, 'single_features', 1), vectors)
    close(distances.flatten(1, 3), head['single_distances'], **T9)
    logits = linear_logits(log_similarity(distances), our_weight(head['single_last_weight'], 1), ALL[:1, :, :2])
    close(pixels_first(logits), head['single_logits'], atol=1e-8)
    close(LinearHead(1, C, 2).double().weight, our_weight(head['single_last_weight'], 1))      # our initial weights


def test_groups_start_from_the_published_last_layer(head):
    close(GroupHead(S, C, K, G).double().last[:, [0, 1, 3, 4]].flatten(1), head['pruned_group_last_weight'])


# -- losses -----------------------------------------------------------------------------------------------------------

def pairs_in_their_order(distances, labels, alive=ALL) -> Tensor:
    "Divergences of the existing pairs, ordered image, class, scale, pair."
    J, exists = (x.permute(2, 0, 1) for x in jeffreys(distances, labels, alive))
    return J[exists]


@pytest.mark.parametrize('case', ['generic', 'one_and_two_pixel_classes', 'void_and_out_of_range', 'all_void',
                                  'only_single_pixels'])
def test_diversity(golden, case):
    g = golden('diversity')
    distances, labels = dense(g['distances']), our_labels(g[f'labels_{case}'])
    close(pairs_in_their_order(distances, labels), g[f'pairs_{case}'], atol=1e-12)
    close(diversity(distances, labels, ALL), g[f'value_{case}'], **T9)


@pytest.mark.parametrize('case', ['generic', 'one_and_two_pixel_classes'])
def test_diversity_gradient(golden, case):
    g = golden('diversity')
    distances = dense(g['distances']).requires_grad_()
    diversity(distances, our_labels(g[f'labels_{case}']), ALL).backward()
    close(distances.grad.flatten(1, 3), g[f'grad_{case}'], atol=1e-10)
    assert distances.grad.abs().max() > 1e-4


@pytest.mark.parametrize('case, tolerance', [('ties', T9), ('large', {'rtol': 1e-9, 'atol': 1e-9}), ('pruned', T9)])
def test_diversity_of_equal_far_and_pruned_maps(golden, case, tolerance):
    g = golden('diversity')
    distances, labels, alive = dense(g['distances']), our_labels(g['labels_generic']), ALL
    if case == 'ties': distances = dense(g['distances_ties'])
    if case == 'large': distances = distances * float(g['distances_large_factor'])
    if case == 'pruned': alive = without(np.setdiff1d(np.arange(S * C * K), g['pruned_kept']))
    J = pairs_in_their_order(distances, labels, alive)
    close(J, g[f'pairs_{case}'], **tolerance)
    close(diversity(distances, labels, alive), g[f'value_{case}'], **tolerance)
    if case == 'ties': assert (J < 1e-12).sum() == 9


def test_group_entropy_and_its_gradient(golden):
    g = golden('regularisers')
    weights = torch.from_numpy(g['group_weights']).view(C, G, S, K).requires_grad_()
    entropy = group_entropy(weights, ALL)
    entropy.backward()
    close(entropy, g['entropy_group'], atol=1e-7)
    close(weights.grad.flatten(2), g['grad_entropy_group'], atol=1e-7)


def test_group_entropy_divides_by_the_logarithm_of_what_lives(golden, pruned):
    g, alive = golden('regularisers'), pruned[1]
    close(group_entropy(ragged_weights(g, alive), alive), g['pruned_entropy_group'], atol=1e-7)


@pytest.mark.parametrize('case', ['generic', 'void_and_out_of_range'])
def test_cross_entropy(golden, case):
    g = golden('regularisers')
    logits = torch.from_numpy(g['ce_logits']).movedim(-1, 1)
    close(cross_entropy(logits, our_labels(g[f'ce_labels_{case}'])), g[f'ce_{case}'], **T9)


# -- the simplex ------------------------------------------------------------------------------------------------------

def test_simplex(golden):
    g = golden('simplex')
    got, want = to_simplex(torch.from_numpy(g['input'])), g['output']
    million = 5                                     # the row with values of about 1e6
    rest = np.delete(np.arange(12), million)
    close(got[rest], want[rest], atol=1e-12)
    close(got[million], want[million], atol=1e-9)
    close(to_simplex(torch.from_numpy(g['input_n1'])), g['output_n1'])
    close(2 * to_simplex(torch.from_numpy(g['input_z2']) / 2), g['output_z2'], atol=1e-12)   # sum 2: a matter of units
    close(to_simplex(torch.from_numpy(g['input_f32'])), g['output_f32'], atol=1e-6)


# -- projection -------------------------------------------------------------------------------------------------------

@pytest.fixture
def stream(golden):
    g = golden('projection')
    prototypes = Prototypes(S, C, K, 8).double()
    prototypes.vectors.data = torch.from_numpy(g['prototypes']).view(S, C, K, 8)
    return g, prototypes, features_of(g), our_labels(g['labels'])


SEEN = torch.tensor([True, True, True, False, True])      # class 3 occurs in no image


def test_nearest_cell_of_every_image(stream):
    g, prototypes, features, labels = stream
    value, cell = (x.detach() for x in nearest_own_cell(prototypes(features)[0], labels))
    present = torch.stack([(labels == c).flatten(1).any(1) for c in range(C)], 1)                    # (images, C)
    assert torch.equal(present.any(0), SEEN)
    here = present[:, None, :, None].expand_as(value)
    want_value, want_cell = (torch.from_numpy(g[k]).view_as(value) for k in ('min_distance', 'min_index'))
    assert torch.equal(cell[here], want_cell[here])
    close(value[here], want_value[here], atol=1e-9)
    assert (cell[~here] == -1).all() and value[~here].isinf().all()


def test_projection_takes_the_first_nearest_patch(stream):
    g, prototypes, features, labels = stream
    projection = Projection(prototypes)
    before = prototypes.vectors.detach().clone()
    for i in range(len(features)):
        projection.update(i, features[i:i + 1], *prototypes(features[i:i + 1]), labels[i:i + 1])
    counts = projection.apply_(prototypes)
    vectors, want = prototypes.vectors.detach(), torch.from_numpy(g['projected_prototypes']).view(S, C, K, 8)
    assert torch.equal(projection.image[:, SEEN], torch.from_numpy(g['best_image']).view(S, C, K)[:, SEEN])
    assert torch.equal(vectors[:, SEEN], want[:, SEEN])
    assert torch.equal(vectors[:, 3], before[:, 3]) and not prototypes.alive[:, 3].any()   # left alone, and dead
    kept = torch.isin(torch.arange(S * C * K), torch.from_numpy(g['kept_after_deduplication'])).view(S, C, K)
    # there, class 3 went to an arbitrary patch, which is also the true patch of one prototype of class 4: it lives here
    kept[3, 4, 2] |= torch.equal(want[3, 4, 2], want[3, 3, 2])
    assert torch.equal(prototypes.alive[:, SEEN], kept[:, SEEN])
    assert counts == {'projected': 48, 'absent': 12, 'duplicate': 5}


def test_deduplication_keeps_the_first_of_equals(golden):
    g = golden('projection')
    vectors = torch.from_numpy(g['projected_prototypes']).view(S, C, K, 8)
    kept = torch.nonzero(~duplicates(vectors, ALL).flatten())[:, 0]
    assert len(kept) < S * C * K and kept.tolist() == g['kept_after_deduplication'].tolist()
