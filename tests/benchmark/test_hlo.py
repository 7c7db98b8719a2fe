"""Compiled programs are read right: kernels, bytes, loops, origins, and what becomes of convolutions."""

import jax
import jax.numpy as jnp
import pytest

from hae_jax.benchmark import hlo
from hae_jax.benchmark.hlo import Convolutions
from hae_jax.model.layers import conv2d

NORM = "jit(f)/norm, 8 channels, 4 px/mul"
# As XLA's GPU compiler writes a convolution with its bias, a loop, and what stands around them.
PROGRAM = f"""HloModule jit_f, is_scheduled=true

%turned (p: bf16[2,8,4,4]) -> bf16[2,4,4,8] {{
  %p = bf16[2,8,4,4]{{3,2,1,0}} parameter(0)
  ROOT %t = bf16[2,4,4,8]{{3,2,1,0}} transpose(%p), dimensions={{0,2,3,1}}
}}

%scaled (p.1: bf16[2,4,4,8]) -> bf16[2,4,4,8] {{
  %p.1 = bf16[2,4,4,8]{{3,2,1,0}} parameter(0)
  ROOT %m = bf16[2,4,4,8]{{3,2,1,0}} multiply(%p.1, %p.1)
}}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %s = (s32[], f32[4]{{0}}) parameter(0)
  %a = f32[4]{{0}} get-tuple-element(%s), index=1
  %step = f32[4]{{0}} fusion(%a), kind=kLoop, calls=%scaled, metadata={{op_name="jit(f)/while/optimiser/add"}}
  ROOT %out = (s32[], f32[4]{{0}}) tuple(%s, %step)
}}

ENTRY %main.1 (x: bf16[2,8,4,4], w: bf16[8,3,3,8], y: f32[4]) -> bf16[2,4,4,8] {{
  %x = bf16[2,8,4,4]{{3,2,1,0}} parameter(0), metadata={{op_name="{NORM}"}}
  %w = bf16[8,3,3,8]{{3,2,1,0}} parameter(1)
  %y = (s32[], f32[4]{{0}}) parameter(2)
  %map = bf16[2,4,4,8]{{3,2,1,0}} fusion(%x), kind=kInput, calls=%FUSION
  %named = bf16[2,4,4,8]{{3,2,1,0}} bitcast(%map)
  %conv.1 = (bf16[2,4,4,8]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%named, %w), window={{size=3x3 pad=1_1x1_1}}, ORDER, custom_call_target="__cudnn$convForward", metadata={{op_name="jit(f)/convolution 3x3, 8 to 8 channels, 4 px/conv"}}
  %loop = (s32[], f32[4]{{0}}) while(%y), condition=%never, body=%body, backend_config={{"known_trip_count":{{"n":"7"}},"known_init_step":{{"init":"0","step":"1"}}}}
  ROOT %result = bf16[2,4,4,8]{{3,2,1,0}} get-tuple-element(%conv.1), index=0
}}
"""  # noqa: E501


def program(fusion: str = "scaled", order: str = "dim_labels=b01f_o01i->b01f") -> str:
    return PROGRAM.replace("FUSION", fusion).replace("ORDER", order)


def test_kernels_with_bytes_and_loops():
    found = {kernel.name: kernel for kernel in hlo.kernels(program())}
    assert set(found) == {"map", "conv.1", "step"}  # no parameters, no names for other arrays
    assert found["map"].bytes == 2 * 2 * (2 * 4 * 4 * 8)
    assert found["conv.1"].bytes == 2 * 2 * (2 * 4 * 4 * 8) + 2 * 8 * 3 * 3 * 8
    assert (found["step"].bytes, found["step"].times) == (2 * 4 * 4, 7)
    assert [kernel.kind for kernel in found.values()] == ["fusion", "__cudnn$convForward", "fusion"]
    assert hlo.traffic(found.values()) == found["map"].bytes + found["conv.1"].bytes + 7 * 32
    assert hlo.traffic_by_part(found.values()) == [
        ("convolution 3x3", found["conv.1"].bytes), ("norm", found["map"].bytes), ("optimiser", 7 * 32)]


@pytest.mark.parametrize(("text", "expected"), [
    (program(), Convolutions(1, 1, 1, 0)),
    (program(fusion="turned"), Convolutions(1, 1, 1, 1)),
    (program(order="dim_labels=bf01_oi01->bf01"), Convolutions(1, 0, 1, 0)),
    (program().replace("bf16", "f32"), Convolutions(1, 1, 0, 0)),
    ("ENTRY %main (x: f32[2]) -> f32[2] {\n  ROOT %x = f32[2] parameter(0)\n}", Convolutions(0, 0, 0, 0)),
])
def test_convolutions(text, expected):
    assert hlo.convolutions(text) == expected


def test_maps_turned_on_the_way_of_something_else_count():
    text = program(fusion="turned").replace("ROOT %t = ", "%t = ").replace(
        "dimensions={0,2,3,1}\n", "dimensions={0,2,3,1}\n  ROOT %rounded = bf16[2,4,4,8]{3,2,1,0} convert(%t)\n")
    assert "%rounded" in text
    assert hlo.convolutions(text).turned == 1


def test_maps_turned_behind_a_convolution_count():
    text = program().replace("ROOT %result", "%result").replace(
        "index=0\n}\n", "index=0\n  ROOT %back = bf16[2,8,4,4] fusion(%result), kind=kLoop, calls=%turned\n}\n")
    assert hlo.convolutions(text).turned == 1


def test_a_map_that_is_added_counts_and_weights_do_not():
    text = program().replace("custom-call(%named, %w)", "custom-call(%named, %w, %b, %back)").replace(
        "  %conv.1", "  %back = bf16[2,4,4,8] fusion(%x), kind=kLoop, calls=%turned\n  %conv.1")
    assert hlo.convolutions(text).turned == 1
    assert hlo.convolutions(text.replace("(%named, %w, %b, %back)", "(%named, %back, %b, %named)")).turned == 0


def test_a_program_of_this_machine():
    def f(x, kernel):
        return jax.lax.scan(lambda h, _: (jnp.tanh(conv2d(h, kernel, padding=1)), None), x, length=3)[0]

    text = jax.jit(f).lower(jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4))).compile().as_text()
    found = [kernel for kernel in hlo.kernels(text) if kernel.part == "convolution 3x3, 4 to 4 channels, 8 px"]
    assert {kernel.times for kernel in found} == {3}
    least = 4 * (2 * 2 * 8 * 8 * 4 + 3 * 3 * 4 * 4)
    assert least <= hlo.traffic(found) / 3 <= 20 * least


def test_what_xla_forgets_comes_from_the_operands():
    text = f"""
ENTRY %main {{
  %x = f32[4] parameter(0), metadata={{op_name="{NORM}"}}
  %y = f32[4] parameter(1)
  %fusion.1 = f32[4] fusion(%y, %x), kind=kLoop, calls=%inner
  ROOT %copy = f32[4] copy(%fusion.1)
}}"""
    assert hlo.origins(text) == {"x": NORM, "y": "", "fusion.1": NORM, "copy": NORM}


def test_parts():
    name = "convolution 3x3 by 2, 64 to 64 channels, 32 px"
    assert hlo.part("fusion.3", f"jit(f)/jvp({name})/mul") == name
    assert hlo.part("fusion.3", f"jit(f)/transpose(jvp({name}))/mul") == f"{name}, gradients"
    assert hlo.part("fusion.3", "jit(f)/jvp()/mul") == "other: mul"
    assert hlo.part("copy_fusion.3", "") == "other: copy_fusion"
    assert hlo.part("all-reduce.12.3", f"jit(f)/jvp({name})/mul") == "devices meet: all-reduce"
