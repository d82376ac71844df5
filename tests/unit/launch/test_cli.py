"""The words of a command that are wrong: one line on stderr, and exit code 2."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train", "Missing argument 'recipe'. (see steppe train --help)"),
        ("train x --nproc two", "Invalid value for '--nproc': Input should be a valid integer"),
        (
            "bench train --rounds 0",
            "Invalid value for '--rounds': Input should be greater than or equal to 1, not 0 (",
        ),
        (
            "bench memory --nproc=0",
            "Invalid value for '--nproc': Input should be greater than or equal to 1, not 0 (",
        ),
        ("train x --bogus", "No such option: --bogus (see steppe train --help)"),
        ("nosuch", "No such command 'nosuch'. (see steppe --help)"),
    ],
)
def test_usage_errors_are_one_line(words: str, said: str) -> None:
    program = f"import sys; sys.argv = ['steppe', *{words.split()}]; from launch.cli import main; main()"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"steppe: {said}")


def test_help_is_no_error() -> None:
    program = "import sys; sys.argv = ['steppe', '--help']; from launch.cli import main; main()"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: steppe" in done.stdout


def test_help_loads_nothing_heavy() -> None:
    """What it takes the time for is known by what is imported; a second of torch or pydantic is not to creep in."""
    program = """
import sys
sys.argv = ["steppe", "--help"]
from launch.cli import main
try:
    main()
except SystemExit:
    print(*{"torch", "pydantic", "numpy", "rich", "yaml", "deepspeed", "jinja2"} & sys.modules.keys(), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "\n"
