"""Files that come with Steppe and have a name there: recipes, and profiles of clusters."""

from pathlib import Path


def named_file(word: str, folder: Path, kind: str) -> Path:
    """The file that a word of the command line means: a path, or the name (without .yaml) of one in `folder`.

    kind: what such a file is, in the error. Raises ValueError listing the names.
    """
    path, built_in = Path(word), folder / f"{word}.yaml"
    if path.is_file():
        return path
    if built_in.is_file():
        return built_in
    names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    raise ValueError(f"{word}: no such file, and no {kind} of that name; {kind}s are {names}")
