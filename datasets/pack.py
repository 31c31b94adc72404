"""Compresses Minari sets where they are, to a third of their size or less: gzip and shuffle, read as before.

    python datasets/pack.py datasets/hopper/medium-v0 datasets/hopper/expert-v0
"""
import sys
from pathlib import Path

import h5py


def pack(path):
    """Rewrites a Minari main_data.hdf5 compressed; the file is there whole at any moment."""
    with h5py.File(path) as source, h5py.File(path.with_name("packed"), "w", libver="latest") as packed:
        packed.attrs.update(source.attrs)
        source.visititems(lambda name, item: (
            packed.create_dataset(name, data=item[()], compression="gzip", compression_opts=9, shuffle=True)
            if isinstance(item, h5py.Dataset) else packed.require_group(name)).attrs.update(item.attrs))
    path.with_name("packed").replace(path)


if __name__ == "__main__":
    for folder in sys.argv[1:] or sys.exit(__doc__):
        try:
            pack(Path(folder, "data", "main_data.hdf5"))
        except OSError as error:
            sys.exit(f"pack.py: {folder} is no Minari set: {error}")
