"""Record the goldens again:  python tests/golden/record.py [what pytest shall select, such as -k losses]

It runs test_golden.py with RECORD_GOLDENS=1: every `goldens.check` writes what it would have compared.
A part can be recorded alone, but a file has the numbers of one machine: on another one, all its parts are
recorded together.

When that is allowed:

- Text was changed on purpose (an error message, a note, a new flag): record, and read the diff line by line.
  Only lines that were meant to change may change, and no number may.
- Numbers were changed on purpose (another draw, another order, another seed): the commit says which and why,
  it changes nothing else, and only the cases that have to do with it change.
- A library's version was raised, or the goldens move to another machine: the code is that of the commit
  before, so that all differences are the machine's. First see that they lie within the tolerance.
- A checkpoint stands for those that users have, and they cannot record theirs again. So it is
  NOT recorded again because the program cannot read it any more; only where the numbers it is compared
  with have changed by one of the reasons above: RECORD_CHECKPOINTS=1 python tests/golden/record.py.

Never to make a red test green: a move of code changes no golden.
"""

import os
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    os.environ["RECORD_GOLDENS"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(pytest.main([str(Path(__file__).resolve().parent / "test_golden.py"), "-q", *sys.argv[1:]]))
