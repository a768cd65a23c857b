"""Training step time of LoRASculpt over PEFT's LoRA, side by side in one process; run it on an idle machine.

    python benchmarks/step_time.py [--layers 8] [--tokens 512] [--rounds 9]

A Llama of SmolLM2-135M's shapes with random weights, r = 32 on all linears. The variants take turns, and what is
printed is the median of each variant's time over LoRA's in the same round.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lorasculpt import Clock, LoRASculptConfig

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS = {
    "LoRA": lambda: LoraConfig(r=32, target_modules=LINEARS),
    "masks alone": lambda: LoRASculptConfig(r=32, target_modules=LINEARS, prune_step=1, cmr_weight=0.0),
    "CMR on q, k, v, recomputed": lambda: LoRASculptConfig(r=32, target_modules=LINEARS, prune_step=1),
    "CMR on q, k, v, cached": lambda: LoRASculptConfig(r=32, target_modules=LINEARS, prune_step=1, cmr_memory="cache"),
    "CMR on all, cached": lambda: LoRASculptConfig(
        r=32, target_modules=LINEARS, prune_step=1, cmr_modules="all", cmr_memory="cache"
    ),
}


def stepper(config, layers: int, tokens: int):
    """A function that takes one training step and returns its seconds."""
    torch.manual_seed(0)
    shapes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_hidden_layers=layers, **shapes))
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    clock = Clock(model, optimizer, total_steps=10**6)
    ids = torch.randint(0, 1000, (4, tokens // 4))

    def step() -> float:
        began = time.perf_counter()
        clock.begin_step()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.end_step()
        return time.perf_counter() - began

    return step


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    steps = {name: stepper(config(), options.layers, options.tokens) for name, config in VARIANTS.items()}
    for step in steps.values():
        step(), step()
    rounds = [{name: step() for name, step in steps.items()} for _ in range(options.rounds)]
    print(f"{options.layers} layers, {options.tokens} tokens, {torch.get_num_threads()} threads; step time over LoRA's")
    for name in VARIANTS:
        ratios = [times[name] / times["LoRA"] for times in rounds]
        print(f"{name:28} {median(ratios):.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
