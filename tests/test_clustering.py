"""Online clustering against the published peer's numbers, in any precision, and on several shares of the pixels."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleprotoseg.clustering import assign, assigned_sums, follow_, sinkhorn

CASES = ('generic', 'skewed', 'one_pixel', 'ties', 'one_prototype', 'fewer_pixels_than_prototypes')


@pytest.mark.parametrize('case', CASES)
def test_plan_is_the_published_one(golden, case):
    g = golden('online_clustering')
    scores = torch.from_numpy(g[f'scores_{case}'])
    plan = sinkhorn(scores, torch.zeros(len(scores), dtype=torch.int64), 1).exp()
    np.testing.assert_allclose(plan.numpy(), g[f'sinkhorn_plan_{case}'], atol=1e-12, rtol=0)
    top = torch.from_numpy(g[f'sinkhorn_plan_{case}']).sort(-1, descending=True).values
    clear = torch.ones(len(top), dtype=torch.bool) if top.shape[1] == 1 else top[:, 0] - top[:, 1] > 1e-12
    assert clear.any() or case in ('ties', 'one_pixel')
    assert np.array_equal(plan.argmax(-1)[clear].numpy(), g[f'sinkhorn_index_{case}'][clear.numpy()])


@pytest.mark.parametrize('dtype, kappa', [(torch.float16, .05), (torch.bfloat16, 1e-3), (torch.float32, 1e-3)])
def test_logarithms_are_right_where_the_published_form_overflows(dtype, kappa):
    scores = torch.linspace(-1, 1, 400, dtype=torch.float64)[torch.randperm(400, generator=torch.Generator().manual_seed(0))].view(100, 4).to(dtype)
    assert not (scores / kappa).exp().isfinite().all()
    plan = sinkhorn(scores, torch.zeros(100, dtype=torch.int64), 1, kappa)
    exact = sinkhorn(scores.double(), torch.zeros(100, dtype=torch.int64), 1, kappa)
    assert plan.dtype == torch.float32 and plan.isfinite().all()
    torch.testing.assert_close(plan.double().exp(), exact.exp(), atol=2e-3, rtol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_of_the_golden_scores_is_enough(golden, dtype):
    scores = torch.from_numpy(golden('online_clustering')['scores_generic']).to(dtype)
    plan = sinkhorn(scores, torch.zeros(len(scores), dtype=torch.int64), 1)
    exact = sinkhorn(scores.double(), torch.zeros(len(scores), dtype=torch.int64), 1)
    torch.testing.assert_close(plan.double(), exact, atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10 ** 6), st.sampled_from([1e-3, .05, 1.]))
def test_classes_do_not_see_each_other(n, classes, K, seed, kappa):
    g = torch.Generator().manual_seed(seed)
    scores, labels = torch.rand(n, K, generator=g, dtype=torch.float64) * 2 - 1, torch.randint(-1, classes, (n,), generator=g)
    alive = torch.rand(classes, K, generator=g) < .7
    index = assign(scores, labels, alive, kappa)
    for c in range(classes):
        own, living = labels == c, alive[c].nonzero()[:, 0]
        if not len(living): assert (index[own] == -1).all(); continue
        alone = assign(scores[own][:, living], torch.zeros(int(own.sum()), dtype=torch.int64), torch.ones(1, len(living), dtype=torch.bool), kappa)
        assert torch.equal(index[own], living[alone])
    assert (index[labels < 0] == -1).all()


def test_shares_of_the_pixels_move_prototypes_as_all_of_them():
    g = torch.Generator().manual_seed(0)
    z, index = F.normalize(torch.randn(300, 16, generator=g, dtype=torch.float64), dim=1), torch.randint(-1, 6, (300,), generator=g)
    start = F.normalize(torch.randn(6, 16, generator=g, dtype=torch.float64), dim=1)
    whole, parted = start.clone(), start.clone()
    follow_(whole, *assigned_sums(z, index, 6))
    follow_(parted, *(sum(x) for x in zip(*(assigned_sums(z[i::3], index[i::3], 6) for i in range(3)))))
    torch.testing.assert_close(whole, parted, atol=1e-14, rtol=0)
    assert not torch.equal(whole, start)


def test_nothing_is_asked_of_the_device():
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        index = assign(torch.rand(50, 3), torch.zeros(50, dtype=torch.int64), torch.ones(4, 3, dtype=torch.bool))
        follow_(torch.rand(12, 8), *assigned_sums(torch.rand(50, 8), index, 12))
