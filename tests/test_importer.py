"""Checkpoints of the published programs: what is read, what is refused, and that nothing in a file is ever executed.

No published file is used. `published` is a module in the layout of the method's description, with a forward pass of its
own; it is pickled whole and then forgotten, so that reading it cannot import it.
"""
import io
import json
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import scaleprotoseg
from scaleprotoseg import importer
from scaleprotoseg.heads import GroupHead, LinearHead
from scaleprotoseg.importer import Contents, Stub, contents_of, convert, import_checkpoint, read_head, read_pickled
from scaleprotoseg.model import load_model, read_config
from scaleprotoseg.prototypes import Prototypes

T9 = {'rtol': 1e-9, 'atol': 1e-12}
PUBLISHED = '''
import torch
import torch.nn.functional as F
from torch import nn

class ConvBnReLU(nn.Sequential):
    def __init__(self, i, o, k, stride=1, padding=0, dilation=1, relu=True):
        super().__init__()
        self.add_module('conv', nn.Conv2d(i, o, k, stride, padding, dilation, bias=False))
        self.add_module('bn', nn.BatchNorm2d(o))
        if relu: self.add_module('relu', nn.ReLU())

class Bottleneck(nn.Module):
    def __init__(self, i, o, stride, dilation, first):
        super().__init__()
        self.reduce = ConvBnReLU(i, o // 4, 1, stride)
        self.conv3x3 = ConvBnReLU(o // 4, o // 4, 3, 1, dilation, dilation)
        self.increase = ConvBnReLU(o // 4, o, 1, relu=False)
        if first: self.shortcut = ConvBnReLU(i, o, 1, stride, relu=False)
    def forward(self, x):
        return F.relu(self.increase(self.conv3x3(self.reduce(x))) + (self.shortcut(x) if hasattr(self, 'shortcut') else x))

class Base(nn.Module):
    def __init__(self, blocks, channels, is_sum):
        super().__init__()
        self.is_sum = is_sum
        self.layer1 = nn.Sequential()
        self.layer1.add_module('conv1', ConvBnReLU(3, 64, 7, 2, 3))
        self.layer1.add_module('pool', nn.MaxPool2d(3, 2, 1, ceil_mode=True))
        plan = zip((64, 256, 512, 1024), (256, 512, 1024, 2048), (1, 2, 1, 1), (1, 1, 2, 4), blocks)
        for g, (i, o, stride, dilation, n) in enumerate(plan, 2):
            group = nn.Sequential()
            for b in range(n): group.add_module(f'block{b + 1}', Bottleneck(i if b == 0 else o, o, stride if b == 0 else 1, dilation, b == 0))
            self.add_module(f'layer{g}', group)
        self.aspp = nn.Module()
        for b, rate in enumerate((6, 12, 18, 24)): self.aspp.add_module(f'c{b}', nn.Conv2d(2048, channels, 3, 1, rate, rate))
    def forward(self, x):
        for g in range(1, 6): x = getattr(self, f'layer{g}')(x)
        maps = [conv(x) for conv in self.aspp.children()]
        return sum(maps) if self.is_sum else torch.cat(maps, 1)

class MSC(nn.Module):
    def __init__(self, base, scales): super().__init__(); self.base = base; self.scales = scales
    def forward(self, x):
        full = self.base(x)
        for s in self.scales:
            small = self.base(F.interpolate(x, scale_factor=s, mode='bilinear', align_corners=False))
            full = torch.maximum(full, F.interpolate(small, full.shape[-2:], mode='bilinear', align_corners=False))
        return full

class DoubleConv(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.double_conv = nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(),
                                         nn.Conv2d(o, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    def forward(self, x): return self.double_conv(x)

class Up(nn.Module):
    def __init__(self, i, o): super().__init__(); self.up = nn.ConvTranspose2d(i, o, 2, 2); self.conv = DoubleConv(i, o)
    def forward(self, x, skip): return self.conv(torch.cat([skip, self.up(x)], 1))

class UNet(nn.Module):
    def __init__(self, width, channels, has_aspp, is_sum):
        super().__init__()
        self.is_sum, w = is_sum, [width * 2 ** i for i in range(5)]
        self.inc = DoubleConv(3, w[0])
        for i in range(4): self.add_module(f'down{i + 1}', nn.Sequential(nn.MaxPool2d(2), DoubleConv(w[i], w[i + 1])))
        for i in range(4): self.add_module(f'up{i + 1}', Up(w[4 - i], w[3 - i]))
        self.outc = nn.Conv2d(width, channels, 1)
        if has_aspp:
            self.aspp = nn.Module()
            for b, r in enumerate((6, 12, 18, 24)): self.aspp.add_module(f'c{b}', nn.Conv2d(channels, channels, 3, 1, r, r))
    def forward(self, x):
        skips = [self.inc(x)]
        for i in range(4): skips.append(getattr(self, f'down{i + 1}')(skips[-1]))
        x = skips.pop()
        for i in range(4): x = getattr(self, f'up{i + 1}')(x, skips.pop())
        x = self.outc(x)
        if not hasattr(self, 'aspp'): return x
        maps = [conv(x) for conv in self.aspp.children()]
        return sum(maps) if self.is_sum else torch.cat(maps, 1)

class PPNet(nn.Module):
    def __init__(self, features, vectors, identity, ranges, last, groups=None, first_last=None):
        super().__init__()
        self.features = features
        self.prototype_vectors = nn.Parameter(vectors[:, :, None, None])
        self.ones = nn.Parameter(torch.ones_like(self.prototype_vectors), requires_grad=False)
        self.prototype_class_identity, self.epsilon, self.prototype_activation_function = identity, 1e-4, 'log'
        if ranges: self.scale_num_prototypes = ranges
        def linear(w): m = nn.Linear(*w.shape[::-1], bias=False, dtype=w.dtype); m.weight.data.copy_(w); return m
        if first_last is not None: self.last_layer = linear(first_last)
        if groups is not None: self.group_projection = nn.ModuleList(map(linear, groups))
        self.add_module('last_layer' if first_last is None else 'last_layer_group', linear(last))
        self.add_on_layers = nn.Sequential(nn.Sigmoid())

    def forward(self, x):
        """The formulas, one prototype at a time. Logits (B, h, w, C)."""
        z = self.add_on_layers(self.features(x))
        D = self.prototype_vectors.shape[1]
        ranges = getattr(self, 'scale_num_prototypes', None) or {0: (0, len(self.prototype_vectors))}
        similarity = []
        for s, (start, end) in ranges.items():
            for p in range(start, end):
                d = ((z[:, s * D:(s + 1) * D] - self.prototype_vectors[p]) ** 2).sum(1)
                similarity.append(torch.log((d + 1) / (d + self.epsilon)))
        a = torch.stack(similarity, -1)
        if not hasattr(self, 'group_projection'): return self.last_layer(a)
        of = self.prototype_class_identity
        present = [c for c in range(of.shape[1]) if of[:, c].any()]
        u = [layer(a[..., of[:, c] == 1]).exp() for c, layer in zip(present, self.group_projection)]
        last = self.last_layer_group if hasattr(self, 'last_layer_group') else self.last_layer
        return last(torch.cat(u, -1))
'''
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture
def published():
    "The stand-in for the published code; afterwards, and in `saved` while reading, nobody can import it."
    module = types.ModuleType('segmentation_standin')
    exec(PUBLISHED, module.__dict__)
    for v in vars(module).values():
        if isinstance(v, type): v.__module__ = 'segmentation_standin'
    sys.modules['segmentation_standin'] = module
    yield module
    sys.modules.pop('segmentation_standin', None)


def saved(net, path: Path, **options) -> Path:
    "Pickle the whole module and make its classes unavailable."
    torch.save(net, path, **options)
    sys.modules.pop('segmentation_standin', None)
    with pytest.raises(ModuleNotFoundError): torch.load(path, weights_only=False)
    return path


def shaken(net, seed=0):
    "Random weights everywhere, statistics of batch norm included, so that two exchanged tensors cannot pass."
    g = torch.Generator().manual_seed(seed)
    for name, t in [*net.named_parameters(), *net.named_buffers()]:
        if not t.is_floating_point() or t.ndim == 4: continue
        t.data = torch.rand(t.shape, generator=g) * .5 + .5 if name.endswith(('weight', 'var')) else torch.randn(t.shape, generator=g) * .1
    return net.eval()


def rows(seed=0, S=4, C=3, K=2, D=6, dropped=(), G=0):
    "Prototypes as rows, some removed, with class identity, ranges, a last layer, and groups."
    g = torch.Generator().manual_seed(seed)
    kept = torch.tensor([p for p in range(S * C * K) if p not in dropped])
    classes, scale = kept // K % C, kept // (C * K)
    edges = [0, *torch.bincount(scale, minlength=S).cumsum(0).tolist()]
    made = dict(vectors=torch.rand(len(kept), D, generator=g), identity=F.one_hot(classes, C).float(),
                ranges={s: (edges[s], edges[s + 1]) for s in range(S)} if S > 1 else None)
    if not G: return made | dict(last=torch.randn(C, len(kept), generator=g))
    counts = [n for n in torch.bincount(classes, minlength=C).tolist() if n]
    return made | dict(last=torch.randn(C, G * len(counts), generator=g), first_last=torch.randn(C, len(kept), generator=g),
                       groups=[torch.rand(G, n, generator=g) / n for n in counts])


GONE = (1, 4, 5, 8, 9, 14, 15, 20, 21, 23)      # class 1 entirely (of 3 classes, 2 a scale) but one row, and others
NO_CLASS_1 = tuple(p for p in range(24) if p // 2 % 3 == 1) + (4, 23)


# -- equal outputs ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('made', [rows(S=1, K=5), rows(S=1, K=5, dropped=(2, 3, 9)), rows(), rows(dropped=GONE), rows(G=3),
                                  rows(dropped=GONE, G=3), rows(dropped=NO_CLASS_1, G=2)],
                         ids=['protoseg', 'protoseg pruned', 'scales', 'scales deduplicated', 'groups', 'groups deduplicated',
                              'groups without class 1'])
@pytest.mark.parametrize('new_format', [True, False])
def test_an_imported_unet_gives_the_same_logits(published, tmp_path, made, new_format):
    torch.manual_seed(0)
    net = published.PPNet(shaken(published.UNet(4, 6, True, made['ranges'] is None)), **made).eval()
    image = torch.rand(1, 3, 32, 48)
    with torch.no_grad(): want = net((image - MEAN) / STD)
    path = saved(net, tmp_path / 'net.pth', _use_new_zipfile_serialization=new_format)
    folder = import_checkpoint(path, tmp_path / 'imported')
    model = load_model(folder)
    with torch.no_grad(): got = model(image).logits.movedim(1, -1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert int(model.prototypes.alive.sum()) == len(made['vectors'])
    assert isinstance(model.head, GroupHead if 'groups' in made else LinearHead)


@pytest.mark.parametrize('scales, made', [((0.5, 0.75), rows(dropped=GONE, G=3)), ((), rows(S=1, K=5))], ids=['pascal', 'protoseg'])
def test_an_imported_deeplab_gives_the_same_logits(published, tmp_path, scales, made):
    torch.manual_seed(0)
    net = shaken(published.MSC(published.Base((3, 4, 6, 3), 6, made['ranges'] is None), list(scales)))
    net = published.PPNet(net, **made).eval()
    for conv in net.features.base.aspp.children(): nn.init.normal_(conv.weight, std=1e-3)
    image = torch.rand(1, 3, 65, 81)
    with torch.no_grad(): want = net((image - MEAN) / STD)
    folder = import_checkpoint(saved(net, tmp_path / 'net.pth'), tmp_path / 'imported', labels=['a', 'b', 'c'])
    config = read_config(folder)
    assert config['backbone'] == dict(name='deeplabv2', arch='resnet50', stride_in_1x1=True, rates=[6, 12, 18, 24], inputs=list(scales))
    with torch.no_grad(): got = load_model(folder)(image).logits.movedim(1, -1)
    assert want.std() > 1e-2
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_resnet101_in_full_size(published, tmp_path):
    torch.manual_seed(0)
    net = published.PPNet(shaken(published.MSC(published.Base((3, 4, 23, 3), 64, False), [])), **rows(C=19, K=3, D=64, G=3)).eval()
    path = saved(net, tmp_path / 'net.pth')
    folder = import_checkpoint(path, tmp_path / 'imported', labels='cityscapes')
    assert read_config(folder)['backbone']['arch'] == 'resnet101' and len(load_model(folder).backbone.state_dict()) > 500


def test_a_plain_unet_keeps_its_own_normalisation(published, tmp_path):
    torch.manual_seed(0)
    net = published.PPNet(shaken(published.UNet(4, 6, False, True)), **rows(S=1, C=2, K=4)).eval()
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad(): want = net((image - .5) / .25)
    folder = import_checkpoint(saved(net, tmp_path / 'net.pth'), tmp_path / 'imported', labels='em',
                               backbone=dict(mean=[.5] * 3, std=[.25] * 3))
    assert read_config(folder)['labels']['names'] == ['membrane', 'cell']
    with torch.no_grad(): torch.testing.assert_close(load_model(folder)(image).logits.movedim(1, -1), want, rtol=1e-4, atol=1e-4)


# -- golden vectors ---------------------------------------------------------------------------------------------------

S, C, K, G = 4, 5, 3, 3


def pickled_head(path, vectors, identity, ranges, last, groups=None) -> Contents:
    "A module that has a head and nothing else, saved and read again; float64 stays float64."
    net = nn.Module()
    net.prototype_vectors = nn.Parameter(torch.from_numpy(vectors)[:, :, None, None])
    net.prototype_class_identity = torch.from_numpy(identity)
    if ranges is not None: net.scale_num_prototypes = ranges
    net.last_layer = nn.Linear(*last.shape[::-1], bias=False)
    net.last_layer.weight = nn.Parameter(torch.from_numpy(last))
    if groups is not None: net.group_projection = nn.ModuleList(_linear(w) for w in groups)
    torch.save(net, path)
    return contents_of(read_pickled(path))


def _linear(w):
    layer = nn.Linear(*w.shape[::-1], bias=False)
    layer.weight = nn.Parameter(torch.from_numpy(w))
    return layer


def our_head(found, branches=S):
    "Our modules with the imported numbers, in float64."
    head = read_head(found, branches)
    scales, classes, per_class, channels = head.vectors.shape
    prototypes = Prototypes(scales, classes, per_class, channels).double()
    prototypes.vectors.data, prototypes.alive = head.vectors, head.alive
    if head.groups is None:
        module = LinearHead(scales, classes, per_class).double()
        module.weight.data = head.last
    else:
        module = GroupHead(scales, classes, per_class, head.groups.shape[1]).double()
        module.weights.data, module.last.data = head.groups, head.last
    assert head.vectors.dtype == torch.float64
    return prototypes, module


def logits_of(prototypes, module, features, scales=S):
    _, similarities = prototypes(torch.from_numpy(features).unflatten(1, (scales, -1)))
    return module(similarities, prototypes.alive)[0].movedim(1, -1).detach().numpy()


FULL = {s: (15 * s, 15 * s + 15) for s in range(S)}


@pytest.mark.parametrize('ranges', [FULL, None], ids=['ranges', 'ranges from the order'])
def test_golden_linear_logits(golden, tmp_path, ranges):
    g = golden('head')
    found = pickled_head(tmp_path / 'x.pth', g['prototypes'], g['class_identity'], ranges, g['stage1_last_weight'])
    np.testing.assert_allclose(logits_of(*our_head(found), g['features']), g['stage1_logits'], rtol=0, atol=1e-8)


def test_golden_grouped_logits(golden, tmp_path):
    g = golden('head')
    found = pickled_head(tmp_path / 'x.pth', g['prototypes'], g['class_identity'], FULL, g['group_last_weight'], list(g['group_weights']))
    np.testing.assert_allclose(logits_of(*our_head(found), g['features']), g['grouped_logits'], rtol=1e-8, atol=1e-12)


def pruned(g):
    kept = np.setdiff1d(np.arange(S * C * K), g['pruned_dropped'])
    return g['prototypes'][kept], g['pruned_class_identity'], torch.from_numpy(g['pruned_scale_ranges'])


def test_golden_linear_logits_of_removed_rows(golden, tmp_path):
    g = golden('head')
    found = pickled_head(tmp_path / 'x.pth', *pruned(g), g['pruned_stage1_last_weight'])
    prototypes, module = our_head(found)
    assert int(prototypes.alive.sum()) == 43 and not prototypes.alive[:, 2].any() and prototypes.alive[1, 0].tolist() == [True, False, False]
    np.testing.assert_allclose(logits_of(prototypes, module, g['features']), g['pruned_stage1_logits'], rtol=0, atol=1e-8)


def test_golden_grouped_logits_without_a_class(golden, tmp_path):
    g = golden('head')
    groups = [g[f'pruned_group_weight_class{c}'] for c in (0, 1, 3, 4)]
    found = pickled_head(tmp_path / 'x.pth', *pruned(g), g['pruned_group_last_weight'], groups)
    np.testing.assert_allclose(logits_of(*our_head(found), g['features']), g['pruned_grouped_logits'], rtol=1e-8, atol=1e-12)


def test_golden_single_scale(golden, tmp_path):
    g = golden('head')
    found = pickled_head(tmp_path / 'x.pth', g['single_prototypes'], g['single_class_identity'], None, g['single_last_weight'])
    got = logits_of(*our_head(found), g['single_features'], 1)
    np.testing.assert_allclose(got, g['single_logits'], rtol=0, atol=1e-8)


# -- the imported folder ----------------------------------------------------------------------------------------------

@pytest.fixture
def small(published, tmp_path) -> Path:
    torch.manual_seed(0)
    return saved(published.PPNet(shaken(published.UNet(4, 6, True, False)), **rows(dropped=NO_CLASS_1, G=2)), tmp_path / 'small.pth')


def test_the_folder_opens_like_a_trained_run(small, tmp_path):
    folder = import_checkpoint(small, tmp_path / 'runs' / 'imported')
    assert folder == tmp_path / 'runs' / 'imported' and not [p for p in folder.parent.iterdir() if p != folder]
    model = scaleprotoseg.load(folder)
    assert model.labels.names == ('class 0', 'class 1', 'class 2')
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    label = model.predict(image)
    assert label.shape == (40, 50) and label.max() <= 2
    why = model.explain(image, at=(3, 4))
    assert abs(sum(e.contribution for e in why.evidence) - why.logit) < 1e-3
    assert not [e for e in why.evidence if e.cls == 1], 'class 1 has no prototypes'
    assert json.loads((folder / 'metrics.json').read_text())['prototypes']['alive'] == 14
    provenance = json.loads((folder / 'provenance.json').read_text())
    assert provenance['file'] == 'small.pth' and len(provenance['sha256']) == 64 and str(tmp_path) not in json.dumps(provenance)


def test_nothing_is_overwritten_and_nothing_is_left_after_an_error(small, tmp_path):
    (tmp_path / 'taken').mkdir()
    with pytest.raises(FileExistsError, match='taken exists'): import_checkpoint(small, tmp_path / 'taken')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match='3 classes, the labels 19'): import_checkpoint(small, tmp_path / 'new', labels='cityscapes')
    with pytest.raises(KeyError, match='cityscapes'): import_checkpoint(small, tmp_path / 'new', labels='citiscapes')
    assert sorted(tmp_path.iterdir()) == before


def test_a_failing_disk_leaves_no_folder(small, tmp_path, monkeypatch):
    def full(*a): raise OSError('No space left on device')
    monkeypatch.setattr(importer, 'save_sheet', full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match='space'): import_checkpoint(small, tmp_path / 'new')
    assert sorted(tmp_path.iterdir()) == before


# -- files that are something else ------------------------------------------------------------------------------------

@pytest.mark.parametrize('write, expected', [
    (lambda p: p.write_bytes(b''), 'empty'),
    (lambda p: p.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(500)), 'not a complete checkpoint of torch.save'),
    (lambda p: p.write_text('hello'), 'not a complete checkpoint of torch.save'),
    (lambda p: p.write_bytes(pickle.dumps([1, 2])), 'not written by torch.save'),
    (lambda p: torch.save(nn.Linear(2, 3).state_dict(), p), 'a plain state dict lacks'),
    (lambda p: torch.save({'epoch': 3, 'state_dict': {}}, p), 'epoch, state_dict'),
    (lambda p: torch.save([torch.ones(2)], p), 'no pickled module'),
    (lambda p: torch.save(nn.Linear(2, 3), p), "no 'prototypes' named prototype_vectors"),
    (lambda p: zipfile.ZipFile(p, 'w').writestr('a.txt', 'hello'), 'data.pkl'),
    (lambda p: torch.jit.script(nn.Linear(2, 3)).save(p), 'TorchScript'),
])
def test_another_kind_of_file_is_named_and_refused(tmp_path, write, expected):
    path = tmp_path / 'odd.pth'
    write(path)
    with pytest.raises(ValueError, match='(?i)' + expected) as e: import_checkpoint(path, tmp_path / 'out')
    assert 'odd.pth' in str(e.value) and not (tmp_path / 'out').exists()


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.pth'): read_pickled(tmp_path / 'nowhere.pth')


@pytest.mark.parametrize('new_format', [True, False])
def test_a_cut_file_is_named(tmp_path, new_format):
    torch.save(nn.Linear(20, 30), tmp_path / 'whole.pth', _use_new_zipfile_serialization=new_format)
    whole = (tmp_path / 'whole.pth').read_bytes()
    for n in range(0, len(whole) - 1, 97):
        (tmp_path / 'cut.pth').write_bytes(whole[:n])
        with pytest.raises(ValueError, match='cut.pth is not a complete checkpoint'): read_pickled(tmp_path / 'cut.pth')


@pytest.fixture(scope='module')
def wholes(tmp_path_factory) -> list[bytes]:
    folder = tmp_path_factory.mktemp('wholes')
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    for new in (True, False): torch.save(net, folder / str(new), _use_new_zipfile_serialization=new)
    return [(folder / str(new)).read_bytes() for new in (True, False)]


def test_an_entry_before_the_file_is_refused(wholes, tmp_path):
    "A changed offset in the directory of the archive; seeking there would fail with an error of the system."
    data = bytearray(wholes[0])
    at = data.rindex(b'PK\x06\x06') + 48                     # where the directory starts, in its zip64 record
    data[at:at + 8] = (int.from_bytes(data[at:at + 8], 'little') + 10**6).to_bytes(8, 'little')
    (tmp_path / 'odd.pth').write_bytes(data)
    with pytest.raises(ValueError, match='odd.pth is not a complete checkpoint'): read_pickled(tmp_path / 'odd.pth')


@settings(max_examples=300, deadline=None)
@given(which=st.booleans(), changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_give_data_or_a_clear_error(wholes, tmp_path_factory, which, changes):
    data = bytearray(wholes[which])
    for at, value in changes: data[int(at * len(data))] = value
    path = tmp_path_factory.getbasetemp() / 'changed.pth'
    path.write_bytes(data)
    try: read_pickled(path)
    except ValueError as e: assert 'changed.pth' in str(e)


# -- modules that do not fit ------------------------------------------------------------------------------------------

def head_of(**changes) -> Contents:
    made = rows(dropped=NO_CLASS_1, G=2)
    tensors = {'prototype_vectors': made['vectors'][:, :, None, None], 'last_layer.weight': made['last'],
               **{f'group_projection.{i}.weight': w for i, w in enumerate(made['groups'])}}
    found = Contents(tensors, {'prototype_class_identity': made['identity'], 'scale_num_prototypes': made['ranges']}, 'x.pth')
    for k, v in changes.items():
        k = k.replace('__', '.')
        (found.tensors if k in found.tensors else found.attributes)[k] = v
    return found


@pytest.mark.parametrize('changes, expected', [
    (dict(prototype_class_identity=torch.rand(14, 3)), "no 'identity'"),
    (dict(prototype_class_identity=torch.eye(3)[torch.tensor([0] * 7 + [2, 0] * 3 + [2])]), 'within a scale'),
    (dict(group_projection__1__weight=torch.rand(2, 5)), 'should be as many group weights'),
    (dict(group_projection__1__weight=torch.rand(3, 7)), 'should be as many group weights'),
    (dict(last_layer__weight=torch.rand(3, 5)), r'a last layer \(3, 2 G\)'),
])
def test_a_head_that_does_not_fit_lists_what_was_found(changes, expected):
    read_head(head_of(), 4)
    with pytest.raises(ValueError, match=expected) as e: read_head(head_of(**changes), 4)
    assert 'x.pth' in str(e.value) and 'Found' in str(e.value) and 'prototype_vectors (14, 6, 1, 1)' in str(e.value)


def test_wrong_ranges_are_not_believed():
    found = head_of()
    good = read_head(found, 4)
    found.attributes['scale_num_prototypes'] = {0: (0, 5), 1: (5, 9), 2: (9, 11), 3: (11, 14)}
    with pytest.raises(ValueError, match='not ordered by class'): read_head(found, 4)
    found.attributes['scale_num_prototypes'] = None       # no ranges: the order of the classes shows them
    assert torch.equal(read_head(found, 4).vectors, good.vectors)
    with pytest.raises(ValueError, match='does not show them'): read_head(found, 3)


def test_names_can_be_given():
    found = head_of()
    found.tensors = {k.replace('prototype_vectors', 'a').replace('group_projection', 'b').replace('last_layer', 'c'): v
                     for k, v in found.tensors.items()}
    found.tensors['d'] = torch.rand(14, 9, 1, 1)
    with pytest.raises(ValueError, match="several fit: a, d; name it with names="): read_head(found, 4)
    assert read_head(found, 4, {'prototypes': 'a'}).vectors.shape[-1] == 6
    assert read_head(found, 4, {'prototypes': ('d',), 'groups': ('b',), 'last': ('c.weight',)}).vectors.shape[-1] == 9
    with pytest.raises(KeyError, match="did you mean 'groups'"): read_head(found, 4, {'group': 'b'})


def whole(published, **changes) -> Contents:
    torch.manual_seed(0)
    net = published.PPNet(published.UNet(4, 6, True, False), **rows())
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    attributes = {'prototype_class_identity': net.prototype_class_identity, 'scale_num_prototypes': net.scale_num_prototypes}
    for name, m in net.named_modules():
        attributes.update({f'{name}.{k}': getattr(m, k) for k in ('kernel_size', 'num_features', 'dilation', 'stride') if hasattr(m, k)})
    ordered = {k: v for k, v in net.state_dict(keep_vars=True).items()}
    return Contents({k: tensors[k] for k in ordered}, {**attributes, **changes}, 'x.pth')


def test_what_has_no_place_is_an_error(published):
    model, config = convert(whole(published))
    assert config['scales'] == 4 and config['backbone']['width'] == 4
    found = whole(published)
    found.tensors['scale_head.weight'] = torch.rand(3, 3, 3)
    with pytest.raises(ValueError, match=r'1 tensors have no place in our model: scale_head.weight'): convert(found)
    convert(found, names={'ignored': ('scale_head.weight',)})
    found = whole(published)
    found.tensors['last_layer.weight'] = found.tensors['last_layer.weight'] * float('nan')
    with pytest.raises(ValueError, match='head.weight is not finite'): convert(found)


@pytest.mark.parametrize('changes, expected', [(dict(epsilon=1e-3), 'epsilon is 0.001'), (dict(prototype_activation_function='linear'), 'linear'),
                                               (dict(scale_num_prototypes={0: (0, 24)}), None)])
def test_another_similarity_is_refused(published, changes, expected):
    found = whole(published, **changes)
    if expected is None:     # one range for rows that are ordered by scale
        with pytest.raises(ValueError, match='not ordered by class'): convert(found)
    else:
        with pytest.raises(ValueError, match=expected): convert(found)


def test_a_strange_backbone_is_refused(published):
    found = whole(published)
    found.tensors = {k: v for k, v in found.tensors.items() if not k.startswith('features.up4')}
    with pytest.raises(ValueError, match='neither the DeepLabv2'): convert(found)


def test_input_scales_must_be_known():
    found = Contents({'features.layer2.block1.reduce.conv.weight': torch.rand(1, 1, 1, 1)}, {}, 'x.pth')
    with pytest.raises(ValueError, match='give inputs'): importer.find_inputs(found, None, importer.NAMES)
    assert importer.find_inputs(found, (0.5,), importer.NAMES) == [0.5]
    found.attributes['features.scales'] = [0.5, 0.75, 1.0]
    assert importer.find_inputs(found, None, importer.NAMES) == [0.5, 0.75]


# -- nothing is executed ----------------------------------------------------------------------------------------------

EVENTS = ('os.', 'subprocess.', 'shutil.', 'exec', 'compile', 'import', 'pickle.', 'socket.', 'ctypes.', 'urllib.', 'open', 'code.')
_watch = {'on': False, 'seen': []}


def _hook(event, args):
    if _watch['on'] and event.startswith(EVENTS): _watch['seen'].append((event, str(args)[:100]))


sys.addaudithook(_hook)     # the interpreter reports every import, call of exec, new process, opened file; it cannot be removed


class Watched:
    "Everything that Python itself reports while reading one file, but the opening of that file."
    def __init__(self, path): self.path = path

    def __enter__(self): _watch.update(on=True, seen=[]); return self

    def __exit__(self, *_):
        _watch['on'] = False
        self.seen = [e for e in _watch['seen'] if not (e[0] == 'open' and str(self.path) in e[1])]


class Attack:
    "Pickled as a call of `kind`."
    def __init__(self, kind, *args, state=None): self.parts = (kind, args) if state is None else (kind, args, state)

    def __reduce__(self): return self.parts


def attacks(mark: Path):
    touch = f"open({str(mark)!r}, 'w').close()"
    yield 'os.system', Attack(os.system, f'touch {mark}')
    yield 'subprocess', Attack(__import__('subprocess').Popen, ['touch', str(mark)])
    yield 'exec', Attack(exec, touch)
    yield 'eval', Attack(eval, touch)
    yield 'compile', Attack(eval, Attack(compile, touch, 'x', 'exec'))
    yield 'import', Attack(__import__, 'hostile_standin')
    yield 'importlib', Attack(__import__('importlib').import_module, 'hostile_standin')
    yield 'runpy', Attack(__import__('runpy').run_module, 'hostile_standin')
    yield 'getattr chain', Attack(getattr, Attack(__import__, 'os'), 'system')
    yield 'called getattr', Attack(Attack, Attack(getattr, Attack(__import__, 'os'), 'system'), f'touch {mark}')
    yield 'partial', Attack(__import__('functools').partial, os.system, f'touch {mark}')
    yield 'map', Attack(list, Attack(map, os.system, [f'touch {mark}']))
    yield 'open', Attack(open, str(mark), 'w')
    yield 'jit', Attack(torch.jit.load, str(mark))
    yield 'torch.load', Attack(torch.load, str(mark))
    yield 'numpy', np.array([Attack(os.system, f'touch {mark}')], dtype=object)
    yield 'numpy file', Attack(np.load, str(mark))
    yield 'in a list', [[{'a': (Attack(os.system, f'touch {mark}'),)}]]
    yield 'as a key', {Attack(os.system, f'touch {mark}'): 1}
    yield 'in a state', Attack(dict, state={'x': Attack(os.system, f'touch {mark}')})
    yield 'in a module', _hostile_module(mark)


def _hostile_module(mark):
    net = nn.Linear(2, 2)
    net.extra = Attack(os.system, f'touch {mark}')
    net.register_forward_pre_hook(print)
    net.bias.hostile = Attack(exec, '1/0')
    return net


@pytest.mark.parametrize('i', range(21), ids=[name for name, _ in attacks(Path('mark'))])
@pytest.mark.parametrize('new_format', [True, False])
def test_a_hostile_file_is_only_read(tmp_path, monkeypatch, i, new_format):
    (tmp_path / 'hostile_standin.py').write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    path, mark = tmp_path / 'x.pth', tmp_path / 'mark'
    torch.save(list(attacks(mark))[i][1], path, _use_new_zipfile_serialization=new_format)
    modules = set(sys.modules)
    with Watched(path) as w: content = read_pickled(path)
    assert not w.seen and set(sys.modules) == modules and not mark.exists()
    assert only_inert(content)


def only_inert(x) -> bool:
    if isinstance(x, Stub): return only_inert(x.kind) and only_inert(x.args) and only_inert(x.state)
    if isinstance(x, dict): return all(only_inert(k) and only_inert(v) for k, v in x.items())
    if isinstance(x, (list, tuple, set)): return all(map(only_inert, x))
    return isinstance(x, (importer.Global, torch.Tensor, str, bytes, int, float, type(None)))


def test_the_watch_would_have_seen_it(tmp_path):
    "The same file, opened as its authors open theirs."
    path = tmp_path / 'x.pth'
    torch.save(Attack(os.system, f'touch {tmp_path / "mark"}'), path)
    with Watched(path) as w: torch.load(path, weights_only=False)
    assert (tmp_path / 'mark').exists() and any(e[0] == 'os.system' for e in w.seen)


def archive(path: Path, program: bytes, **files: bytes) -> Path:
    "A checkpoint whose pickle is written by hand."
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('x/data.pkl', program)
        for name, data in files.items(): z.writestr(f'x/data/{name}', data)
    return path


FLOATS = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"    # a storage of 2 values
VIEW = b'ctorch._utils\n_rebuild_tensor_v2\n'


@pytest.mark.parametrize('program, expected', [
    (b'cos\nsystem\n}X\x08\x00\x00\x00__code__K\x01sb.', 'a state for Global os.system'),      # attributes of a function
    (VIEW + b'}X\x0c\x00\x00\x00__defaults__)sb.', 'a state for Global'),                       # … of one that torch has
    (b'\x82\x01.', 'EXT1'), (b'\x97.', 'NEXT_BUFFER'), (b'P0\n.', 'protocol 0'),
    (b'(X\x01\x00\x00\x00xcos\nsystem\ntQ.', 'not a storage'),
    (b'cos\nsystem\nQ.', 'not a storage'),
    (b"(X\x07\x00\x00\x00storagecos\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ.", 'unknown type os.FloatStorage'),
    (b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x0d\x00\x00\x00../../secretsX\x03\x00\x00\x00cpuK\x02tQ.", 'missing'),
    (FLOATS.replace(b'K\x02', b'J\xff\xff\xff\x7f') + b'.', 'does not hold'),
    (VIEW + b'(' + FLOATS + b'K\x00(K\x03t(K\x01t\x89}tR.', 'beyond its storage'),
    (VIEW + b'(' + FLOATS + b'K\x00(J\xff\xff\xff\x7ft(K\x00t\x89}tR.', 'beyond its storage'),     # one value, 2**31 times
    (VIEW + b'(' + FLOATS + b'K\x00(J\xff\xff\xff\xfft(K\x01t\x89}tR.', 'integers >= 0'),
    (VIEW + b'(cos\nsystem\nK\x00(K\x01t(K\x01t\x89}tR.', 'without a storage'),
    (b'}' + b'))\x86q\x000' + b'h\x00h\x00\x86q\x000' * 60 + b'h\x00K\x01s.', 'tuple as a key'),   # 2**60 members
    (b'\x8a\x01', 'not a complete'), (b'K', 'not a complete'), (b'0.', 'damaged'), (b'h\x07.', 'damaged'),
    (b'cos\nsystem\nK\x01R.', 'without a tuple'), (b'(K\x01K\x02K\x03d.', 'not a complete'), (b'K\x01K\x02a.', 'damaged'),
    (b'ccollections\nOrderedDict\n(K\x01tR.', 'damaged'),
])
def test_a_program_that_is_not_allowed_is_refused(tmp_path, program, expected):
    path = archive(tmp_path / 'x.pth', program, **{'0': np.ones(2, np.float32).tobytes()})
    modules = set(sys.modules)
    with Watched(path) as w, pytest.raises(ValueError, match=expected) as e: read_pickled(path)
    assert 'x.pth' in str(e.value) and not w.seen and set(sys.modules) == modules


def test_the_hand_written_view_is_right(tmp_path):
    path = archive(tmp_path / 'x.pth', VIEW + b'(' + FLOATS + b'K\x01(K\x01t(K\x01t\x89}tR.', **{'0': np.array([5, 7], np.float32).tobytes()})
    assert read_pickled(path).tolist() == [7]


def test_a_compressed_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'x.pth', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('x/data.pkl', FLOATS + b'.')
        z.writestr('x/data/0', bytes(8))
    with pytest.raises(ValueError, match='data.pkl is compressed'): read_pickled(tmp_path / 'x.pth')


def test_deep_nesting_is_no_problem(tmp_path):
    "A module in a module in a module …, deeper than Python's stack."
    link = b"X\x01\x00\x00\x00m"
    program = b''.join(b'cm\nM\n)\x81}X\x08\x00\x00\x00_modules}' + link for _ in range(5000)) + b'N' + b'ssb' * 5000 + b'.'
    found = contents_of(read_pickled(archive(tmp_path / 'x.pth', program)))
    assert found.tensors == {} and found.attributes == {}


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
                    lambda x: st.lists(x) | st.dictionaries(st.text() | st.integers(), x) | st.tuples(x, x), max_leaves=20),
       st.integers(2, 5))
def test_plain_data_comes_back_as_it_was(data, protocol):
    assert importer.Interpreter(None).read(io.BytesIO(pickle.dumps(data, protocol))) == data


def test_every_type_and_view_of_a_tensor_comes_back(tmp_path):
    base = torch.arange(24.).view(2, 3, 4)
    tensors = {'view': base[:, 1:, ::2], 'transposed': base.T if base.ndim == 2 else base.mT, 'empty': torch.empty(0, 3),
               'scalar': torch.tensor(3), 'parameter': nn.Parameter(base), **{str(t): torch.ones(3).to(t) for t in set(importer.DTYPES.values())}}
    for new in (True, False):
        torch.save(tensors, tmp_path / 'x.pth', _use_new_zipfile_serialization=new)
        got = read_pickled(tmp_path / 'x.pth')
        for k, v in tensors.items(): assert torch.equal(got[k], v) and got[k].dtype == v.dtype, k


def test_odd_modules_are_no_crash(tmp_path):
    "Stubs of stubs, containers of other kinds where a module has dictionaries, ranges that are none."
    deep = b'cm\nM\n' + b')R' * 3000
    with pytest.raises(ValueError, match='no pickled module'): contents_of(read_pickled(archive(tmp_path / 'deep.pth', deep + b'.')))
    net = nn.Linear(2, 2)
    net.ranges, net.zero, net.mixed = [torch.tensor(3)], torch.tensor(1), {0: (1, 2), 'a': 3}
    net.__dict__['_buffers'] = ['x']
    torch.save(net, tmp_path / 'odd.pth')
    found = contents_of(read_pickled(tmp_path / 'odd.pth'))
    assert list(found.tensors) == ['weight', 'bias']
    assert [importer.as_ranges(found.attributes[k]) for k in ('ranges', 'zero', 'mixed')] == [None] * 3


def test_a_shared_module_keeps_its_first_name(tmp_path):
    net = nn.ModuleDict({'a': nn.Linear(1, 1), 'b': nn.ModuleList()})
    net['b'].append(net['a'])
    torch.save(net, tmp_path / 'x.pth')
    assert list(contents_of(read_pickled(tmp_path / 'x.pth')).tensors) == ['a.weight', 'a.bias']


def test_rows_keep_their_order_within_a_scale_and_class():
    made = rows(K=4, dropped=(0, 2, 5, 13))
    found = Contents({'prototype_vectors': made['vectors'][:, :, None, None], 'last_layer.weight': made['last']},
                     {'prototype_class_identity': made['identity'], 'scale_num_prototypes': made['ranges']})
    head = read_head(found, 4)
    assert torch.equal(head.vectors[head.alive], made['vectors'])
    assert torch.equal(head.last.transpose(1, 2)[:, head.alive], made['last'])
    assert head.alive[0].tolist() == [[True, True, False, False], [True, True, True, False], [True] * 4]      # no gaps
