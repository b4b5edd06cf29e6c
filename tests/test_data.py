"Readers, their error messages, the EM and folder datasets, and the check before training."
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scaleprotoseg.basics import UnknownName, lookup
from scaleprotoseg.data import (Labels, Sample, check_dataset, files_state, fingerprint, image_to_tensor, open_dataset, palette, read_ahead, read_image, shared_images,
                                read_label, read_pair, read_pixels, rng)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path, **options)
    return path


# ---- labels, names, randomness

def test_labels_survive_json_and_colour_themselves():
    labels = Labels(('a', 'b'), ((1, 2, 3), (4, 5, 6)), (('x',), ()))
    assert Labels.from_dict(json.loads(json.dumps(labels.to_dict()))) == labels
    assert labels.colorize(np.array([[1, -1]])).tolist() == [[[4, 5, 6], [0, 0, 0]]]
    for wrong in (2, -2):
        with pytest.raises(ValueError, match=r'-1\.\.1'):
            labels.colorize(torch.tensor([[wrong]]))


@pytest.mark.parametrize('names, colors, parts', [((), (), ()), (('a', 'a'), ((0, 0, 0),) * 2, ()),
                                                  (('a', 'b'), ((0, 0, 0),), ()), (('a',), ((0, 0, 0),), ((), ()))])
def test_labels_that_contradict_themselves_are_refused(names, colors, parts):
    with pytest.raises(ValueError):
        Labels(names, colors, parts)


def test_palette_has_no_equal_colours_and_no_black():
    assert len({(0, 0, 0), *palette(182)}) == 183


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownName) as e:
        lookup({'cityscapes': 0, 'em': 1}, 'citiscapes', 'dataset')
    assert str(e.value) == "unknown dataset 'citiscapes'; did you mean 'cityscapes'? Known: cityscapes, em"
    with pytest.raises(KeyError, match='unknown thing .zzz.. Known: none'):
        lookup({}, 'zzz', 'thing')


def test_random_numbers_are_the_same_in_every_process():
    code = "from scaleprotoseg.data import rng; print(rng('crop', 3, 7).integers(10**9, size=3).tolist())"
    runs = [subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                           env={'PYTHONHASHSEED': seed}).stdout for seed in ('1', '2')]
    assert runs[0] == runs[1] == f"{rng('crop', 3, 7).integers(10**9, size=3).tolist()}\n"
    assert rng('demo', 0, 1).random() == pytest.approx(0.69651617, abs=1e-8)    # stays so between releases


def test_keys_do_not_run_together():
    draws = {rng(*k).integers(10**12) for k in [('ab', 'c'), ('a', 'bc'), ('abc',), (1, 23), (12, 3), ('1', 23)]}
    assert len(draws) == 6
    with pytest.raises(TypeError):
        rng(0.5)


def test_import_is_light():
    heavy = ['cv2', 'matplotlib', 'timm', 'torchvision', 'lightning_fabric', 'pandas']
    code = f'import sys, scaleprotoseg.data; print([m for m in {heavy} if m in sys.modules])'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == '[]'


# ---- images

def test_every_kind_of_picture_becomes_rgb(tmp_path):
    rgb = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10
    x = read_image(save(tmp_path/'rgb.png', rgb))
    assert x.shape == (3, 2, 3) and x.dtype == torch.float32
    assert torch.allclose(x, torch.from_numpy(rgb).permute(2, 0, 1) / 255)
    rgba = np.dstack([rgb, np.full((2, 3), 7, np.uint8)])
    assert torch.equal(read_image(save(tmp_path/'rgba.png', rgba)), x)
    grey = read_image(save(tmp_path/'grey.png', rgb[..., 0]))
    assert torch.equal(grey[0], grey[2]) and torch.equal(grey[1], x[0])


@pytest.mark.parametrize('ending', ['png', 'tif'])
def test_16_bit_grey_keeps_its_range(tmp_path, ending):
    x = read_image(save(tmp_path/f'a.{ending}', np.array([[0, 32768, 65535]], np.uint16)))
    assert torch.allclose(x[1], torch.tensor([[0, 32768 / 65535, 1]]))


def test_float_picture_outside_0_1_is_refused(tmp_path):
    assert read_image(save(tmp_path/'ok.tif', np.array([[0.5]], np.float32))).max() == 0.5
    with pytest.raises(ValueError, match='bad.tif'):
        read_image(save(tmp_path/'bad.tif', np.array([[2.5]], np.float32)))


def test_exif_orientation_is_applied(tmp_path):
    im = Image.fromarray(np.array([[0, 100, 200], [10, 110, 210]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6    # the camera was turned: show rotated by 90 degrees clockwise
    im.save(tmp_path/'turned.png', exif=exif)
    x = read_image(tmp_path/'turned.png')
    assert x.shape == (3, 3, 2)
    assert (x[0] * 255).round().int().tolist() == [[10, 0], [110, 100], [210, 200]]


def test_palette_with_transparency_and_bilevel(tmp_path, recwarn):
    im = Image.frombytes('P', (2, 1), bytes([0, 1]))
    im.putpalette([255, 0, 0, 0, 0, 255])
    im.info['transparency'] = b'\x00\xff'
    assert image_to_tensor(im)[:, 0, 1].tolist() == [0, 0, 1]
    assert image_to_tensor(Image.fromarray(np.array([[True, False]]))).max() == 1
    assert not [w for w in recwarn if 'Transparency' in str(w.message)]


def test_missing_file_is_named_with_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing.png does not exist .expected an image'):
        read_image(tmp_path/'nothing.png')
    with pytest.raises(FileNotFoundError, match='is a folder .expected a label map'):
        read_label(tmp_path, {0: 0})


@pytest.mark.parametrize('ending', ['png', 'jpg', 'tif'])
def test_truncated_file_is_named(tmp_path, ending):
    path = save(tmp_path/f'half.{ending}', rng('noise').integers(0, 255, (64, 64), np.uint8))
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf'half\.{ending}'):
        read_image(path)
    with pytest.raises(ValueError, match=rf'half\.{ending}'):
        read_label(path, dict.fromkeys(range(256), 0))


def test_file_with_damaged_bytes_is_named(tmp_path):
    path = save(tmp_path/'flipped.png', rng('noise').integers(0, 255, (64, 64), np.uint8))
    good = path.read_bytes()
    for at in (0, 10, 13, 20, 30, 35, 38, 45, len(good) - 40):    # signature, header, chunk names, pixels
        path.write_bytes(good[:at] + bytes(255 - b for b in good[at:at + 6]) + good[at + 6:])
        with pytest.raises(ValueError, match=r'cannot read .*flipped\.png'):
            read_image(path)


def test_file_that_is_no_image_is_named(tmp_path):
    for name, content in (('text.png', b'hello'), ('empty.png', b''), ('head.png', b'\x89PNG\r\n\x1a\n')):
        (tmp_path/name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read_image(tmp_path/name)


# ---- bytes until floats are asked for

BYTES = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(3, 16, 16)


def test_image_given_as_bytes_is_floats_for_whoever_asks():
    s = Sample(BYTES, BYTES[0].long(), 'a')
    assert s.pixels is BYTES
    assert torch.equal(s.image, BYTES.float() / 255) and s.image.dtype == torch.float32
    assert s.image is s.image is s.pixels                     # made once
    floats = torch.rand(3, 4, 4)
    assert Sample(floats, BYTES[0].long(), 'a').image is floats


def test_sample_of_bytes_is_pickled_copied_and_needs_an_image():
    s = Sample(BYTES, BYTES[0].long(), 'a')
    assert pickle.loads(pickle.dumps(s)).pixels.dtype == torch.uint8       # a quarter of what goes between processes
    assert torch.equal(replace(s, id='b').image, BYTES.float() / 255)
    with pytest.raises(TypeError, match='image'):
        Sample(label=BYTES[0].long(), id='a')


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(['RGB', 'L', 'RGBA', 'P']), st.integers(0, 10**6))
def test_picture_is_its_bytes_divided_by_255(h, w, mode, seed):
    im = Image.fromarray(rng('picture', seed).integers(0, 256, (h, w, 3), np.uint8)).convert(mode)
    x = image_to_tensor(im)
    plain = torch.tensor([[[v / 255 for v in pixel] for pixel in line] for line in np.array(im.convert('RGB')).tolist()])
    assert torch.equal(x, plain.permute(2, 0, 1)) and x.is_contiguous()


def test_readers_hand_over_bytes_and_read_ahead_floats(tmp_path):
    path = save(tmp_path/'images/train/a.png', np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    save(tmp_path/'labels/train/a.png', np.zeros((2, 2), np.uint8))
    (tmp_path/'labels.json').write_text('{"names": ["a"]}')
    ds = open_dataset('folder', 'train', tmp_path)
    assert torch.equal(ds[0].pixels, read_pixels(path)) and read_pixels(path).dtype == torch.uint8
    assert [s.pixels.dtype for s in read_ahead(ds)] == [torch.float32]      # made by the threads, not by who waits for them
    assert read_pixels(save(tmp_path/'deep.png', np.array([[65535]], np.uint16))).dtype == torch.float32


# ---- label maps

@pytest.mark.parametrize('dtype, top', [(bool, 2), (np.uint8, 256), (np.uint16, 65536), (np.int32, 65536)])
def test_mapping_is_that_of_a_plain_dictionary(tmp_path, dtype, top):
    raw = rng('labels', top).integers(0, top, (9, 7)).astype(dtype)
    path, mapping = save(tmp_path/'a.tif', raw), {int(v): i % 5 - 1 for i, v in enumerate(np.unique(raw))}
    y = read_label(path, mapping)
    assert y.tolist() == [[mapping[int(v)] for v in line] for line in raw] and y.dtype == torch.int64
    gone = int(raw.flat[0])
    with pytest.raises(ValueError, match=rf'holds the value\(s\) {gone}, which'):
        read_label(path, {v: c for v, c in mapping.items() if v != gone})


def test_palette_indices_are_read_not_colours(tmp_path):
    im = Image.frombytes('P', (3, 1), bytes([0, 1, 255]))
    im.putpalette([v for i in range(256) for v in (255 - i, i, 7)])
    im.save(tmp_path/'palette.png')
    assert read_label(tmp_path/'palette.png', {0: 0, 1: 1, 255: -1}).tolist() == [[0, 1, -1]]


def test_16_bit_and_bilevel_labels(tmp_path):
    wide = save(tmp_path/'wide.png', np.array([[7, 1000, 65535]], np.uint16))
    y = read_label(wide, {7: 0, 1000: 1, 65535: -1})
    assert y.tolist() == [[0, 1, -1]] and y.dtype == torch.int64
    assert read_label(save(tmp_path/'two.png', np.array([[True, False]])), {0: 4, 1: 5}).tolist() == [[5, 4]]


def test_value_without_class_is_named_with_file_and_expected(tmp_path):
    path = save(tmp_path/'odd.png', np.array([[0, 1, 9, 200]], np.uint8))
    with pytest.raises(ValueError, match=r'odd\.png holds the value\(s\) 9, 200.*expected 0\.\.2, 255'):
        read_label(path, {0: 0, 1: 1, 2: 2, 255: -1})


def test_label_map_saved_as_colours_is_refused(tmp_path):
    for name, mode in (('rgb.png', 'RGB'), ('rgba.png', 'RGBA'), ('la.png', 'LA')):
        Image.new(mode, (2, 2)).save(tmp_path/name)
        with pytest.raises(ValueError, match=rf'{name} has mode {mode}; expected a single channel'):
            read_label(tmp_path/name, {0: 0})
    with pytest.raises(ValueError, match='single channel'):
        read_label(save(tmp_path/'float.tif', np.zeros((2, 2), np.float32)), {0: 0})


def test_size_mismatch_names_both_files(tmp_path):
    image = save(tmp_path/'i.png', np.zeros((4, 6), np.uint8))
    label = save(tmp_path/'l.png', np.zeros((6, 4), np.uint8))
    with pytest.raises(ValueError, match=r'i\.png is 6x4 but its label map .*l\.png is 4x6'):
        read_pair(image, label, {0: 0})


# ---- EM

def slices(n=30, h=4, w=5):
    "Tiny images of one grey each, and labels whose membrane has another width in each of five neighbours."
    images = [np.full((h, w), i, np.uint8) for i in range(n)]
    labels = [np.where(np.arange(w) < i % 5, 0, 255).astype(np.uint8)[None].repeat(h, 0) for i in range(n)]
    return images, labels


def em_folder(root):
    for name, arrays in zip(('images', 'labels'), slices()):
        for i, x in enumerate(arrays):
            save(root/name/f'{i:02}.png', x)
    return root


def em_stacks(root, pages=30):
    root.mkdir(parents=True, exist_ok=True)
    for name, arrays in zip(('volume', 'labels'), slices(pages)):
        first, *rest = map(Image.fromarray, arrays)
        first.save(root/f'train-{name}.tif', save_all=True, append_images=rest)
    return root


def assert_equal(a, b):
    assert a.ids == b.ids
    for s, t in zip((a[i] for i in range(len(a))), (b[i] for i in range(len(b)))):
        assert s.id == t.id and torch.equal(s.image, t.image) and torch.equal(s.label, t.label)


def test_em_layouts_give_the_same_tensors(tmp_path):
    em_folder(tmp_path/'a'/'em-isbi2012')
    em_stacks(tmp_path/'b'/'em-isbi2012'/'original-layout')
    for split in ('train', 'val', 'all'):
        assert_equal(open_dataset('em', split, tmp_path/'a'), open_dataset('em', split, tmp_path/'b'))
    s = open_dataset('em', 'all', tmp_path/'a'/'em-isbi2012')[7]
    assert s.id == '07' and s.label[0].tolist() == [0, 0, 1, 1, 1] and s.image[0, 0, 0] == pytest.approx(7 / 255)


def test_em_split_is_the_published_one(tmp_path):
    em_folder(tmp_path)
    val, train = open_dataset('em', 'val', tmp_path), open_dataset('em', 'train', tmp_path)
    assert {int(i) for i in val.ids} == {0, 8, 9, 12, 15, 17, 23, 24, 27, 28}
    assert sorted(val.ids + train.ids) == [f'{i:02}' for i in range(30)]
    other = open_dataset('em', 'val', tmp_path, split_seed=0)
    assert [int(i) for i in other.ids] == [2, 10, 11, 13, 17, 22, 24, 26, 27, 28]


def test_em_says_what_it_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'(?s)no ISBI 2012 EM slices.*train-volume\.tif.*images/00\.png'):
        open_dataset('em', 'train', tmp_path)
    with pytest.raises(FileNotFoundError, match='no ISBI'):
        open_dataset('em', 'train', tmp_path/'absent')
    with pytest.raises(KeyError, match="unknown split 'test'.*Known: all, train, val"):
        open_dataset('em', 'test', tmp_path)
    em_folder(tmp_path/'f')
    (tmp_path/'f'/'labels'/'12.png').unlink()
    with pytest.raises(FileNotFoundError, match=r'labels.12\.png does not exist'):
        open_dataset('em', 'train', tmp_path/'f')
    em_stacks(tmp_path/'s', pages=29)
    with pytest.raises(ValueError, match='train-volume.tif has 29 pages; expected the 30'):
        open_dataset('em', 'train', tmp_path/'s')
    (tmp_path/'s'/'train-labels.tif').unlink()
    with pytest.raises(FileNotFoundError, match='train-labels.tif'):
        open_dataset('em', 'train', tmp_path/'s')


def test_em_pickles_for_worker_processes(tmp_path):
    ds = open_dataset('em', 'val', em_folder(tmp_path))
    assert_equal(pickle.loads(pickle.dumps(ds)), ds)


def test_real_em_slices(shared):
    root = shared/'data'/'em-isbi2012'
    folder, stacks = open_dataset('em', 'all', shared/'data'), open_dataset('em', 'all', root/'original-layout')
    assert_equal(folder, stacks)
    facts = check_dataset(folder, progress=False)
    assert facts['images'] == 30 and facts['void_pixels'] == 0
    assert facts['class_pixels']['membrane'] / (30 * 512 * 512) == pytest.approx(0.2196, abs=5e-5)
    assert facts['contents'] == check_dataset(stacks, progress=False)['contents']


# ---- a folder of one's own

def folder(root, listing=True, **described):
    sub = '' if listing else 'train/'
    save(root/f'images/{sub}a.png', np.zeros((2, 3, 3), np.uint8))
    save(root/f'images/{sub}b.jpg', np.zeros((2, 3, 3), np.uint8))
    for name in 'ab':
        save(root/f'labels/{sub}{name}.png', np.array([[0, 1, 1], [1, 0, 255]], np.uint8))
    (root/'labels.json').write_text(json.dumps(dict(names=['x', 'y'], void=[255]) | described))
    if listing:
        (root/'train.txt').write_text('a\nb\n\n')
    return root


@pytest.mark.parametrize('listing', [True, False])
def test_folder_reads_both_ways_to_name_splits(tmp_path, listing):
    ds = open_dataset('folder', 'train', folder(tmp_path, listing))
    assert ds.ids == ['a', 'b'] and len(ds) == 2 and ds.labels.names == ('x', 'y')
    assert ds[1].label.tolist() == [[0, 1, 1], [1, 0, -1]] and ds[1].image.shape == (3, 2, 3)


def test_folder_file_values_and_colours(tmp_path):
    folder(tmp_path, names=['y', 'x'], values=[1, 0], colors=[[1, 2, 3], [4, 5, 6]])
    ds = open_dataset('folder', 'train', tmp_path)
    assert ds[0].label.tolist() == [[1, 0, 0], [0, 1, -1]] and ds.labels.colors[0] == (1, 2, 3)


def test_folder_listing_may_name_sub_folders(tmp_path):
    folder(tmp_path, listing=False)
    (tmp_path/'val.txt').write_text('train/b')
    ds = open_dataset('folder', 'val', tmp_path)
    assert ds.ids == ['train/b'] and ds[0].label.shape == (2, 3)


@pytest.mark.parametrize('described, message', [
    (dict(values=[0]), 'as many different'), (dict(values=[0, 0]), 'as many different'),
    (dict(void=[1]), 'as many different'),
    (dict(values=[0, -1]), 'whole numbers in 0..65535'), (dict(values=['0', '1']), 'whole numbers'),
    (dict(names='xy'), 'expected a list'), (dict(names=[1, 2]), 'a class name is text'), (dict(names=['x', ' y']), 'a class name is text'), (dict(names=['x', '']), 'a class name is text'),
    (dict(names=['x', 'x']), 'does not describe classes'), (dict(names=None), 'does not describe classes'),
    (dict(valus=[1, 0]), "unknown key 'valus'; did you mean 'values'"), (dict(parts=[[], ['head']]), "unknown key 'parts'"), (dict(colors=[[300, 0, 0], [0, 0, 0]]), 'three whole numbers in 0..255, got .300'),
    (dict(colors=[[1, 2], [0, 0, 0]]), 'three whole numbers'), (dict(colors=[['a', 0, 0], [0, 0, 0]]), 'three whole numbers')])
def test_folder_with_a_wrong_description(tmp_path, described, message):
    with pytest.raises(ValueError, match=f'labels.json.*{message}'):
        open_dataset('folder', 'train', folder(tmp_path, **described))


def test_pictures_without_label_maps_are_a_split_to_predict(tmp_path):
    folder(tmp_path, listing=False)
    save(tmp_path/'images'/'new'/'q.png', np.zeros((2, 3), np.uint8))
    ds = open_dataset('folder', 'new', tmp_path)
    assert ds.ids == ['q'] and (ds[0].label == -1).all() and ds[0].label.dtype == torch.int64 and ds[0].label.shape == (2, 3)
    assert check_dataset(ds, progress=False)['void_pixels'] == 6 and tmp_path/'images'/'new'/'q.png' in ds.files()
    (tmp_path/'labels'/'new').mkdir()                                   # now there are label maps, but not this one
    with pytest.raises(FileNotFoundError, match=r'labels.new.q\.png does not exist'): open_dataset('folder', 'new', tmp_path)


@pytest.mark.parametrize('turned', [(True, True), (True, False)])
def test_a_label_map_is_turned_by_its_own_exif_tag(tmp_path, turned):
    said = Image.Exif()
    said[0x0112] = 6                                                    # a quarter turn
    stored, files = np.array([[0, 1, 1], [0, 0, 1]], np.uint8), [tmp_path/'image.png', tmp_path/'label.png']
    for array, file, tag in zip((stored * 255, stored), files, turned): Image.fromarray(array).save(file, **({'exif': said} if tag else {}))
    if turned[1]:
        image, label = read_pair(*files, {0: 0, 1: 1})
        assert torch.equal(image[0].long() // 255, label) and label.shape == (3, 2)
    else:
        with pytest.raises(ValueError, match='is 2x3 but its label map .* is 3x2 .*which was turned as its EXIF tag says'): read_pair(*files, {0: 0, 1: 1})


def test_images_that_two_splits_share_are_found_by_what_they_show(tmp_path):
    folder(tmp_path, listing=False)
    for name, value in (('a', 9), ('z', 0)):
        for kind in ('images', 'labels'): save(tmp_path/kind/'val'/f'{name}.png', np.full((2, 3), value * (kind == 'images'), np.uint8))
    train, val = (open_dataset('folder', s, tmp_path) for s in ('train', 'val'))
    assert shared_images(train, val) == [], 'a name alone says nothing'
    assert shared_images(train, train) == train.ids


def test_folder_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match='(?s)labels.json does not exist.*images/NAME.jpg'):
        open_dataset('folder', 'train', tmp_path)
    folder(tmp_path)
    with pytest.raises(KeyError, match="unknown split 'trian'; did you mean 'train'"):
        open_dataset('folder', 'trian', tmp_path)
    (tmp_path/'val.txt').write_text('a\nc\n')
    with pytest.raises(FileNotFoundError, match=r'images.c\.jpg does not exist .2 file'):
        open_dataset('folder', 'val', tmp_path)
    (tmp_path/'val.txt').write_text('\n')
    with pytest.raises(ValueError, match='val.* has no images'):
        open_dataset('folder', 'val', tmp_path)
    (tmp_path/'val.txt').write_text('a\na\n')
    with pytest.raises(ValueError, match="val.txt lists 'a' twice"):
        open_dataset('folder', 'val', tmp_path)
    save(tmp_path/'images'/'a.jpg', np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match='two images of one name'):
        open_dataset('folder', 'train', tmp_path)
    for p in tmp_path.glob('*.txt'):
        p.unlink()
    with pytest.raises(FileNotFoundError, match='has no splits'):
        open_dataset('folder', 'train', tmp_path)
    (tmp_path/'labels.json').write_text('{"names": ')
    with pytest.raises(ValueError, match='labels.json does not describe classes'):
        open_dataset('folder', 'train', tmp_path)


def test_a_label_map_without_its_image_is_named(tmp_path):
    folder(tmp_path, listing=False)
    (tmp_path/'images/train/b.jpg').unlink()
    save(tmp_path/'labels/train/._a.png', np.zeros((2, 3), np.uint8))                  # what macOS leaves beside a file
    with pytest.raises(FileNotFoundError, match=r'labels.train.b\.png has no image.*1 such file'): open_dataset('folder', 'train', tmp_path)


def test_a_file_that_changes_changes_the_state_of_its_dataset(tmp_path):
    ds = open_dataset('folder', 'train', folder(tmp_path))
    before, names = files_state(ds), {p.name for p in ds.files()}
    assert files_state(ds) == before and names == {'a.png', 'b.jpg', 'b.png', 'labels.json'}
    save(tmp_path/'labels/a.png', np.array([[1, 0, 0], [0, 1, 255]], np.uint8))
    os.utime(tmp_path/'labels/a.png', (1, 1))
    changed, still = files_state(ds), files_state(ds, times=False)
    os.utime(tmp_path/'labels/a.png', (2, 2))
    assert len({before, changed, files_state(ds)}) == 3 and files_state(ds, times=False) == still
    ds.files = ['what somebody else calls files']
    assert files_state(ds) == files_state(Fake()) and fingerprint(ds) == fingerprint(open_dataset('folder', 'train', tmp_path))
    assert files_state(Fake(sample())) == files_state(Fake())                     # rendered: there are no files


def test_a_picture_of_several_pages_is_not_cut_to_the_first(tmp_path):
    pages = [Image.fromarray(np.full((4, 5), v, np.uint8)) for v in (10, 20, 30)]
    pages[0].save(tmp_path/'stack.tif', save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path/'one.tif')
    with pytest.raises(ValueError, match=r'stack\.tif has 3 pages; expected one picture'): read_pixels(tmp_path/'stack.tif')
    assert read_pixels(tmp_path/'stack.tif', 2).unique().tolist() == [30] and read_pixels(tmp_path/'one.tif').unique().tolist() == [10]


# ---- the check before training

class Fake:
    labels = Labels(('x', 'y'), palette(2))

    def __init__(self, *samples, ids=None):
        self.samples, self.ids = samples, ids or [s.id for s in samples]

    def __len__(self): return len(self.samples)

    def __getitem__(self, i): return self.samples[i]


def sample(name='s', **changed):
    return Sample(**dict(image=torch.zeros(3, 2, 2), label=torch.tensor([[0, 1], [1, -1]]), id=name) | changed)


def test_check_counts_pixels_and_is_repeatable():
    ds = Fake(sample('a'), sample('b', label=torch.zeros(2, 2, dtype=torch.int64)))
    facts = check_dataset(ds, progress=False)
    assert facts == check_dataset(ds, progress=False)
    assert facts['images'] == 2 and facts['class_pixels'] == {'x': 5, 'y': 2} and facts['void_pixels'] == 1
    assert facts['fingerprint'] == fingerprint(ds)


def test_fingerprints_notice_what_changed():
    ds = Fake(sample('a'), sample('b'))
    other_label = Fake(sample('a'), sample('b', label=torch.zeros(2, 2, dtype=torch.int64)))
    assert fingerprint(ds) == fingerprint(other_label) != fingerprint(Fake(sample('b'), sample('a')))
    assert check_dataset(ds, progress=False)['contents'] != check_dataset(other_label, progress=False)['contents']


@pytest.mark.parametrize('changed, message', [
    (dict(image=torch.zeros(1, 2, 2)), r'expected \(3, H, W\)'), (dict(image=torch.zeros(3, 2, 2).double()), 'float32'),
    (dict(image=torch.full((3, 2, 2), 2.)), r'expected 0\.\.1'),
    (dict(image=torch.full((3, 2, 2), float('nan'))), r'expected 0\.\.1'),
    (dict(label=torch.zeros(2, 3, dtype=torch.int64)), 'label is'), (dict(label=torch.zeros(2, 2)), 'int64'),
    (dict(label=torch.full((2, 2), 2)), r'expected 0\.\.1, void -1'), (dict(label=torch.full((2, 2), -2)), 'void -1'),
    (dict(parts=torch.zeros(2, 3, dtype=torch.int64)), 'part labels'), (dict(parts=torch.zeros(2, 2, dtype=torch.uint8)), 'part labels .* torch.uint8'),
    (dict(parts=torch.ones(2, 2, dtype=torch.int64)), 'part 1 in class .*, which names 0 parts'),
    (dict(depth=torch.zeros(7)), r'depth is \(7,\)'), (dict(depth=torch.zeros(2, 2).double()), 'expected .* torch.float32')])
def test_check_names_the_bad_sample(changed, message):
    with pytest.raises(ValueError, match=f"sample 'bad'.*{message}"):
        check_dataset(Fake(sample('good'), sample('bad', **changed)), progress=False)


def test_check_refuses_empty_splits_and_repeated_ids():
    with pytest.raises(ValueError, match='no images'):
        check_dataset(Fake(), progress=False)
    with pytest.raises(ValueError, match="id 's' occurs twice"):
        check_dataset(Fake(sample(), sample()), progress=False)
    with pytest.raises(ValueError, match='1 samples but 2 ids'):
        check_dataset(Fake(sample(), ids=['a', 'b']), progress=False)


def test_check_stops_at_the_first_bad_file(tmp_path):
    em_folder(tmp_path)
    (tmp_path/'images'/'05.png').write_bytes(b'broken')
    with pytest.raises(ValueError, match=r'05\.png'):
        check_dataset(open_dataset('em', 'train', tmp_path), progress=False)


def test_a_split_folder_may_have_a_dot_in_its_name(tmp_path):
    folder(tmp_path, listing=False)
    for kind in ('images', 'labels'): (tmp_path/kind/'train').rename(tmp_path/kind/'train.v2')
    assert torch.equal(open_dataset('folder', 'train.v2', tmp_path)[0].label, torch.tensor([[0, 1, 1], [1, 0, -1]]))
    with pytest.raises(KeyError, match="unknown split 'train'"): open_dataset('folder', 'train', tmp_path)


@pytest.mark.parametrize('write, expected', [
    (lambda p: (p/'labels.json').write_text('{"names": ["x", "y"], "void": 255}'), '"void" is 255, expected a list'),
    (lambda p: (p/'labels.json').write_text('{"void": [255]}'), "labels.json does not describe classes.*names"),
    (lambda p: (p/'train.txt').write_text('a\n', encoding='utf-16'), 'train.txt is no text in UTF-8')])
def test_small_mistakes_in_a_folder_name_the_file(tmp_path, write, expected):
    write(folder(tmp_path))
    with pytest.raises(ValueError, match=expected): open_dataset('folder', 'train', tmp_path)


def test_home_is_understood_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(folder(tmp_path)))
    assert len(open_dataset('folder', 'train', '~')) == 2 and read_image('~/images/a.png').shape == (3, 2, 3)


def test_a_picture_that_is_too_large_is_not_called_damaged(tmp_path, monkeypatch):
    path = save(tmp_path/'large.png', np.zeros((30, 30), np.uint8))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(ValueError, match='large.png has more than 200 pixels'): read_image(path)
