"""Processes that train together: joining them, and what they tell each other."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mixmo_fastai.errors import InputError, RunFailedError

LONGEST_WAIT = timedelta(minutes=30)
"""For another process, before it counts as lost."""


class Processes(NamedTuple):
    """The processes that train together.

    Attributes:
        rank: of this one.
        count: of all.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0


def started_processes() -> Processes:
    """Tell how many processes a launcher, such as torchrun, has started, and which this is."""
    rank, count = (int(os.environ.get(name) or "0") for name in ("RANK", "WORLD_SIZE"))
    return Processes(rank, max(1, count))


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Join the processes that were started together; with one alone, nothing is done.

    Args:
        device: of which kind each process has one.

    Raises:
        InputError: a package is missing, there are too few GPUs, or the launcher says too little.
        RunFailedError: another process was lost.
    """
    processes = started_processes()
    if processes.count == 1:
        yield processes
        return
    if find_spec("accelerate") is None:
        raise InputError(
            "Several processes need accelerate.\nInstall: pip install 'mixmo-fastai[distributed]'"
        )
    if "LOCAL_RANK" not in os.environ:
        raise InputError(
            "WORLD_SIZE is set, but not LOCAL_RANK, by which each process knows its place.\n"
            "Start them with torchrun or accelerate launch, or unset WORLD_SIZE."
        )
    on_gpu = device.type == "cuda"
    if on_gpu:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise InputError(
                f"Process {local} of this machine has no GPU: there are "
                f"{torch.cuda.device_count()}.\nStart as many processes as there are GPUs."
            )
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)
    try:
        yield processes
    except RuntimeError as error:
        if isinstance(error, RunFailedError) or not (lost := _LOST.search(str(error))):
            raise
        raise RunFailedError(
            f"A process that trains along was lost: {lost[0]}.\n"
            "What was saved before is as it was; start all of them again with --resume."
        ) from error
    finally:
        dist.destroy_process_group()


_LOST = re.compile(
    r"Connection (closed|reset|refused)[\w ]*|Broken pipe|[Tt]imed out|Timeout|timeout|"
    r"NCCL error|remote process exited|Socket"
)


def group() -> Processes:
    """Give the processes that have joined; one alone where none have."""
    if not dist.is_available() or not dist.is_initialized():
        return Processes()
    return Processes(dist.get_rank(), dist.get_world_size())


def told_by_first(value: Any) -> Any:
    """Give all processes what the first one has."""
    if group().count == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def done_by_first(action: Callable[[], Any]) -> Any:
    """Let the first process do something that the user's input may forbid.

    Returns:
        what it gave, in all processes.

    Raises:
        InputError, RunFailedError: it could not be done; in all processes.
    """
    result, error = None, None
    if group().is_first:
        try:
            result = action()
        except (InputError, RunFailedError) as refused:
            error = refused
    result, error = told_by_first((result, error))
    if error is not None:
        raise error
    return result


def gathered(value: Any) -> list[Any]:
    """Give all processes what each has, in order."""
    count = group().count
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    dist.all_gather_object(values, value)
    return values


@contextmanager
def first_before_others() -> Iterator[None]:
    """Let the first process go ahead, such as with what it leaves in a cache.

    What it finds wrong the others find as well.
    """
    own = group()
    if own.count > 1 and not own.is_first:
        dist.barrier()
    try:
        yield
    finally:
        if own.count > 1 and own.is_first:
            dist.barrier()


class Agreement:
    """Lets all processes act at the same step on what one of them wants.

    Each says at every step what it wants; what any of them wanted is known at the next one, so that
    no step waits for it. One process alone agrees with itself at once.
    """

    def __init__(self) -> None:
        self.on_the_way: tuple[Tensor, Any] | None = None
        self.channel = None
        if group().count > 1:
            self.channel = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)

    def on(self, *wanted: int) -> tuple[int, ...]:
        """Say what is wanted, as numbers; give the largest of each that any said a step before."""
        if self.channel is None:
            return wanted
        known = self.settled() or (0,) * len(wanted)
        message = torch.tensor(wanted)
        work = dist.all_reduce(message, dist.ReduceOp.MAX, group=self.channel, async_op=True)
        self.on_the_way = message, work
        return known

    def now(self, *wanted: int) -> tuple[int, ...]:
        """Give the largest of each that any said here or a step before; waits for all."""
        if self.channel is None:
            return wanted
        before = self.settled() or (0,) * len(wanted)
        self.on(*wanted)
        now = self.settled()
        assert now is not None
        return tuple(max(pair) for pair in zip(before, now, strict=True))

    def settled(self) -> tuple[int, ...] | None:
        """Give what was said last, and expect no more of it."""
        if self.on_the_way is None:
            return None
        (message, work), self.on_the_way = self.on_the_way, None
        work.wait()
        return tuple(message.tolist())
