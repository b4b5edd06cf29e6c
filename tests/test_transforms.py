"Claims about the training pipeline and the label reduction."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scaleprotoseg import transforms
from scaleprotoseg.data import Sample, in_unit, rng
from scaleprotoseg.protocols import Augment
from scaleprotoseg.transforms import IMAGENET_MEAN, augment, reduce_labels

sizes = st.integers(1, 40)


def noise(h: int, w: int, seed: int = 0, n_classes: int = 5) -> Sample:
    r = rng('noise', seed)
    return Sample(torch.from_numpy(r.random((3, h, w), np.float32)),
                  torch.from_numpy(r.integers(-1, n_classes, (h, w))), 'noise')


def blobs(h: int, w: int) -> Sample:
    "An image that shows its own label: grey 0.25 for class 0, 0.5 for 1, 0.75 for 2; regions of 16 pixels."
    label = torch.from_numpy(rng('blobs').integers(0, 3, (h // 16 + 1, w // 16 + 1)))
    label = label.repeat_interleave(16, 0).repeat_interleave(16, 1)[:h, :w]
    return Sample(((label + 1) / 4).expand(3, -1, -1).float().contiguous(), label, 'blobs')


@settings(max_examples=80, deadline=None)
@given(sizes, sizes, st.tuples(sizes, sizes), st.integers(0, 10**6))
def test_any_size_gives_the_crop_with_legal_values(h, w, crop, seed):
    s = noise(h, w, seed)
    image, label = augment(s, Augment(crop), rng(seed))
    assert image.shape == (3, *crop) and label.shape == crop
    assert image.dtype == torch.float32 and label.dtype == torch.int64
    assert 0 <= image.min() and image.max() <= 1
    assert set(label.unique().tolist()) <= set(s.label.unique().tolist()) | {-1}


@settings(max_examples=80, deadline=None)
@given(sizes, sizes, st.tuples(sizes, sizes), st.integers(0, 10**6))
def test_crop_before_resize_equals_resize_before_crop(h, w, crop, seed):
    s, how = noise(h, w, seed), Augment(crop, flip=0)
    image, label = augment(s, how, rng(seed))
    d = how.draw((h, w), rng(seed))
    (top, left), (ch, cw) = d.corner, crop
    whole = F.interpolate(s.image[None], size=d.size, mode='bilinear')[0]
    pad = (0, max(cw - d.size[1], 0), 0, max(ch - d.size[0], 0))
    whole = torch.stack([F.pad(x, pad, value=v) for x, v in zip(whole, IMAGENET_MEAN)])
    assert torch.allclose(image, whole[:, top:top + ch, left:left + cw], atol=1e-4)
    rows = [(2 * i + 1) * h // (2 * d.size[0]) for i in range(d.size[0])]
    cols = [(2 * i + 1) * w // (2 * d.size[1]) for i in range(d.size[1])]
    labels = F.pad(s.label[rows][:, cols], pad, value=-1)
    assert torch.equal(label, labels[top:top + ch, left:left + cw])


@settings(max_examples=80, deadline=None)
@given(sizes, sizes, st.tuples(sizes, sizes), st.integers(0, 10**6))
def test_bytes_and_floats_give_the_same_crop(h, w, crop, seed):
    rgb = torch.from_numpy(rng('bytes', seed).integers(0, 256, (h, w, 3), np.uint8)).permute(2, 0, 1)    # as decoders lay it out
    given, floats = (Sample(x, torch.zeros(h, w).long(), 'a') for x in (rgb, in_unit(rgb)))
    image, label = augment(given, Augment(crop), rng(seed))
    expected = augment(floats, Augment(crop), rng(seed))
    assert torch.equal(image, expected[0]) and torch.equal(label, expected[1])
    assert given.pixels is rgb                       # nobody made floats of the whole image


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 200), st.floats(0.1, 3), st.data())
def test_old_pixels_cut_out_are_those_between_which_the_new_ones_lie(n, factor, data):
    m = max(1, round(n * factor))
    new = range(data.draw(st.integers(0, m - 1)), m)
    new = new[:data.draw(st.integers(1, len(new)))]
    centres, old = transforms._axis(n, m, new)
    places = [(i + 0.5) * n / m - 0.5 for i in new]                         # in old pixels, from the centre of the first
    assert np.allclose((np.array(places) + 0.5 - old.start) / (old.stop - old.start) * 2 - 1, centres, atol=1e-9)
    needed = {min(max(k, 0), n - 1) for p in places for k in (int(np.floor(p + 1e-9)), int(np.floor(p + 1e-9)) + 1)}
    assert old.start == min(needed) and max(needed) <= old.stop - 1 <= max(needed) + 1


@pytest.mark.parametrize('scale', [0.5, 0.77, 1.0, 1.31, 1.5])
@pytest.mark.parametrize('flip', [0, 1])
def test_label_stays_on_the_image_it_belongs_to(scale, flip):
    image, label = augment(blobs(96, 128), Augment((96, 128), (scale, scale), flip), rng('align', flip))
    inside = label >= 0
    shown = (image[0] * 4 - 1).round().long()[inside]    # a mixed border pixel shows the class that holds its centre
    agree = (shown == label[inside]).float().mean()
    wrong_way = (shown == label.flip(-1)[inside]).float().mean()
    assert agree > 0.97 and wrong_way < 0.9


def test_flip_probability_extremes():
    s = noise(8, 12)
    for flip in (0, 1):
        for seed in range(20):
            image, label = augment(s, Augment((8, 12), (1, 1), flip), rng(seed))
            assert torch.equal(label.flip(-1) if flip else label, s.label)
            assert torch.allclose(image.flip(-1) if flip else image, s.image, atol=1e-5)


def test_flip_is_a_fair_coin():
    how = Augment((8, 8))
    share = np.mean([how.draw((16, 16), rng('coin', i)).flip for i in range(2000)])
    assert abs(share - 0.5) < 0.045    # four standard deviations


def test_draws_cover_the_scale_range_and_every_corner():
    draws = [Augment((8, 8), (1, 2)).draw((10, 10), rng('draw', i)) for i in range(2000)]
    assert {d.size[0] for d in draws} == set(range(10, 21))
    fixed = [Augment((8, 8), (1, 1)).draw((10, 10), rng('draw', i)).corner for i in range(500)]
    assert set(fixed) == {(i, j) for i in range(3) for j in range(3)}


def test_same_keys_same_sample_other_keys_another():
    s, how = noise(40, 50), Augment((20, 20))
    a, b, c = (augment(s, how, rng('aug', k)) for k in (1, 1, 2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not torch.equal(a[1], c[1])


def test_sample_is_left_alone():
    s = noise(20, 20)
    before = s.image.clone(), s.label.clone()
    image, label = augment(s, Augment((20, 20), (1, 1), 0), rng(0))
    image.zero_()
    label.zero_()
    assert torch.equal(s.image, before[0]) and torch.equal(s.label, before[1])


def test_padding_has_the_fill_colour_and_is_void():
    image, label = augment(noise(10, 10), Augment((20, 30), (1, 1), 0), rng(0), fill=(0.1, 0.2, 0.3))
    assert (label[10:] == -1).all() and (label[:, 10:] == -1).all()
    assert torch.equal(image[:, 15, 25], torch.tensor([0.1, 0.2, 0.3]))


@pytest.mark.parametrize('wrong, word', [
    (dict(crop=(0, 4)), 'crop'), (dict(crop=(4, 4), scale=(0, 1)), 'scale'), (dict(crop=(4, 4), scale=(2, 1)), 'scale'),
    (dict(crop=(4, 4), flip=1.5), 'flip')])
def test_impossible_settings_are_refused(wrong, word):
    with pytest.raises(ValueError, match=word):
        Augment(**wrong)


@settings(max_examples=80, deadline=None)
@given(sizes, sizes, sizes, sizes)
def test_reduced_label_is_the_one_under_the_cell_centre(H, W, h, w):
    labels = torch.arange(-1, H * W - 1).view(1, H, W)
    small = reduce_labels(labels, (h, w))
    assert small.shape == (1, h, w) and small.dtype == torch.int64
    for i in range(h):
        for j in range(0, w, 3):
            y, x = (2 * i + 1) * H // (2 * h), (2 * j + 1) * W // (2 * w)
            assert small[0, i, j] == labels[0, y, x]


def test_reduction_agrees_with_pillow_on_the_published_sizes():
    r = rng('pillow')
    for H, W, h, w in [(513, 513, 65, 65), (33, 47, 9, 13), (512, 512, 512, 512), (128, 192, 16, 24)]:
        label = r.integers(0, 255, (H, W), np.uint8)
        pillow = np.asarray(Image.fromarray(label).resize((w, h), Image.Resampling.NEAREST))
        assert (reduce_labels(torch.from_numpy(label)[None].long(), (h, w))[0].numpy() == pillow).all()
