"How fast PartScapes renders, on one core, beside reading a rendered image from PNG files."
import tempfile
from pathlib import Path

import cv2
import torch
import typer
from PIL import Image
from sizes import in_turns, row, save

from scaleprotoseg.data import read_image
from scaleprotoseg.partscapes import PartScapes


def main(height: int = 128, width: int = 192, images: int = 64, repeats: int = 7):
    "A row: ms per image and label map, rendered and read."
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    ds = PartScapes('train', size=(height, width), n=images)
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder) / f'{i}.png', Path(folder) / f'{i}_label.png') for i in range(images)]
        for sample, (image, label) in zip(ds, files):
            Image.fromarray(sample.image.mul(255).round().byte().permute(1, 2, 0).numpy()).save(image)
            Image.fromarray(sample.label.byte().numpy()).save(label)
        forms = {'product': lambda: [ds[i] for i in range(images)], 'decode': lambda: [[read_image(f) for f in pair] for pair in files]}
        seconds = {name: [s / images for s in taken] for name, taken in in_turns(forms, repeats).items()}
    made = row(f'PartScapes, {height}×{width}', 'image and label map', seconds, baseline='decode')
    save('partscapes', [{**made, **{f'images/s, {form}': 1000 / ms for form, ms in made['ms'].items()}}])


if __name__ == '__main__': typer.run(main)
