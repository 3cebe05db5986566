"""`offgrpo prepare`, `inspect` and `export`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from megatron_offgrpo.cli.options import (
    ChatTemplateKwargs,
    Force,
    JudgeModel,
    JudgeUrl,
    ThinkTags,
    json_object,
    print_lines,
)
from megatron_offgrpo.data_config import FormName


def prepare(
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="File (.jsonl, .json, .csv, each also .gz, .parquet), folder of a dataset, or hf:NAME; repeatable.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="HF folder with the student's tokenizer.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", help="Folder of the store.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="Start from a recipe for data in recipes/.")] = None,
    format: Annotated[FormName | None, typer.Option("--format")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split of a dataset.")] = None,
    where: Annotated[list[str] | None, typer.Option("--where", help="field=value of raw records; repeatable.")] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", help="math-verify, majority or given; repeated: in order of preference."),
    ] = None,
    select: Annotated[Literal["released", "balanced", "random"] | None, typer.Option("--select")] = None,
    trajectories_per_group: Annotated[int | None, typer.Option("--trajectories-per-group")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option("--max-prompt-tokens")] = None,
    max_response_tokens: Annotated[int | None, typer.Option("--max-response-tokens")] = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    think_tags: ThinkTags = None,
    validation_share: Annotated[float | None, typer.Option("--validation-share")] = None,
    seed: Annotated[int | None, typer.Option("--seed")] = None,
    min_pass_rate: Annotated[float | None, typer.Option("--min-pass-rate")] = None,
    max_pass_rate: Annotated[float | None, typer.Option("--max-pass-rate")] = None,
    min_trajectories: Annotated[int | None, typer.Option("--min-trajectories")] = None,
    min_response_tokens: Annotated[int | None, typer.Option("--min-response-tokens")] = None,
    drop_truncated: Annotated[bool | None, typer.Option("--drop-truncated")] = None,
    drop_without_answer: Annotated[bool | None, typer.Option("--drop-without-answer")] = None,
    duplicate_trajectories: Annotated[bool | None, typer.Option("--drop-duplicate-trajectories")] = None,
    duplicate_problems: Annotated[bool | None, typer.Option("--drop-duplicate-problems")] = None,
    near_duplicates: Annotated[
        float | None, typer.Option("--near-duplicates", help="Drop problems this similar (Jaccard, e.g. 0.8).")
    ] = None,
    decontaminate: Annotated[
        list[str] | None, typer.Option("--decontaminate", help="Benchmark file; repeatable.")
    ] = None,
    decontaminate_words: Annotated[int | None, typer.Option("--decontaminate-words")] = None,
    max_foreign_share: Annotated[float | None, typer.Option("--max-foreign-share")] = None,
    max_compression_ratio: Annotated[
        float | None, typer.Option("--max-compression-ratio", help="Drop looping responses (e.g. 12).")
    ] = None,
    max_all_positive_share: Annotated[float | None, typer.Option("--max-all-positive-share")] = None,
    judge: JudgeUrl = None,
    judge_model: JudgeModel = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="By default one for each CPU.")] = None,
    shard: Annotated[
        str | None, typer.Option("--shard", help="I/N: do this share of the parts; merge without it.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store made from other inputs.")] = False,
    force: Force = False,
) -> None:
    """Labels, filters, selects and tokenises solutions into a store; resumes where it was stopped."""
    given = {name: value for name, value in locals().items() if value is not None}
    from megatron_offgrpo.data import prepare as stage
    from megatron_offgrpo.data.summary import stage_lines
    from megatron_offgrpo.data_config import FilterConfig, PrepareConfig
    from megatron_offgrpo.recipe import load_data_recipe

    config = load_data_recipe(recipe) if recipe else PrepareConfig()
    filters = {name: _plain(value) for name, value in given.items() if hasattr(FilterConfig, name)}
    if chat_template_kwargs is not None:
        given["chat_template_kwargs"] = json_object("--chat-template-kwargs", chat_template_kwargs)
    renamed = {"input": "inputs", "label": "labels"}
    values = {renamed.get(name, name): _plain(value) for name, value in given.items() if name not in filters}
    config = replace(config, **{name: value for name, value in values.items() if hasattr(config, name)})
    config = replace(config, filters=replace(config.filters, **filters))
    if shard is not None:
        print_lines([stage.prepare_shard(config, parse_shard(shard))])
        return
    store = stage.prepare(config)
    lines = stage.summary_lines(store)
    if recipe:
        lines += ["", f"{'left after':<24}{'groups':>10}{'solutions':>12}", *stage_lines(store.manifest.counts)]
    print_lines(lines)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def parse_shard(text: str) -> tuple[int, int]:
    """(I, N) of `I/N`.

    Raises:
        ConfigError: not two whole numbers.
    """
    from megatron_offgrpo.errors import ConfigError

    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise ConfigError("not a shard", where="--shard", expected="I/N, for example 0/8", got=text)
    return int(index), int(count)


def inspect(
    store: Annotated[Path, typer.Argument(help="Folder of a store.")],
    group: Annotated[
        str | None, typer.Option("--group", help="Show one group, by id or number, token by token.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Needed by --group where the store's own folder has moved.")
    ] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option("--benchmark", help="Look for this benchmark's problems; repeatable.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Where the page goes; STORE/data.html.")] = None,
) -> None:
    """Audits a store: compositions, lengths, agreement of labels, duplicates, what each objective would use."""
    from megatron_offgrpo.data.store import TrajectoryStore

    opened = TrajectoryStore.open(store)
    if group is not None:
        from megatron_offgrpo.reporting.token_view import show_group

        show_group(opened, group, tokenizer)
        return
    from megatron_offgrpo.data.audit import audit
    from megatron_offgrpo.recipe import list_recipes
    from megatron_offgrpo.reporting.data_report import objective_uses, terminal_lines, write_data_report

    found = audit(opened, tuple(benchmark or ()))
    uses = objective_uses(opened, {name: function() for name, function in list_recipes().items()})
    page = write_data_report(opened, found, uses, html or store / "data.html")
    print_lines([*terminal_lines(opened, found, uses), str(page)])


def export(
    store: Annotated[Path, typer.Argument(help="Folder of a store.")],
    output: Annotated[Path, typer.Option("--output", help="Parquet file.")],
    format: Annotated[Literal["verl"], typer.Option("--format", help="verl/LUFFY's columns.")] = "verl",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Writes a store as Parquet that verl, LUFFY and `offgrpo prepare` read."""
    from megatron_offgrpo.data.export import export_verl
    from megatron_offgrpo.data.store import TrajectoryStore

    print_lines([export_verl(TrajectoryStore.open(store), output, overwrite=overwrite)])
