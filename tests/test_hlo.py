"""What is read of compiled programs, against what the programs were written to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from finetune_jax.config import MeshConfig
from finetune_jax.hlo import Collective, read_program
from finetune_jax.sharding import make_mesh

AXES = {"data": 2, "fsdp": 4, "tensor": 1}


def compiled(function, *shapes, mesh=None, specs=()):
    """The program's text."""
    specs = specs or (PartitionSpec(),) * len(shapes)
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_a_loop_counts_as_often_as_it_runs():
    def loop(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    def unrolled(x, kernels):
        for kernel in kernels:
            x = jnp.tanh(x @ kernel)
        return x

    once = 2 * 16 * 32 * 32
    for function, layers in ((loop, 1), (loop, 7), (unrolled, 7)):
        program = read_program(compiled(function, (16, 32), (layers, 32, 32)), {"data": 1})
        assert program.flops == layers * once, function
    # Of the stacked kernels a turn reads one, not all of them: bytes grow with the turns, not with their square.
    few, many = (
        read_program(compiled(loop, (16, 32), (layers, 32, 32)), {"data": 1}).bytes for layers in (7, 28)
    )
    assert few > 7 * 4 * 32 * 32
    assert 3 < many / few < 5


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pad", [0, 1, 3])
def test_a_convolution_counts_the_taps_that_meet_a_pixel(stride, pad):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    program = read_program(compiled(convolve, (2, 9, 9, 5), (3, 3, 5, 6)), {"data": 1})
    ones = np.zeros(9 + 2 * pad)
    ones[pad : pad + 9] = 1
    taps = sum(ones[place : place + 3].sum() for place in range(0, len(ones) - 2, stride))
    assert program.flops == 2 * 2 * taps**2 * 5 * 6


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", "fsdp", 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data", 2),
        ("[2,4]<=[8]", "fsdp", 4),
        ("[4,2]<=[2,4]T(1,0)", "data", 2),
        ("[1,8]<=[8]", "data+fsdp", 8),
        ("mesh['a'=2,'b'=4] {'b'}", "fsdp", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", "data+fsdp", 8),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", "data", 2),
        ("{{0,1},{2,3},{4,5},{6,7}}", "part of fsdp", 2),
    ],
)
def test_every_notation_of_groups(groups, axes, size):
    text = f"""
%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

ENTRY %main (x: f32[10]) -> f32[10] {{
  %x = f32[10]{{0}} parameter(0)
  ROOT %all-reduce.1 = f32[10]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
    (found,) = read_program(text, AXES).collectives
    assert found == Collective("all-reduce", axes, size, 1, 40)
    assert found.sent == 40 * 2 * (size - 1) / size


def test_what_stays_beside_the_cores_is_not_main_memory():
    text = """
ENTRY %main (x: f32[10]) -> f32[10] {
  %x = f32[10]{0:T(128)} parameter(0)
  %near = f32[10]{0:T(128)S(1)} negate(%x)
  ROOT %far = f32[10]{0:T(128)} negate(%near)
}
"""
    assert read_program(text, {"data": 1}).bytes == 40 + 40


def test_a_loop_that_counts_by_two():
    text = """
%body (state: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %state = (s32[], f32[4,4]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[4,4] get-tuple-element(%state), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %one = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %other = f32[4,4] dot(%one, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %both = (s32[], f32[4,4]) tuple(%next, %other)
}

%condition (state.1: (s32[], f32[4,4])) -> pred[] {
  %state.1 = (s32[], f32[4,4]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(8)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %x.1 = (s32[], f32[4,4]) parameter(0)
  ROOT %loop = (s32[], f32[4,4]) while(%x.1), condition=%condition, body=%body
}
"""
    assert read_program(text, {"data": 1}).flops == 4 * 2 * (2 * 4**3)


def test_a_reduce_scatter_of_a_tpu_is_one():
    text = """
%all-reduce-scatter.1 (x: f32[64]) -> f32[8] {
  %x = f32[64]{0} parameter(0)
  %sum = f32[64]{0} all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %mine = f32[8]{0} dynamic-slice(%sum, %zero), dynamic_slice_sizes={8}
}

ENTRY %main (y: f32[64]) -> f32[8] {
  %y = f32[64]{0} parameter(0)
  ROOT %fusion = f32[8]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (found,) = read_program(text, {"data": 1, "fsdp": 8}).collectives
    assert found == Collective("reduce-scatter", "fsdp", 8, 1, 256)


def test_transfers_between_slices_are_seen():
    text = """
ENTRY %main (x: f32[10]) -> f32[10] {
  %x = f32[10]{0} parameter(0)
  %token = token[] after-all()
  %send = (f32[10]{0}, u32[], token[]) send(%x, %token), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %y = f32[10]{0} negate(%x)
}
"""
    (found,) = read_program(text, AXES, slices=2).collectives
    assert found == Collective("all-reduce", "data between slices", 2, 1, 40)


def test_a_slice_fetched_ahead_of_use_is_read_once_and_no_more_of_it():
    """A TPU cuts what it will need into quarters and fetches each into the memory beside its cores (layout S(1))."""
    lines = ["HloModule fetched", "", "ENTRY %main (p: f32[512,768]) -> f32[128,768] {"]
    lines += ["  %p = f32[512,768]{1,0:T(8,128)} parameter(0)"]
    for part in range(4):
        lines += [
            f"  %slice-start.{part} = ((f32[512,768]{{1,0:T(8,128)}}), f32[128,768]{{1,0:T(8,128)S(1)}}, s32[]{{:S(2)}})"
            f" slice-start(%p), slice={{[{128 * part}:{128 * part + 128}], [0:768]}}",
            f"  %slice-done.{part} = f32[128,768]{{1,0:T(8,128)S(1)}} slice-done(%slice-start.{part})",
        ]
    lines += ["  ROOT %copy = f32[128,768]{1,0:T(8,128)S(1)} bitcast(%slice-done.3)", "}", ""]
    assert read_program("\n".join(lines), {"data": 1}).bytes == 4 * 512 * 768


def test_a_kernel_of_several_lines_is_one_instruction():
    """The text is as the TPU compiler writes it, of a forward pass with splash attention: 8 rows, 12 heads, 512 pieces, 64 wide."""
    text = """HloModule jit_forward

ENTRY %main (q: bf16[8,12,512,64], s: s32[8,8,512], k: bf16[64,32]) -> bf16[8,12,512,64] {
  %q = bf16[8,12,512,64]{3,2,1,0} parameter(0)
  %s = s32[8,8,512]{2,1,0} parameter(1)
  %splash_mha_fwd_segmented.1 = (f32[8,512,64]{2,1,0}, bf16[8,12,512,64]{3,2,1,0}) custom-call(%s, %q, %q, %q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(forward)/pallas_call"}
  %k = bf16[64,32]{1,0} parameter(2)
  ROOT %dot.1 = bf16[8,12,512,32]{3,2,1,0} dot(%q, %k), lhs_contracting_dims={3}, rhs_contracting_dims={0}
}
"""
    attention, product = 2 * 2 * 8 * 12 * 512 * 512 * 64, 2 * 8 * 12 * 512 * 64 * 32
    assert read_program(text, {"data": 1}).flops == attention + product
