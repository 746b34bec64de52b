"""Messages instead of tracebacks, and streams that nobody reads any more."""

import os
import subprocess
import sys

import pytest

from tests.runs import ROOT

PROGRAM = """
import sys
from pathlib import Path
from utils.core.errors import UserError, exit_status

def main():
    for number in range(3):
        print("a line", flush=True)
        print("another line", file=sys.stderr, flush=True)
    Path(sys.argv[1]).write_text("done")
    print("\u72ac", flush=True)
    return 0

status = exit_status(main)
sys.exit(status)
"""


def run(target, **options) -> subprocess.CompletedProcess:
    """Run the program, which writes a file at its end."""
    return subprocess.run([sys.executable, "-c", PROGRAM, str(target)], cwd=ROOT, timeout=60, **options)


def test_a_reader_that_has_gone_does_not_end_a_run(tmp_path):
    """As when `tee` is killed or `head` has seen enough."""
    reader, writer = os.pipe()
    os.close(reader)
    done = run(tmp_path / "file", stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "done"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_log_on_a_full_disk_does_not_end_a_run(tmp_path):
    """What cannot be written is dropped."""
    with open("/dev/full", "w") as full:
        done = run(tmp_path / "file", stdout=full, stderr=full)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "done"


def test_streams_that_are_closed_stay_out_of_the_runs_files(tmp_path):
    """A daemon has none; the next file that is opened must not get their numbers."""
    command = f'exec {sys.executable} -c "$0" {tmp_path / "file"} <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", command, PROGRAM], cwd=ROOT, timeout=60)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "done"


def test_letters_that_a_stream_lacks_are_written_as_their_codes(tmp_path):
    """Pipes of Windows know few."""
    done = run(tmp_path / "file", env=os.environ | {"PYTHONIOENCODING": "cp1252"}, capture_output=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == b"\\u72ac"
