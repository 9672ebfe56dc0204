"""Row jobs on Ray Data: the shards of :mod:`training.row_jobs`, shared out by Ray between workers on one machine or many.

Ray gets the numbers of shards and nothing else. A worker reads its rows from the source, and writes its shard, itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_artifacts.errors import InputError, MoeArtifactsError
from training.row_jobs import RowJob, missing_shards, open_folder, watch, write_shard

BLOCKS = 1_000  # of numbers, at most; results are seen a block at a time


def run_on_ray(job: RowJob, workers: int | None = None, cpus: float = 1, gpus: float = 0) -> None:
    """Make the shards that are not there yet on Ray Data, by workers that each hold the function once.

    Every machine of a cluster must see the source and the folder under the same paths.

    Args:
        workers: None: as many as the cluster has room for.
        cpus: Of each worker; torch takes as many threads.
        gpus: Of each worker; may be a fraction.
    Raises:
        InputError: If Ray is not installed, the cluster has no room for a worker, the folder holds another run, or shards
            could not be read or written.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("Ray Data is not installed: pip install 'moe-artifacts[scale]'") from error
    open_folder(job.folder, {**job.facts, "shards": job.shards})
    numbers = list(missing_shards(job.folder, job.shards))
    if not numbers:
        return
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        room = _room(ray.cluster_resources(), cpus, gpus)
        if room < 1:
            raise InputError(f"the cluster has no room for a worker of {cpus:g} CPUs and {gpus:g} GPUs")
        ray.data.DataContext.get_current().enable_progress_bars = False  # there is our own
        todo = ray.data.from_items(
            [{"number": number} for number in numbers], override_num_blocks=min(len(numbers), BLOCKS)
        )
        done = todo.map_batches(
            _RayWorker,
            fn_constructor_args=(job,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers or room, len(numbers))),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        watch(job, len(numbers), ((row["number"], row["error"] or None) for row in done.iter_rows()))
    finally:
        if started:
            ray.shutdown()


class _RayWorker:
    """One process of Ray's. Errors travel as text: an exception would take the whole job down."""

    def __init__(self, job: RowJob) -> None:
        self.job = job

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        [number] = batch["number"].tolist()
        error = ""
        try:
            write_shard(self.job.folder, number, self.job.shard(number))
        except (MoeArtifactsError, OSError) as found:
            error = str(found) or type(found).__name__
        return {"number": [number], "error": [error]}


def _room(resources: Mapping[str, float], cpus: float, gpus: float) -> int:
    """How many workers fit into a cluster."""
    asked = {"CPU": cpus, "GPU": gpus}
    return int(min((resources.get(name, 0) / amount for name, amount in asked.items() if amount), default=1))
