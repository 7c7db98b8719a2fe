"""Finds lesions with a trained network: `python translate.py --help`."""

from hae_jax.commands.translate import main

if __name__ == "__main__":
    main()
