// What a warp does together, and copies that go on while a thread works on; after shim.h. For tests.
//
// Tensors in shared memory are named by address. A copy that has begun leaves NaN in its place, and its values come when
// the thread waits for it: so a missing wait shows, and so does a stage that is overwritten while it is read.

#include <cstdio>

typedef char* Shared;

// The lanes of a warp come together.
static void __syncwarp() { hand_over(); }

// ---- cp.async -----------------------------------------------------------------------------------------------------

struct ShimCopy {
    char* to;
    const void* from; // none: zeros
    unsigned bytes;
};
// Of each thread: groups, the oldest first, and what belongs to no group yet.
struct ShimCopies {
    std::vector<std::vector<ShimCopy>> groups;
    std::vector<ShimCopy> open;
};
static ShimCopies shim_copies[1024];

static void shim_copy(char* to, const void* from, unsigned bytes, bool valid) {
    if ((uintptr_t)to % bytes || (valid && (uintptr_t)from % bytes)) {
        fprintf(stderr, "a copy of %u bytes to %p from %p\n", bytes, (void*)to, from);
        abort();
    }
    memset(to, 0xff, bytes);
    shim_copies[running].open.push_back({to, valid ? from : nullptr, bytes});
}

static void shim_commit() {
    ShimCopies& c = shim_copies[running];
    c.groups.push_back(std::move(c.open));
    c.open.clear();
}

// Until at most `left` groups are under way.
static void shim_wait(unsigned left) {
    auto& groups = shim_copies[running].groups;
    if (groups.size() <= left) return;
    const size_t done = groups.size() - left;
    for (size_t i = 0; i < done; i++)
        for (const ShimCopy& copy : groups[i]) {
            if (copy.from) memcpy(copy.to, copy.from, copy.bytes);
            else memset(copy.to, 0, copy.bytes);
        }
    groups.erase(groups.begin(), groups.begin() + (std::ptrdiff_t)done);
}

// ---- ldmatrix -----------------------------------------------------------------------------------------------------

// What lanes leave for each other. Two of each: a lane that is ahead writes into the other one.
static const char* shim_rows[32][2][32];
static unsigned shim_turn[1024];

// Four matrices of 8 by 8 values of 16 bits; lane l names row l % 8 of matrix l / 8.
static void shim_ldmatrix(bool is_trans, const char* row, uint32_t r[4]) {
    const unsigned lane = running % 32, turn = shim_turn[running]++ & 1;
    const char** rows = shim_rows[running / 32][turn];
    if ((uintptr_t)row % 16) {
        fprintf(stderr, "ldmatrix at %p\n", (const void*)row);
        abort();
    }
    rows[lane] = row;
    __syncwarp();
    for (unsigned i = 0; i < 4; i++) {
        if (!is_trans) {
            memcpy(&r[i], rows[i * 8 + lane / 4] + lane % 4 * 4, 4);
        } else {
            uint16_t pair[2];
            for (unsigned j = 0; j < 2; j++) memcpy(&pair[j], rows[i * 8 + lane % 4 * 2 + j] + lane / 4 * 2, 2);
            r[i] = (uint32_t)pair[1] << 16 | pair[0];
        }
    }
}

// ---- mma ----------------------------------------------------------------------------------------------------------

// To 10 bits of mantissa, ties away from zero.
static uint32_t shim_tf32(uint32_t bits) {
    if ((bits >> 23 & 255) == 255) return bits;
    return (bits + 0x1000) & 0xffffe000u;
}

// What the lanes' registers hold of a warp's operands: a by row and k, b by column and k.
struct ShimTiles {
    float a[64][16], b[64][16];
};
static ShimTiles shim_tiles[32][2];

// sum += a b for `m` tiles of 16 rows and `n` of 8 columns: mma.m16n8k16 of 16-bit values, mma.m16n8k8 of tf32 if
// ELEMENT is 0.
template <int M, int N>
static void shim_mma(float sum[M][N][4], const uint32_t a[M][4], const uint32_t b[N][2]) {
    static_assert(M <= 4 && N <= 8, "a warp's tiles");
    const unsigned lane = running % 32, g = lane / 4, t = lane % 4, turn = shim_turn[running]++ & 1;
    ShimTiles& tiles = shim_tiles[running / 32][turn];
    auto leave = [&](float* row, unsigned half, uint32_t bits) {
#if ELEMENT == 0
        // The tensor cores would leave the lower bits out; they are to be rounded before.
        if ((bits & 0x1fff) && (bits >> 23 & 255) != 255) {
            fprintf(stderr, "mma of what is no tf32: %08x\n", bits);
            abort();
        }
        row[half * 4 + t] = shim_float(bits);
#else
        row[half * 8 + 2 * t] = shim_wide(ELEMENT, (uint16_t)bits);
        row[half * 8 + 2 * t + 1] = shim_wide(ELEMENT, (uint16_t)(bits >> 16));
#endif
    };
    for (unsigned i = 0; i < M; i++)
        for (unsigned j = 0; j < 4; j++) leave(tiles.a[i * 16 + g + j % 2 * 8], j / 2, a[i][j]);
    for (unsigned i = 0; i < N; i++)
        for (unsigned j = 0; j < 2; j++) leave(tiles.b[i * 8 + g], j, b[i][j]);
    __syncwarp();
    const unsigned depth = ELEMENT == 0 ? 8 : 16;
    for (unsigned i = 0; i < M; i++)
        for (unsigned j = 0; j < N; j++)
            for (unsigned e = 0; e < 4; e++) {
                const float* x = tiles.a[i * 16 + g + e / 2 * 8];
                const float* y = tiles.b[j * 8 + 2 * t + e % 2];
                float s = sum[i][j][e];
                for (unsigned k = 0; k < depth; k++) s += x[k] * y[k];
                sum[i][j][e] = s;
            }
}
