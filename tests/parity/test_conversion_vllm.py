"""An exported folder loads in vLLM as it is, and vLLM continues prompts as the original model does in Transformers."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_conversion import hf_to_megatron, megatron_to_hf
from tests.distributed.harness import REPOSITORY
from tools.base_student import SHIPPED

PROBLEMS = ("Ana has 7 apples.", "Tom has 12 coins. Ben has 5 more coins than Tom.", "What is 3 + 4?")
NUM_TOKENS = 64
CONTINUE = """
import json, sys
from pathlib import Path
from megatron_offgrpo.evaluation.vllm_backend import CPU_OPTIONS, import_vllm
vllm = import_vllm()
model = vllm.LLM(sys.argv[1], dtype="float32", **CPU_OPTIONS)
settings = vllm.SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True, detokenize=False)
prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
outputs = model.generate(prompts, settings, use_tqdm=False)
Path(sys.argv[4]).write_text(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_continues_the_export_as_transformers_the_original(tmp_path):
    hf_to_megatron(SHIPPED, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", SHIPPED, tmp_path / "hf")
    # Everything is read from the exported folder: tokenizer and chat template as well.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    chats = [[{"role": "user", "content": problem}] for problem in PROBLEMS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    arguments = [str(tmp_path / "hf"), json.dumps(prompts), str(NUM_TOKENS), str(tmp_path / "tokens.json")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CONTINUE, *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    original = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    for prompt, tokens in zip(prompts, json.loads((tmp_path / "tokens.json").read_text()), strict=True):
        limits = {"max_new_tokens": NUM_TOKENS, "eos_token_id": None, "do_sample": False}
        expected = original.generate(torch.tensor([prompt]), **limits)[0, len(prompt) :].tolist()
        assert len(expected) == NUM_TOKENS
        assert tokens == expected
