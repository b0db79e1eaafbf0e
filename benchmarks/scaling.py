"""How the partition's time and memory grow, and whether many ranks come to what one does.

    python -m benchmarks.scaling                                     # growth with N, C and D, and 1 against 2 processes
    python -m benchmarks.scaling --only samples --samples 10000 40000
    python -m benchmarks.scaling --only fits rounds                  # up to a million, with the callbacks and without
    python -m benchmarks.scaling --only memory                       # of a rank, of 1 and of 2 processes
    python -m benchmarks.scaling --simulate 64 --samples 100000      # 64 ranks, each a thread with its share
    python -m benchmarks.scaling --write scaling.md --json scaling.json --figure scaling.png

The evidence is drawn (:mod:`benchmarks.synthetic`): its cost is that of a real one, its quality says nothing. Every
measurement with more than one size is taken in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rank_memory import held_bytes, of_memory, over_gloo
from benchmarks.scaling_fits import ROUNDS, of_fit, of_rounds
from benchmarks.scaling_tables import figure, tables
from benchmarks.simulated import SimulatedRanks
from benchmarks.synthetic import evidence, share_of
from lightning_unlearn.evidence.by_index import IndexedEvidence
from lightning_unlearn.evidence.rank_share import Ranks
from lightning_unlearn.evidence.training_dynamics import PHASES, TrainingDynamics
from lightning_unlearn.functional.mixture import fit_mixture
from lightning_unlearn.functional.sensitivity import regression_sums, solve_sensitivity
from lightning_unlearn.functional.standardization import standardize
from lightning_unlearn.partitioning.build import CleanCriteria, build_partition
from lightning_unlearn.partitioning.label_scores import ShardResult
from lightning_unlearn.recipes import get_recipe
from lightning_unlearn.recipes.evidence import Evidence
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.utilities.files import replacing, write_json
from lightning_unlearn.utilities.reduce import Reduce, no_reduce

SAMPLES = (10_000, 40_000, 160_000, 640_000, 1_280_000)
IN_FITS = (10_000, 100_000, 1_000_000)
CLASSES = (10, 100, 1_000, 10_000)
NEURONS = (64, 256, 1_024, 4_096)
_OF_CLASSES, _OF_NEURONS = 10_000, 10_000
_BATCH = 256
PARTS = ("samples", "classes", "neurons", "fits", "rounds", "processes", "memory", "simulated")
Row = dict[str, Any]


def seconds_of(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work returns, and this process's processor seconds; the clock would count what else the machine does."""
    started = time.process_time()
    made = work()
    return made, time.process_time() - started


def partition_of(share: Evidence, label: Tensor, reduce: Reduce, recipe: str = "auto") -> Partition:
    """What the callback makes of one rank's share of the evidence."""
    verdict = get_recipe(recipe).function(share, reduce)
    judged = [ShardResult(share, share.weight, verdict)]
    return build_partition(
        judged, label, CleanCriteria(0.85, 0.1), reduce, recipe=recipe, layer="head", epoch=PHASES, fingerprint=""
    )


# What is measured, each in a process of its own


def of_samples(total: int, num_classes: int) -> Row:
    """What N samples cost one process that holds all of them."""
    whole = evidence(total, num_classes)
    trajectory = TrainingDynamics(total, num_classes)
    order = torch.randperm(total)
    logits = whole.attribution[:, -1] @ whole.basis.T if total * num_classes <= 2**26 else None

    def observe() -> None:
        for rows in order.split(_BATCH):
            some = whole.attribution[rows, -1] @ whole.basis.T if logits is None else logits[rows]
            trajectory.observe(rows, some, whole.label[rows])

    _, observing = seconds_of(observe)
    _, merging = seconds_of(lambda: trajectory.merge(0, no_reduce))
    held = [value for name, value in vars(trajectory).items() if isinstance(value, Tensor) and name != "basis"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verdict, judging = seconds_of(lambda: get_recipe("auto").function(whole, no_reduce))
    judged = [ShardResult(whole, whole.weight, verdict)]
    cut = CleanCriteria(0.85, 0.1)
    made, assembling = seconds_of(
        lambda: build_partition(
            judged, whole.label, cut, no_reduce, recipe="auto", layer="head", epoch=PHASES, fingerprint=""
        )
    )
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "samples": total,
        "classes": num_classes,
        "observe": observing,
        "merge": merging,
        "judge": judging,
        "assemble": assembling,
        "state_bytes": sum(value.nbytes for value in held) / total,
        "judge_bytes": more * 1024 / total,
        "noise_rate": made.noise_rate,
    }


def of_neurons(total: int, neurons: int) -> Row:
    """What D neurons cost: the regression of the pruning, and the paper's mixture on the attributions."""
    torch.manual_seed(0)
    clean = (torch.rand(total) < 0.7).float()
    activations = torch.randn(total, neurons) + clean.unsqueeze(1) * torch.linspace(-0.5, 0.5, neurons)

    def sums() -> Any:
        parts = zip(activations.split(_BATCH), clean.split(_BATCH), strict=True)
        found = [regression_sums(x, y, torch.ones(len(x))) for x, y in parts]
        whole = found[0]
        for one in found[1:]:
            whole = whole + one
        return whole

    gathered, summing = seconds_of(sums)
    _, solving = seconds_of(lambda: solve_sensitivity(gathered))
    weight = torch.ones(total)
    mixture, mixing = seconds_of(lambda: fit_mixture(standardize(activations, weight), weight))
    return {
        "samples": total,
        "neurons": neurons,
        "regression sums": summing,
        "regression solved": solving,
        "mixture": mixing,
        "mixture steps": mixture.n_iter,
    }


def of_processes(total: int, num_classes: int, rank: int, world_size: int, port: int, sender: Any) -> None:
    """The judging of one rank of several real processes over gloo."""
    torch.set_num_threads(1)
    ranks = over_gloo(rank, world_size, port)
    whole = evidence(total, num_classes)
    share = share_of(whole, rank, world_size)
    torch.distributed.barrier()
    started = time.perf_counter()
    made = partition_of(share, whole.label, ranks.reduce)
    seconds = time.perf_counter() - started
    torch.distributed.destroy_process_group()
    if rank == 0:
        sender.send((seconds, made.noise_rate))


# Ranks


def gathered_by(whole: Evidence, ranks: Ranks) -> tuple[TrainingDynamics, int]:
    """What one rank holds after training steps that showed it a part of the samples, another one in each epoch.

    Args:
        whole: of all samples.
        ranks: of which it is one.

    Returns:
        its own samples' evidence, and the most bytes that it has held between two epochs.
    """
    by_index, total, most = IndexedEvidence(), len(whole.index), 0
    by_index.start(ranks, total, 1)
    trajectory = TrainingDynamics(by_index.rows, whole.num_classes)
    if ranks.number > 1:
        trajectory.rest()
    for phase in range(PHASES):
        order = torch.randperm(total, generator=torch.Generator().manual_seed(phase))
        for rows in order[ranks.rank :: ranks.number].split(16 * _BATCH):
            by_index.note(trajectory, rows, whole.attribution[rows, phase] @ whole.basis.T, whole.label[rows])
        most = max(most, held_bytes(by_index, trajectory))
        by_index.hand_over(trajectory)
        trajectory.merge(phase, ranks.reduce)
    return trajectory, most


def apart(own: TrainingDynamics, whole: TrainingDynamics, ranks: Ranks) -> float:
    """The largest difference of what a rank holds of its own samples and what one process holds of them."""
    index = torch.arange(ranks.rank, len(whole), ranks.number)
    rows = torch.arange(len(index))
    ours = [*own.phases(rows), *own.scores(rows).values()]
    theirs = [*whole.phases(index), *whole.scores(index).values()]
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def simulate(world_size: int, total: int, num_classes: int, recipe: str = "auto") -> Row:
    """Runs the sharded partition with so many ranks, a thread each, and holds it against that of one rank.

    Args:
        world_size: R.
        total: N.
        num_classes: C.
        recipe: by name.

    Returns:
        how far the two are apart, how much evidence the largest rank holds, and how much each had to send.
    """
    whole = evidence(total, num_classes)
    alone = partition_of(whole, whole.label, no_reduce, recipe)
    ranks = SimulatedRanks(world_size)
    trajectory, of_one = gathered_by(whole, Ranks())

    def gather(rank: int) -> tuple[float, int]:
        held, most = gathered_by(whole, ranks.of(rank))
        return apart(held, trajectory, ranks.of(rank)), most

    off, held = zip(*ranks.run(gather), strict=True)
    # Sums that a sample's evidence takes; the rest are of the judging.
    gathering, ranks.collectives, ranks.bytes = ranks.bytes, 0, 0
    first, *others = ranks.run(
        lambda rank: partition_of(share_of(whole, rank, world_size), whole.label, ranks.reduce, recipe)
    )
    return {
        "ranks": world_size,
        "samples": total,
        "classes": num_classes,
        "recipe": recipe,
        "suspects": int((~first.is_clean).sum()),
        "all ranks equal": all(one.clean_probability.equal(first.clean_probability) for one in others),
        "largest difference of what was gathered": max(off),
        "evidence, bytes per sample": max(held) * world_size / total,
        "evidence, of one process": of_one / total,
        "bytes handed over per rank and epoch": ranks.handed_over / world_size / PHASES,
        "bytes summed per rank and epoch": gathering / PHASES,
        "largest difference of p(clean)": (first.clean_probability - alone.clean_probability).abs().max().item(),
        "samples that changed sides": int((first.is_clean != alone.is_clean).sum()),
        "difference of the noise rate": abs((first.noise_rate or 0) - (alone.noise_rate or 0)),
        "collectives": ranks.collectives,
        "bytes summed per rank": ranks.bytes,
    }


def agrees(row: Row) -> bool:
    """Whether the ranks came to what one rank did."""
    off = max(row["largest difference of p(clean)"], row["largest difference of what was gathered"])
    return bool(row["all ranks equal"] and off <= 1e-4 and not row["samples that changed sides"])


# Putting it together


def in_a_process(work: Callable[..., Row], *arguments: Any) -> Row:
    """What the work returns in a process of its own, with one thread."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as pool:
        row = pool.apply(work, arguments)
    # As they come, since the large ones take long.
    print(row, file=sys.stderr, flush=True)
    return row


def in_processes(work: Callable[..., None], total: int, num_classes: int, world_size: int, turn: int = 0) -> Any:
    """What rank 0 of so many real processes sends."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    port = 29_600 + (turn * 7 + world_size) % 300
    ranks = [
        context.Process(target=work, args=(total, num_classes, rank, world_size, port, sender))
        for rank in range(world_size)
    ]
    for one in ranks:
        one.start()
    # Its other end is the processes' alone, so that one that fails is noticed.
    sender.close()
    found = receiver.recv()
    for one in ranks:
        one.join()
    return found


def over_processes(total: int, num_classes: int, repeats: int) -> list[Row]:
    """Seconds on the clock of one process and of two, in turns."""
    times: dict[int, list[float]] = {1: [], 2: []}
    for repeat in range(repeats):
        for world_size in times:
            times[world_size].append(in_processes(of_processes, total, num_classes, world_size, repeat)[0])
    return [
        {"processes": n, "samples": total, "classes": num_classes, "seconds": statistics.median(taken), "all": taken}
        for n, taken in times.items()
    ]


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES)
    parser.add_argument("--in-fits", type=int, nargs="+", default=IN_FITS, help="samples of whole fits")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="epochs of the fit with a partition after each")
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    parser.add_argument("--neurons", type=int, nargs="+", default=NEURONS)
    parser.add_argument("--repeats", type=int, default=3, help="of one against two processes")
    parser.add_argument("--simulate", type=int, metavar="R", help="only hold R simulated ranks against one")
    parser.add_argument("--write", type=Path, help="the tables as Markdown")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path, help="log-log, .png or .svg")
    return parser.parse_args(given)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """All that was asked for."""
    torch.set_num_threads(1)
    if args.simulate:
        return {"simulated": [simulate(args.simulate, args.samples[0], args.classes[0])]}
    found: dict[str, Any] = {
        "date": str(datetime.datetime.now(tz=datetime.timezone.utc).date()),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "command": " ".join(["python -m benchmarks.scaling", *sys.argv[1:]]),
    }
    few, largest, in_order = args.classes[0], max(args.samples), sorted(args.samples)
    parts: dict[str, Callable[[], Any]] = {
        "samples": lambda: [in_a_process(of_samples, total, few) for total in args.samples],
        "classes": lambda: [in_a_process(of_samples, min(_OF_CLASSES, largest), classes) for classes in args.classes],
        "neurons": lambda: [in_a_process(of_neurons, min(_OF_NEURONS, largest), number) for number in args.neurons],
        "fits": lambda: [in_a_process(of_fit, total, has) for total in args.in_fits for has in (False, True)],
        "rounds": lambda: in_a_process(of_rounds, args.rounds),
        "processes": lambda: over_processes(in_order[len(in_order) // 2], few, args.repeats),
        "memory": lambda: [in_processes(of_memory, largest, few, world_size, 31) for world_size in (1, 2)],
        "simulated": lambda: [simulate(ranks, in_order[min(1, len(in_order) - 1)], few) for ranks in (2, 8, 64)],
    }
    found |= {name: work() for name, work in parts.items() if name in args.only}
    return found


def main(given: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    args = arguments(given)
    found = measured(args)
    text = tables(found)
    print(text.strip())
    if args.write:
        with replacing(args.write) as file:
            file.write(f"{text.strip()}\n".encode())
    if args.json:
        write_json(args.json, found)
    if args.figure:
        figure(found, args.figure)
    if not all(agrees(row) for row in found.get("simulated", [])):
        raise SystemExit("The ranks do not come to what one rank does.")


if __name__ == "__main__":
    main()
