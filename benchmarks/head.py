"""Prototype heads: seconds forward, forward and backward, beside a 1×1 convolution and the published loops; growth; memory.

`python benchmarks/head.py [--only SIZE] [--threads N] [--device cuda]`"""
import statistics
import sys

import published
import torch
import typer
from sizes import (CHANNELS, GROUPS, PER_CLASS, SCALES, SIZES, above_start, in_own_process, in_turns, random, row, save)
from torch import nn

from scaleprotoseg.heads import GroupHead, LinearHead, PixelHead
from scaleprotoseg.model import Model
from scaleprotoseg.prototypes import Prototypes


def models(classes: int, protoseg: int, device: str = 'cpu') -> dict[str, Model]:
    "Heads on given features: ours with groups, ours as ProtoSeg's, and the cost baseline."
    torch.manual_seed(0)
    on_features = lambda prototypes, head: Model(nn.Identity(), prototypes, head, 'none').to(device)
    thresholded = GroupHead(SCALES, classes, PER_CLASS, GROUPS)
    thresholded.weights.data *= random(classes, 1, SCALES, PER_CLASS, seed=3) < 0.5                # published: 131 of 252, 111 of 228
    return {'product': on_features(Prototypes(SCALES, classes, PER_CLASS, CHANNELS), GroupHead(SCALES, classes, PER_CLASS, GROUPS)),
            'product, half used': on_features(Prototypes(SCALES, classes, PER_CLASS, CHANNELS), thresholded),
            'product, ProtoSeg': on_features(Prototypes(1, classes, protoseg, CHANNELS), LinearHead(1, classes, protoseg)),
            '1×1 convolution': on_features(None, PixelHead(SCALES, classes, CHANNELS))}


def forms(classes: int, protoseg: int, grid, batch: int, backward: bool, device: str = 'cpu', loops: bool = True):
    "Functions of no argument, each a whole pass."
    ours = models(classes, protoseg, device)
    features = random(batch, SCALES, CHANNELS, *grid).to(device).requires_grad_(backward)
    upstream = random(batch, classes, *grid, seed=1).to(device)
    grouped, single = ours['product'], ours['product, ProtoSeg']
    run = {name: (lambda m=m: m.score(features[:, :1] if m is single else features).logits) for name, m in ours.items()}
    if loops: run |= {
        'published': lambda: published.grouped_logits(features, grouped.prototypes.vectors, grouped.head.weights, grouped.head.last),
        'published, ProtoSeg': lambda: published.linear_logits(features[:, :1], single.prototypes.vectors, single.head.weight)}
    def forward(f):
        with torch.no_grad(): f()
    def both(f):
        features.grad = None
        f().backward(upstream)
    return {name: (lambda f=f: (both if backward else forward)(f)) for name, f in run.items()}


def measured(name, work, size, grid, batch, backward, device, repeats):
    seconds = in_turns(forms(size.classes, size.protoseg, grid, batch, backward, device), repeats)
    middle = {k: statistics.median(v) for k, v in seconds.items()}
    ratio = {'grouped/ProtoSeg': middle['product'] / middle['product, ProtoSeg'], 'published/half used': middle['published'] / middle['product, half used'],
             'half used/ProtoSeg': middle['product, half used'] / middle['product, ProtoSeg']}
    return row(f'{name}, {size.prototypes} prototypes, {grid[0]}×{grid[1]}', work, seconds, 'published', '1×1 convolution', **ratio)


def growth(device: str, repeats: int) -> list[dict]:
    "The product and the convolution as one number grows and the others stay."
    rows = []
    for title, cases in {'classes': [(c, (65, 65)) for c in (19, 38, 76, 152, 304)],
                         'cells': [(19, (n, n)) for n in (33, 65, 129, 257)]}.items():
        for classes, grid in cases:
            seconds = in_turns(forms(classes, 10, grid, 1, False, device, loops=False), repeats)
            rows.append(row(f'{classes} classes, {12 * classes} prototypes, {grid[0]}×{grid[1]}', f'growth with {title}', seconds, '', '1×1 convolution'))
    return rows


def memory(name: str, form: str, work: str) -> float:
    "MB above the features, in this process."
    size, backward = SIZES[name], work == 'both'
    torch.set_num_threads(1)
    run = forms(size.classes, size.protoseg, size.crop if backward else size.grid, 2 if backward else 1, backward)[form]
    return above_start(run)


def main(only: str = '', threads: int = 0, device: str = 'cpu', repeats: int = 9):
    "All sizes, growth, memory."
    if threads: torch.set_num_threads(threads)
    rows = []
    for name, size in SIZES.items():
        if only and name != only: continue
        rows.append(measured(name, 'forward', size, size.grid, 1, False, device, repeats))
        rows.append(measured(name, 'forward + backward', size, size.crop, 2, True, device, repeats))
        if name == 'ADE20K': rows.append(measured(name, 'forward', size, (129, 257), 1, False, device, repeats))
        if name == 'Cityscapes': rows.append(measured(name, 'forward', size, (65, 65), 1, False, device, repeats))
        if device == 'cpu':
            for work in ('forward', 'both'):
                mb = {form: in_own_process(__file__, 'memory', name, form, work) for form in ('published', 'product', '1×1 convolution')}
                rows.append({'size': name, 'work': {'forward': 'forward, MB', 'both': 'forward + backward, MB'}[work], **mb})
    if not only: rows += growth(device, repeats)
    save('head', rows, device)


if __name__ == '__main__':
    if sys.argv[1:2] == ['memory']: print(memory(*sys.argv[2:]))
    else: typer.run(main)
