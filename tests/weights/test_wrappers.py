"""State dicts of wrapped models: Lightning, torch.compile, DistributedDataParallel, FSDP, in any nesting."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import lively_model, same_weights
from MyGPT import GPTConfig, GPTModel, load_weights_into_gpt

CONFIG = GPTConfig(vocab_size=67, context_length=16, emb_dim=24, n_heads=3, n_layers=2, qkv_bias=True)


@pytest.mark.parametrize(
    "prefix", ["model.", "m.", "gpt.", "module.", "_orig_mod.", "model._orig_mod.", "module._orig_mod.m.", "a.b."]
)
@pytest.mark.parametrize("bare", [False, True])
def test_the_names_of_wrappers_are_removed(prefix: str, bare: bool, tmp_path: Path) -> None:
    model, fresh = lively_model(CONFIG), GPTModel(CONFIG)
    state_dict = model.transformer.state_dict() if bare else model.state_dict()
    wrapped = {f"{prefix}{name}": tensor for name, tensor in state_dict.items()}
    load_weights_into_gpt(fresh, wrapped)
    assert same_weights(fresh, model)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(wrapped, tmp_path / "last.pt")
    assert same_weights(GPTModel.from_pretrained(tmp_path / "last.pt"), model)


def test_wrappers_of_single_blocks_are_removed() -> None:
    """torch.compile of each block, checkpoint wrappers and FSDP add their names within the names of the model."""
    model, fresh = lively_model(CONFIG), GPTModel(CONFIG)
    renamed = {
        name.replace("h.0.", "h.0._orig_mod.").replace(".mlp.", "._checkpoint_wrapped_module.mlp."): tensor
        for name, tensor in model.state_dict().items()
    }
    load_weights_into_gpt(fresh, {f"_fsdp_wrapped_module.{name}": tensor for name, tensor in renamed.items()})
    assert same_weights(fresh, model)


def test_other_tensors_beside_the_model_are_not_guessed_away() -> None:
    weights = {f"model.{name}": tensor for name, tensor in lively_model(CONFIG).state_dict().items()}
    others: Mapping[str, Tensor] = {"loss.weight": torch.ones(3)}
    with pytest.raises(
        ValueError, match=r"these are not only the weights of one GPT-2 model: there is loss.weight besides model."
    ):
        load_weights_into_gpt(GPTModel(CONFIG), {**weights, **others})
    policy_and_reference = {f"{owner}.{name}": t for owner in ("a", "b") for name, t in weights.items()}
    with pytest.raises(ValueError, match=r"there is b.model.transformer.wte.weight besides a.model.:"):
        load_weights_into_gpt(GPTModel(CONFIG), policy_and_reference)


@pytest.mark.slow
def test_lightnings_checkpoint_opens(tmp_path: Path) -> None:
    """Lightning's Trainer writes a .ckpt with the state of the LightningModule, its optimizers and its loops."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, model: GPTModel) -> None:
            super().__init__()
            self.m = model

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            loss, count = self.m.token_loss(batch[:, :-1], batch[:, 1:])
            return loss / count

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    module = Module(GPTModel(CONFIG))
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_steps=2, default_root_dir=tmp_path, enable_checkpointing=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about workers and loggers
        trainer.fit(module, torch.utils.data.DataLoader(torch.randint(67, (4, 9)), batch_size=2))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    module.m.save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "saved/config.json", tmp_path)
    assert same_weights(GPTModel.from_pretrained(tmp_path / "last.ckpt"), module.m)
