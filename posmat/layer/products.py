"""Methods (x, w) -> y: ways to compute the product Y = X Wᵀ of a fully connected layer.

Every method takes X (M, K) and W (N, K) and gives Y (M, N). With int8 operands the numbers are
integers, and a method is called exact when it gives, number for number, what `integer_product`
gives. What `check_operands` refuses, every method refuses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from posmat.layer.problem import check_operands
from posmat.layer.signmag import SignMagnitude, as_sign_magnitude, to_sign_magnitude

INT32_MAX_IN_FEATURES = (2**31 - 1) // (128 * 128)  # 131,071: K such products fit int32

# Elements of one (k, m, n) block of partial products. On a CPU a block of int32 is 1 MiB and stays
# in the second-level cache; a GPU wants few launches, and 64 Mi elements are 256 MiB.
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}


def accumulator_dtype(in_features: int) -> torch.dtype:
    """The integer dtype that holds any sum of `in_features` int8 products: int32, or int64.

    The largest product is -128 · -128 = 2**14, and int32 ends at 2**31 - 1.
    """
    return torch.int32 if in_features <= INT32_MAX_IN_FEATURES else torch.int64


def integer_product(x: Tensor, w: Tensor) -> Tensor:
    """The reference: the exact product of int8 operands, as int64.

    CUDA has no integer matrix product of that width. There float64 does it, which holds every
    integer up to 2**53: exact for any order of summation while K <= 2**39.
    """
    check_operands(x, w)
    if x.device.type == "cpu":
        return x.long() @ w.long().T
    return (x.double() @ w.double().T).long()


def linear_product(x: Tensor, w: Tensor) -> Tensor:
    """The float32 layer, `F.linear` without bias: the baseline that speed is compared with.

    int8 operands are converted first. float32 holds every integer up to 2**24 only, so of int8 the
    sum is *guaranteed* to be exact for K <= 1,024; beyond that it depends on the numbers.
    """
    check_operands(x, w, (torch.int8, torch.float32))
    return F.linear(x.float(), w.float())


def elementwise_product(x: Tensor, w: Tensor, block_elements: int | None = None) -> Tensor:
    """Multiply element by element, then sum over K: a fully connected layer by hand.

    The memory is that of a block of `block_elements` partial products, which by default suits the
    device, and of the operands' copies. Of int8 the result is int32, or int64 where K asks for it,
    and always exact; of float32 it is float32.
    """
    check_operands(x, w, (torch.int8, torch.float32))
    if x.dtype == torch.float32:
        working = accumulator = torch.float32
    else:
        working, accumulator = torch.int32, accumulator_dtype(x.shape[1])
    factors = [(_columns(x, working), _columns(w, working))]
    return _sum_outer_blocks(factors, accumulator, block_elements)


def unblocked_elementwise_product(x: Tensor, w: Tensor) -> Tensor:
    """The same with the whole (M, N, K) tensor in memory, the seed's last form of a layer.

    4 bytes for each of the partial products are 1.2 GB at its size. int8 is multiplied as int32.
    """
    check_operands(x, w, (torch.int8, torch.float32))
    if x.dtype == torch.float32:
        return (w * x.unsqueeze(1)).sum(dim=2)
    return (w.int() * x.int().unsqueeze(1)).sum(dim=2)


def sign_magnitude_product(
    x: Tensor, w: Tensor | SignMagnitude, block_elements: int | None = None
) -> Tensor:
    """The seed's pipeline in blocks: magnitudes times magnitudes, times signs times signs, summed.

        y[m, n] = sum over k of (|w[n, k]| · |x[m, k]|) · (sign w[n, k] · sign x[m, k])

    Both multiplications of the seed are done for every partial product; the first one meets
    non-negative numbers only. Exact for all int8 operands, -128 included, at any K. `w` may be
    split before, as in the seed; for `block_elements` see `elementwise_product`.
    """
    weight = as_sign_magnitude(w)
    check_operands(x, weight.sign)
    data = to_sign_magnitude(x)
    factors = [
        (_columns(data.magnitude, torch.int32), _columns(weight.magnitude, torch.int32)),
        (_columns(data.sign, torch.int32), _columns(weight.sign, torch.int32)),
    ]
    return _sum_outer_blocks(factors, accumulator_dtype(x.shape[1]), block_elements)


def unblocked_sign_magnitude_product(x: Tensor, w: Tensor | SignMagnitude) -> Tensor:
    """The seed's pipeline with its whole (M, N, K) intermediates, widened so that it is right.

    The seed multiplies int8 by int8 into an int32 tensor; PyTorch does that in int8, which wraps,
    and widens afterwards. Here the magnitudes are widened to int16 first, which holds 128 · 128.
    Result and signs are 5 bytes for each partial product; on a CPU PyTorch's sum of int32 numbers
    makes a copy of them as int64, 8 bytes more.
    """
    weight = as_sign_magnitude(w)
    check_operands(x, weight.sign)
    data = to_sign_magnitude(x)
    signs = weight.sign * data.sign.unsqueeze(1)  # (M, N, K) int8
    result = torch.empty(signs.shape, dtype=torch.int32, device=x.device)  # (M, N, K)
    torch.mul(weight.magnitude.short(), data.magnitude.short().unsqueeze(1), out=result)
    torch.mul(result, signs, out=result)
    return result.sum(dim=2)


def _columns(operand: Tensor, dtype: torch.dtype) -> Tensor:
    """An operand (M, K) with its columns as rows (K, M), in one copy."""
    return operand.T.to(dtype, memory_format=torch.contiguous_format).contiguous()


def _sum_outer_blocks(
    factors: list[tuple[Tensor, Tensor]], accumulator: torch.dtype, block_elements: int | None
) -> Tensor:
    """Sum over k the product of all factors' outer products a[k, :, None] · b[k, None, :].

    Each factor is a pair (K, M), (K, N) of one dtype, contiguous. In a block k is outermost in
    memory: the sum then runs down whole rows, which vectorizes, where one along the last axis would
    not. A fresh buffer for every block would be mapped and unmapped by the system each time.
    """
    if block_elements is not None and block_elements < 1:
        raise ValueError(f"block_elements={block_elements}: give 1 or more, or None.")
    first, second = factors[0]
    (K, M), N, device = first.shape, second.shape[1], first.device
    y = torch.zeros((M, N), dtype=accumulator, device=device)
    if y.numel() == 0 or K == 0:
        return y
    if block_elements is None:
        block_elements = BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cpu"])
    # Rows of 512 at the most, an eighth of the block for one k: several k are summed at a time.
    n_step = min(N, 512, block_elements)
    m_step = max(1, min(M, block_elements // 8 // n_step))
    k_step = max(1, min(K, block_elements // (m_step * n_step)))
    buffers = [first.new_empty((k_step, m_step, n_step)) for _ in factors]
    for m in range(0, M, m_step):
        for n in range(0, N, n_step):
            tile = y[m : m + m_step, n : n + n_step]
            for k in range(0, K, k_step):
                products = None
                for (a, b), buffer in zip(factors, buffers, strict=True):
                    a_block = a[k : k + k_step, m : m + m_step, None]  # (k, m, 1)
                    b_block = b[k : k + k_step, None, n : n + n_step]  # (k, 1, n)
                    out = buffer[: a_block.shape[0], : a_block.shape[1], : b_block.shape[2]]
                    torch.mul(a_block, b_block, out=out)
                    products = out if products is None else products.mul_(out)
                tile += products.sum(0, dtype=accumulator)
    return y
