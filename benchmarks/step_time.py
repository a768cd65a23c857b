"""What a training step of each method takes over PEFT's LoRA: time, side by side in one process, and memory.

    python benchmarks/step_time.py [lorasculpt | methods] [--layers 8] [--tokens 512] [--rounds 9]

``lorasculpt`` is that method with each of its parts, and its penalty as autograd would have it; ``methods`` is all of
them as they come. A Llama of SmolLM2-135M's shapes with random weights. The variants take turns, and what is printed
is the median of each variant's time over LoRA's in the same round: run it on an idle machine. Memory is what a step
keeps for its backward pass, counted byte by byte, and so the same on every machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

from lorasculpt import METHODS, Clock, LoRASculptConfig
from lorasculpt.adapters.layers import frozen_weight, sites
from lorasculpt.ops.conflict import awareness

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Make = Callable[[], LoraConfig]
Penalty = Callable[[], Tensor]


def sculpt(**settings) -> Make:
    """LoRASculpt that prunes at its first step."""
    return lambda: LoRASculptConfig(r=32, target_modules=LINEARS, prune_step=1, **settings)


def by_autograd(model: PeftModel) -> Penalty:
    """Equation (4) on q, k and v as it is written, M made once: a penalty that is added to the loss."""
    found = [site for name, site in sites(model).items() if name.endswith(("q_proj", "k_proj", "v_proj"))]
    weights = [frozen_weight(site.base) for site in found]
    matrices = [awareness(weight, weight.norm(), 1.0) for weight in weights]
    pairs = list(zip(matrices, found, strict=True))
    return lambda: 1e-3 / len(pairs) * torch.stack([(M * (site.B @ site.A)).norm() for M, site in pairs]).sum()


LORA: dict[str, Make] = {"LoRA": lambda: LoraConfig(r=32, target_modules=LINEARS)}
SCULPT: dict[str, Make] = {
    "masks alone": sculpt(cmr_weight=0.0),
    "CMR on q, k, v, by autograd": sculpt(cmr_weight=0.0),
    "CMR on q, k, v, recomputed": sculpt(),
    "CMR on q, k, v, cached": sculpt(cmr_memory="cache"),
    "CMR on all, cached": sculpt(cmr_modules="all", cmr_memory="cache"),
}
TASKS = {"mtl_lora": ["a", "b"], "am_lora": ["a", "b"]}


def ours(name: str) -> Make:
    """A method as it comes, at the rank of the LoRA where it leaves that open."""
    settings = {"tasks": TASKS[name]} if name in TASKS else {}
    return lambda: METHODS[name](target_modules=LINEARS, **settings)


class Variant:
    """A model of its own that takes training steps.

    Args:
        config: what it is adapted by.
        layers: of the Llama.
        tokens: of a batch of four texts.
        penalty: made of the adapted model, what is added to its loss.
    """

    def __init__(self, config: LoraConfig, layers: int, tokens: int, penalty=None):
        torch.manual_seed(0)
        shapes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_hidden_layers=layers, **shapes))
        self.model = get_peft_model(base, config).train()
        self.optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=1e-4)
        self.clock = Clock(self.model, self.optimizer, total_steps=10**6)
        ids = torch.randint(0, 1000, (4, tokens // 4))
        self.batch = {"input_ids": ids, "labels": ids}
        if tasks := getattr(config, "tasks", None):
            self.batch["task"] = (tasks * 4)[:4]
        self.penalty = penalty(self.model) if penalty else None

    def loss(self) -> Tensor:
        """Of the batch."""
        loss = self.model(**self.batch).loss
        return loss + self.penalty() if self.penalty else loss

    def step(self) -> float:
        """Take a step; its seconds."""
        began = time.perf_counter()
        self.clock.begin_step()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.clock.end_step()
        return time.perf_counter() - began

    def kept(self) -> int:
        """Bytes that a forward pass keeps for its backward pass, but for parameters and buffers, which are there."""
        there = {tensor.untyped_storage().data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())}
        held: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in there:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.clock.begin_step()
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.clock.end_step()
        return sum(held.values())


def compare(made: dict[str, Variant], rounds: int) -> Sequence[tuple[str, list[float], float]]:
    """(name, time over LoRA's of each round, memory over LoRA's) of each variant."""
    for variant in made.values():
        variant.step(), variant.step()
    times = [{name: variant.step() for name, variant in made.items()} for _ in range(rounds)]
    kept = {name: variant.kept() for name, variant in made.items()}
    return [(name, [one[name] / one["LoRA"] for one in times], kept[name] / kept["LoRA"]) for name in made]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("lorasculpt", "methods"), default="lorasculpt")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    makes = LORA | (SCULPT if options.what == "lorasculpt" else {name: ours(name) for name in METHODS})
    made = {
        name: Variant(make(), options.layers, options.tokens, by_autograd if "autograd" in name else None)
        for name, make in makes.items()
    }
    print(f"{options.layers} layers, {options.tokens} tokens, {torch.get_num_threads()} threads; over LoRA's")
    print(f"{'':28} step time             kept for the backward pass")
    for name, ratios, memory in compare(made, options.rounds):
        print(f"{name:28} {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})   {memory:.2f}")


if __name__ == "__main__":
    main()
