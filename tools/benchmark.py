"""Time and memory of training, forward pass, translation, loader and blocks. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hae_jax.commands.benchmark import main

if __name__ == "__main__":
    main()
