// Enough of CUDA for the host's C++ compiler to run kernels.cu, one block after another: every thread of a block is a
// coroutine, and __syncthreads hands over to the next one. For tests.

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <ucontext.h>
#include <utility>
#include <vector>

#define SHIM
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct dim3 {
    unsigned x, y, z;
};
static dim3 threadIdx, blockIdx, gridDim;

static int __popc(unsigned v) { return __builtin_popcount(v); }

static float shim_float(uint32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

static uint32_t shim_bits(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
}

// bf16 (1) or IEEE half (2) to float, exact.
static float shim_wide(int element, uint16_t h) {
    if (element == 1) return shim_float((uint32_t)h << 16);
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float sign = h >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp((float)mantissa, -24));
}

// Rounds to the nearest, ties to even.
static uint16_t shim_narrow(int element, float v) {
    const uint32_t bits = shim_bits(v);
    if (element == 1) {
        if (v != v) return 0x7fff;
        return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    const uint16_t sign = bits >> 16 & 0x8000;
    if (v != v) return 0x7fff;
    const float a = std::fabs(v);
    if (a >= 65520.0f) return sign | 0x7c00;
    if (a == 0) return sign;
    int exponent = std::ilogb(a);
    if (exponent < -14) exponent = -14;
    // nearbyint rounds to even; a carry runs over into the exponent, as it should.
    const int mantissa = (int)std::nearbyint(std::ldexp(a, 10 - exponent));
    return sign | (uint16_t)(((exponent + 14) << 10) + mantissa);
}

// ---- coroutines ---------------------------------------------------------------------------------------------------

struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool begun = false, done = false;
    bool waits = false; // for the rest of the block
    std::vector<char> stack;
};
static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static unsigned running;
static void (*body)(void*);
static void* body_args;

static void fiber_main() {
    body(body_args);
    fibers[running].done = true;
    _longjmp(scheduler, 1);
}

static void hand_over() {
    if (!_setjmp(fibers[running].at)) _longjmp(scheduler, 1);
}

static void __syncthreads() {
    fibers[running].waits = true;
    hand_over();
}

// Runs thread i until it hands over.
static void run_thread(unsigned i) {
    Fiber& f = fibers[i];
    running = i;
    threadIdx = {i, 0, 0};
    if (_setjmp(scheduler)) return;
    if (f.begun) _longjmp(f.at, 1);
    f.begun = true;
    f.stack.resize(32768);
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.data();
    f.start.uc_stack.ss_size = f.stack.size();
    f.start.uc_link = nullptr;
    makecontext(&f.start, fiber_main, 0);
    setcontext(&f.start);
}

// One warp runs as far as it gets before the next begins, and every other time the last warp is first: so a missing
// __syncthreads shows.
static void run_block(unsigned threads) {
    if (fibers.size() < threads) fibers.resize(threads);
    for (unsigned i = 0; i < threads; i++) fibers[i].begun = fibers[i].done = false;
    const unsigned warps = (threads + 31) / 32;
    bool is_back = false;
    for (bool any = true; any; is_back = !is_back) {
        any = false;
        for (unsigned i = 0; i < threads; i++) fibers[i].waits = false;
        for (unsigned w = 0; w < warps; w++) {
            const unsigned from = (is_back ? warps - 1 - w : w) * 32, to = from + 32 < threads ? from + 32 : threads;
            for (bool goes = true; goes;) {
                goes = false;
                for (unsigned i = from; i < to; i++) {
                    if (fibers[i].done || fibers[i].waits) continue;
                    any = goes = true;
                    run_thread(i);
                }
            }
        }
    }
}

// ---- launches -----------------------------------------------------------------------------------------------------

template <class F> struct Call;
template <class... A> struct Call<void (*)(A...)> {
    void (*kernel)(A...);
    void** args;
    template <size_t... I> void go(std::index_sequence<I...>) { kernel(*(std::remove_reference_t<A>*)args[I]...); }
    static void run(void* self) { ((Call*)self)->go(std::index_sequence_for<A...>()); }
};

template <class F> static void shim_run(F kernel, unsigned x, unsigned y, unsigned threads, void** args) {
    Call<F> call = {kernel, args};
    body = Call<F>::run;
    body_args = &call;
    gridDim = {x, y, 1};
    for (unsigned j = 0; j < y; j++)
        for (unsigned i = 0; i < x; i++) {
            blockIdx = {i, j, 0};
            run_block(threads);
        }
}
