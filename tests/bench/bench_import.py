"""`import lrkit` over `import torch`, each in a fresh interpreter, interleaved."""

import subprocess
import sys

import harness

CODE = {"torch": "import torch", "lrkit": "import torch, lrkit", "all of lrkit": "import torch, lrkit; lrkit.attach"}


def main():
    arguments = harness.options()
    steps = {
        name: lambda code=code: subprocess.run([sys.executable, "-c", code], check=True) for name, code in CODE.items()
    }
    times = harness.interleaved(steps, round(9 * arguments.rounds), warmup=1)
    over = harness.ratio(times, "lrkit", "torch")
    rows = [
        harness.Row(
            what="import lrkit over import torch",
            target="at most +10%",
            measured=over.percent(),
            reached=over.median <= 1.1,
            values={"milliseconds": harness.milliseconds(times)},
        ),
        harness.Row(
            what="the same, with lrkit.attach looked up",
            target="",
            measured=harness.ratio(times, "all of lrkit", "torch").percent(),
            reached=None,
        ),
    ]
    harness.finish(rows, arguments)


if __name__ == "__main__":
    main()
