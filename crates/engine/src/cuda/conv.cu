// Convolutions as products of matrices, on the tensor cores of sm_80 and later. Continues kernels.cu.
//
// x is N x H x W x C, w is O x K x K x C, y is N x H x W x O; the padding is (K - 1) / 2 on every side. C and O are
// multiples of 8; x may have 4 channels, but no gradient then. No matrix is ever laid out: a block copies the pieces of
// 16 bytes that it needs from where they lie.
//
// A block has 8 warps and computes 128 rows by 128 or 64 columns of the result, 64 bytes of the depth at a time. Three
// stages of shared memory take turns: while the warps work on one, the copies to the two others are under way.
// Sums are f32 and have a fixed order. Only the gradient of w is split over blocks along its depth; conv_sum adds
// the parts.
//
// Formats: of 16 bits by mma.m16n8k16; f32 either exactly, by multiplications and additions in f32, or, in the kernels
// that say tf32, rounded to that by mma.m16n8k8.

// Sizes of a convolution: n images of h by w by c, outputs of oh by ow by o, a window of k by k.
struct ConvSizes {
    int n, h, w, c, oh, ow, o, k;
};

static constexpr int CONV_ROWS = 128; // of a block's result
static constexpr int STAGES = 3;
static constexpr int VEC = 16 / (int)sizeof(T); // values of a piece
static constexpr int DEEP = 4 * VEC;            // depth of a stage

// ---- what the machine does ----------------------------------------------------------------------------------------

#ifdef SHIM

DEV Shared shared_at(void* p) { return (Shared)p; }
DEV Shared flip(Shared at, int bits) { return (Shared)((uintptr_t)at ^ (uintptr_t)bits); }
template <int BYTES> DEV void copy_async(Shared to, const T* from, bool valid) { shim_copy(to, from, BYTES, valid); }
DEV void copies_commit() { shim_commit(); }
template <int LEFT> DEV void copies_wait() { shim_wait(LEFT); }
template <bool TRANS> DEV void ldmatrix(Shared row, u32 r[4]) { shim_ldmatrix(TRANS, row, r); }
DEV u32 lds(Shared at) {
    u32 v;
    memcpy(&v, at, 4);
    return v;
}
DEV void lds2(Shared at, float v[2]) { memcpy(v, at, 8); }
DEV u32 to_tf32(u32 bits) { return shim_tf32(bits); }
DEV int thread_again() { return (int)threadIdx.x; }
DEV int block_again() { return (int)blockIdx.x; }
DEV int part_again() { return (int)blockIdx.y; }
template <int M> DEV void mma(float sum[M][4][4], const u32 a[M][4], const u32 b[4][2]) { shim_mma<M, 4>(sum, a, b); }

#else

// An address of shared memory.
typedef u32 Shared;

DEV Shared shared_at(void* p) { return (Shared)__cvta_generic_to_shared(p); }
DEV Shared flip(Shared at, int bits) { return at ^ (u32)bits; }

// Begins to copy 16 or 8 bytes; zeros come, and nothing is read, unless `valid`.
template <int BYTES> DEV void copy_async(Shared to, const T* from, bool valid) {
    const int bytes = valid ? BYTES : 0;
    if (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
    }
}
// What has begun since the last time is a group.
DEV void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most LEFT groups of this thread are under way.
template <int LEFT> DEV void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// Four matrices of 8 by 8 values of 16 bits; lane l names row l % 8 of matrix l / 8. Lane l gets values 2 (l % 4) and
// the next of row l / 4 of each; of column l / 4 if TRANS.
template <bool TRANS> DEV void ldmatrix(Shared row, u32 r[4]) {
    if (TRANS) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(row));
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(row));
    }
}
#if ELEMENT == 0
DEV u32 lds(Shared at) {
    u32 v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
}
DEV void lds2(Shared at, float v[2]) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v[0]), "=f"(v[1]) : "r"(at));
}
DEV u32 to_tf32(u32 bits) {
    u32 rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
    return rounded;
}
#endif

// threadIdx.x, blockIdx.x and blockIdx.y, read anew: so what follows from them takes no registers in between.
DEV int thread_again() {
    int t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t;
}
DEV int block_again() {
    int t;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(t));
    return t;
}
DEV int part_again() {
    int t;
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(t));
    return t;
}

#if ELEMENT == 0
#define MMA "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
#elif ELEMENT == 1
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#endif

// sum += a b for M tiles of 16 rows and 4 of 8 columns, 32 bytes deep. Lane l has rows l / 4 and 8 more, and columns
// 2 (l % 4) and the next, of each tile.
template <int M> DEV void mma(float sum[M][4][4], const u32 a[M][4], const u32 b[4][2]) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float* s = sum[i][j];
            asm volatile(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                         : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
                         : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]), "r"(b[j][1]));
        }
}

#endif

// ---- tiles in shared memory ---------------------------------------------------------------------------------------

// A tile lies either along the depth, a row of the result after the other, or across, a step of the depth after the
// other with WIDTH values each. Pieces of a row change places, so that what is read together lies in different banks:
// bits of a piece's number are flipped. As tiles begin at multiples of 128 bytes, another piece of the row is reached by
// flipping bits of the address, too, and the compiler need not keep an address for each.

DEV int along(int row, int piece) { return row * 64 + ((piece ^ (row >> 1 & 3)) << 4); }

template <int WIDTH> DEV int across(int k, int piece) {
    return k * (WIDTH * (int)sizeof(T)) + ((piece ^ (sizeof(T) == 2 ? k & 7 : (k & 3) << 1)) << 4);
}

// The part of the result that a warp computes: 16 M rows by 32 columns, M being 4 of 128 columns and 2 of 64.
template <int BN> struct Warp {
    static constexpr int M = BN == 128 ? 4 : 2;
    int row, column, g, t;
    DEV_MEMBER Warp() {
        const int thread = thread_again(), warp = thread / 32, lane = thread % 32;
        row = warp / (BN / 32) * (16 * M);
        column = warp % (BN / 32) * 32;
        g = lane / 4, t = lane % 4;
    }
};

// How a stage is multiplied.
#define EXACT 0
#define TENSOR 1

#if ELEMENT == 0

DEV float lds_float(Shared at) {
    const u32 bits = lds(at);
#ifdef SHIM
    return shim_float(bits);
#else
    return __uint_as_float(bits);
#endif
}

// Multiplications and additions in f32; a thread has the same places of the result as with mma.
template <int BN, bool A_ACROSS, bool B_ACROSS>
DEV void stage_exact(float sum[Warp<BN>::M][4][4], Shared a, Shared b, const Warp<BN>& warp) {
    constexpr int A_PITCH = CONV_ROWS * 4, B_PITCH = BN * 4, DEPTHS = A_ACROSS || B_ACROSS ? 1 : 2;
    const int row = warp.row + warp.g, column = warp.column + 2 * warp.t;
    const Shared a_row = a + (A_ACROSS ? row * 4 : along(row, 0));
    const Shared b_even = b + (B_ACROSS ? column * 4 : along(column, 0));
    const Shared b_odd = b + (B_ACROSS ? 0 : along(column + 1, 0));
#pragma unroll(3 - DEPTHS)
    for (int k = 0; k < DEEP; k += DEPTHS) {
        const int piece = k >> 2 << 4, within = (k & 3) * 4, turned = (k & 3) << 5;
        const Shared a_at = A_ACROSS ? flip(a_row + k * A_PITCH, turned) : flip(a_row, piece) + within;
        const Shared b_at = B_ACROSS ? flip(b_even + k * B_PITCH, turned) : flip(b_even, piece) + within;
        const Shared b_next = flip(b_odd, piece) + within;
        float y[4][2][DEPTHS];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (B_ACROSS) {
                float v[2];
                lds2(flip(b_at, j << 5), v);
                y[j][0][0] = v[0], y[j][1][0] = v[1];
            } else {
                lds2(b_at + j * 512, y[j][0]);
                lds2(b_next + j * 512, y[j][1]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * Warp<BN>::M; i++) {
            float x[DEPTHS];
            if (A_ACROSS) x[0] = lds_float(flip(a_at, i % 4 << 5) + i / 4 * 128);
            else if (DEPTHS == 1) x[0] = lds_float(a_at + i * 512);
            else lds2(a_at + i * 512, x);
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int e = 0; e < 2; e++)
#pragma unroll
                    for (int d = 0; d < DEPTHS; d++) sum[i / 2][j][i % 2 * 2 + e] += x[d] * y[j][e][d];
        }
    }
}

#endif

template <int BN, bool A_ACROSS, bool B_ACROSS>
DEV void stage_tensor(float sum[Warp<BN>::M][4][4], Shared a, Shared b, const Warp<BN>& warp) {
    constexpr int M = Warp<BN>::M, A_PITCH = CONV_ROWS * (int)sizeof(T), B_PITCH = BN * (int)sizeof(T);
    const int lane = warp.g * 4 + warp.t, low = lane & 7, middle = lane >> 3 & 1, high = lane >> 4;
#if ELEMENT == 0
    // ldmatrix turns values of 16 bits only.
    const Shared a_at = a + (A_ACROSS ? across<CONV_ROWS>(warp.t, (warp.row + warp.g) / 4) + warp.g % 4 * 4
                                      : along(warp.row + middle * 8 + low, high));
    const Shared b_at = b + (B_ACROSS ? across<BN>(warp.t, (warp.column + warp.g) / 4) + warp.g % 4 * 4
                                      : along(warp.column + high * 8 + low, middle));
#else
    const Shared a_at = a + (A_ACROSS ? across<CONV_ROWS>(high * 8 + low, warp.row / 8 + middle)
                                      : along(warp.row + middle * 8 + low, high));
    const Shared b_at = b + (B_ACROSS ? across<BN>(middle * 8 + low, warp.column / 8 + high)
                                      : along(warp.column + high * 8 + low, middle));
#endif
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 x[M][4], y[4][2];
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            u32 r[4];
            if (!B_ACROSS) {
                ldmatrix<false>(flip(b_at, half << 5) + j * 512, r);
            } else {
#if ELEMENT == 0
#pragma unroll
                for (int e = 0; e < 4; e++)
                    r[e] = lds(flip(b_at, (j + e / 2) << 5) + (half * 8 + e % 2 * 4) * B_PITCH);
#else
                ldmatrix<true>(flip(b_at, j << 4) + half * 16 * B_PITCH, r);
#endif
            }
            y[j][0] = r[0], y[j][1] = r[1], y[j + 1][0] = r[2], y[j + 1][1] = r[3];
        }
#pragma unroll
        for (int i = 0; i < M; i++) {
            if (!A_ACROSS) {
                ldmatrix<false>(flip(a_at, half << 5) + i * 1024, x[i]);
            } else {
#if ELEMENT == 0
#pragma unroll
                for (int e = 0; e < 4; e++)
                    x[i][e] = lds(flip(a_at, (i % 2 * 2 + e % 2) << 5) + i / 2 * 128 + (half * 8 + e / 2 * 4) * A_PITCH);
#else
                ldmatrix<true>(flip(a_at, i << 5) + half * 16 * A_PITCH, x[i]);
#endif
            }
        }
#if ELEMENT == 0
#pragma unroll
        for (int j = 0; j < 4; j++) y[j][0] = to_tf32(y[j][0]), y[j][1] = to_tf32(y[j][1]);
#pragma unroll
        for (int i = 0; i < M; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) x[i][e] = to_tf32(x[i][e]);
#endif
        mma<M>(sum, x, y);
    }
}

template <int HOW, int BN, bool A_ACROSS, bool B_ACROSS>
DEV void stage(float sum[Warp<BN>::M][4][4], Shared a, Shared b, const Warp<BN>& warp) {
#if ELEMENT == 0
    if (HOW == EXACT) {
        stage_exact<BN, A_ACROSS, B_ACROSS>(sum, a, b, warp);
        return;
    }
#endif
    stage_tensor<BN, A_ACROSS, B_ACROSS>(sum, a, b, warp);
}

// ---- what is copied -----------------------------------------------------------------------------------------------

// Each of these copies its threads' pieces of a stage and goes on to the next stage. Rows that are not there, and depths
// past the end, are zeros.

static constexpr int NOWHERE = -(1 << 29);

// Pixels of a plane of h by w by c for each tap, along the depth: depth is (tap, channel). Tap (i, j) of a row reads
// the pixel SIGN * (i, j) from that of tap (0, 0). IMAGE: 4 channels of 16 bits, so that a piece has two taps.
template <int SIGN, bool IMAGE> struct Pixels {
    static constexpr bool ACROSS = false;
    static constexpr int PARTS = IMAGE ? 2 : 1;
    const T* x;
    int row[2], column[2], pixel[2];
    int h, w, c, taps_h, taps_w;
    int channel, i[PARTS], j[PARTS];

    DEV_MEMBER void start(const T* x_, int h_, int w_, int c_, int taps_h_, int taps_w_) {
        x = x_, h = h_, w = w_, c = c_, taps_h = taps_h_, taps_w = taps_w_;
        const int first = (int)threadIdx.x % 4 * VEC;
        channel = IMAGE ? 0 : first;
#pragma unroll
        for (int p = 0; p < PARTS; p++) i[p] = 0, j[p] = IMAGE ? first / 4 + p : 0;
        settle();
    }
    // Row of the tile, 0 or 1 of this thread.
    DEV_MEMBER static int tile_row(int which) { return (int)threadIdx.x / 4 + which * 64; }
    DEV_MEMBER void set(int which, bool valid, int image, int row_, int column_) {
        row[which] = valid ? row_ : NOWHERE;
        column[which] = column_;
        pixel[which] = (image * h + row_) * w + column_;
    }
    DEV_MEMBER void settle() {
        if (IMAGE) {
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
#pragma unroll 1
                while (j[p] >= taps_w) j[p] -= taps_w, i[p]++;
            }
        } else {
#pragma unroll 1
            while (channel >= c) {
                channel -= c;
                if (++j[0] == taps_w) j[0] = 0, i[0]++;
            }
        }
    }
    DEV_MEMBER void copy(Shared tile) {
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            const int away = SIGN * (i[p] * w + j[p]);
#pragma unroll
            for (int which = 0; which < 2; which++) {
                const int r = row[which] + SIGN * i[p], q = column[which] + SIGN * j[p];
                const bool valid = i[p] < taps_h && (u32)r < (u32)h && (u32)q < (u32)w;
                const Shared to = tile + along(tile_row(0), (int)threadIdx.x % 4) + which * 64 * 64 + p * 8;
                copy_async<16 / PARTS>(to, x + ((long long)(pixel[which] + away) * c + channel), valid);
            }
        }
        if (IMAGE) {
#pragma unroll
            for (int p = 0; p < PARTS; p++) j[p] += DEEP / 4;
        } else {
            channel += DEEP;
        }
        settle();
    }
};

// Rows of a matrix that lies along the depth. HALVES: rows begin at multiples of 8 bytes only.
template <int ROWS, bool HALVES> struct Rows {
    static constexpr bool ACROSS = false;
    static constexpr int COUNT = ROWS / 64, PARTS = HALVES ? 2 : 1;
    const T* at;
    int row, rows, depth, k;

    DEV_MEMBER void start(const T* from, int first, int rows_, int depth_) {
        row = first + (int)threadIdx.x / 4, rows = rows_, depth = depth_;
        k = (int)threadIdx.x % 4 * VEC;
        at = from + (size_t)row * depth + k;
    }
    DEV_MEMBER void copy(Shared tile) {
#pragma unroll
        for (int which = 0; which < COUNT; which++) {
            const Shared to = tile + along((int)threadIdx.x / 4, (int)threadIdx.x % 4) + which * 64 * 64;
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                const bool valid = row + which * 64 < rows && k + p * 4 < depth;
                copy_async<16 / PARTS>(to + p * 8, at + (size_t)which * 64 * depth + p * 4, valid);
            }
        }
        at += DEEP;
        k += DEEP;
    }
};

// Where a thread's pieces of a tile lie that lies across the depth.
template <int WIDTH> struct Across {
    static constexpr int PIECES = WIDTH / VEC;       // of a step of the depth
    static constexpr int STEP = THREADS / PIECES;    // to the thread's next
    static constexpr int COUNT = DEEP / STEP;        // of a thread
    DEV_MEMBER static int piece() { return (int)threadIdx.x % PIECES; }
    DEV_MEMBER static int first() { return (int)threadIdx.x / PIECES; }
    // STEP is a multiple of 8, so that the places are as far apart.
    DEV_MEMBER static int place(int i) { return across<WIDTH>(first(), piece()) + i * STEP * WIDTH * (int)sizeof(T); }
};

// Rows of a matrix that lies across the depth, from row `begin` to `end`; `width` values in a row.
template <int WIDTH> struct Columns {
    static constexpr bool ACROSS = true;
    typedef Across<WIDTH> Place;
    const T* at;
    int left, width;

    DEV_MEMBER void start(const T* from, int column, int width_, int begin, int end) {
        const int mine = column + Place::piece() * VEC, row = begin + Place::first();
        width = width_;
        left = mine < width ? end - row : 0;
        at = from + (size_t)row * width + mine;
    }
    DEV_MEMBER void copy(Shared tile) {
#pragma unroll
        for (int n = 0; n < Place::COUNT; n++) {
            copy_async<16>(tile + Place::place(n), at, left > 0);
            at += (size_t)Place::STEP * width;
            left -= Place::STEP;
        }
    }
};

// The weight for the gradient of the input: across the depth, which is (tap, output). Taps begin at (i0, j0) and are
// `stride` apart.
template <int WIDTH> struct Taps {
    static constexpr bool ACROSS = true;
    typedef Across<WIDTH> Place;
    const T* w;
    int first; // of tap (i0, j0) and output 0
    int o, outputs, i, j, taps_h, taps_w;
    int depth, down, right; // from an output, a row of taps, a tap to the next

    DEV_MEMBER void start(const T* w_, const ConvSizes& s, int column, int i0, int j0, int stride, int taps_h_,
                          int taps_w_) {
        const int mine = column + Place::piece() * VEC;
        outputs = s.o, taps_h = taps_h_, taps_w = taps_w_;
        depth = s.k * s.k * s.c, down = stride * s.k * s.c, right = stride * s.c;
        w = w_, first = (i0 * s.k + j0) * s.c + mine;
        i = mine < s.c ? 0 : 1000, j = 0, o = Place::first(); // a column that is not there has no taps
        settle();
    }
    DEV_MEMBER void settle() {
#pragma unroll 1
        while (o >= outputs) {
            o -= outputs;
            if (++j == taps_w) j = 0, i++;
        }
    }
    DEV_MEMBER void copy(Shared tile) {
#pragma unroll
        for (int n = 0; n < Place::COUNT; n++) {
            copy_async<16>(tile + Place::place(n), w + (first + o * depth + i * down + j * right), i < taps_h);
            o += Place::STEP;
            settle();
        }
    }
};

// The input for the gradient of the weight: across the depth, which is the pixels of the output from `begin` to `end`;
// columns are (tap, channel).
template <int WIDTH, bool IMAGE> struct Windows {
    static constexpr bool ACROSS = true;
    static constexpr int PARTS = IMAGE ? 2 : 1;
    typedef Across<WIDTH> Place;
    const T* x;
    int h, w, c, oh, ow, stride;
    int image, row, column, left; // of the output
    int step_image, step_row, step_column;
    int down[PARTS], right[PARTS]; // from the window's corner
    int channel;

    DEV_MEMBER void start(const T* x_, const ConvSizes& s, int first, int stride_, int begin, int end) {
        x = x_, h = s.h, w = s.w, c = s.c, oh = s.oh, ow = s.ow, stride = stride_;
        const int pad = (s.k - 1) / 2, plane = oh * ow;
        const int mine = first + Place::piece() * VEC;
        channel = IMAGE ? 0 : mine % c;
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            const int tap = IMAGE ? mine / 4 + p : mine / c, i = tap / s.k;
            down[p] = i < s.k ? i - pad : NOWHERE;
            right[p] = tap - i * s.k - pad;
        }
        const int pixel = begin + Place::first();
        left = end - pixel;
        image = pixel / plane, row = (pixel - image * plane) / ow, column = pixel - image * plane - row * ow;
        step_image = Place::STEP / plane;
        const int rest = Place::STEP - step_image * plane;
        step_row = rest / ow, step_column = rest - step_row * ow;
    }
    DEV_MEMBER void copy(Shared tile) {
#pragma unroll
        for (int n = 0; n < Place::COUNT; n++) {
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                const int i = row * stride + down[p], j = column * stride + right[p];
                const bool valid = left > 0 && (u32)i < (u32)h && (u32)j < (u32)w;
                // Unsigned, so that it may wrap where nothing is read.
                const u32 pixel = ((u32)(image * h) + (u32)i) * (u32)w + (u32)j;
                copy_async<16 / PARTS>(tile + Place::place(n) + p * 8, x + ((size_t)pixel * c + channel), valid);
            }
            left -= Place::STEP;
            column += step_column;
            if (column >= ow) column -= ow, row++;
            row += step_row;
            if (row >= oh) row -= oh, image++;
            image += step_image;
        }
    }
};

// ---- product ------------------------------------------------------------------------------------------------------

// sum = A B, `steps` stages deep.
template <int HOW, int BN, class A, class B>
DEV void product(float sum[Warp<BN>::M][4][4], A& a, B& b, int steps, Shared tiles) {
    constexpr int A_BYTES = CONV_ROWS * 64, BYTES = A_BYTES + BN * 64;
    const Warp<BN> warp;
#pragma unroll
    for (int i = 0; i < Warp<BN>::M; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[i][j][e] = 0;
#pragma unroll
    for (int k = 0; k < STAGES - 1; k++) {
        if (k < steps) a.copy(tiles + k * BYTES), b.copy(tiles + k * BYTES + A_BYTES);
        copies_commit();
    }
    int now = 0;
#pragma unroll 1
    for (; steps > 0; steps--) {
        // A group for each stage, empty at the end: so all but the newest STAGES - 2 have come means that this one has.
        copies_wait<STAGES - 2>();
        // For all threads; and all are done with the stage before, whose place the copies take that begin now.
        __syncthreads();
        const int before = (now == 0 ? STAGES * BYTES : now) - BYTES;
        if (steps > STAGES - 1) a.copy(tiles + before), b.copy(tiles + before + A_BYTES);
        copies_commit();
        // The copies' counters went their own ways.
        __syncwarp();
        stage<HOW, BN, A::ACROSS, B::ACROSS>(sum, tiles + now, tiles + now + A_BYTES, warp);
        now = now == (STAGES - 1) * BYTES ? 0 : now + BYTES;
    }
    copies_wait<0>();
    __syncthreads();
}

// The first row and column of a block's result; blocks of the same rows are neighbours.
template <int BN> struct Tile {
    int row, column;
    DEV_MEMBER Tile(int columns) {
        const int block = block_again(), across = (columns + BN - 1) / BN, down = block / across;
        row = down * CONV_ROWS, column = (block - down * across) * BN;
    }
};

struct alignas(128) Line {
    uint4 pieces[8];
};
#define CONV_TILES(name, BN) __shared__ Line name[STAGES * (CONV_ROWS + BN) / 2]

struct alignas(8) Pair {
    float a, b;
};

// Stores a block's result: rows of `columns` values at `to`, where(row) being the row's number in memory; through
// `tiles`, so that neighbouring threads store neighbouring pieces.
template <int BN, class Where>
DEV void store_result(float sum[Warp<BN>::M][4][4], [[maybe_unused]] Line* tiles, T* to, int columns, int rows,
                      const Where& where) {
    const Warp<BN> warp;
    const Tile<BN> tile(columns);
    const int row = tile.row, column = tile.column;
#if ELEMENT == 0
#pragma unroll
    for (int i = 0; i < 2 * Warp<BN>::M; i++) {
        const int r = row + warp.row + i * 8 + warp.g;
        if (r >= rows) continue;
        T* at = to + (size_t)where(r) * columns;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int c = column + warp.column + j * 8 + 2 * warp.t;
            const Pair pair = {sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]};
            if (c < columns) *(Pair*)(at + c) = pair;
        }
    }
#else
    // 16 bytes more than a row needs, so that rows begin in different banks.
    constexpr int PITCH = BN / 2 + 4, PIECES = BN / 8;
    u32* values = (u32*)tiles;
#pragma unroll
    for (int i = 0; i < 2 * Warp<BN>::M; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            values[(warp.row + i * 8 + warp.g) * PITCH + (warp.column + j * 8) / 2 + warp.t] =
                narrow2(sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]);
    __syncthreads();
    const int piece = (int)threadIdx.x % PIECES, c = column + piece * 8;
    if (c >= columns) return;
#pragma unroll 2
    for (int i = (int)threadIdx.x / PIECES; i < CONV_ROWS && row + i < rows; i += THREADS / PIECES)
        *(uint4*)(to + (size_t)where(row + i) * columns + c) =
            ((const uint4*)tiles)[i * (PITCH / 4) + piece];
#endif
}

// ---- y = x * w ----------------------------------------------------------------------------------------------------

// The grid is tiles(N OH OW, 128) * tiles(O, columns of a block), 1.
template <int HOW, int BN, bool IMAGE>
DEV void forward(const T* x, const T* w, T* y, const ConvSizes& s, int stride) {
    CONV_TILES(tiles, BN);
    const Tile<BN> tile(s.o);
    const int plane = s.oh * s.ow, rows = s.n * plane, pad = (s.k - 1) / 2, depth = s.k * s.k * s.c;
    Pixels<1, IMAGE> a;
    a.start(x, s.h, s.w, s.c, s.k, s.k);
#pragma unroll
    for (int which = 0; which < 2; which++) {
        const int r = tile.row + a.tile_row(which), image = r / plane, pixel = r - image * plane;
        const int i = pixel / s.ow, j = pixel - i * s.ow;
        a.set(which, r < rows, image, i * stride - pad, j * stride - pad);
    }
    Rows<BN, IMAGE> b;
    b.start(w, tile.column, s.o, depth);
    float sum[Warp<BN>::M][4][4];
    product<HOW, BN>(sum, a, b, (depth + DEEP - 1) / DEEP, shared_at(tiles));
    store_result<BN>(sum, tiles, y, s.o, rows, [](int r) { return r; });
}

// ---- gradient of x ------------------------------------------------------------------------------------------------

// Pixels of x whose row and column leave the same rests when divided by the stride. They have the same taps, of which
// others have none; blockIdx.y is stride * (rest of the row) + rest of the column.
struct Class {
    int i, j, h, w; // rests, and how many rows and columns leave them
    DEV_MEMBER Class(const ConvSizes& s, int stride) {
        const int part = part_again();
        i = part / stride, j = part - i * stride;
        h = (s.h - i + stride - 1) / stride, w = (s.w - j + stride - 1) / stride;
    }
};

// The grid is tiles(N ceil(H / stride) ceil(W / stride), 128) * tiles(C, columns of a block), stride * stride.
template <int HOW, int BN>
DEV void input_gradient(const T* dy, const T* w, T* dx, const ConvSizes& s, int stride) {
    CONV_TILES(tiles, BN);
    Pixels<-1, false> a;
    Taps<BN> b;
    int steps;
    {
        const Class is(s, stride);
        const Tile<BN> tile(s.c);
        const int plane = is.h * is.w, rows = s.n * plane, pad = (s.k - 1) / 2;
        if (tile.row >= rows) return;
        const int i0 = (is.i + pad) % stride, j0 = (is.j + pad) % stride;
        const int taps_h = i0 < s.k ? (s.k - i0 + stride - 1) / stride : 0;
        const int taps_w = j0 < s.k ? (s.k - j0 + stride - 1) / stride : 0;
        a.start(dy, s.oh, s.ow, s.o, taps_h, taps_w);
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const int r = tile.row + a.tile_row(which), image = r / plane, pixel = r - image * plane;
            const int i = pixel / is.w, j = pixel - i * is.w;
            a.set(which, r < rows, image, i + (is.i + pad - i0) / stride, j + (is.j + pad - j0) / stride);
        }
        b.start(w, s, tile.column, i0, j0, stride, taps_h, taps_w);
        steps = (taps_h * taps_w * s.o + DEEP - 1) / DEEP;
    }
    float sum[Warp<BN>::M][4][4];
    product<HOW, BN>(sum, a, b, steps, shared_at(tiles));
    const Class is(s, stride);
    const int plane = is.h * is.w;
    store_result<BN>(sum, tiles, dx, s.c, s.n * plane, [&](int r) {
        if (stride == 1) return r;
        const int image = r / plane, pixel = r - image * plane, i = pixel / is.w, j = pixel - i * is.w;
        return (image * s.h + is.i + stride * i) * s.w + is.j + stride * j;
    });
}

// ---- gradient of w ------------------------------------------------------------------------------------------------

// partials[blockIdx.y][o][tap][channel], 4 parts O K K C bytes: sums over one of gridDim.y parts of the pixels of y.
// conv_sum makes dw of them. The rows of the result are outputs and its columns (tap, channel), or the other way round if
// TURNED, for few outputs. The grid is tiles(rows, 128) * tiles(columns, columns of a block), parts.
template <int HOW, int BN, bool TURNED, bool IMAGE>
DEV void weight_gradient(const T* x, const T* dy, float* partials, const ConvSizes& s, int stride) {
    CONV_TILES(tiles, BN);
    const int depth = s.k * s.k * s.c, rows = TURNED ? depth : s.o, columns = TURNED ? s.o : depth;
    const Tile<BN> tile(columns);
    const int pixels = s.n * s.oh * s.ow;
    // Whole stages for each part.
    const int part = ((pixels + DEEP - 1) / DEEP + (int)gridDim.y - 1) / (int)gridDim.y * DEEP;
    const long long first = (long long)blockIdx.y * part;
    const int begin = first < pixels ? (int)first : pixels, end = pixels - begin < part ? pixels : begin + part;
    const int steps = (end - begin + DEEP - 1) / DEEP;
    float sum[Warp<BN>::M][4][4];
    if (TURNED) {
        Windows<CONV_ROWS, IMAGE> a;
        a.start(x, s, tile.row, stride, begin, end);
        Columns<BN> b;
        b.start(dy, tile.column, s.o, begin, end);
        product<HOW, BN>(sum, a, b, steps, shared_at(tiles));
    } else {
        Columns<CONV_ROWS> a;
        a.start(dy, tile.row, s.o, begin, end);
        Windows<BN, IMAGE> b;
        b.start(x, s, tile.column, stride, begin, end);
        product<HOW, BN>(sum, a, b, steps, shared_at(tiles));
    }
    const Warp<BN> warp;
    const Tile<BN> at(columns);
    float* to = partials + (size_t)part_again() * s.o * depth;
#pragma unroll
    for (int i = 0; i < 2 * Warp<BN>::M; i++) {
        const int r = at.row + warp.row + i * 8 + warp.g;
        if (r >= rows) continue;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int c = at.column + warp.column + j * 8 + 2 * warp.t;
            const Pair pair = {sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]};
            if (c >= columns) continue;
            if (TURNED) {
                to[(size_t)c * depth + r] = pair.a;
                to[(size_t)(c + 1) * depth + r] = pair.b;
            } else {
                *(Pair*)(to + (size_t)r * depth + c) = pair;
            }
        }
    }
}

// dw = the sum of `parts` partials, in their order; `count` = O K K C values, one thread for four: the grid is
// tiles(count, 1024).
KERNEL(conv_sum)(const float* partials, T* dw, u32 count, int parts) {
    const u32 i = (blockIdx.x * THREADS + threadIdx.x) * 4;
    if (i >= count) return;
    float sum[4] = {};
#pragma unroll 4
    for (int part = 0; part < parts; part++) {
        const float4 v = *(const float4*)(partials + (size_t)part * count + i);
        sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
    store4(dw + i, sum);
}

// The same for many parts, which 8 warps share; a block for 128 values: the grid is tiles(count, 128).
KERNEL(conv_sum_many)(const float* partials, T* dw, u32 count, int parts) {
    __shared__ float4 sums[THREADS];
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const u32 i = (blockIdx.x * 32 + (u32)lane) * 4;
    float4 sum = {0, 0, 0, 0};
    if (i < count) {
#pragma unroll 4
        for (int part = warp; part < parts; part += 8) {
            const float4 v = *(const float4*)(partials + (size_t)part * count + i);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp > 0 || i >= count) return;
    float all[4] = {};
    for (int w = 0; w < 8; w++) {
        const float4 v = sums[w * 32 + lane];
        all[0] += v.x, all[1] += v.y, all[2] += v.z, all[3] += v.w;
    }
    store4(dw + i, all);
}

// ---- kernels ------------------------------------------------------------------------------------------------------

// 128 and 64 are the columns of a block; turned and image have 64. The image of 4 channels needs kernels of its own only
// where these are of 16 bits.

#define CONV_FORWARD(name, HOW, BN, IMAGE)                                                                            \
    KERNEL2(name)(const T* x, const T* w, T* y, ConvSizes s, int stride) { forward<HOW, BN, IMAGE>(x, w, y, s, stride); }
#define CONV_INPUT(name, HOW, BN)                                                                                     \
    KERNEL2(name)(const T* dy, const T* w, T* dx, ConvSizes s, int stride) {                                          \
        input_gradient<HOW, BN>(dy, w, dx, s, stride);                                                                \
    }
#define CONV_WEIGHT(name, HOW, BN, TURNED, IMAGE)                                                                     \
    KERNEL2(name)(const T* x, const T* dy, float* partials, ConvSizes s, int stride) {                                \
        weight_gradient<HOW, BN, TURNED, IMAGE>(x, dy, partials, s, stride);                                          \
    }

#if ELEMENT == 0
CONV_FORWARD(conv_forward_128, EXACT, 128, false)
CONV_FORWARD(conv_forward_64, EXACT, 64, false)
CONV_INPUT(conv_input_128, EXACT, 128)
CONV_INPUT(conv_input_64, EXACT, 64)
CONV_WEIGHT(conv_weight_128, EXACT, 128, false, false)
CONV_WEIGHT(conv_weight_64, EXACT, 64, false, false)
CONV_WEIGHT(conv_weight_turned, EXACT, 64, true, false)
CONV_FORWARD(conv_forward_128_tf32, TENSOR, 128, false)
CONV_FORWARD(conv_forward_64_tf32, TENSOR, 64, false)
CONV_INPUT(conv_input_128_tf32, TENSOR, 128)
CONV_INPUT(conv_input_64_tf32, TENSOR, 64)
CONV_WEIGHT(conv_weight_128_tf32, TENSOR, 128, false, false)
CONV_WEIGHT(conv_weight_64_tf32, TENSOR, 64, false, false)
CONV_WEIGHT(conv_weight_turned_tf32, TENSOR, 64, true, false)
#else
CONV_FORWARD(conv_forward_128, TENSOR, 128, false)
CONV_FORWARD(conv_forward_64, TENSOR, 64, false)
CONV_FORWARD(conv_forward_image, TENSOR, 64, true)
CONV_INPUT(conv_input_128, TENSOR, 128)
CONV_INPUT(conv_input_64, TENSOR, 64)
CONV_WEIGHT(conv_weight_128, TENSOR, 128, false, false)
CONV_WEIGHT(conv_weight_64, TENSOR, 64, false, false)
CONV_WEIGHT(conv_weight_turned, TENSOR, 64, true, false)
CONV_WEIGHT(conv_weight_image, TENSOR, 64, true, true)
#endif
