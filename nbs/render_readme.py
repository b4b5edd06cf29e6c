"""Render nbs/index.ipynb to README.md (no quarto needed): `python nbs/render_readme.py [--stdout]`."""
import re
import sys
from pathlib import Path

from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]


def render() -> str:
    """The text of README.md; links are relative to the repository's root."""
    options = Config({'TagRemovePreprocessor': {'enabled': True, 'remove_cell_tags': ['remove-cell'], 'remove_input_tags': ['remove-input']}})
    text, _ = MarkdownExporter(config=options).from_filename(ROOT / 'nbs' / 'index.ipynb')
    text = re.sub(r'\]\(\.\./', '](', text)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


if __name__ == '__main__':
    if '--stdout' in sys.argv: sys.stdout.write(render())
    else: (ROOT / 'README.md').write_text(render())
