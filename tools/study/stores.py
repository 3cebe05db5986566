"""What all runs share: models, questions, stores of trajectories, the Megatron checkpoint and the references."""

import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_offgrpo.artifacts import MANIFEST, fingerprint_of, fingerprint_of_files, write_json_atomically
from megatron_offgrpo.config import PathsConfig
from megatron_offgrpo.data.prepare import prepare
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.data_config import LabelMode, PrepareConfig
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.evaluation.generate import GROUPS, GenerateConfig, generate
from megatron_offgrpo.evaluation.generation import BackendConfig
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.quickstart import Stages
from recipes.study import study
from tools.study.models import STUDENT, TEACHER, ModelSize, Upbringing, raise_model
from tools.study.problems import Split, make_questions, make_skill_questions, write_jsonl
from tools.study.settings import MAX_TOKENS, StudySettings

SOURCE = {"student": Path(__file__).with_name("problems.py"), "models": Path(__file__).with_name("models.py")}
SECONDS_FILE = "seconds.json"
SHARE_GROUPS = 96
"""Groups of each store of the ablation over all-positive shares."""
Record = dict[str, Any]


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


def as_records(store: TrajectoryStore) -> list[Record]:
    """The groups of a labelled store as input records with given rewards, members in the store's order."""
    records = []
    for number in range(store.num_groups):
        row = store.row(number)
        members = zip(row.texts, row.rewards, row.behaviour_logprobs, strict=True)
        records.append(
            {
                "group_id": row.group_id,
                "problem": row.problem,
                "answer": row.answer,
                "trajectories": [
                    {"text": text, "reward": reward, "logprobs": logprobs, "source": "teacher"}
                    for text, reward, logprobs in members
                ],
            }
        )
    return records


def without_logprobs(records: list[Record]) -> list[Record]:
    """The same trajectories from an unknown policy: mu = 0, as in the released code."""
    return [
        {**group, "trajectories": [{**one, "logprobs": None} for one in group["trajectories"]]} for group in records
    ]


def with_logprobs(records: list[Record]) -> list[Record]:
    """Without the few trajectories whose text does not give the sampled tokens back (an end sign in the middle)."""
    kept = [
        {**group, "trajectories": [one for one in group["trajectories"] if one["logprobs"] is not None]}
        for group in records
    ]
    return [group for group in kept if group["trajectories"]]


def with_rewards(records: list[Record], rewards: list[list[float]]) -> list[Record]:
    """The same trajectories with other rewards."""
    return [
        {
            **group,
            "trajectories": [{**one, "reward": reward} for one, reward in zip(group["trajectories"], row, strict=True)],
        }
        for group, row in zip(records, rewards, strict=True)
    ]


def rewards_of(records: list[Record]) -> list[list[float]]:
    """Rewards by group."""
    return [[one["reward"] for one in group["trajectories"]] for group in records]


def shuffled(rewards: list[list[float]], seed: int = 0) -> list[list[float]]:
    """A permutation of all rewards."""
    flat = [reward for row in rewards for reward in row]
    random.Random(f"shuffled:{seed}").shuffle(flat)
    values = iter(flat)
    return [[next(values) for _ in row] for row in rewards]


def wrong_lookup(rewards: list[list[float]]) -> list[list[float]]:
    """The released code's slip: problem p gets the rewards of problem floor(p / 8)."""
    return [list(rewards[number // 8]) for number in range(len(rewards))]


def flipped(rewards: list[list[float]], share: float, seed: int = 0) -> list[list[float]]:
    """Each label flipped with probability `share`."""
    rng = random.Random(f"noise:{share}:{seed}")
    return [[1.0 - reward if rng.random() < share else reward for reward in row] for row in rewards]


def of_share(records: list[Record], percent: int) -> list[Record]:
    """`SHARE_GROUPS` groups of which `percent` are all-positive, in the order of the records.

    Raises:
        DataError: too few of either kind.
    """
    wanted = {True: round(SHARE_GROUPS * percent / 100)}
    wanted[False] = SHARE_GROUPS - wanted[True]
    kept = []
    for group in records:
        kind = all(one["reward"] == 1 for one in group["trajectories"])
        if wanted[kind]:
            wanted[kind] -= 1
            kept.append(group)
    if any(wanted.values()):
        got = f"{wanted[True]} all-positive and {wanted[False]} other groups are missing"
        raise DataError("too few groups", where=f"store positive_{percent}", got=got, remedy="raise the pool")
    return kept


def build_store(settings: StudySettings, name: str, pool: list[Record]) -> TrajectoryStore:
    """The store called `name`, from the labelled teacher solutions.

    Raises:
        ConfigError: no such store.
    """
    output = settings.shared / "stores" / name
    core = pool[: settings.groups]
    kind, _, number = name.rpartition("_")
    if name == "own":
        folder = settings.shared / "own_groups"
        problems = settings.shared / "questions" / "core.jsonl"
        write_jsonl(problems, read_questions(questions_file(settings, "train"))[: settings.groups])
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
        records = of_share(without_logprobs(pool), int(number))
    else:
        raise ConfigError("no such store", where="arm.store", got=name)
    return make_store(settings, records, output, label="given")


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


def shared_fingerprint(settings: StudySettings) -> str:
    """Of the models that all runs start from or learn from."""
    return fingerprint_of(
        settings.run_key,
        fingerprint_of_files([folder(settings) / "model.safetensors" for folder in (student_folder, teacher_folder)]),
    )
