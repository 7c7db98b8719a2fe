"""Several methods on the same cases, in one table. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hae_jax.commands.compare_methods import main

if __name__ == "__main__":
    main()
