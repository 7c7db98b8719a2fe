"""Strict conversion between a PyTorch state dict and parameters, in both directions.

The modules define their parameters in the order of the PyTorch modules, so a walk over a new network gives the state
dict's order. The network stores this order (`UNet.parameter_paths`), since `nnx.merge` sorts attributes by name. One
table converts paths to PyTorch's names, and one rule converts the layouts.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from hae_jax.errors import UserError
from hae_jax.model.layers import walk

# Applied in this order to a path such as "output_blocks.1.0.in_norm.scale".
_RENAMINGS = tuple((re.compile(pattern), name) for pattern, name in (
    (r"^head_norm", "out.0"),
    (r"^head_conv", "out.2"),
    (r"^(time_embed|class_emb)\.linear1", r"\1.0"),
    (r"^(time_embed|class_emb)\.linear2", r"\1.2"),
    (r"\.in_norm\.", ".in_layers.0."),
    (r"\.in_conv\.", ".in_layers.2."),
    (r"\.emb_proj\.", ".emb_layers.1."),
    (r"\.out_norm\.", ".out_layers.0."),
    (r"\.out_conv\.", ".out_layers.3."),
    (r"\.skip\.", ".skip_connection."),
    (r"\.conv_branch\.norm1", ".conv_branch.0"),
    (r"\.conv_branch\.conv1", ".conv_branch.2"),
    (r"\.conv_branch\.norm2", ".conv_branch.3"),
    (r"\.conv_branch\.conv2", ".conv_branch.5"),
    (r"\.fusion_conv\.", ".fusion.0."),  # the per-scale block's
    (r"\.fusion_norm\.", ".fusion.1."),
    (r"\.fusion\.(kernel|bias)", r".fusion_conv.\1"),  # the joint block's
    (r"\.bottleneck\.fc1", ".mlp.mlp.0"),
    (r"\.bottleneck\.fc2", ".mlp.mlp.3"),
    (r"\.mlp\.fc1", ".mlp.0"),
    (r"\.mlp\.fc2", ".mlp.3"),
    (r"\.in_proj\.kernel$", ".in_proj_weight"),
    (r"\.in_proj\.bias$", ".in_proj_bias"),
    (r"\.(kernel|scale|embedding)$", ".weight"),
))
_CONV1D = re.compile(r"\.(qkv|encoder_kv|proj_out)\.kernel$")  # 1x1 convolutions over tokens, Linear here


def torch_state(model: nnx.Module) -> dict[str, np.ndarray]:
    """The parameters under PyTorch's names, in PyTorch's layouts and the state dict's order.

    Returns:
      NumPy arrays of the parameters' dtype; `torch.from_numpy` of each makes a dict that `load_state_dict` takes.
    """
    # Arrays are copied, in C order, since views of JAX arrays are read-only and PyTorch expects writable arrays.
    params = dict(walk(model))
    return {_name(path): np.array(_to_torch(path, np.asarray(params[path][...])), order="C")
            for path in model.parameter_paths}  # pyright: ignore[reportAttributeAccessIssue]


def load_torch_state(model: nnx.Module, state_dict: Mapping[str, np.ndarray]) -> None:
    """Sets the model's parameters from a PyTorch state dict of the same variant and sizes, in float32.

    An abstract model (`nnx.eval_shape(lambda: UNet(config, nnx.Rngs(0)))`) will do, and saves drawing parameters that
    are then replaced.

    Raises:
      UserError: naming every unknown, missing and misshapen entry at once; the model is then unchanged.
    """
    params = dict(walk(model))
    params = {_name(path): (path, params[path])
              for path in model.parameter_paths}  # pyright: ignore[reportAttributeAccessIssue]
    if state_dict and not params.keys() & state_dict.keys():
        raise UserError(f"state dict of another architecture: none of its {len(state_dict)} names, such as "
                        f"{next(iter(state_dict))}, is a name of the network; give weights of one of the five networks")
    shapes = {name: _torch_shape(path, param.shape) for name, (path, param) in params.items()}
    problems = [f"unknown: {name}" for name in state_dict if name not in params]
    problems += [f"missing: {name}" for name in params if name not in state_dict]
    problems += [f"misshapen: {name} is {tuple(value.shape)}, the network has {shapes[name]}"
                 for name, value in state_dict.items() if name in params and tuple(value.shape) != shapes[name]]
    if problems:
        raise UserError(f"state dict does not fit the network ({len(problems)} entries differ; check the variant and "
                        f"sizes): {'; '.join(problems)}")
    for name, (path, param) in params.items():
        # np.array copies, since JAX may share the array's memory. jnp.array would compile a copy for each shape.
        value = np.array(_from_torch(path, np.asarray(state_dict[name])), np.float32, order="C")
        param.set_value(jax.device_put(value))


def _name(path: str) -> str:
    for pattern, name in _RENAMINGS:
        path = pattern.sub(name, path)
    return path


def _to_torch(path: str, value: np.ndarray) -> np.ndarray:
    if not path.endswith("kernel"):
        return value
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)  # HWIO -> OIHW
    return value.T[..., None] if _CONV1D.search(path) else value.T


def _from_torch(path: str, value: np.ndarray) -> np.ndarray:
    if not path.endswith("kernel"):
        return value
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return (value[..., 0] if _CONV1D.search(path) else value).T


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return _to_torch(path, np.broadcast_to(np.float32(0), shape)).shape
