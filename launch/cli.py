"""The command line `steppe`: names the commands, and turns every error into one line and an exit code."""

import os
import sys
import traceback
from typing import Any, NoReturn

import typer
from typer.exceptions import TyperException

from launch.bench.app import app as bench
from launch.commands import checkpoint, convert, data, demo, evaluate, generate, plan, report, status, submit, train

app = typer.Typer(
    name="steppe",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Pretraining of causal decoder language models: from raw text to a checkpoint with a known perplexity.",
)
app.command("demo")(demo.demo)
app.add_typer(data.app, name="data")
app.command("train")(train.train)
app.command("resume")(train.resume)
app.command("submit")(submit.submit)
app.command("status")(status.status)
app.command("logs")(status.logs)
app.command("cancel")(status.cancel)
app.command("report")(report.report)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("export")(convert.export)
app.command("import")(convert.import_)
app.command("plan")(plan.plan)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(bench, name="bench")


def main() -> NoReturn:
    """Run the command line. Exit codes: 0 done, 75 stopped and checkpointed, 1 failed, 2 the input is wrong,
    130 ended by Ctrl-C with nothing to save."""
    # Our packages have common names (model, launch): no process of ours looks for them in the current folder.
    os.environ["PYTHONSAFEPATH"] = "1"
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        # Else typer would print its own errors, with the usage, on four lines.
        code = app(standalone_mode=False)
    except Exception as error:
        if debug:
            traceback.print_exc()
        sys.exit(explain(error))
    sys.exit(code if isinstance(code, int) else 0)


def explain(error: Exception) -> int:
    """Say on stderr, in one line, what went wrong; returns the exit code."""
    from pretrain.outcome import EXIT_FAILED, EXIT_WRONG_INPUT, exit_code_of

    if isinstance(error, TyperException):
        print(usage_error(error), file=sys.stderr)
        return EXIT_WRONG_INPUT
    code = exit_code_of(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    if code == EXIT_FAILED and not isinstance(error, OSError):
        text = f"{type(error).__name__}: {text} (run again with --debug for the traceback)"
    print(f"steppe: {text}", file=sys.stderr)
    return code


def usage_error(error: Any) -> str:
    """What is wrong with the words of a command, in one line; or its help, where that was all that there was to say."""
    said = error.format_message()
    if said.lstrip().startswith("Usage:"):
        return said
    command = f" (see {error.ctx.command_path} --help)" if getattr(error, "ctx", None) else ""
    return f"steppe: {' '.join((said + _given(error)).split())}{command}"


def _given(error: Any) -> str:
    """What was given for the option that an error is about, where the error does not say so and there is no doubt."""
    names = getattr(getattr(error, "param", None), "opts", [])
    values = [value for name, value in zip(sys.argv, sys.argv[1:], strict=False) if name in names]
    values += [value for name, equals, value in (word.partition("=") for word in sys.argv) if equals and name in names]
    return f", not {values[0]}" if len(values) == 1 and values[0] not in error.format_message().split("'") else ""


if __name__ == "__main__":
    main()
