"""Charts of times: one line per method, and the seed's times beside today's."""

from collections.abc import Callable

import pandas as pd
import seaborn as sns

from posmat.charts.style import (
    BLUE,
    COLOURS,
    COLUMN_WIDTH_IN,
    FAINT,
    INK,
    MARKS,
    ORANGE,
    Chart,
    describe_rows,
    has_ratio,
    listed,
    name_of,
    plain_log_ticks,
    summary_of,
    value_of,
    words_of_rounds,
    words_of_threads,
    words_of_wrong,
)
from posmat.summary import FLOOR, baseline_of, is_control


def time_per_method(rows: pd.DataFrame, title: str) -> Chart:
    """One line per method: every block as a faint dot, the median as a bold one, the quartiles.

    The name stands on the line, the median and its ratio to the baseline at the right. Dots, not
    bars: a logarithm has no zero for a bar to start from. The dot of a method whose numbers are
    wrong is hollow.
    """
    table = lines_of_times(rows)
    rows = rows[rows["clock"] == "host"]
    baseline = baseline_of(rows)
    methods = list(table.index)
    timed = rows[(rows["state"] == "timed") & rows["method"].isin(methods)]
    timed = pd.DataFrame(
        {
            "method": timed["method"].astype(str),
            "ms": timed["seconds"].astype(float) * 1e3,
        }
    )
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 0.85 + 0.34 * len(methods)), layout="constrained")
    axes = figure.subplots()
    palette = {m: FAINT if is_control(m) else ORANGE if m == baseline else BLUE for m in methods}
    axes.set(xscale="log", xlabel="time per call [ms]", ylabel="")
    if len(timed):
        shared = {
            "data": timed,
            "x": "ms",
            "y": "method",
            "order": methods,
            "hue": "method",
            "palette": palette,
            "legend": False,
            "ax": axes,
        }
        sns.stripplot(**shared, jitter=False, size=2.5, alpha=0.25)
        sns.pointplot(
            **shared,
            estimator="median",
            errorbar=("pi", 50),
            linestyle="none",
            markersize=4,
            err_kws={"linewidth": 1.6},
        )
        axes.set(xlabel="time per call [ms]", ylabel="")
        plain_log_ticks(axes.xaxis, timed["ms"])
    else:
        axes.set_xticks([])
    axes.set_title(describe_rows(rows), fontsize=6.5, color=FAINT)
    figure.head(title)
    axes.set_yticks([])
    axes.set_ylim(len(methods) - 0.6, -0.75)
    axes.grid(axis="x", which="major")
    axes.spines["left"].set_visible(False)
    for place, (method, line) in enumerate(table.iterrows()):
        if line["wrong"] and line["state"] == "timed":
            dot = {"markersize": 5.5, "markeredgewidth": 1.3, "markerfacecolor": "white"}
            axes.plot([1e3 * line["median"]], [place], "o", color=palette[method], **dot)
        style = {"transform": axes.get_yaxis_transform(), "y": place - 0.3}
        style |= {"color": FAINT if is_control(method) else INK, "va": "center", "fontsize": 7.5}
        axes.text(0.0, s=name_of(method, line["wrong"]), ha="left", **style)
        axes.text(1.0, s=value_of(method, line, "   {}×"), ha="right", **style)
    return figure


def lines_of_times(rows: pd.DataFrame) -> pd.DataFrame:
    """The lines of the summary that the chart has: the cost of a call only where it is near."""
    table = summary_of(rows)
    return table.drop(index=FLOOR) if _far_below(table, FLOOR) else table


def _far_below(table: pd.DataFrame, method: str) -> bool:
    """Whether a line is over 30 times faster than every other one: the axis would show no more."""
    if method not in table.index or pd.isna(table.loc[method, "median"]):
        return False
    return bool(30 * table.loc[method, "median"] < table["median"].drop(index=method).min())


def caption_of_times(question: str) -> Callable[[pd.DataFrame], str]:
    """A caption for `time_per_method`: what was asked, where measured, what the marks are."""

    def caption(rows: pd.DataFrame) -> str:
        table = lines_of_times(rows)
        rows = rows[rows["clock"] == "host"]
        first = rows.iloc[0]
        baseline = baseline_of(rows)
        threads = words_of_threads(first["threads"])
        ratio = ""
        if any(has_ratio(method, line) for method, line in table.iterrows()):
            ratio = f"; × is the paired ratio to {baseline}"
        elif table.loc[baseline, "state"] != "timed":
            ratio = f"; {baseline} has no time here, so there is no ratio to it"
        return (
            f"{question} Time per call on {first['processor']} ({first['device']}, {threads}, "
            f"PyTorch {first['torch']}), {first['dtype']} operands, "
            f"batch_size={first['batch_size']}, "
            f"out_features={first['out_features']}, in_features={first['in_features']}. Faint "
            f"dots are blocks of calls ({words_of_rounds(rows)}), bold dots their medians, "
            f"lines their quartiles{ratio}.{words_of_wrong(table)}"
        )

    return caption


_OF_THE_SEED = ("time.clock", "time.time")


def then_and_now(rows: pd.DataFrame, title: str) -> Chart:
    """One line per form that the seed timed: its own time, and the median of each machine today.

    A time whose clock did not wait for the device is a hollow mark.
    """
    rows = rows_then_and_now(rows)
    lines = list(rows["line"].unique())
    then, now = _places(rows)
    colours = dict.fromkeys(then, INK)
    colours |= {place: COLOURS[index % len(COLOURS)] for index, place in enumerate(now)}
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 1.1 + 0.34 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for index, place in enumerate(then + now):
        shift = 0.14 * (index - len(then) - (len(now) - 1) / 2) if place in now else 0
        for hollow in (False, True):
            own = rows[(rows["where"] == place) & (rows["hollow"] == hollow)]
            if own.empty:
                continue
            y = [lines.index(line) + shift for line in own["line"]]
            quartiles = own["q25_milliseconds"].notna()
            axes.hlines(
                [at for at, has in zip(y, quartiles, strict=True) if has],
                own.loc[quartiles, "q25_milliseconds"].astype(float),
                own.loc[quartiles, "q75_milliseconds"].astype(float),
                color=colours[place],
                linewidth=1.6,
            )
            axes.plot(
                own["milliseconds"].astype(float),
                y,
                MARKS[index % len(MARKS)],
                color=colours[place],
                markerfacecolor="white" if hollow else colours[place],
                markersize=4.4,
                label=f"{place}, clock did not wait" if hollow else place,
            )
    axes.set(xscale="log", xlabel="time per call [ms]", ylabel="")
    axes.set_yticks([])
    axes.set_ylim(len(lines) - 0.6, -0.75)
    axes.grid(axis="x", which="major")
    axes.spines["left"].set_visible(False)
    plain_log_ticks(axes.xaxis, rows["milliseconds"].astype(float))
    elsewhere = _on_another_device(rows)
    for place, line in enumerate(lines):
        label = {"transform": axes.get_yaxis_transform(), "ha": "left", "va": "center"}
        note = f" (2020 on {elsewhere[line]})" if line in elsewhere else ""
        axes.text(0.0, place - 0.33, f"{line}{note}", fontsize=7, **label)
    figure.head(title)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=6.5, frameon=False)
    return figure


def rows_then_and_now(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that the chart shows, with its columns: those of rows of before may lack some."""
    rows = rows[rows["clock"].isin(["host", *_OF_THE_SEED])]
    absent = {"synchronised", "q25_milliseconds", "q75_milliseconds"} - set(rows.columns)
    rows = rows.assign(**dict.fromkeys(sorted(absent), pd.NA))
    return rows.assign(
        line=rows["method"] + ", " + rows["dtype"],
        hollow=rows["synchronised"].astype("string").eq("no").fillna(False).astype(bool),
    )


def _places(rows: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Where the times are of: of 2020, and of today."""
    old = rows["clock"].isin(_OF_THE_SEED)
    return list(rows.loc[old, "where"].unique()), list(rows.loc[~old, "where"].unique())


def _on_another_device(rows: pd.DataFrame) -> dict[str, str]:
    """The lines whose time of 2020 is of a device that no time of today is of, with that device."""
    found = {}
    for line, own in rows.groupby("line", sort=False):
        old = own["clock"].isin(_OF_THE_SEED)
        then, now = own.loc[old, "device"], set(own.loc[~old, "device"])
        if now and len(then) and not now & set(then):
            found[str(line)] = listed(list(then.unique()))
    return found


def caption_then_and_now(rows: pd.DataFrame) -> str:
    """What the marks of `then_and_now` are, and what stands between them beside the years."""
    rows = rows_then_and_now(rows)
    now = rows[rows["clock"] == "host"]
    known = {"processor", "torch"} <= set(rows.columns)
    where = []
    for place, own in now.groupby("where", sort=False):
        first = own.iloc[0]
        facts = f" ({first['processor']}, PyTorch {first['torch']})" if known else ""
        where.append(f"{place}{facts}")
    quartiles = ", with the quartiles as lines" if now["q25_milliseconds"].notna().any() else ""
    hollow = (
        " Hollow marks are of a clock that did not wait for the device."
        if rows["hollow"].any()
        else " Some of the clocks of 2020 did not wait for the device."
        if rows["synchronised"].isna().all()
        else ""
    )
    return (
        "Time per call of the forms that the 2020 notebook timed: what it printed (2020; other "
        "hardware, which it does not name), and the medians of today, warm and synchronised, on "
        f"{'; '.join(where) or 'no machine yet'}{quartiles}.{hollow}{_words_of_devices(rows)}"
    )


def _words_of_devices(rows: pd.DataFrame) -> str:
    """The sentence of the caption on lines that compare devices too, or nothing."""
    elsewhere = _on_another_device(rows)
    if not elsewhere:
        return ""
    _, now = _places(rows)
    devices = listed(list(dict.fromkeys(elsewhere.values())))
    return (
        f" On {len(elsewhere)} of the {rows['line'].nunique()} lines the devices differ, {devices} "
        f"in 2020 beside {'; '.join(now)}: there the distance is that of two devices first."
    )
