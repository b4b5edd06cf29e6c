"The published protocols against brute force and torchvision; windows; and the files that benchmark servers read."
import json
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_datasets import MINIATURES, save, write
from torch import nn

import scaleprotoseg.evaluation as E
from scaleprotoseg.data import Labels, Sample, open_dataset, palette, read_ahead, read_label, rng
from scaleprotoseg.evaluation import evaluate, export_predictions, file_values, segment, starts, windows
from scaleprotoseg.metrics import class_iou, mean_iou, pixel_accuracy
from scaleprotoseg.protocols import Evaluation

CPU = torch.device('cpu')
C = 5


class Told(nn.Module):
    "Predicts what is written into the red channel: class c as c / 255."
    def __init__(self, classes=C):
        super().__init__()
        self.classes = classes

    def forward(self, image, chunk=None):
        classes = (image[:, 0] * 255).round().long()
        return SimpleNamespace(logits=F.one_hot(classes, self.classes).permute(0, 3, 1, 2).float())


class Coarse(nn.Module):
    "A small random network with a coarse grid, batch norm and dropout."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 7, 4, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.5), nn.Conv2d(8, C, 1))

    def forward(self, image, chunk=None): return SimpleNamespace(logits=self.net(image))


class Always(nn.Module):
    "The same logits at every position, on a grid of stride 8."
    def __init__(self, logits):
        super().__init__()
        self.register_buffer('logits', torch.tensor(logits).view(1, -1, 1, 1))

    def forward(self, image, chunk=None):
        h, w = (-(-n // 8) for n in image.shape[-2:])
        return SimpleNamespace(logits=self.logits.expand(len(image), -1, h, w))


class Listed:
    "A dataset of given samples; `waits` are the seconds that each takes to read."
    def __init__(self, samples, classes=C, waits=None):
        self.labels = Labels(tuple(f'class {c}' for c in range(classes)), palette(classes))
        self.samples, self.ids, self.waits = samples, [s.id for s in samples], waits or [0.] * len(samples)

    def __len__(self): return len(self.samples)

    def __getitem__(self, i):
        time.sleep(self.waits[i])
        return self.samples[i]


def told(prediction, label, id='a'):
    "A sample of which `Told` predicts `prediction`."
    return Sample(torch.from_numpy(prediction).float().expand(3, -1, -1) / 255, torch.from_numpy(label), id)


def random_samples(seed, n=3, predicted=C, occurring=C):
    "Random predictions and labels with void, every image of another size."
    r = rng('evaluation', seed)
    def one(i):
        size = tuple(int(x) for x in r.integers(3, 12, 2))
        return told(r.integers(0, predicted, size), r.integers(-1, occurring, size), f'{i:02}')
    return [one(i) for i in range(n)]


# -- the numbers -------------------------------------------------------------------------------------------------------

def brute_force(samples, classes=C):
    "Per-class IoU, its mean and the accuracy from the definitions: pixel after pixel, class after class, over all images at once."
    pairs = [(round(p * 255), t) for s in samples for p, t in zip(s.image[0].flatten().tolist(), s.label.flatten().tolist()) if t != -1]
    iou = []
    for c in range(classes):
        both, either = (sum(rule((p == c, t == c)) for p, t in pairs) for rule in (all, any))
        iou.append(both / either if either else float('nan'))
    there = [x for x in iou if x == x]
    return iou, sum(there) / len(there), sum(p == t for p, t in pairs) / len(pairs)


@pytest.mark.parametrize('seed, predicted, occurring', [(0, C, C), (1, C, C), (2, C, 3), (3, 2, C), (4, 3, 3), (5, 1, 1)])
def test_miou_is_that_of_a_loop_over_pixels_and_classes(seed, predicted, occurring):
    samples = random_samples(seed, predicted=predicted, occurring=occurring)
    counts = evaluate(Told(), Listed(samples), CPU)
    iou, mean, accuracy = brute_force(samples)
    assert class_iou(counts).tolist() == pytest.approx(iou, rel=1e-12, nan_ok=True)
    assert mean_iou(counts) == pytest.approx(mean, rel=1e-12) and pixel_accuracy(counts) == pytest.approx(accuracy, rel=1e-12)
    assert counts.sum() == sum(int((s.label >= 0).sum()) for s in samples) and counts.dtype == torch.int64


def test_images_are_added_up_before_the_division():
    """A mean over images would be (1 + 0) / 2."""
    right, wrong = np.zeros((1, 9), np.int64), np.zeros((1, 1), np.int64)
    counts = evaluate(Told(), Listed([told(right, right), told(wrong + 1, wrong, 'b')]), CPU)
    assert class_iou(counts)[:2].tolist() == [.9, 0.] and mean_iou(counts) == .45


def test_void_counts_neither_for_nor_against():
    label = np.array([[0, 1, -1, -1]])
    for said in (0, 1, 4): assert mean_iou(evaluate(Told(), Listed([told(np.array([[0, 1, said, said]]), label)]), CPU)) == 1


# -- how an image is fed -----------------------------------------------------------------------------------------------

SIZES = [(300, 400), (375, 500), (333, 500), (512, 512), (600, 400)]


def picture(size, seed=0): return torch.from_numpy(rng('picture', seed, *size).random((1, 3, *size), np.float32))


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('shorter', [512, 65])
def test_shorter_side_is_resized_as_torchvision_does(size, shorter):
    image = picture(size)
    ours, theirs = Evaluation(shorter=shorter).resize(image), TF.resize(image, [shorter], antialias=False)
    assert ours.shape == theirs.shape and min(ours.shape[-2:]) == shorter
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@settings(deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 90))
def test_shorter_side_of_any_size(h, w, shorter):
    image = torch.zeros(1, 1, h, w)
    assert Evaluation(shorter=shorter).resize(image).shape == TF.resize(image, [shorter], antialias=False).shape


@pytest.mark.parametrize('size', SIZES)
def test_squash_ignores_the_aspect(size):
    image = picture(size)
    squashed = Evaluation(size=(513, 321)).resize(image)
    assert squashed.shape == (1, 3, 513, 321)
    torch.testing.assert_close(squashed, TF.resize(image, [513, 321], antialias=False), rtol=0, atol=1e-5)


def test_an_image_of_the_right_size_is_left_alone():
    image = picture((12, 20))
    for how in (Evaluation(), Evaluation(size=(12, 20)), Evaluation(shorter=12), Evaluation(window=(5, 5))): assert how.resize(image) is image


@pytest.mark.parametrize('how', [Evaluation(size=(16, 16)), Evaluation(shorter=16)])
def test_small_images_are_not_smoothed(how):
    """Every fourth column is white. Four times smaller, bilinear looks at the second and third of four columns alone."""
    image = torch.zeros(1, 3, 64, 64)
    image[..., ::4] = 1
    assert TF.resize(image, [16, 16], antialias=True).amin() > .1 and not how.resize(image).any()


def test_impossible_protocols_are_refused():
    with pytest.raises(ValueError, match='not both'): Evaluation(size=(8, 8), shorter=8)
    for name, value in (('size', (5,)), ('size', (0, 5)), ('size', 5), ('window', (512,)), ('window', (2.5, 2)), ('shorter', 0), ('shorter', 2.5)):
        assert f'{name}=' in str(pytest.raises(ValueError, Evaluation, **{name: value}).value)
    for overlap in (1, -.1): assert f'overlap={overlap}' in str(pytest.raises(ValueError, Evaluation, overlap=overlap).value)


def test_a_protocol_survives_json():
    from dataclasses import asdict
    for how in (Evaluation(), Evaluation(size=(513, 513)), Evaluation(shorter=512, window=(512, 512), overlap=.5)):
        assert Evaluation.from_dict(json.loads(json.dumps(asdict(how)))) == how


# -- windows -----------------------------------------------------------------------------------------------------------

@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 200), st.floats(0, .9))
def test_starts_reach_from_one_edge_to_the_other(length, window, overlap):
    found, w = starts(length, window, overlap), min(window, length)
    assert found[0] == 0 and found[-1] + w == length and found == sorted(found)
    steps = np.diff(found)
    assert (steps <= np.ceil(w * (1 - overlap))).all()             # the overlap, to the pixel: so nothing is left out
    assert len(found) < 2 or steps.max() - steps.min() <= 1        # evenly spaced


@settings(deadline=None)
@given(st.tuples(st.integers(1, 60), st.integers(1, 60)), st.tuples(st.integers(1, 40), st.integers(1, 40)), st.floats(0, .7))
def test_windows_cover_every_pixel(size, window, overlap):
    seen, shapes = np.zeros(size, int), set()
    for rows, cols in windows(size, window, overlap):
        seen[rows, cols] += 1
        shapes.add(seen[rows, cols].shape)
        last = rows.stop, cols.stop
    assert (seen > 0).all() and last == size and shapes == {tuple(map(min, size, window))}


@pytest.mark.parametrize('window', [(30, 44), (99, 99), (30, 99)])
@pytest.mark.parametrize('how', [Evaluation(), Evaluation(size=(30, 44)), Evaluation(shorter=30)])
def test_a_window_as_large_as_the_image_is_the_whole_image(window, how):
    model, image = Coarse().eval(), picture((30, 44))
    assert torch.equal(segment(model, image, replace(how, window=window)), segment(model, image, how))


@pytest.mark.parametrize('how', [Evaluation(window=(16, 24)), Evaluation(window=(7, 50), overlap=0.), Evaluation(window=(20, 20), overlap=.9),
                                 Evaluation(size=(40, 33), window=(16, 16)), Evaluation(shorter=64, window=(32, 32))])
def test_windows_of_a_constant_model_leave_no_seam(how):
    for size in ((33, 47), (16, 24), (50, 9)):
        label = segment(Always([.1, .3, .2]), picture(size), how)
        assert label.shape == (1, *size) and label.dtype == torch.int64 and (label == 1).all()


def test_logits_of_windows_are_averaged():
    """Two windows that overlap in the middle third; the left one is surer of class 1 than the right one is of class 0."""
    class Sides(nn.Module):
        def forward(self, image, chunk=None):
            left = image[..., :1, :1].amin() == 0
            logits = torch.tensor([0., 3.] if left else [2., 0.])
            return SimpleNamespace(logits=logits.view(1, 2, 1, 1).expand(1, 2, *image.shape[-2:]))
    image = torch.ones(1, 3, 4, 9)
    image[..., 0] = 0
    label = segment(Sides(), image, Evaluation(window=(4, 6), overlap=.5))
    assert label[0, 0].tolist() == [1] * 6 + [0] * 3               # mean (1, 1.5) in the middle
    # eight times larger, the border between the means .5 and -2 of class 1 over class 0; between sums, 1 and -2, it is farther right
    assert segment(Sides(), image, Evaluation(window=(4, 6), overlap=.5), (4, 72))[0, 0].tolist() == [1] * 46 + [0] * 26
    image[..., 0] = 1
    assert not segment(Sides(), image, Evaluation(window=(4, 6), overlap=.5)).any()


def test_label_map_has_the_size_that_was_asked_for():
    model, image = Coarse().eval(), picture((30, 44))
    for how in (Evaluation(), Evaluation(size=(24, 24)), Evaluation(shorter=40, window=(24, 24))):
        assert segment(model, image, how).shape == (1, 30, 44) and segment(model, image, how, (15, 22)).shape == (1, 15, 22)


# -- evaluate ----------------------------------------------------------------------------------------------------------

def plain_loop(model, samples, how):
    "Whole image: enlarge the logits to the label's size, take the largest, count."
    counts = np.zeros((C, C), int)
    for s in samples:
        with torch.no_grad(): logits = model.eval()(how.resize(s.image[None])).logits
        said = F.interpolate(logits, tuple(s.label.shape), mode='bilinear', align_corners=False)[0].argmax(0)
        np.add.at(counts, (s.label[s.label >= 0].numpy(), said[s.label >= 0].numpy()), 1)
    return counts


def pictures(n=7):
    r = rng('pictures')
    sizes = [tuple(int(x) for x in r.integers(9, 40, 2)) for _ in range(n)]
    return [Sample(picture(size, i)[0], torch.from_numpy(r.integers(-1, C, size)), f'{i:02}') for i, size in enumerate(sizes)]


PROTOCOLS = [Evaluation(), Evaluation(size=(24, 31)), Evaluation(shorter=20)]


@pytest.mark.parametrize('how', PROTOCOLS)
def test_evaluate_equals_a_plain_loop(how):
    model, samples = Coarse(), pictures()
    assert evaluate(model.train(), Listed(samples), CPU, how).tolist() == plain_loop(model, samples, how).tolist()


@pytest.mark.parametrize('how', [*PROTOCOLS, Evaluation(window=(16, 16))])
def test_order_threads_and_random_state_play_no_part(how, monkeypatch):
    model, samples = Coarse(), pictures()
    expected = evaluate(model, Listed(samples), CPU, how)
    for threads in (1, 2, 8):
        monkeypatch.setattr(E, 'read_ahead', partial(read_ahead, threads=threads))
        order = rng('order', threads).permutation(len(samples)).tolist()
        waits = (rng('waits', threads).random(len(samples)) / 100).tolist()            # later ones are ready before earlier ones
        torch.manual_seed(threads)
        assert torch.equal(evaluate(model.train(), Listed([samples[i] for i in order], waits=waits), CPU, how), expected)
    in_memory = Listed(samples)
    in_memory.in_memory = True
    assert torch.equal(evaluate(model, in_memory, CPU, how), expected)


def test_whole_images_are_not_the_windows_that_are_scored_which_is_said():
    with pytest.warns(UserWarning, match=r'as a whole, while scores are of windows of \(16, 16\)'):
        next(E.stream(Coarse(), Listed(pictures()), Evaluation(window=(16, 16))))


def test_evaluate_leaves_weights_and_statistics_alone():
    model = Coarse().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(model, Listed(pictures(2)), CPU)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_evaluate_asks_before_every_image_whether_to_stop():
    asked = []
    def stop(where):
        asked.append(where)
        if len(asked) == 3: raise InterruptedError
    with pytest.raises(InterruptedError): evaluate(Coarse(), Listed(pictures()), CPU, check_stop=stop)
    assert asked == ['while validating'] * 3


# -- files for benchmark servers ---------------------------------------------------------------------------------------

class Painted:
    "A dataset of which `Told` predicts every class somewhere: column c is class c."
    def __init__(self, dataset):
        self.dataset, self.ids, self.labels, self.mapping = dataset, dataset.ids, dataset.labels, dataset.mapping
        if hasattr(dataset, 'grey'): self.grey = dataset.grey

    def __len__(self): return len(self.ids)

    def __getitem__(self, i):
        n = len(self.labels)
        return told(np.arange(n)[None].repeat(2, 0), np.full((2, n), -1), self.ids[i])


def painted(name, root, split='val'):
    MINIATURES[name](root)
    return Painted(open_dataset(name, split, root=root))


def export(dataset, folder, source='ours', model=None):
    return export_predictions(model or Told(len(dataset.labels)), dataset, folder, CPU, source=source)


def pngs(folder): return sorted(p.name for p in folder.glob('*.png'))


@pytest.mark.parametrize('name', MINIATURES)
def test_what_is_written_is_read_back_as_the_same_classes(name, tmp_path):
    ds = painted(name, tmp_path / 'data')
    assert export(ds, tmp_path / 'out') == len(ds) and pngs(tmp_path / 'out') == [f'{i}.png' for i in ds.ids]
    for id in ds.ids:
        label = read_label(tmp_path / f'out/{id}.png', ds.mapping)
        assert label.tolist() == [list(range(len(ds.labels)))] * 2


def test_pascal_files_have_vocs_palette(tmp_path):
    ds = painted('pascal', tmp_path / 'data')
    export(ds, tmp_path / 'out')
    im = Image.open(tmp_path / 'out/2009_000003.png')
    assert im.mode == 'P' and np.asarray(im)[0].tolist() == list(range(21))
    rgb = np.asarray(im.convert('RGB'))[0].tolist()
    assert rgb[:3] == [[0, 0, 0], [128, 0, 0], [0, 128, 0]] and rgb[15] == [192, 128, 128] and rgb[20] == [0, 64, 128]
    assert rgb == [list(c) for c in ds.labels.colors]


def test_palette_of_pascal_files_is_that_of_a_real_label_map(shared, tmp_path):
    real = Image.open(sorted((shared / 'data/voc2012-sample/VOCdevkit/VOC2012/SegmentationClass').glob('*.png'))[0])
    export(painted('pascal', tmp_path / 'data'), tmp_path / 'out')
    assert Image.open(tmp_path / 'out/2009_000003.png').getpalette()[:63] == real.getpalette()[:63]


@pytest.mark.parametrize('split, city', [('val', 'ulm'), ('test', 'berlin')])
def test_cityscapes_files_are_grey_label_ids(split, city, tmp_path):
    ds = painted('cityscapes', tmp_path / 'data', split)
    assert export(ds, tmp_path / 'out') == 2
    assert pngs(tmp_path / 'out') == [f'{city}_000000_{frame}.png' for frame in ('000007', '000019')]
    im = Image.open(tmp_path / f'out/{city}_000000_000007.png')
    assert im.mode == 'L'
    assert np.asarray(im)[0].tolist() == [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def test_ade20k_files_are_grey_and_count_from_one(tmp_path):
    export(painted('ade20k', tmp_path / 'data'), tmp_path / 'out')
    im = Image.open(tmp_path / 'out/a.png')
    assert im.mode == 'L' and np.asarray(im)[0].tolist() == list(range(1, 151))


def test_of_several_file_values_the_smallest_stands_for_a_class():
    ds = Listed([], classes=2)
    assert file_values(ds).tolist() == [0, 1]                      # without a mapping
    ds.mapping = {7: 1, 3: 1, 9: 0, 0: -1}
    assert file_values(ds).tolist() == [9, 3]
    ds.mapping = {0: 0, 256: 1}
    with pytest.raises(ValueError, match='up to 256 do not fit'): file_values(ds)


def test_predictions_follow_the_protocol_at_the_size_of_the_image(tmp_path):
    model, samples, how = Coarse().eval(), pictures(2), Evaluation(shorter=20)
    export_predictions(model, Listed(samples), tmp_path, CPU, how, source='ours')
    for s in samples: assert np.asarray(Image.open(tmp_path / f'{s.id}.png')).tolist() == segment(model, s.image[None], how)[0].tolist()


class Breaks(Told):
    "Stops with an error at the n-th image."
    def __init__(self, n, classes=C):
        super().__init__(classes)
        self.left = n

    def forward(self, image, chunk=None):
        self.left -= 1
        if not self.left: raise KeyboardInterrupt
        return super().forward(image, chunk)


def test_an_interrupted_export_goes_on(tmp_path):
    ds = Listed([told(np.full((2, 2), i), np.zeros((2, 2), np.int64), f'{i:02}') for i in range(4)])
    with pytest.raises(KeyboardInterrupt): export(ds, tmp_path, model=Breaks(3))
    assert pngs(tmp_path) == ['00.png', '01.png']
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob('*.png')}
    (tmp_path / '01.png').unlink()
    assert export(ds, tmp_path) == 3 and pngs(tmp_path) == [f'{i:02}.png' for i in range(4)]
    assert (tmp_path / '00.png').stat().st_mtime_ns == kept['00.png'], 'what is there is not written again'
    for i in range(4): assert np.asarray(Image.open(tmp_path / f'{i:02}.png')).tolist() == [[i] * 2] * 2
    assert export(ds, tmp_path) == 0


def test_a_half_written_file_never_has_the_final_name(tmp_path, monkeypatch):
    ds = Listed([told(np.full((2, 2), 3), np.zeros((2, 2), np.int64))])
    def torn(self, path, *args, **options):
        path.write_bytes(b'half')
        raise OSError('no space left')
    with monkeypatch.context() as patch, pytest.raises(OSError, match='no space'):
        patch.setattr(Image.Image, 'save', torn)
        export(ds, tmp_path)
    assert pngs(tmp_path) == []
    assert export(ds, tmp_path) == 1 and np.asarray(Image.open(tmp_path / 'a.png')).tolist() == [[3, 3]] * 2


def test_a_folder_says_whose_predictions_it_holds(tmp_path):
    ds, folder = Listed([told(np.zeros((2, 2), np.int64), np.zeros((2, 2), np.int64))]), tmp_path / 'new/out'
    export(ds, folder, 'pascal/protoseg seed 0')
    assert json.loads((folder / 'predictions.json').read_text()) == {'source': 'pascal/protoseg seed 0'}
    assert export(ds, folder, 'pascal/protoseg seed 0') == 0


def test_predictions_of_two_models_are_not_mixed(tmp_path):
    ds = Listed([told(np.full((2, 2), i), np.zeros((2, 2), np.int64), f'{i:02}') for i in range(2)])
    folder = tmp_path / 'predicted'
    export(ds, folder, 'first')
    (folder / '01.png').unlink()
    with pytest.raises(ValueError) as e: export(ds, folder, 'second')
    assert str(folder) in str(e.value) and 'first' in str(e.value)
    assert pngs(folder) == ['00.png'] and json.loads((folder / 'predictions.json').read_text()) == {'source': 'first'}
    assert export(ds, folder, 'first') == 1


def test_pictures_that_are_there_are_not_taken_for_predictions(tmp_path):
    ds = Listed([told(np.zeros((2, 2), np.int64), np.zeros((2, 2), np.int64))])
    Image.new('L', (2, 2)).save(tmp_path / 'a.png')
    with pytest.raises(ValueError, match='unknown origin'): export(ds, tmp_path, 'first')
    assert not (tmp_path / 'predictions.json').exists()
    for text in ('{', '{}'):
        (tmp_path / 'predictions.json').write_text(text)
        with pytest.raises(ValueError, match='predictions of None' if text == '{}' else r'predictions\.json is damaged'): export(ds, tmp_path, 'first')


def test_the_name_is_written_before_the_first_prediction(tmp_path):
    ds = Listed([told(np.zeros((2, 2), np.int64), np.zeros((2, 2), np.int64))])
    with pytest.raises(KeyboardInterrupt): export(ds, tmp_path, 'first', Breaks(1))
    assert pngs(tmp_path) == [] and json.loads((tmp_path / 'predictions.json').read_text()) == {'source': 'first'}
    with pytest.raises(ValueError, match=str(tmp_path)): export(ds, tmp_path, 'second')


def test_ids_with_folders_are_exported_below_the_folder(tmp_path):
    """Ids of a dataset of the user's own may hold a slash."""
    save(tmp_path / 'data/images/day/a.png', np.zeros((4, 6, 3), np.uint8))
    save(tmp_path / 'data/labels/day/a.png', np.zeros((4, 6), np.uint8))
    write(tmp_path / 'data/labels.json', '{"names": ["x", "y"]}')
    write(tmp_path / 'data/val.txt', 'day/a\n')
    ds = open_dataset('folder', 'val', root=tmp_path / 'data')
    assert export(ds, tmp_path / 'out') == 1 and (tmp_path / 'out/day/a.png').is_file()
