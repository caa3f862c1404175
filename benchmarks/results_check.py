"""Names the benchmark results that were not measured with the code as it stands.

    python benchmarks/results_check.py [RESULTS_FOLDER]

Exit status 1 when there is one, 0 when every file is current. Standard library only.
"""

from __future__ import annotations

import json
import pathlib
import sys

from source_hash import ROOT, source_hash


def stale_results(folder: pathlib.Path, current: str) -> list[str]:
    """Returns one line for each .json file under `folder` whose "source" is not `current`, and for
    each record of a run of tests that failed."""
    lines = []
    for path in sorted(folder.rglob("*.json")):
        reason = _reason(path, current)
        if reason:
            lines.append(f"{path.relative_to(folder).as_posix()}: {reason}")
    return lines


def _reason(path: pathlib.Path, current: str) -> str | None:
    try:
        results = json.loads(path.read_bytes())
    except ValueError as error:
        return f"not a JSON file ({error})"
    source = results.get("source") if isinstance(results, dict) else None
    if source is None:
        return 'has no "source", so the code it measured is unknown'
    if source != current:
        return f"measured other code (of {results.get('date', 'an unknown date')}); run it again"
    if results.get("exit_status", 0) != 0:
        return f"records a run of tests that ended with status {results['exit_status']}"
    return None


def main(arguments: list[str]) -> int:
    """Prints the stale files and returns the exit status."""
    folder = pathlib.Path(arguments[0]) if arguments else ROOT / "benchmarks" / "results"
    stale = stale_results(folder, source_hash())
    print("\n".join(stale) if stale else f"{folder}: every result is of the current code")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
