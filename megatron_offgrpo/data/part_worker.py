"""One part of the input to rows of the store: parse, filter, label, select, tokenise."""

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_offgrpo.data.chat import chat_format
from megatron_offgrpo.data.decontamination import BenchmarkIndex
from megatron_offgrpo.data.filters import (
    Finding,
    group_finding,
    needs_token_counts,
    problem_finding,
    trajectory_findings,
)
from megatron_offgrpo.data.grading import GradingPool
from megatron_offgrpo.data.importers import meets, parse_conditions, parse_record
from megatron_offgrpo.data.judge import Judge, log_beside
from megatron_offgrpo.data.labelling import LabelCounts, LabelledGroup, label_groups
from megatron_offgrpo.data.readers import Part
from megatron_offgrpo.data.rejects import RecordError, Removal, reject_of
from megatron_offgrpo.data.selection import select
from megatron_offgrpo.data.store_schema import StoreRow
from megatron_offgrpo.data.tokenisation import Limits, load_tokenizer, token_counts, tokenise
from megatron_offgrpo.data.vocabulary import require_known_ids, vocabulary_of
from megatron_offgrpo.data_config import PrepareConfig
from megatron_offgrpo.types import GroupRecord

STAGES = ("read", "decontaminated", "labelled", "trajectories_filtered", "groups_filtered", "selected", "tokenised")
"""Within a part; groups and trajectories that are left are counted after each."""


@dataclass
class PartResult:
    """What one part gives; the lists are ordered by record."""

    rows: list[tuple[int, StoreRow]] = field(default_factory=list)
    """(number of the record in the part, row)."""
    rejected: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    removed: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    disagreements: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """`records`, `not_asked_for`, `not_selected`, `turns_inside` (responses that go on after an end of turn), and
    `groups after STAGE`, `trajectories after STAGE`."""
    ignored_fields: Counter[str] = field(default_factory=Counter)
    labels: LabelCounts = field(default_factory=LabelCounts)


class PartWorker:
    """Makes the rows of parts; holds the tokenizer, the benchmarks and the grading processes."""

    def __init__(self, config: PrepareConfig, pool: GradingPool) -> None:
        self.config, self.pool = config, pool
        self.chat = chat_format(load_tokenizer(Path(config.tokenizer)), config.chat_template_kwargs)
        self.judge = judge_of(config)
        self.vocabulary = vocabulary_of(config.tokenizer)
        self.conditions = parse_conditions(config.where)
        files = config.filters.decontaminate
        self.benchmarks = BenchmarkIndex(files, config.filters.decontaminate_words) if files else None

    def work(self, part: Part) -> PartResult:
        """The rows of one part, and everything that is left out of it."""
        result = PartResult()
        groups = self._parsed(part, result)
        _count(result, "read", groups)
        groups = [(index, group) for index, group in groups if not self._problem_removed(index, group, result)]
        _count(result, "decontaminated", groups)
        labelled = self._labelled(groups, result)
        _count(result, "labelled", [(index, one.group) for index, one in labelled])
        selected = self._selected(labelled, result)
        rows = tokenise(
            [one for _, one in selected],
            self.chat,
            Limits(self.config.max_prompt_tokens, self.config.max_response_tokens),
            self.pool.thinking,
        )
        for (index, one), row in zip(selected, rows, strict=True):
            if isinstance(row, RecordError):
                _reject(result, index, one.group, row)
            else:
                largest = max(max(ids, default=0) for ids in (row.prompt_ids, *row.response_ids))
                require_known_ids(largest, self.vocabulary, self.config.tokenizer, where=one.group.origin)
                result.rows.append((index, row))
                result.counts["groups after tokenised"] += 1
                result.counts["trajectories after tokenised"] += len(row.rewards)
                result.counts["turns_inside"] += sum(self.chat.end in ids[:-1] for ids in row.response_ids)
        return result

    def _parsed(self, part: Part, result: PartResult) -> list[tuple[int, GroupRecord]]:
        groups = []
        for index, (where, record) in enumerate(part.records()):
            result.counts["records"] += 1
            if not part.grouped and not meets(record, self.conditions):
                result.counts["not_asked_for"] += 1
                continue
            try:
                group = parse_record(
                    record,
                    result.ignored_fields,
                    form="groups" if part.grouped else self.config.format,
                    answer_required=self.config.labels == ("math-verify",),
                )
                groups.append((index, replace(group, origin=where)))
            except RecordError as error:
                name = record.get("group_id") if isinstance(record, dict) else None
                result.rejected.append((index, asdict(reject_of(where, name, error))))
        return groups

    def _problem_removed(self, index: int, group: GroupRecord, result: PartResult) -> bool:
        finding = problem_finding(group.problem, self.config.filters)
        if finding is None and self.benchmarks is not None:
            found = self.benchmarks.find(group.problem)
            if found is not None:
                finding = Finding("contaminated", found.overlap, found.partner)
        if finding is not None:
            _remove(result, index, group, None, finding)
        return finding is not None

    def _labelled(self, groups: list[tuple[int, GroupRecord]], result: PartResult) -> list[tuple[int, LabelledGroup]]:
        labelled = []
        found = label_groups([group for _, group in groups], self.config.labels, self.pool, self.judge)
        if self.judge is not None:
            result.counts.update({f"judge {name}": number for name, number in self.judge.counts.items()})
            self.judge.counts.clear()
        for (index, group), one in zip(groups, found, strict=True):
            if isinstance(one, RecordError):
                _reject(result, index, group, one)
            else:
                result.labels.add(one)
                result.disagreements += [(index, line) for line in one.disagreements()]
                labelled.append((index, one))
        return labelled

    def _selected(
        self, labelled: list[tuple[int, LabelledGroup]], result: PartResult
    ) -> list[tuple[int, LabelledGroup]]:
        config, chosen = self.config, []
        lengths = self._token_counts([one for _, one in labelled])
        for (index, whole), counts in zip(labelled, lengths, strict=True):
            findings = trajectory_findings(whole, config.filters, counts, config.max_response_tokens)
            for place, finding in findings.items():
                _remove(result, index, whole.group, place, finding)
            left = [place for place in range(len(whole.rewards)) if place not in findings]
            result.counts["trajectories after trajectories_filtered"] += len(left)
            result.counts["groups after trajectories_filtered"] += bool(left)
            finding_of_group = group_finding(whole.rewards, len(left), config.filters)
            if finding_of_group is not None:
                _remove(result, index, whole.group, None, finding_of_group)
                continue
            kept = whole.keep(left)
            _count(result, "groups_filtered", [(index, kept.group)])
            places = select(
                kept.rewards,
                config.trajectories_per_group,
                config.select,
                seed=config.seed,
                group_id=kept.group.group_id,
            )
            result.counts["not_selected"] += len(left) - len(places)
            kept = kept.keep(places)
            _count(result, "selected", [(index, kept.group)])
            chosen.append((index, kept))
        return chosen

    def _token_counts(self, labelled: list[LabelledGroup]) -> list[list[int] | None]:
        """Tokens of each response with its end, where a filter asks for them."""
        if not needs_token_counts(self.config.filters):
            return [None] * len(labelled)
        return list(token_counts(labelled, self.chat, self.pool.thinking))


def judge_of(config: PrepareConfig) -> Judge | None:
    """The judge of a request, whose model is known by now."""
    if config.judge is None:
        return None
    assert config.judge_model is not None
    return Judge(config.judge, config.judge_model, log_beside(config.output))


def _count(result: PartResult, stage: str, groups: list[tuple[int, GroupRecord]]) -> None:
    result.counts[f"groups after {stage}"] += len(groups)
    result.counts[f"trajectories after {stage}"] += sum(len(group.trajectories) for _, group in groups)


def _reject(result: PartResult, index: int, group: GroupRecord, error: RecordError) -> None:
    result.rejected.append((index, asdict(reject_of(group.origin, group.group_id, error))))


def _remove(result: PartResult, index: int, group: GroupRecord, trajectory: int | None, finding: Finding) -> None:
    removal = Removal(group.origin, group.group_id, trajectory, finding.reason, finding.detail, finding.partner)
    result.removed.append((index, asdict(removal)))
