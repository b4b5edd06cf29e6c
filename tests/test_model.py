"What a model freezes, saves, loads and promises about precision."
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from scaleprotoseg.model import Model, build_model, load_model, read_config, save_model, save_weights

CONFIG = {'backbone': {'name': 'unet', 'width': 2, 'aspp': True}, 'head': 'groups', 'activation': 'sigmoid',
          'classes': 3, 'scales': 4, 'channels': 5, 'per_class': 2, 'groups': 2}
BLACK_BOXES = {'pixel': CONFIG | {'head': 'pixel'},
               'direct': CONFIG | {'head': 'direct', 'activation': 'none'}}


def build(config: dict = CONFIG, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return build_model(config)


@pytest.fixture
def images(): return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def state(model: Model) -> dict: return {k: v.clone() for k, v in model.state_dict().items()}


def changed(model: Model, before: dict) -> set[str]:
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


def statistics(names) -> set[str]: return {k for k in names if 'running_' in k or 'num_batches' in k}


def step(model: Model, images):
    "One large optimiser step over everything that may train."
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    out = model(images, ('distances',))
    (out.logits.square().mean() + sum(x.mean() for x in (out.distances,) if x is not None)).backward()
    optimizer.step()


# -- what trains ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('names', [['aspp', 'prototypes'], ['groups'], ['groups', 'last'], ['last'],
                                   ['trunk', 'aspp', 'prototypes']])
def test_an_optimiser_step_changes_the_named_parts_alone(names, images):
    model = build().train_only_(names)
    before, parts = state(model), model.parts()
    named = {id(p) for name in names for p in parts[name]}
    step(model, images)
    moved = changed(model, before)
    frozen = {k for k, p in model.named_parameters() if id(p) not in named}
    assert moved and not moved & frozen and not statistics(moved)
    assert all(p.grad is None for k, p in model.named_parameters() if k in frozen)
    for name in names: assert moved & {k for k, p in model.named_parameters() if id(p) in {id(q) for q in parts[name]}}


def test_parts_cover_every_parameter_once():
    for config in (CONFIG, CONFIG | {'head': 'linear'}, *BLACK_BOXES.values()):
        model = build(config)
        listed = [id(p) for parameters in model.parts().values() for p in parameters]
        assert sorted(listed) == sorted(id(p) for p in model.parameters())


def test_frozen_features_stay_what_they_were(images):
    model = build()
    model.train()(images)                                  # batch norm has statistics of its own
    features = model.eval().features(images)
    model.train_only_(['groups', 'last'])
    assert not any(m.training for m in model.modules())
    for _ in range(2): step(model, images)
    assert torch.equal(model.features(images), features)


def norms(model): return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_batch_norm_stays_while_its_trunk_trains(images):
    model = build().train_only_(['trunk'], batch_norm=False)
    before = state(model)
    assert not any(m.training or m.weight.requires_grad or m.bias.requires_grad for m in norms(model))
    step(model, images)
    affine = {f'{name}.{k}' for name, m in model.named_modules() if m in norms(model) for k in ('weight', 'bias')}
    moved = changed(model, before)
    assert moved and not statistics(moved) and not moved & affine


def test_batch_norm_trains_where_the_recipe_says_so(images):
    model = build().train_only_(['trunk'], batch_norm=True)
    before = state(model)
    assert all(m.training and m.weight.requires_grad for m in norms(model))
    step(model, images)
    assert changed(model, before) >= statistics(before)
    assert all(not m.training for m in norms(model.train_only_(['last'], batch_norm=True)))   # its trunk is frozen


def test_a_later_stage_undoes_an_earlier_one():
    model = build().train_only_(['trunk'], batch_norm=True).train_only_(['groups'])
    assert [k for k, p in model.named_parameters() if p.requires_grad] == ['head.weights']


def test_unknown_parts_are_named_with_the_known_ones():
    with pytest.raises(KeyError, match="'prototype'.*did you mean 'prototypes'"): build().train_only_(['prototype'])
    with pytest.raises(KeyError, match='groups'): build(CONFIG | {'head': 'linear'}).train_only_(['groups'])


# -- saved and loaded -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('config', [CONFIG, CONFIG | {'head': 'linear'}, *BLACK_BOXES.values()],
                         ids=['groups', 'linear', *BLACK_BOXES])
def test_a_saved_model_comes_back_exactly(config, images, tmp_path):
    model = build(config)
    model.train()(images)                                  # statistics of batch norm must come back too
    if model.prototypes is not None:
        model.prototypes.kill_(torch.rand(model.prototypes.alive.shape) < 0.5)
    save_model(model, config, tmp_path)
    torch.manual_seed(99)
    again = load_model(tmp_path)
    want = model.state_dict()
    assert again.state_dict().keys() == want.keys() and not changed(again, want)
    assert not any(m.training for m in again.modules()) and read_config(tmp_path) == config
    assert torch.equal(again(images).logits, model.eval()(images).logits)


def test_who_is_alive_is_part_of_the_weights(tmp_path):
    model = build()
    model.prototypes.kill_(torch.ones_like(model.prototypes.alive))
    save_weights(model, tmp_path)
    alive = load_file(tmp_path / 'head.safetensors')['prototypes.alive']
    assert alive.dtype == torch.bool and alive.shape == (4, 3, 2) and not alive.any()


def test_best_weights_are_loaded_by_their_prefix_beside_a_frozen_backbone(images, tmp_path):
    last, best = build(seed=1), build(seed=2)
    best.backbone.load_state_dict(last.backbone.state_dict())
    save_model(last, CONFIG, tmp_path)
    save_weights(best, tmp_path, backbone=False, prefix='best_')
    assert not (tmp_path / 'best_backbone.safetensors').exists()
    for model, prefix in ((last, ''), (best, 'best_')):
        assert torch.equal(load_model(tmp_path, prefix)(images).logits, model.eval()(images).logits)


def test_best_backbone_is_preferred_where_there_is_one(images, tmp_path):
    last, best = build(seed=1), build(seed=2)
    save_model(last, CONFIG, tmp_path)
    save_weights(best, tmp_path, prefix='best_')
    assert torch.equal(load_model(tmp_path, 'best_')(images).logits, best.eval()(images).logits)


@pytest.fixture
def saved(tmp_path):
    save_model(build(), CONFIG, tmp_path)
    return tmp_path


@pytest.mark.parametrize('name', ['backbone.safetensors', 'head.safetensors'])
@pytest.mark.parametrize('keep', [0, 5, 100, -1], ids=['empty', 'no header', 'half a header', 'one byte short'])
def test_a_truncated_file_is_named(saved, name, keep):
    (saved / name).write_bytes((saved / name).read_bytes()[:keep])
    with pytest.raises(ValueError, match=f'{name} is not a complete'): load_model(saved)


@pytest.mark.parametrize('name', ['config.json', 'backbone.safetensors', 'head.safetensors'])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name): load_model(saved)


@pytest.mark.parametrize('text', ['', '{"head": "groups"', 'groups'])
def test_broken_json_is_named(saved, text):
    (saved / 'config.json').write_text(text)
    with pytest.raises(ValueError, match='config.json is damaged'): load_model(saved)


@pytest.mark.parametrize('other, where', [({'per_class': 3}, 'head.safetensors'),
                                          ({'head': 'linear'}, 'head.safetensors'),
                                          ({'channels': 6}, 'backbone.safetensors'),
                                          ({'backbone': CONFIG['backbone'] | {'width': 3}}, 'backbone.safetensors')])
def test_another_architecture_is_refused_with_the_tensor_that_differs(saved, other, where):
    (saved / 'config.json').write_text(json.dumps(CONFIG | other))
    with pytest.raises(ValueError, match=f'{where}.*belongs to another architecture'): load_model(saved)


def test_a_missing_and_a_surplus_tensor_are_refused(saved):
    tensors = load_file(saved / 'head.safetensors')
    save_file({k: v for k, v in tensors.items() if k != 'prototypes.alive'}, saved / 'head.safetensors')
    with pytest.raises(ValueError, match=r"'prototypes\.alive' \(missing in the file\)"): load_model(saved)
    save_file(tensors | {'head.bias': torch.zeros(3)}, saved / 'head.safetensors')
    with pytest.raises(ValueError, match=r"'head\.bias' \(unknown to the model\)"): load_model(saved)


# -- precision --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('half', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('head', ['linear', 'groups'])
def test_half_precision_features_are_scored_in_float32(half, head):
    model = build(CONFIG | {'head': head})
    features = torch.rand(2, 4, 5, 3, 3).to(half)
    features[0, :, :, 0, 0] = model.prototypes.vectors[:, 0, 0].detach().to(half)
    names = ('distances', 'similarities', 'groups')
    out, want = model.score(features, names), model.score(features.float(), names)
    for name in ('logits', *names):
        if getattr(want, name) is None: continue
        assert getattr(out, name).dtype == torch.float32 and torch.equal(getattr(out, name), getattr(want, name))


@pytest.mark.parametrize('config', [CONFIG | {'head': 'groups'}, CONFIG | {'head': 'pixel', 'activation': 'none'}, CONFIG | {'head': 'direct', 'activation': 'none', 'scales': 1, 'channels': CONFIG['classes']}],
                         ids=lambda c: c['head'])
def test_of_a_network_in_half_precision_come_features_and_logits_in_float32(config):
    model, image = build(config), torch.rand(1, 3, 32, 32)
    with torch.autocast('cpu', dtype=torch.bfloat16): maps, (out,) = model.backbone(image), model.outputs(image, ('features',))
    assert maps.dtype == torch.bfloat16 and out.features.dtype == out.logits.dtype == torch.float32
    torch.testing.assert_close(out.features, model.features(image), atol=.05, rtol=.05)


@pytest.mark.parametrize('head', ['linear', 'groups'])
def test_mixed_precision_does_not_reach_past_the_features(head):
    model = build(CONFIG | {'head': head})
    features, names = torch.rand(2, 4, 5, 3, 3), ('distances', 'similarities', 'groups')
    want = model.score(features, names)
    with torch.autocast('cpu', dtype=torch.bfloat16): out = model.score(features, names)
    for name in ('logits', *names):
        if getattr(want, name) is None: continue
        assert getattr(out, name).dtype == torch.float32 and torch.equal(getattr(out, name), getattr(want, name))


@pytest.mark.parametrize('parts, batch_norm, learns', [(['aspp'], False, {'aspp'}), (['trunk', 'aspp'], False, {'aspp'}), (['trunk', 'aspp'], True, {'trunk', 'aspp'}),
                                                       (['trunk'], True, {'trunk'}), (['trunk'], False, set())])
def test_batch_norm_and_dropout_belong_to_the_part_that_they_are_in(parts, batch_norm, learns):
    "HRNet's trunk comes with batch norm, and the head of its levels begins with a fresh one."
    model = build(CONFIG | {'backbone': {'name': 'hrnet', 'arch': 'hrnet_w18_small'}, 'scales': 1}).train_only_(parts, batch_norm)
    for name in ('trunk', 'aspp'):
        norms = [m for m in getattr(model.backbone, name).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms and {(m.training, m.weight.requires_grad) for m in norms} == {(name in learns,) * 2}
        assert all(m.training == (name in parts) for m in getattr(model.backbone, name).modules() if isinstance(m, nn.Dropout2d))


def test_a_black_box_that_needs_no_scales_comes_back(tmp_path, images):
    config = {'backbone': {'name': 'unet', 'width': 2, 'aspp': False}, 'head': 'direct', 'activation': 'none', 'classes': 3}
    save_model(model := build(config).eval(), config, tmp_path)
    assert torch.equal(load_model(tmp_path)(images).logits, model(images).logits)
