"""The study's base student and its teacher: two small Llama models, trained from scratch on written demonstrations."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_offgrpo.artifacts import atomic_folder
from megatron_offgrpo.progress import progress
from tools.base_student import make_optimizers
from tools.study.problems import Style, draw_problem, draw_skill, vocabulary, write_solution

PAD, END, QUESTION, SOLUTION, UNKNOWN = "<pad>", "<end>", "<question>", "<solution>", "<unknown>"
SPECIAL = (PAD, END, QUESTION, SOLUTION, UNKNOWN)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<question> ' if message['role'] == 'user' else '<solution> ' }}"
    "{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}<solution>{% endif %}"
)
MAX_POSITIONS = 256
IGNORED = -100


@dataclass(frozen=True)
class Upbringing:
    """What a model is trained on before the study."""

    habit: tuple[dict[str, float], dict[str, float]]
    """Of level 1 and level 2: kind of trap -> share of demonstrations that follow the keyword."""
    worded_share: float
    """Share of the demonstrations in the `worded` style; the rest are `short`."""
    skill_share: float
    """Share of the demonstrations that show an unrelated skill."""


STUDENT = Upbringing(
    habit=({"is_more": 0.6, "is_fewer": 0.6}, {"is_more": 0.6, "is_fewer": 0.6}), worded_share=0.4, skill_share=0.3
)
"""Falls for most traps; knows the teacher's style, prefers its own."""
TEACHER = Upbringing(habit=({}, {"is_fewer": 0.08}), worded_share=0.95, skill_share=0.0)
"""Errs in one kind of trap of the harder level, and writes `worded` solutions."""


@dataclass(frozen=True)
class ModelSize:
    """Of both models."""

    hidden: int = 64
    layers: int = 3
    steps: int = 3000
    batch: int = 32
    lr: float = 0.02


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: whatever a model samples, its text has the sampled ids again."""
    words = [*SPECIAL, *vocabulary()]
    inner = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[QUESTION, SOLUTION],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_model(size: ModelSize, vocab_size: int, seed: int) -> LlamaForCausalLM:
    """An untrained model; with the default size 0.12 million weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=size.hidden,
            intermediate_size=2 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=SPECIAL.index(END),
            pad_token_id=SPECIAL.index(PAD),
            use_cache=True,
        )
    )


def demonstration(rng: random.Random, upbringing: Upbringing) -> tuple[str, str]:
    """(question, solution), from the training part of the problem space."""
    if rng.random() < upbringing.skill_share:
        question, solution, _ = draw_skill(rng, "train")
        return question, solution
    level = rng.randint(1, 2)
    problem = draw_problem(rng, "train", level)
    style: Style = "worded" if rng.random() < upbringing.worded_share else "short"
    return problem.text, write_solution(problem, rng, habit=upbringing.habit[level - 1], style=style)


Row = tuple[list[int], list[int]]
"""(input ids, labels); the prompt's labels are ignored."""
SORTED_BATCHES = 8
"""Batches drawn together and sorted by length, which saves a third of the padding."""


def demonstrations(ids: dict[str, int], rng: random.Random, size: int, upbringing: Upbringing) -> Iterator[list[Row]]:
    """Batches of `size` new demonstrations without end; those of a batch are about equally long."""
    while True:
        rows: list[Row] = []
        for _ in range(size * SORTED_BATCHES):
            question, solution = demonstration(rng, upbringing)
            prompt = [ids[word] for word in (QUESTION, *question.split(), SOLUTION)]
            response = [ids[word] for word in (*solution.split(), END)]
            rows.append((prompt + response, [IGNORED] * len(prompt) + response))
        rows.sort(key=lambda row: len(row[0]))
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        rng.shuffle(batches)
        yield from batches


def padded(rows: list[Row]) -> dict[str, torch.Tensor]:
    """The model's arguments, each int64 [rows, longest], padded on the right."""
    longest = max(len(row) for row, _ in rows)
    ids_BS = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BS = torch.zeros_like(ids_BS)
    labels_BS = torch.full_like(ids_BS, IGNORED)
    for place, (row, labels) in enumerate(rows):
        ids_BS[place, : len(row)] = torch.tensor(row)
        mask_BS[place, : len(row)] = 1
        labels_BS[place, : len(row)] = torch.tensor(labels)
    return {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": labels_BS}


def raise_model(output: Path, upbringing: Upbringing, size: ModelSize, seed: int) -> None:
    """Trains a model from scratch and writes a Hugging Face folder; warm-up, then linear decay."""
    tokenizer = make_tokenizer()
    ids = tokenizer.get_vocab()
    model = make_model(size, len(ids), seed)
    optimizers = make_optimizers(model, size.lr)
    warmup, hold = size.steps // 20, size.steps // 3

    def factor(step: int) -> float:
        return min((step + 1) / (warmup + 1), 1 - 0.98 * max(0, step - hold) / (size.steps - hold))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    batches = demonstrations(ids, random.Random(f"upbringing:{seed}"), size.batch, upbringing)
    model.train()
    with progress(f"raising {output.name}", size.steps) as advance:
        for _ in range(size.steps):
            loss = model(**padded(next(batches))).loss
            model.zero_grad()
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            advance(1, f"loss {loss.item():.3f}")
    model.eval()
    with atomic_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
