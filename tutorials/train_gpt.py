"""Train a small byte-level GPT on real text through ``initialize()``.

    python tutorials/train_gpt.py                                     on this machine's copy of Python's own library
    python tutorials/train_gpt.py --data book.txt --steps 2000        on a file of yours
    torchrun --nproc_per_node 2 tutorials/train_gpt.py                on two processes: the same batches, divided
    python tutorials/train_gpt.py --config ds_config.json             with a DeepSpeed config of yours
    python tutorials/train_gpt.py --save_dir gpt --save_every 50 --resume     go on after whatever ended the last run

The model reads bytes, so any file will do and no tokenizer is needed; its loss is in nats per byte. One file in ten
(of a single file, its last tenth) is held out, never trained on, and measures what was learned. At the end the model
writes some text, and the loss curve is saved as a picture: every step's loss, of a resumed run from its first step on.

The batches depend on ``--seed`` and the step alone: rank r of N takes rows r, r + N, ... of each, so that a run on any
number of processes sees the same data and gives, rounding apart, the same losses.
"""

import argparse
import sys
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the folder that holds engine.py
import engine as deepspeed  # noqa: E402


# --- The model --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention, then a feed-forward layer, each added to its input."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, dim / heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, dim))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Predicts each next byte from the bytes before it, at most ``context`` of them."""

    def __init__(self, dim: int, layers: int, heads: int, context: int):
        super().__init__()
        self.context = context
        self.token, self.position = nn.Embedding(256, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """``ids`` and ``targets``: (batch, length), int64. The mean loss in nats, or without targets the logits."""
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# --- The text ---------------------------------------------------------------------------------------------------------


def read_text(path: str | None) -> tuple[Tensor, Tensor]:
    """Training text and held-out text, each a 1-D uint8 tensor."""
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(p for p in library.rglob("*.py")
                       if not {"site-packages", "test"} & {*p.relative_to(library).parts})
        texts = [p.read_bytes() for p in files]
        parts = [b"".join(t for i, t in enumerate(texts) if (i % 10 == 9) == held) for held in (False, True)]
    else:
        text = Path(path).read_bytes()
        cut = len(text) * 9 // 10
        parts = [text[:cut], text[cut:]]
    train, held_out = (torch.frombuffer(bytearray(part or b" "), dtype=torch.uint8) for part in parts)
    return train, held_out


def batch_at(text: Tensor, offsets: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """The stretches of ``text`` at ``offsets`` and the bytes that follow each: two (batch, context) int64 tensors."""
    windows = torch.stack([text[i:i + context + 1] for i in offsets.tolist()]).long()
    return windows[:, :-1], windows[:, 1:]


# --- Training ---------------------------------------------------------------------------------------------------------


def default_config(options: argparse.Namespace) -> dict:
    """Warm up, hold, decay to nothing."""
    warm_up, decay = max(1, options.steps // 20), max(1, options.steps // 2)
    return {
        "train_batch_size": options.batch,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": options.lr, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {"type": "MultiPhaseLR", "params": {"phases": [
            {"type": "linear", "steps": warm_up, "start_lr": options.lr / 20, "end_lr": options.lr},
            {"type": "constant", "steps": max(1, options.steps - warm_up - decay)},
            {"type": "cosine", "steps": decay, "end_lr": 0.0}]}},
    }


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks."""
    value = value.detach().clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value / dist.get_world_size()


@torch.no_grad()
def held_out_loss(engine: deepspeed.Engine, text: Tensor, options: argparse.Namespace) -> float:
    """Nats per byte over evenly spaced stretches of the held-out text, each rank measuring its share."""
    engine.eval()
    offsets = torch.linspace(0, len(text) - options.context - 1, 8 * options.batch, dtype=torch.float64).long()
    share = offsets[engine.global_rank::engine.world_size]  # perhaps not equally many on every rank, so sums are taken
    loss_sum = torch.zeros((), device=engine.device)
    for part in share.split(options.batch):
        loss_sum += len(part) * engine(*batch_at(text, part, options.context))
    engine.train()
    return float(mean_over_ranks(loss_sum)) * engine.world_size / len(offsets)


def train(engine: deepspeed.Engine, text: Tensor, held_out: Tensor, options: argparse.Namespace,
          curve: list, held_curve: list) -> None:
    """Train up to ``options.steps`` optimizer steps; adds (step, loss) to the curves of training and held-out text."""
    losses = []  # this rank's, of the steps since the last report: one collective averages them all
    micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    generator = torch.Generator().manual_seed(options.seed)
    started, tokens, first = time.perf_counter(), 0, engine.global_steps
    for step in range(1, options.steps + 1):
        offsets = torch.randint(len(text) - options.context, (engine.train_batch_size(),), generator=generator)
        if step <= first:
            continue  # done before this run, and resumed from
        share = offsets[engine.global_rank::engine.world_size]
        loss_sum = torch.zeros((), device=engine.device)
        rate = engine.get_lr()[0]
        for part in share.split(micro):
            loss = engine(*batch_at(text, part, options.context))
            engine.backward(loss)
            engine.step()
            loss_sum += loss.detach()
        losses.append(loss_sum / accumulation)
        tokens += engine.train_batch_size() * options.context
        reports = step % options.report == 0 or step in (1, options.steps)
        saves = options.save_dir and (step % options.save_every == 0 or step == options.steps)
        if reports or saves:
            curve += enumerate(mean_over_ranks(torch.stack(losses)).tolist(), step - len(losses) + 1)
            losses.clear()
        if reports and engine.global_rank == 0:
            seconds = time.perf_counter() - started
            print(f"step {step:5d}/{options.steps}  loss {curve[-1][1]:.4f}  lr {rate:.2e}  {tokens / seconds:7.0f} "
                  f"tokens/s  {seconds / (step - first) * (options.steps - step):4.0f} s left", flush=True)
        if step % (10 * options.report) == 0 or step == options.steps:
            held_curve.append((step, held_out_loss(engine, held_out, options)))
            if engine.global_rank == 0:
                print(f"step {step:5d}/{options.steps}  held-out loss {held_curve[-1][1]:.4f} nats per byte",
                      flush=True)
        if saves:
            engine.save_checkpoint(options.save_dir, client_state={"curve": curve, "held_curve": held_curve})


@torch.no_grad()
def write_text(engine: deepspeed.Engine, length: int, seed: int, prompt: bytes = b"def ") -> str:
    """``length`` bytes sampled from the model, one after the other. Every rank must call this."""
    engine.eval()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([list(prompt)])
    for _ in range(length):
        logits = engine(ids[:, -engine.module.context:])[0, -1].float().cpu()
        ids = torch.cat([ids, torch.multinomial(logits.softmax(0), 1, generator=generator)[None]], dim=1)
    return bytes(ids[0].tolist()).decode(errors="replace")


def draw_curves(curve: list, held_curve: list, path: str) -> None:
    """Save the two loss curves as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.add_subplot()
    axis.plot(*zip(*curve), label="training text")
    axis.plot(*zip(*held_curve), "o--", color="black", label="held-out text")
    axis.set(xlabel="optimizer step", ylabel="loss (nats per byte)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description="Train a small byte-level GPT through initialize().",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", metavar="FILE", help="the text to learn; none: Python's own library, as source code")
    parser.add_argument("--config", metavar="FILE", help="a DeepSpeed config; none: AdamW, warm-up and decay, as below")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=32, help="stretches of text per step (without --config)")
    parser.add_argument("--lr", type=float, default=6e-3, help="the highest learning rate (without --config)")
    parser.add_argument("--context", type=int, default=64, help="bytes per stretch of text")
    parser.add_argument("--dim", type=int, default=96, help="width of the model")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the model")
    parser.add_argument("--heads", type=int, default=4, help="attention heads per block; must divide --dim")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the sample")
    parser.add_argument("--sample", type=int, default=200, metavar="BYTES", help="text to write at the end")
    parser.add_argument("--report", type=int, default=20, help="steps between progress lines")
    parser.add_argument("--save_dir", metavar="DIR", help="where to save checkpoints; none: nowhere")
    parser.add_argument("--save_every", type=int, default=100, metavar="STEPS", help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --save_dir, if any")
    parser.add_argument("--plot", default="train_gpt.png", metavar="FILE", help="where to save the loss curve")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    options = parser.parse_args(argv)
    if options.resume and not options.save_dir:
        parser.error("--resume needs --save_dir, the folder to resume from")
    for name in ("steps", "batch", "context", "dim", "layers", "heads", "report", "save_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; allowed: a whole number from 1 up")
    if options.dim % options.heads:
        parser.error(f"--heads {options.heads} does not divide --dim {options.dim}")
    return options


def main() -> None:
    """Read, train, show."""
    options = parse_options()
    try:
        text, held_out = read_text(options.data)
    except OSError as error:
        sys.exit(f"train_gpt.py: error: --data {options.data} can't be read: {error.strerror}")
    if min(len(text), len(held_out)) <= options.context:
        sys.exit(f"train_gpt.py: error: too little text: {len(text)} bytes to train on and {len(held_out)} held out; "
                 f"needed: more than --context {options.context} of each")
    torch.manual_seed(options.seed)
    model = GPT(options.dim, options.layers, options.heads, options.context)
    try:
        engine, *_ = deepspeed.initialize(args=options, model=model, model_parameters=model.parameters(),
                                          config=options.config or default_config(options))
    except ValueError as error:
        sys.exit(f"train_gpt.py: error: {error}")
    if engine.optimizer is None:
        sys.exit(f"train_gpt.py: error: --config {options.config} has no optimizer section: nothing would train")
    if engine.global_rank == 0:
        count = sum(p.numel() for p in model.parameters())
        print(f"{count / 1e6:.2f} M parameters, {len(text) / 1e6:.1f} MB of text, {engine.world_size} process(es), "
              f"{engine.train_batch_size() * options.context} bytes per step")
    curve, held_curve = [], []
    if options.resume:
        folder, saved = engine.load_checkpoint(options.save_dir)
        if folder:
            curve, held_curve = saved["curve"], saved["held_curve"]
            if engine.global_rank == 0:
                print(f"resumed from {folder}")
    train(engine, text, held_out, options, curve, held_curve)
    sample = write_text(engine, options.sample, options.seed) if options.sample else None
    if engine.global_rank == 0:
        if sample is not None:
            print(f"--- the model writes:\n{sample}\n---")
        draw_curves(curve, held_curve, options.plot)
        print(f"wrote {options.plot}")
    engine.destroy()


if __name__ == "__main__":
    main()
