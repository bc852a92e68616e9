"""All rows of all benchmarks in one table, and one JSON beside it: ``report.py FOLDER``."""

import json
import sys
from pathlib import Path

import harness


def main():
    folder = Path(sys.argv[1])
    parts = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("bench_*.json"))}
    rows = [harness.Row(**row) for part in parts.values() for row in part["rows"]]
    machine = next(iter(parts.values()))["machine"] if parts else {}
    print("\n" + ", ".join(f"{key}: {value}" for key, value in machine.items()))
    print(harness.table(rows))
    aimed = [row.reached for row in rows if row.reached is not None]
    print(f"{sum(aimed)} of {len(aimed)} targets reached")
    (folder / "all.json").write_text(json.dumps(parts, indent=1) + "\n")


if __name__ == "__main__":
    main()
