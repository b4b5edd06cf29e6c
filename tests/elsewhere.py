"""A device that is not there. What it holds lies in CPU tensors, which refuse to meet those of the CPU, as those of a GPU would.

    python elsewhere.py RUNS WORK [NOTEBOOK ...]

trains what is missing of the smoke experiment on it, continues a stopped training, runs paper notebooks on it, and prints what came
out as JSON. A script of its own: a device cannot be taken away again."""
import json
import os
import shutil
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self): return [torch.bfloat16]


_setup_privateuseone_for_python_backend('elsewhere', Backend())
DEVICE = torch.device('elsewhere', 0)
aten = torch.ops.aten
INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}   # indices may be on the CPU
MOVES = {aten._to_copy.default, aten.copy_.default}


class Elsewhere(torch.Tensor):
    "A tensor of `DEVICE`; `held` is the CPU tensor with its values."
    @staticmethod
    def __new__(cls, held):
        out = torch.Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
                                                  dtype=held.dtype, device=DEVICE)
        out.held = held
        return out

    def __repr__(self): return f'Elsewhere({self.held})'

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return dispatch(func, args, kwargs or {})


def is_elsewhere(device): return device is not None and torch.device(device).type == DEVICE.type


def dispatch(func, args, kwargs):
    "Run an operator on what the tensors hold; RuntimeError where a GPU would refuse."
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    away = [x for x in tensors if isinstance(x, Elsewhere)]
    named = 'device' in kwargs and kwargs['device'] is not None
    result_away = is_elsewhere(kwargs['device']) if named else bool(away)
    if away and func not in MOVES:
        strangers = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim()]       # a number of the CPU may meet any tensor
        if func in INDEX and isinstance(args[0], Elsewhere):
            indices = {id(x) for x in args[1] if x is not None}
            strangers = [x for x in strangers if id(x) not in indices]
        if strangers: raise RuntimeError(f'{func}: expected all tensors on one device, but {[tuple(x.shape) for x in strangers]} are on the CPU')
    kwargs = {k: v for k, v in kwargs.items() if k not in ('device', 'pin_memory')}
    out = func(*tree_map_only(Elsewhere, lambda x: x.held, args), **tree_map_only(Elsewhere, lambda x: x.held, kwargs))
    if func is aten.copy_.default: return args[0]
    if not result_away: return out
    same = {id(x.held): x for x in away}
    return tree_map_only(torch.Tensor, lambda x: same[id(x)] if id(x) in same else Elsewhere(x), out)


class Factories(TorchDispatchMode):
    "Operators without tensors make theirs elsewhere if they are told to."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return dispatch(func, args, kwargs or {})


class Below(TorchFunctionMode):
    "What torch does below its operators, where `Factories` cannot see it."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, own = kwargs or {}, bool(args) and isinstance(args[0], Elsewhere)
        if func is torch.Tensor.new_tensor and own:
            func, args, kwargs = torch.tensor, args[1:], {'dtype': args[0].dtype, 'device': DEVICE, **kwargs}
        if func in (torch.tensor, torch.as_tensor) and is_elsewhere(kwargs.get('device')):
            return func(*args, **{k: v for k, v in kwargs.items() if k != 'device'}).to(DEVICE)
        if own and func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError(f"can't convert {DEVICE} tensor to numpy; use Tensor.cpu() first")
        if own and func is torch.Tensor.tolist: return args[0].held.tolist()
        if own and func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            at = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.as_tensor(i) if isinstance(i, (list, np.ndarray)) else i for i in at), *args[2:])
        return func(*args, **kwargs)


@contextmanager
def elsewhere():
    "The package has this device, and takes it for `auto`. Before the modules that ask are imported."
    import scaleprotoseg.model as model
    there = model.pick_device
    model.pick_device = lambda name='auto': DEVICE if name == 'auto' or is_elsewhere(name) else there(name)
    torch.accelerator.synchronize = lambda device=None: None
    import scaleprotoseg.training as training
    from lightning.fabric import Fabric
    from lightning.fabric.accelerators import CPUAccelerator
    from lightning.fabric.strategies import SingleDeviceStrategy

    class Accelerator(CPUAccelerator):
        def setup_device(self, device): pass
    fabric = training.make_fabric
    training.make_fabric = lambda device, precision, devices=0: \
        Fabric(accelerator=Accelerator(), strategy=SingleDeviceStrategy(device=DEVICE)) if is_elsewhere(device) else fabric(device, precision, devices)
    with Factories(), Below(): yield


def refusals():
    "Whether each mistake is refused, by name."
    here, there = torch.rand(3), torch.rand(3, device=DEVICE)
    tries = {'sum': lambda: here + there, 'matrix': lambda: there @ here, 'write': lambda: there.add_(here), 'index': lambda: here[there > 2],
             'put': lambda: there.index_put_((torch.tensor([0, 1]),), here[:2]), 'where': lambda: torch.where(there > 0, here, there),
             'numpy': there.numpy, 'asarray': lambda: np.asarray(there)}
    found = {}
    for name, mistake in tries.items():
        try: mistake()
        except (RuntimeError, TypeError): found[name] = True
        else: found[name] = False
    return found


def scores(folder): return {k: v for k, v in json.loads((folder / 'metrics.json').read_text()).items() if k not in ('memory_mb', 'seconds_training')}


def trained(out, method, device, variant=''):
    "The scores of every stage."
    from scaleprotoseg.training import run_method
    return {f.name: scores(f) for f in run_method('smoke', method, variant, out=out, device=str(device))}


def continued(out, method, stage):
    "The scores of a stage that is asked to stop in each of its updates, and how often it was."
    import scaleprotoseg.training as training
    losses, sessions = training.stage_losses, 0
    def ask(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return losses(*args, **kwargs)
    training.stage_losses, training.READ_EVERY = ask, 1
    while True:
        try: return scores(training.run_stage('smoke', method, stage, out=out, device=str(DEVICE))), sessions
        except training.Interrupted: sessions += 1


def run_notebook(path, **values):
    "Every cell in one namespace, with other parameters."
    import matplotlib.pyplot as plt
    from IPython.display import display
    space = {'__name__': '__main__', 'display': display}
    for cell in json.loads(path.read_text())['cells']:
        if cell['cell_type'] != 'code': continue
        exec(compile(''.join(cell['source']), f'{path.name} {cell["id"]}', 'exec'), space)
        if 'parameters' in cell['metadata'].get('tags', []): space |= {k: v for k, v in values.items() if k in space}
    plt.close('all')


def said(f, *args, **kwargs):
    "Empty, or how it failed."
    try: f(*args, **kwargs)
    except Exception: return traceback.format_exc()[-3000:]
    return ''


def use(folder, work):
    "Predict, explain, evaluate and export with a finished stage."
    from scaleprotoseg.cli import evaluate, export
    from scaleprotoseg.partscapes import PartScapes
    from scaleprotoseg.predict import load
    image = PartScapes('val', size=(64, 96), n=1)[0].image
    one, other = (load(folder, device=d) for d in (DEVICE, 'cpu'))
    assert one.device == DEVICE and np.array_equal(one.predict(image), other.predict(image))
    assert one.explain(image, at=(9, 9)).to_dict() == other.explain(image, at=(9, 9)).to_dict()
    for name in (str(DEVICE), 'cpu'): evaluate(folder, device=name, output=work / f'{name.split(":")[0]}.json')
    assert (work / 'elsewhere.json').read_text() == (work / 'cpu.json').read_text()
    export(folder, work / 'exported', split='val', device=str(DEVICE))


def main(out, work, *notebooks):   # folders
    from scaleprotoseg.recipes import recipes_of
    found = {'refused': refusals(), 'elsewhere': {r.name.split('/')[1]: trained(out, r.method, DEVICE, r.variant) for r in recipes_of('smoke')}}
    found['here'] = {method: trained(work / 'here', method, 'cpu') for method in ('pretrain', 'linear', 'protoseg', 'scaleprotoseg', 'prototype_view')}
    found['use'] = said(use, out / 'smoke/scaleprotoseg/seed0/threshold', work)
    values = dict(experiment='smoke', runs=str(out), out=str(work / 'figures'))
    found['notebooks'] = {name: said(run_notebook, Path('nbs/paper') / f'{name}.ipynb', **values) for name in notebooks}
    shutil.copytree(out / 'smoke/pretrain', work / 'continued/smoke/pretrain')
    found['continued'], found['sessions'] = continued(work / 'continued', 'prototype_view', 'joint')
    return found


if __name__ == '__main__':
    os.environ.setdefault('MPLBACKEND', 'agg')
    with elsewhere(): print(json.dumps(main(*map(Path, sys.argv[1:3]), *sys.argv[3:])))
