"""A configuration for torchtitan's trainer, which is a function in Python and no TOML from 0.3 on.

    pip install torchtitan "qflux[hf]"
    qflux train --vocabulary bpe --output-dir runs/first
    qflux export --model-path runs/first --output-dir hf-model
    PYTHONPATH=examples torchrun --nproc-per-node 8 -m torchtitan.train \\
        --module torchtitan_config --config small --hf-assets-path hf-model

The trainer brings its data, its checkpoints and its metrics; the model comes from here, its weights
in shards over all processes (FSDP2). Its sequences are whole in each of them: splitting them is
`qflux.parallel.context_parallel`, which `qflux train --context-parallel` has and the trainer does
not. The tokenizer is that of an exported model. The trainer needs GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import TrainingConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from qflux import make_config, make_model
from qflux.analysis.counts import interact_flops

SEED = 0


class FluxModel(BaseModel):
    """The language model among torchtitan's: token ids `(B, S)` to logits `(B, S, V)`."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        """The sizes of a preset of `qflux.make_config`."""

        vocab_size: int
        preset: str = "lm"
        num_layers: int = 8
        hidden_dim: int = 512
        num_cylinders: int = 16
        context_length: int = 1024

        def network(self):
            """The configuration as qflux has it."""
            names = ("num_layers", "hidden_dim", "num_cylinders", "context_length")
            sizes = {name: getattr(self, name) for name in names}
            return make_config(self.preset, self.vocab_size, **sizes)

        def update_from_config(self, *, config, **_) -> None:
            """Windows of the trainer's length, and no division that is not written."""
            self.context_length = config.training.seq_len
            division = config.parallelism
            for name in ("tensor", "context", "pipeline"):
                degree = getattr(division, f"{name}_parallel_degree")
                if degree > 1:
                    raise ValueError(f"{name}_parallel_degree must be 1 here, got {degree}")

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Parameters, and operations a token of forward and backward."""
            parameters = sum(parameter.numel() for parameter in model.parameters())
            network = self.network()
            layer = interact_flops(network.num_cylinders, seq_len, seq_len, network.value_dim)
            return parameters, 6 * parameters + 3 * network.num_layers * layer // seq_len

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = make_model(config.network())

    def forward(self, tokens: Tensor, **_) -> Tensor:
        return self.model(tokens).logits

    def verify_module_protocol(self) -> None:
        """The parts are plain modules of PyTorch."""

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """What the trainer emptied, as the model initialises itself: weights and constants."""
        with torch.random.fork_rng(), torch.device("cpu"):
            torch.manual_seed(SEED)
            fresh = make_model(self.config.network())
        made = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers())}
        own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, tensor in own.items():
            value = made[name].to(tensor.device)
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
            tensor.copy_(value)


def parallelize(model: FluxModel, *, parallel_dims, **_) -> FluxModel:
    """The weights in shards over the processes, those of a layer together."""
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    mesh = parallel_dims.get_mesh(names)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def small() -> Trainer.Config:
    """A model for the vocabulary of 4,096 byte pairs that `qflux train --vocabulary bpe` makes."""
    spec = ModelSpec(
        name="qflux",
        flavor="small",
        # The exported tokenizer has an end-of-text token beside them.
        model=FluxModel.Config(vocab_size=4097),
        parallelize_fn=parallelize,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )
    return Trainer.Config(
        model_spec=spec,
        loss=CrossEntropyLoss.Config(),
        hf_assets_path="hf-model",
        optimizer=default_adamw(lr=2e-3),
        lr_scheduler=LRSchedulersContainer.Config(
            warmup_steps=50, decay_ratio=0.9, decay_type="linear", min_lr_factor=0.05
        ),
        training=TrainingConfig(local_batch_size=8, seq_len=1024, steps=1000),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4"),
    )
