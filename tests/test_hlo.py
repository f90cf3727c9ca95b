"""What `benchmarks/hlo.py` reads off compiled programs, worked out here by hand; compiles nothing."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
hlo = pytest.importorskip("hlo", reason="needs benchmarks/ beside tests/")

# For a TPU v5e: a scan of 3 turns with a scan of 5 turns and a `lax.cond` in it, all with matmuls.
NESTED = (Path(__file__).parent / "data" / "nested_loops.hlo.txt").read_text()
MATMUL, CHEAP_BRANCH, COPY, TANH, SINE, MAXIMUM, LAST = 21_340, 21_340, 10_856, 27_404, 46_365, 14_865, 30_115
# Eight slabs of 512 classes: their logits in float32, then in bfloat16 for the gradient of the kernel.
ON_A_GPU = """
HloModule slabs, is_scheduled=true

%fused_slice (p0: bf16[64,4096], p1: s32[]) -> bf16[64,512] {
  %p0 = bf16[64,4096]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %p1 = s32[] parameter(1)
  ROOT %slice = bf16[64,512]{1,0} dynamic-slice(%p0, %zero, %p1), dynamic_slice_sizes={64,512}
}

%logits_computation (p0: bf16[32,64], p1: bf16[64,512]) -> f32[32,512] {
  %p0 = bf16[32,64]{1,0} parameter(0)
  %p1 = bf16[64,512]{1,0} parameter(1)
  ROOT %dot = f32[32,512]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_convert (p0: f32[32,512]) -> bf16[32,512] {
  %p0 = f32[32,512]{1,0} parameter(0)
  %half = f32[32,512]{1,0} exponential(%p0)
  ROOT %narrow = bf16[32,512]{1,0} convert(%half)
}

%fused_update (p0: bf16[64,4096], p1: f32[64,512], p2: s32[]) -> bf16[64,4096] {
  %p0 = bf16[64,4096]{1,0} parameter(0)
  %p1 = f32[64,512]{1,0} parameter(1)
  %narrow = bf16[64,512]{1,0} convert(%p1)
  %zero = s32[] constant(0)
  %p2 = s32[] parameter(2)
  ROOT %update = bf16[64,4096]{1,0} dynamic-update-slice(%p0, %narrow, %zero, %p2)
}

%fused_add (p0: s32[]) -> s32[] {
  %p0 = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %add = s32[] add(%p0, %one)
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%again (arg: (f32[32,512])) -> f32[32] {
  %arg = (f32[32,512]{1,0}) parameter(0)
  %logits = f32[32,512]{1,0} get-tuple-element(%arg), index=0
  %zero = f32[] constant(0)
  %partly = f32[32,8]{1,0} reduce(%logits, %zero), dimensions={1}, to_apply=%sum
  ROOT %total = f32[32]{0} reduce(%partly, %zero), dimensions={1}, to_apply=%sum
}

%as_it_is (arg: f32[32]) -> f32[32] {
  %arg = f32[32]{0} parameter(0)
  ROOT %copy = f32[32]{0} copy(%arg)
}

%body (arg: (s32[], bf16[64,4096], bf16[32,64], bf16[64,4096], f32[32], /*index=5*/pred[])) -> (s32[], bf16[64,4096]) {
  %arg = (s32[], bf16[64,4096]{1,0}, bf16[32,64]{1,0}, bf16[64,4096]{1,0}, f32[32]{0}, /*index=5*/pred[]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %gradient = bf16[64,4096]{1,0} get-tuple-element(%arg), index=1
  %hidden = bf16[32,64]{1,0} get-tuple-element(%arg), index=2
  %kernel = bf16[64,4096]{1,0} get-tuple-element(%arg), index=3
  %sums = f32[32]{0} get-tuple-element(%arg), index=4
  %far = pred[] get-tuple-element(%arg), index=5
  %slab = bf16[64,512]{1,0} fusion(%kernel, %i), kind=kLoop, calls=%fused_slice
  %logits = f32[32,512]{1,0} fusion(%hidden, %slab), kind=kCustom, calls=%logits_computation
  %narrow = bf16[32,512]{1,0} fusion(%logits), kind=kLoop, calls=%fused_convert
  %call = (f32[64,512]{1,0}, s8[4194304]{0}) custom-call(%hidden, %narrow), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],\
"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %of_slab = f32[64,512]{1,0} get-tuple-element(%call), index=0
  %updated = bf16[64,4096]{1,0} fusion(%gradient, %of_slab, %i), kind=kLoop, calls=%fused_update
  %start = (f32[32]{0}, f32[32]{0}, u32[]) copy-start(%sums)
  %done = f32[32]{0} copy-done(%start)
  %given = (f32[32,512]{1,0}) tuple(%logits)
  %cond = f32[32]{0} conditional(%far, %given, %done), true_computation=%again, false_computation=%as_it_is
  %next = s32[] fusion(%i), kind=kLoop, calls=%fused_add
  ROOT %tuple = (s32[], bf16[64,4096]{1,0}, bf16[32,64]{1,0}, bf16[64,4096]{1,0}, f32[32]{0}, /*index=5*/pred[]) \
tuple(%next, %updated, %hidden, %kernel, %cond, /*index=5*/%far)
}

%condition (arg: (s32[], bf16[64,4096], bf16[32,64], bf16[64,4096], f32[32], /*index=5*/pred[])) -> pred[] {
  %arg = (s32[], bf16[64,4096]{1,0}, bf16[32,64]{1,0}, bf16[64,4096]{1,0}, f32[32]{0}, /*index=5*/pred[]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %slabs = s32[] constant(8)
  ROOT %less = pred[] compare(%i, %slabs), direction=LT
}

ENTRY %main (hidden: bf16[32,64], kernel: bf16[64,4096], sums: f32[32], far: pred[]) -> bf16[64,4096] {
  %hidden = bf16[32,64]{1,0} parameter(0)
  %kernel = bf16[64,4096]{1,0} parameter(1)
  %sums = f32[32]{0} parameter(2)
  %far = pred[] parameter(3)
  %zero = s32[] constant(0)
  %i = s32[] copy(%zero)
  %empty = bf16[64,4096]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %start = (s32[], bf16[64,4096]{1,0}, bf16[32,64]{1,0}, bf16[64,4096]{1,0}, f32[32]{0}, /*index=5*/pred[]) \
tuple(%i, %empty, %hidden, %kernel, %sums, /*index=5*/%far)
  %loop = (s32[], bf16[64,4096]{1,0}, bf16[32,64]{1,0}, bf16[64,4096]{1,0}, f32[32]{0}, /*index=5*/pred[]) \
while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"8"}}
  ROOT %gradient = bf16[64,4096]{1,0} get-tuple-element(%loop), index=1
}
"""
# A loop in a loop, with a bound that both carry.
CARRIED = """
HloModule carried

%inner (arg: (s32[], s32[])) -> (s32[], s32[]) {
  %arg = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %bound = s32[] get-tuple-element(%arg), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one), backend_config={"window_config":{"estimated_cycles":"10"}}
  ROOT %tuple = (s32[], s32[]) tuple(%next, %bound)
}

%less (arg: (s32[], s32[])) -> pred[] {
  %arg = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %bound = s32[] get-tuple-element(%arg), index=1
  ROOT %compare = pred[] compare(%i, %bound), direction=LT
}

%outer (arg: (s32[], s32[])) -> (s32[], s32[]) {
  %arg = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %bound = s32[] get-tuple-element(%arg), index=1
  %two = s32[] constant(2)
  %start = (s32[], s32[]) tuple(%two, %bound)
  %loop = (s32[], s32[]) while(%start), condition=%less, body=%inner
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %tuple = (s32[], s32[]) tuple(%next, %bound)
}

ENTRY %main (n: s32[]) -> s32[] {
  %n = s32[] parameter(0)
  %zero = s32[] constant(0)
  %seven = s32[] constant(7)
  %bound = s32[] copy(%seven)
  %start = (s32[], s32[]) tuple(%zero, %bound)
  %loop = (s32[], s32[]) while(%start), condition=%less, body=%outer
  ROOT %i = s32[] get-tuple-element(%loop), index=0
}
"""


def test_cycles_count_loops_as_often_as_they_run_and_the_cheapest_branch():
    inner = TANH + COPY
    outer = 5 * inner + MAXIMUM + CHEAP_BRANCH + MATMUL
    assert hlo.cycles(NESTED) == 3 * outer + LAST


def test_the_other_branch_counts_once_it_is_the_cheapest():
    cheap = '"estimated_cycles":"21340"'
    first_branch = NESTED.index("%region_4.4 (")
    dear = NESTED[:first_branch] + NESTED[first_branch:].replace(cheap, '"estimated_cycles":"900000"', 1)
    assert hlo.cycles(dear) - hlo.cycles(NESTED) == 3 * (SINE + MATMUL - CHEAP_BRANCH)


def test_a_trip_count_that_the_compiler_wrote_down_goes_before_the_condition():
    loop = "condition=%wide.region_7.9, body=%wide.region_0.8.sunk"
    counted = NESTED.replace(loop, loop + ', backend_config={"known_trip_count":{"n":"30"}}')
    assert hlo.cycles(counted) - LAST == 10 * (hlo.cycles(NESTED) - LAST)


def test_a_bound_may_be_carried_by_the_loops():
    assert hlo.cycles(CARRIED) == 7 * (7 - 2) * 10


@pytest.mark.parametrize(
    ("known", "unknown"),
    [
        ("copy(%seven)", "copy(%n)"),  # only a run can tell
        ("tuple(%next, %bound)", "tuple(%next, %next)"),  # the bound moves
        ("ROOT %compare = pred[] compare(%i, %bound), direction=LT", "ROOT %both = pred[] and(%i, %bound)"),
    ],
)
def test_a_loop_of_unknown_trip_count_raises(known, unknown):
    assert known in CARRIED
    with pytest.raises(ValueError, match=r"the trip count of %loop is not to be found: .* its condition %less"):
        hlo.cycles(CARRIED.replace(known, unknown))


def test_what_is_no_compiled_program_raises():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.cycles("module @jit_step {\n}")
    with pytest.raises(ValueError, match="not an instruction of a compiled program: %n := parameter"):
        hlo.cycles(CARRIED.replace("%n = s32[] parameter(0)", "%n := parameter(0)"))


def test_kernels_count_as_often_as_they_are_launched():
    # Two slices, two matmuls, a conversion, a copy that runs beside them, a copy in the cheapest branch, the counter.
    assert hlo.kernels(ON_A_GPU) == 8 * 8 + 1
    # The empty array of the gradient takes none.
    assert hlo.kernels(ON_A_GPU.replace('custom_call_target="AllocateBuffer"', 'custom_call_target="fill"')) == 66


def test_traffic_of_a_loop_reads_slices_and_writes_updates():
    slab, hidden, logits, sums, index = 64 * 512, 32 * 64, 32 * 512, 32, 4
    (traffic,) = hlo.loop_traffic(ON_A_GPU, entries=logits)
    assert traffic.times == 8
    read = {
        "slice": 2 * slab + index,
        "logits": 2 * hidden + 2 * slab,
        "conversion": 4 * logits,
        "gradient": 2 * hidden + 2 * logits,
        "update": 4 * slab + index,
        "two copies": 2 * 4 * sums,
        "counter": index,
    }
    written = {
        "slice": 2 * slab,
        "logits": 4 * logits,
        "conversion": 2 * logits,
        "gradient": 4 * slab,
        "update": 2 * slab,
        "two copies": 2 * 4 * sums,
        "counter": index,
    }
    assert traffic.read == sum(read.values())
    assert traffic.written == sum(written.values())
    # Read by the conversion and the second matmul, in float32 and in bfloat16; the dear branch would read them again.
    assert (traffic.logits_read, traffic.logits_written) == (2, 2)


def test_traffic_of_a_program_counts_loops_as_often_as_they_run():
    logits = 32 * 512
    (loop,) = hlo.loop_traffic(ON_A_GPU, logits)
    whole = hlo.traffic(ON_A_GPU, logits)
    assert whole.logits_read == 8 * loop.logits_read
    assert whole.written == 8 * loop.written + 4


def test_a_fusion_that_needs_more_than_the_slice_reads_all():
    negated = "%new = bf16[64,4096]{1,0} negate(%p0)\n  ROOT %update = "
    (before,), (after,) = (
        hlo.loop_traffic(text, 1) for text in (ON_A_GPU, ON_A_GPU.replace("ROOT %update = ", negated))
    )
    assert after.read - before.read == 2 * 64 * 4096


def test_an_update_that_a_fusion_goes_on_with_is_not_in_place():
    update = "ROOT %update = bf16[64,4096]{1,0} dynamic-update-slice(%p0, %narrow, %zero, %p2)"
    negated = update.removeprefix("ROOT ") + "\n  ROOT %negated = bf16[64,4096]{1,0} negate(%update)"
    (before,), (after,) = (hlo.loop_traffic(text, 1) for text in (ON_A_GPU, ON_A_GPU.replace(update, negated)))
    assert after.read - before.read == 2 * 64 * 4096
    assert after.written - before.written == 2 * 64 * (4096 - 512)


def test_matmuls_of_a_loop():
    (found,) = hlo.matmuls(ON_A_GPU)
    assert found == [
        hlo.Matmul(batch=1, m=32, k=64, n=512, left="bf16", right="bf16", out="f32"),
        hlo.Matmul(batch=1, m=64, k=32, n=512, left="bf16", right="bf16", out="f32"),
    ]
    assert [str(matmul) for matmul in found] == ["32×64×512 bf16→f32", "64×32×512 bf16→f32"]


def test_a_matmul_of_several():
    dot = (
        "%dot = f32[8,16,4]{2,1,0} dot(%a, %b), lhs_batch_dims={1}, lhs_contracting_dims={2}, "
        "rhs_batch_dims={0}, rhs_contracting_dims={1}"
    )
    a, b = hlo.Shape("f32", (16, 8, 32)), hlo.Shape("bf16", (8, 32, 4))
    operands = {
        f"%{name}": hlo.Instruction(f"%{name}", (s,), "parameter", (), "0", "") for name, s in (("a", a), ("b", b))
    }
    found = hlo.matmul(hlo.Computation(operands, hlo.instruction(dot)), hlo.instruction(dot))
    assert str(found) == "8·16×32×4 f32·bf16→f32"


@pytest.mark.parametrize(
    ("dtype", "size"), [("pred", 1), ("s4", 0.5), ("f8e4m3fn", 1), ("bf16", 2), ("f32", 4), ("c128", 16), ("token", 0)]
)
def test_bytes(dtype, size):
    assert hlo.Shape(dtype, (2, 3)).bytes == 6 * size


# Two loops of 4 turns, a branch, and what a device of 8 sends in them.
ON_A_MESH = """
HloModule mesh, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p0: bf16[64,512]) -> bf16[16,512] {
  %p0 = bf16[64,512]{1,0} parameter(0)
  %summed = bf16[64,512]{1,0} all-reduce(%p0), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %own = bf16[16,512]{1,0} dynamic-slice(%summed, %zero, %zero), dynamic_slice_sizes={16,512}
}

%again (arg: (f32[32])) -> f32[32] {
  %arg = (f32[32]{0}) parameter(0)
  %numbers = f32[32]{0} get-tuple-element(%arg), index=0
  ROOT %largest = f32[32]{0} all-reduce(%numbers), replica_groups=mesh['data'=4,'model'=2] {'model'}, to_apply=%sum
}

%same (arg: (f32[32])) -> f32[32] {
  %arg = (f32[32]{0}) parameter(0)
  ROOT %numbers = f32[32]{0} get-tuple-element(%arg), index=0
}

%body (arg: (s32[], f32[32], bf16[64,512])) -> (s32[], f32[32], bf16[64,512]) {
  %arg = (s32[], f32[32]{0}, bf16[64,512]{1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%arg), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%turn, %one)
  %numbers = f32[32]{0} get-tuple-element(%arg), index=1
  %gradient = bf16[64,512]{1,0} get-tuple-element(%arg), index=2
  %own = bf16[16,512]{1,0} fusion(%gradient), kind=kCustom, calls=%all-reduce-scatter.1
  %far = pred[] constant(false)
  %tuple = (f32[32]{0}) tuple(%numbers)
  %chosen = f32[32]{0} conditional(%far, %tuple, %tuple), true_computation=%again, false_computation=%same
  ROOT %out = (s32[], f32[32]{0}, bf16[64,512]{1,0}) tuple(%next, %chosen, %gradient)
}

%condition (arg: (s32[], f32[32], bf16[64,512])) -> pred[] {
  %arg = (s32[], f32[32]{0}, bf16[64,512]{1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%arg), index=0
  %bound = s32[] constant(4)
  ROOT %less = pred[] compare(%turn, %bound), direction=LT
}

ENTRY %main (p0: bf16[16,512], p1: f32[32]) -> f32[32] {
  %p0 = bf16[16,512]{1,0} parameter(0)
  %p1 = f32[32]{0} parameter(1)
  %start = (bf16[16,512]{1,0}, bf16[64,512]{1,0}) all-gather-start(%p0), replica_groups=[2,4]<=[8], dimensions={0}
  %whole = bf16[64,512]{1,0} all-gather-done(%start)
  %alone = f32[32]{0} all-reduce(%p1), replica_groups={{0},{1}}, to_apply=%sum
  %sent = f32[32]{0} collective-permute(%alone), source_target_pairs={{0,1},{1,0}}
  %zero = s32[] constant(0)
  %init = (s32[], f32[32]{0}, bf16[64,512]{1,0}) tuple(%zero, %sent, %whole)
  %loop = (s32[], f32[32]{0}, bf16[64,512]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %result = f32[32]{0} get-tuple-element(%loop), index=1
}
"""


def test_collectives():
    """A ring of n sends (n - 1)/n of an array to gather or to scatter it, and twice that for a sum on all."""
    kernel, numbers = 64 * 512 * 2, 32 * 4
    found = [(one.kind, one.devices, one.times, one.inside, one.bytes) for one in hlo.collectives(ON_A_MESH)]
    assert found == [
        ("all-gather", 4, 1, (), kernel * 3 // 4),
        ("collective-permute", 2, 1, (), numbers),
        ("reduce-scatter", 4, 4, ("while",), 4 * kernel * 3 // 4),
        ("all-reduce", 2, 4, ("while", "conditional"), 4 * numbers),
    ]


def test_collectives_of_unknown_devices_raise():
    with pytest.raises(ValueError, match="the devices of %summed are not to be found"):
        hlo.collectives(ON_A_MESH.replace("replica_groups={{0,2,4,6},{1,3,5,7}}", "replica_groups=?"))
