"""Families of operators, by the names that torch's dispatcher gives them."""

from __future__ import annotations

UNARY = frozenset(
    "relu relu6 hardtanh leaky_relu elu selu celu silu gelu mish softplus softsign sigmoid tanh hardswish hardsigmoid "
    "log_sigmoid log_sigmoid_forward hardshrink softshrink threshold dropout native_dropout clone contiguous detach "
    "alias lift_fresh lift_fresh_copy _to_copy neg abs exp exp2 log log1p expm1 sqrt rsqrt reciprocal square sign sgn "
    "round floor ceil trunc clamp clamp_min clamp_max nan_to_num bernoulli erf sin cos isnan isinf logical_not "
    "bitwise_not masked_fill zeros_like ones_like full_like empty_like rand_like randn_like".split()
)
MULTIPLICATIVE = frozenset("mul div".split())
ELEMENTWISE = MULTIPLICATIVE | frozenset(
    "add sub pow maximum minimum where lerp addcmul addcdiv rsub eq ne lt le gt ge copy atan2 fmod remainder "
    "logical_and logical_or bitwise_and bitwise_or".split()
)
SUMS = frozenset("sum linalg_vector_norm".split())
STATISTICS = frozenset("mean var std var_mean std_mean".split())
FRESH = frozenset("new_zeros new_ones new_full new_empty".split())
"""Constants that take only their type from a tensor."""
REDUCTIONS = SUMS | STATISTICS | frozenset("amax amin max min logsumexp prod all any argmax argmin".split())
MOVEMENT = frozenset(
    "view _unsafe_view _reshape_alias reshape permute transpose t flatten unflatten squeeze unsqueeze expand slice "
    "select split split_with_sizes chunk unbind stack channel_shuffle native_channel_shuffle roll flip narrow repeat "
    "index_select unfold index numpy_T mT diagonal repeat_interleave".split()
)
SPATIAL = frozenset(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d max_pool2d_with_indices max_pool3d_with_indices upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
    "grid_sampler_2d".split()
)
LAYERS = frozenset(["convolution"])
"""Operators whose first argument may be a constant: their rules make the channels of it."""
