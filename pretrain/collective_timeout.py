"""How long a rank waits for the others in a collective operation: longer than the watchdog, which can say who is late.
No torch."""

from pretrain.watchdog import START_SECONDS

# An environment variable of ours, seconds: torch takes the time-out only as an argument.
COLLECTIVE_TIMEOUT = "STEPPE_COLLECTIVE_TIMEOUT_SECONDS"
MARGIN_SECONDS = 120.0  # for watchdogs to report before a collective gives up


def outlasting(hang_seconds: float) -> float:
    """Seconds after which the watchdogs of a run with this `health.hang_seconds` have had their say; 0 without any."""
    return max(hang_seconds, START_SECONDS) + MARGIN_SECONDS if hang_seconds else 0.0
