"""Makes the base student of the quick start: a small Qwen2 with its own tokenizer and a systematic weakness.

    python -m tools.base_student --output DIR [--steps 1000] [--seed 0]

trains it from scratch on word problems (`tools/word_problems.py`) whose solutions follow the keyword habit in half of
the inconsistent comparisons, so that it puts probability on both ways. The result ships in
`tools/assets/base_student`; the command with its defaults reproduces it: the same bytes on the same machine, elsewhere
the same accuracy within its interval.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from megatron_offgrpo.artifacts import atomic_folder
from megatron_offgrpo.errors import ConfigError, OffgrpoError
from megatron_offgrpo.progress import progress
from tools.word_problems import draw_problem, write_solution

SHIPPED = Path(__file__).resolve().parent / "assets" / "base_student"
HABIT = 0.5
"""Share of the inconsistent comparisons in which the demonstrations follow the keyword."""
VOCAB_SIZE = 421
"""Not a multiple of anything, so that tensor parallelism has to pad it; the exported vocabulary stays unpadded."""
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD_ID, EOS_ID = 0, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_POSITIONS = 1024
IGNORED = -100


def make_tokenizer(seed: int) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer (byte-level BPE, single digits) trained on the word problems' text; it encodes any text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(f"tokenizer:{seed}")
    corpus = ["system\nuser\nassistant\n"] * 4000
    for _ in range(4000):
        problem = draw_problem(rng, "train")
        corpus += [problem.text, write_solution(problem, rng)]
    trained.train_from_iterator(corpus, trainer)
    if trained.get_vocab_size() != VOCAB_SIZE:
        raise ConfigError("the tokenizer has another size", expected=VOCAB_SIZE, got=trained.get_vocab_size())
    parts = json.loads(trained.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=parts["vocab"],
        merges=[tuple(pair) for pair in parts["merges"]],
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
    )


def make_model(seed: int) -> Qwen2ForCausalLM:
    """An untrained student: 4 layers, hidden 128, 4 heads of 32 over 2 key-value heads, about 0.7 million weights."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
            use_cache=True,
        )
    )


def demonstration(tokenizer: Qwen2Tokenizer, rng: random.Random, habit: float) -> tuple[list[int], list[int]]:
    """(input ids, labels) of one new problem with a solution; the prompt's labels are ignored."""
    problem = draw_problem(rng, "train")
    messages = [{"role": "user", "content": problem.text}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer.encode(prompt)
    response_ids = [*tokenizer.encode(write_solution(problem, rng, habit=habit)), tokenizer.eos_token_id]
    return prompt_ids + response_ids, [IGNORED] * len(prompt_ids) + response_ids


def make_batch(
    tokenizer: Qwen2Tokenizer, rng: random.Random, size: int, habit: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input ids, attention mask, labels) of `size` demonstrations, each int64 [size, longest], padded on the right."""
    examples = [demonstration(tokenizer, rng, habit) for _ in range(size)]
    longest = max(len(ids) for ids, _ in examples)
    ids_BS = torch.zeros(size, longest, dtype=torch.long)
    mask_BS = torch.zeros(size, longest, dtype=torch.long)
    labels_BS = torch.full((size, longest), IGNORED)
    for row, (ids, labels) in enumerate(examples):
        ids_BS[row, : len(ids)] = torch.tensor(ids)
        mask_BS[row, : len(ids)] = 1
        labels_BS[row, : len(ids)] = torch.tensor(labels)
    return ids_BS, mask_BS, labels_BS


def make_optimizers(model: Qwen2ForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the layers, which halves the steps; AdamW for the rest.

    Args:
        lr: of Muon; AdamW's is a tenth of it.
    """
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, weight in model.named_parameters():
        inner = weight.ndim == 2 and not name.startswith(("model.embed_tokens", "lm_head"))
        (matrices if inner else others).append(weight)
    return [
        torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=lr / 10, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, *, steps: int, batch: int, lr: float, seed: int) -> None:
    """Supervised training on `steps` batches of new demonstrations; warm-up, then linear decay to a twentieth of lr."""
    optimizers = make_optimizers(model, lr)
    warmup, hold = steps // 20, steps // 3

    def factor(step: int) -> float:
        return min((step + 1) / (warmup + 1), 1 - 0.95 * max(0, step - hold) / (steps - hold))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    rng = random.Random(f"student:{seed}")
    model.train()
    with progress("base student", steps) as advance:
        for _ in range(steps):
            ids_BS, mask_BS, labels_BS = make_batch(tokenizer, rng, batch, HABIT)
            loss = model(input_ids=ids_BS, attention_mask=mask_BS, labels=labels_BS).loss
            model.zero_grad()
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            advance(1, f"loss {loss.item():.3f}")
    model.eval()


def make_base_student(output: Path, *, steps: int, batch: int, lr: float, seed: int) -> None:
    """Trains the student and writes a Hugging Face folder (bf16 safetensors, tokenizer, configuration)."""
    if steps < 1:
        raise ConfigError("must be at least 1", where="--steps", got=steps)
    tokenizer, model = make_tokenizer(seed), make_model(seed)
    train(model, tokenizer, steps=steps, batch=batch, lr=lr, seed=seed)
    with atomic_folder(output) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.base_student", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the Hugging Face model")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32, help="demonstrations in a step")
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch; the bytes of the result depend on it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        make_base_student(options.output, steps=options.steps, batch=options.batch, lr=options.lr, seed=options.seed)
    except OffgrpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
