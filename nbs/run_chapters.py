"""Run the chapters and keep their outputs, without paths of this machine: `python nbs/run_chapters.py [NAME.ipynb ...]`."""
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean

from scaleprotoseg.notebooks import without_machine_paths

HERE = Path(__file__).resolve().parent


def run(path: Path):
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    for cell in notebook.cells:
        if 'outputs' in cell: cell.outputs = [nbformat.from_dict(without_machine_paths(o)) for o in cell.outputs]
    nbformat.write(notebook, path)
    nbdev_clean(str(path))


if __name__ == '__main__':
    for path in [HERE / name for name in sys.argv[1:]] or sorted(HERE.glob('[0-9]*.ipynb')):
        print(path.name)
        run(path)
