"""Backbones: sizes, layouts, strict weights, scales. Large networks are checked on meta tensors."""
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from scaleprotoseg.backbones import (
    ASPP,
    BACKBONES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_backbone,
    deeplabv2,
    dilate_,
    freeze_batch_norm_,
    register_backbone,
    unet,
)

BLOCKS = {'resnet18': (2, 2, 2, 2), 'resnet50': (3, 4, 6, 3), 'resnet101': (3, 4, 23, 3)}


def on_meta(build, *args, **kwargs):
    with torch.device('meta'): return build(*args, **kwargs)


@pytest.fixture(scope='module')
def resnet18():
    torch.manual_seed(1)
    return models.resnet18()


# -- sizes and layout -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arch, in_1x1', [*((arch, False) for arch in BLOCKS), ('resnet50', True), ('resnet101', True)])
def test_map_sizes_are_those_of_the_papers(arch, in_1x1):
    backbone = on_meta(deeplabv2, arch, stride_in_1x1=in_1x1)
    for (H, W), hw in {(321, 321): (41, 41), (513, 513): (65, 65), (512, 512): (65, 65),
                       (1024, 2048): (129, 257)}.items():
        assert backbone(torch.empty(1, 3, H, W, device='meta')).shape == (1, 4, 64, *hw)
    assert (backbone.scales, backbone.channels, backbone.stride) == (4, 64, 8)


@pytest.mark.parametrize('arch', BLOCKS)
def test_every_3x3_convolution_has_the_dilation_of_its_layer(arch):
    trunk = on_meta(deeplabv2, arch).trunk
    for layer, blocks, want in zip((trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4), BLOCKS[arch], (1, 1, 2, 4)):
        convs = [m for m in layer.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert len(convs) == blocks * (2 if arch == 'resnet18' else 1)
        assert {c.dilation for c in convs} == {c.padding for c in convs} == {(want, want)}


@pytest.mark.parametrize('arch', ['resnet50', 'resnet101'])
def test_stride_layout_changes_no_parameter_and_one_block(arch):
    usual, caffe = on_meta(deeplabv2, arch), on_meta(deeplabv2, arch, stride_in_1x1=True)
    assert {k: v.shape for k, v in usual.state_dict().items()} == {k: v.shape for k, v in caffe.state_dict().items()}
    strided = lambda net: [n for n, m in net.trunk.named_modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
    assert strided(usual) == ['conv1', 'layer2.0.conv2', 'layer2.0.downsample.0']
    assert strided(caffe) == ['conv1', 'layer2.0.conv1', 'layer2.0.downsample.0']


def test_stride_layout_is_refused_for_basic_blocks():
    with pytest.raises(ValueError, match='bottleneck'): on_meta(deeplabv2, 'resnet18', stride_in_1x1=True)


@pytest.mark.parametrize('arch', ['resnet18', 'resnet50'])
@pytest.mark.parametrize('stride', [8, 16, 32])
def test_output_stride_can_be_chosen_and_undone(arch, stride):
    net = on_meta(getattr(models, arch))
    dilate_(dilate_(net, 8), stride)
    features = nn.Sequential(*list(net.children())[:-2])
    assert features(torch.empty(1, 3, 513, 513, device='meta')).shape[-1] == 512 // stride + 1
    with pytest.raises(ValueError, match='choose 8, 16 or 32'): dilate_(net, 4)


def test_undilated_trunk_computes_what_torchvision_computes(resnet18):
    """At stride 32 only the rounding of the max-pool differs, and an odd map hides it."""
    ours = models.resnet18(); ours.load_state_dict(resnet18.state_dict())
    image = torch.rand(1, 3, 65, 65)
    with torch.no_grad():
        assert torch.equal(dilate_(ours, 32).eval()(image), resnet18.eval()(image))


def test_dilated_trunk_agrees_with_torchvisions_where_both_exist():
    """torchvision differs in one place only: the first 3×3 convolution of layer3 and layer4."""
    torch.manual_seed(0)
    theirs = models.resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    ours = models.resnet50(); ours.load_state_dict(theirs.state_dict()); dilate_(ours.eval(), 8)
    for layer, d in ((ours.layer3, 1), (ours.layer4, 2)): layer[0].conv2.dilation = layer[0].conv2.padding = (d, d)
    image = torch.rand(1, 3, 65, 65)
    with torch.no_grad(): assert torch.equal(ours(image), theirs(image))


def test_parameters_are_torchvisions_and_the_aspp():
    count = lambda m: sum(p.numel() for p in m.parameters())
    for arch, width in {'resnet18': 512, 'resnet50': 2048, 'resnet101': 2048}.items():
        ours, theirs = on_meta(deeplabv2, arch), on_meta(getattr(models, arch))
        assert count(ours.trunk) == count(theirs) - count(theirs.fc)
        assert count(ours.aspp) == 4 * 64 * (9 * width + 1)


# -- weights ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_weights_file_fills_the_trunk(resnet18, tmp_path, suffix):
    path, state = tmp_path/f'r18.{suffix}', resnet18.state_dict()
    save_file(state, path) if suffix == 'safetensors' else torch.save(state, path)
    for weights in (path, str(path)):
        trunk = build_backbone({'name': 'deeplabv2', 'arch': 'resnet18', 'weights': weights}).trunk.state_dict()
        assert set(trunk) == {k for k in state if not k.startswith('fc.')}
        assert all(torch.equal(v, state[k]) for k, v in trunk.items())


def test_old_files_without_batch_counters_are_read(resnet18, tmp_path):
    state = {k: v for k, v in resnet18.state_dict().items() if 'num_batches' not in k}
    torch.save(state, tmp_path/'old.pth')
    assert torch.equal(deeplabv2('resnet18', weights=tmp_path/'old.pth').trunk.bn1.bias, state['bn1.bias'])


def test_absent_weights_are_an_error_that_names_the_file(tmp_path):
    for absent in (tmp_path/'absent.pth', tmp_path):
        with pytest.raises(FileNotFoundError, match=absent.name): deeplabv2('resnet18', weights=absent)


@pytest.mark.parametrize('change, words', [
    (lambda s: s.pop('layer3.0.bn1.bias'),                       ['1 missing', 'layer3.0.bn1.bias']),
    (lambda s: s.pop('bn1.running_mean'),                        ['1 missing', 'bn1.running_mean']),
    (lambda s: s.update({'layer9.w': torch.ones(1)}),            ['1 unknown', 'layer9.w']),
    (lambda s: s.update({'conv1.weight': torch.ones(64, 1, 7, 7)}), ['1 of another shape', 'conv1.weight'])])
def test_one_wrong_name_or_shape_is_refused(resnet18, tmp_path, change, words):
    state = dict(resnet18.state_dict()); change(state); torch.save(state, tmp_path/'odd.pth')
    with pytest.raises(ValueError) as e: deeplabv2('resnet18', weights=tmp_path/'odd.pth')
    assert all(w in str(e.value) for w in ['odd.pth', *words])


def test_foreign_file_is_refused_with_few_names(resnet18, tmp_path):
    torch.save({f'module.{k}': v for k, v in resnet18.state_dict().items()}, tmp_path/'parallel.pth')
    with pytest.raises(ValueError, match=r'parallel\.pth.*missing \(conv1\.weight.*module\.conv1\.weight') as e:
        deeplabv2('resnet18', weights=tmp_path/'parallel.pth')
    assert len(str(e.value)) < 400


@pytest.mark.parametrize('name', ['text.pth', 'text.safetensors', 'module.pth', 'list.pth', 'empty.pth'])
def test_files_that_are_no_state_dict_are_refused(tmp_path, name):
    path = tmp_path/name
    if name.startswith('text'): path.write_text('not weights at all')
    elif name == 'empty.pth':   path.touch()
    else: torch.save(nn.Linear(1, 1) if name == 'module.pth' else [torch.ones(1)], path)
    with pytest.raises(ValueError, match=f'{name} is not a plain state dict'): deeplabv2('resnet18', weights=path)


# -- scales -----------------------------------------------------------------------------------------------------------

def test_one_scale_is_the_sum_of_four():
    torch.manual_seed(0)
    stack, total = ASPP(6, 5), ASPP(6, 5, scales=1)
    for c in stack.convs: nn.init.uniform_(c.bias)                # a bias that counts
    total.load_state_dict(stack.state_dict())
    x = torch.randn(2, 6, 30, 26)
    assert torch.allclose(total(x), stack(x).sum(1, keepdim=True), atol=1e-5)


def test_scales_follow_the_order_of_the_rates():
    x = torch.zeros(1, 1, 61, 61); x[..., 30, 30] = 1
    for rates in ((6, 12, 18, 24), (3, 1)):
        maps = ASPP(1, 1, rates, scales=len(rates))(x)[0, :, 0]
        assert [int(m.any(0).nonzero().max()) - 30 for m in maps] == list(rates)


def test_aspp_starts_as_in_deeplabv2():
    torch.manual_seed(0)
    for conv in ASPP(256).convs:
        assert not conv.bias.any() and conv.weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert abs(conv.weight.mean().item()) < 2e-4


@pytest.mark.parametrize('build', [lambda: ASPP(4, scales=2), lambda: unet(4, scales=3), lambda: unet(4, aspp=False)])
def test_impossible_number_of_scales_is_refused(build):
    with pytest.raises(ValueError, match='scales='): build()


# -- U-Net ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('H, W', [(16, 16), (17, 31), (33, 64), (50, 47)])
@pytest.mark.parametrize('options, S', [({}, 4), ({'scales': 1}, 1), ({'scales': 1, 'aspp': False}, 1)])
def test_unet_keeps_any_size(H, W, options, S):
    backbone = unet(width=2, channels=5, **options)
    assert backbone(torch.rand(2, 3, H, W)).shape == (2, S, 5, H, W)
    assert (backbone.scales, backbone.channels, backbone.stride) == (S, 5, 1)
    assert (backbone.aspp is None) == ('aspp' in options)


@pytest.mark.parametrize('H, W', [(15, 64), (64, 15)])
def test_unet_refuses_images_it_cannot_halve(H, W):
    with pytest.raises(ValueError, match=f'{H}×{W}'): unet(width=2)(torch.rand(1, 3, H, W))


def test_unet_has_the_published_number_of_parameters():
    """31,037,698 with two output channels is the count of the well-known U-Net that the papers used."""
    trunk = on_meta(unet, channels=2, aspp=False, scales=1).trunk
    assert sum(p.numel() for p in trunk.parameters()) == 31_037_698


def test_unet_skip_connections_carry_fine_detail():
    """One changed pixel of a flat image must be visible at that pixel, not only in a 16×16 block."""
    torch.manual_seed(0)
    net = unet(width=4, channels=8, aspp=False, scales=1).eval()
    image = torch.full((1, 3, 64, 64), 0.5); dot = image.clone(); dot[..., 21, 40] = 1
    with torch.no_grad(): change = (net(dot) - net(image)).abs().sum((0, 1, 2))
    assert divmod(int(change.argmax()), 64)[0] in (20, 21, 22) and divmod(int(change.argmax()), 64)[1] in (39, 40, 41)


# -- every backbone ---------------------------------------------------------------------------------------------------

SMALL = [{'name': 'deeplabv2', 'arch': 'resnet18', 'channels': 6}, {'name': 'unet', 'width': 2, 'channels': 6}]


@pytest.mark.parametrize('config', SMALL, ids=lambda c: c['name'])
def test_dtype_and_device_follow_the_model(config):
    net = build_backbone(config)
    image = torch.rand(2, 3, 40, 33)
    assert net(image).dtype == torch.float32
    assert net.double()(image.double()).dtype == torch.float64
    assert net.mean.dtype == torch.float64
    assert net.to('meta')(image.double().to('meta')).device.type == 'meta'


@pytest.mark.parametrize('config', SMALL, ids=lambda c: c['name'])
def test_state_dict_rebuilds_the_maps(config):
    torch.manual_seed(0)
    a, b = build_backbone(config).eval(), build_backbone(config | {'mean': [0, 0, 0], 'std': [1, 1, 1]}).eval()
    image = torch.rand(1, 3, 40, 33)
    with torch.no_grad():
        maps = a(image)
        assert not torch.equal(maps, b(image))
        b.load_state_dict(a.state_dict())                     # normalisation is part of the state
        assert torch.equal(maps, b(image)) and torch.equal(maps, a(image))


@pytest.mark.parametrize('config', SMALL, ids=lambda c: c['name'])
def test_normalisation_happens_once_inside(config):
    torch.manual_seed(0)
    net, raw = build_backbone(config).eval(), build_backbone(config | {'mean': (0, 0, 0), 'std': (1, 1, 1)}).eval()
    raw.trunk, raw.aspp = net.trunk, net.aspp
    image = torch.rand(1, 3, 40, 33)
    by_hand = (image - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    with torch.no_grad(): assert torch.allclose(net(image), raw(by_hand), atol=1e-6)


@pytest.mark.parametrize('config', SMALL, ids=lambda c: c['name'])
def test_every_parameter_gets_a_gradient_and_belongs_to_one_part(config):
    net = build_backbone(config)
    net(torch.rand(2, 3, 48, 48)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert {n.split('.')[0] for n, _ in net.named_parameters()} == {'trunk', 'aspp'}


@pytest.mark.parametrize('image', [torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32), torch.zeros(1, 4, 32, 32),
                                   torch.zeros(1, 3, 32, 32, dtype=torch.uint8)])
def test_inputs_that_are_no_batch_of_float_rgb_are_refused(image):
    with pytest.raises(ValueError, match='float images'): unet(width=2)(image)


@pytest.mark.parametrize('config', SMALL, ids=lambda c: c['name'])
def test_frozen_batch_norm_neither_trains_nor_drifts(config):
    net = freeze_batch_norm_(build_backbone(config).train())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(torch.rand(2, 3, 48, 48)).square().mean().backward()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(p.requires_grad for m in norms for p in m.parameters())
    assert net.training and net.aspp.convs[0].weight.grad is not None


# -- registry ---------------------------------------------------------------------------------------------------------

def test_wrong_names_and_options_are_explained():
    with pytest.raises(KeyError, match="unknown backbone 'unett'; did you mean 'unet'"): build_backbone({'name': 'unett'})
    with pytest.raises(KeyError, match="did you mean 'resnet1"): deeplabv2('resnet11')
    with pytest.raises(KeyError, match='deeplabv2, unet'): build_backbone({})
    with pytest.raises(TypeError, match="'unet' has no option 'widht'; its options: width, scales"):
        build_backbone({'name': 'unet', 'widht': 4})


def test_config_is_not_changed_by_building():
    config = {'name': 'unet', 'width': 2}
    build_backbone(config)
    assert config == {'name': 'unet', 'width': 2}


def test_a_backbone_can_be_registered(monkeypatch):
    monkeypatch.setattr('scaleprotoseg.backbones.BACKBONES', dict(BACKBONES))
    register_backbone('tiny')(lambda width=2: unet(width))
    assert build_backbone({'name': 'tiny', 'width': 3}).trunk.out.in_channels == 3
