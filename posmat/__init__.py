"""posmat: the positive matrix product, exact, timed and proved.

The modules, each knowing only those above it:

    host, environment      the machine and its device
    problem                sizes and operands
    signmag                int8 <-> sign and magnitude
    products               methods (x, w) -> y, element by element; the reference
    proof, engines         what is exact on this machine; GEMMs of bytes, and sums of them
    gemm, exact            methods as GEMMs; the choice among all
    fibonacci              codes without adjacent ones, and quantization to them
    factorization          exact integer factors of an error table
    multipliers, inexact   inexact multipliers; their matrix product, bit for bit
    lookup                 the published simulators' algorithm, to compare with
    digits                 a small network on real images, quantized
    memory                 a method's peak memory
    scaling, roofline      sizes that fit; growth and what limits it
    summary, timing        rows -> tables; callables -> rows
    records                rows to files and back
    history, figures       the seed's times beside rows; rows -> charts
    report                 the driver that runs notebooks; imports no torch

A name is imported when it is first used, so that the driver answers without loading torch.
"""

from importlib import import_module

_PUBLIC = {
    "problem": "ProblemSize NotAvailable random_operands",
    "signmag": "SignMagnitude to_sign_magnitude from_sign_magnitude",
    "products": "integer_product linear_product elementwise_product sign_magnitude_product "
    "unblocked_elementwise_product unblocked_sign_magnitude_product accumulator_dtype",
    "engines": "engine_for",
    "gemm": "float32_product int8_product one_sided_product positive_matrix_product "
    "prepare_float32 prepare_positive",
    "exact": "exact_product explain chosen_method",
    "fibonacci": "fibonacci_codes is_fibonacci nearest_fibonacci quantize_fibonacci "
    "quantize_magnitudes",
    "factorization": "factorize",
    "multipliers": "Multiplier multiplier_names find_multiplier",
    "inexact": "inexact_product prepare_inexact choose_path error_product output_error "
    "straight_through_product",
    "lookup": "compiled_lookup_product compiler_command",
    "digits": "load_digit_images train_network quantize_network accuracy mean_difference",
    "environment": "require_device describe_environment",
    "memory": "peak_memory",
    "timing": "time_methods time_as_seed",
    "summary": "summarize in_milliseconds clocks_side_by_side tell_ratio stands format_figures",
    "records": "start_run read_rows read_all_rows",
    "history": "read_seed then_and_now rankings",
    "figures": "draw_figure",
    "scaling": "all_sweeps require_memory wanted_bytes free_bytes expected_seconds",
    "roofline": "least_bytes measured_roofs rates along exponents turning_points",
}
MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names.split()}

__all__ = list(MODULE_OF)


def __getattr__(name: str):
    if name not in MODULE_OF:
        raise AttributeError(f"posmat has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"posmat.{MODULE_OF[name]}"), name)


def __dir__():
    return __all__
