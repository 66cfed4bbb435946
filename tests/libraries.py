"""Train through a library's own support of DeepSpeed, twice, and compare the weights with plain PyTorch's.

    python launch.py --as_deepspeed --nproc_per_node 2 tests/libraries.py transformers 3 FOLDER

The second run resumes from what the first has saved after two of four steps. Every step takes all rows, in any order.
On a CPU, Accelerate counts one process however many there are, and Lightning refuses DeepSpeed: both are helped here.
"""

import io
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

ROWS = [{"x": x, "y": x.sum(0, keepdim=True)} for x in torch.randn(8, 6, generator=torch.Generator().manual_seed(0))]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.net(x) - y).square().mean()}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)


def plain() -> nn.Module:
    model, batch = Net(), torch.utils.data.default_collate(ROWS)
    optimizer = adamw(model)
    for _ in range(4):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def on_cpus() -> None:
    from accelerate.state import AcceleratorState, DistributedType, PartialState
    AcceleratorState._reset_state(reset_partial_state=True)  # of the first run
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.NO)


def with_transformers(stage: int, folder: Path, resume: bool) -> nn.Module:
    from transformers import Trainer, TrainingArguments
    on_cpus()
    config = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": 1.0,
              "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
              "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}}
    trainer = Trainer(Net(), TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, save_steps=2,
        learning_rate=0.02, lr_scheduler_type="constant", report_to=[], disable_tqdm=True, deepspeed=config),
        train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=resume and str(folder / "checkpoint-2"))
    return trainer.model


def with_accelerate(stage: int, folder: Path, resume: bool) -> nn.Module:
    from accelerate import Accelerator, DeepSpeedPlugin
    on_cpus()
    accelerator, model = Accelerator(deepspeed_plugin=DeepSpeedPlugin(
        zero_stage=stage, gradient_accumulation_steps=2, gradient_clipping=1.0)), Net()
    model, optimizer, loader = accelerator.prepare(
        model, adamw(model), torch.utils.data.DataLoader(ROWS, batch_size=2, shuffle=True))
    if resume:
        accelerator.load_state(str(folder))
    for step in range(2 if resume else 0, 4):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
        if step == 1 and not resume:
            accelerator.save_state(str(folder))
    whole = accelerator.get_state_dict(model)
    assert not whole or {name: value.shape for name, value in whole.items()} == {
        name: value.shape for name, value in Net().state_dict().items()}
    return model.module


def with_lightning(stage: int, folder: Path, resume: bool) -> nn.Module:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import DeepSpeedStrategy

    class OnCpus(DeepSpeedStrategy):
        def setup_environment(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: dict, index: int) -> torch.Tensor:
            return self.net(**batch)["loss"]

        validation_step = training_step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self)

        def on_save_checkpoint(self, checkpoint: dict) -> None:
            if stage == 3:  # Lightning leaves the weights to the engine
                with pytest.raises(RuntimeError, match="sharded over 2 ranks"):
                    torch.save(checkpoint["state_dict"], io.BytesIO())

    def loader() -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(ROWS, batch_size=2, shuffle=True)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=OnCpus(stage=stage, logging_batch_size_per_gpu=2), max_epochs=4,
        accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False, enable_progress_bar=False, precision="32-true",
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)], default_root_dir=str(folder))
    trainer.fit(module, loader(), loader(), ckpt_path=str(folder / "epoch=1.ckpt") if resume else None)
    trainer.validate(module, loader(), verbose=False)  # with a new engine, which takes the weights over
    return module.net


if __name__ == "__main__":
    library, stage, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    expected = plain()
    for resume in (False, True):
        model = globals()[f"with_{library}"](stage, folder, resume)
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            for (name, mine), theirs in zip(model.named_parameters(), expected.parameters()):
                torch.testing.assert_close(mine.data, theirs.data, rtol=1e-5, atol=1e-6, msg=f"{name}, {resume=}")
    print("as in plain PyTorch")
