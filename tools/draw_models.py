"""Draws the five networks, or counts their parameters; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hae_jax.commands.draw_models import main

if __name__ == "__main__":
    main()
