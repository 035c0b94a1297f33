"""Train the demo's tokenizer and model on the State of the Union speeches.

    python studies/demo-model/train.py SPEECHES.jsonl.xz --out OUT [--epochs 10]

SPEECHES holds one record a line with `id, year, speaker, text`.  Writes `OUT/model` (weights in bfloat16, tokenizer),
`OUT/speeches.jsonl.xz` (the speeches trained on, as shipped) and `OUT/recipe.json` (every setting, the loss curve,
the validation loss).  Every fifteenth speech since 1933 is held out, for validation only.
"""

import argparse
import json
import lzma
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SINCE, HOLD_OUT_EVERY, SEQ_LEN, BATCH = 1933, 15, 128, 24
PEAK_LR, WARMUP, WEIGHT_DECAY = 2e-3, 200, 0.3
CONFIG = dict(  # noqa: C408
    vocab_size=4096, hidden_size=160, intermediate_size=448, num_hidden_layers=6, num_attention_heads=5,
    num_key_value_heads=5, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
)  # fmt: skip


def read_speeches(path):
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        speeches = [json.loads(line) for line in lines]
    speeches = [s for s in speeches if s["year"] >= SINCE]
    held_out = speeches[7::HOLD_OUT_EVERY]
    return [s for s in speeches if s not in held_out], held_out


def train_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def encode(tokenizer, speeches):
    return [torch.tensor(tokenizer(s["text"])["input_ids"]) for s in speeches]


def windows(documents, seed):
    """One epoch: every document cut into windows from a random first offset, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for ids in documents:
        start = int(torch.randint(SEQ_LEN, (1,), generator=generator))
        rows += [ids[i : i + SEQ_LEN] for i in range(start, len(ids) - SEQ_LEN, SEQ_LEN)]
    order = torch.randperm(len(rows), generator=generator)
    return torch.stack(rows)[order]


@torch.no_grad()
def validation_loss(model, documents):
    """Mean nats per token over the held-out speeches, in windows of SEQ_LEN."""
    rows = torch.cat([ids[: len(ids) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN) for ids in documents])
    model.eval()
    losses = [float(model(input_ids=b, labels=b).loss) * len(b) for b in rows.split(32)]
    model.train()
    return sum(losses) / len(rows)


def schedule(fraction, step):
    return PEAK_LR * min(1, (step + 1) / WARMUP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1, fraction))))


def train(model, documents, held_out, epochs):
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
    start, step, curve = time.time(), 0, []
    steps = epochs * math.ceil(len(windows(documents, 0)) / BATCH)
    for epoch in range(epochs):
        for batch in windows(documents, epoch).split(BATCH):
            for group in optimizer.param_groups:
                group["lr"] = schedule(step / steps, step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        val = validation_loss(model, held_out)
        curve.append(
            {"epoch": epoch + 1, "step": step, "train": round(float(loss.detach()), 3), "validation": round(val, 4)}
        )
        print(json.dumps(curve[-1] | {"minutes": round((time.time() - start) / 60, 1)}), flush=True)
    return curve, step


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("speeches", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)
    speeches, held_out = read_speeches(args.speeches)
    tokenizer = train_tokenizer([s["text"] for s in speeches])
    documents, validation = encode(tokenizer, speeches), encode(tokenizer, held_out)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {sum(map(len, documents)):,} training tokens in {len(documents)} speeches")
    curve, steps = train(model, documents, validation, args.epochs)
    final = validation_loss(model.bfloat16().float(), validation)
    args.out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    with lzma.open(args.out / "speeches.jsonl.xz", "wt", encoding="utf-8", preset=9) as sink:
        sink.writelines(json.dumps(s, ensure_ascii=False) + "\n" for s in speeches)
    recipe = {
        "parameters": parameters, "config": CONFIG, "since": SINCE, "speeches": len(speeches),
        "held_out": [s["id"] for s in held_out], "training_tokens": sum(map(len, documents)),
        "seq_len": SEQ_LEN, "batch": BATCH, "peak_lr": PEAK_LR, "warmup": WARMUP, "weight_decay": WEIGHT_DECAY,
        "steps": steps, "epochs": args.epochs, "final_validation_loss": round(final, 4),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "curve": curve,
    }  # fmt: skip
    (args.out / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    print(f"validation loss {final:.4f} nats per token after {steps} steps, {args.epochs} epochs")


if __name__ == "__main__":
    main()
