"""The reader of compiled programs' estimates, on a program written by hand."""

import collections
import dataclasses

import pytest

from seal_jax.bench import aot
from seal_jax.bench.timing import matmul_params

# A loop of 8 steps; in each, if there is work, a product and a loop over the lanes in use. This is
# what XLA writes for TPUs, shortened.
PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused_product (p0: f32[8]) -> f32[8] {
  %p0 = f32[8]{0} parameter(0)
  ROOT %inner.1 = f32[8]{0} add(%p0, %p0), backend_config={"window_config":{"estimated_cycles":"999"}}
}

%lanes_body (p1: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %p1 = (s32[], s32[], /*index=2*/f32[8]{0}) parameter(0)
  ROOT %update.1 = (s32[], s32[], f32[8]{0}) fusion(%p1), kind=kLoop, calls=%fused_product, metadata={op_name="optimizer/add" stack_frame_id=3}, backend_config={"window_config":{"estimated_cycles":"10"}}
}

%lanes_cond (p2: (s32[], s32[], f32[8])) -> pred[] {
  %p2 = (s32[], s32[], f32[8]{0}) parameter(0)
  %u = s32[]{:T(128)} get-tuple-element(%p2), index=0
  %used = s32[]{:T(128)} get-tuple-element(%p2), index=1
  ROOT %lt.1 = pred[]{:T(512)} compare(%u, %used), direction=LT
}

%work (p3: f32[8]) -> f32[8] {
  %p3 = f32[8]{0} parameter(0)
  %product.1 = f32[8]{0} fusion(%p3), kind=kOutput, calls=%fused_product, metadata={op_name="mlp/dot"}, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %copy-start.1 = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%product.1)
  ROOT %while.1 = (s32[], s32[], f32[8]{0}) while(%tuple.1), condition=%lanes_cond, body=%lanes_body, metadata={op_name="optimizer/while"}
}

%idle (p4: f32[8]) -> f32[8] {
  ROOT %p4 = f32[8]{0} parameter(0), backend_config={"estimated_cycles":"7"}
}

%steps_body.clone (p5: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p5 = (s32[], f32[8]{0}) parameter(0)
  ROOT %conditional.1 = f32[8]{0} conditional(%branch, %p5, %p5), branch_computations={%idle, %work}, metadata={op_name="cond"}
}

%steps_cond.clone (p6: (s32[], f32[8])) -> pred[] {
  %all = s32[]{:T(128)} constant(8)
  %p6 = (s32[], f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p6), index=0
  ROOT %lt.2 = pred[]{:T(512)} compare(%i, %all), direction=LT, backend_config={"estimated_cycles":"1"}
}

%called (p7: f32[8]) -> f32[8] {
  ROOT %p7 = f32[8]{0} parameter(0), backend_config={"estimated_cycles":"20"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %call.1 = f32[8]{0} call(%x), to_apply=%called
  %while.2 = (s32[], f32[8]{0}) while(%call.1), condition=%steps_cond.clone, body=%steps_body.clone
  ROOT %while.3 = (s32[], f32[8]{0}) while(%call.1), condition=%lanes_cond, body=%lanes_body, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


def test_cycles_count_loops_calls_and_the_dearest_branch():
    by_op = aot.cycles_by_op(PROGRAM, unknown_trip_count=5)
    # 8 steps of a product and 5 lanes; the last loop says itself that it runs 3 times.
    lanes = 8 * 5 * 10 + 3 * 10
    assert by_op == collections.Counter({"mlp/dot": 8000, "optimizer/add": lanes, "": 8 + 20})
    assert aot.cycles_by_op(PROGRAM, unknown_trip_count=5).total() == 8000 + lanes + 28
    assert aot.cycles_by_op(PROGRAM).total() == 8000 + 8 * 10 + 30 + 28


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        aot.cycles_by_op("HloModule empty\n").total()


@pytest.mark.parametrize("tied", [False, True])
def test_matmul_params_count_the_head_and_not_the_lookup(tied):
    config = dataclasses.replace(aot.QWEN_7B, tie_embeddings=tied)
    assert matmul_params(config) == pytest.approx(7.07e9, rel=1e-3)
