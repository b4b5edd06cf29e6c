"""`python -m scaleprotoseg` is the command line."""
from .cli import main

main()
