"""Local ranks: environment, failure of one, and signals that reach them."""

import signal
import subprocess
import sys
import time

from megatron_offgrpo.parallel.local import run_local


def test_every_rank_gets_its_place(tmp_path):
    code = (
        "import os,sys,pathlib; e=os.environ;"
        "pathlib.Path(sys.argv[1], e['RANK']).write_text(e['LOCAL_RANK']+e['WORLD_SIZE']+e['MASTER_PORT'])"
    )
    assert run_local([sys.executable, "-c", code, str(tmp_path)], 3) == 0
    contents = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert [text[:2] for text in contents] == ["03", "13", "23"]
    assert len({text[2:] for text in contents}) == 1


def test_one_failure_ends_the_others_with_its_status():
    code = "import os,sys,time; sys.exit(7) if os.environ['RANK']=='1' else time.sleep(60)"
    started = time.monotonic()
    assert run_local([sys.executable, "-c", code], 2) == 7
    assert time.monotonic() - started < 30


def test_a_signal_to_the_parent_reaches_every_rank(tmp_path):
    rank = (
        "import os,signal,sys,time,pathlib\n"
        "done=pathlib.Path(sys.argv[1],'done'+os.environ['RANK'])\n"
        "signal.signal(signal.SIGUSR1, lambda *_: (done.write_text('x'), sys.exit(0)))\n"
        "pathlib.Path(sys.argv[1],'ready'+os.environ['RANK']).write_text('x')\n"
        "time.sleep(60)\n"
    )
    parent = f"from megatron_offgrpo.parallel.local import run_local; import sys; sys.exit(run_local([sys.executable,'-c',{rank!r},{str(tmp_path)!r}],2))"  # noqa: E501
    process = subprocess.Popen([sys.executable, "-c", parent])
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready{n}").exists() for n in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 0
    assert all((tmp_path / f"done{n}").exists() for n in range(2))
