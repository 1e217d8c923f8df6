"""``python -m loadgen.simulator --seed 7``: run one seed, or several, and say how it went.

A seed that fails prints what was broken, the newest part of its trace, and the command that
replays it. The same seed and the same code give the same run.
"""

import argparse
import sys
import traceback
from collections.abc import Mapping, Sequence

from loadgen.simulator.mesh import Mesh, replay_command
from loadgen.simulator.switch_mesh import CalmSwitchMesh, SwitchMesh

WORLDS: Mapping[str, type[Mesh]] = {"mesh": Mesh, "switch": SwitchMesh, "calm": CalmSwitchMesh}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadgen.simulator")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=1, help="this many seeds, counting up")
    parser.add_argument("--world", choices=tuple(WORLDS), default="mesh")
    parser.add_argument("--quiet", action="store_true", help="say nothing of runs that held")
    parser.add_argument("--trace", action="store_true", help="print the trace of good runs too")
    parser.add_argument("--trace-max", type=int, default=2000, help="lines of trace kept")
    arguments = parser.parse_args(argv)
    if arguments.runs < 1:
        parser.error(f"--runs {arguments.runs}: use 1 or more")
    failed = [
        seed
        for seed in range(arguments.seed, arguments.seed + arguments.runs)
        if not _run(
            seed,
            world=arguments.world,
            quiet=arguments.quiet,
            trace=arguments.trace,
            trace_max=arguments.trace_max,
        )
    ]
    if arguments.runs > 1:
        print(f"{arguments.runs - len(failed)} of {arguments.runs} seeds held")
        for seed in failed:
            print(f"seed {seed} failed; replay it: {replay_command(seed, arguments.world)}")
    return 1 if failed else 0


def _run(seed: int, *, world: str, quiet: bool, trace: bool, trace_max: int) -> bool:
    mesh = WORLDS[world](seed, trace_max=trace_max)
    try:
        outcome = mesh.run()
    except Exception:  # noqa: BLE001  # whatever a core raises is a find, and the hunt goes on
        print("\n".join(mesh.world.trace.lines()))
        traceback.print_exc(file=sys.stdout)
        print(f"digest={mesh.world.trace.digest}")
        print(f"seed {seed} failed; replay it: {replay_command(seed, world)}")
        return False
    if trace:
        print("\n".join(mesh.world.trace.lines()))
    if not quiet:
        print(" ".join(f"{f}={getattr(outcome, f)}" for f in outcome.__dataclass_fields__))
    return True


if __name__ == "__main__":
    raise SystemExit(main())
