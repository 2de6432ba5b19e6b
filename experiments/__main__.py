"""The door to the experiments that stand behind the claims, nearly all on the embedded worlds. [ours]

    python -m experiments worst minority         some of them, in this order
    python -m experiments all --quick            all of the embedded worlds in miniature, five minutes on one core
    python -m experiments chat                   with a chat model, which must be here or on the hub

results/README.md draws conclusions. A stopped experiment goes on where it was. requirements-dev.txt is needed (SciPy).
"""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

from experiments import extensions, toy
from experiments.lab import conduct

EXPERIMENTS = toy.EXPERIMENTS | extensions.EXPERIMENTS
with suppress(ImportError):  # requirements-nodes.txt
    from experiments import privacy

    EXPERIMENTS |= privacy.EXPERIMENTS
EMBEDDED = [name for name in EXPERIMENTS if not name.startswith(("chat", "privacy"))]  # need nothing further


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m experiments", description=__doc__.split("\n")[0], allow_abbrev=False)
    listed = f"all, or some of {', '.join(EXPERIMENTS)}"
    parser.add_argument("names", nargs="+", metavar="NAME", choices=("all", *EXPERIMENTS), help=listed)
    parser.add_argument("--quick", action="store_true", help="in miniature, to runs/quick: the figures mean nothing")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of one thread each")
    options = parser.parse_args(arguments)
    for name in dict.fromkeys(chain(*(EMBEDDED if name == "all" else [name] for name in options.names))):
        experiment = EXPERIMENTS[name].miniature() if options.quick else EXPERIMENTS[name]
        conduct(name, experiment, Path("runs/quick" if options.quick else "results"), options.workers)


if __name__ == "__main__":
    main()
