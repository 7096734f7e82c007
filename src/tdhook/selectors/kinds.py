"""Kinds of operations, by name."""

from __future__ import annotations

__all__ = [
    "AFFINE",
    "ELEMENTWISE",
    "FUSED",
    "HOMOGENEOUS",
    "INDEXED",
    "MATRIX_PRODUCTS",
    "MOVES",
    "NORMS",
    "PRODUCTS",
    "RECURRENT",
    "TAYLOR",
    "WINNER",
]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVES = _names(
    """
    H T adjoint alias as_strided as_tensor asarray atleast_1d atleast_2d atleast_3d bfloat16 block_diag
    broadcast_tensors broadcast_to cartesian_prod cat cdouble cfloat channel_shuffle chunk clone
    column_stack combinations complex contiguous copy cpu cuda dequantize detach diag diag_embed diagflat
    diagonal diagonal_scatter double dsplit dstack embedding expand expand_as fft_fftshift
    fft_ifftshift fill fill_diagonal flatten flip fliplr flipud float gather getitem half hsplit
    hstack im2col imag index index_copy index_fill index_put index_select mH mT
    masked_fill masked_scatter masked_select max_unpool1d max_unpool2d max_unpool3d meshgrid
    movedim nan_to_num narrow native_channel_shuffle one_hot pack_padded_sequence pad pad_packed_sequence
    pad_sequence permute pixel_shuffle pixel_unshuffle positive put ravel real repeat repeat_interleave
    requires_grad reshape reshape_as resolve_conj resolve_neg roll rot90 row_stack scatter select select_scatter
    setitem slice slice_scatter split split_with_sizes squeeze stack swapaxes t take take_along_dim tensor_split
    tile to transpose tril triu type type_as unbind unflatten unfold unsafe_chunk unsafe_split
    unsafe_split_with_sizes unsqueeze upsample_nearest upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_nearest_exact1d upsample_nearest_exact2d upsample_nearest_exact3d view view_as view_as_complex
    view_as_real vsplit vstack where zero
    """
)
INDEXED = _names(
    """
    embedding gather getitem index index_copy index_fill index_put index_select masked_fill masked_scatter
    masked_select max_unpool1d max_unpool2d max_unpool3d put repeat_interleave scatter select_scatter
    setitem slice_scatter take take_along_dim where
    """
)
WINNER = _names(
    """
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax amin aminmax cummax cummin fmax fmin
    fractional_max_pool2d fractional_max_pool3d kthvalue max max_pool1d max_pool2d max_pool3d maximum median min
    minimum mode msort nanmedian sort topk
    """
)
ELEMENTWISE = _names(
    """
    abs acos acosh asin asinh atan atanh ceil celu clamp clamp_max clamp_min cos cosh digamma elu erf erfc
    erfinv exp exp2 expm1 fix float_power floor floor_divide fmod frac gelu hardshrink hardsigmoid hardswish
    hardtanh i0 leaky_relu lgamma log log10 log1p log2 logit logsigmoid mish pow prelu rdiv
    reciprocal relu relu6 remainder round rpow rrelu rsqrt selu sgn sigmoid sign silu sin sinc sinh softplus
    softshrink softsign sqrt square tan tanh tanhshrink threshold trunc xlogy
    """
)
AFFINE = _names(
    """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d add alpha_dropout avg_pool1d avg_pool2d avg_pool3d
    batch_norm col2im conj conj_physical conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    convolution cumsum deg2rad diff dropout dropout1d dropout2d dropout3d embedding_bag feature_alpha_dropout
    feature_dropout fft_c2c fft_c2r fft_fft fft_fft2 fft_fftn fft_hfft fft_hfft2 fft_hfftn fft_ifft fft_ifft2
    fft_ifftn fft_ihfft fft_ihfft2 fft_ihfftn fft_irfft fft_irfft2 fft_irfftn fft_r2c fft_rfft fft_rfft2 fft_rfftn
    index_add index_reduce istft lerp linear mean nanmean nansum neg rad2deg rsub scatter_add
    scatter_reduce segment_reduce sparse_addmm sparse_mm stft sub sum sum_to_size trace trapezoid
    upsample_bicubic2d upsample_bicubic2d_aa upsample_bilinear upsample_bilinear2d upsample_bilinear2d_aa
    upsample_linear1d upsample_trilinear3d
    """
)
HOMOGENEOUS = _names(
    """
    cdist dist hypot linalg_norm linalg_vector_norm norm pairwise_distance std vector_norm
    """
)
TAYLOR = _names(
    """
    atan2 cross_entropy_loss det inverse linalg_det linalg_inv linalg_slogdet log_softmax logaddexp logaddexp2
    logcumsumexp logdet logsumexp polar slogdet
    """
)
PRODUCTS = _names(
    """
    bilinear chain_matmul cross dot einsum inner kron linalg_cross linalg_multi_dot linalg_vecdot matmul mul mv
    outer tensordot vdot vecdot
    """
)
MATRIX_PRODUCTS = _names(
    """
    addbmm addmm addmv baddbmm bmm einsum inner matmul mm mv tensordot
    """
)
NORMS = _names(
    """
    group_norm instance_norm layer_norm rms_norm
    """
)
RECURRENT = _names(
    """
    gru gru_cell lstm lstm_cell rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell
    """
)

FUSED = _names(
    """
    addbmm addcdiv addcmul addmm addmv addr baddbmm
    """
)
