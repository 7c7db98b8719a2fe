"""The report page of a folder of results or of a training run. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hae_jax.commands.report import main

if __name__ == "__main__":
    main()
