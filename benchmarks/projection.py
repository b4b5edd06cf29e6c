"""Projection of one image, without the backbone: seconds beside the published loops, and the passes of the network over a split.

`python benchmarks/projection.py [--threads N]`"""
import numpy as np
import published
import torch
import typer
from sizes import CHANNELS, PER_CLASS, SCALES, SIZES, in_turns, random, row, save, squares

from scaleprotoseg.projection import Projection
from scaleprotoseg.prototypes import Prototypes
from scaleprotoseg.transforms import reduce_labels


def main(threads: int = 0, repeats: int = 7):
    "Maps are given; labels come as stored values, one of which is void."
    if threads: torch.set_num_threads(threads)
    rows = []
    for name in ('Pascal', 'Cityscapes', 'ADE20K'):
        size = SIZES[name]
        torch.manual_seed(0)
        layer = Prototypes(SCALES, size.classes, PER_CLASS, CHANNELS)
        features = random(1, SCALES, CHANNELS, *size.grid)
        with torch.no_grad(): distances, similarities = layer(features)
        raw = squares(size.present + 1, size.image, 64)                                     # stored: 0 is void, class c is c + 1
        table = np.full(256, -1)
        table[1:size.classes + 1] = np.arange(size.classes)
        values = {v: int(table[v]) for v in range(256)}
        def ours(raw=raw, table=table, size=size, layer=layer, maps=(features, distances, similarities)):
            label = torch.from_numpy(table[raw.numpy()])
            projection = Projection(layer)
            projection.update(0, *maps, reduce_labels(label[None], size.grid))
            return projection
        def loops(raw=raw, values=values, distances=distances): return published.nearest_cells(distances[0], raw, values)
        rows.append(row(f'{name}, {size.prototypes} prototypes, {size.grid[0]}×{size.grid[1]}', 'projection of an image',
                        in_turns({'product': ours, 'published': loops}, repeats), 'published',
                        **{'network passes for N images': 'N', 'published passes': f'N + {2 * size.prototypes}'}))
    save('projection', rows)


if __name__ == '__main__': typer.run(main)
