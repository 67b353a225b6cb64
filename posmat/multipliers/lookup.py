"""The published simulators' algorithm, to compare with: one table look-up per product, compiled.

The loop in C is compiled by the system's compiler when it is first asked for.
"""

import ctypes
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from posmat.layer.problem import NotAvailable, check_operands
from posmat.multipliers.cmodel import c_compiler, run_compiler
from posmat.multipliers.shipped import find_multiplier
from posmat.multipliers.table import Multiplier

FLAGS = ("-O3", "-march=native", "-std=c99", "-shared", "-fPIC")

SOURCE = r"""
#include <stdint.h>

/* y[m][n] = sum over k of table[w[n][k]][x[m][k]], all operands by their bytes */
void lookup_product(const uint8_t *restrict x, const uint8_t *restrict w,
                    const int32_t *restrict table, int64_t *restrict y,
                    int64_t M, int64_t N, int64_t K)
{
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) {
            const uint8_t *a = x + m * K, *b = w + n * K;
            int64_t total = 0;
            for (int64_t k = 0; k < K; ) {
                /* whole blocks in SUM_TYPE: the caller chose a table whose block sums fit */
                int64_t end = k + 16384 < K ? k + 16384 : K;
                SUM_TYPE sum = 0;
                for (; k < end; k++)
                    sum += table[(uint32_t)b[k] << 8 | a[k]];
                total += sum;
            }
            y[m * N + n] = total;
        }
}
"""


def compiled_lookup_product(x: Tensor, w: Tensor, multiplier: str | Multiplier) -> Tensor:
    """The numbers of `inexact_product` as int64 (M, N), by one look-up per product on one thread.

    X (M, K) and W (N, K) are int8 and on the CPU. An operand that the multiplier does not admit
    counts as 0 here.

    Raises:
        NotAvailable: there is no C compiler, or it failed.
        TypeError, ValueError: the operands do not fit, or are not on the CPU.
    """
    check_operands(x, w)
    if x.device.type != "cpu":
        raise NotAvailable(f"x is on {x.device}, and the compiled loop runs on the CPU.")
    found = find_multiplier(multiplier)
    x, w, table = x.contiguous(), w.contiguous(), found.operand_table.astype(np.int32)
    y = torch.empty((x.shape[0], w.shape[0]), dtype=torch.int64)
    loop = _loop(found.largest_product <= 2**16)
    loop(x.data_ptr(), w.data_ptr(), table.ctypes.data, y.data_ptr(), *y.shape, x.shape[1])
    return y


def compiler_command() -> str:
    """The compiler and the flags of the compiled loop; NotAvailable where there is none."""
    return " ".join([c_compiler(), *FLAGS])


@cache
def _loop(small: bool):
    """The compiled function; with int32 sums of 16,384 products where the table is small enough."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        source, library = Path(folder, "lookup.c"), Path(folder, "lookup.so")
        source.write_text(SOURCE, encoding="utf-8")
        sums = f"-DSUM_TYPE={'int32_t' if small else 'int64_t'}"
        try:
            run_compiler(*FLAGS, sums, source, "-o", library)
            function = ctypes.CDLL(str(library)).lookup_product
        except OSError as problem:
            raise NotAvailable(f"the look-up loop does not compile: {problem}") from problem
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
    function.restype = None
    return function
