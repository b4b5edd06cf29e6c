"""Consistency, stability and group overlap per image: seconds and memory of the product and of the published structure.

`python benchmarks/interpretability.py`. Each measurement is a process of its own, so that peaks of memory do not mix; the two
forms of one size take turns. No network is run: random similarity maps and random parts of the papers' sizes."""
import json
import statistics
import subprocess
import sys
import time

from sizes import above_start, row, save

SIZES = {   # classes, prototypes per class and scale, classes in the image, map, image
    'Cityscapes, 228 prototypes': (19, 3, 12, (129, 257), (1024, 2048)),
    'Pascal, 252 prototypes': (21, 3, 4, (65, 65), (375, 500)),
    'ADE20K, 1800 prototypes': (150, 3, 20, (65, 86), (512, 683))}
WORK, REPEATS = ('parts', 'parts, loop', 'overlap', 'legacy', 'legacy, loop'), 3


def example(size):
    "Two sets of maps (1, S, C, K, h, w), group maps, labels and parts, in squares."
    import torch
    C, K, present, grid, (H, W) = SIZES[size]
    g = torch.Generator().manual_seed(0)
    clean, noisy = torch.rand(2, 1, 4, C, K, *grid, generator=g)
    def squares(n, side):
        blocks = torch.randint(0, n, (H // side + 1, W // side + 1), generator=g)
        return blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)[:H, :W].contiguous()
    return clean, noisy, torch.rand(1, C, 3, *grid, generator=g), squares(present, 64), squares(6, 24)


def loop(clean, noisy, label, parts, test):
    "The published structure: every map is enlarged and cut as a whole, prototype by prototype, quantile by quantile."
    import numpy as np
    import torch.nn.functional as F
    from scaleprotoseg.interpretability import key_points
    points, size, hits = key_points(label, parts, test.background), tuple(label.shape), 0
    how = dict(mode='nearest') if test.enlarge == 'nearest' else dict(mode='bilinear', align_corners=False)
    for maps in (clean[0], noisy[0]):
        for c in points[:, 0].unique().tolist():
            inside, at = (label == c), points[points[:, 0] == c][:, 2:]
            for m in maps[:, c].flatten(0, 1):
                large = F.interpolate(m[None, None], size, **how)[0, 0] * inside
                for q in test.quantiles:
                    cut = float(np.quantile((large if test.whole_map else large[inside]).numpy(), q))
                    hits += int((large > cut)[at[:, 0], at[:, 1]].sum())
    return hits


def measure(work: str, size: str) -> dict:
    "Seconds for one image, and by how many MB the peak of memory rises above what is there before."
    import torch
    from scaleprotoseg.interpretability import LEGACY, GroupOverlap, PartScores, PartTest
    torch.set_num_threads(1)
    clean, noisy, groups, label, parts = example(size)
    shape, seconds, test = tuple(clean.shape[1:4]), [], LEGACY if work.startswith('legacy') else PartTest()
    def run():
        start = time.perf_counter()
        if work == 'overlap': GroupOverlap(torch.ones(shape[1], 3, dtype=torch.bool)).update(groups, label)
        elif work.endswith('loop'): loop(clean, noisy, label, parts, test)
        else: PartScores(shape, 6, test).update(clean, noisy, label, parts)
        seconds.append(time.perf_counter() - start)
    return {'mb': above_start(run), 'seconds': seconds[0]}


def main():
    "Medians, the ratio of the loop to the product, and memory."
    import torch
    torch.set_num_threads(1)
    rows = []
    for size, (C, K, _, _, (H, W)) in SIZES.items():
        found = {w: [] for w in WORK}
        for _ in range(REPEATS):
            for w in WORK: found[w].append(json.loads(subprocess.run([sys.executable, __file__, w, size], capture_output=True, text=True, check=True).stdout))
        seconds, mb = ({w: [x[k] for x in xs] for w, xs in found.items()} for k in ('seconds', 'mb'))
        rows.append(row(size, 'consistency and stability, one image', {'product': seconds['parts'], 'published': seconds['parts, loop'], 'group overlap': seconds['overlap']},
                        'published', **{'MB product': statistics.median(mb['parts']), 'MB overlap': statistics.median(mb['overlap']),
                                        'MB of all maps enlarged': 4 * C * K * H * W * 4 / 2 ** 20}))
        rows.append(row(size, 'consistency and stability as published, one image', {'product': seconds['legacy'], 'published': seconds['legacy, loop']},
                        'published', **{'MB product': statistics.median(mb['legacy'])}))
    save('interpretability', rows)


if __name__ == '__main__':
    if len(sys.argv) == 3: print(json.dumps(measure(*sys.argv[1:])))
    else: main()
