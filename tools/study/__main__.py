"""Runs the study.

    python -m tools.study small|core|ablations [--root runs/study] [--workers 2] [--arm MODULE:NAME]

`small`: 2 seeds and 4 arms; the exit status is 1 where claim 1 (the all-positive bias adds) is not supported. `core`:
all arms, 5 seeds. `ablations`: variations of the released objective, each with a sweep of its own. Finished runs are
taken as they are. At the end come ROOT/study.json (study_small.json, ablations.json), the same as tables in .md,
plots in .svg and a page in .html.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_offgrpo.artifacts import write_json_atomically
from megatron_offgrpo.config_values import resolve_callable
from megatron_offgrpo.errors import ConfigError, OffgrpoError
from megatron_offgrpo.progress import say
from megatron_offgrpo.reporting.study_report import claim_row, markdown, plots, study_page
from recipes.study import ABLATIONS, ARMS, SMALL, Arm
from tools.study.analysis import summarise
from tools.study.runner import run_study
from tools.study.settings import StudySettings

SMALL_SEEDS, SMALL_LRS = (0, 1), (1e-4, 3e-4)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.study", description=__doc__.split("\n")[0])
    parser.add_argument("which", choices=("small", "core", "ablations"))
    parser.add_argument("--root", type=Path, default=Path("runs/study"))
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread; 0 runs in this one")
    parser.add_argument("--arm", action="append", default=[], help="MODULE:FUNCTION that returns one more Arm")
    options = parser.parse_args(arguments)
    try:
        extra = [_arm(name) for name in options.arm]
        settings, arms = plan_of(options.which, options.root)
        return study(settings, [*arms, *extra], which=options.which, workers=options.workers)
    except OffgrpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the runs that are finished", file=sys.stderr)
        return 130


def plan_of(which: str, root: Path) -> tuple[StudySettings, list[Arm]]:
    """Settings and arms of a study by name."""
    if which == "small":
        settings = StudySettings(root=root, seeds=SMALL_SEEDS, lrs=SMALL_LRS, extensions=0)
        return settings, [arm for arm in ARMS if arm.name in SMALL]
    if which == "core":
        return StudySettings(root=root), list(ARMS)
    return StudySettings(root=root), [*(arm for arm in ARMS if arm.name in ("base", "bias")), *ABLATIONS]


def _arm(name: str) -> Arm:
    arm = resolve_callable(name, where="--arm")()
    if not isinstance(arm, Arm):
        raise ConfigError("not an arm", where="--arm", expected="a function that returns an Arm", got=name)
    return arm


def study(settings: StudySettings, arms: Sequence[Arm], *, which: str, workers: int) -> int:
    """Runs, summarises and reports; the exit status.

    Raises:
        OffgrpoError: a stage or a run failed.
    """
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        twice = ", ".join(sorted({name for name in names if names.count(name) > 1}))
        raise ConfigError("two arms of one name", where="--arm", expected="another name", got=twice)
    started = time.perf_counter()
    results = run_study(settings, arms, workers=workers)
    summary = summarise(settings, arms, results, f"python -m tools.study {which}")
    name = {"small": "study_small", "core": "study", "ablations": "ablations"}[which]
    write_json_atomically(settings.root / f"{name}.json", summary)
    (settings.root / f"{name}.md").write_text(markdown(summary), encoding="utf-8")
    for plot, drawn in plots(summary).items():
        (settings.root / f"{name}_{plot}.svg").write_text(drawn, encoding="utf-8")
    page = settings.root / f"{name}.html"
    page.write_text(study_page(summary, f"Study: {which}"), encoding="utf-8")
    for claim in summary["claims"]:
        print(": ".join(filter(None, claim_row(claim))))
    say(f"report {page}   ({time.perf_counter() - started:.0f} s)")
    supported = {claim["claim"] for claim in summary["claims"] if claim["verdict"] == "supported"}
    return int(which == "small" and 1 not in supported)


if __name__ == "__main__":
    sys.exit(main())
