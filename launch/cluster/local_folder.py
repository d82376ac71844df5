"""A node's local folder (`local_folder` of the profile): compiled code lies in it, which its processes load and run."""

import os
import stat
from pathlib import Path

from launch.cluster.container import LOCAL_FOLDER


def problem_of_local_folder() -> str:
    """Make this node's local folder for this user alone, where it is not there yet; what is wrong with it, or "".

    Its name can be guessed: whoever made it before could have put code there.
    """
    if LOCAL_FOLDER not in os.environ:
        return ""
    path = Path(os.environ[LOCAL_FOLDER])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        owners = {path.lstat().st_uid, path.stat().st_uid}  # of a link, and of what it leads to
        mode = path.stat().st_mode
    except OSError as error:
        return f"local_folder {path}: {error.strerror}"
    if owners != {os.geteuid()}:
        others = ", ".join(str(owner) for owner in sorted(owners - {os.geteuid()}))
        return f"local_folder {path} belongs to another user (id {others}), whose code could run in its place"
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"local_folder {path} can be written by others (mode {stat.S_IMODE(mode):o}): their code could run"
    return ""
