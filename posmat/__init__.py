"""posmat: the positive matrix product, compared with its reference, then timed.

The rooms, each knowing only those above it:

    machine        the host and its device
    layer          what a fully connected layer computes, exactly, and by which engine
    multipliers    Fibonacci codes; inexact multipliers and their matrix product, bit for bit
    network        whole models under multipliers, their training, and images
    measure        callables -> rows -> tables -> files
    charts         rows -> pictures; one function a figure
    report         the driver that runs notebooks; imports no torch

A name is imported when it is first used, so that the driver answers without loading torch.
"""

from importlib import import_module

_PUBLIC = {
    "layer.problem": "ProblemSize NotAvailable random_operands",
    "layer.signmag": "SignMagnitude to_sign_magnitude",
    "layer.products": "integer_product linear_product elementwise_product sign_magnitude_product "
    "unblocked_elementwise_product unblocked_sign_magnitude_product accumulator_dtype",
    "layer.engines": "engine_for",
    "layer.gemm": "float32_product int8_product one_sided_product positive_matrix_product "
    "prepare_float32 prepare_positive",
    "layer.exact": "exact_product explain chosen_method",
    "multipliers.fibonacci": "fibonacci_codes is_fibonacci nearest_fibonacci quantize_fibonacci "
    "quantize_magnitudes",
    "multipliers.factors": "factorize",
    "multipliers.table": "Multiplier",
    "multipliers.shipped": "multiplier_names find_multiplier",
    "multipliers.product": "inexact_product prepare_inexact error_product output_error",
    "multipliers.compare": "multiplier_table lookup_rank",
    "multipliers.lookup": "compiled_lookup_product compiler_command",
    "network.layers": "InexactLinear InexactConv2d",
    "network.convert": "convert_model",
    "network.data": "load_images describe_data",
    "network.training": "train accuracy",
    "machine": "require_device describe_environment",
    "measure.memory": "peak_memory",
    "measure.timing": "time_methods time_as_seed",
    "measure.summary": "summarize in_milliseconds clocks_side_by_side tell_ratio stands "
    "format_figures",
    "measure.predictions": "Found found_ratio score_predictions show_predictions tell_predictions",
    "measure.intervals": "mean_difference bootstrap_difference",
    "measure.files": "read_rows read_all_rows",
    "measure.run": "start_run",
    "measure.seed": "read_seed then_and_now rankings",
    "charts.catalogue": "draw_figure",
    "measure.sizes": "all_sweeps require_memory wanted_bytes free_bytes expected_seconds",
    "measure.roofline": "least_bytes measured_roofs rates along exponents turning_points",
}
MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names.split()}

__all__ = list(MODULE_OF)


def __getattr__(name: str):
    if name not in MODULE_OF:
        raise AttributeError(f"posmat has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"posmat.{MODULE_OF[name]}"), name)


def __dir__():
    return __all__
