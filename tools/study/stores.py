"""What all runs share: models, questions, stores of trajectories, the Megatron checkpoint and the references."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_offgrpo.artifacts import MANIFEST, fingerprint_of, fingerprint_of_files, write_json_atomically
from megatron_offgrpo.config import PathsConfig
from megatron_offgrpo.data.prepare import prepare
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.data_config import LabelMode, PrepareConfig
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.evaluation.generate import GROUPS, GenerateConfig, generate
from megatron_offgrpo.evaluation.generation import BackendConfig
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.progress import say
from megatron_offgrpo.quickstart import Stages
from recipes.study import study
from tools.study.models import STUDENT, TEACHER, ModelSize, Upbringing, raise_model
from tools.study.problems import Split, make_questions, make_skill_questions, write_jsonl
from tools.study.records import (
    SHARE_GROUPS,
    Record,
    as_records,
    flipped,
    of_share,
    rewards_of,
    shuffled,
    with_logprobs,
    with_rewards,
    without_logprobs,
    wrong_lookup,
)
from tools.study.settings import MAX_TOKENS, StudySettings

SOURCE = {"student": Path(__file__).with_name("problems.py"), "models": Path(__file__).with_name("models.py")}
SECONDS_FILE = "seconds.json"


def student_folder(settings: StudySettings) -> Path:
    """The base student, Hugging Face form."""
    return settings.shared / "base_hf"


def teacher_folder(settings: StudySettings) -> Path:
    """The teacher, Hugging Face form."""
    return settings.shared / "teacher_hf"


def questions_file(settings: StudySettings, name: str) -> Path:
    """A file of questions: train, test, validation, skills or validation_skills."""
    return settings.shared / "questions" / f"{name}.jsonl"


def read_questions(path: Path) -> list[Record]:
    """Its records."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def upbringing_key(upbringing: Upbringing, size: ModelSize) -> list[Any]:
    """What a model's weights depend on."""
    return [vars(upbringing), vars(size), fingerprint_of_files(sorted(SOURCE.values()))]


def raise_models(settings: StudySettings, which: str) -> None:
    """Trains the base student or the teacher, unless that is done."""
    upbringing, seed = {"student": (STUDENT, 0), "teacher": (TEACHER, 1)}[which]
    folder = {"student": student_folder, "teacher": teacher_folder}[which](settings)
    stages = Stages(settings.shared / which, force=False)
    stages.root.mkdir(parents=True, exist_ok=True)
    work = partial(raise_model, folder, upbringing, settings.size, seed)
    stages.run(which, f"the {which}", upbringing_key(upbringing, settings.size), [folder], work)


def write_questions(settings: StudySettings) -> None:
    """Writes all files of questions; they follow from the settings."""
    wanted: tuple[tuple[str, int, Split, Callable[..., list[Record]]], ...] = (
        ("train", settings.pool, "train", make_questions),
        ("test", settings.test, "test", make_questions),
        ("validation", settings.validation, "validation", make_questions),
        ("skills", settings.skills, "test", make_skill_questions),
        ("validation_skills", settings.validation_skills, "validation", make_skill_questions),
    )
    for name, count, split, make in wanted:
        write_jsonl(questions_file(settings, name), make(count, split, 0))


def rollouts(
    model: Path, problems: Path, output: Path, *, samples: int, seed: int, source: str, on_policy: bool
) -> list[Record]:
    """Solutions of a model with their log-probs, through `offgrpo generate`'s own function."""
    generate(
        GenerateConfig(
            model=model,
            problems=problems,
            output=output,
            samples=samples,
            temperature=1.0,
            top_p=1.0,
            max_tokens=MAX_TOKENS,
            seed=seed,
            source=source,
            on_policy=on_policy,
            backend=BackendConfig(model, backend="hf", precision="fp32"),
        )
    )
    return read_questions(output / GROUPS)


def make_store(
    settings: StudySettings, records: list[Record], output: Path, *, label: LabelMode = "math-verify"
) -> TrajectoryStore:
    """Trajectory groups as a store, through `offgrpo prepare`'s own function."""
    raw = output.with_name(f"{output.name}.jsonl")
    write_jsonl(raw, records)
    return prepare(
        PrepareConfig(
            inputs=(str(raw),),
            tokenizer=str(student_folder(settings)),
            output=str(output),
            labels=(label,),
            trajectories_per_group=settings.solutions,
            max_response_tokens=MAX_TOKENS,
            workers=1,
            overwrite=True,
        )
    )


def build_store(settings: StudySettings, name: str, pool: list[Record]) -> TrajectoryStore:
    """The store called `name`, from the labelled teacher solutions.

    Raises:
        ConfigError: no such store.
    """
    output = settings.shared / "stores" / name
    core = core_groups(settings)
    kind, _, number = name.rpartition("_")
    if name == "own":
        folder = settings.shared / "own_groups"
        problems = settings.shared / "questions" / "core.jsonl"
        write_jsonl(problems, core_questions(settings))
        made = rollouts(
            student_folder(settings),
            problems,
            folder,
            samples=settings.solutions,
            seed=1,
            source="own",
            on_policy=False,
        )
        return make_store(settings, without_logprobs(made), output)
    if name == "teacher_logged":
        return make_store(settings, core, output, label="given")
    plain = without_logprobs(core)
    if name == "teacher":
        records = plain
    elif name == "shuffled":
        records = with_rewards(plain, shuffled(rewards_of(plain)))
    elif name == "wrong_lookup":
        records = with_rewards(plain, wrong_lookup(rewards_of(plain)))
    elif kind == "noise":
        records = with_rewards(plain, flipped(rewards_of(plain), int(number) / 100))
    elif kind == "positive":
        records = of_share(without_logprobs(pool), int(number), SHARE_GROUPS)
    else:
        raise ConfigError("no such store", where="arm.store", got=name)
    return make_store(settings, records, output, label="given")


def core_groups(settings: StudySettings) -> list[Record]:
    """The labelled teacher solutions that every arm of the core study trains on or on whose problems it generates."""
    pool = read_questions(settings.shared / "pool.jsonl")
    if settings.all_positive_percent is None:
        return pool[: settings.groups]
    return of_share(pool, settings.all_positive_percent, settings.groups)


def core_questions(settings: StudySettings) -> list[Record]:
    """Their problems, as benchmark records."""
    return [
        {"id": group["group_id"], "problem": group["problem"], "answer": group["answer"]}
        for group in core_groups(settings)
    ]


def label_pool(settings: StudySettings) -> list[Record]:
    """Teacher solutions to all training problems, labelled; members in the released order."""
    groups = rollouts(
        teacher_folder(settings),
        questions_file(settings, "train"),
        settings.shared / "teacher_groups",
        samples=settings.solutions,
        seed=0,
        source="teacher",
        on_policy=False,
    )
    return as_records(make_store(settings, with_logprobs(groups), settings.shared / "stores" / "pool"))


def reference(settings: StudySettings, store: str) -> None:
    """The base student's log-probs of a store's trajectories."""
    from megatron_offgrpo.training.reference import compute_reference

    run = replace(study(), paths=shared_paths(settings, store))
    started = time.perf_counter()
    place = runtime.start(run.layout, seed=0)
    try:
        compute_reference(run, place, force=True)
    finally:
        runtime.stop()
    seconds = time.perf_counter() - started
    write_json_atomically(Path(run.paths.reference) / SECONDS_FILE, {"seconds": seconds})


def reference_seconds(settings: StudySettings, store: str) -> float:
    """How long the reference pass over a store took."""
    path = Path(shared_paths(settings, store).reference) / SECONDS_FILE
    return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])


def shared_paths(settings: StudySettings, store: str) -> PathsConfig:
    """Paths of what a run on `store` reads; plan and output are the run's own."""
    shared = settings.shared
    return PathsConfig(
        hf_model=str(student_folder(settings)),
        store=str(shared / "stores" / store),
        megatron=str(shared / "base_megatron"),
        reference=str(shared / "references" / store),
    )


def build_shared(settings: StudySettings, stores: tuple[str, ...], referenced: tuple[str, ...]) -> None:
    """Makes what is missing of all that runs share, after the models.

    Args:
        stores: names of the stores.
        referenced: those of them whose reference log-probs some objective reads.
    """
    from checkpoints_conversion import hf_to_megatron

    stages = Stages(settings.shared, force=False)
    models = fingerprint_of_files(
        [folder(settings) / "model.safetensors" for folder in (student_folder, teacher_folder)]
    )
    common = [settings.run_key, models]
    stages.run(
        "questions", "questions", common, [questions_file(settings, "skills")], lambda: write_questions(settings)
    )
    pool_file = settings.shared / "pool.jsonl"
    stages.run(
        "pool", "the teacher's solutions", common, [pool_file], lambda: write_jsonl(pool_file, label_pool(settings))
    )
    megatron = settings.shared / "base_megatron"

    def convert() -> None:
        hf_to_megatron(student_folder(settings), megatron, overwrite=True)

    stages.run("convert", "the base student for Megatron", common, [megatron], convert)
    pool = read_questions(pool_file)
    facts = teacher_facts(settings)
    say(f"teacher: {facts['accuracy']:.1%} right, {facts['all_positive_share']:.0%} of groups all right")
    for name in stores:
        manifest = settings.shared / "stores" / name / MANIFEST

        def build(name: str = name) -> None:
            build_store(settings, name, pool)

        stages.run(f"store {name}", f"the store {name}", common, [manifest], build)
        if name in referenced:
            done = settings.shared / "references" / name / SECONDS_FILE
            made_from = [common, TrajectoryStore.open(manifest.parent).manifest.fingerprint]
            stages.run(
                f"reference {name}", f"references of {name}", made_from, [done], partial(reference, settings, name)
            )


def teacher_facts(settings: StudySettings) -> dict[str, float]:
    """Accuracy of the teacher's solutions and share of all-positive groups, of the core study's problems."""
    rewards = rewards_of(core_groups(settings))
    return {
        "accuracy": float(np.mean([reward for row in rewards for reward in row])),
        "all_positive_share": float(np.mean([all(row) for row in rewards])),
    }


def shared_fingerprint(settings: StudySettings) -> str:
    """Of the models that all runs start from or learn from."""
    return fingerprint_of(
        settings.run_key,
        fingerprint_of_files([folder(settings) / "model.safetensors" for folder in (student_folder, teacher_folder)]),
    )
