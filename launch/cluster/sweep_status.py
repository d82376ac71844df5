"""The points of a sweep, side by side. No torch."""

import statistics
from pathlib import Path
from typing import Any

from launch.cluster.run_state import OVER
from launch.cluster.slurm import Slurm
from launch.cluster.slurm_view import SlurmView
from launch.cluster.status import SLURM_TIMEOUT_SECONDS, RunStatus, WatchedRun
from launch.cluster.sweep import Sweep


class WatchedSweep:
    """A sweep under observation. Slurm is asked once for all of its points. Raises ValueError if the folder is none."""

    def __init__(self, folder: Path) -> None:
        self.sweep = Sweep.read(folder)
        self.slurm = Slurm(SLURM_TIMEOUT_SECONDS)
        self.points = [WatchedRun(run.path, self.slurm) for run in self.sweep.runs]

    def look(self) -> list[RunStatus]:
        """Each point as it is now."""
        records = (point.record for point in self.points)
        ids = dict.fromkeys(record.job_id for record in records if record is not None and record.job_id is not None)
        view = SlurmView.of(list(ids), self.slurm)
        return [point.look(view) for point in self.points]

    def as_json(self, found: list[RunStatus]) -> dict[str, Any]:
        """What `--json` prints of a look."""
        notes = list(dict.fromkeys(note for one in found for note in one.notes if "Slurm" in note))
        return {
            "sweep": str(self.sweep.folder),
            "job_id": self.sweep.job_id,
            "notes": notes,
            "points": self.rows(found),
        }

    def rows(self, found: list[RunStatus]) -> list[dict[str, Any]]:
        """A row a point: its swept values and how far it is. best: the lowest validation loss, or, where a point has
        none, the lowest training loss; a point that failed is never the best."""
        rows: list[dict[str, Any]] = [
            {
                "point": point.name,
                "run": one.run,
                "values": point.values,
                "state": one.state,
                "why": one.why,
                "step": one.step,
                "total_steps": one.total_steps,
                "loss": one.loss,
                "validation_loss": None
                if one.validation is None
                else statistics.fmean(measures["loss"] for measures in one.validation["by_source"].values()),
            }
            for point, one in zip(self.sweep.points, found, strict=True)
        ]
        sound = [row for row in rows if row["state"] not in ("failed", "lost") and row["loss"] is not None]
        by = "validation_loss" if sound and all(row["validation_loss"] is not None for row in sound) else "loss"
        lowest = min((row[by] for row in sound), default=None)
        return [{**row, "best": row in sound and row[by] == lowest} for row in rows]

    @staticmethod
    def is_over(found: list[RunStatus]) -> bool:
        return all(one.state in OVER for one in found)
