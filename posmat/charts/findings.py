"""Findings of the charts of times: a sentence from rows that claims no more than the noise lets it.

Each ratio is told by `tell_ratio`, with its interval and whether it is told apart from the noise.
"""

import pandas as pd

from posmat.charts.style import listed, sentence, summary_of, table_of, wrong_methods
from posmat.summary import tell_ratio


def finding_matvec(rows: pd.DataFrame) -> str:
    """What the element-wise product costs, and whether the numbers are right."""
    table = summary_of(rows)
    said = tell_ratios(table, {"W * x": "the element-wise product takes"})
    return f"In {rows['dtype'].iloc[0]} {said}.{_wrong(table)}"


def finding_linear(rows: pd.DataFrame) -> str:
    """What the layer by hand costs, as a matrix product and element by element."""
    table = summary_of(rows)
    said = tell_ratios(
        table,
        {
            "W @ X.T": "by hand as a matrix product the layer takes",
            "element-wise, in blocks": "element by element, in blocks,",
            "element-wise, whole": "with every partial product in memory at once",
            "nn.Linear, gradients": "nn.Linear with gradients takes",
        },
    )
    return f"{sentence(said)}.{_wrong(table)}"


def finding_signs(rows: pd.DataFrame) -> str:
    """What shifts cost beside signs, and what not to precompute the weights' signs costs."""
    table = summary_of(rows)
    said = tell_ratios(
        table,
        {
            "shift, W precomputed": "from shifts, the signs of all products take",
            "sign of both": "with the signs of the weights taken at every call",
            "shift of both": "from shifts of both",
        },
    )
    return f"{sentence(said)}.{_wrong(table)}"


def finding_magnitude(rows: pd.DataFrame) -> str:
    """What a magnitude that holds 128 costs, of the input and of the weights."""
    table = summary_of(rows)
    said = [
        tell_ratios(
            table,
            {
                "abs as uint8 of x": "of the input, abs read as uint8 takes",
                "widened abs of x": "widened before abs",
            },
        )
    ]
    if "abs of W" in table.index:
        host = rows[rows["clock"] == "host"]
        weights = table_of(host, "abs of W")
        said.append(
            tell_ratios(
                weights,
                {
                    "abs as uint8 of W": "of the weights, abs read as uint8 takes",
                    "widened abs of W": "widened before abs",
                },
            )
        )
    return f"{sentence('; '.join(filter(None, said)))}.{_wrong(table)}"


def finding_positive(rows: pd.DataFrame) -> str:
    """Whether the sign-magnitude form is the layer, and what it costs whole and in blocks."""
    table = summary_of(rows)
    whole, blocks = "sign-magnitude, whole", "sign-magnitude, in blocks"
    forms = [name for name in (whole, blocks) if name in table.index]
    exact = bool(table.loc[forms, "exact"].fillna(False).all())
    said = tell_ratios(
        table,
        {
            whole: "The seed's form, widened so that it is right, with every partial product in "
            "memory at once, takes",
            blocks: "in blocks that stay in the cache",
        },
    )
    return (
        f"The sign-magnitude form gives the layer's numbers {'exactly' if exact else 'wrongly'}. "
        f"{sentence(said)}."
    )


def finding_formulations(rows: pd.DataFrame) -> str:
    """What the exact products by GEMMs cost, and what the element-wise form in blocks does."""
    table = summary_of(rows)
    said = tell_ratios(
        table,
        {
            "exact_product": "the choice among the exact methods, exact_product, takes",
            "one_sided_product": "with one operand non-negative",
            "positive_matrix_product": "with every multiplication between non-negative numbers",
            "element-wise, in blocks": "element by element, in blocks,",
        },
    )
    return f"{sentence(said)}.{_wrong(table)}"


def tell_ratios(table: pd.DataFrame, ways: dict[str, str]) -> str:
    """Of each method that the table has, the words and its ratio; the baseline is named once."""
    said = [
        f"{words} {tell_ratio(table, method)}"
        for method, words in ways.items()
        if method in table.index
    ]
    baseline = table["baseline"].iloc[0]
    said[1:] = [one.replace(f" times the time of {baseline} (", " times (") for one in said[1:]]
    return "; ".join(said) or f"there is nothing beside {baseline}"


def _wrong(table: pd.DataFrame) -> str:
    """The sentence on methods whose numbers are wrong, or nothing."""
    wrong = wrong_methods(table)
    return f" The numbers of {listed(wrong)} are wrong." if wrong else ""
