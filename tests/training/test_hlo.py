"""What a compiled program does, counted from its text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scl_jax.training.flops import count_flops
from scl_jax.training.hlo import Program

LOOP = """
%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %sum = f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%i, %sum)
}

%condition (state.1: (s32[], f32[8,4])) -> pred[] {
  %state.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %bound = s32[]{:T(128)} constant(12)
  ROOT %more = pred[] compare(%i.1, %bound), direction=LT
}

%twice (p: bf16[2,8]) -> bf16[8,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  ROOT %gathered = bf16[8,8]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}
}

ENTRY %main (a: (s32[], f32[8,4]), b: bf16[2,8]) -> bf16[8,8] {
  %a = (s32[], f32[8,4]{1,0}) parameter(0)
  %b = bf16[2,8]{1,0} parameter(1)
  %loop = (s32[], f32[8,4]{1,0}) while(%a), condition=%condition, body=%body, metadata={op_name="layers"}
  %first = bf16[8,8]{1,0} fusion(%b), kind=kCustom, calls=%twice
  %second = bf16[8,8]{1,0} fusion(%b), kind=kCustom, calls=%twice
  %moved = (bf16[2,8]{1,0}, bf16[2,8]{1,0}) collective-permute-start(%b), channel_id=9, source_target_pairs={{0,1}}
  %turned = f32[16] all-to-all(%b), channel_id=3, replica_groups=mesh['x'=2,'y'=4] {'y':(1)2}, dimensions={0}
  ROOT %big = f32[64,64]{1,0} broadcast(%first), dimensions={}, metadata={op_name="jit(step)/made_here"}
}
"""


def test_collectives_count_as_often_as_they_run():
    """A ring sends 2·(n-1)/n of a sum and (n-1)/n of what is gathered; one channel in two fusions is one collective."""
    found = Program(LOOP).collectives()
    assert found["all-reduce"] == (12, 12 * 2 * 3 * 8 * 4 * 4 // 4)
    assert found["all-gather"] == (2, 2 * 8 * 8 * 2 * 3 // 4)
    assert found["all-to-all"] == (1, 16 * 4 // 2)
    assert list(found)[0] == "all-reduce"  # the most bytes first


def test_a_sum_of_which_every_chip_keeps_a_part_is_a_reduce_scatter():
    fused = LOOP.replace("%twice", "%all-reduce-scatter.1").replace("all-gather(%p)", "all-reduce(%p)")
    assert Program(fused).collectives()["reduce-scatter"] == (2, 2 * 8 * 8 * 2 * 3 // 4)


def test_groups_are_counted_in_every_spelling():
    """A mesh may name the order of its devices; what cannot be read is an error, not a collective without bytes."""
    spelled = LOOP.replace(
        "replica_groups={{0,1,2,3},{4,5,6,7}}", "replica_groups=mesh['x'=4,'y'=1,'z'=2], device_ids=([2,4]T(1,0)) {'x'}"
    )
    assert Program(spelled).collectives() == Program(LOOP).collectives()
    with pytest.raises(ValueError, match="gathered: cannot read its groups of devices"):
        Program(LOOP.replace("replica_groups={{0,1,2,3},{4,5,6,7}}", "replica_groups=<0,1>")).collectives()


def test_the_largest_results_are_in_the_main_memory():
    largest = Program(LOOP).largest(2)
    assert largest[0] == (64 * 64 * 4, "f32[64,64]", "jit(step)/made_here")
    assert all(kind != "bf16[8,8]" or "fusion" not in origin for _, kind, origin in largest)


def test_a_loop_without_a_bound_counts_once_and_is_named():
    program = Program(LOOP.replace("direction=LT", "direction=NE"))
    assert program.unbounded() == ["layers"] and program.collectives()["all-reduce"][0] == 1
    assert Program(LOOP).unbounded() == []


def test_flops_are_those_of_the_program_as_written():
    weights = jnp.ones((5, 16, 16))

    def network(x):
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]
        return jnp.einsum("bd,cd->bc", x, x)

    x = jnp.ones((8, 16))
    text = jax.jit(network).lower(x).compile().as_text()
    assert Program(text).flops() == count_flops(network, x) == 5 * 2 * 8 * 16 * 16 + 2 * 8 * 8 * 16


def test_cycles_are_the_compilers_and_count_as_often_as_they_run():
    def with_cycles(line: str, cycles: int) -> str:
        return f'{line}, backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'

    text = LOOP.replace("to_apply=%add", with_cycles("to_apply=%add", 100))
    text = text.replace('made_here"}', with_cycles('made_here"}', 7))
    assert Program(text).cycles() == {"sum": 12 * 100, "jit(step)/made_here": 7}
    inside = text.replace("{{0,1,2,3},{4,5,6,7}}", with_cycles("{{0,1,2,3},{4,5,6,7}}", 50))
    assert Program(inside).cycles() == Program(text).cycles()  # a fusion's estimate is that of the whole


def test_a_kernel_counts_what_it_says():
    kernel = (
        'custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"2048","bytes_accessed":"3"}}'
    )
    text = LOOP.replace(
        "all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add", f"custom-call(%x), {kernel}"
    )
    assert Program(text).flops() == 12 * 2048


def test_a_batched_product_written_as_a_convolution_counts_without_its_holes():
    """As TPU programs hold it: 32·2 products of (16, 32)·(32, 4), spread out by base dilation."""
    text = """
ENTRY %main (a: bf16[32,2,16,32], b: bf16[32,4,2,32]) -> f32[32,2,16,4] {
  %a = bf16[32,16,2,32]{3,2,1,0} parameter(0)
  %b = bf16[32,4,2,32]{3,2,1,0} parameter(1)
  ROOT %c = f32[32,2,16,4]{2,3,1,0} convolution(%a, %b), WINDOW, dim_labels=0b1f_0o1i->01bf
}
""".replace("WINDOW", "window={size=32x2 stride=31x1 pad=0_0x1_1 lhs_dilate=32x2 rhs_reversal=0x1}")
    assert Program(text).flops() == 2 * 32 * 2 * 16 * 32 * 4


def test_a_collective_of_this_machine_is_found():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("x"))
    total = jax.jit(lambda x: x.sum(axis=0), in_shardings=split, out_shardings=NamedSharding(mesh, PartitionSpec()))
    found = Program(total.lower(jnp.ones((8, 256))).compile().as_text()).collectives()
    assert found == {"all-reduce": (1, 2 * 256 * 4 * 7 // 8)}
