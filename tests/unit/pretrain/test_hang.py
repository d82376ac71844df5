"""Whom a hang is blamed on: stacks as faulthandler writes them, and reports of ranks."""

import faulthandler
import tempfile
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pretrain.hang import Report, call_in, hang_line, late_ranks

ROOT = Path(__file__).parents[3]
SITE = "/env/site-packages"
MAIN, OTHER, LOADER = 0x7F01, 0x7F02, 0x7F03

WAITS = Report("n1", 7, "step", "S", 20.4, 4, "all_reduce", "agree (pretrain/engine.py:108)")
BUSY = replace(WAITS, host="n2", waiting=None, call="train_step (pretrain/engine_deepspeed.py:104)")


def dump(**stacks: list[tuple[str, int, str]]) -> str:
    """A dump of threads main, other, loader; stacks innermost frame first."""
    idents = {"main": MAIN, "other": OTHER, "loader": LOADER}
    return "\n".join(
        f"{'Current thread' if name == 'main' else 'Thread'} 0x{idents[name]:016x} (most recent call first):\n"
        + "".join(f'  File "{path}", line {line} in {function}\n' for path, line, function in stack)
        for name, stack in stacks.items()
    )


TRAIN = (f"{ROOT}/pretrain/train.py", 90, "train")
ALL_REDUCE = (f"{SITE}/torch/distributed/distributed_c10d.py", 3000, "all_reduce")
IN_WAIT = ("/usr/lib/python3.11/threading.py", 327, "wait")


@pytest.mark.parametrize(
    ("stacks", "call", "waiting"),
    [
        pytest.param({"main": [("/env/x.py", 1, "sleep"), TRAIN]}, "train (pretrain/train.py:90)", None, id="ours"),
        pytest.param(
            {"main": [ALL_REDUCE, (f"{ROOT}/pretrain/engine.py", 108, "agree"), TRAIN]},
            "agree (pretrain/engine.py:108)",
            "all_reduce",
            id="a collective",
        ),
        pytest.param(
            {
                "loader": [("/dev/x.py", 1, "read"), (f"{ROOT}/data_pipeline/shards.py", 40, "window")],
                "main": [IN_WAIT, TRAIN],
            },
            "window (data_pipeline/shards.py:40)",
            None,
            id="the loader keeps it waiting",
        ),
        pytest.param(
            {
                "loader": [IN_WAIT, (f"{ROOT}/data_pipeline/loader.py", 133, "_put")],
                "other": [ALL_REDUCE, (f"{ROOT}/pretrain/checkpoint/save.py", 190, "_together")],
                "main": [IN_WAIT, TRAIN],
            },
            "_together (pretrain/checkpoint/save.py:190)",
            "all_reduce",
            id="the save waits for other ranks",
        ),
        pytest.param(
            {"other": [("/x/tensorboard.py", 3, "run")], "main": [IN_WAIT, TRAIN]},
            "train (pretrain/train.py:90)",
            None,
            id="threads of libraries do not count",
        ),
        pytest.param({"main": [("/env/pretrain/x.py", 1, "x")]}, None, None, id="a package of the same name"),
        pytest.param({}, None, None, id="no stacks"),
    ],
)
def test_the_call_that_a_rank_is_in(stacks: dict, call: str | None, waiting: str | None) -> None:
    assert call_in(dump(**stacks), MAIN, ROOT) == (call, waiting)


def test_the_last_of_several_dumps_counts() -> None:
    earlier = dump(main=[(f"{ROOT}/pretrain/engine.py", 1, "agree")])
    assert call_in(earlier + dump(main=[TRAIN]), MAIN, ROOT)[0] == "train (pretrain/train.py:90)"


def test_dumps_of_this_python_are_understood() -> None:
    """This test takes the place of our packages; a thread of it keeps the main thread waiting."""
    package = Path(__file__).parent
    started, enough = threading.Event(), threading.Event()

    def spin() -> None:
        while not enough.is_set():
            started.set()

    thread = threading.Thread(target=spin)
    thread.start()
    started.wait()
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        enough.set()
        thread.join()
        file.seek(0)
        said = file.read()
    assert f"0x{threading.get_ident():016x}" in said
    call, waiting = call_in(said, threading.get_ident(), package.parents[2])
    assert call is None  # tests are no package of ours
    assert waiting is None
    renamed = said.replace(str(package), str(ROOT / "pretrain"))
    call, _ = call_in(renamed, threading.get_ident(), ROOT)
    assert call is not None
    assert call.startswith("test_dumps_of_this_python_are_understood (pretrain/test_hang.py:")
    assert call_in(renamed, thread.ident or 0, ROOT)[0] is not None


@pytest.mark.parametrize(
    ("reports", "late"),
    [
        pytest.param([WAITS, WAITS, WAITS, BUSY], [3], id="not in a collective"),
        pytest.param([WAITS, replace(WAITS, step=6), WAITS, WAITS], [1], id="a step behind"),
        pytest.param([BUSY, replace(WAITS, step=6), WAITS, WAITS], [1], id="a step behind counts first"),
        pytest.param([BUSY, WAITS, replace(WAITS, state="T"), WAITS], [2], id="stopped counts before all"),
        pytest.param([WAITS, BUSY, BUSY, WAITS], [1, 2], id="two"),
        pytest.param([WAITS, WAITS, None, WAITS], [2], id="one says nothing"),
        pytest.param([WAITS, BUSY, None, WAITS], [1], id="one is ended before it says anything"),
        pytest.param([None, None, BUSY, None], [2], id="the launcher was faster than the other watchdogs"),
        pytest.param([BUSY, BUSY, BUSY, None], [3], id="on GPUs, one says nothing"),
        pytest.param([BUSY, BUSY, replace(BUSY, call="save (x.py:1)"), BUSY], [2], id="on GPUs"),
        pytest.param([WAITS, WAITS, WAITS, replace(WAITS, waiting="barrier")], [3], id="in another collective"),
        pytest.param([WAITS, WAITS, WAITS, WAITS], [], id="the network"),
        pytest.param([WAITS, WAITS] + [replace(WAITS, waiting="barrier")] * 2, [], id="half and half"),
    ],
)
def test_who_is_late(reports: list[Report | None], late: list[int]) -> None:
    assert late_ranks({rank: report for rank, report in enumerate(reports) if report})[0] == late


def line(*reports: Report | None) -> str:
    return hang_line({rank: report for rank, report in enumerate(reports) if report})


def test_the_line_names_rank_call_state_and_what_the_others_do() -> None:
    assert line(WAITS, WAITS, replace(WAITS, waiting="barrier"), replace(BUSY, state="T")) == (
        "no step was made for 20 s: rank 3 on n2 is late, at step 7 (step), "
        "in train_step (pretrain/engine_deepspeed.py:104), stopped (state T); "
        "the others wait for it in all_reduce, barrier"
    )
    assert line(WAITS, None, WAITS, WAITS) == (
        "no step was made for 20 s: rank 1 is late, killed or on a machine that is gone, without a word; "
        "the others wait for it in all_reduce"
    )
    assert line(WAITS, WAITS, WAITS, WAITS) == (
        "no step was made for 20 s: every rank is in all_reduce; none is seen to be late"
    )
    assert line(replace(BUSY, world=1)) == (
        "no step was made for 20 s: rank 0 on n2 is late, at step 7 (step), "
        "in train_step (pretrain/engine_deepspeed.py:104)"
    )
    assert "ranks 1 on n2 and 2 on n2 are late, at step 7 (step), in train_step" in line(WAITS, BUSY, BUSY, WAITS)
    many = [replace(report, world=9) for report in (WAITS, *[BUSY] * 8)]
    assert "ranks 1 on n2, 2 on n2, 3 on n2 and 5 more are late" in line(*many)
    assert "the others are in agree (pretrain/engine.py:108)" in line(
        *[replace(WAITS, waiting=None)] * 3, replace(BUSY, call=None)
    )


@pytest.mark.parametrize("state", ["D", "t", "S"])
def test_a_report_says_what_its_state_means(state: str) -> None:
    said = str(replace(BUSY, state=state))
    assert said.startswith("no beat for 20 s after that of step 7 (step), in train_step")
    assert (f"(state {state})" in said) == (state != "S")


def test_a_report_travels_as_an_error() -> None:
    assert Report.of({"exit_code": 1, "type": "Hang", "message": str(BUSY), **asdict(BUSY)}) == BUSY
