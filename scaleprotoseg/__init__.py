"""Interpretable semantic segmentation with multi-scale grouped prototypes.

`scaleprotoseg.load(run)` opens a trained model: `predict(image)` gives a label map, `explain(image)` says why.
"""
__version__ = "0.1.0"
__all__ = ['load']


def __getattr__(name):
    if name == 'load':  # imported on first use, so that `import scaleprotoseg` stays quick
        from .predict import load
        return load
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
