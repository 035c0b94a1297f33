"""What is lost where the experts of a block share one basis: scores beside those with a basis for each expert, on two mixtures.

    python benchmarks/experts.py [--steps 200] [--tokens 8192] [--questions 4] [--sequences 100] [--held-out 40]

Two small mixtures are trained on the demo's speeches, with its tokenizer.  A fit of one expert of every block (``--layers
"*.experts.3.*"``) gives it bases of its own, so as many fits as there are experts stand beside the one that they share.  The
damping of a layer is that of the shared fit, so that nothing but bases and eigenvalues in them differs.  Solutions are judged on
sequences that no fit saw (docs/refine.md).  K-FAC beside it, in the shared bases, shows the size of a difference that matters.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import AutoConfig, AutoModelForCausalLM

import upriver as up
from upriver.curvature.base import Damping
from upriver.curvature.energy import held_out, judge
from upriver.influence.queries import gradients
from upriver.influence.rescore import rescore
from upriver.model.check import tracked_layers
from upriver.runtime.cost import moments_size

DEMO = Path(up.__file__).parent / "demo"
DAMPING, BATCH_TOKENS, BATCH, RATE = Damping(), 1024, 8, 3e-3
SIZES: dict[str, Any] = dict(  # noqa: C408
    hidden_size=64, intermediate_size=96, moe_intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, head_dim=16, num_experts=4, num_local_experts=4, num_experts_per_tok=2,
    max_position_embeddings=256, tie_word_embeddings=True, output_router_logits=True,
)  # fmt: skip
MIXTURES = ("qwen3_moe", "gpt_oss")


def trained(kind: str, tokenizer: Any, corpus: up.Corpus, steps: int) -> tuple[up.Model, float]:
    """A mixture after so many steps of AdamW, and its last loss per token."""
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0}
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **size))
    optimiser = torch.optim.AdamW(module.parameters(), RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    draw, losses = np.random.default_rng(0), []
    for _ in range(steps):
        tokens_NT = corpus.batch(np.sort(draw.choice(len(corpus), BATCH, replace=False))).inputs["tokens"]
        loss = module(input_ids=tokens_NT, labels=tokens_NT).loss  # with what balances the load of the experts
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return up.Model(module.eval(), tokenizer, name=kind), float(np.mean(losses[-20:]))


def compared(model: up.Model, corpus: up.Corpus, queries: up.Queries, args: argparse.Namespace) -> list[str]:
    asked, own = list(range(args.questions)), {}
    layers = tracked_layers(model, corpus, "*.experts.*")
    q = gradients(model, layers, queries, asked)
    with tempfile.TemporaryDirectory() as folder:
        shared = up.fit(model, corpus, f"{folder}/shared", layers="*.experts.*", max_tokens=args.tokens)
        fitted = corpus.sample(shared.manifest["fit"]["tokens"], shared.options.seed)
        lambdas = shared.curvature().lambdas(DAMPING)
        solutions = [shared.curvature(kind).solve(q, DAMPING).value for kind in ("ekfac", "kfac")]
        sizes = [moments_size(layers)]
        for e in range(SIZES["num_experts"]):
            alone = up.fit(model, corpus, f"{folder}/{e}", layers=f"*.experts.{e}.*", max_tokens=args.tokens)
            for x in alone.layers:
                at = Damping(lambdas[x.name], False)
                own[x.name] = alone.block(x.name).to(q[x.name]).solve(q[x.name], at)
            sizes.append(moments_size(tracked_layers(model, corpus, f"*.experts.{e}.*")))
    others = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(len(corpus)), fitted))
    rows, judges = others[: args.sequences], others[-args.held_out :]
    sets, scores = [*solutions, {name: own[name] for name in q}, q], []
    for v in sets:
        found = rescore(model, layers, corpus, v, {int(row): asked for row in rows}, 2048)
        place = np.lexsort((found.rows_P, found.queries_P))
        scores.append(found.layers_PL.sum(1).double().numpy()[place].reshape(len(asked), len(rows)))
    along = held_out(model, layers, corpus, judges, sets, BATCH_TOKENS)
    energies = [judge(q, v, vGv, lambdas)[2] for v, vGv in zip(sets, along, strict=True)]
    told = []
    bases = [f"{sizes[0] / 1e6:.2f}", f"{sizes[0] / 1e6:.2f}", f"{sum(sizes[1:]) / 1e6:.2f}", "none"]
    names = ["EK-FAC, shared", "K-FAC, shared", "EK-FAC, own", "plain gradient"]
    for name, size, mine, energy in zip(names, bases, scores, energies, strict=True):
        same = [float(np.corrcoef(*pair)[0, 1]) for pair in zip(mine, scores[2], strict=True)]
        ranks = [float(spearmanr(*pair).statistic) for pair in zip(mine, scores[2], strict=True)]
        ratio = energy / energies[2]
        cells = [size, f"{np.mean(same):.4f}", f"{min(same):.4f}", f"{np.mean(ranks):.4f}", f"{ratio.mean():.3f}"]
        told.append(f"| {model.name} | {name} | {' | '.join(cells)} |")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--tokens", type=int, default=8_192, help="to fit on")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=100, help="to score")
    parser.add_argument("--held-out", type=int, default=40, help="sequences to judge on")
    args = parser.parse_args()
    tokenizer = up.load_model(DEMO / "speech-model").tokenizer
    corpus = up.Corpus.read(DEMO / "speeches.jsonl.xz", tokenizer, seq_len=128)
    queries = up.Queries.read(DEMO / "queries.jsonl").bound(tokenizer)
    lines = []
    for kind in MIXTURES:
        model, loss = trained(kind, tokenizer, corpus, args.steps)
        print(f"{kind}: {args.steps} steps, loss {loss:.2f}", flush=True)
        lines += compared(model, corpus, queries, args)
    names = ["mixture", "scores by", "bases, MB", "correlation with own, mean", "worst", "of ranks", "energy over own"]
    print(f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}", *lines, sep="\n")


if __name__ == "__main__":
    main()
