// The kernels of the CUDA engine that are not convolutions. branches.cu and conv.cu continue this file.
//
// ELEMENT says how activations are stored: 0 f32, 1 bf16, 2 f16. Sums, statistics, parameters and everything that has
// lost its plane are f32. Tensors are NHWC; a "row" is one pixel of one image, `channels` values, a multiple of 8 and
// at most 2048. Nothing is included, so that the compiler needs no header files; `shim.h` defines the handful of
// names that CUDA brings when the host's C++ compiler reads this file.
//
// Every sum has a fixed order: a block leaves its sums behind, and a second kernel adds those up in the order of the
// blocks. So the same card gives the same bits.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define THREADS 256
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(THREADS, 4) name
// At least two blocks of such a kernel fit on a multiprocessor, whatever the compiler would rather do.
#define KERNEL2(name) extern "C" __global__ void __launch_bounds__(THREADS, 2) name
#define DEV static __device__ __forceinline__
#define DEV_MEMBER __device__ __forceinline__

// ---- stored values ------------------------------------------------------------------------------------------------

#if ELEMENT == 0

typedef float T;
DEV float wide(T v) { return v; }
DEV T narrow(float v) { return v; }

// Eight neighbouring channels as they are stored.
struct Raw {
    float4 a, b;
};
DEV Raw load(const T* p) {
    Raw r;
    r.a = ((const float4*)p)[0];
    r.b = ((const float4*)p)[1];
    return r;
}
DEV void widen(Raw r, float v[8]) {
    v[0] = r.a.x, v[1] = r.a.y, v[2] = r.a.z, v[3] = r.a.w;
    v[4] = r.b.x, v[5] = r.b.y, v[6] = r.b.z, v[7] = r.b.w;
}
DEV void store(T* p, const float v[8]) {
    float4 a = {v[0], v[1], v[2], v[3]}, b = {v[4], v[5], v[6], v[7]};
    ((float4*)p)[0] = a;
    ((float4*)p)[1] = b;
}
DEV void store4(T* p, const float v[4]) {
    float4 a = {v[0], v[1], v[2], v[3]};
    *(float4*)p = a;
}

#else

struct T {
    u16 bits;
};

#ifdef SHIM
DEV float wide_bits(u16 bits) { return shim_wide(ELEMENT, bits); }
DEV u16 narrow_bits(float v) { return shim_narrow(ELEMENT, v); }
DEV u32 narrow2(float low, float high) { return (u32)narrow_bits(high) << 16 | narrow_bits(low); }
#elif ELEMENT == 1
DEV float wide_bits(u16 bits) { return __uint_as_float((u32)bits << 16); }
DEV u16 narrow_bits(float v) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}
DEV u32 narrow2(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
#else
DEV float wide_bits(u16 bits) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    return v;
}
DEV u16 narrow_bits(float v) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}
DEV u32 narrow2(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
#endif

DEV float wide(T v) { return wide_bits(v.bits); }
DEV T narrow(float v) {
    T t;
    t.bits = narrow_bits(v);
    return t;
}

typedef uint4 Raw;
DEV Raw load(const T* p) { return *(const uint4*)p; }
DEV void widen(Raw r, float v[8]) {
    const u32 pairs[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if ELEMENT == 1 && !defined(SHIM)
        // The upper half is the number itself once the lower is cleared.
        v[2 * i] = __uint_as_float(pairs[i] << 16);
        v[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
#else
        v[2 * i] = wide_bits((u16)pairs[i]);
        v[2 * i + 1] = wide_bits((u16)(pairs[i] >> 16));
#endif
    }
}
DEV void store(T* p, const float v[8]) {
    uint4 q = {narrow2(v[0], v[1]), narrow2(v[2], v[3]), narrow2(v[4], v[5]), narrow2(v[6], v[7])};
    *(uint4*)p = q;
}
DEV void store4(T* p, const float v[4]) {
    uint2 q = {narrow2(v[0], v[1]), narrow2(v[2], v[3])};
    *(uint2*)p = q;
}

#endif

// v as it is after it has been stored.
DEV void round8(float v[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = wide(narrow(v[i]));
}

DEV void load_f32(const float* p, float v[8]) {
    float4 a = ((const float4*)p)[0], b = ((const float4*)p)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// ---- rows and channels --------------------------------------------------------------------------------------------

// Where a thread works: it keeps its eight channels and goes from row to row, so what a channel needs stays in registers.
struct Place {
    int c;     // first channel
    int row;   // first row
    int step;  // to the next row
    int lanes; // rows that a block takes at a time
    int lane;  // which of those
    bool works;
};

DEV Place place(int channels) {
    const int groups = channels / 8;
    Place p;
    p.lanes = THREADS / groups;
    p.lane = (int)threadIdx.x / groups;
    p.c = ((int)threadIdx.x - p.lane * groups) * 8;
    p.works = p.lane < p.lanes;
    p.row = (int)blockIdx.x * p.lanes + p.lane;
    p.step = (int)gridDim.x * p.lanes;
    return p;
}

DEV size_t at(int row, int channels, int c) { return (size_t)row * channels + c; }

// Kernels that read what the kernel before has written begin at its end: the last of it is still in the cache. The kernel
// after them begins at the start, which they have read last.
DEV int back(int row, int rows) { return rows - 1 - row; }

// Adds up the threads' sums of a block and leaves them in partials[block][which][channel].
DEV void leave(const float v[8], const Place& p, float* partials, int which, int count, int channels) {
    __shared__ float rows[THREADS * 8];
    __syncthreads();
    if (p.works) {
#pragma unroll
        for (int i = 0; i < 8; i++) rows[p.lane * channels + p.c + i] = v[i];
    }
    __syncthreads();
    for (int c = (int)threadIdx.x; c < channels; c += THREADS) {
        float sum = 0;
        for (int lane = 0; lane < p.lanes; lane++) sum += rows[lane * channels + c];
        partials[((size_t)blockIdx.x * count + which) * channels + c] = sum;
    }
}

// The sum over all blocks of partials[block][which][c], for the 8 channels of this block; thread (0, c) has it.
// 32 lanes share the blocks.
DEV double gather(const float* partials, int blocks, int which, int count, int channels, int c, int lane) {
    __shared__ double sums[THREADS];
    double sum = 0;
    if (c < channels)
        for (int b = lane; b < blocks; b += 32) sum += partials[((size_t)b * count + which) * channels + c];
    __syncthreads();
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = 16; half > 0; half /= 2) {
        if (lane < half) sums[threadIdx.x] += sums[threadIdx.x + half * 8];
        __syncthreads();
    }
    return sums[threadIdx.x & 7];
}

// Rows of the state of a normalisation (graph::STATE_ROWS).
#define MEAN 0
#define INV_STD 1
#define SCALE 2
#define SHIFT 3
#define GRAD_A 4
#define GRAD_B 5
#define GRAD_C 6

// ---- a step ---------------------------------------------------------------------------------------------------------

// What a micro-batch depends on besides its images; written by the host before each step (hyper.rs).
struct Hyper {
    float lr, momentum, weight_decay, nesterov;
    // Target of the true class and of every other class; the gradient of an image's loss counts this much.
    float on, off, share;
    // Share of the first label where images have two.
    float mix;
    // Of LARS; most length of the gradient, 0 without; what a moving average takes of the new, 0 without.
    float trust, clip, average;
    u32 rule;
    u64 drop_key;
    double drop_rate;
    // Number of the first image in the global batch; whether images have a second label.
    u32 first_image, is_mixed;
};

#define SGD 0
#define LARS_2018 1
#define LARS 2

// ---- input --------------------------------------------------------------------------------------------------------

// What an image becomes: four channels, the last of them zero. One thread for four pixels.
struct Normal {
    float mean[3], inv[3];
};

DEV void input_pixel(T* y, float r, float g, float b, const Normal& n) {
    float v[4] = {(r - n.mean[0]) * n.inv[0], (g - n.mean[1]) * n.inv[1], (b - n.mean[2]) * n.inv[2], 0.0f};
    store4(y, v);
}

KERNEL(input_u8)(const u8* pixels, T* y, u32 count, Normal n) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    // A micro-batch may begin anywhere in a batch.
    if (i * 4 + 4 <= count && ((size_t)pixels & 3) == 0) {
        const u32* p = (const u32*)pixels + (size_t)i * 3;
        const u32 a = p[0], b = p[1], c = p[2];
        T* to = y + (size_t)i * 16;
        input_pixel(to, (float)(a & 255), (float)(a >> 8 & 255), (float)(a >> 16 & 255), n);
        input_pixel(to + 4, (float)(a >> 24), (float)(b & 255), (float)(b >> 8 & 255), n);
        input_pixel(to + 8, (float)(b >> 16 & 255), (float)(b >> 24), (float)(c & 255), n);
        input_pixel(to + 12, (float)(c >> 8 & 255), (float)(c >> 16 & 255), (float)(c >> 24), n);
    } else {
        for (u32 j = i * 4; j < i * 4 + 4 && j < count; j++) {
            const u8* p = pixels + (size_t)j * 3;
            input_pixel(y + (size_t)j * 4, (float)p[0], (float)p[1], (float)p[2], n);
        }
    }
}

KERNEL(input_f32)(const float* pixels, T* y, u32 count, Normal n) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    for (u32 j = i * 4; j < i * 4 + 4 && j < count; j++) {
        const float* p = pixels + (size_t)j * 3;
        input_pixel(y + (size_t)j * 4, p[0], p[1], p[2], n);
    }
}

// ---- statistics of a batch ----------------------------------------------------------------------------------------

// Sums of z - k and of its square, k being the first row: so a mean far from zero costs no digits.
KERNEL(stats)(const T* z, float* partials, int rows, int channels) {
    const Place p = place(channels);
    float k[8], sum[8] = {}, square[8] = {};
    if (p.works) {
        widen(load(z + p.c), k);
        auto add = [&](Raw raw) {
            float v[8];
            widen(raw, v);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float d = v[i] - k[i];
                sum[i] += d;
                square[i] += d * d;
            }
        };
        int row = p.row;
        for (; row + 3 * p.step < rows; row += 4 * p.step) {
            const T* from = z + at(back(row, rows), channels, p.c);
            const size_t step = (size_t)p.step * channels;
            const Raw a = load(from), b = load(from - step), c = load(from - 2 * step), d = load(from - 3 * step);
            add(a), add(b), add(c), add(d);
        }
        for (; row < rows; row += p.step) add(load(z + at(back(row, rows), channels, p.c)));
    }
    leave(sum, p, partials, 0, 2, channels);
    leave(square, p, partials, 1, 2, channels);
}

// Mean, 1 / std, scale and shift; running[0] and running[1] gather mean and unbiased variance over micro-batches.
KERNEL(stats_finish)
(const float* partials, int blocks, const T* z, int rows, int channels, const float* gamma, const float* beta,
 float* state, double* running, int running_stride, float epsilon, int add) {
    const int lane = (int)threadIdx.x / 8, c = (int)blockIdx.x * 8 + (int)(threadIdx.x & 7);
    const double sum = gather(partials, blocks, 0, 2, channels, c, lane);
    const double square = gather(partials, blocks, 1, 2, channels, c, lane);
    if (lane > 0 || c >= channels) return;
    const double shifted = sum / rows;
    double var = square / rows - shifted * shifted;
    if (var < 0) var = 0; // rounding
    const double mean = shifted + (double)wide(z[c]);
    const double inv_std = 1.0 / sqrt(var + (double)epsilon);
    const double scale = gamma[c] * inv_std;
    state[MEAN * channels + c] = (float)mean;
    state[INV_STD * channels + c] = (float)inv_std;
    state[SCALE * channels + c] = (float)scale;
    state[SHIFT * channels + c] = (float)(beta[c] - mean * scale);
    const double unbiased = rows > 1 ? var * rows / (rows - 1.0) : var;
    running[c] = mean + (add ? running[c] : 0.0);
    running[running_stride + c] = unbiased + (add ? running[running_stride + c] : 0.0);
}

// Running statistics move by the mean over micro-batches, and their moving average, if there is one, after them.
KERNEL(running_update)
(float* running, const double* sums, int count, double update, double micro_batches, float* average,
 const Hyper* hyper) {
    const int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (i >= count) return;
    const float w = (float)((1.0 - update) * running[i] + update * sums[i] / micro_batches);
    running[i] = w;
    if (average) average[i] += hyper->average * (w - average[i]);
}

// ---- normalise, add, ReLU -----------------------------------------------------------------------------------------

DEV void affine(float v[8], const float scale[8], const float shift[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = v[i] * scale[i] + shift[i];
}
DEV void relu8(float v[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = v[i] < 0 ? 0 : v[i];
}

// y = relu?(z * scale + shift + side); SIDE: 0 none, 1 as stored, 2 normalised (and through a ReLU, if `side_relu`).
// Without `scale` it is 1.
template <int SIDE>
DEV void apply_rows(const T* z, const float* scale, const float* shift, const T* side, const float* side_scale,
                    const float* side_shift, int side_relu, int relu, T* y, int rows, int channels) {
    const Place p = place(channels);
    if (!p.works) return;
    float a[8], b[8], side_a[8], side_b[8];
    load_f32(shift + p.c, b);
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] = 1;
    if (scale) load_f32(scale + p.c, a);
    if (SIDE == 2) load_f32(side_scale + p.c, side_a), load_f32(side_shift + p.c, side_b);
    auto one = [&](Raw raw, Raw other, int row) {
        float v[8], w[8];
        widen(raw, v);
        affine(v, a, b);
        if (SIDE > 0) {
            widen(other, w);
            if (SIDE == 2) {
                affine(w, side_a, side_b);
                if (side_relu) relu8(w);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) v[i] += w[i];
        }
        if (relu) relu8(v);
        store(y + at(row, channels, p.c), v);
    };
    int row = p.row;
    for (; row + p.step < rows; row += 2 * p.step) {
        const size_t i = at(row, channels, p.c), j = at(row + p.step, channels, p.c);
        const Raw v = load(z + i), w = load(z + j);
        const Raw s = SIDE ? load(side + i) : v, t = SIDE ? load(side + j) : w;
        one(v, s, row), one(w, t, row + p.step);
    }
    if (row < rows) {
        const size_t i = at(row, channels, p.c);
        const Raw v = load(z + i);
        one(v, SIDE ? load(side + i) : v, row);
    }
}

KERNEL2(apply)(const T* z, const float* scale, const float* shift, int relu, T* y, int rows, int channels) {
    apply_rows<0>(z, scale, shift, nullptr, nullptr, nullptr, 0, relu, y, rows, channels);
}
KERNEL2(apply_add)
(const T* z, const float* scale, const float* shift, const T* side, int relu, T* y, int rows, int channels) {
    apply_rows<1>(z, scale, shift, side, nullptr, nullptr, 0, relu, y, rows, channels);
}
KERNEL2(apply_add_normed)
(const T* z, const float* scale, const float* shift, const T* side, const float* side_scale, const float* side_shift,
 int side_relu, int relu, T* y, int rows, int channels) {
    apply_rows<2>(z, scale, shift, side, side_scale, side_shift, side_relu, relu, y, rows, channels);
}

// ---- gradients of normalisations ----------------------------------------------------------------------------------

// Where the gradient that a kernel closes comes from.

// A convolution has stored it.
struct Stored {
    const T* g;
    DEV_MEMBER void get(int row, int channels, int c, float v[8]) const { widen(load(g + at(row, channels, c)), v); }
};

// A mean over the plane spreads it.
struct Spread {
    const float* d;
    int pixels;
    float share;
    DEV_MEMBER void get(int row, int channels, int c, float v[8]) const {
        load_f32(d + (size_t)(row / pixels) * channels + c, v);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] *= share;
        round8(v);
    }
};

// Sizes of a max-pool with a window of 3 and a step of 2.
struct Window {
    int h, w, out_h, out_w, pad;
};

// A max-pool hands it to the winners.
struct Winners {
    const T* d;
    const u8* winners;
    Window win;
    DEV_MEMBER void get(int row, int channels, int c, float v[8]) const {
        const int image = row / (win.h * win.w), pixel = row - image * (win.h * win.w);
        const int h = pixel / win.w, w = pixel - h * win.w;
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = 0;
        // Windows that start at most two before the pixel: one or two on each axis.
        const int last_h = (h + win.pad) / 2, last_w = (w + win.pad) / 2;
        const int first_h = last_h - 1 + ((h + win.pad) & 1), first_w = last_w - 1 + ((w + win.pad) & 1);
        for (int oh = first_h < 0 ? 0 : first_h; oh <= last_h && oh < win.out_h; oh++) {
            for (int ow = first_w < 0 ? 0 : first_w; ow <= last_w && ow < win.out_w; ow++) {
                const int tap = (h + win.pad - 2 * oh) * 3 + (w + win.pad - 2 * ow);
                const size_t i = at((image * win.out_h + oh) * win.out_w + ow, channels, c);
                const uint2 won = *(const uint2*)(winners + i);
                float d8[8];
                widen(load(d + i), d8);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    if ((int)(won.x >> (8 * j) & 255) == tap) v[j] += d8[j];
                    if ((int)(won.y >> (8 * j) & 255) == tap) v[4 + j] += d8[4 + j];
                }
            }
        }
        round8(v);
    }
};

// Sums of g and of g (z - mean), g being zero where z * scale + shift is not positive if `relu`. With `dx`, the
// gradient as it came is stored there; it is the reader that masks it.
template <class Source>
DEV void close_lazy_rows(Source source, const T* z, const float* state, int relu, T* dx, float* partials, int rows,
                         int channels) {
    const Place p = place(channels);
    float sum[8] = {}, dot[8] = {};
    if (p.works) {
        float mean[8], scale[8], shift[8];
        load_f32(state + MEAN * channels + p.c, mean);
        load_f32(state + SCALE * channels + p.c, scale);
        load_f32(state + SHIFT * channels + p.c, shift);
        auto add = [&](const float g[8], Raw raw) {
            float v[8];
            widen(raw, v);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const bool is_off = relu && v[i] * scale[i] + shift[i] <= 0;
                const float d = is_off ? 0.0f : g[i];
                sum[i] += d;
                dot[i] += d * (v[i] - mean[i]);
            }
        };
        int row = p.row;
        if (!dx) {
            for (; row + p.step < rows; row += 2 * p.step) {
                float g[8], h[8];
                const int i = back(row, rows), j = i - p.step;
                const Raw v = load(z + at(i, channels, p.c)), w = load(z + at(j, channels, p.c));
                source.get(i, channels, p.c, g);
                source.get(j, channels, p.c, h);
                add(g, v), add(h, w);
            }
        }
        for (; row < rows; row += p.step) {
            float g[8];
            const int i = back(row, rows);
            const Raw v = load(z + at(i, channels, p.c));
            source.get(i, channels, p.c, g);
            if (dx) store(dx + at(i, channels, p.c), g);
            add(g, v);
        }
    }
    leave(sum, p, partials, 0, 2, channels);
    leave(dot, p, partials, 1, 2, channels);
}

KERNEL2(close_lazy)
(const T* g, const T* z, const float* state, int relu, float* partials, int rows, int channels) {
    const Stored source = {g};
    close_lazy_rows(source, z, state, relu, nullptr, partials, rows, channels);
}
KERNEL2(close_lazy_pool)
(const T* d, const u8* winners, Window win, const T* z, const float* state, int relu, T* dx, float* partials, int rows,
 int channels) {
    const Winners source = {d, winners, win};
    close_lazy_rows(source, z, state, relu, dx, partials, rows, channels);
}

// dx = g + add, zero where y is not positive, and the sums of the normalisations that the value is the sum of.
template <int NORMS, class Source>
DEV void close_rows(Source source, const T* more, const T* y, const T* z0, const float* mean0, const T* z1,
                    const float* mean1, T* dx, float* partials, int rows, int channels) {
    const Place p = place(channels);
    float sum[8] = {}, dot0[8] = {}, dot1[8] = {};
    if (p.works) {
        float m0[8] = {}, m1[8] = {};
        if (NORMS > 0) load_f32(mean0 + p.c, m0);
        if (NORMS > 1) load_f32(mean1 + p.c, m1);
        for (int j = p.row; j < rows; j += p.step) {
            const int row = back(j, rows);
            const size_t i = at(row, channels, p.c);
            Raw added, value, raw0, raw1;
            if (more) added = load(more + i);
            if (y) value = load(y + i);
            if (NORMS > 0) raw0 = load(z0 + i);
            if (NORMS > 1) raw1 = load(z1 + i);
            float g[8], v[8];
            source.get(row, channels, p.c, g);
            if (more) {
                widen(added, v);
#pragma unroll
                for (int j = 0; j < 8; j++) g[j] += v[j];
            }
            if (y) {
                widen(value, v);
#pragma unroll
                for (int j = 0; j < 8; j++) g[j] = v[j] <= 0 ? 0 : g[j];
            }
            if (more) round8(g);
            store(dx + i, g);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += g[j];
            if (NORMS > 0) {
                widen(raw0, v);
#pragma unroll
                for (int j = 0; j < 8; j++) dot0[j] += g[j] * (v[j] - m0[j]);
            }
            if (NORMS > 1) {
                widen(raw1, v);
#pragma unroll
                for (int j = 0; j < 8; j++) dot1[j] += g[j] * (v[j] - m1[j]);
            }
        }
    }
    if (NORMS > 0) {
        leave(sum, p, partials, 0, 1 + NORMS, channels);
        leave(dot0, p, partials, 1, 1 + NORMS, channels);
    }
    if (NORMS > 1) leave(dot1, p, partials, 2, 1 + NORMS, channels);
}

#define CLOSE(name, norms)                                                                                            \
    KERNEL2(name)                                                                                                     \
    (const T* g, const T* more, const T* y, const T* z0, const float* mean0, const T* z1, const float* mean1, T* dx,  \
     float* partials, int rows, int channels) {                                                                       \
        const Stored source = {g};                                                                                    \
        close_rows<norms>(source, more, y, z0, mean0, z1, mean1, dx, partials, rows, channels);                       \
    }                                                                                                                 \
    KERNEL2(name##_spread)                                                                                            \
    (const float* d, int pixels, float share, const T* y, const T* z0, const float* mean0, const T* z1,               \
     const float* mean1, T* dx, float* partials, int rows, int channels) {                                            \
        const Spread source = {d, pixels, share};                                                                     \
        close_rows<norms>(source, nullptr, y, z0, mean0, z1, mean1, dx, partials, rows, channels);                    \
    }
CLOSE(close_0, 0)
CLOSE(close_1, 1)
CLOSE(close_2, 2)

// The constants of a normalisation's gradient, a g + b (z - mean) + c (Ioffe and Szegedy 2015, section 3, sorted by
// what varies), and the gradients of its scale and shift, from the sums of g and of g (z - mean) over so many rows.
DEV void norm_gradient(double sum, double dot, double rows, float* state, int c, int channels, float* d_gamma,
                       float* d_beta) {
    const double inv_std = state[INV_STD * channels + c], scale = state[SCALE * channels + c];
    state[GRAD_A * channels + c] = (float)scale;
    state[GRAD_B * channels + c] = (float)(-scale * inv_std * inv_std * dot / rows);
    state[GRAD_C * channels + c] = (float)(-scale * sum / rows);
    d_gamma[c] = (float)(dot * inv_std);
    d_beta[c] = (float)sum;
}

KERNEL(close_finish)
(const float* partials, int blocks, int which, int count, int rows, int channels, float* state, float* d_gamma,
 float* d_beta) {
    const int lane = (int)threadIdx.x / 8, c = (int)blockIdx.x * 8 + (int)(threadIdx.x & 7);
    const double sum = gather(partials, blocks, 0, count, channels, c, lane);
    const double dot = gather(partials, blocks, which, count, channels, c, lane);
    if (lane > 0 || c >= channels) return;
    norm_gradient(sum, dot, rows, state, c, channels, d_gamma, d_beta);
}

// dz = a g + b (z - mean) + c, g being zero where z * scale + shift is not positive if `relu`.
KERNEL2(norm_backward)
(const T* g, const T* z, const float* state, int relu, T* dz, int rows, int channels) {
    const Place p = place(channels);
    if (!p.works) return;
    float mean[8], a[8], b[8], k[8], scale[8], shift[8];
    load_f32(state + MEAN * channels + p.c, mean);
    load_f32(state + GRAD_A * channels + p.c, a);
    load_f32(state + GRAD_B * channels + p.c, b);
    load_f32(state + GRAD_C * channels + p.c, k);
    load_f32(state + SCALE * channels + p.c, scale);
    load_f32(state + SHIFT * channels + p.c, shift);
    auto one = [&](Raw raw_g, Raw raw_z, int row) {
        float d[8], v[8];
        widen(raw_g, d);
        widen(raw_z, v);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const bool is_off = relu && v[i] * scale[i] + shift[i] <= 0;
            const float masked = is_off ? 0.0f : d[i];
            d[i] = a[i] * masked + (b[i] * (v[i] - mean[i]) + k[i]);
        }
        store(dz + at(row, channels, p.c), d);
    };
    int row = p.row;
    for (; row + p.step < rows; row += 2 * p.step) {
        const size_t i = at(row, channels, p.c), j = at(row + p.step, channels, p.c);
        const Raw d = load(g + i), v = load(z + i), e = load(g + j), w = load(z + j);
        one(d, v, row), one(e, w, row + p.step);
    }
    if (row < rows) one(load(g + at(row, channels, p.c)), load(z + at(row, channels, p.c)), row);
}

// ---- pools --------------------------------------------------------------------------------------------------------

// Maxima of windows of 3 by 3; x is normalised as it is read if `scale`. `winners` keeps the tap, the first on a tie.
KERNEL2(max_pool)
(const T* x, const float* scale, const float* shift, int relu, Window win, T* y, u8* winners, int rows, int channels) {
    const Place p = place(channels);
    if (!p.works) return;
    float a[8], b[8];
    if (scale) load_f32(scale + p.c, a), load_f32(shift + p.c, b);
    for (int row = p.row; row < rows; row += p.step) {
        const int image = row / (win.out_h * win.out_w), pixel = row - image * (win.out_h * win.out_w);
        const int oh = pixel / win.out_w, ow = pixel - oh * win.out_w;
        float best[8];
        u32 tap[8] = {};
        bool is_first = true;
        for (int i = 0; i < 3; i++) {
            for (int j = 0; j < 3; j++) {
                const int h = 2 * oh - win.pad + i, w = 2 * ow - win.pad + j;
                if (h < 0 || h >= win.h || w < 0 || w >= win.w) continue;
                float v[8];
                widen(load(x + at((image * win.h + h) * win.w + w, channels, p.c)), v);
                if (scale) affine(v, a, b);
                if (relu) relu8(v);
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    if (is_first || v[k] > best[k] || v[k] != v[k]) best[k] = v[k], tap[k] = i * 3 + j;
                }
                is_first = false;
            }
        }
        store(y + at(row, channels, p.c), best);
        if (winners) {
            uint2 won = {tap[0] | tap[1] << 8 | tap[2] << 16 | tap[3] << 24,
                         tap[4] | tap[5] << 8 | tap[6] << 16 | tap[7] << 24};
            *(uint2*)(winners + at(row, channels, p.c)) = won;
        }
    }
}

// What dropout multiplies something by, a channel of an image for one; the generator is init::Stream.
DEV u64 mix_bits(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}
DEV double uniform(u64 key, u64 counter) {
    const u64 bits = mix_bits(key + counter * 0x9e3779b97f4a7c15ull);
    const double v = ((double)(bits >> 11) + 0.5) / 9007199254740992.0;
    return v < 1.0 ? v : 1.0 - 1.1102230246251565e-16;
}
DEV float drop_factor(u64 key, u64 counter, double rate) {
    return uniform(key, counter) < rate ? 0.0f : (float)(1.0 / (1.0 - rate));
}
DEV float channel_factor(const Hyper& h, int image, int channel, int channels) {
    return drop_factor(h.drop_key, ((u64)h.first_image + image) * channels + channel, h.drop_rate);
}

// Means over the plane; one thread for eight channels of an image. With `hyper` they are dropped out.
KERNEL(avg_pool)(const T* x, float* y, int images, int pixels, int channels, const Hyper* hyper) {
    const int groups = channels / 8, i = (int)(blockIdx.x * THREADS + threadIdx.x);
    const int image = i / groups, c = (i - image * groups) * 8;
    if (image >= images) return;
    float sum[8] = {};
    for (int pixel = 0; pixel < pixels; pixel++) {
        float v[8];
        widen(load(x + at(image * pixels + pixel, channels, c)), v);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += v[j];
    }
    const bool drops = hyper && hyper->drop_rate > 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float factor = drops ? channel_factor(*hyper, image, c + j, channels) : 1.0f;
        y[(size_t)image * channels + c + j] = sum[j] / pixels * factor;
    }
}

// The same dropout of a gradient.
KERNEL(drop)(float* d, int images, int channels, const Hyper* hyper) {
    const int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (hyper->drop_rate > 0 && i < images * channels)
        d[i] *= channel_factor(*hyper, i / channels, i % channels, channels);
}

// ---- classifier ---------------------------------------------------------------------------------------------------

// c(m, n) = sum over k of a(m, k) b(k, n) + bias(n), all f32, any strides; tiles of 64 by 64 and 16 deep. The next tiles are
// read while these are multiplied.
KERNEL2(matmul)
(const float* a, int a_m, int a_k, const float* b, int b_k, int b_n, const float* bias, float* c, int m, int n, int k) {
    __shared__ float4 as4[16][17], bs4[16][17];
    float(*as)[68] = (float(*)[68])as4, (*bs)[68] = (float(*)[68])bs4;
    const int t = (int)threadIdx.x, m0 = (int)blockIdx.y * 64, n0 = (int)blockIdx.x * 64;
    const int tm = t / 16 * 4, tn = t % 16 * 4;
    float sum[4][4] = {}, next_a[4], next_b[4];
    // Neighbouring threads read neighbouring values, whichever way the matrix lies.
    auto read = [&](int k0) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int e = i * THREADS + t;
            const int ak = a_k == 1 ? e % 16 : e / 64, am = a_k == 1 ? e / 16 : e % 64;
            const int bk = b_k == 1 ? e % 16 : e / 64, bn = b_k == 1 ? e / 16 : e % 64;
            const bool has_a = m0 + am < m && k0 + ak < k, has_b = n0 + bn < n && k0 + bk < k;
            next_a[i] = has_a ? a[(size_t)(m0 + am) * a_m + (size_t)(k0 + ak) * a_k] : 0.0f;
            next_b[i] = has_b ? b[(size_t)(k0 + bk) * b_k + (size_t)(n0 + bn) * b_n] : 0.0f;
        }
    };
    read(0);
    for (int k0 = 0; k0 < k; k0 += 16) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int e = i * THREADS + t;
            const int ak = a_k == 1 ? e % 16 : e / 64, am = a_k == 1 ? e / 16 : e % 64;
            const int bk = b_k == 1 ? e % 16 : e / 64, bn = b_k == 1 ? e / 16 : e % 64;
            as[ak][am] = next_a[i];
            bs[bk][bn] = next_b[i];
        }
        __syncthreads();
        if (k0 + 16 < k) read(k0 + 16);
#pragma unroll
        for (int kk = 0; kk < 16; kk++) {
            const float4 x = *(const float4*)&as[kk][tm], y = *(const float4*)&bs[kk][tn];
            const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sum[i][j] += xs[i] * ys[j];
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int row = m0 + tm + i, column = n0 + tn + j;
            if (row < m && column < n) c[(size_t)row * n + column] = sum[i][j] + (bias ? bias[column] : 0.0f);
        }
}

// y(n) = sum over rows of x(row, n).
KERNEL(column_sums)(const float* x, float* y, int rows, int columns) {
    const int c = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (c >= columns) return;
    float sum = 0;
    for (int row = 0; row < rows; row++) sum += x[(size_t)row * columns + c];
    y[c] = sum;
}

// ---- loss ---------------------------------------------------------------------------------------------------------

DEV float block_max(float v, float* shared) {
    __syncthreads();
    shared[threadIdx.x] = v;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if ((int)threadIdx.x < half && shared[threadIdx.x + half] > shared[threadIdx.x])
            shared[threadIdx.x] = shared[threadIdx.x + half];
        __syncthreads();
    }
    return shared[0];
}

DEV float block_sum(float v, float* shared) {
    __syncthreads();
    shared[threadIdx.x] = v;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if ((int)threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    return shared[0];
}

// The loss scale of f16: gradients are so much larger, and a step whose gradients overflow is left out.
struct Scale {
    float scale;
    u32 good;     // steps since the scale changed
    u32 overflow; // of this step
    u32 skipped;  // steps left out since the state was loaded
};

// An image of the batch, one block.
struct Scored {
    float loss;
    u32 hits; // 1: top-1, 2: top-5
};

KERNEL(loss)
(const float* logits, const u32* labels, const u32* others, const Hyper* hyper, const Scale* scale, float* d,
 Scored* scored, int classes) {
    __shared__ float shared[THREADS];
    const float* row = logits + (size_t)blockIdx.x * classes;
    const int t = (int)threadIdx.x;
    const float off = hyper->off;
    // An image of two classes has a target for each, and hits are counted for the larger; of one, all of `on`.
    const int one = (int)labels[blockIdx.x], two = hyper->is_mixed ? (int)others[blockIdx.x] : one;
    const float mix = two != one ? hyper->mix : 1.0f;
    const float first = mix * (hyper->on - off), second = two != one ? (1 - mix) * (hyper->on - off) : 0.0f;
    const int label = mix >= 0.5f ? one : two;
    const float score = row[label];
    float top = -3.4e38f, all = 0, above = 0, before = 0;
    for (int i = t; i < classes; i += THREADS) {
        const float v = row[i];
        top = v > top ? v : top;
        all += v;
        above += v > score ? 1.0f : 0.0f;
        before += i < label && v == score ? 1.0f : 0.0f;
    }
    top = block_max(top, shared);
    float sum = 0, linear = 0;
    for (int i = t; i < classes; i += THREADS) sum += expf(row[i] - top), linear += row[i] - top;
    sum = block_sum(sum, shared);
    linear = block_sum(linear, shared);
    above = block_sum(above, shared);
    before = block_sum(before, shared);
    if (d) {
        const float share = hyper->share * scale->scale;
        for (int i = t; i < classes; i += THREADS) {
            const float target = off + (i == one ? first : 0.0f) + (i == two ? second : 0.0f);
            d[(size_t)blockIdx.x * classes + i] = (expf(row[i] - top) / sum - target) * share;
        }
    }
    if (t == 0) {
        const bool is_finite = score - score == 0;
        Scored s;
        s.loss = logf(sum) - off * linear - first * (row[one] - top) - second * (row[two] - top);
        s.hits = (is_finite && above == 0 && before == 0 ? 1u : 0u) | (is_finite && above < 5 ? 2u : 0u);
        scored[blockIdx.x] = s;
    }
}

struct Totals {
    double loss;
    u32 top1, top5;
};

// One block adds up the images, and to what was there before if `add`.
KERNEL(loss_finish)(const Scored* scored, Totals* totals, int images, int add) {
    __shared__ double losses[THREADS];
    __shared__ u32 firsts[THREADS], fifths[THREADS];
    const int t = (int)threadIdx.x;
    double loss = 0;
    u32 first = 0, fifth = 0;
    for (int i = t; i < images; i += THREADS) {
        loss += scored[i].loss;
        first += scored[i].hits & 1;
        fifth += scored[i].hits >> 1;
    }
    losses[t] = loss, firsts[t] = first, fifths[t] = fifth;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (t < half) {
            losses[t] += losses[t + half];
            firsts[t] += firsts[t + half];
            fifths[t] += fifths[t + half];
        }
        __syncthreads();
    }
    if (t == 0) {
        totals->loss = losses[0] + (add ? totals->loss : 0.0);
        totals->top1 = firsts[0] + (add ? totals->top1 : 0u);
        totals->top5 = fifths[0] + (add ? totals->top5 : 0u);
    }
}

// ---- parameters ---------------------------------------------------------------------------------------------------

// Parameters lie in one array, each in whole chunks of 1024, one block a chunk.

// cuDNN stores the gradient of a weight in the format of the activations: `is_raw` says of each chunk whether it lies
// there.
KERNEL(widen_gradients)(const T* raw, float* fresh, const u8* is_raw) {
    if (!is_raw[blockIdx.x]) return;
    const size_t i = ((size_t)blockIdx.x * THREADS + threadIdx.x) * 4;
    float4 v = {wide(raw[i]), wide(raw[i + 1]), wide(raw[i + 2]), wide(raw[i + 3])};
    *(float4*)(fresh + i) = v;
}

// sum = fresh, or sum += fresh.
KERNEL(accumulate)(float* sum, const float* fresh, int add) {
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    float4 v = ((const float4*)fresh)[i];
    if (add) {
        const float4 s = ((const float4*)sum)[i];
        v.x += s.x, v.y += s.y, v.z += s.z, v.w += s.w;
    }
    ((float4*)sum)[i] = v;
}

// own = the sum of what all ranks have, in their order; the others' pieces lie in `inbox`, each as long as the grid.
KERNEL(sum_ranks)(float* own, const float* inbox, int me, int ranks) {
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x, piece = (size_t)gridDim.x * THREADS;
    const float4 mine = ((const float4*)own)[i];
    float4 sum = me == 0 ? mine : ((const float4*)inbox)[i];
    for (int rank = 1; rank < ranks; rank++) {
        const float4 v = rank == me ? mine : ((const float4*)inbox)[rank * piece + i];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    ((float4*)own)[i] = sum;
}

KERNEL(sum_ranks_f64)(double* own, const double* inbox, int count, int me, int ranks) {
    const int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (i >= count) return;
    const double mine = own[i];
    double sum = me == 0 ? mine : inbox[i];
    for (int rank = 1; rank < ranks; rank++) sum += rank == me ? mine : inbox[(size_t)rank * count + i];
    own[i] = sum;
}

DEV bool is_finite4(float4 v) { return v.x - v.x == 0 && v.y - v.y == 0 && v.z - v.z == 0 && v.w - v.w == 0; }

// Says whether a gradient has overflowed.
KERNEL(check)(const float* g, Scale* scale) {
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (!is_finite4(((const float4*)g)[i])) scale->overflow = 1;
}

// Halves the scale after an overflow, doubles it after 2000 steps without (Micikevicius et al. 2018, section 3.2).
KERNEL(rescale)(Scale* scale) {
    if (threadIdx.x > 0) return;
    if (scale->overflow) {
        scale->scale = scale->scale > 2 ? scale->scale / 2 : 1;
        scale->good = 0;
        scale->skipped += 1;
    } else if (++scale->good == 2000) {
        scale->scale = scale->scale < 1e9f ? scale->scale * 2 : scale->scale;
        scale->good = 0;
    }
    scale->overflow = 0;
}

// What LARS and clipping know of a tensor: sums of squares of w and of its gradient, and of their products.
struct Norms {
    double w, g, wg;
};

// Adds up the threads' sums; thread 0 has the result.
DEV Norms block_norms(Norms v) {
    __shared__ double sums[3][THREADS];
    const int t = (int)threadIdx.x;
    sums[0][t] = v.w, sums[1][t] = v.g, sums[2][t] = v.wg;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (t < half)
            for (int k = 0; k < 3; k++) sums[k][t] += sums[k][t + half];
        __syncthreads();
    }
    Norms sum = {sums[0][0], sums[1][0], sums[2][0]};
    return sum;
}

// Those of each chunk.
KERNEL(squares)(const float* w, const float* g, const Scale* scale, Norms* chunks) {
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    const float4 a = ((const float4*)w)[i], b = ((const float4*)g)[i];
    const float ws[4] = {a.x, a.y, a.z, a.w}, gs[4] = {b.x, b.y, b.z, b.w};
    const double unscale = 1.0 / scale->scale;
    Norms sum = {};
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const double x = ws[k], y = gs[k] * unscale;
        sum.w += x * x, sum.g += y * y, sum.wg += x * y;
    }
    sum = block_norms(sum);
    if (threadIdx.x == 0) chunks[blockIdx.x] = sum;
}

// Those of each tensor, a block each, whose chunks are firsts[block]..firsts[block + 1].
KERNEL(norms)(const Norms* chunks, const u32* firsts, Norms* tensors) {
    Norms sum = {};
    for (u32 i = firsts[blockIdx.x] + threadIdx.x; i < firsts[blockIdx.x + 1]; i += THREADS)
        sum.w += chunks[i].w, sum.g += chunks[i].g, sum.wg += chunks[i].wg;
    sum = block_norms(sum);
    if (threadIdx.x == 0) tensors[blockIdx.x] = sum;
}

// How a tensor is updated (engine::Rule): its gradient is times `scale`, and w with `decay` joins it; the rate is inside
// of the momentum or outside.
struct TensorRule {
    float scale, decay, rate;
    u32 is_inside;
};

// One block finds them all. Bits of `kinds`: 1 decay acts on the tensor, 2 LARS gives it a rate of its own.
KERNEL(rates)(const Hyper* hyper, const Norms* tensors, const u8* kinds, TensorRule* rules, int count) {
    const Hyper h = *hyper;
    double scale = 1;
    if (h.clip > 0) {
        Norms all = {};
        for (int i = (int)threadIdx.x; i < count; i += THREADS) all.g += tensors[i].g;
        // As PyTorch's clip_grad_norm_.
        const double by = h.clip / (sqrt(block_norms(all).g) + 1e-6);
        scale = by < 1 ? by : 1;
    }
    for (int i = (int)threadIdx.x; i < count; i += THREADS) {
        const bool is_own = h.rule != SGD && (kinds[i] & 2);
        double decay = kinds[i] & 1 ? h.weight_decay : 0.0, rate = h.lr;
        if (is_own) {
            const Norms n = tensors[i];
            const double in_g = h.rule == LARS_2018 ? decay : 0.0;
            const double square = scale * scale * n.g + 2 * scale * in_g * n.wg + in_g * in_g * n.w;
            const double w = sqrt(n.w), g = square > 0 ? sqrt(square) : 0;
            if (w > 0 && g > 0) rate *= h.trust * w / (g + decay * w);
        } else if (h.rule == LARS) {
            decay = 0;
        }
        TensorRule r = {(float)scale, (float)decay, (float)rate, h.rule == LARS ? 1u : 0u};
        rules[i] = r;
    }
}

DEV void update1(float& w, float& m, float g, const Hyper& h, const TensorRule& r, float scale) {
    g = g * scale + r.decay * w;
    if (r.is_inside) {
        m = h.momentum * m + r.rate * g;
        w = w - m;
    } else {
        m = h.momentum * m + g;
        w = w - r.rate * (h.nesterov != 0 ? g + h.momentum * m : m);
    }
}

// Updates the parameters by the rule of their tensor (which[chunk]), and what follows them: their copy as convolutions
// read them, and their moving average. A step that has overflowed changes the average alone.
KERNEL(update)
(const Hyper* hyper, const Scale* scale, float* w, float* m, const float* g, T* cast, const u32* which,
 const TensorRule* rules, float* average) {
    const Hyper h = *hyper;
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    float4 p = ((const float4*)w)[i];
    if (!scale->overflow) {
        const TensorRule r = rules[which[blockIdx.x]];
        const float by = r.scale / scale->scale;
        float4 a = ((const float4*)m)[i];
        const float4 d = ((const float4*)g)[i];
        update1(p.x, a.x, d.x, h, r, by);
        update1(p.y, a.y, d.y, h, r, by);
        update1(p.z, a.z, d.z, h, r, by);
        update1(p.w, a.w, d.w, h, r, by);
        ((float4*)w)[i] = p;
        ((float4*)m)[i] = a;
        const float v[4] = {p.x, p.y, p.z, p.w};
        if (cast) store4(cast + i * 4, v);
    }
    if (average) {
        float4 v = ((const float4*)average)[i];
        v.x += h.average * (p.x - v.x), v.y += h.average * (p.y - v.y);
        v.z += h.average * (p.z - v.z), v.w += h.average * (p.w - v.w);
        ((float4*)average)[i] = v;
    }
}

// a and b exchange their values.
KERNEL(swap)(float* a, float* b, int count) {
    const int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (i >= count) return;
    const float v = a[i];
    a[i] = b[i], b[i] = v;
}

KERNEL(cast)(const float* w, T* to) {
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    const float4 p = ((const float4*)w)[i];
    const float v[4] = {p.x, p.y, p.z, p.w};
    store4(to + i * 4, v);
}

// A convolution's weight times the scale of the running normalisation, and the shift; a block for each output.
KERNEL(fold)
(const float* w, const float* gamma, const float* beta, const float* mean, const float* var, float epsilon, T* to,
 float* shift, int depth) {
    const int o = (int)blockIdx.x;
    const double scale = gamma[o] / sqrt((double)var[o] + (double)epsilon);
    if (threadIdx.x == 0) shift[o] = (float)(beta[o] - mean[o] * scale);
    for (int i = (int)threadIdx.x; i < depth; i += THREADS)
        to[(size_t)o * depth + i] = narrow(w[(size_t)o * depth + i] * (float)scale);
}

// ---- races --------------------------------------------------------------------------------------------------------

// Random values from -1 to 1.
KERNEL(fill)(T* to, u64 count, int seed) {
    for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < count; i += (u64)gridDim.x * THREADS) {
        const u64 bits = mix_bits((i + 1) * 0x9e3779b97f4a7c15ull + (u64)seed);
        to[i] = narrow((float)(int)(bits >> 40) / 8388608.0f - 1.0f);
    }
}

DEV float larger(float a, float b) { return a < b ? b : a; }

// The largest difference of a and b, and the largest b, of a block's part; infinite where one is not finite.
KERNEL(compare)(const T* a, const T* b, u64 count, float* found) {
    __shared__ float shared[THREADS];
    float gap = 0, size = 0;
    for (u64 i = (u64)blockIdx.x * THREADS + threadIdx.x; i < count; i += (u64)gridDim.x * THREADS) {
        const float v = wide(a[i]), w = wide(b[i]), d = v - w;
        const bool is_finite = v - v == 0 && w - w == 0;
        gap = larger(gap, is_finite ? (d < 0 ? -d : d) : 3.4e38f);
        size = larger(size, w < 0 ? -w : w);
    }
    gap = block_max(gap, shared);
    size = block_max(size, shared);
    if (threadIdx.x == 0) found[2 * blockIdx.x] = gap, found[2 * blockIdx.x + 1] = size;
}
