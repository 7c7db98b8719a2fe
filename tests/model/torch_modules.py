"""Helpers with PyTorch: a module that has only the parameters of a state dict."""

from collections.abc import Mapping

import numpy as np
import torch


def module_of(shapes: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
    """Nested modules with these parameters, uninitialised, in this order."""
    root = torch.nn.Module()
    for name, shape in shapes.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(last, torch.nn.Parameter(torch.full(shape, torch.nan)))
    return root


def tensors(state: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The same dict for PyTorch."""
    return {name: torch.from_numpy(value) for name, value in state.items()}
