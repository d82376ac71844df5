"""The variables of a job's processes: Steppe's defaults, which a profile overrides. Names are torch 2.13's."""

from launch.cluster.profile import ClusterProfile
from pretrain.collective_timeout import COLLECTIVE_TIMEOUT, outlasting


def job_environment(profile: ClusterProfile, hang_seconds: float) -> dict[str, str]:
    """Variables whose values are taken as they are; the profile's own last. hang_seconds: the recipe's."""
    defaults = {
        # A rank whose collective fails or times out ends (3: without aborting its communicator first, which can hang),
        # and every rank leaves a record of the collectives that it had begun: the flight recorder, of so many.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        COLLECTIVE_TIMEOUT: f"{max(profile.collective_timeout_seconds, outlasting(hang_seconds)):g}",
        # Memory grows in place, so that blocks of a size nobody asks for again do not split it.
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        # Our packages have common names: no process of ours looks for them in the current folder.
        "PYTHONSAFEPATH": "1",
        # What a process said last is in its log when it dies.
        "PYTHONUNBUFFERED": "1",
        # The frozen code is not written to by a thousand ranks at once.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if profile.cpus_per_rank is not None:
        defaults["OMP_NUM_THREADS"] = str(profile.cpus_per_rank)
    if profile.network_interface is not None:
        defaults |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), profile.network_interface)
    return defaults | profile.environment


def job_folders(profile: ClusterProfile) -> dict[str, str]:
    """Variables whose values name others, which the batch script expands; less those that the profile sets itself.

    Compile caches lie on node-local disk: on a shared one a thousand ranks would wait for one another's locks.
    """
    folders = {
        "TORCH_FR_DUMP_TEMP_FILE": "$run/logs/flight_recorder_",  # to which torch adds the rank
        "TORCHINDUCTOR_CACHE_DIR": "$local_folder/inductor",
        "TRITON_CACHE_DIR": "$local_folder/triton",
        "TORCH_EXTENSIONS_DIR": "$local_folder/extensions",
    }
    return {name: folder for name, folder in folders.items() if name not in profile.environment}
