"""Trains a network: `python train.py --help`."""

from hae_jax.commands.train import main

if __name__ == "__main__":
    main()
