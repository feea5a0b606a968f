// What branches of blocks may have besides convolutions: factors of their channels (squeeze and excitation, branches that
// are dropped), squares that are dropped, and means in their shortcuts. Continues kernels.cu.

// A generator of what is dropped of one block in one step, and how much: the chance of an image's branch, or the logarithm
// of the chance that no square begins at a place.
struct Draw {
    u64 key;
    double value;
};

// What dropping leaves of an image's branch.
DEV float path_factor(const Draw* path, const Hyper* hyper, int image) {
    if (!path || !(path->value > 0)) return 1.0f;
    return drop_factor(path->key, (u64)hyper->first_image + image, path->value);
}

// ---- sums over planes ---------------------------------------------------------------------------------------------

// A block has the plane of one image, and goes over its pixels as others go over rows.
DEV Place image_place(int channels) {
    Place p = place(channels);
    p.row = p.lane;
    p.step = p.lanes;
    return p;
}

// Means of x, or of x * scale + shift, over the plane of each image; a block an image.
KERNEL(plane_means)(const T* x, const float* scale, const float* shift, float* means, int pixels, int channels) {
    const Place p = image_place(channels);
    float sum[8] = {};
    if (p.works) {
        const T* from = x + (size_t)blockIdx.x * pixels * channels + p.c;
        auto add = [&](Raw raw) {
            float v[8];
            widen(raw, v);
#pragma unroll
            for (int i = 0; i < 8; i++) sum[i] += v[i];
        };
        const size_t step = (size_t)p.step * channels;
        int row = p.row;
        for (; row + 3 * p.step < pixels; row += 4 * p.step) {
            const T* at = from + (size_t)row * channels;
            const Raw a = load(at), b = load(at + step), c = load(at + 2 * step), d = load(at + 3 * step);
            add(a), add(b), add(c), add(d);
        }
        for (; row < pixels; row += p.step) add(load(from + (size_t)row * channels));
    }
    leave(sum, p, means, 0, 1, channels);
    // Each thread goes on with the channels that it has left. The mean of x * scale + shift is that of x, so.
    float* mine = means + (size_t)blockIdx.x * channels;
    for (int c = (int)threadIdx.x; c < channels; c += THREADS) {
        const float mean = mine[c] * (1.0f / pixels);
        mine[c] = scale ? mean * scale[c] + shift[c] : mean;
    }
}

// Sums of g, of g (z - mean) and of z - mean over the plane of each image: three arrays of images x channels.
KERNEL2(gated_sums)
(const T* g, const T* z, const float* state, float* sums, int pixels, int channels) {
    const Place p = image_place(channels);
    float sum[8] = {}, dot[8] = {}, rest[8] = {};
    if (p.works) {
        float mean[8];
        load_f32(state + MEAN * channels + p.c, mean);
        const size_t first = (size_t)blockIdx.x * pixels * channels + p.c;
        auto add = [&](Raw raw_g, Raw raw_z) {
            float d[8], v[8];
            widen(raw_g, d);
            widen(raw_z, v);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const float away = v[k] - mean[k];
                sum[k] += d[k], dot[k] += d[k] * away, rest[k] += away;
            }
        };
        int row = p.row;
        for (; row + p.step < pixels; row += 2 * p.step) {
            const size_t i = first + (size_t)row * channels, j = i + (size_t)p.step * channels;
            const Raw a = load(g + i), b = load(z + i), c = load(g + j), d = load(z + j);
            add(a, b), add(c, d);
        }
        if (row < pixels) {
            const size_t i = first + (size_t)row * channels;
            add(load(g + i), load(z + i));
        }
    }
    const size_t all = (size_t)gridDim.x * channels;
    leave(sum, p, sums, 0, 1, channels);
    leave(dot, p, sums + all, 0, 1, channels);
    leave(rest, p, sums + 2 * all, 0, 1, channels);
}

// ---- factors of channels ------------------------------------------------------------------------------------------

// Channels behind the ReLU of squeeze and excitation, and behind its sigmoid.
KERNEL(squeeze_relu)(float* v, int count) {
    const int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (i < count && v[i] < 0) v[i] = 0;
}

// gate = sigmoid(v), if there is v, times what is left of the image's branch; v becomes the sigmoid.
KERNEL(gate)(float* v, const Draw* path, const Hyper* hyper, float* gate, int count, int channels) {
    const int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (i >= count) return;
    float factor = path_factor(path, hyper, i / channels);
    if (v) {
        const float s = 1.0f / (1.0f + expf(-v[i]));
        v[i] = s;
        factor *= s;
    }
    gate[i] = factor;
}

// y = relu?(x * gate + side), x being z * scale + shift if `scale`, and side the same of its own.
KERNEL2(gated_sum)
(const T* z, const float* scale, const float* shift, const float* gate, const T* side, const float* side_scale,
 const float* side_shift, int side_relu, int relu, T* y, int pixels, int rows, int channels) {
    const Place p = place(channels);
    if (!p.works) return;
    float a[8], b[8] = {}, side_a[8], side_b[8];
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] = 1;
    if (scale) load_f32(scale + p.c, a), load_f32(shift + p.c, b);
    if (side_scale) load_f32(side_scale + p.c, side_a), load_f32(side_shift + p.c, side_b);
    for (int row = p.row; row < rows; row += p.step) {
        const size_t i = at(row, channels, p.c);
        float v[8], w[8], k[8];
        const Raw raw = load(z + i), other = load((side ? side : z) + i);
        load_f32(gate + (size_t)(row / pixels) * channels + p.c, k);
        widen(raw, v);
        affine(v, a, b);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] *= k[j];
        if (side) {
            widen(other, w);
            if (side_scale) {
                affine(w, side_a, side_b);
                if (side_relu) relu8(w);
            }
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] += w[j];
        }
        if (relu) relu8(v);
        store(y + i, v);
    }
}

// The gradient of what the sigmoid reads, from the sums of the planes: that of the gate is the sum of g times the
// normalisation's value.
KERNEL(excite_backward)
(const float* sums, const float* state, const float* beta, const float* sigmoid, const Draw* path,
 const Hyper* hyper, float* d, int count, int channels) {
    const int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (i >= count) return;
    const int c = i % channels;
    const float by_gate = state[SCALE * channels + c] * sums[(size_t)count + i] + beta[c] * sums[i];
    d[i] = path_factor(path, hyper, i / channels) * by_gate * sigmoid[i] * (1.0f - sigmoid[i]);
}

// The gradient of the hidden channels under their ReLU.
KERNEL(squeeze_relu_backward)(float* d, const float* v, int count) {
    const int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    if (i < count && v[i] <= 0) d[i] = 0;
}

// From the sums over planes to the normalisation's gradients and the constants of dz, but for what differs by image.
// `d_mean` is the gradient of the means over planes, if there is squeeze and excitation. Eight channels a block, whose 32
// lanes share the images.
KERNEL(gate_close)
(const float* sums, const float* gate, const float* d_mean, float* state, float* d_gamma, float* d_beta, int images,
 int pixels, int channels) {
    __shared__ double shared[2][THREADS];
    const int t = (int)threadIdx.x, lane = t / 8, c = (int)blockIdx.x * 8 + (t & 7), count = images * channels;
    const float *g = sums, *gz = sums + count, *z = sums + 2 * (size_t)count;
    const double share = 1.0 / pixels;
    double sum = 0, dot = 0;
    if (c < channels)
        for (int image = lane; image < images; image += 32) {
            const int i = image * channels + c;
            const double k = gate[i], dm = d_mean ? d_mean[i] : 0.0f;
            sum += k * g[i] + dm;
            dot += k * gz[i] + dm * share * z[i];
        }
    shared[0][t] = sum, shared[1][t] = dot;
    __syncthreads();
    for (int half = 16; half > 0; half /= 2) {
        if (lane < half)
            for (int k = 0; k < 2; k++) shared[k][t] += shared[k][t + half * 8];
        __syncthreads();
    }
    if (lane > 0 || c >= channels) return;
    norm_gradient(shared[0][t], shared[1][t], (double)images * pixels, state, c, channels, d_gamma, d_beta);
}

// dz = a (k g + dm) + b (z - mean) + c: k is the gate of the image, dm each pixel's share of the gradient of the mean over
// its plane.
KERNEL2(gated_gradient)
(const T* g, const T* z, const float* state, const float* gate, const float* d_mean, T* dz, int pixels, int rows,
 int channels) {
    const Place p = place(channels);
    if (!p.works) return;
    float mean[8], a[8], b[8], c[8];
    load_f32(state + MEAN * channels + p.c, mean);
    load_f32(state + GRAD_A * channels + p.c, a);
    load_f32(state + GRAD_B * channels + p.c, b);
    load_f32(state + GRAD_C * channels + p.c, c);
    const float share = 1.0f / pixels;
    for (int row = p.row; row < rows; row += p.step) {
        const size_t i = at(row, channels, p.c), image = (size_t)(row / pixels) * channels + p.c;
        float d[8], v[8], k[8], dm[8] = {};
        const Raw raw = load(g + i), other = load(z + i);
        load_f32(gate + image, k);
        if (d_mean) load_f32(d_mean + image, dm);
        widen(raw, d);
        widen(other, v);
#pragma unroll
        for (int j = 0; j < 8; j++) d[j] = a[j] * (k[j] * d[j] + dm[j] * share) + (b[j] * (v[j] - mean[j]) + c[j]);
        store(dz + i, d);
    }
}

// ---- squares ------------------------------------------------------------------------------------------------------

// Sizes of planes of which squares of `rows` by `columns` are dropped.
struct Squares {
    int h, w, c, rows, columns;
};

// Sets mask[image] to 0 where squares lie and to 1 elsewhere, and counts the ones. Places without a square before the
// next are geometrically distributed, so only squares are drawn, THREADS at a time; a block an image.
KERNEL(draw_squares)(const Draw* draw, const Hyper* hyper, Squares s, u8* mask, u32* kept) {
    __shared__ u64 ends[THREADS];
    const int t = (int)threadIdx.x, size = s.h * s.w * s.c, across = s.w - s.columns + 1;
    const u64 places = (u64)(s.h - s.rows + 1) * across * s.c;
    u8* mine = mask + (size_t)blockIdx.x * size;
    // Channels come in eights, and so do the places of an image.
    const uint2 ones = {0x01010101u, 0x01010101u};
    for (int i = t; i < size / 8; i += THREADS) ((uint2*)mine)[i] = ones;
    __syncthreads();
    const u64 first = ((u64)hyper->first_image + blockIdx.x) << 32;
    u64 done = 0;
    for (u64 round = 0; draw->value < 0 && done < places; round += THREADS) {
        const double gap = floor(log(uniform(draw->key, first + round + t)) / draw->value);
        // One that leads out of the plane is as good as any other that does.
        ends[t] = gap < (double)places ? (u64)gap + 1 : places + 1;
        __syncthreads();
        for (int by = 1; by < THREADS; by *= 2) {
            const u64 before = t >= by ? ends[t - by] : 0;
            __syncthreads();
            ends[t] += before;
            __syncthreads();
        }
        const u64 end = done + ends[t];
        if (end <= places) {
            const int place = (int)(end - 1), pixel = place / s.c, channel = place % s.c;
            const int y = pixel / across, x = pixel % across;
            for (int i = 0; i < s.rows; i++)
                for (int j = 0; j < s.columns; j++) mine[((y + i) * s.w + x + j) * s.c + channel] = 0;
        }
        done += ends[THREADS - 1];
        __syncthreads();
    }
    __syncthreads();
    u32 count = 0;
    for (int i = t; i < size / 8; i += THREADS) {
        const uint2 v = ((const uint2*)mine)[i];
        count += __popc(v.x) + __popc(v.y);
    }
    ends[t] = count;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (t < half) ends[t] += ends[t + half];
        __syncthreads();
    }
    if (t == 0) kept[blockIdx.x] = (u32)ends[0];
}

// By what the rest of all images is multiplied, so that the sum stays as large. One block.
KERNEL(squares_scale)(const u32* kept, int images, double all, float* scale) {
    __shared__ u64 sums[THREADS];
    const int t = (int)threadIdx.x;
    u64 sum = 0;
    for (int i = t; i < images; i += THREADS) sum += kept[i];
    sums[t] = sum;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (t < half) sums[t] += sums[t + half];
        __syncthreads();
    }
    if (t == 0) *scale = sums[0] > 0 ? (float)(all / (double)sums[0]) : 0.0f;
}

// What is left of eight channels of a row.
DEV void leave_rest(float v[8], const u8* mask, float scale) {
    const uint2 kept = *(const uint2*)mask;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[i] *= (kept.x >> (8 * i) & 255) ? scale : 0.0f;
        v[4 + i] *= (kept.y >> (8 * i) & 255) ? scale : 0.0f;
    }
}

// Two summands' masks; null where nothing is dropped.
struct Masks {
    const u8* mask;
    const float* scale;
    const u8* side_mask;
    const float* side_scale;
};

// y = relu?(x + side) of what is left of both, x being z * scale + shift, and side the same of its own or as stored.
KERNEL2(dropped_sum)
(const T* z, const float* scale, const float* shift, const T* side, const float* side_scale, const float* side_shift,
 int side_relu, Masks masks, int relu, T* y, int rows, int channels) {
    const Place p = place(channels);
    if (!p.works) return;
    float a[8], b[8], side_a[8], side_b[8];
    load_f32(scale + p.c, a), load_f32(shift + p.c, b);
    if (side_scale) load_f32(side_scale + p.c, side_a), load_f32(side_shift + p.c, side_b);
    const float left = masks.mask ? *masks.scale : 1.0f, side_left = masks.side_mask ? *masks.side_scale : 1.0f;
    for (int row = p.row; row < rows; row += p.step) {
        const size_t i = at(row, channels, p.c);
        float v[8], w[8];
        const Raw raw = load(z + i), other = load((side ? side : z) + i);
        widen(raw, v);
        affine(v, a, b);
        if (masks.mask) leave_rest(v, masks.mask + i, left);
        if (side) {
            widen(other, w);
            if (side_scale) {
                affine(w, side_a, side_b);
                if (side_relu) relu8(w);
            }
            if (masks.side_mask) leave_rest(w, masks.side_mask + i, side_left);
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] += w[j];
        }
        if (relu) relu8(v);
        store(y + i, v);
    }
}

// The gradient of what is left.
struct Rest {
    const T* d;
    const u8* mask;
    const float* scale;
    DEV_MEMBER void get(int row, int channels, int c, float v[8]) const {
        const size_t i = at(row, channels, c);
        widen(load(d + i), v);
        leave_rest(v, mask + i, *scale);
        round8(v);
    }
};

// ---- means of 2 by 2 ----------------------------------------------------------------------------------------------

// Sizes of a plane and of its means; at the end of an odd side they are of what there is.
struct Halves {
    int h, w, out_h, out_w;
};

DEV float half_share(const Halves& s, int oh, int ow) {
    const int rows = 2 * oh + 1 < s.h ? 2 : 1, columns = 2 * ow + 1 < s.w ? 2 : 1;
    return 1.0f / (rows * columns);
}

KERNEL(half_pool)(const T* x, Halves s, T* y, int rows, int channels) {
    const Place p = place(channels);
    if (!p.works) return;
    for (int row = p.row; row < rows; row += p.step) {
        const int image = row / (s.out_h * s.out_w), pixel = row - image * (s.out_h * s.out_w);
        const int oh = pixel / s.out_w, ow = pixel - oh * s.out_w;
        float sum[8] = {};
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 2; j++) {
                const int h = 2 * oh + i, w = 2 * ow + j;
                if (h >= s.h || w >= s.w) continue;
                float v[8];
                widen(load(x + at((image * s.h + h) * s.w + w, channels, p.c)), v);
#pragma unroll
                for (int k = 0; k < 8; k++) sum[k] += v[k];
            }
        const float share = half_share(s, oh, ow);
#pragma unroll
        for (int k = 0; k < 8; k++) sum[k] *= share;
        store(y + at(row, channels, p.c), sum);
    }
}

// Each pixel's share of the gradient of its window's mean.
struct Halved {
    const T* d;
    Halves s;
    DEV_MEMBER void get(int row, int channels, int c, float v[8]) const {
        const int image = row / (s.h * s.w), pixel = row - image * (s.h * s.w);
        const int h = pixel / s.w, w = pixel - h * s.w, oh = h / 2, ow = w / 2;
        widen(load(d + at((image * s.out_h + oh) * s.out_w + ow, channels, c)), v);
        const float share = half_share(s, oh, ow);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] *= share;
        round8(v);
    }
};

#define CLOSE_BRANCH(name, norms)                                                                                     \
    KERNEL2(name##_rest)                                                                                              \
    (const T* d, const u8* mask, const float* scale, const T* more, const T* y, const T* z0, const float* mean0,      \
     const T* z1, const float* mean1, T* dx, float* partials, int rows, int channels) {                               \
        const Rest source = {d, mask, scale};                                                                         \
        close_rows<norms>(source, more, y, z0, mean0, z1, mean1, dx, partials, rows, channels);                       \
    }                                                                                                                 \
    KERNEL2(name##_half)                                                                                              \
    (const T* d, Halves s, const T* more, const T* y, const T* z0, const float* mean0, const T* z1,                   \
     const float* mean1, T* dx, float* partials, int rows, int channels) {                                            \
        const Halved source = {d, s};                                                                                 \
        close_rows<norms>(source, more, y, z0, mean0, z1, mean1, dx, partials, rows, channels);                       \
    }
CLOSE_BRANCH(close_0, 0)
CLOSE_BRANCH(close_1, 1)
CLOSE_BRANCH(close_2, 2)
