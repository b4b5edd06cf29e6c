"How fast PartScapes renders: median images per second on one core."
import statistics
import time

import typer

from scaleprotoseg.partscapes import PartScapes


def main(height: int = 128, width: int = 192, images: int = 64, repeats: int = 5):
    "Render `images` images `repeats` times and print the median rate."
    ds = PartScapes('train', size=(height, width), n=images)
    ds[0]                                    # builds the noise tile
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        for i in range(images): ds[i]
        rates.append(images / (time.perf_counter() - start))
    print(f'PartScapes {height}x{width}: {statistics.median(rates):.0f} images/s '
          f'(median of {repeats} x {images}; {min(rates):.0f} to {max(rates):.0f})')


if __name__ == '__main__': typer.run(main)
