"""The emulator finds what it is there to find: each planted fault is found by the right check, and the sound kernel by none."""

import mlx.core as mx
import pytest

pytestmark = pytest.mark.metal

THREADS, GROUP = 512, 128
SHARED = "threadgroup float s[128]; s[tp] = a[at]; "
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup); "
READ = "out[at] = s[127 - tp];"

SOUND = {
    "a barrier between": SHARED + BARRIER + READ,
    "both barriers of a loop": "threadgroup float s[128]; float t = 0; for (int i = 0; i < 3; i++) { s[tp] = a[at] * i; "
    + BARRIER + "t += s[127 - tp]; " + BARRIER + "} out[at] = t;",
    "a sum over the SIMD-group": "out[at] = simd_sum(a[at]);",
}  # fmt: skip

# What is wrong, and the check that has to say so.
FAULTS = {
    "a barrier is missing": (SHARED + READ, "order"),
    "the second barrier of a loop is missing": (
        "threadgroup float s[128]; float t = 0; for (int i = 0; i < 3; i++) { s[tp] = a[at] * i; "
        + BARRIER + "t += s[127 - tp]; } out[at] = t;", "order"),
    "a barrier of the SIMD-group for one of the threadgroup": (
        SHARED + BARRIER.replace("threadgroup_barrier", "simdgroup_barrier") + READ, "order"),
    "threadgroup memory that nobody wrote": (
        "threadgroup float s[129]; s[tp] = a[at]; " + BARRIER
        + "float m = 0; for (int i = 0; i < 129; i++) m = max(m, s[i]); out[at] = m;", "order"),
    "an element that is not written": ("if (at != 77) out[at] = a[at];", "written"),
    "two barriers that are not the same": (
        SHARED + "if (tp < 64) { " + BARRIER + "s[tp] += 1; } else { threadgroup_barrier(mem_flags::mem_device); } "
        "out[at] = s[tp];", "convergence"),
    "lanes that part before a sum": (
        "float v = a[at]; if (lane < 16) v = simd_sum(v); else v = simd_max(v); out[at] = v;", "convergence"),
    "a sum in half a SIMD-group, then a barrier": (
        "float v = a[at]; if (lane < 16) v = simd_sum(v); " + BARRIER + "out[at] = v;", "convergence"),
    "a shuffle from beyond the last lane": ("float v = a[at]; v += simd_shuffle_down(v, 16); out[at] = v;", "events"),
    "a double": ("double d = a[at]; out[at] = d;", "compiles"),
    "a write to an input": ("device float* w = (device float*)a; w[at] = 0; out[at] = 0;", "inputs"),
    "40 KiB of threadgroup memory": (
        "threadgroup float s[10240]; s[tp] = a[at]; " + BARRIER + READ, "events"),
    "a sum in one place without atomics": ("if (at == 0) out[0] = 0; out[0] += a[at]; if (at) out[at] = 0;", "order"),
    "a pointer without its address space": ("const float* p = a; out[at] = p[at];", "address spaces"),
    "a write by one beyond the end": ("out[at + 1] = a[at]; if (at == 0) out[0] = 0;", "sanitizers"),
    "a read beyond the end": ("out[at] = a[at * 2];", "sanitizers"),
    "a read beyond threadgroup memory": (
        "threadgroup float s[100]; if (tp < 100) s[tp] = a[at]; " + BARRIER + "out[at] = s[tp];", "sanitizers"),
    "a misaligned vector": ("out[at] = ((const device float4*)(a + 1))[0].x;", "sanitizers"),
}  # fmt: skip


def report_on(body: str, sanitized: bool):
    from checks import ALL, UNSANITIZED, check
    from compose import capture
    from drop_in import compose_kernel

    kernel = compose_kernel(
        name="planted",
        input_names=["a"],
        output_names=["out"],
        source="uint at = thread_position_in_grid.x, tp = thread_position_in_threadgroup.x, lane = thread_index_in_simdgroup;\n"
        "(void)at; (void)tp; (void)lane;\n" + body,
    )
    numbers = (mx.arange(THREADS) % 251).astype(mx.float32)
    composed = capture(
        kernel, numbers, grid=(THREADS, 1, 1), threadgroup=(GROUP, 1, 1), output_shapes=[(THREADS,)], output_dtypes=[mx.float32]
    )
    return check(composed, [numbers], checks=ALL if sanitized else UNSANITIZED)


@pytest.mark.parametrize("body", SOUND.values(), ids=SOUND.keys())
def test_a_sound_kernel_passes(body):
    report_on(body, sanitized=True).require()


@pytest.mark.parametrize(("body", "check"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_found(body, check):
    from checks import Check

    report = report_on(body, sanitized=check == "sanitizers")
    assert not report and report.found(Check(check)), str(report)
