"""Diversity loss and simplex: seconds beside the published loops. `python benchmarks/losses.py [--threads N] [--device cuda]`"""
import published
import torch
import typer
from sizes import CHANNELS, GROUPS, PER_CLASS, SCALES, SIZES, in_turns, random, row, save, squares

from scaleprotoseg.heads import to_simplex
from scaleprotoseg.losses import diversity
from scaleprotoseg.prototypes import squared_distances

PRESENT = {'Pascal': [3], 'Cityscapes': [12, 19], 'ADE20K': [12, 40], 'COCO-Stuff': [8]}   # classes in a crop


def both(loss, distances, labels):
    "A function that takes the loss of distances that need a gradient, and its gradient."
    def run():
        distances.grad = None
        loss(distances, labels).backward()
    return run


def simplex_loop(weights):
    "One class at a time, one row at a time, as published."
    for own in weights:
        for w in own: to_simplex(w.flatten())


def main(threads: int = 0, device: str = 'cpu', repeats: int = 7):
    "Batches of two crops."
    if threads: torch.set_num_threads(threads)
    rows = []
    for name, numbers in PRESENT.items():
        size = SIZES[name]
        features, vectors = random(2, SCALES, CHANNELS, *size.crop), random(SCALES, size.classes, PER_CLASS, CHANNELS, seed=1)
        distances = squared_distances(features, vectors).to(device).requires_grad_()
        alive = torch.ones(distances.shape[1:4], dtype=torch.bool, device=device)
        for present in numbers:
            labels = torch.stack([squares(present, size.crop, 5, seed) for seed in (2, 3)]).to(device)
            forms = {'product': both(lambda d, y, a=alive: diversity(d, y, a), distances, labels), 'published': both(published.diversity, distances, labels)}
            rows.append(row(f'{name}, {size.classes} classes, {present} present', 'diversity, forward + backward', in_turns(forms, repeats), 'published'))
        weights = random(size.classes, GROUPS, SCALES, PER_CLASS).to(device)
        forms = {'product': lambda w=weights: to_simplex(w.flatten(2)), 'published': lambda w=weights: simplex_loop(w)}
        rows.append(row(f'{name}, {size.classes} classes', 'simplex projection', in_turns(forms, repeats), 'published'))
    save('losses', rows, device)


if __name__ == '__main__': typer.run(main)
