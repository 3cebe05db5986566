"""A tiny tokenizer with a chat template, and tiny input files."""

import gzip
import json

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EOS = "<|end|>"
SPECIAL = ["<|pad|>", EOS, "<|system|>", "<|user|>", "<|assistant|>"]


def save_tokenizer(folder, *, chat_template=TEMPLATE, eos=EOS, corpus=("0123456789 + = answer is \\boxed{}",)):
    """A byte-level BPE tokenizer: every text has ids, and a text of n ASCII characters has at most n."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token=eos, pad_token="<|pad|>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


SPECIAL_PIECES = ["<unk>", *SPECIAL]
SENTENCES = (
    "The sum is 3 and 4. Then the sum is seven. So the answer is \\boxed{7}. Why? I think 1 + 1 = 2\n[I] U: A: [/I]"
)


def save_sentencepiece(folder, kind, chat_template, eos=EOS):
    """A tokenizer that puts a space before a text.

    Args:
        kind: `everywhere` before every section between special tokens, as Llama 2's; `first` before the whole text
            only, as newer ones of Mistral; `bytes` a byte-level tokenizer with a prefix.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE(unk_token="<unk>"))
    alphabet = []
    if kind == "everywhere":
        model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    elif kind == "first":
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        model.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    else:
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        model.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL_PIECES, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([*SENTENCES.split(" Then"), "The sum", "the answer is 7"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token=eos, unk_token="<unk>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def group(group_id="g0", problem="What is 1 + 1?", answer="2", texts=("\\boxed{2}", "\\boxed{3}"), **more):
    return {
        "group_id": group_id,
        "problem": problem,
        "answer": answer,
        "trajectories": [{"text": text} for text in texts],
        **more,
    }


def write_lines(path, records):
    """One line a record; a str or bytes record is written as it is."""
    lines = [
        record if isinstance(record, bytes) else (record if isinstance(record, str) else json.dumps(record)).encode()
        for record in records
    ]
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
