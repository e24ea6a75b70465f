"""The model is one of Transformers' own for those who train it: stock Trainer, and LoRA of PEFT."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from modeling_ttt import TTTConfig, TTTForCausalLM

PROJECTIONS = {
    "linear": ["q_proj", "k_proj", "v_proj", "o_proj", "g_proj", "gate_proj", "up_proj", "down_proj"],
    "mlp": ["q_proj", "v_proj", "o_proj"],
}


def new_model(kind="linear"):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return TTTForCausalLM(TTTConfig(**sizes, num_attention_heads=2, mini_batch_size=4, ttt_layer_type=kind)).float()


def documents(count=12, length=18):
    """A few documents that repeat a pattern, as the Trainer expects a dataset."""
    rows = [torch.arange(start, start + length) % 7 + 3 for start in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step
        return control


def fit(folder, *, kind="linear", resume=None, stop_at=None, **options):
    settings = {"max_steps": 8, "save_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 3, **options}
    trainer = Trainer(
        model=new_model(kind),
        args=TrainingArguments(
            str(folder), report_to=[], use_cpu=True, learning_rate=0.02, disable_tqdm=True, seed=1, **settings
        ),
        train_dataset=documents(),
        callbacks=[StopAt(stop_at)] if stop_at else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_stock_trainer_trains_and_resumes_bit_for_bit(tmp_path, kind):
    whole = fit(tmp_path / "whole", kind=kind)
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.3
    fit(tmp_path / "parts", kind=kind, stop_at=4)
    assert (tmp_path / "parts" / "checkpoint-4").is_dir()
    resumed = fit(tmp_path / "parts", kind=kind, resume=str(tmp_path / "parts" / "checkpoint-4"))
    assert resumed.state.global_step == 8
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-8")
    ids = documents()[0]["input_ids"][None]
    torch.testing.assert_close(loaded(ids).logits, whole.model.eval()(ids).logits)


def test_the_stock_trainer_takes_bf16_gradient_checkpointing_and_evaluates(tmp_path):
    trainer = fit(tmp_path, bf16=True, gradient_checkpointing=True, max_steps=2, gradient_accumulation_steps=2)
    scores = trainer.evaluate(documents(4))
    assert 0 < scores["eval_loss"] < 10


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_lora_trains_only_its_adapters_merges_and_reloads(tmp_path, kind):
    peft = pytest.importorskip("peft", reason="needs peft, which the test extra installs")
    model = new_model(kind)
    ids = torch.stack([row["input_ids"] for row in documents(4)])
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = [name for name in PROJECTIONS[kind] if name in names]
    assert {"q_proj", "v_proj", "o_proj"} <= set(targets)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    )
    trained = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW([value for value in adapted.parameters() if value.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    adapted.eval()
    expected = adapted(input_ids=ids)
    assert len(expected.plasticity) == 2
    adapted.save_pretrained(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(new_model(kind), tmp_path / "adapter").eval()
    torch.testing.assert_close(reloaded(input_ids=ids).logits, expected.logits)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected.logits, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.state_dict().keys() == before.keys()
    assert any(not torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(loaded(ids).logits, merged(input_ids=ids).logits)
