"""Train a rewritten Llama with Lightning, and log what its Attention Residuals learn on the way."""

import argparse
import pathlib
import sysconfig

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from transformers import LlamaConfig, LlamaForCausalLM

from attnres_rewrite import attnres_parameters, rewrite
from attnres_rewrite.lightning import AttnResCallback


class ByteModel(LightningModule):
    def __init__(self, backend: str) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4
        )
        self.model = rewrite(LlamaForCausalLM(config), blocks=3, backend=backend)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        attnres = dict(attnres_parameters(self.model))
        others = [parameter for name, parameter in self.model.named_parameters() if name not in attnres]
        groups = [{"params": others, "weight_decay": 0.1}, {"params": attnres.values(), "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backend", default="inductor", help="what compiles the rewritten model")
    parser.add_argument("--out", default="lightning-run", help="folder for the log, a CSV file")
    options = parser.parse_args()
    torch.manual_seed(0)
    text = pathlib.Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[: len(text) // 64 * 64].reshape(-1, 64)

    # Any logger of Lightning's will do: TensorBoardLogger(options.out), WandbLogger(), ...
    logger = CSVLogger(options.out, flush_logs_every_n_steps=1)
    watching = AttnResCallback(every_steps=max(1, options.steps // 4), example_inputs={"input_ids": rows[:2]})
    settings = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=options.steps, logger=logger, callbacks=[watching], log_every_n_steps=1, **settings)
    trainer.fit(ByteModel(options.backend), torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True))
    print(f"{trainer.global_step} steps, loss {trainer.callback_metrics['loss']:.3f}, log in {logger.log_dir}")


if __name__ == "__main__":
    main()
