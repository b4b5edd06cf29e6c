"""Training samples from files: ms per image on one core, beside decoding alone and the published order of the steps.

The published program scales bytes, and rounds; the product scales floats. `python benchmarks/data.py [--only NAME]`"""
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import published
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from sizes import SIZES, in_turns, row, save

import scaleprotoseg.datasets  # noqa: F401, makes them known
from scaleprotoseg.data import DATASETS, Dataset, open_dataset, rng
from scaleprotoseg.recipes import Data, find_recipe
from scaleprotoseg.protocols import Augment
from scaleprotoseg.transforms import augment

IMAGES = 8   # that one run goes through


@dataclass(frozen=True)
class Layout:
    "How a dataset lies on the disk, and what makes its files as large as the real ones."
    size: str                  # key of SIZES
    experiment: str            # whose recipe says how to crop
    image: str                 # path of the n-th image
    label: str
    grain: float               # noise of the picture
    cell: int                  # pixels between one region and the next
    files: int = IMAGES
    listed: str = ''           # path of the list of ids, if there is one


VOC = 'VOCdevkit/VOC2012'
LAYOUTS = {
    'EM, PNG': Layout('EM', 'em', 'images/{:02}.png', 'labels/{:02}.png', .05, 20, files=30),
    'EM, TIFF': Layout('EM', 'em', 'train-volume.tif', 'train-labels.tif', .05, 20, files=30),
    'Pascal': Layout('Pascal', 'pascal', f'{VOC}/JPEGImages/2012_{{:06}}.jpg', f'{VOC}/SegmentationClassAug/2012_{{:06}}.png', .055, 200,
                     listed=f'{VOC}/ImageSets/SegmentationAug/train_aug.txt'),
    'Cityscapes': Layout('Cityscapes', 'cityscapes', 'leftImg8bit/train/aachen/aachen_{:06}_000019_leftImg8bit.png',
                         'gtFine/train/aachen/aachen_{:06}_000019_gtFine_labelIds.png', .004, 130),
    'ADE20K': Layout('ADE20K', 'ade20k', *(f'ADEChallengeData2016/{kind}/training/ADE_train_{{:08}}.{end}'
                                           for kind, end in (('images', 'jpg'), ('annotations', 'png'))), .02, 170),
    'COCO-Stuff': Layout('COCO-Stuff', 'cocostuff', 'images/train2017/{:012}.jpg', 'stuffthingmaps_trainval2017/train2017/{:012}.png', .048, 130)}


def smooth(size: tuple[int, int], cell: int, channels: int, generator: torch.Generator) -> torch.Tensor:  # (channels, H, W) around 0
    "Noise that changes over `cell` pixels."
    coarse = torch.rand(1, channels, *(n // cell + 2 for n in size), generator=generator) - .5
    return F.interpolate(coarse, size, mode='bicubic')[0]


def regions(size: tuple[int, int], present: int, cell: int, generator: torch.Generator) -> torch.Tensor:  # (H, W) in 0..present-1
    "A label map of regions with smooth borders."
    return smooth(size, cell, present, generator).argmax(0)


def photograph(label: torch.Tensor, grain: float, generator: torch.Generator) -> np.ndarray:  # (H, W, 3) uint8
    "Regions of one colour each, light and texture at all sizes (the larger the stronger, as in photographs), and grain."
    size, normal = label.shape, lambda channels: torch.randn(channels, *label.shape, generator=generator)
    light = sum(smooth(size, cell, 1, generator) * cell / 800 for cell in (4, 8, 16, 32, 64, 128, 256))
    colour = .3 + .4 * torch.rand(3, int(label.max()) + 1, generator=generator)
    x = colour[:, label] + light + grain * (normal(1) + normal(3) / 3)
    return (255 * x.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()


def recipe(layout: Layout) -> Data: return find_recipe(layout.experiment, 'scaleprotoseg').data


def pair(layout: Layout, n: int) -> tuple[Image.Image, Image.Image]:
    "The n-th image and its label map, as they are stored."
    generator, size = torch.Generator().manual_seed(n), SIZES[layout.size]
    label = regions(size.image, size.present, layout.cell, generator)
    image = Image.fromarray(photograph(label, layout.grain, generator))
    values = np.array([v for v, c in DATASETS[recipe(layout).dataset].mapping.items() if c >= 0], np.uint8)
    chosen = torch.randperm(size.classes, generator=generator)[label]
    return image.convert('L') if layout.size == 'EM' else image, Image.fromarray(values[chosen.numpy()])


def write(layout: Layout, root: Path):
    "All files of a dataset; where one file holds them all, as pages."
    pairs = [pair(layout, n) for n in range(layout.files)]
    for template, pictures in zip((layout.image, layout.label), zip(*pairs)):
        (root / template).parent.mkdir(parents=True, exist_ok=True)
        if template.format(0) == template: pictures[0].save(root / template, save_all=True, append_images=pictures[1:])
        else:
            for n, picture in enumerate(pictures): picture.save(root / template.format(n), quality=90)   # PNG has no quality
    if layout.listed:
        (root / layout.listed).parent.mkdir(parents=True)
        (root / layout.listed).write_text(''.join(f'{Path(layout.image.format(n)).stem}\n' for n in range(layout.files)))


def opened(layout: Layout, root: Path) -> Dataset:
    "The split for training, as its recipe opens it."
    return open_dataset(recipe(layout).dataset, root=root, **recipe(layout).splits['train'])


def files(ds: Dataset, i: int) -> tuple[Path, Path, int]:
    "Image file, label file and page of the i-th sample."
    return ds._files[i] if isinstance(ds._files, list) else (*ds._files(ds.ids[i]), 0)


def each(one: Callable[[int], object]) -> Callable[[], None]:
    "A run over the images, none of which is kept."
    def run():
        for i in range(IMAGES): one(i)
    return run


def forms(ds: Dataset, how: Augment) -> dict[str, Callable[[], None]]:
    "Runs over the same images with the same draws."
    table = np.zeros(256, np.uint8)
    table[list(ds.mapping)] = np.array(list(ds.mapping.values())) + 1
    draws, first = lambda i: rng('data', i), ds[0]
    def decode(i):
        image, label, page = files(ds, i)
        return published.decode(image, page, 'RGB'), published.decode(label, page, 'L')
    return {'decode': each(decode), 'augment': each(lambda i: augment(first, how, draws(i))),
            'product': each(lambda i: augment(ds[i], how, draws(i))),
            'published': each(lambda i: published.sample(*files(ds, i), table, how, draws(i)))}


def measured(name: str, layout: Layout, repeats: int) -> dict:
    "The row of one dataset, whose files are written and removed."
    data = recipe(layout)
    with tempfile.TemporaryDirectory() as folder:
        write(layout, Path(folder))
        ds = opened(layout, Path(folder))
        runs = in_turns(forms(ds, data.augment), repeats)
        seconds = {form: [s / IMAGES for s in run] for form, run in runs.items()}
        kilobytes = {f'kB, {kind}': Path(path).stat().st_size / 1000 for kind, path in zip(('image', 'label'), files(ds, 0))}
    made = row(f'{name}, {"×".join(map(str, SIZES[layout.size].image))}', f'training sample, crop {data.crop[0]}×{data.crop[1]}', seconds, 'published', 'decode', **kilobytes)
    return {**made, **{f'images/s, {form}': 1000 / ms for form, ms in made['ms'].items()}}


def main(only: str = '', repeats: int = 9):
    "All datasets, in the files of their real size."
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    save('data', [measured(name, layout, repeats) for name, layout in LAYOUTS.items() if only in ('', name)])


if __name__ == '__main__': typer.run(main)
