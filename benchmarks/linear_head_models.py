"""What the linear head of a real model takes: `python -m benchmarks.linear_head_models`, by formula, on no accelerator.

Time is that of the three products at peak, a lower bound; memory is what exists beside arguments and results, the
float32 gradient of the weights and the logits of one chunk. Parameters in bfloat16; on the pod, 16 × 16 chips, tokens
are split over one axis and classes over the other.
"""

from typing import NamedTuple

from jaxsoftmax.linear_head import predict_temp_bytes

MODELS = {"Llama 3 8B": (4096, 128256), "Qwen2.5 7B": (3584, 152064), "Gemma 2 9B": (3584, 256000)}  # D, V


class Machine(NamedTuple):
    platform: str
    peak: float  # bfloat16 operations per second and chip
    tokens: int  # of one step on a chip
    split: int = 1  # of the classes


MACHINES = {
    "H100": Machine("cuda", 989e12, 8192),
    "TPU v5e": Machine("tpu", 197e12, 8192),
    "256 v5e": Machine("tpu", 197e12, 65536, 16),
}


def row(features: int, vocab: int, machine: Machine) -> tuple[float, float, float]:
    """Milliseconds, MiB, and MiB of the logits in float32 that do not exist."""
    vocab //= machine.split
    seconds = 6 * machine.tokens * features * vocab / machine.peak
    temp = predict_temp_bytes(machine.tokens, features, vocab, platform=machine.platform) + 4 * features * vocab
    return 1e3 * seconds, temp / 2**20, 4 * machine.tokens * vocab / 2**20


def main() -> None:
    print("| model | machine | tokens per chip | ms | temp MiB | logits MiB |\n|---|---|---|---|---|---|")
    for model, (features, vocab) in MODELS.items():
        for name, machine in MACHINES.items():
            milliseconds, temp, logits = row(features, vocab, machine)
            print(f"| {model} | {name} | {machine.tokens} | {milliseconds:.0f} | {temp:.0f} | {logits:.0f} |")


if __name__ == "__main__":
    main()
