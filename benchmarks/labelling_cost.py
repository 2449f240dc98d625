"""Estimates what labelling with a 3B teacher costs: 10.5M pairs, the thesis's second phase.

    python benchmarks/labelling_cost.py [--pairs=10530000] [--mean_tokens=138] [--usd_per_chip_hour=A100:1.5,v5e:1.2]

Nothing is run: FLOPs of a pair from the architecture, times pairs, over the chips' published peaks times a
share of the peak that somebody published for this model. All of that is printed beside the result.
"""

from __future__ import annotations

import argparse

# T5-3B: layers, d_model, heads x d_kv, d_ff (Raffel et al., 2020, section 3.7).
LAYERS, D_MODEL, INNER, D_FF = 24, 1024, 32 * 128, 16384
# bfloat16 TFLOP/s a chip, as the makers publish them.
CHIPS = {"one A100-80GB": ("A100", 1, 312.0), "v5e-16": ("v5e", 16, 197.0)}
# Shares of the peak: InRanker's 3B training on one A100 reached 18 % (Table 1 of the thesis, derived in
# compatibility.md); 40 % is what large matrix products usually reach, and nobody measured it for this model.
SHARES = (0.18, 0.40)


def flops(tokens: int) -> float:
    """FLOPs of one pair through the encoder and an absorbed single-position decoder.

    A multiply-add counts as two. The decoder's part is its products with one position: two vectors against
    every encoder state (scores, weighted sum) for each head and layer, and its own small kernels.

    Args:
      tokens: length of the sequence as computed, padding included.

    Returns:
      FLOPs.
    """
    encoder_token = 2 * (4 * D_MODEL * INNER) + 2 * (2 * D_MODEL * D_FF)
    attention = 4 * tokens * tokens * INNER
    decoder = 4 * tokens * D_MODEL * (INNER // 128) + 2 * (6 * D_MODEL * INNER + 2 * D_MODEL * D_FF)
    return LAYERS * (tokens * encoder_token + attention + decoder)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=10_530_000, help="1.053M queries x 10 documents")
    parser.add_argument(
        "--mean_tokens", type=int, default=138, help="of a pair, without padding: your corpus decides"
    )
    parser.add_argument("--usd_per_chip_hour", default="", help="for example A100:1.50,v5e:1.20")
    flags = parser.parse_args()
    prices = dict(part.split(":") for part in flags.usd_per_chip_hour.split(",") if part)
    print(f"ESTIMATE, not a measurement: {flags.pairs:,} pairs with a 3B teacher in bfloat16")
    print(
        f"{'hardware':<14} {'tokens a pair':<22} {'GFLOP/pair':>10} {'of peak':>8} {'pairs/s':>8} {'hours':>7}"
    )
    for name, (chip, count, peak) in CHIPS.items():
        for tokens, what in (
            (512, "512 (padded)"),
            (flags.mean_tokens, f"{flags.mean_tokens} (mean, unpadded)"),
        ):
            for share in SHARES:
                rate = count * peak * 1e12 * share / flops(tokens)
                hours = flags.pairs / rate / 3600
                price = f"  ${hours * count * float(prices[chip]):,.0f}" if chip in prices else ""
                row = f"{flops(tokens) / 1e9:>10.0f} {share:>8.0%} {rate:>8.0f} {hours:>7.1f}"
                print(f"{name:<14} {what:<22} {row}{price}")
    published = " and ".join(f"{flags.pairs / rate / 3600:.0f}" for rate in (55, 24))
    print(
        "Published for comparison: monoT5-3B scored 55 pairs/s on a TPU v3-8 and 24 pairs/s on four V100, padded\n"
        f"(compatibility.md): {published} hours for as many pairs."
    )


if __name__ == "__main__":
    main()
