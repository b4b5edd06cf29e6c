"Readers of the original layouts, on real samples and on miniatures; part annotations; what a broken download answers."
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import scaleprotoseg.datasets as D
from scaleprotoseg.basics import UnknownName
from scaleprotoseg.data import DATASETS, check_dataset, open_dataset, rng

PICTURE = rng('street').integers(0, 255, (6, 8, 3), np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path, **options)
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def ids(value=0, shape=(6, 8)): return np.full(shape, value, np.uint8)


# ---- miniatures: each makes a layout below a folder and returns the label file of one `val` image

def make_pascal(root):
    home = root/'VOCdevkit/VOC2012'
    for id in ('2007_000001', '2008_000002', '2009_000003'):
        save(home/f'JPEGImages/{id}.jpg', PICTURE)
        save(home/f'SegmentationClassAug/{id}.png', ids(1))
    for split, id in dict(train='2007_000001', val='2009_000003').items():
        save(home/f'SegmentationClass/{id}.png', ids(2))
        write(home/f'ImageSets/Segmentation/{split}.txt', f'{id}\n')
    return home/'SegmentationClassAug/2009_000003.png'


def make_cityscapes(root):
    for split, city in dict(train='bonn', val='ulm', test='berlin').items():
        for frame in ('000019', '000007'):
            id = f'{city}_000000_{frame}'
            save(root/f'leftImg8bit/{split}/{city}/{id}_leftImg8bit.png', PICTURE)
            if split != 'test': save(root/f'gtFine/{split}/{city}/{id}_gtFine_labelIds.png', ids(26))
    return root/'gtFine/val/ulm/ulm_000000_000007_gtFine_labelIds.png'


def make_ade20k(root):
    for split in ('training', 'validation'):
        save(root/f'ADEChallengeData2016/images/{split}/a.jpg', PICTURE)
        save(root/f'ADEChallengeData2016/annotations/{split}/a.png', ids(3))
    return root/'ADEChallengeData2016/annotations/validation/a.png'


def make_cocostuff(root):
    for split in ('train2017', 'val2017'):
        save(root/f'images/{split}/000000000009.jpg', PICTURE)
        save(root/f'stuffthingmaps_trainval2017/{split}/000000000009.png', ids(181))
    return root/'stuffthingmaps_trainval2017/val2017/000000000009.png'


def make_camvid(root):
    for split in ('train', 'val', 'test'):
        save(root/f'{split}/f1.png', PICTURE)
        save(root/f'{split}annot/f1.png', ids(10))
    return root/'valannot/f1.png'


MINIATURES = dict(pascal=make_pascal, cityscapes=make_cityscapes, ade20k=make_ade20k, cocostuff=make_cocostuff, camvid=make_camvid)
CLASSES = dict(pascal=1, cityscapes=13, ade20k=2, cocostuff=181, camvid=10)   # what the miniatures hold
each = pytest.mark.parametrize('name', MINIATURES)


def image_of(name, label):
    "The image that belongs to the label file of a miniature."
    swap = dict(pascal=('SegmentationClassAug', 'JPEGImages', '.jpg'), cityscapes=('gtFine', 'leftImg8bit', '.png'),
                ade20k=('annotations', 'images', '.jpg'), cocostuff=('stuffthingmaps_trainval2017', 'images', '.jpg'),
                camvid=('valannot', 'val', '.png'))[name]
    path = label.with_suffix(swap[2]) if name != 'cityscapes' else label.with_name(label.name.replace('gtFine_labelIds', 'leftImg8bit'))
    return type(label)(str(path).replace(swap[0], swap[1], 1))


# ---- the real samples

@pytest.mark.parametrize('name, split, n, size, first', [
    ('pascal', 'train', 25, None, '2008_000716'), ('pascal', 'train_aug', 94, None, '2008_000393'),
    ('pascal', 'val', 15, None, '2007_000042'), ('ade20k', 'train', 3, None, 'ADE_train_00016869'),
    ('ade20k', 'val', 3, None, 'ADE_val_00000001'), ('cocostuff', 'train', 13, None, '000000017914'),
    ('cocostuff', 'val', 8, None, '000000000139'), ('camvid', 'val', 101, (360, 480), '0016E5_07959')])
def test_every_real_sample_is_read(shared, name, split, n, size, first):
    ds = open_dataset(name, split, root=shared/'data')
    facts = check_dataset(ds, progress=False)
    assert facts['images'] == n == len(ds) and ds.ids == sorted(ds.ids) and ds.ids[0] == first
    assert size is None or ds[0].label.shape == size
    assert facts['void_pixels'] > 0 and sum(v > 0 for v in facts['class_pixels'].values()) > 1


def test_lengths_of_the_other_camvid_splits(shared):
    assert [len(open_dataset('camvid', s, root=shared/'data')) for s in ('train', 'test')] == [367, 233]


def test_camvid_classes_cover_what_their_readme_says(shared):
    facts = check_dataset(open_dataset('camvid', 'val', root=shared/'data'), progress=False)
    total = 101 * 360 * 480
    shares = [.092, .260, .006, .290, .087, .163, .009, .031, .018, .007, .022]
    assert np.allclose([v / total for v in facts['class_pixels'].values()], shares, atol=6e-4)
    assert facts['void_pixels'] / total == pytest.approx(.017, abs=6e-4)


def test_palette_and_greyscale_label_maps_of_voc_are_equal(shared):
    aug, voc = (open_dataset('pascal', 'val', root=shared/'data', annotations=a) for a in ('SegmentationClassAug', 'SegmentationClass'))
    modes = {Image.open(ds._files(ds.ids[0])[1]).mode for ds in (aug, voc)}
    assert modes == {'L', 'P'} and aug.ids == voc.ids
    for i in range(len(aug)): assert torch.equal(aug[i].label, voc[i].label)


def test_colours_are_those_of_voc_palette_files(shared):
    path = sorted((shared/'data/voc2012-sample/VOCdevkit/VOC2012/SegmentationClass').glob('*.png'))[0]
    assert Image.open(path).getpalette()[:63] == [v for color in D.PASCAL.colors for v in color]


def test_pascal_equals_torchvision(shared):
    from torchvision.datasets import VOCSegmentation
    theirs = VOCSegmentation(shared/'data/voc2012-sample', '2012', 'val')
    ours = open_dataset('pascal', 'val', root=shared/'data', annotations='SegmentationClass')
    assert len(theirs) == len(ours)
    for i in (0, 7):
        image, label = theirs[i]
        assert torch.equal((ours[i].image * 255).round().byte(), torch.from_numpy(np.array(image)).permute(2, 0, 1))
        raw = torch.from_numpy(np.array(label)).long()
        assert torch.equal(ours[i].label, torch.where(raw == 255, -1, raw))


def test_names_are_those_of_the_official_tables(shared):
    rows = (shared/'data/ade20k-sample/ADEChallengeData2016/objectInfo150.txt').read_text().splitlines()[1:]
    assert D.ADE20K_NAMES == tuple(r.split('\t')[-1].split(',')[0].strip() for r in rows)
    rows = (shared/'data/cocostuff-sample/labels.txt').read_text().splitlines()[1:]
    assert D.COCO_NAMES == tuple(r.split(': ')[1].strip() for r in rows)
    assert D.COCO_NEVER == (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)


@pytest.mark.parametrize('name, folder', [('pascal', 'voc2012-sample/VOCdevkit/VOC2012'), ('pascal', 'voc2012-sample/VOCdevkit'),
                                          ('ade20k', 'ade20k-sample'), ('ade20k', 'ade20k-sample/ADEChallengeData2016'),
                                          ('cocostuff', 'cocostuff-sample'), ('camvid', 'camvid')])
def test_the_root_may_be_the_folder_itself(shared, name, folder):
    assert open_dataset(name, 'val', root=shared/'data'/folder).ids == open_dataset(name, 'val', root=shared/'data').ids


def test_cocostuff_in_the_renamed_layout(shared, tmp_path):
    real = shared/'data/cocostuff-sample'
    for split in ('train', 'val'):
        for ours, theirs in (('images', 'images'), ('annotations_png', 'stuffthingmaps_trainval2017')):
            (tmp_path/ours).mkdir(exist_ok=True)
            (tmp_path/ours/split).symlink_to(real/theirs/f'{split}2017')
        renamed, official = (open_dataset('cocostuff', split, root=r) for r in (tmp_path, real))
        assert check_dataset(renamed, progress=False) == check_dataset(official, progress=False)


# ---- miniatures

@each
def test_miniature_is_read(tmp_path, name):
    MINIATURES[name](tmp_path)
    for split in ('train', 'val'):
        ds = open_dataset(name, split, root=tmp_path)
        s = ds[0]
        assert s.image.shape == (3, 6, 8) and s.image.dtype == torch.float32 and s.parts is None and s.id == ds.ids[0]
        assert (s.label == CLASSES[name]).all() and s.label.dtype == torch.int64
        check_dataset(ds, progress=False)
        assert torch.equal(pickle.loads(pickle.dumps(ds))[0].label, s.label)      # goes to the loader's workers


@each
def test_wrong_folder_prints_the_expected_tree(tmp_path, name):
    with pytest.raises(FileNotFoundError) as e: open_dataset(name, 'val', root=tmp_path)
    assert str(tmp_path) in str(e.value) and DATASETS[name].tree in str(e.value)
    with pytest.raises(FileNotFoundError): open_dataset(name, 'val', root=tmp_path/'not there')


@each
def test_unknown_split_suggests_the_nearest(tmp_path, name):
    MINIATURES[name](tmp_path)
    with pytest.raises(UnknownName, match="unknown split 'vla'; did you mean 'val'"): open_dataset(name, 'vla', root=tmp_path)


@each
def test_image_without_label_is_named(tmp_path, name):
    label = MINIATURES[name](tmp_path)
    label.unlink()
    with pytest.raises(FileNotFoundError, match=rf'{label.name} does not exist .1 of \d label maps of split .val.') as e:
        open_dataset(name, 'val', root=tmp_path)
    assert 'Expected:' in str(e.value)
    open_dataset(name, 'train', root=tmp_path)


@each
def test_label_without_image_is_named(tmp_path, name):
    image = image_of(name, MINIATURES[name](tmp_path))
    image.unlink()
    with pytest.raises(FileNotFoundError, match=rf'{image.stem}\.\w+ does not exist .1 of \d images of split .val.'):
        open_dataset(name, 'val', root=tmp_path)


@each
@pytest.mark.parametrize('part', [.3, .6, .95])
def test_truncated_label_is_named(tmp_path, name, part):
    label = save(MINIATURES[name](tmp_path), rng('noise').integers(0, 10, (60, 80), np.uint8))
    label.write_bytes(label.read_bytes()[:int(part * label.stat().st_size)])
    with pytest.raises(ValueError, match=label.name): check_dataset(open_dataset(name, 'val', root=tmp_path), progress=False)


@each
@pytest.mark.parametrize('part', [.3, .6, .95])
def test_truncated_image_is_named(tmp_path, name, part):
    image = save(image_of(name, MINIATURES[name](tmp_path)), rng('noise').integers(0, 255, (60, 80, 3), np.uint8))
    image.write_bytes(image.read_bytes()[:int(part * image.stat().st_size)])
    with pytest.raises(ValueError, match=image.name): check_dataset(open_dataset(name, 'val', root=tmp_path), progress=False)


@each
def test_value_out_of_range_is_named(tmp_path, name):
    bad = dict(pascal=21, cityscapes=34, ade20k=151, cocostuff=182, camvid=12)[name]
    label = save(MINIATURES[name](tmp_path), ids(bad))
    with pytest.raises(ValueError, match=rf'{label.name} holds the value\(s\) {bad}, which have no class'):
        check_dataset(open_dataset(name, 'val', root=tmp_path), progress=False)


@each
def test_16_bit_labels_are_read_and_checked(tmp_path, name):
    label = MINIATURES[name](tmp_path)
    good = np.array(Image.open(label)).astype(np.uint16)
    save(label, good)
    ds = open_dataset(name, 'val', root=tmp_path)
    assert (ds[0].label == CLASSES[name]).all()
    save(label, good + 1000)
    with pytest.raises(ValueError, match=rf'{label.name} holds the value\(s\) 1\d\d\d'): ds[0]


@each
def test_palette_labels_are_read_by_index_and_colours_refused(tmp_path, name):
    label = MINIATURES[name](tmp_path)
    im = Image.open(label)
    paletted = Image.frombytes('P', im.size, im.tobytes())
    paletted.putpalette([v for i in range(256) for v in (255 - i, i, 7)])
    paletted.save(label)
    ds = open_dataset(name, 'val', root=tmp_path)
    assert (ds[0].label == CLASSES[name]).all()
    paletted.convert('RGB').save(label)
    with pytest.raises(ValueError, match=rf'{label.name} has mode RGB; expected a single channel'): ds[0]


@each
def test_label_of_another_size_is_named(tmp_path, name):
    label = save(MINIATURES[name](tmp_path), ids(1, (8, 6)))
    with pytest.raises(ValueError, match=rf'sizes differ: .* is 8x6 but its label map .*{label.name} is 6x8'):
        open_dataset(name, 'val', root=tmp_path)[0]


@each
def test_hidden_files_of_other_systems_do_not_count(tmp_path, name):
    label = MINIATURES[name](tmp_path)
    before = open_dataset(name, 'val', root=tmp_path).ids
    label.with_name('._' + label.name).write_bytes(b'')
    image = image_of(name, label)
    image.with_name('._' + image.name).write_bytes(b'')
    assert open_dataset(name, 'val', root=tmp_path).ids == before


# ---- Pascal

def test_train_aug_is_everything_labelled_but_val(tmp_path):
    make_pascal(tmp_path)
    assert D.Pascal('train_aug', tmp_path).ids == ['2007_000001', '2008_000002']


@pytest.mark.parametrize('where', ['SegmentationAug/train_aug.txt', 'SegmentationAug/trainaug.txt', 'Segmentation/trainaug.txt'])
def test_train_aug_list_is_read_in_both_notations(tmp_path, where):
    make_pascal(tmp_path)
    lists = tmp_path/'VOCdevkit/VOC2012/ImageSets'
    write(lists/where, '2008_000002\n')
    assert D.Pascal('train_aug', tmp_path).ids == ['2008_000002']
    write(lists/where, '/JPEGImages/2008_000002.jpg /SegmentationClassAug/2008_000002.png\n\n'
                       '/JPEGImages/2007_000001.jpg /SegmentationClassAug/2007_000001.png\n')
    assert D.Pascal('train_aug', tmp_path).ids == ['2007_000001', '2008_000002']


def test_annotations_choose_the_folder(tmp_path):
    make_pascal(tmp_path)
    assert (D.Pascal('val', tmp_path)[0].label == 1).all()
    assert (D.Pascal('val', tmp_path, annotations='SegmentationClass')[0].label == 2).all()
    with pytest.raises(UnknownName, match='SegmentationClassAug'): D.Pascal('val', tmp_path, annotations='SegmentationClasAug')
    with pytest.raises(FileNotFoundError, match='train_aug needs SegmentationClassAug or SBD'):
        D.Pascal('train_aug', tmp_path, annotations='SegmentationClass')


def without_aug(tmp_path):
    home = make_pascal(tmp_path).parents[1]
    for f in (home/'SegmentationClassAug').iterdir(): f.unlink()
    (home/'SegmentationClassAug').rmdir()


def test_without_aug_and_sbd_only_train_aug_is_refused(tmp_path):
    without_aug(tmp_path)
    assert (D.Pascal('train', tmp_path)[0].label == 2).all()
    with pytest.raises(FileNotFoundError, match='benchmark_RELEASE'): D.Pascal('train_aug', tmp_path)


@pytest.mark.parametrize('compressed', [False, True])
def test_sbd_is_read_without_conversion(tmp_path, compressed):
    savemat = pytest.importorskip('scipy.io').savemat
    without_aug(tmp_path)
    cls = tmp_path/'benchmark_RELEASE/dataset/cls'
    cls.mkdir(parents=True)
    for id in ('2007_000001', '2008_000002', '2009_000003'):       # SBD labels some images of VOC's train and val, too
        savemat(cls/f'{id}.mat', {'GTcls': {'Boundaries': 0, 'Segmentation': ids(20), 'CategoriesPresent': 20}}, do_compression=compressed)
    ds = D.Pascal('train_aug', tmp_path)
    assert ds.ids == ['2007_000001', '2008_000002']
    assert (ds[0].label == 2).all() and (ds[1].label == 20).all()   # VOC's own label map wins
    check_dataset(ds, progress=False)

    savemat(cls/'2008_000002.mat', {'GTcls': {'Segmentation': ids(21)}})
    with pytest.raises(ValueError, match=r'2008_000002\.mat: expected classes 0\.\.20'): ds[1]
    savemat(cls/'2008_000002.mat', {'GTcls': {'Segmentation': ids(1, (3, 3))}})
    with pytest.raises(ValueError, match='sizes differ.*2008_000002.mat'): ds[1]
    savemat(cls/'2008_000002.mat', {'other': 1})
    with pytest.raises(ValueError, match='cannot read .*2008_000002.mat'): ds[1]
    (cls/'2008_000002.mat').write_bytes((cls/'2008_000002.mat').read_bytes()[:150])
    with pytest.raises(ValueError, match='cannot read .*2008_000002.mat'): ds[1]


def test_sbd_without_scipy_says_what_to_install(tmp_path, monkeypatch):
    without_aug(tmp_path)
    write(tmp_path/'benchmark_RELEASE/dataset/cls/2008_000002.mat', '')
    monkeypatch.setitem(__import__('sys').modules, 'scipy.io', None)
    with pytest.raises(ImportError, match='scaleprotoseg\\[sbd'): D.Pascal('train_aug', tmp_path)[1]


@pytest.mark.parametrize('name, split', [('pascal', 'test'), ('cityscapes', 'test')])
def test_split_without_public_labels_is_all_void(tmp_path, name, split):
    MINIATURES[name](tmp_path)
    if name == 'pascal':
        home = tmp_path/'VOCdevkit/VOC2012'
        save(home/'JPEGImages/2008_000004.jpg', PICTURE[:5])
        write(home/'ImageSets/Segmentation/test.txt', '2008_000004')
    s = open_dataset(name, split, root=tmp_path)[0]
    assert s.label.shape == s.image.shape[1:] and (s.label == -1).all() and s.label.dtype == torch.int64


# ---- Cityscapes

def test_cityscapes_ids_are_sorted_over_cities(tmp_path):
    make_cityscapes(tmp_path/'cityscapes')
    save(tmp_path/'cityscapes/leftImg8bit/val/aachen/aachen_000001_000019_leftImg8bit.png', PICTURE)
    save(tmp_path/'cityscapes/gtFine/val/aachen/aachen_000001_000019_gtFine_labelIds.png', ids(33))
    ds = D.Cityscapes('val', tmp_path)
    assert ds.ids == ['aachen_000001_000019', 'ulm_000000_000007', 'ulm_000000_000019'] and (ds[0].label == 18).all()


def test_label_ids_map_to_19_classes(tmp_path):
    label = make_cityscapes(tmp_path)
    save(image_of('cityscapes', label), np.zeros((1, 34, 3), np.uint8))
    save(label, np.arange(34, dtype=np.uint8)[None])
    expected = dict(zip([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33], range(19)))
    assert D.Cityscapes('val', tmp_path)[0].label[0].tolist() == [expected.get(i, -1) for i in range(34)]


# ---- parts

@given(st.integers(1, 99), st.integers(0, 999), st.integers(0, 99))
def test_uid_decodes_to_what_was_encoded(sid, iid, pid):
    decoded = lambda uid: tuple(int(d) for d in D.decode_uid(np.array(uid, np.int32)))
    assert decoded(sid) == (sid, -1, -1)
    assert decoded(sid * 1000 + iid) == (sid, iid, -1)
    assert decoded(sid * 100_000 + iid * 100 + pid) == (sid, iid, pid)


def test_uid_that_is_none_is_refused():
    for bad in (np.array([-1]), np.array([10_000_000]), np.array([1.5])):
        with pytest.raises(ValueError, match='uids'): D.decode_uid(bad)


def read_spec(path):
    yaml = pytest.importorskip('yaml')
    return yaml.safe_load(path.read_text())


def test_parts_are_those_of_the_specifications(shared):
    spec = read_spec(shared/'data/panoptic-parts-spec/ppp_datasetspec.yaml')
    named = {k: tuple(v) for k, v in spec['scene_class2part_classes'].items() if v}
    assert named == D.PASCAL_PARTS and list(spec['scene_class2part_classes'])[:20] == [
        n.replace('diningtable', 'table') for n in D.PASCAL.names[1:]]
    counted = {c: {p: list(range(a, b + 1)) for p, (a, b) in g.items()} for c, g in D.PASCAL_COUNTED.items()}
    assert counted == spec['countable_pids_groupings']
    spec = read_spec(shared/'data/panoptic-parts-spec/cpp_datasetspec.yaml')
    assert {k: tuple(v) for k, v in spec['scene_class2part_classes'].items() if v} == D.CITYSCAPES_PARTS
    assert {n: tuple(c) for n, c in spec['scene_class2color'].items() if n in D.CITYSCAPES.names} == dict(
        zip(D.CITYSCAPES.names, D.CITYSCAPES.colors))


def test_folded_part_ids_agree_with_the_spec_text():
    table = D.part_table(D.PASCAL_PARTS, D.PASCAL.names, D.PASCAL_COUNTED)
    row = lambda name: table[D.PASCAL.names.index(name)]
    assert row('aeroplane')[[5, 6, 15, 16, 25]].tolist() == [5, 6, 6, 7, 7] and (row('aeroplane')[26:] == -1).all()
    for road in ('bus', 'car'): assert row(road)[[9, 10, 19, 20, 29, 30, 39, 40, 59, 60]].tolist() == [9, 10, 10, 11, 11, 12, 12, 13, 13, -1]
    assert row('motorbike')[[4, 5, 14, 15]].tolist() == [4, 5, 5, -1]
    assert row('train')[[6, 7, 16, 17, 27, 37, 47, 57, 67, 76, 77]].tolist() == [6, 7, 7, 8, 9, 10, 11, 12, 13, 13, -1]
    assert row('chair')[0] == 0 and (row('chair')[1:] == -1).all()
    counts = [7, 6, 13, 0, 2, 13, 13, 17, 0, 19, 0, 18, 21, 5, 24, 2, 19, 0, 13, 2]
    assert [len(D.PASCAL_PARTS.get(n, ())) for n in D.PASCAL.names[1:]] == counts and table.max() == 24


def pascal_with_parts(tmp_path, uid, label, where='pascal_panoptic_parts/labels/validation', compression=None):
    save(make_pascal(tmp_path), np.array(label, np.uint8))
    save(tmp_path/'VOCdevkit/VOC2012/JPEGImages/2009_000003.jpg', np.zeros((*np.shape(label), 3), np.uint8))
    return save(tmp_path/where/'2009_000003.tif', np.array(uid, np.int32), **({'compression': compression} if compression else {}))


@pytest.mark.parametrize('compression', [None, 'tiff_lzw', 'tiff_deflate'])
def test_pascal_parts_are_decoded_and_folded(tmp_path, compression):
    pascal_with_parts(tmp_path, [[100118, 100500, 105, 1, 0, 700259]], [[1, 1, 1, 1, 0, 7]], compression=compression)
    ds = D.Pascal('val', tmp_path, parts=True)
    assert ds[0].parts.tolist() == [[7, 0, 0, 0, 0, 13]] and ds[0].parts.dtype == torch.int64
    assert ds.labels.parts[1][6] == 'wheel' and ds.labels.parts[0] == () and len(ds.labels.parts) == 21
    assert D.Pascal('val', tmp_path).labels.parts == ()


def test_part_counts_only_where_its_class_is_the_label(tmp_path):
    aeroplane, person, bag = 100_101, 1_500_101, 2_100_001
    pascal_with_parts(tmp_path, [[aeroplane, aeroplane, aeroplane, person, bag]], [[1, 15, 255, 15, 1]])
    assert D.Pascal('val', tmp_path, parts=True)[0].parts.tolist() == [[1, 0, 0, 1, 0]]


@pytest.mark.parametrize('where', ['labels/validation', 'labels/val', 'validation', 'pascal_panoptic_parts_v2/validation',
                                   'VOCdevkit/VOC2012/labels/val'])
def test_pascal_parts_are_found_in_several_places(tmp_path, where):
    pascal_with_parts(tmp_path, [[100101]], [[1]], where=where)
    assert D.Pascal('val_parts', tmp_path).ids == ['2009_000003']
    assert D.Pascal('val', tmp_path, parts=str((tmp_path/where).parent))[0].parts.tolist() == [[1]]


def test_val_parts_is_val_and_validation_of_the_parts(tmp_path):
    pascal_with_parts(tmp_path, [[100101]], [[1]], where='labels/training')
    save(tmp_path/'labels/validation/2007_000001.tif', np.full((6, 8), 100101, np.int32))   # an image of VOC's train
    with pytest.raises(FileNotFoundError, match="split 'val_parts' has no images"): D.Pascal('val_parts', tmp_path)
    assert D.Pascal('val', tmp_path, parts=True)[0].parts.tolist() == [[1]]
    assert D.Pascal('train', tmp_path, parts=True)[0].parts.unique().tolist() == [1]
    assert D.Pascal('train_aug', tmp_path, parts=True)[1].parts is None        # an image without part annotations


def test_part_id_without_meaning_is_named_or_taken_for_none(tmp_path):
    pascal_with_parts(tmp_path, [[200107, 200106]], [[2, 2]])                  # a bicycle has 6 parts
    with pytest.raises(ValueError, match=r'2009_000003\.tif: bicycle has the part id\(s\) 7, expected 0\.\.6.*unknown_parts'):
        D.Pascal('val_parts', tmp_path)[0]
    assert D.Pascal('val_parts', tmp_path, unknown_parts='none')[0].parts.tolist() == [[0, 6]]
    with pytest.raises(UnknownName, match='unknown_parts'): D.Pascal('val_parts', tmp_path, unknown_parts='maybe')


def test_broken_part_files_are_named(tmp_path):
    noise = rng('uid').integers(1, 20, (60, 80)).astype(np.int32)
    path = pascal_with_parts(tmp_path, noise, np.ones((60, 80)))
    ds, good = D.Pascal('val_parts', tmp_path), path.read_bytes()
    ds[0]
    for part in (.3, .6, .95):
        path.write_bytes(good[:int(part * len(good))])
        with pytest.raises(ValueError, match=r'2009_000003\.tif'): ds[0]
    save(path, noise, compression='tiff_lzw')
    path.write_bytes(path.read_bytes()[:-len(path.read_bytes()) // 2])
    with pytest.raises(ValueError, match=r'2009_000003\.tif'): ds[0]
    save(path, np.zeros((60, 80, 3), np.uint8))
    with pytest.raises(ValueError, match=r'2009_000003\.tif has mode RGB; expected one channel of 32-bit integers'): ds[0]
    save(path, noise.astype(np.float32))
    with pytest.raises(ValueError, match='expected one channel of 32-bit'): ds[0]
    save(path, noise[:50])
    with pytest.raises(ValueError, match=r'2009_000003\.tif is 80x50 but the label map of 2009_000003 is 80x60'): ds[0]
    save(path, noise + 10_000_000)
    with pytest.raises(ValueError, match=r'2009_000003\.tif: uids lie in'): ds[0]


def cityscapes_with_parts(root, uid, where='gtFinePanopticParts'):
    label = make_cityscapes(root)
    for id in ('ulm_000000_000007', 'ulm_000000_000019'):
        save(root/where/f'val/ulm/{id}_gtFinePanopticParts.tif', np.broadcast_to(np.array(uid, np.int32), (6, 8)))
    save(label, np.array([[24, 25, 26, 27, 28, 24, 7, 1]] * 6, np.uint8))
    return root/where


@pytest.mark.parametrize('where', ['gtFinePanopticParts', 'gtFinePanopticParts_trainval/gtFinePanopticParts'])
def test_cityscapes_parts(tmp_path, where):
    base = cityscapes_with_parts(tmp_path, [2400101, 2500104, 2600103, 2700105, 28001, 2400105, 7, 1], where)
    for parts in (True, base, str(base.parent)):
        ds = D.Cityscapes('val', tmp_path, parts=parts)
        assert ds[0].parts[0].tolist() == [1, 4, 3, 5, 0, 0, 0, 0]
    assert ds.labels.parts[11] == ('torso', 'head', 'arm', 'leg') and ds.labels.parts[0] == ()
    check_dataset(ds, progress=False)


def test_fifth_part_of_a_human_is_none_unless_asked_for(tmp_path):
    cityscapes_with_parts(tmp_path, [2400105, 2500105, 26, 27, 28, 24, 7, 1])
    kept = D.Cityscapes('val', tmp_path, parts=True, human_artefact=True)
    assert D.Cityscapes('val', tmp_path, parts=True)[0].parts[0, :2].tolist() == [0, 0]
    assert kept[0].parts[0, :2].tolist() == [5, 5] and kept.labels.parts[11][4] == 'artefact'
    assert len(kept.labels.parts[13]) == 5 and kept.labels.parts[12] == kept.labels.parts[11]


def test_cityscapes_without_a_part_file_is_named(tmp_path):
    base = cityscapes_with_parts(tmp_path, [24] * 8)
    (base/'val/ulm/ulm_000000_000019_gtFinePanopticParts.tif').unlink()
    with pytest.raises(FileNotFoundError, match='ulm_000000_000019_gtFinePanopticParts.tif does not exist .1 of 2 part files'):
        D.Cityscapes('val', tmp_path, parts=True)
    with pytest.raises(FileNotFoundError, match='part files'): D.Cityscapes('train', tmp_path, parts=True)
