"""Measures the best flair threshold on a folder of cases; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hae_jax.commands.phantom_threshold import main

if __name__ == "__main__":
    main()
