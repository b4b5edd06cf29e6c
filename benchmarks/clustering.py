"""Online clustering: seconds of assignment and movement beside the published loop over classes.

`python benchmarks/clustering.py [--threads N] [--device cuda]`; the paper says 2.5 ms for 10 000 pixels and 10 prototypes, on
hardware that it does not name, without saying what is in it."""
import published
import torch
import torch.nn.functional as F
import typer
from sizes import in_turns, random, row, save

from scaleprotoseg.clustering import assign, assigned_sums, follow_

# name -> pixels, classes, prototypes per class, channels
CASES = {'one class, as in the claim': (10_000, 1, 10, 720), 'Cityscapes, two crops of 512×1024': (2 * 128 * 256, 19, 10, 720),
         'ADE20K, two crops of 512×512': (2 * 128 * 128, 150, 10, 256)}


def main(threads: int = 0, device: str = 'cpu', repeats: int = 9):
    "Assignment alone, and a whole step: similarities to all prototypes, assignment, movement."
    if threads: torch.set_num_threads(threads)
    rows = []
    for name, (n, C, K, D) in CASES.items():
        z = F.normalize(random(n, D) - .5, dim=1).to(device)
        vectors = F.normalize(random(C, K, D, seed=1) - .5, dim=-1).to(device)
        labels = torch.randint(0, C, (n,), generator=torch.Generator().manual_seed(2)).to(device)
        alive = torch.ones(C, K, dtype=torch.bool, device=device)
        own = (z @ vectors.flatten(0, 1).T).view(n, C, K)[torch.arange(n, device=device), labels]
        everything = torch.arange(C, device=device)
        def step(z=z, vectors=vectors, labels=labels, alive=alive, C=C, K=K):
            scores = (z @ vectors.flatten(0, 1).T).view(len(z), C, K)
            mine = scores.gather(1, labels[:, None, None].expand(-1, 1, K))[:, 0]
            index = torch.where(scores.amax(-1).argmax(-1) == labels, labels * K + assign(mine, labels, alive), -1)
            sums, counts = assigned_sums(z, index, C * K)
            follow_(vectors, sums.view(C, K, -1), counts.view(C, K))
        forms = {'product': lambda own=own, labels=labels, alive=alive: assign(own, labels, alive),
                 'published': lambda own=own, labels=labels, everything=everything: published.assignment(own, labels, everything)}
        rows.append(row(f'{name}: {n} pixels, {C} × {K} prototypes', 'assignment', in_turns(forms, repeats), 'published'))
        forms = {'product': step, 'published': lambda z=z, v=vectors, y=labels: published.clustering_step(z, v.clone(), y)}
        rows.append(row(f'{name}: {n} pixels, {C} × {K} prototypes, {D} channels', 'similarities, assignment, movement', in_turns(forms, repeats), 'published'))
    save('clustering', rows, device)


if __name__ == '__main__': typer.run(main)
