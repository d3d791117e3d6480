"""GPU memory of a training step at full size, from shapes alone: what fits on which card.

    python -m tools.memory                                     the usual choices
    python -m tools.memory --num_generations 16 --prompt_length 560

Live tensors at the peak, which is the head's backward pass, when every layer still keeps what its
own needs.  Beside them stand about 2 GiB for CUDA and NCCL, and what sampling keeps: packed copies
of weights, 0.4 GiB, and its buffers, which are bounded by sampler.CACHE_MEM_FRACTION of the card.

Legend   B prompts of a micro-batch   G completions per prompt   P prompt length
         S = T - 1 tokens that are read   N = B * (P + G*S) positions   D width   V vocabulary
         I inner width   H heads   K key/value heads   d head size
"""

import dataclasses

import torch

from lib.args import run_main
from model import Config
from tools.sizes import SIZES, build_model

GIB = 2**30


@dataclasses.dataclass
class Args:
    prompt_length: int = 976  # P, in embeddings: 892 of them are the clip
    num_generations: int = 8  # G, completions per clip


def kept_by_a_layer(
    c: Config, B: int, G: int, P: int, S: int, itemsize: int, masked: bool, repeated: int = 1
) -> int:
    """Bytes that one layer keeps for its backward pass; `model.shared_prefix_attend` says why keys
    are there twice.

    masked: some prompt is padded, so attention has a mask; its kernel wants keys `repeated` once
    for each head.
    """
    N, own, d = B * (P + G * S), B * G * S, c.head_dim
    # Two residuals, two norms, queries, attention in parts and as a whole; keys, values;
    # gate, up, silu, their product.
    elements = N * (7 * c.hidden_size + 2 * c.num_key_value_heads * d + 4 * c.intermediate_size)
    if B > 1:
        elements += own * c.hidden_size  # queries of completions, no longer in one piece
    # [prompt | own], once a completion
    elements += 2 * B * G * (P + S) * c.num_key_value_heads * d * repeated
    if masked:
        elements += B * G * S * (P + S)
    # fp32: log sum exp a head, norms
    return elements * itemsize + 4 * N * (c.num_attention_heads + 2)


def peak(
    model,
    B: int,
    G: int,
    P: int,
    T: int,
    dtype: torch.dtype,
    again: bool = False,
    masked: bool = False,
) -> dict:
    """name -> bytes.  `model` may be on the meta device; `again`: --checkpoint_layers"""
    c, size, S = model.config, dtype.itemsize, T - 1
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    repeated = c.num_attention_heads // c.num_key_value_heads if masked else 1
    layer = kept_by_a_layer(c, B, G, P, S, size, masked, repeated)
    chunk = min(B * G * T, max(64, 2**27 // c.vocab_size))
    # Logits, also rounded; the gradient of the weight in fp32.
    logit = 4 + size if size < 4 else 4
    head = chunk * c.vocab_size * logit + 4 * c.vocab_size * c.hidden_size
    inputs = B * (P + G * S) * c.hidden_size * size
    layers = c.num_hidden_layers * (inputs if again else layer)
    return {
        "weights": size * sum(p.numel() for p in model.parameters()),
        "reference": size * trained,
        "masters and gradient": trained * (8 if size < 4 else 4),
        "Adam": trained * 8,
        "activations": layers + max(head, layer + trained * size if again else 0),
    }


def main(args: Args) -> None:
    model = build_model(SIZES["full"], "meta", torch.float32)
    print(
        f"GiB at the peak; P {args.prompt_length}, G {args.num_generations}; "
        "in brackets with a padded prompt\n"
    )
    print(
        "| dtype | prompts per micro-batch | tokens | all of it | with --checkpoint_layers |\n"
        "|---|---|---|---|---|"
    )
    for dtype, B, T in (
        (torch.bfloat16, 1, 512),
        (torch.bfloat16, 2, 512),
        (torch.bfloat16, 4, 512),
        (torch.bfloat16, 4, 200),
        (torch.float32, 1, 512),
    ):
        both = [
            [
                sum(
                    peak(
                        model, B, args.num_generations, args.prompt_length, T, dtype, again, masked
                    ).values()
                )
                / GIB
                for masked in (dtype == torch.float32, True)
            ]
            for again in (False, True)
        ]
        cells = [f"{a:.1f} ({b:.1f})" for a, b in both]
        print(f"| {str(dtype).removeprefix('torch.')} | {B} | {T} | {' | '.join(cells)} |")
    parts = peak(model, 1, args.num_generations, args.prompt_length, 512, torch.bfloat16)
    print("\nthe first row: " + ", ".join(f"{name} {n / GIB:.2f}" for name, n in parts.items()))


if __name__ == "__main__":
    run_main(main, Args)
