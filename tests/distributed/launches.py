"""Launches parallel_cases.py with one, two and four processes, each after the one whose runs it resumes.

    python launches.py FOLDER MOST     MOST: processes of the last launch

conftest.py starts it with the session: most other tests use one core only. What the cases of a launch
returned, and which failed, is in FOLDER/launch_<processes>.json when it has ended.
"""

import json
import sys
from pathlib import Path

from conftest import LAUNCHES, ROOT, torchrun


def launch(processes: int, folder: Path) -> dict:
    """-> ``found``: results of cases; ``failed``: errors of others; ``outside``: an error of no case"""
    path, failed = folder / f"results_{processes}.jsonl", {}
    while True:
        run = torchrun(processes, ROOT / "tests" / "distributed" / "parallel_cases.py", folder)
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found = {line["case"]: line["result"] for line in lines if "result" in line}
        before = failed.keys()
        failed = {line["case"]: run.stderr[-4000:] for line in lines if line["case"] not in found}
        failed |= {line["case"]: line["error"] for line in lines if "error" in line}
        # an error ends a launch, since the other processes would wait for the lost one; go on after that case
        if run.returncode == 0 or not failed.keys() - before:
            outside = run.stderr[-6000:] if run.returncode else ""
            return {"found": found, "failed": failed, "outside": outside}


def main(folder: Path, most: int) -> None:
    for processes in LAUNCHES:
        if processes <= most:
            result = folder / f"launch_{processes}.part"
            result.write_text(json.dumps(launch(processes, folder)))
            result.rename(result.with_suffix(".json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
