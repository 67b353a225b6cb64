import pandas as pd
import pytest

from posmat.measure.files import RecordError, project_root, read_all_rows
from posmat.measure.seed import rankings, read_seed, then_and_now
from posmat.measure.summary import AGAIN
from posmat.tests import test_summary


def rows_of(times: dict[str, list[float]], **columns) -> pd.DataFrame:
    facts = {"notebook": "02_linear_vs_manual", "machine": "m", "dtype": "float32"}
    facts |= {"batch_size": 256, "out_features": 128, "in_features": 9216}
    return test_summary.rows_of(times, **facts | {"processor": "p", "torch": "2.13.0"} | columns)


TODAY = {
    "nn.Linear": [0.004] * 5,
    "W @ view (the seed's)": [0.002] * 5,
    "element-wise, whole": [0.5] * 5,
    "nn.Linear" + AGAIN: [0.0041] * 5,
}


def test_every_time_that_the_seed_printed_is_there_once_under_a_method_of_its_notebook():
    """Against the text of the seed: these numbers stand in it, and no other time does."""
    seed = read_seed()
    printed = [0.70267, 0.62806, 1.07611, 0.86689, 0.141, 0.670, 36.748, 0.3262, 0.0188]
    assert seed["milliseconds"].tolist() == printed
    of_loops = [float(total) for total in seed["loop_seconds"] if total]
    assert of_loops == [0.014, 0.067, 3.675, 0.326, 0.188]
    filled = ["method", "device", "dtype", "calls", "clock", "synchronised"]
    assert not seed[filled].isna().any(axis=None)
    for line in seed.to_dict("records"):
        source = (project_root() / "notebooks" / f"{line['notebook']}.ipynb").read_text()
        name = line["method"].removesuffix(" of x")
        assert f'"{name}' in source.replace("\\", ""), line["method"]


def test_then_and_now_joins_by_method_dtype_and_size():
    now = then_and_now(rows_of(TODAY), read_seed())
    layer = now[now["method"] == "nn.Linear"].set_index("where")["milliseconds"]
    assert layer.to_dict() == {"2020, cuda": 0.141, "m, cpu": 4.0}
    other = then_and_now(rows_of(TODAY, batch_size=1), read_seed())
    assert set(other["machine"]) == {"2020"}


def test_rankings_are_told_by_paired_ratios_and_their_noise():
    lines = rankings(rows_of(TODAY), read_seed())
    assert lines[["faster in 2020", "slower", "order"]].to_numpy().tolist() == [
        ["nn.Linear", "W @ view (the seed's)", "order reversed"],
        ["nn.Linear", "element-wise, whole", "order kept"],
        ["W @ view (the seed's)", "element-wise, whole", "order kept"],
    ]
    close = TODAY | {"W @ view (the seed's)": [0.00405] * 5}
    assert (
        rankings(rows_of(close), read_seed())["order"].iloc[0] == "no difference beyond the noise"
    )
    rows = rows_of(TODAY)
    missing = rows["method"] == "element-wise, whole"
    rows.loc[missing, ["state", "seconds"]] = ["not supported", pd.NA]
    orders = rankings(rows, read_seed())["order"].tolist()
    assert orders == ["order reversed", "not both timed", "not both timed"]


def test_a_ranking_says_on_which_devices_and_by_which_clocks_it_was_made():
    rows = pd.concat([rows_of(TODAY), rows_of(TODAY, device="cuda")], ignore_index=True)
    lines = rankings(rows, read_seed()).groupby("device")
    assert not lines.get_group("cpu")["same device"].any()  # the seed's third section was on CUDA
    cuda = lines.get_group("cuda").set_index("faster in 2020")
    assert cuda["same device"].all()
    # The seed waited for the device in two of its three forms, and called them a hundred times.
    assert cuda["sound in 2020"].to_dict() == {"nn.Linear": False, "W @ view (the seed's)": True}
    single = {"W @ x": [1.0] * 5, "W * x": [2.0] * 5, "W @ x" + AGAIN: [1.0] * 5}
    facts = {"notebook": "01_matvec_vs_elementwise", "dtype": "int8", "batch_size": 1}
    assert rankings(rows_of(single, **facts), read_seed())["sound in 2020"].tolist() == [False]


def test_beside_a_ranking_stands_what_the_seeds_own_way_of_timing_says_today():
    loops = rows_of({"nn.Linear": [1.0, 3.0, 2.0], "W @ view (the seed's)": [8.0]})
    rows = pd.concat([rows_of(TODAY), loops.assign(clock="seed (wall)")], ignore_index=True)
    lines = rankings(rows, read_seed())
    assert lines["the seed's way"].tolist() == ["4.00", "", ""]
    assert lines["order"].equals(rankings(rows_of(TODAY), read_seed())["order"])


def test_a_variant_is_neither_pooled_with_the_default_run_nor_paired_with_it():
    default = rows_of(TODAY).assign(stem="02_linear_vs_manual")
    slower = {name: [10 * value for value in values] for name, values in TODAY.items()}
    variant = rows_of(slower | {"W @ view (the seed's)": [0.9] * 5}, threads=2)
    rows = pd.concat([variant.assign(stem="02_linear_vs_manual-threads=2"), default])
    alone = rankings(default, read_seed())
    pd.testing.assert_frame_equal(rankings(rows, read_seed()), alone)
    now = then_and_now(rows, read_seed())
    layer = now[(now["method"] == "nn.Linear") & (now["machine"] == "m")]
    assert layer["milliseconds"].tolist() == [4.0]
    assert layer["q25_milliseconds"].tolist() == layer["q75_milliseconds"].tolist() == [4.0]


def test_published_rows_are_read_and_own_ones_for_their_owner_alone(tmp_path):
    for place in ("a/cpu", "local/cuda", "quick/cpu", "a/all"):
        folder = tmp_path / "data" / place
        folder.mkdir(parents=True)
        rows_of({place: [1.0]}).to_csv(folder / "02_x.csv", index=False)
        (folder / "02_x.json").write_text("{}")
        for name in ("._02_x.csv", "._02_x.json"):  # as macOS leaves beside what it copies
            (folder / name).write_bytes(b"\0\5\x16\7")
    rows_of({"memory": [1.0]}).to_csv(tmp_path / "data/a/cpu/02_x.memory.csv", index=False)
    assert set(read_all_rows(root=tmp_path)["method"]) == {"a/cpu", "local/cuda"}
    assert set(read_all_rows("quick", tmp_path)["method"]) == {"a/cpu", "quick/cpu"}
    assert set(read_all_rows("a", tmp_path)["method"]) == {"a/cpu"}
    with pytest.raises(RecordError, match="posmat report"):
        read_all_rows(root=tmp_path / "data")
