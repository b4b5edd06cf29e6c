"""A training step never waits for the device: no number of a tensor is asked for. Tensors without values refuse to tell one."""
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from scaleprotoseg.clustering import follow_
from scaleprotoseg.model import build_model
from scaleprotoseg.recipes import Train
from scaleprotoseg.training import assigned_prototypes, followed_sums, make_optimizer, mean_losses, update_counts
from scaleprotoseg.transforms import reduce_labels

LR = dict(trunk=1e-3, aspp=1e-3, prototypes=1e-3, last=1e-3)
CONFIG = dict(backbone=dict(name='unet', width=4), activation='sigmoid', classes=5, scales=4, channels=6, per_class=3, groups=2)


@pytest.fixture
def valueless():
    with FakeTensorMode(allow_non_fake_inputs=True): yield


def batch(model): return torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long)


@pytest.mark.parametrize('head,extra', [('linear', {}), ('groups', {'groups': 1e-3})])
@pytest.mark.parametrize('legacy', [False, True])
def test_training_step(head, extra, legacy, valueless):
    model = build_model({**CONFIG, 'head': head})
    train = Train(steps=1, lr=LR | extra, diversity=0.25, l1=1e-4, entropy=0.1 if extra else 0., lovasz=1., legacy_labels=legacy)
    model.train_only_(train.lr)
    optimizer, (x, y) = make_optimizer(model, train), batch(model)
    outputs = model.outputs(x, ('distances',))
    losses = mean_losses(outputs, y, model, train, update_counts(outputs, y, model, train), weights=torch.rand(CONFIG['classes']))
    assert losses.keys() == {'ce', 'lovasz', 'diversity', 'l1', *(['entropy'] if extra else [])}
    sum(losses.values()).backward()
    optimizer.step()
    if extra: model.head.project_(model.prototypes.alive)
    assert all(any(p.grad is not None for p in parts) for parts in model.parts().values())


def test_step_with_clustering(valueless):
    model = build_model({**CONFIG, 'head': 'nearest', 'activation': 'unit', 'similarity': 'cosine'})
    train = Train(steps=1, lr=dict(trunk=1e-3, aspp=1e-3), momentum=.9, contrast=.01, distance=.01)
    model.train_only_(train.lr)
    x, y = batch(model)
    outputs = model.outputs(x, ('features', 'similarities'))
    assigned = [assigned_prototypes(out, reduce_labels(y, out.logits.shape[-2:]), model) for out in outputs]
    losses = mean_losses(outputs, y, model, train, update_counts(outputs, y, model, train), assigned=assigned)
    assert losses.keys() == {'ce', 'contrast', 'distance'}
    sum(losses.values()).backward()
    sums = followed_sums(outputs[0], reduce_labels(y, outputs[0].logits.shape[-2:]), assigned[0], model)
    follow_(model.prototypes.vectors.view(len(sums), -1), sums[:, :-1], sums[:, -1])


@pytest.mark.parametrize('head', ['pixel', 'direct'])
def test_step_of_a_black_box(head, valueless):
    model = build_model({**CONFIG, 'head': head, 'activation': 'none'})
    train = Train(steps=1, lr={k: 1e-3 for k in model.parts()})
    model.train_only_(train.lr)
    x, y = batch(model)
    outputs = model.outputs(x)
    sum(mean_losses(outputs, y, model, train, update_counts(outputs, y, model, train)).values()).backward()


@pytest.mark.parametrize('ask', [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool((x > 0).any())])
def test_valueless_tensors_refuse_to_tell(ask, valueless):
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)): ask(torch.rand(4))
