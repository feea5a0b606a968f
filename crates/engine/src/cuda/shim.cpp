// Compiled with -DELEMENT=0, 1 or 2: the kernels behind one function with C's calling convention.
#include "shim.h"
#include "shim_warp.h"

#include "kernels.cu"

#include "branches.cu"

#include "conv.cu"

// The roundings of the 16-bit formats, 1 bf16 and 2 f16.
extern "C" float shim_wide_value(int element, uint16_t bits) { return shim_wide(element, bits); }
extern "C" uint16_t shim_narrow_value(int element, float v) { return shim_narrow(element, v); }

// Runs a kernel as cuLaunchKernel would; 0 if there is one of that name.
extern "C" int shim_launch(const char* name, unsigned x, unsigned y, void** args) {
#define ONE(kernel)                                                                                                   \
    if (!strcmp(name, #kernel)) {                                                                                     \
        shim_run(kernel, x, y, THREADS, args);                                                                        \
        return 0;                                                                                                     \
    }
    ONE(input_u8)
    ONE(input_f32)
    ONE(stats)
    ONE(stats_finish)
    ONE(running_update)
    ONE(apply)
    ONE(apply_add)
    ONE(apply_add_normed)
    ONE(close_lazy)
    ONE(close_lazy_pool)
    ONE(close_0)
    ONE(close_1)
    ONE(close_2)
    ONE(close_0_spread)
    ONE(close_1_spread)
    ONE(close_2_spread)
    ONE(close_finish)
    ONE(norm_backward)
    ONE(max_pool)
    ONE(avg_pool)
    ONE(matmul)
    ONE(column_sums)
    ONE(loss)
    ONE(loss_finish)
    ONE(accumulate)
    ONE(check)
    ONE(rescale)
    ONE(update)
    ONE(cast)
    ONE(widen_gradients)
    ONE(fold)
    ONE(fill)
    ONE(compare)
    ONE(plane_means)
    ONE(gated_sums)
    ONE(squeeze_relu)
    ONE(gate)
    ONE(gated_sum)
    ONE(excite_backward)
    ONE(squeeze_relu_backward)
    ONE(gate_close)
    ONE(gated_gradient)
    ONE(draw_squares)
    ONE(squares_scale)
    ONE(dropped_sum)
    ONE(half_pool)
    ONE(close_0_rest)
    ONE(close_0_half)
    ONE(close_1_rest)
    ONE(close_1_half)
    ONE(close_2_rest)
    ONE(close_2_half)
    ONE(sum_ranks)
    ONE(sum_ranks_f64)
    ONE(conv_forward_128)
    ONE(conv_forward_64)
    ONE(conv_input_128)
    ONE(conv_input_64)
    ONE(conv_weight_128)
    ONE(conv_weight_64)
    ONE(conv_weight_turned)
#if ELEMENT == 0
    ONE(conv_forward_128_tf32)
    ONE(conv_forward_64_tf32)
    ONE(conv_input_128_tf32)
    ONE(conv_input_64_tf32)
    ONE(conv_weight_128_tf32)
    ONE(conv_weight_64_tf32)
    ONE(conv_weight_turned_tf32)
#else
    ONE(conv_forward_image)
    ONE(conv_weight_image)
#endif
    ONE(conv_sum)
    ONE(conv_sum_many)
    ONE(swap)
    ONE(rates)
    ONE(norms)
    ONE(squares)
    ONE(drop)
    return 1;
}
