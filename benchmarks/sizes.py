"The sizes of the papers, timing in turns, memory in a process of its own, and tables."
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from scaleprotoseg.runs import device_name

SCALES, CHANNELS, GROUPS, PER_CLASS = 4, 64, 3, 3    # of ScaleProtoSeg, on every dataset
OUT = Path(__file__).parents[1] / 'figures' / 'benchmarks'


@dataclass(frozen=True)
class Size:
    "A dataset as a head sees it."
    classes: int
    grid: tuple[int, int]      # cells of an image in evaluation
    crop: tuple[int, int]      # cells of a crop in training
    image: tuple[int, int]     # pixels of an image in evaluation
    present: int               # classes in an image
    protoseg: int = 10         # prototypes of ProtoSeg per class

    @property
    def prototypes(self) -> int: return self.classes * SCALES * PER_CLASS


SIZES = {'EM': Size(2, (512, 512), (512, 512), (512, 512), 2),
         'Pascal': Size(21, (65, 65), (41, 41), (375, 500), 3),
         'Cityscapes': Size(19, (129, 257), (65, 65), (1024, 2048), 12),
         'ADE20K': Size(150, (65, 86), (65, 65), (512, 683), 10, 12),
         'COCO-Stuff': Size(182, (61, 81), (41, 41), (480, 640), 8, 12)}


def random(*shape, seed: int = 0) -> torch.Tensor: return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def squares(values: int, size: tuple[int, int], side: int, seed: int = 0) -> torch.Tensor:
    "A label map (H, W) int64 of squares with values below `values`."
    blocks = torch.randint(0, values, (size[0] // side + 1, size[1] // side + 1), generator=torch.Generator().manual_seed(seed))
    return blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)[:size[0], :size[1]].contiguous()


def in_turns(forms: Mapping[str, Callable[[], object]], repeats: int = 7, patience: float = 60.) -> dict[str, list[float]]:
    "Seconds of every form, which take turns so that noise of the machine meets all; fewer repeats (at least 3) when that takes long."
    seconds, began = {name: [] for name in forms}, time.perf_counter()
    for turn in range(repeats + 1):                        # the first one warms up
        if turn > 3 and time.perf_counter() - began > patience: break
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            if torch.cuda.is_available(): torch.cuda.synchronize()
            if turn: seconds[name].append(time.perf_counter() - start)
    return seconds


def row(size: str, work: str, seconds: Mapping[str, list[float]], published: str = '', baseline: str = '', product: str = 'product', **facts) -> dict:
    "A JSON-plain row: medians in ms, and ratios of the loop-based form to the product and of the product to the baseline."
    ms = {name: 1e3 * statistics.median(x) for name, x in seconds.items()}
    spread = {name: [1e3 * min(x), 1e3 * max(x)] for name, x in seconds.items()}
    return {'size': size, 'work': work, 'threads': torch.get_num_threads(), 'ms': ms, 'spread_ms': spread, **facts,
            **({'published/product': ms[published] / ms[product]} if published else {}),
            **({'product/baseline': ms[product] / ms[baseline]} if baseline else {})}


def above_start(form: Callable[[], object]) -> float:
    "By how many MB the memory of this process rises above what it holds before, at its peak (Linux)."
    status = lambda key: next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(key)) / 1024
    Path('/proc/self/clear_refs').write_text('5')          # the peak so far, of imports, is forgotten
    before = status('VmRSS')
    form()
    return status('VmHWM') - before


def in_own_process(script: str, *arguments: str) -> float:
    "The number that a script prints last."
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode: raise RuntimeError(f'{script} {arguments}: {done.stderr}')
    return float(done.stdout.split()[-1])


def save(name: str, rows: list[dict], device: str = 'cpu'):
    "Write the rows with the machine they were measured on, and print them."
    OUT.mkdir(parents=True, exist_ok=True)
    git = lambda *said: subprocess.run(['git', *said], capture_output=True, text=True, cwd=OUT).stdout.strip()
    changed = git('status', '--porcelain', '-uno', '--', ':(top)scaleprotoseg', ':(top)benchmarks')       # results of the benchmark before are no change
    commit = git('rev-parse', '--short', 'HEAD') + '-dirty' * bool(changed)
    facts = {'command': f'python benchmarks/{Path(sys.argv[0]).name} {" ".join(sys.argv[1:])}'.strip(), 'commit': commit,
             'device': device_name(torch.device(device)), 'torch': torch.__version__, 'python': platform.python_version()}
    path = OUT / f'{name}{"" if device == "cpu" else "_" + device}.json'
    path.write_text(json.dumps({**facts, 'rows': rows}, indent=1) + '\n')
    print(table(rows))
    print(f'{path}: {facts}')


def table(rows: list[dict]) -> str:
    "Rows as Markdown: medians with the fastest and slowest run, ratios, and whatever else a row says."
    number = lambda x: '–' if x is None else x if isinstance(x, str) else str(x) if isinstance(x, int) else f'{x:.3g}' if x < 100 else f'{x:.0f}'
    lines = []
    for r in rows:
        rest = {k: v for k, v in r.items() if k not in ('size', 'work', 'ms', 'spread_ms')}
        times = ', '.join(f'{k} {number(v)} ({number(r["spread_ms"][k][0])}–{number(r["spread_ms"][k][1])})' for k, v in r.get('ms', {}).items())
        lines.append(f'| {r["size"]} | {r["work"]} | {times} | ' + ', '.join(f'{k} {number(v)}' for k, v in rest.items()) + ' |')
    return '\n'.join(['| size | work | ms: median (fastest–slowest) | ratios and facts |', '| --- | --- | --- | --- |', *lines])
