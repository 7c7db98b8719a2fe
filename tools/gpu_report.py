"""All figures of a machine with a GPU, in one run. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hae_jax.commands.gpu_report import main

if __name__ == "__main__":
    main()
