"""The points of a sweep, and their names."""

from pathlib import Path

import pytest

from launch.cluster.sweep import Point, Sweep, points_of


def test_the_product_of_the_values() -> None:
    points = points_of(["optimizer.lr=1e-3,3e-4", "seed=0,1"])
    assert [point.overrides for point in points] == [
        ["optimizer.lr=1e-3", "seed=0"],
        ["optimizer.lr=1e-3", "seed=1"],
        ["optimizer.lr=3e-4", "seed=0"],
        ["optimizer.lr=3e-4", "seed=1"],
    ]
    assert [point.name for point in points] == [
        "0_lr=1e-3_seed=0",
        "1_lr=1e-3_seed=1",
        "2_lr=3e-4_seed=0",
        "3_lr=3e-4_seed=1",
    ]


def test_names_sort_as_the_array_counts() -> None:
    points = points_of([f"seed={','.join(map(str, range(120)))}"])
    assert [point.name for point in points] == sorted(point.name for point in points)


def test_a_comma_in_brackets_or_quotes_separates_nothing() -> None:
    (first, second) = points_of(["optimizer.betas=[0.9, 0.95], [0.9, 0.99]"])
    assert (first.values, second.values) == (
        {"optimizer.betas": "[0.9, 0.95]"},
        {"optimizer.betas": "[0.9, 0.99]"},
    )
    assert [point.values["name"] for point in points_of(["name='a,b',c"])] == ["'a,b'", "c"]


@pytest.mark.parametrize("value", ["../../etc", "a/b", "$(touch x)", "`x`", "a b\nc", "'", "..", "-" * 300, "ü", "%j"])
def test_a_name_is_safe_whatever_the_value(value: str) -> None:
    (point,) = points_of([f'name="{value}"'])
    assert set(point.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._=+-")
    assert point.name.startswith("0_name=")
    assert len(point.name) < 120


WRONG = {
    "optimizer.lr": "expected KEY=VALUE,VALUE",
    "=1,2": "expected KEY=VALUE,VALUE",
    "a..b=1": "expected KEY=VALUE,VALUE",
    "seed=1,,2": "expected KEY=VALUE,VALUE",
    "seed=1,1": "a value stands there twice",
}


@pytest.mark.parametrize(("sweep", "message"), WRONG.items())
def test_what_is_no_sweep(sweep: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"--sweep .*{message}"):
        points_of([sweep])


def test_a_key_twice_and_too_many_runs() -> None:
    with pytest.raises(ValueError, match="seed is swept already"):
        points_of(["seed=1,2", "seed=3"])
    many = ",".join(map(str, range(100)))
    with pytest.raises(ValueError, match="asks for 10000 runs, more than 1000"):
        points_of([f"seed={many}", f"optimizer.lr={many}"])


def test_a_sweep_is_read_as_it_was_written(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "12", (Point("0_seed=1", {"seed": "1"}), Point("1_seed=2", {"seed": "2"})))
    sweep.write()
    assert Sweep.read(tmp_path) == sweep
    assert [run.path for run in sweep.runs] == [tmp_path / "0_seed=1", tmp_path / "1_seed=2"]
    with pytest.raises(ValueError, match="sweep.json is missing"):
        Sweep.read(tmp_path / "0_seed=1")
