"""What more queries cost: the scan with 1, 8, 64 and 256 of them, in plain training steps over the same batches, in one run.

    python benchmarks/queries.py [--length 256] [--tokens 16384] [--queries 1 8 64 256] [--dtype float32] [--repeats 3]

Beside each figure stands what its multiplications alone would come to, if all ran at one speed.

A GPT-NeoX type of random weights, 512 wide, 6 layers, vocabulary 8,192; queries of random factors, rank 32, as the cost does not
depend on their values.  All go over the same batches with the same threads, in alternation; the median of the ratios counts.
"""

import argparse
import statistics

import numpy as np
import torch
from cost import limits_of
from scan import timed
from transformers import AutoConfig, AutoModelForCausalLM

from upriver.influence.score import Score, route
from upriver.model.check import tracked_layers
from upriver.model.load import Model
from upriver.model.shape import model_shape
from upriver.model.sweep import Source, sweep
from upriver.runtime.config import BATCH_TOKENS
from upriver.runtime.cost import DENSE_BYTES, Asked, contraction
from upriver.runtime.system import settle_memory
from upriver.tensors import LowRank, Scratch
from upriver.text.examples import Examples

VOCABULARY, WIDTH, RANK = 8192, 512, 32


class Tokens(Examples):
    """Random sequences of one length."""

    def __init__(self, rows: int, length: int):
        tokens_NT = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
        super().__init__({"tokens": tokens_NT, "loss": (torch.arange(length) > 0).repeat(rows, 1)})
        self.lengths_N = np.full(rows, length, np.int32)


def neox(length: int) -> Model:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=6,
        num_attention_heads=WIDTH // 64, tie_word_embeddings=False, max_position_embeddings=length,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return Model(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval())


def step(model: Model, data: Tokens, batches: list[np.ndarray]) -> None:
    """A plain forward and full backward pass, every parameter with a gradient."""
    model.module.train()
    for rows in batches:
        model.task.loss(model.module, data.batch(rows)).backward()
        model.module.zero_grad(set_to_none=True)
    model.module.eval()


def scanner(model: Model, data: Tokens, batches: list[np.ndarray], Q: int, room: float, scratch: Scratch):
    """The scan with ``Q`` queries, what it is counted to cost in plain steps, and how the queries are contracted."""
    layers = tracked_layers(model, data, "mlp")
    M, N = float(np.mean([data.lengths_N[b].sum() for b in batches])), float(np.mean([len(b) for b in batches]))
    chosen = contraction(layers, M, N, Asked(Q, 1, RANK), room, model.like.element_size())
    source = Source.of(data, np.arange(len(data)), int(M))
    low = {x.name: LowRank(torch.randn(Q, x.O, RANK), torch.randn(Q, RANK, x.I)) for x in layers}
    routes = {name: route(chosen.orders[name], lambda v=v: v, Q, model.like) for name, v in low.items()}
    hold = min(chosen.hold, len(batches))
    how = ", ".join(sorted(set(chosen.orders.values()))) + (f", {hold} batches wait" if hold > 1 else "")
    counted = limits_of(model_shape(model, layers, data), chosen._replace(hold=hold), M, N, Q, RANK)["score"]

    def run() -> None:
        consumer = Score(routes, Q, False, hold, scratch=scratch)
        sweep(model, layers, source, source.rows, consumer)
        consumer.result()

    return run, counted, how


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--room", type=float, default=DENSE_BYTES, help="bytes for queries or batches held")
    parser.add_argument("--dtype", choices=["float32", "mixed", "bfloat16"], default="float32", help="of the scans")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    settle_memory(reuse=True)  # as a scan does where the memory allows
    model, data = neox(args.length), Tokens(args.tokens // args.length, args.length)
    batches = data_batches(data, args)
    scratch = Scratch()
    seconds: dict[object, list[float]] = {}
    with model.computing_in(args.dtype) as computing:
        scans = {Q: scanner(computing, data, batches, Q, args.room, scratch) for Q in args.queries}
        step(model, data, batches[:1])
        for _ in range(args.repeats):
            seconds.setdefault("step", []).append(timed(lambda: step(model, data, batches)))
            for Q, (run, *_) in scans.items():
                seconds.setdefault(Q, []).append(timed(run))
    threads = torch.get_num_threads()
    print(
        f"{args.tokens:,} tokens in sequences of {args.length}, {args.dtype}, {threads} threads, median of {args.repeats}\n"
    )
    first = args.queries[0]
    print(
        f"| queries | plain steps | counted | times the scan with {first} | counted | contraction |\n|---|---|---|---|---|---|"
    )
    for Q, (_, counted, how) in scans.items():
        times = counted / scans[first][1]
        print(
            f"| {Q} | {ratio(seconds, Q, 'step'):.2f} | {counted:.2f} | {ratio(seconds, Q, first):.2f} | {times:.2f} | {how} |"
        )


def data_batches(data: Tokens, args: argparse.Namespace) -> list[np.ndarray]:
    """Batches of whole sequences."""
    size = max(1, args.batch_tokens // args.length)
    return [np.arange(i, min(i + size, len(data))) for i in range(0, len(data), size)]


def ratio(seconds: dict[object, list[float]], one: object, other: object) -> float:
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


if __name__ == "__main__":
    main()
